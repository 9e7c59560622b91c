"""Textual inversion: new words for a text tower, as rows that stand beside its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part, parts
from vdiff.mixins.base import Mixin
from vdiff.mixins.embedding_files import read_embeddings, save_embeddings


class TextualInversion(Mixin):
    """New words, each of one learned vector or several; the tower and its vocabulary stay as they are.

    Their token ids follow the vocabulary's. Attached to a text embedder, prompts may contain the words:
    ``"a photo of <cat>"``. Only their vectors are trained, so that no other row of the table can drift.

    Args:
        words: How many vectors each new word has, such as ``{"<cat>": 2}``.
        start: For some words, the token ids whose vectors they begin as, repeated where there are fewer; others
            begin at random, as large as the vocabulary's. See :meth:`start_from`.
        on: Tables of token embeddings, one; CLIP's have this name, T5's is ``*.shared``.
        name, scale: See :class:`Mixin`. The scale multiplies the vectors.

    References:
        Gal et al., arXiv:2208.01618.
    """

    def __init__(
        self,
        words: dict[str, int],
        start: dict[str, list[int]] | None = None,
        on: On = "*token_embedding",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if not words or any(not word.strip() or count < 1 for word, count in words.items()):
            raise ValueError(f"TextualInversion: words are names with how many vectors each has, got {words}.")
        if unknown := [word for word in start or {} if word not in words]:
            raise ValueError(f"TextualInversion: start names {unknown[0]!r}, which is none of its words.")
        self.words, self.start = dict(words), start
        self._given: dict[str, Tensor] = {}

    def part(self, module: nn.Module, site: str) -> TextualInversionPart:
        if not isinstance(module, nn.Embedding):
            raise ValueError(
                f"TextualInversion: {site!r} is a {type(module).__name__}; it goes on an nn.Embedding of tokens."
            )
        part = TextualInversionPart(module, self.words, self.start or {})
        part.fill(self._given)
        return part

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors of each word, ``(n, dim)``.

        Raises:
            ValueError: it was never attached, or to several tables.
        """
        tables = list(self.state_dict().values())
        if len(tables) != 1:
            raise ValueError(f"TextualInversion: {self.name!r} has {len(tables)} tables of vectors, not one.")
        return dict(zip(self.words, tables[0].split(list(self.words.values())), strict=True))

    def start_from(self, embedder: Any, word: str, text: str) -> None:  # noqa: ANN401  # rooms beside each other
        """Begin a word as the words of a text are, such as ``"toy"``.

        Args:
            embedder: The text embedder that it is attached to.
        """
        if not self.is_attached or word not in self.words:
            raise ValueError(f"TextualInversion: start_from wants it attached, and a word of {list(self.words)}.")
        row = embedder.ids([text])[0].tolist()
        begin = len(embedder.empty_ids()[0].tolist()[: embedder.empty_ids()[0].tolist().index(embedder.end_id)])
        ids = row[begin : row.index(embedder.end_id)]
        if not ids:
            raise ValueError(f"TextualInversion: {text!r} has no tokens.")
        for module, part in self._sites.values():
            assert isinstance(part, TextualInversionPart) and isinstance(module, nn.Embedding)
            part.fill({word: module.weight.detach()[ids]})

    # Files of the community ----------------------------------------------------------------------

    @classmethod
    def read(
        cls, file: str | Path, word: str | None = None, key: str | None = None, on: On = "*token_embedding"
    ) -> Self:
        """Of a file as others write it; see :func:`~vdiff.mixins.embedding_files.read_embeddings`.

        Args:
            word: What the word is called here; a file of several words keeps their names.
            key: Which of its entries, where a file holds one for each of several towers (SDXL: ``clip_l``, ``clip_g``).
        """
        found = read_embeddings(file, word, key)
        mixin = cls({name: len(vectors) for name, vectors in found.items()}, on=on)
        mixin._given = found
        return mixin

    def write(self, file: str | Path, key: str | None = None) -> None:
        """As one file that others read: a tensor ``(n, dim)`` per word, under its name, or under ``key``."""
        vectors = self.vectors
        if key is not None and len(vectors) > 1:
            raise ValueError(f"TextualInversion: {len(vectors)} words do not fit under one key, {key!r}.")
        save_embeddings(file, {key or word: value for word, value in vectors.items()})


class TextualInversionPart(Part):
    """Rows of a table of embeddings beyond its end.

    Attributes:
        words: The token ids of each word.
    """

    def __init__(self, table: nn.Embedding, words: Mapping[str, int], start: Mapping[str, list[int]]) -> None:
        super().__init__()
        taken = [part.end for part in parts(table) if isinstance(part, TextualInversionPart)]
        self.begin = first = max(taken, default=table.num_embeddings)
        self.words: dict[str, list[int]] = {}
        for word, count in words.items():
            self.words[word] = list(range(first, first + count))
            first += count
        self.end = first
        self.spread = float(table.weight.detach().float().std()) if not table.weight.is_meta else 0.02
        self.rows = nn.Parameter(torch.empty(self.end - self.begin, table.embedding_dim))
        self.asked: Tensor | None = None
        self.reset_parameters()
        self.fill({word: table.weight.detach()[ids] for word, ids in start.items()})

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.rows, std=self.spread)

    def fill(self, vectors: Mapping[str, Tensor]) -> None:
        """Vectors for some words, repeated where there are too few of them."""
        with torch.no_grad():
            for word, given in vectors.items():
                if given.shape[-1] != self.rows.shape[1]:
                    raise ValueError(
                        f"TextualInversion: the vectors of {word!r} are {given.shape[-1]} long, and this tower's "
                        f"{self.rows.shape[1]}. They belong to another tower."
                    )
                places = [i - self.begin for i in self.words[word]]
                self.rows[places] = given[[i % len(given) for i in range(len(places))]].to(self.rows)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = args[0] if args else kwargs["input"]
        self.asked = ids
        known = ids.masked_fill((ids >= self.begin) & (ids < self.end), 0)
        return (known,), {}

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        ids, self.asked = self.asked, None
        assert ids is not None
        place = (ids - self.begin).clamp(0, len(self.rows) - 1)
        new = self.rows[place]
        new = (new * self.amount(new)).to(output.dtype)
        return torch.where(((ids >= self.begin) & (ids < self.end))[..., None], new, output)

    def extra_repr(self) -> str:
        return ", ".join(f"{word} ({len(ids)})" for word, ids in self.words.items())
