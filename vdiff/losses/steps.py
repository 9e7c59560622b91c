"""Preference between two next steps from one state, rather than between two finished samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.losses.base import Loss, LossValues
from vdiff.losses.preference import check_pairs, logged, reference_of, sides
from vdiff.process import NoiseLevel, Prediction, spread


class SPOLoss(Loss, name="spo"):
    r"""Step-aware preference optimisation, as far as it is defined by one step.

    Someone walked from noise with a stochastic sampler, drew several next states :math:`x_s` from one :math:`x_t`, and
    a judge of noisy states chose a better and a worse one. This loss takes it from there. Under a policy the next
    state is Gaussian (DDIM with ``eta``, in the schedule's own frame),

    .. math:: x_s \sim N(\alpha_s \hat x_0 + \sqrt{\sigma_s^2 - d^2}\,\hat\epsilon,\; d^2), \qquad
              d = \eta\,\sigma_s \sqrt{1 - (\alpha_t\sigma_s / \alpha_s\sigma_t)^2},

    so a log-likelihood is at hand. With r its excess over the reference's, a mean over all axes clipped to
    :math:`[\log(1 - c), \log(1 + c)]`, the loss is :math:`-\log\sigma(\beta(r_w - r_l))`.

    Rows are pairs w0, l0, w1, l1, ... that share ``x_t``. The walk and the judge are not here: call
    ``loss(denoiser(x_t, level, cond), x0, noise, level, batch)`` with the states of the walk; ``x0`` and ``noise``
    are not read. Batch fields: ``next`` (like x_t), ``next_alpha`` and ``next_sigma`` ``(B,)``, above 0.

    Args:
        beta: How dear it is to leave the reference.
        clip: The c above; None does not clip.
        eta: Of the walk; 1 is ancestral.

    References:
        Liang et al., arXiv:2406.04314.
    """

    def __init__(self, beta: float = 10.0, clip: float | None = 0.1, eta: float = 1.0) -> None:
        if not beta > 0 or not 0 < eta <= 1 or (clip is not None and not 0 < clip < 1):
            raise ValueError(
                f"SPOLoss: beta must be positive, eta in (0, 1] and clip in (0, 1) or None, got {beta}, {eta}, {clip}."
            )
        self.beta, self.clip, self.eta = beta, clip, eta

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        for field in ("next", "next_alpha", "next_sigma"):
            if field not in batch:
                raise KeyError(
                    f"SPOLoss: the batch has no field {field!r}: the states drawn from x_t, and the level they are at. "
                    f"It has: {', '.join(batch)}."
                )
        check_pairs(len(prediction.x_t), batch, "SPOLoss")
        likelihood = self.log_likelihood(prediction, batch)
        with torch.no_grad():
            theirs = self.log_likelihood(reference_of(prediction, "SPOLoss"), batch)
        ratio = likelihood - theirs
        if self.clip is not None:
            ratio = ratio.clamp(math.log(1 - self.clip), math.log(1 + self.clip))
        margin = ratio[0::2] - ratio[1::2]
        per_row = -F.logsigmoid(self.beta * margin).repeat_interleave(2).float()
        figures = {"margin": margin, "accuracy": (margin.detach().sign() + 1) / 2}
        return LossValues(per_row, logged(figures | sides(ratio, "win_ratio", "lose_ratio"), len(ratio)))

    def log_likelihood(self, prediction: Prediction, batch: Mapping[str, Any]) -> Tensor:
        """Of the next states, ``(B,)``, a mean over their axes, but for a constant of the level."""
        level, like = prediction.level, prediction.x_t
        next_alpha, next_sigma = batch["next_alpha"].to(level.alpha), batch["next_sigma"].to(level.sigma)
        kept = (level.alpha * next_sigma) / (next_alpha * level.sigma)
        variance = (self.eta * next_sigma) ** 2 * (1 - kept**2)
        direction = (next_sigma**2 - variance).clamp(min=0).sqrt()
        mean = spread(next_alpha, like) * prediction.x0 + spread(direction, like) * prediction.noise
        error = (batch["next"].to(mean) - mean) ** 2
        return -error.flatten(1).mean(1) / (2 * variance)
