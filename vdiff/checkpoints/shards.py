"""Safetensors written tensor by tensor, in one file or in shards with an index; whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from vdiff.checkpoints.weights import safetensors_header, sync, sync_folder, tensor_bytes

METADATA = {"format": "pt"}  # transformers and diffusers read no file without it


def write_streamed(
    files: Mapping[Path, Mapping[str, Tensor]],
    tensors: Iterable[tuple[Path, str, Tensor]],
    shard_size: int | None = None,
) -> list[Path]:
    """Write files whose tensors come one at a time, in any order.

    All go to temporary files first, which are renamed when the last tensor is there, an index after its shards.

    Args:
        files: What each will hold, on the meta device.
        tensors: File, name and tensor.
        shard_size: Bytes of a shard at most, or of its largest tensor. A file that fits stays one.

    Returns:
        The files written.
    """
    writers: dict[tuple[Path, str], _Writer] = {}
    indices: list[tuple[Path, Path]] = []
    all_writers: list[_Writer] = []
    folders = [folder for file in files for folder in _new_folders(file.parent)]
    try:
        for file, held in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            shards = _shards(file, held, shard_size)
            for shard, inside in shards.items():
                writer = _Writer(shard, inside)
                all_writers.append(writer)
                writers |= {(file, name): writer for name in inside}
            if len(shards) > 1:
                indices.append((_index(file, shards), file.with_name(f"{file.name}.index.json")))
        for file, name, tensor in tensors:
            writers.pop((file, name)).put(name, tensor)
            del tensor  # not held while the next one is read
        assert not writers, f"promised and not written: {list(writers)[:4]}"
        for writer in all_writers:
            writer.close()
        written = [(writer.temporary, writer.file) for writer in all_writers] + indices
        for temporary, file in written:
            os.replace(temporary, file)
        for folder in {file.parent for file in files}:
            sync_folder(folder)
        return [file for _, file in written]
    except BaseException:
        for temporary in [writer.temporary for writer in all_writers] + [temporary for temporary, _ in indices]:
            temporary.unlink(missing_ok=True)
        for folder in sorted(set(folders), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        for writer in all_writers:
            writer.out.close()


class _Writer:
    """One file, its header first and every tensor at its place."""

    def __init__(self, file: Path, held: Mapping[str, Tensor]) -> None:
        self.file, self.temporary = file, _temporary(file)
        text, offsets = safetensors_header(file, held, METADATA)
        self._offsets = {name: len(text) + offset for name, offset in offsets.items()}
        self._held = held
        self.out: BinaryIO = open(self.temporary, "wb")
        self.out.write(text)

    def put(self, name: str, tensor: Tensor) -> None:
        meant = self._held[name]
        assert tensor.shape == meant.shape and tensor.dtype == meant.dtype, f"{name}: not as promised"
        self.out.seek(self._offsets[name])
        self.out.write(tensor_bytes(tensor))

    def close(self) -> None:
        sync(self.out)
        self.out.close()


def _shards(file: Path, held: Mapping[str, Tensor], size: int | None) -> dict[Path, dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, value in held.items():
        length = value.numel() * value.element_size()
        if size is not None and groups[-1] and filled + length > size:
            groups.append({})
            filled = 0
        groups[-1][name] = value
        filled += length
    if len(groups) == 1:
        return {file: groups[0]}
    ending = f"of-{len(groups):05d}{file.suffix}"
    return {file.with_name(f"{file.stem}-{i:05d}-{ending}"): group for i, group in enumerate(groups, 1)}


def _index(file: Path, shards: Mapping[Path, Mapping[str, Tensor]]) -> Path:
    total = sum(v.numel() * v.element_size() for held in shards.values() for v in held.values())
    places = {name: shard.name for shard, held in shards.items() for name in held}
    temporary = _temporary(file.with_name(f"{file.name}.index.json"))
    with open(temporary, "wb") as out:
        text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        out.write(json.dumps(text, indent=2).encode() + b"\n")
        sync(out)
    return temporary


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp-{os.getpid()}")


def _new_folders(folder: Path) -> list[Path]:
    return [place for place in (folder, *folder.parents) if not place.exists()]
