"""Sigma samplers: which noise levels training draws.

A sigma sampler is a quantile function: it turns one uniform number per row into a noise level.
So the same number always gives the same level, and spreading the numbers evenly (``stratified``)
spreads the levels evenly under any of them.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vdiff.process.level import NoiseLevel
from vdiff.process.randomness import RowKeys
from vdiff.process.schedules import NoiseSchedule
from vdiff.registry import Registered


class SigmaSampler(Registered, kind="sigma_sampler"):
    """Draws one noise level per row."""

    def __call__(self, schedule: NoiseSchedule, keys: RowKeys) -> NoiseLevel:
        """Levels of shape ``(B,)`` in float32, on the host; a function of the rows' keys alone."""
        return self.quantile(keys.uniform("level"), schedule).to(torch.float32)

    @abstractmethod
    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        """The level below which a share ``u`` in (0, 1) of all draws lies; float64, any shape."""


class LogNormalSigmaSampler(SigmaSampler):
    """``log(sigma / alpha)`` is Gaussian.

    Args:
        mean, std: Of the logarithm.

    References:
        Karras et al., arXiv:2206.00364, table 1.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        return schedule.at_ratio(torch.exp(self.mean + self.std * torch.special.ndtri(u)))


class UniformSigmaSampler(SigmaSampler):
    """Time is uniform between ``low`` and ``high``."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"UniformSigmaSampler: needs 0 <= low < high <= 1, got {low} and {high}.")
        self.low, self.high = low, high

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        return schedule(self.low + (self.high - self.low) * u)


class UniformIndexSigmaSampler(SigmaSampler):
    """Every row of a table is equally likely: DDPM and Stable Diffusion.

    Args:
        num_rows: Length of the table; by default the schedule's own.
    """

    def __init__(self, num_rows: int | None = None) -> None:
        self.num_rows = num_rows

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        rows = self.num_rows or schedule.num_rows
        if rows is None:
            raise ValueError(
                f"UniformIndexSigmaSampler: {type(schedule).__name__} has no table. Give num_rows, or use `uniform`."
            )
        return schedule(((u * rows).floor().clamp(max=rows - 1) + 1) / rows)


class LogitNormalSigmaSampler(SigmaSampler):
    """``logit(t)`` is Gaussian: most draws in the middle of a flow.

    Args:
        mean, std: Of the logit.

    References:
        Esser et al., arXiv:2403.03206, section 3.1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        return schedule(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)))


class StratifiedSigmaSampler(SigmaSampler):
    """Spreads the global batch evenly over the distribution of another sigma sampler.

    Each group of the global batch draws from its own stratum, whatever the number of ranks and
    accumulation steps; which stratum is a new permutation every step, so that groups stay independent
    of their place. Lowers the variance of the loss over levels.

    Args:
        sigma_sampler: Whose distribution is kept.
    """

    def __init__(self, sigma_sampler: SigmaSampler) -> None:
        self.sigma_sampler = sigma_sampler

    def __call__(self, schedule: NoiseSchedule, keys: RowKeys) -> NoiseLevel:
        u = (keys.stratum("stratum") + keys.uniform("level")) / keys.global_size
        return self.quantile(u.clamp(max=1 - 2**-53), schedule).to(torch.float32)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> NoiseLevel:
        return self.sigma_sampler.quantile(u, schedule)
