"""Text towers as embedders: what all of them share.

A frozen tower always encodes the same number of prompts at once, so that an embedding depends on its
prompt alone, bit for bit, and not on the batch around it; and it encodes each prompt once, for
embeddings are remembered. A tower that trains encodes the different prompts of a batch together.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.checkpoints import load_into, read_weights
from vdiff.conditioners.base import Embedder, Embedding, Feeds
from vdiff.conditioners.memory import EmbeddingMemory, Row
from vdiff.conditioners.new_words import new_words, tokenize_around
from vdiff.hooks import is_port_key
from vdiff.process import upload

TOGETHER = 8  # prompts that a frozen tower encodes at once; few enough for one prompt to be quick


class TextEmbedder(Embedder, abstract=True):
    """Prompts, ``B`` strings, or token ids ``(B, length)`` -> tokens, and one pooled vector if wanted.

    What of a prompt is beyond ``length`` tokens is cut off; the first that is cut gives a warning.

    Args:
        reads, drop: See :class:`Embedder`.
        feeds: The name that the tokens feed, ``(B, length, width)``, or with ``layer: pooled`` the pooled vector.
        null: ``empty``, the embedding of the empty prompt, or ``zero``. Networks were trained with one of them, and
            guidance needs the same.
        pooled_feeds: The name that the pooled vector feeds besides, ``(B, pooled width)``.
        layer: ``pooled``, or which block gives the tokens.
        masked: Whether to tell the network which tokens are padding, for its attention to leave out. The published
            image and video networks were trained without.
        template: Every prompt is put in place of its ``{}``; the empty prompt stays empty.
        trainable: Otherwise frozen, and in eval mode. What ``train:`` names in a run file trains in any case.
        memory: Megabytes of embeddings that a frozen tower remembers.
        folder: Where a frozen tower keeps them from run to run, if anywhere.
    """

    has_empty = True
    end_id: int  # of the token that closes a prompt
    pad_id: int

    def __init__(
        self,
        reads: str,
        feeds: str,
        drop: float,
        null: Literal["zero", "empty"],
        pooled_feeds: str | None,
        layer: str,
        masked: bool,
        template: str,
        trainable: bool,
        memory: float,
        folder: Path | None,
    ) -> None:
        super().__init__(reads, feeds, drop, null)
        if template.count("{}") != 1:
            raise ValueError(f"{type(self).__name__}: a template has one {{}} for the prompt, got {template!r}.")
        if layer == "pooled" and (pooled_feeds is not None or masked):
            raise ValueError(f"{type(self).__name__}: with layer 'pooled' there are no tokens to mask or to feed.")
        if pooled_feeds == feeds:
            raise ValueError(f"{type(self).__name__}: tokens and pooled vector both feed {feeds!r}.")
        self.pooled_feeds, self.layer, self.masked, self.template = pooled_feeds, layer, masked, template
        self.trainable = trainable
        self.remembered = EmbeddingMemory(memory, folder)
        self.is_random = self.has_cut = False
        self.register_load_state_dict_post_hook(_weights_came)

    # What a tower brings -------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, whole: what begins it, if anything, the text, and ``end_id``."""

    @abstractmethod
    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        """``tokens`` ``(B, length, width)`` and ``pooled`` ``(B, width)``, those of them that are wanted."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a prompt, with its padding."""

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The model."""

    def identity(self) -> str:
        """What makes an embedding besides the prompt and the weights, for embeddings kept in a folder."""
        return f"{type(self).__name__} {self.layer} {self.length}"

    def load_tower(self, file: Path | None, prefixes: Mapping[str, str], ignore: Sequence[str], what: str) -> None:
        """Weights from a file, whose names may begin with any one of ``prefixes``; and freeze what does not train.

        On the meta device nothing is read, so that a config can be tested where its weights are not.
        """
        self.what = what
        if any(p.is_meta for p in self.tower.parameters()):
            pass
        elif file is None:
            self.is_random = True
        else:
            tensors = read_weights(file)
            prefix = max((p for p in prefixes if any(name.startswith(p) for name in tensors)), key=len, default="")
            named = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            load_into(self.tower, {prefixes.get(prefix, "") + n: v for n, v in named.items()}, ignore=ignore,
                      where=f"{type(self).__name__} from {file}")  # fmt: skip
        if not self.trainable:
            self.tower.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TextEmbedder:
        super().train(mode)
        if self.is_frozen:
            self.tower.eval()
        return self

    @property
    def is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.tower.parameters())

    # From prompts to embeddings ------------------------------------------------------------------

    def forward(self, value: Sequence[str] | Tensor) -> dict[str, Embedding]:
        return self._feeds(*self._embeddings(self.ids(value)))

    def with_null(self, value: Sequence[str] | Tensor) -> tuple[Feeds, Feeds]:
        if self.null_kind == "zero":
            return super().with_null(value)
        ids = self.ids(value)
        rows, counts = self._embeddings(torch.cat([ids, self.empty_ids().to(ids)]))
        num = len(ids)
        null = {name: one[-1:].expand(num, *one.shape[1:]) for name, one in rows.items()}
        return (
            self._feeds({name: one[:-1] for name, one in rows.items()}, counts[:-1]),
            self._feeds(null, counts[-1:].expand(num, -1)),
        )

    def ids(self, value: Any) -> Tensor:
        """Token ids ``(B, length)`` of prompts or of token ids, on the host.

        Raises:
            ValueError: neither of them, or ids of another length.
        """
        if isinstance(value, Tensor):
            if value.ndim != 2 or value.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}: {self.reads} holds strings, or whole token ids (B, {self.length}); "
                    f"got {tuple(value.shape)} of {value.dtype}."
                )
            if value.shape[1] > self.length:
                raise ValueError(
                    f"{type(self).__name__}: {value.shape[1]} token ids in a row; this tower reads {self.length}."
                )
            return F.pad(value.cpu(), (0, self.length - value.shape[1]), value=self.pad_id)
        if isinstance(value, str) or not all(isinstance(prompt, str) for prompt in value):
            raise ValueError(
                f"{type(self).__name__}: {self.reads} holds one string per row, such as ['a cat']; got {value!r:.100}."
            )
        prompts = [self.template.replace("{}", prompt) if prompt else "" for prompt in value]
        rows = self._whole(prompts)
        self._say_if_cut(prompts, rows)
        return self._fitted(rows)

    def empty_ids(self) -> Tensor:
        """Token ids of the empty prompt, ``(1, length)``."""
        return self._fitted(self.tokenize([""]))

    def _whole(self, prompts: Sequence[str]) -> list[list[int]]:
        return tokenize_around(new_words(self.tower), prompts, self.tokenize)

    def _fitted(self, rows: Sequence[list[int]]) -> Tensor:
        """Rows of token ids, each cut or padded to ``(B, length)``."""
        last = self.length - 1
        cut = [row if len(row) <= self.length else [*row[:last], self.end_id] for row in rows]
        return torch.tensor([row + [self.pad_id] * (self.length - len(row)) for row in cut], device="cpu")

    def parse(self, word: str) -> str:
        return word

    def _feeds(self, rows: Row, counts: Tensor) -> dict[str, Embedding]:
        if self.layer == "pooled":
            return {self.feeds: Embedding(rows["pooled"])}
        feeds = {self.feeds: Embedding(rows["tokens"], counts if self.masked else None)}
        if self.pooled_feeds is not None:
            feeds[self.pooled_feeds] = Embedding(rows["pooled"])
        return feeds

    def _embeddings(self, ids: Tensor) -> tuple[Row, Tensor]:
        """Of every row, and which tokens count; each different prompt is encoded once."""
        self._say_if_random()
        different, place = torch.unique(ids, dim=0, return_inverse=True)
        device = next(self.tower.parameters()).device
        counts = upload(self.counts(ids), device)
        if self.is_frozen:
            rows = self._remember(different, device)
        else:
            rows = self.encode(upload(different, device))
        place = upload(place, device)
        return {name: one[place] for name, one in rows.items()}, counts

    def counts(self, ids: Tensor) -> Tensor:
        """Which tokens are no padding: those up to the first that ends the prompt, ``(B, length)``."""
        is_end = (ids == self.end_id).int()
        return is_end.cumsum(1) - is_end == 0

    # Memory of a frozen tower --------------------------------------------------------------------

    def _remember(self, ids: Tensor, device: torch.device) -> Row:
        words = [hashlib.sha256(row.long().numpy().tobytes()).hexdigest() for row in ids]
        # With something attached, the prompt no longer says what comes out.
        is_bare = not any(is_port_key(name) for name, _ in self.tower.named_modules())
        state = self._state(device)
        found: dict[int, Row] = {}
        for i, word in enumerate(words):
            row = self.remembered.get(f"{state} {word}") if is_bare else None
            if row is None and is_bare and self.remembered.folder is not None:
                row = self.remembered.read(self._file(word, state))
                row = row and {name: upload(value, device) for name, value in row.items()}
            if row is not None:
                found[i] = row
        missing = [i for i in range(len(words)) if i not in found]
        for start in range(0, len(missing), TOGETHER):
            part = missing[start : start + TOGETHER]
            chunk = ids[part + part[-1:] * (TOGETHER - len(part))]
            encoded = self.encode(upload(chunk, device))
            for place, i in enumerate(part):
                found[i] = {name: one[place].clone() for name, one in encoded.items()}
                if is_bare:
                    self.remembered.write(self._file(words[i], state), found[i])
        if is_bare:
            for i, row in found.items():
                self.remembered.keep(f"{state} {words[i]}", row)
        return {name: torch.stack([found[i][name] for i in range(len(words))]) for name in found[0]}

    def _state(self, device: torch.device) -> str:
        """What of the tower decides an embedding; its weights by how often they were written."""
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        writes = sum(p._version for p in self.tower.parameters())
        return f"{device} {next(self.tower.parameters()).dtype} {cast} {writes}"

    def _file(self, word: str, state: str) -> str:
        if getattr(self, "_fingerprint", ("",))[0] != state:
            digest = hashlib.sha256(f"{self.identity()} {state.split()[1:3]}".encode())
            for name, value in sorted(self.tower.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = (state, digest.hexdigest())
        return hashlib.sha256(f"{self._fingerprint[1]} {word}".encode()).hexdigest()

    def _say_if_random(self) -> None:
        if self.is_random:
            self.is_random = False
            advice = (
                "it learns from scratch" if not self.is_frozen else "its embeddings mean nothing; give weights: FILE"
            )
            warnings.warn(f"{type(self).__name__}: {self.what} has random weights: {advice}.", stacklevel=2)

    def _say_if_cut(self, prompts: Sequence[str], rows: Sequence[list[int]]) -> None:
        long = [i for i, row in enumerate(rows) if len(row) > self.length]
        if self.has_cut or not long:
            return
        self.has_cut, prompt = True, prompts[long[0]]
        ends = [word.end() for word in re.finditer(r"\S{1,20}", prompt)]
        num_kept = bisect_right(ends, self.length, key=lambda end: len(self._whole([prompt[:end]])[0]))
        lost = prompt[ends[num_kept - 1] if num_kept else 0 :].strip()
        warnings.warn(
            f"{type(self).__name__}: this tower reads {self.length} tokens and a prompt has {len(rows[long[0]])}; it "
            f"is cut before {lost[:60]!r}. Others may be cut too, and are not named.",
            stacklevel=2,
        )


def _weights_came(embedder: nn.Module, keys: Any) -> None:
    assert isinstance(embedder, TextEmbedder)
    embedder.remembered.forget()
    embedder.is_random = embedder.is_random and bool(keys.missing_keys)
