"""Preference pairs: two examples of one data set, of which one is preferred."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vdiff.data.base import Dataset, Group, Row


class PairsDataset(Dataset, name="pairs"):
    """Pairs of examples by number, the preferred one first; ``{type: pairs, dataset: {...}, pairs: pairs.json}``.

    ``layout`` says how a pair reaches the engine:

    - ``rows``: two adjacent rows, w0, l0, w1, l1, ... in a batch. They share one noise key, so both see the
      same level and noise, and preference losses read them as they are. Both have the preferred one's conditions;
    - ``fields``: one row, with each of ``data_fields`` twice, ``win_video`` and ``lose_video``;
    - ``channels``: one row, with ``data_fields`` stacked along the channels, ``(2C, ...)``, preferred first: what
      VideoDPO's data loaders give.

    Args:
        dataset: One row per example.
        pairs: (preferred, rejected) numbers of its examples; or a file of them: ``.json`` with a list of such
            pairs or of objects with ``win`` and ``lose``, or ``.csv`` with these columns. Other columns, such
            as ``score``, become fields.
        data_fields: What is compared; other fields are conditions. By default those with a declared range.
        layout: See above.
    """

    def __init__(
        self,
        dataset: Dataset,
        pairs: Path | Sequence[tuple[int, int]],
        data_fields: Sequence[str] | None = None,
        layout: Literal["rows", "fields", "channels"] = "rows",
    ) -> None:
        if layout not in ("rows", "fields", "channels"):
            raise ValueError(f"PairsDataset: layout must be 'rows', 'fields' or 'channels', got {layout!r}.")
        where = str(pairs) if isinstance(pairs, str | Path) else "pairs"
        self.pairs = [_pair(entry, len(dataset), f"{where}, pair {n}") for n, entry in enumerate(_entries(pairs))]
        if not self.pairs:
            raise ValueError(f"PairsDataset: {where} has no pairs.")
        self.dataset, self.layout, self.classes = dataset, layout, dataset.classes
        self.data_fields = tuple(dataset.ranges if data_fields is None else data_fields)
        if not self.data_fields:
            raise ValueError(f"PairsDataset: {type(dataset).__name__} declares no ranges; say data_fields: [video].")
        self.ranges: Mapping[str, tuple[float, float]] = dataset.ranges
        if layout == "fields":
            compared = {f: r for f, r in dataset.ranges.items() if f in self.data_fields}
            self.ranges = {f"{side}_{f}": r for side in ("win", "lose") for f, r in compared.items()}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Group:
        win, lose, more = self._of(index)
        return self._laid_out(self.dataset[win], self.dataset[lose], more)

    def visit(self, index: int, key: int) -> Group:
        """Both are cropped and flipped by the same draw."""
        win, lose, more = self._of(index)
        return self._laid_out(self.dataset.visit(win, key), self.dataset.visit(lose, key), more)

    @property
    def num_dropped(self) -> int:
        return self.dataset.num_dropped

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.dataset.dropped

    def _of(self, index: int) -> tuple[int, int, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"PairsDataset: no pair {index}; there are {len(self)}.")
        return self.pairs[index]

    def _laid_out(self, win: Group, lose: Group, more: dict[str, Any]) -> Group:
        if not isinstance(win, Mapping) or not isinstance(lose, Mapping):
            raise ValueError(
                f"PairsDataset: {type(self.dataset).__name__} has groups of rows, and a pair is of two rows."
            )
        if missing := [f for f in self.data_fields if f not in win or f not in lose]:
            raise ValueError(f"PairsDataset: examples have no {missing[0]!r}; they have {', '.join(win)}.")
        shared = {field: value for field, value in win.items() if field not in self.data_fields} | more
        sides = [{field: row[field] for field in self.data_fields} for row in (win, lose)]
        if self.layout == "rows":
            return [side | shared for side in sides]
        row: Row = dict(shared)
        for field in self.data_fields:
            if self.layout == "channels":
                row[field] = torch.cat([torch.as_tensor(side[field]) for side in sides])
            else:
                row["win_" + field], row["lose_" + field] = (side[field] for side in sides)
        return row


def _entries(pairs: Any) -> Sequence[Any]:
    if not isinstance(pairs, str | Path):
        return pairs
    file = Path(pairs)
    if not file.is_file():
        raise FileNotFoundError(f"PairsDataset: there is no file {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        entries = list(csv.DictReader(text.splitlines())) if file.suffix == ".csv" else json.loads(text)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"PairsDataset: {file} cannot be read as {file.suffix[1:] or 'JSON'}: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"PairsDataset: {file} holds a {type(entries).__name__}, not a list of pairs.")
    return entries


def _pair(entry: Any, size: int, where: str) -> tuple[int, int, dict[str, Any]]:
    try:
        if isinstance(entry, Mapping):
            win, lose = int(entry["win"]), int(entry["lose"])
            more = {field: value for field, value in entry.items() if field not in ("win", "lose")}
        else:
            win, lose = (int(number) for number in entry)
            more = {}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"PairsDataset: {where} is {entry!r:.80}, expected two numbers, win and lose.") from error
    if not (0 <= win < size and 0 <= lose < size):
        raise ValueError(f"PairsDataset: {where} names examples {win} and {lose}; the data set has 0 to {size - 1}.")
    return win, lose, more
