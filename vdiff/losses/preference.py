r"""Preference losses over pairs: what people like more is to become likelier, measured against a reference.

A diffusion model's log-likelihood is not at hand; minus its denoising error stands in for it. With :math:`L` the
mean error of a row over *all* its axes, :math:`w` the preferred row and :math:`l` the rejected one of a pair, at the
same level and under the same noise,

.. math:: m = (L_l - L_w) - (L_l^{ref} - L_w^{ref}), \qquad h = m / 2

is the margin by which the policy tells them apart better than the reference, and :math:`h` takes the place of the
log-ratio in DPO and its kin. The reference says its part in ``Prediction.reference``, put there by the
mixin ``ref_model``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.losses.base import Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.pointwise import MSELoss
from vdiff.process import NoiseLevel, Prediction


class PairwiseLoss(Loss, abstract=True):
    """A function of the margin of each pair. Rows are w0, l0, w1, l1, ..., as ``pairs`` and ``pair_rows`` give them.

    Both rows of a pair get its loss, so that the mean over rows is the mean over pairs. Metrics, under
    ``preference/``: ``margin`` (m), ``accuracy`` (share of pairs with m > 0, ties half), ``win_error``,
    ``lose_error``, and the same of the reference.

    Args:
        beta: How dear it is to leave the reference.
        error: What L is, its language, weighting and mask among it; by default the squared error in the network's own.
        shared_noise: Whether a pair must share its noise key. False accepts pairs whose rows are at other
            levels, which is noisier.

    Attributes:
        needs_reference: Whether there is a reference in it; without, m is :math:`L_l - L_w`.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(self, beta: float, error: PointwiseLoss | None = None, shared_noise: bool = True) -> None:
        if not beta > 0:
            raise ValueError(f"{type(self).__name__}: beta must be positive, got {beta}.")
        self.beta, self.shared_noise = beta, shared_noise
        self.error = MSELoss() if error is None else error

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        who = type(self).__name__
        check_pairs(len(x0), batch, who, self.shared_noise)
        errors = self.error.errors(prediction, x0, noise, level, batch)
        figures = sides(errors, "win_error", "lose_error")
        excess = errors
        if self.needs_reference:
            with torch.no_grad():
                theirs = self.error.errors(reference_of(prediction, who), x0, noise, level, batch)
            figures |= sides(theirs, "reference_win_error", "reference_lose_error")
            excess = errors - theirs
        margin = excess[1::2] - excess[0::2]
        per_row = self.of_margin(margin).repeat_interleave(2).float()
        figures = {"margin": margin, "accuracy": (margin.detach().sign() + 1) / 2} | figures
        return LossValues(per_row, by_bucket(per_row, level) | logged(figures, len(x0)))

    @abstractmethod
    def of_margin(self, margin: Tensor) -> Tensor:
        """The loss of each pair, given ``m`` of shape ``(B / 2,)``."""


