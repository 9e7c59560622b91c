r"""More discretizers that place their levels in the ratio :math:`\sigma/\alpha`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vdiff.process.discretizers import Discretizer, RatioDiscretizer, end_with_data
from vdiff.process.level import HOST, NoiseLevel
from vdiff.process.schedules import NoiseSchedule


class PolyexponentialDiscretizer(RatioDiscretizer):
    r"""A power of the way in :math:`\log(\sigma/\alpha)`: more than 1 gives small noise more levels.

    Args:
        rho: The power; 1 is ``exponential``.
        sigma_min, sigma_max, denoise: Ends, see :class:`ExponentialDiscretizer`.

    References:
        Crowson, k-diffusion.
    """

    def __init__(
        self, rho: float = 1.0, sigma_min: float | None = None, sigma_max: float | None = None, denoise: bool = True
    ) -> None:
        super().__init__(sigma_min, sigma_max, denoise)
        if rho <= 0:
            raise ValueError(f"PolyexponentialDiscretizer: rho must be positive, got {rho}.")
        self.rho = rho

    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        return torch.exp((1 - ramp) ** self.rho * math.log(high / low) + math.log(low))


class VPDiscretizer(Discretizer):
    r"""Even in the time of the continuous variance-preserving process:
    :math:`(\sigma/\alpha)^2 = e^{\beta_d t^2 / 2 + \beta_{min} t} - 1`, from t = 1 to ``last``, then data.

    Args:
        beta_d, beta_min: The :math:`\beta` above.
        last: Time of the last level before data.

    References:
        Song et al., arXiv:2011.13456, eq. 33; Karras et al., arXiv:2206.00364, table 1.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, last: float = 1e-3) -> None:
        if not (beta_d >= 0 and beta_min >= 0 and beta_d + beta_min > 0 and 0 < last <= 1):
            raise ValueError(
                f"VPDiscretizer: needs betas of at least 0, not both 0, and 0 < last <= 1, got {beta_d}, {beta_min}, "
                f"{last}."
            )
        self.beta_d, self.beta_min, self.last = beta_d, beta_min, last

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        t = torch.linspace(1, self.last, num_steps, **HOST)
        ratios = torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()
        return _at(ratios, schedule, self)


class AYSDiscretizer(Discretizer):
    """Levels optimised for a model, in ten steps; for other numbers of steps, log-linear between them.

    Args:
        table: ``sd15``, ``sdxl`` or ``svd``, or the falling ratios of a table of one's own, data left out.

    References:
        Sabour et al., arXiv:2404.14507 (Align Your Steps).
    """

    tables = {
        "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
        "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
        "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
    }

    def __init__(self, table: Literal["sd15", "sdxl", "svd"] | Sequence[float] = "sd15") -> None:
        values = torch.tensor(self.tables[table] if isinstance(table, str) else tuple(table), **HOST)
        if values.ndim != 1 or len(values) < 2 or not (values.diff() < 0).all() or values[-1] <= 0:
            raise ValueError(f"AYSDiscretizer: a table is two or more falling ratios above 0, got {values.tolist()}.")
        self.ratios = values

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        if num_steps == len(self.ratios):
            return _at(self.ratios, schedule, self)
        place = torch.linspace(0, len(self.ratios) - 1, num_steps, **HOST)
        low = place.floor().clamp(max=len(self.ratios) - 2).long()
        logs = self.ratios.log()
        return _at(torch.lerp(logs[low], logs[low + 1], place - low).exp(), schedule, self)


class BetaSigmaDiscretizer(RatioDiscretizer):
    """Quantiles of a beta distribution over sigma / alpha: both ends of the range are crowded, as in diffusers.

    Args:
        a, b: Of the distribution.
        sigma_min, sigma_max, denoise: Ends, see :class:`ExponentialDiscretizer`.

    References:
        Lee et al., arXiv:2407.12173, who take quantiles of the index: ``beta_index``.
    """

    def __init__(
        self,
        a: float = 0.6,
        b: float = 0.6,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        denoise: bool = True,
    ) -> None:
        super().__init__(sigma_min, sigma_max, denoise)
        self.a, self.b = a, b

    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        return low + beta_quantile(1 - ramp, self.a, self.b) * (high - low)


def _at(ratios: Tensor, schedule: NoiseSchedule, discretizer: Discretizer) -> NoiseLevel:
    """These levels and data; the first may lie above the schedule's last time by the rounding of a printed table."""
    top = schedule(1.0).ratio.item()
    if ratios[0] > top * 1.001:
        raise ValueError(
            f"{type(discretizer).__name__}: begins at sigma / alpha = {ratios[0].item():.6g}, more noise than "
            f"{type(schedule).__name__} reaches, {top:.6g}. Use a schedule or a table that goes with the other."
        )
    return schedule.at_ratio(end_with_data(ratios.clamp(max=top)))


def beta_quantile(share: Tensor, a: float, b: float) -> Tensor:
    """Quantiles of the beta distribution, float64: for shares in [0, 1], the places in [0, 1]."""
    if a <= 0 or b <= 0:
        raise ValueError(f"a beta distribution needs a > 0 and b > 0, got {a} and {b}.")
    whole = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    middle = _below(torch.tensor(0.5, **HOST), a, b) / whole
    lower = _solve(share.clamp(max=middle) * whole, a, b)
    upper = 1 - _solve((1 - share).clamp(max=1 - middle) * whole, b, a)
    return torch.where(share <= middle, lower, upper)


def _below(place: Tensor, a: float, b: float) -> Tensor:
    """The incomplete beta function up to places of at most 1/2, by its power series."""
    total, term = torch.zeros_like(place), torch.ones_like(place)
    for n in range(64):
        total = total + term / (a + n)
        term = term * place * (n + 1 - b) / (n + 1)
    return place**a * total


def _solve(mass: Tensor, a: float, b: float) -> Tensor:
    """The place of at most 1/2 with this much mass below it, by bisection of its logarithm-like power ``a``."""
    low, high = torch.zeros_like(mass), torch.full_like(mass, 0.5**a)
    for _ in range(64):
        middle = (low + high) / 2
        is_short = _below(middle ** (1 / a), a, b) < mass
        low, high = torch.where(is_short, middle, low), torch.where(is_short, high, middle)
    return torch.where(mass > 0, high, 0.0) ** (1 / a)
