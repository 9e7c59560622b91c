"""Embeddings kept, by what was embedded and by what embedded it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.checkpoints import read_weights, save_weights

Row = Mapping[str, Tensor]


class EmbeddingMemory:
    """The embeddings asked for last, in memory and, if wanted, all of them in a folder.

    Args:
        megabytes: Of memory, where the embeddings are; beyond it the one unused for longest goes. 0: none.
        folder: One safetensors file each, under the hash they are asked for by; it may be shared by runs.
    """

    def __init__(self, megabytes: float, folder: Path | None = None) -> None:
        self.limit, self.folder = int(megabytes * 2**20), folder
        self.rows: OrderedDict[str, Row] = OrderedDict()
        self.size = 0

    def get(self, key: str) -> Row | None:
        if key in self.rows:
            self.rows.move_to_end(key)
            return self.rows[key]
        return None

    def read(self, name: str) -> Row | None:
        """From the folder, on the host."""
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        return read_weights(file) if file is not None and file.is_file() else None

    def keep(self, key: str, row: Row) -> None:
        size = sum(value.nbytes for value in row.values())
        if size > self.limit or key in self.rows:
            return
        self.rows[key] = row
        self.size += size
        while self.size > self.limit:
            self.size -= sum(value.nbytes for value in self.rows.popitem(last=False)[1].values())

    def write(self, name: str, row: Row) -> None:
        if self.folder is not None:
            save_weights(self.folder / f"{name}.safetensors", {k: v.detach().cpu() for k, v in row.items()})

    def forget(self) -> None:
        self.rows.clear()
        self.size = 0
