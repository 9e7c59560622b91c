"""Means over steps and rows, without waiting for the device in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Keeps the values of every step as they are, and reads them once, when asked.

    In metrics a row that is NaN does not count: a metric of one noise bucket is NaN in all others.
    Figures of every row (the loss) are plain means, NaN if one of them is.
    """

    EVERY_ROW = ("loss", "grad_norm")

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().reshape(-1))

    def read(self) -> dict[str, float]:
        """The means since the last reading; one transfer."""
        names = [name for name, values in self._values.items() if values]
        if not names:
            return {}
        joined = {name: torch.cat(self._values[name]).float() for name in names}
        means = torch.stack([v.mean() if name in self.EVERY_ROW else v.nanmean() for name, v in joined.items()])
        self._values.clear()
        found = dict(zip(names, means.tolist(), strict=True))
        return {name: value for name, value in found.items() if value == value or name in self.EVERY_ROW}