class DiffusionDPOLoss(PairwiseLoss, name="diffusion_dpo", aliases=("dpo",)):
    r"""Diffusion-DPO: :math:`-\log\sigma(\beta h)`, which is ln 2 while policy and reference agree.

    Args:
        beta: 2000 to 5000 for errors of epsilon at the scale of Stable Diffusion.
        label_smoothing: How often a label may be wrong, in [0, 0.5): conservative DPO,
            :math:`-(1 - e)\log\sigma(\beta h) - e\log\sigma(-\beta h)`.
        error, shared_noise: See :class:`PairwiseLoss`.

    References:
        Wallace et al., arXiv:2311.12908, eq. 14 (its code has the same half; some others have none, and then
        half this beta does the same); smoothing: Mitchell, A note on DPO with noisy preferences, 2023.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        label_smoothing: float = 0.0,
        error: PointwiseLoss | None = None,
        shared_noise: bool = True,
    ) -> None:
        super().__init__(beta, error, shared_noise)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"DiffusionDPOLoss: label_smoothing must be in [0, 0.5), got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def of_margin(self, margin: Tensor) -> Tensor:
        logit = self.beta * margin / 2
        loss = -F.logsigmoid(logit)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-logit)
        return loss


class IPOLoss(PairwiseLoss, name="ipo"):
    r"""IPO: :math:`(h - 1 / (2\beta))^2`. It aims at a margin instead of growing it for ever.

    Args:
        beta, error, shared_noise: See :class:`PairwiseLoss`; the margin aimed at is 1 / beta.

    References:
        Azar et al., arXiv:2310.12036, eq. 17.
    """

    def __init__(self, beta: float = 100.0, error: PointwiseLoss | None = None, shared_noise: bool = True) -> None:
        super().__init__(beta, error, shared_noise)

    def of_margin(self, margin: Tensor) -> Tensor:
        return (margin / 2 - 1 / (2 * self.beta)) ** 2


class SimPOLoss(PairwiseLoss, name="simpo"):
    r"""Without a reference: :math:`-\log\sigma(\beta h - \gamma)` with :math:`m = L_l - L_w`.

    The mean over a row's axes is what SimPO's division by length is for text. Nothing holds the policy
    where it was; keep the rate low, or mix in the plain loss.

    Args:
        beta, error, shared_noise: See :class:`PairwiseLoss`.
        gamma: By how much the preferred one is to win.

    References:
        Meng et al., arXiv:2405.14734, eq. 6, carried over to denoising errors.
    """

    needs_reference = False

    def __init__(
        self,
        beta: float = 100.0,
        gamma: float = 0.5,
        error: PointwiseLoss | None = None,
        shared_noise: bool = True,
    ) -> None:
        super().__init__(beta, error, shared_noise)
        if gamma < 0:
            raise ValueError(f"SimPOLoss: gamma must not be negative, got {gamma}.")
        self.gamma = gamma

    def of_margin(self, margin: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * margin / 2 - self.gamma)


def reference_of(prediction: Prediction, who: str) -> Prediction:
    """What the reference says.

    Raises:
        ValueError: there is none; says how to get one.
    """
    if prediction.reference is None:
        raise ValueError(
            f"{who}: the prediction carries no reference to compare with. Attach one: engine.mixins: "
            "{reference: {type: ref_model}} in a config, RefModel().attach(engine) in Python. Where no gradient is "
            "recorded (validation), it is asked only with `always: true`."
        )
    return prediction.reference


def check_pairs(num_rows: int, batch: Mapping[str, Any], who: str, shared_noise: bool = True) -> None:
    """Rows must come two by two, and a pair have one noise key; keys are read on the host.

    Raises:
        ValueError: they do not; says which rows, and which data sets give pairs.
    """
    give = "Data sets `pairs` and `pair_rows` give pairs: w0, l0, w1, l1, ..., with one key each."
    if num_rows % 2:
        raise ValueError(f"{who}: {num_rows} rows are not pairs. {give}")
    keys = batch.get("noise_key")
    if keys is None or not shared_noise:
        return
    keys = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    odd = next((row for row in range(0, num_rows, 2) if keys[row] != keys[row + 1]), None)
    if odd is not None:
        raise ValueError(
            f"{who}: rows {odd} and {odd + 1} should be a pair, and have the noise keys {keys[odd]} and "
            f"{keys[odd + 1]}; so they are at different levels, and their errors say little about which is better. "
            f"{give} If that is meant, set shared_noise: false."
        )


def sides(errors: Tensor, win: str, lose: str) -> dict[str, Tensor]:
    """Errors by side of the pair, NaN in the rows of the other."""
    first = torch.arange(len(errors), device=errors.device) % 2 == 0
    nan = torch.full_like(errors, float("nan"))
    return {win: torch.where(first, errors, nan), lose: torch.where(first, nan, errors)}


def logged(figures: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Figures for :class:`LossValues`, under ``preference/``: a pair's stands in both its rows."""
    return {
        f"preference/{name}": (value if len(value) == num_rows else value.repeat_interleave(2)).detach().float()
        for name, value in figures.items()
    }
