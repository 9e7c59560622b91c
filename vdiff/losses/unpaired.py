"""Preference without pairs: every row is wanted or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.losses.base import Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.pointwise import MSELoss
from vdiff.losses.preference import logged, reference_of
from vdiff.process import NoiseLevel, Prediction


class KTOLoss(Loss, name="kto"):
    r"""Diffusion-KTO: every row is worth what it gains over the reference, as people feel gains and losses.

    With :math:`g = L^{ref} - L` of a row, :math:`z` the baseline, :math:`s = +1` for a wanted row and -1 for one that
    is not, the loss is

    - ``kahneman_tversky``: :math:`\lambda\,(1 - \sigma(s\beta(g - z)))`, gains and losses both level off;
    - ``loss_averse``: :math:`-\lambda\log\sigma(s\beta(g - z))`;
    - ``risk_seeking``: :math:`\lambda\log\sigma(-s\beta(g - z))`, which has no lower bound.

    The baseline has no gradient. ``batch`` is the published one, the mean of g over the rows of the batch (of one
    process and one micro-batch), at least 0; then a row's loss depends on the rows beside it. A number is the
    same for all rows. A running mean would be memory that a resumed run lacks, so there is none.

    Metrics, under ``preference/``: ``reward`` (g), ``accuracy`` (share of rows with g on the right side of 0),
    ``win_error`` and ``lose_error``, ``baseline``.

    Args:
        beta: How dear it is to leave the reference; there is no half here, as published.
        field: Batch field that says what is wanted, ``(B,)``: True or above 0 is.
        wanted, unwanted: The :math:`\lambda` of either kind; with unequal numbers of them, numbers that make
            wanted * rows wanted about equal to unwanted * rows unwanted.
        baseline: See above.
        utility: See above.
        error: What L is; by default the squared error in the network's own language.

    References:
        Li et al., arXiv:2404.04465; Ethayarajh et al., arXiv:2402.01306.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        field: str = "wanted",
        wanted: float = 1.0,
        unwanted: float = 1.0,
        baseline: Literal["batch"] | float = "batch",
        utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky",
        error: PointwiseLoss | None = None,
    ) -> None:
        if not beta > 0 or wanted < 0 or unwanted < 0:
            raise ValueError(
                f"KTOLoss: beta must be positive and the weights not negative, got {beta}, {wanted} and {unwanted}."
            )
        if isinstance(baseline, str) and baseline != "batch":
            raise ValueError(f"KTOLoss: baseline is 'batch' or a number, got {baseline!r}.")
        if utility not in ("kahneman_tversky", "loss_averse", "risk_seeking"):
            raise ValueError(f"KTOLoss: utility {utility!r} is not kahneman_tversky, loss_averse or risk_seeking.")
        self.beta, self.field, self.wanted, self.unwanted = beta, field, wanted, unwanted
        self.baseline, self.utility = baseline, utility
        self.error = MSELoss() if error is None else error

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        errors = self.error.errors(prediction, x0, noise, level, batch)
        with torch.no_grad():
            theirs = self.error.errors(reference_of(prediction, "KTOLoss"), x0, noise, level, batch)
        reward = theirs - errors
        baseline = self._baseline(reward.detach())
        is_wanted = self._is_wanted(batch, len(x0), errors.device)
        sign = torch.where(is_wanted, 1.0, -1.0).to(errors.dtype)
        weight = torch.where(is_wanted, self.wanted, self.unwanted).to(errors.dtype)
        per_row = (weight * self._felt(sign * self.beta * (reward - baseline))).float()
        nan = torch.full_like(errors, float("nan"))
        figures = {
            "reward": reward,
            "accuracy": ((sign * reward).detach().sign() + 1) / 2,
            "win_error": torch.where(is_wanted, errors, nan),
            "lose_error": torch.where(is_wanted, nan, errors),
            "baseline": baseline.expand_as(reward),
        }
        return LossValues(per_row, by_bucket(per_row, level) | logged(figures, len(x0)))

    def _felt(self, gain: Tensor) -> Tensor:
        if self.utility == "kahneman_tversky":
            return torch.sigmoid(-gain)  # 1 - sigmoid(gain), without cancellation
        if self.utility == "loss_averse":
            return -F.logsigmoid(gain)
        return F.logsigmoid(-gain)

    def _baseline(self, reward: Tensor) -> Tensor:
        if isinstance(self.baseline, str):
            return reward.mean().clamp(min=0)
        return torch.full_like(reward[:1], self.baseline).squeeze(0)

    def _is_wanted(self, batch: Mapping[str, Any], num_rows: int, device: torch.device) -> Tensor:
        value = batch.get(self.field)
        if not isinstance(value, Tensor) or value.shape != (num_rows,):
            said = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none"
            raise ValueError(
                f"KTOLoss: the batch needs a field {self.field!r} of shape ({num_rows},) that says which rows are "
                f"wanted, and has {said}. It has: {', '.join(batch)}."
            )
        return value.to(device) > 0
