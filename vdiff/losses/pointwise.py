"""Squared, absolute and Huber errors, in any language."""

from __future__ import annotations

from typing import Literal

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
    r"""Squared where small, absolute where large: :math:`2\delta\,(\sqrt{d^2 + \delta^2} - \delta)`, the smooth
    (pseudo-Huber) form.

    Args:
        delta: Where it turns.
        parameterization, weighting, mask: See :class:`PointwiseLoss`.
        like: What it equals: the ``square`` of small errors, as above; or the ``distance`` of large ones, without the
            factor :math:`2\delta`, as the scripts of latent consistency models have it. Adam hardly sees the
            difference; a limit on the gradient's norm does.
    """

    def __init__(
        self,
        delta: float = 0.1,
        parameterization: str | Parameterization | None = None,
        weighting: Weighting | None = None,
        mask: str | None = None,
        like: Literal["square", "distance"] = "square",
    ) -> None:
        super().__init__(parameterization, weighting, mask)
        if delta <= 0:
            raise ValueError(f"HuberLoss: delta must be positive, got {delta}.")
        if like not in ("square", "distance"):
            raise ValueError(f"HuberLoss: like is square or distance, got {like!r}.")
        self.delta, self.like = delta, like

    def pointwise(self, difference: Tensor) -> Tensor:
        ratio = difference / self.delta
        # sqrt(1 + r^2) - 1 without cancellation
        distance = self.delta * ratio**2 / (1 + (1 + ratio**2).sqrt())
        return 2 * self.delta * distance if self.like == "square" else distance
