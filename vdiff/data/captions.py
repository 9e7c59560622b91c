"""Captions for data that has labels only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np

from vdiff.data.base import Dataset, Group, Row
from vdiff.process import derive, stream


class CaptionsDataset(Dataset):
    """Another data set whose rows get a field ``caption``, made of a template and a word for the row's label.

    Each visit of training draws template and word anew, from the visit's own key; an example asked for by number
    always has the same. So captions vary from epoch to epoch and a run that is continued sees the same ones.

    Args:
        dataset: Its rows have an integer ``label``.
        templates: Sentences with one ``{}`` in each for the word.
        words: For every class the words for it, such as ``[[zero, "0"], [one, "1"]]``; by default the names that the
            data set gives its classes.
        drop_words: Probability with which training leaves out each other word of the sentence.
        odd_words: Probability with which it puts a made-up word of letters in its place. Both teach a text tower that
            learns from few sentences to find the word that matters among words it has never met.
        reads: The field with the label.
        writes: The field for the caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        templates: Sequence[str],
        words: Sequence[Sequence[str]] | None = None,
        drop_words: float = 0.0,
        odd_words: float = 0.0,
        reads: str = "label",
        writes: str = "caption",
    ) -> None:
        if words is None and dataset.classes is None:
            raise ValueError(f"CaptionsDataset: {type(dataset).__name__} does not name its classes; give `words`.")
        self.words = [list(w) for w in words] if words is not None else [[name] for name in dataset.classes or ()]
        self.templates = list(templates)
        if wrong := [t for t in self.templates if t.count("{}") != 1]:
            raise ValueError(f"CaptionsDataset: a template has one {{}} for the word, got {wrong[0]!r}.")
        if not self.templates or not all(self.words):
            raise ValueError("CaptionsDataset: needs one template at least, and a word for every class.")
        if min(drop_words, odd_words) < 0 or drop_words + odd_words > 1:
            raise ValueError(
                "CaptionsDataset: drop_words and odd_words are probabilities and add up to at most 1, "
                f"got {drop_words} and {odd_words}."
            )
        self.dataset, self.reads, self.writes = dataset, reads, writes
        self.drop_words, self.odd_words = drop_words, odd_words
        self.ranges: Mapping[str, tuple[float, float]] = dataset.ranges
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Group:
        return self._told(self.dataset[index], derive("captions", index), is_training=False)

    def visit(self, index: int, key: int) -> Group:
        return self._told(self.dataset.visit(index, key), derive("captions", "visit", key), is_training=True)

    @property
    def num_kept(self) -> int:
        return self.dataset.num_kept

    @property
    def num_dropped(self) -> int:
        return self.dataset.num_dropped

    def _told(self, group: Group, key: int, is_training: bool) -> Group:
        if isinstance(group, list):  # the rows of a pair are told the same
            return [self._row(row, key, is_training) for row in group]
        return self._row(group, key, is_training)

    def _row(self, row: Row, key: int, is_training: bool) -> Row:
        if self.reads not in row:
            raise ValueError(f"CaptionsDataset: the rows have no {self.reads!r}. They have: {', '.join(row)}.")
        label = int(row[self.reads])
        if not 0 <= label < len(self.words):
            raise ValueError(f"CaptionsDataset: {self.reads} {label}; there are words for 0 to {len(self.words) - 1}.")
        random = stream("captions", key)
        template = self.templates[random.integers(len(self.templates))]
        word = self.words[label][random.integers(len(self.words[label]))]
        if is_training:
            template = " ".join(self._varied(part, random) for part in template.split())
        return {**row, self.writes: " ".join(template.split()).replace("{}", word)}

    def _varied(self, part: str, random: np.random.Generator) -> str:
        """A word of a template as it is, or nothing, or another."""
        chance = random.random()
        if "{}" in part or chance >= self.drop_words + self.odd_words:
            return part
        if chance < self.drop_words:
            return ""
        return "".join(random.choice(list(ascii_lowercase), random.integers(2, 8)))
