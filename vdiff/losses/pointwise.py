"""Squared, absolute and Huber errors, in any language."""

from __future__ import annotations

from torch import Tensor

from vdiff.losses.base import PointwiseLoss
from vdiff.losses.weightings import Weighting
from vdiff.process import Parameterization


class MSELoss(PointwiseLoss):
    """Squared error."""

    def pointwise(self, difference: Tensor) -> Tensor:
        return difference**2


class L1Loss(PointwiseLoss):
    """Absolute error. A weighting still multiplies the error as it is measured."""

    def pointwise(self, difference: Tensor) -> Tensor:
        return difference.abs()


class HuberLoss(PointwiseLoss):
    """Squared where small, absolute where large: ``delta^2 (sqrt(1 + (d / delta)^2) - 1)`` times 2.

    The smooth (pseudo-Huber) form; for small errors it equals the squared error.

    Args:
        delta: Where it turns.
        parameterization, weighting, mask: See :class:`PointwiseLoss`.
    """

    def __init__(
        self,
        delta: float = 0.1,
        parameterization: str | Parameterization | None = None,
        weighting: Weighting | None = None,
        mask: str | None = None,
    ) -> None:
        super().__init__(parameterization, weighting, mask)
        if delta <= 0:
            raise ValueError(f"HuberLoss: delta must be positive, got {delta}.")
        self.delta = delta

    def pointwise(self, difference: Tensor) -> Tensor:
        ratio = difference / self.delta
        # sqrt(1 + r^2) - 1 without cancellation
        return 2 * self.delta**2 * ratio**2 / (1 + (1 + ratio**2).sqrt())
