"""Pairs that come as one row each, as the two rows that preference losses read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from vdiff.data.base import Dataset, Group, Row


class PairRowsDataset(Dataset, name="pair_rows"):
    """Another data set's pairs as rows, preferred first: ``{type: pair_rows, dataset: {...}, layout: channels}``.

    For data that hold a pair in one row. The two rows of an example share one noise key, so both see the same level
    and noise, and have all other fields in common.

    - ``channels``: ``data_fields`` hold both along the channels, ``(2C, ...)``, preferred first: what the loaders of
      Diffusion-DPO and VideoDPO give;
    - ``fields``: for each field both ``win_<field>`` and ``lose_<field>``.

    Args:
        dataset: One row per pair.
        layout: See above.
        data_fields: What is compared; by default fields with a declared range. In the layout ``fields`` without
            their beginnings.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: Literal["channels", "fields"] = "channels",
        data_fields: Sequence[str] | None = None,
    ) -> None:
        if layout not in ("channels", "fields"):
            raise ValueError(f"PairRowsDataset: layout must be 'channels' or 'fields', got {layout!r}.")
        self.dataset, self.layout, self.classes = dataset, layout, dataset.classes
        self.ranges: Mapping[str, tuple[float, float]] = dataset.ranges
        if layout == "fields":
            self.ranges = {
                name.removeprefix(side): span
                for side in ("win_", "lose_")
                for name, span in dataset.ranges.items()
                if name.startswith(side)
            }
        self.data_fields = tuple(self.ranges if data_fields is None else data_fields)
        if not self.data_fields:
            raise ValueError(
                f"PairRowsDataset: {type(dataset).__name__} declares no ranges that fit {layout!r}; say "
                "data_fields: [video]."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Group:
        return self._rows(self.dataset[index])

    def visit(self, index: int, key: int) -> Group:
        return self._rows(self.dataset.visit(index, key))

    @property
    def num_dropped(self) -> int:
        return self.dataset.num_dropped

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.dataset.dropped

    def _rows(self, row: Group) -> Group:
        if not isinstance(row, Mapping):
            raise ValueError(f"PairRowsDataset: {type(self.dataset).__name__} has groups of rows already.")
        wanted = [f"{side}{f}" for f in self.data_fields for side in (("",) if self.layout == "channels" else SIDES)]
        if missing := [name for name in wanted if name not in row]:
            raise ValueError(f"PairRowsDataset: examples have no {missing[0]!r}; they have {', '.join(row)}.")
        shared = {name: value for name, value in row.items() if name not in wanted}
        win: Row = {}
        lose: Row = {}
        for name in self.data_fields:
            if self.layout == "fields":
                win[name], lose[name] = (row[side + name] for side in SIDES)
                continue
            value = torch.as_tensor(row[name])
            if len(value) % 2:
                raise ValueError(
                    f"PairRowsDataset: {name!r} of shape {tuple(value.shape)} does not hold two along its channels."
                )
            win[name], lose[name] = value.chunk(2)
        return [win | shared, lose | shared]


SIDES = ("win_", "lose_")
