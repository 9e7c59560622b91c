"""Sigma samplers: which noise levels training draws.

A sigma sampler is a quantile function: it turns one uniform number per row into a noise level.
So the same number always gives the same level, and spreading the numbers evenly (``stratified``)
spreads the levels evenly under any of them.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vdiff.process.discretizers import Discretizer, usual_discretizer
from vdiff.process.level import HOST, LevelPair, NoiseLevel
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


class GridSigmaSampler(SigmaSampler):
    r"""The levels that a sampler would visit, each with the next one below it: pairs for few-step training.

    The grid ends at the level that counts as data, ``sigma_min``, in the place of data itself; that level is only ever
    the lower one of a pair.

    Args:
        num_steps: Of the discretizer. Many make steps short, and the way of what is learned from one end of the grid
            to the other long: 18 to 40 in consistency models, 50 in latent consistency models.
        discretizer: By default that of samplers: ``trailing``, or ``karras`` where the schedule is EDM's.
        sigma_min: The ratio sigma / alpha that counts as data; by default that of a table's first row, or 0.002.
        mean, std: Where both are given, levels are as likely as ``log_normal`` falls between their neighbours;
            otherwise all are equally likely.

    References:
        Song et al., arXiv:2303.01469, algorithm 2; Luo et al., arXiv:2310.04378, algorithm 1; with mean and std, Song &
        Dhariwal, arXiv:2310.14189, eq. 11, who have -1.1 and 2.
    """

    def __init__(
        self,
        num_steps: int = 40,
        discretizer: Discretizer | None = None,
        sigma_min: float | None = None,
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        if num_steps < 1 or (sigma_min is not None and sigma_min <= 0):
            raise ValueError(
                f"GridSigmaSampler: needs a step and a sigma_min above 0, got {num_steps} and {sigma_min}."
            )
        if (mean is None) != (std is None) or (std is not None and std <= 0):
            raise ValueError(f"GridSigmaSampler: mean and std go together, std above 0; got {mean} and {std}.")
        self.num_steps, self.discretizer, self.sigma_min = num_steps, discretizer, sigma_min
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> LevelPair:
        grid = self.grid(schedule)
        shares = self._shares(grid)
        place = torch.bucketize(u.contiguous(), shares.cumsum(0) / shares.sum(), right=True).clamp(max=len(shares) - 1)
        return grid[place + 1].paired(grid[place])

    def grid(self, schedule: NoiseSchedule) -> NoiseLevel:
        """All levels, rising, the one that counts as data first; float64 on the host, ``(N,)``."""
        rows, discretizer = schedule.num_rows, self.discretizer or usual_discretizer(schedule)
        levels = discretizer(schedule, self.num_steps)
        if levels.t.ndim > 1:
            raise ValueError(f"GridSigmaSampler: {type(discretizer).__name__} has levels by frame; use one by row.")
        low = self.sigma_min or (0.002 if rows is None else schedule(1 / rows).ratio.item())
        above = levels[levels.ratio > low * (1 + 1e-6)]
        if not len(above):
            raise ValueError(
                f"GridSigmaSampler: no level of {type(discretizer).__name__} in {self.num_steps} steps lies above "
                f"sigma_min = {low:.6g}, from which up training would compare. Lower it, or raise num_steps."
            )
        grid = NoiseLevel.cat([above, schedule.at_ratio(torch.tensor([low], **HOST))])
        return grid[torch.arange(len(grid), device="cpu").flip(0)]

    def _shares(self, grid: NoiseLevel) -> Tensor:
        """How likely each level but the lowest is, up to a factor."""
        if self.mean is None or self.std is None:
            return torch.ones(len(grid) - 1, **HOST)
        return torch.special.ndtr((grid.ratio.log() - self.mean) / self.std).diff().clamp(min=1e-12)


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
