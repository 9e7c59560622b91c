"""What trains an engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vdiff.data import Dataset
from vdiff.registry import Registered


@dataclass(frozen=True)
class FitResult:
    """Where a run ended.

    Attributes:
        step: Steps taken since its beginning, over all restarts.
        checkpoint: Folder of the last checkpoint.
        figures: The last value of every figure logged by this process.
    """

    step: int
    checkpoint: Path
    figures: dict[str, float] = field(default_factory=dict)


class Training(Registered, kind="training"):
    """How an engine is trained.

    Attributes:
        seed: Of the initial weights, the order of the data, levels, noise and dropout.
    """

    seed: int = 0

    @abstractmethod
    def fit(self, engine: nn.Module, data: Dataset | Mapping[str, Any], run: str | Path) -> FitResult:
        """Train ``engine`` on ``data`` and leave everything in the folder ``run``; continue what is there.

        Args:
            data: The training set, or ``{"train": ..., "validation": ...}``.
        """
