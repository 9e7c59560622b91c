r"""The terms of latent diffusion's loss: the plain error, the variational bound, and a learned log variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.losses.base import Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.pointwise import MSELoss
from vdiff.losses.weightings import UnitWeighting, Weighting
from vdiff.process import (
    HOST,
    NoiseLevel,
    NoiseSchedule,
    Parameterization,
    Prediction,
    VParameterization,
    X0Parameterization,
    upload,
)


class VLBWeighting(Weighting, name="vlb"):
    r"""The variational bound of a table's step: :math:`(\mathrm{SNR}_{i-1} - \mathrm{SNR}_i) / 2` on x0.

    In epsilon that is :math:`\beta^2 / (2 v\,(1 - \beta)(1 - \bar\alpha))`, with :math:`v` the posterior's variance.
    The first row, where the bound has no such term, counts as the second does in epsilon.

    Args:
        schedule: The engine's, a table.
        posterior: The variance is this far from the posterior's own (0) towards beta (1); LDM's ``v_posterior``.
        published: What latent diffusion's code does in other languages, which is not the bound: v counts 1, and x0
            :math:`0.5 \sqrt{\bar\alpha} / (2 - \bar\alpha)`. A loss in epsilon is the same either way.

    References:
        Ho et al., arXiv:2006.11239, eq. 12; Kingma et al., arXiv:2107.00630, eq. 13, for x0; Rombach et al.,
        arXiv:2112.10752, ``lvlb_weights`` in their code.
    """

    def __init__(self, schedule: NoiseSchedule, posterior: float = 0.0, published: bool = False) -> None:
        if not 0 <= posterior <= 1:
            raise ValueError(f"VLBWeighting: posterior is between 0 and 1, got {posterior}.")
        self.num_rows, self.published = rows_of(schedule, "VLBWeighting"), published
        level = schedule(torch.arange(1, self.num_rows + 1, **HOST) / self.num_rows)
        snr, kept = level.snr, level.alpha**2
        before = torch.cat([torch.ones(1, **HOST), kept[:-1]])
        beta = 1 - kept / before
        variance = beta * ((1 - posterior) * (1 - before) / (1 - kept) + posterior)
        table = beta**2 * before / (1 - kept) ** 2 / (2 * variance)
        table[0] = table[1] / snr[1] * snr[0]
        self.table = table
        self.tables = {X0Parameterization(): 0.5 * kept.sqrt() / (2 - kept), VParameterization(): torch.ones_like(kept)}
        self.tables[X0Parameterization()][0] = self.tables[X0Parameterization()][1]

    def __call__(self, level: NoiseLevel, language: Parameterization) -> Tensor:
        if self.published and language in self.tables:
            return looked_up(self.tables[language], level)
        return super().__call__(level, language)

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return looked_up(self.table, level)


class LatentDiffusionLoss(Loss, nn.Module, name="latent_diffusion", aliases=("ldm",)):
    r"""Latent diffusion's loss, term by term:
    :math:`\lambda\,(L\,e^{-\ell_i} + \ell_i) + \mu\,w_i\,L`.

    :math:`L` is the mean error of a row at row :math:`i` of the table, :math:`w_i` the weight of
    :class:`VLBWeighting`, :math:`\ell_i` the log variance of that row. With the defaults it is the plain error. A
    learned log variance is a parameter of the engine, ``loss.log_variance``: trained where ``training.train`` says
    nothing or names ``loss``, and saved with the engine.

    Metrics: ``ldm/simple`` (L), ``ldm/vlb`` (:math:`w_i L`) and ``ldm/log_variance``.

    Args:
        schedule: The engine's, a table.
        error: What L is; by default the squared error in the network's own language. Not weighted.
        simple_weight: The :math:`\lambda` above; LDM's ``l_simple_weight``.
        elbo_weight: The :math:`\mu` above; LDM's ``original_elbo_weight``, 0 in every config published.
        posterior, published: See :class:`VLBWeighting`.
        log_variance: Of every row, in the beginning; LDM's ``logvar_init``.
        learn_log_variance: Whether it is learned; LDM's ``learn_logvar``.

    References:
        Rombach et al., arXiv:2112.10752, whose code is meant; for the learned weight, Kendall et al., arXiv:1705.07115.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        error: PointwiseLoss | None = None,
        simple_weight: float = 1.0,
        elbo_weight: float = 0.0,
        posterior: float = 0.0,
        published: bool = False,
        log_variance: float = 0.0,
        learn_log_variance: bool = False,
    ) -> None:
        super().__init__()
        self.error = MSELoss() if error is None else error
        if not isinstance(self.error.weighting, UnitWeighting):
            raise ValueError(
                f"LatentDiffusionLoss: its error is weighted by {type(self.error.weighting).__name__}, on top of the "
                "weights here. Leave the error's weighting out."
            )
        self.num_rows = rows_of(schedule, "LatentDiffusionLoss")
        self.vlb = VLBWeighting(schedule, posterior, published)
        self.simple_weight, self.elbo_weight = simple_weight, elbo_weight
        start = torch.full((self.num_rows,), float(log_variance))
        self.log_variance = nn.Parameter(start) if learn_log_variance else float(log_variance)

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        if level.t.ndim != 1:
            raise ValueError(
                "LatentDiffusionLoss: its terms are of a row's one level, and here every frame has its own: "
                f"{tuple(level.t.shape)}. Use mse."
            )
        plain = self.error.errors(prediction, x0, noise, level, batch)
        bound = self.vlb(level, self.error.language or prediction.language).to(plain.dtype) * plain
        if isinstance(self.log_variance, Tensor):
            log_variance = self.log_variance[row_of(level, self.num_rows)].to(plain.dtype)
        else:
            log_variance = torch.full_like(plain, self.log_variance)
        per_row = self.simple_weight * (plain * (-log_variance).exp() + log_variance)
        if self.elbo_weight:  # 0 times a bound without end is no number
            per_row = per_row + self.elbo_weight * bound
        figures = {"ldm/simple": plain, "ldm/vlb": bound, "ldm/log_variance": log_variance}
        metrics = {name: value.detach().float() for name, value in figures.items()}
        return LossValues(per_row.float(), by_bucket(per_row.float(), level) | metrics)


def rows_of(schedule: NoiseSchedule, who: str) -> int:
    """The length of a schedule's table.

    Raises:
        ValueError: it has none.
    """
    if schedule.num_rows is None or schedule.num_rows < 2:
        raise ValueError(f"{who}: {type(schedule).__name__} is no table of rows. Use one, such as scaled_linear.")
    return schedule.num_rows


def row_of(level: NoiseLevel, num_rows: int) -> Tensor:
    """The row at which, or next to which, a level stands."""
    return (level.t * num_rows).round().long().sub(1).clamp(0, num_rows - 1)


def looked_up(table: Tensor, level: NoiseLevel) -> Tensor:
    """The table's values at levels, on their device and in their dtype."""
    return upload(table, level.t.device).to(level.t.dtype)[row_of(level, len(table))]
