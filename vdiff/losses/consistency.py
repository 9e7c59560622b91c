r"""Few-step training: two points of one trajectory have one end.

What the student says of the end, x0, is compared with what is said a step further down the same trajectory, without
gradient: by the mixin ``teacher`` in ``Prediction.target``, who takes the step as a solver would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdiff.losses.base import Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.pointwise import MSELoss
from vdiff.process import NoiseLevel, Prediction, X0Parameterization

X0 = X0Parameterization()


class ConsistencyLoss(Loss):
    r"""Consistency distillation: :math:`\sqrt{E + c^2} - c`, with :math:`E` the error of a row against the target.

    With the squared error it is the pseudo-Huber distance :math:`\sqrt{\lVert d \rVert^2 + c'^2} - c'` over
    :math:`\sqrt n`, for n numbers a row and :math:`c' = c \sqrt n`. Latent consistency models take Huber's loss of each
    number: ``error: {type: huber, delta: 0.001, like: distance, parameterization: x0}, huber: null``.

    Metrics: ``consistency/error`` (E).

    Args:
        error: What E is; by default the squared error of x0.
        huber: The c above: where the distance turns from square to straight; None is E itself.
        per_step: Whether a pair counts as much more as its step is shorter, in sigma / alpha. A step from pure noise
            has no length there: on the host an error, on a device, which is not waited for, a loss that is NaN.

    References:
        Song et al., arXiv:2303.01469, eq. 7; Song & Dhariwal, arXiv:2310.14189, section 3.3 for c and table 1 for
        ``per_step``.
    """

    def __init__(
        self, error: PointwiseLoss | None = None, huber: float | None = 0.00054, per_step: bool = False
    ) -> None:
        if huber is not None and huber < 0:
            raise ValueError(f"ConsistencyLoss: huber must not be negative, got {huber}.")
        self.error = MSELoss(X0) if error is None else error
        self.huber, self.per_step = huber, per_step

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        target = prediction.target
        if target is None:
            raise ValueError(
                "ConsistencyLoss: the prediction carries no target to agree with. It takes a teacher and pairs of "
                "levels: engine.mixins: {teacher: {type: teacher}} and engine.sigma_sampler: {type: grid}."
            )
        truth = prediction.with_(language=X0, value=target.x0)
        error = self.error.errors(prediction, truth.x0, truth.noise, level, batch)
        per_row = self.distance(error)
        if self.per_step:
            per_row = per_row / _step(level, target.level).to(per_row)
        per_row = per_row.float()
        return LossValues(per_row, by_bucket(per_row, level) | {"consistency/error": error.detach().float()})

    def distance(self, error: Tensor) -> Tensor:
        """Of mean errors ``(B,)``."""
        if self.huber is None:
            return error
        root = (error + self.huber**2).clamp(min=torch.finfo(error.dtype).tiny).sqrt()
        return error / (root + self.huber)  # without cancellation


def _step(level: NoiseLevel, lower: NoiseLevel) -> Tensor:
    """Length of a step by row ``(B,)``; not a number where it is infinite."""
    if level.t.ndim > 1:
        raise ValueError(
            f"ConsistencyLoss: per_step measures one step a row, and the levels are by frame, {tuple(level.t.shape)}. "
            "Set per_step: false, or draw one level a row."
        )
    step = level.ratio - lower.ratio
    if step.device.type == "cpu" and not step.isfinite().all():
        raise ValueError(
            "ConsistencyLoss: per_step divides by a step in sigma / alpha, and the one from pure noise is infinite, so "
            "that pair would never count. Begin the grid below it (discretizer: {type: uniform, start: 0.99}), or set "
            "per_step: false."
        )
    return step.clamp(min=1e-8).where(step.isfinite(), torch.nan)
