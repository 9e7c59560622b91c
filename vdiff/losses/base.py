"""Losses compare a prediction with the truth, one value per row. They draw nothing and reduce nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdiff.losses.weightings import UnitWeighting, Weighting
from vdiff.process import NoiseLevel, Parameterization, Prediction, spread
from vdiff.process import parameterization as language_named
from vdiff.registry import Registered

# Edges of the buckets that losses are reported in, as sigma / alpha.
BUCKETS = (0.1, 0.5, 2.0, 10.0)


@dataclass(frozen=True, eq=False)
class LossValues:
    """What a training step gives.

    Attributes:
        per_row: The loss of each row, float32, shape ``(B,)``; the trainer averages.
        metrics: More to log, each ``(B,)`` without gradient; NaN where a row does not count.
    """

    per_row: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"per_row": self.per_row, **self.metrics}.items():
            if value.ndim != 1:
                raise ValueError(f"LossValues: {name} is one value per row, (B,); got the shape {tuple(value.shape)}.")


class Loss(Registered, kind="loss"):
    """``loss(prediction, x0, noise, level, batch) -> LossValues``. A loss names the batch fields it reads."""

    @abstractmethod
    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        """One value per row of ``x0``, shape ``(B, ...)``."""


class PointwiseLoss(Loss, abstract=True):
    """A function of the error at every point, weighted by level, averaged over a row.

    Args:
        parameterization: The language in which the error is measured; by default the network's own.
        weighting: Of the squared error, by level.
        mask: Name of a batch field that says what counts, 1 or 0 (or between): one number per row ``(B,)`` or per
            frame ``(B, F)``, or a tensor with the axes of x0; the mean is over what counts.
    """

    def __init__(
        self,
        parameterization: str | Parameterization | None = None,
        weighting: Weighting | None = None,
        mask: str | None = None,
    ) -> None:
        self.language = None if parameterization is None else language_named(parameterization)
        self.weighting = UnitWeighting() if weighting is None else weighting
        self.mask = mask

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        per_row = self.errors(prediction, x0, noise, level, batch).float()
        return LossValues(per_row, by_bucket(per_row, level))

    def errors(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> Tensor:
        """The weighted mean error of each row over all its axes, ``(B,)``, at least float32."""
        language = self.language or prediction.language
        said = prediction.to(language)
        said = said.to(torch.promote_types(said.dtype, torch.float32))
        error = self.pointwise(said - language.value(x0.to(said.dtype), noise.to(said.dtype), level))
        error = error * spread(self.weighting(level, language).to(error.dtype), error)
        return self._mean(error, batch)

    @abstractmethod
    def pointwise(self, difference: Tensor) -> Tensor:
        """The error at every point."""

    def _mean(self, error: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if self.mask is None:
            return error.flatten(1).mean(1)
        mask = self._mask(self.mask, batch, error)
        return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-8)

    def _mask(self, name: str, batch: Mapping[str, Any], error: Tensor) -> Tensor:
        who = f"{type(self).__name__}: mask {name!r}"
        if name not in batch:
            raise KeyError(f"{who}: the batch has no field {name!r}. It has: {', '.join(batch)}.")
        mask = spread(batch[name].to(error), error)
        try:
            return mask.expand_as(error)
        except RuntimeError as cause:
            shapes = f"shape {tuple(mask.shape)} does not fit x0 of shape {tuple(error.shape)}"
            raise ValueError(f"{who} of {shapes}.") from cause


def by_bucket(per_row: Tensor, level: NoiseLevel) -> dict[str, Tensor]:
    """The loss split by noise level: one entry per bucket of sigma / alpha, NaN for rows elsewhere."""
    ratio = level.ratio if level.t.ndim == 1 else level.ratio.mean(1)
    bucket = torch.stack([ratio.detach() > edge for edge in BUCKETS]).sum(0)
    value = per_row.detach()
    nan = torch.full_like(value, float("nan"))
    edges = ("0", *(f"{edge:g}" for edge in BUCKETS), "inf")
    return {
        f"loss/sigma_{edges[i]}_{edges[i + 1]}": torch.where(bucket == i, value, nan) for i in range(len(BUCKETS) + 1)
    }
