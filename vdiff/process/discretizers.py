"""Discretizers: which noise levels a sampler visits.

``discretizer(schedule, num_steps)`` gives ``num_steps + 1`` levels on the host in float64, from most
noise to least; the last one is data (ratio 0) unless the discretizer is told to stop before it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.process.level import HOST, NoiseLevel
from vdiff.process.schedules import NoiseSchedule
from vdiff.registry import Registered


class Discretizer(Registered, kind="discretizer"):
    """The levels of a run."""

    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        """``num_steps + 1`` levels from most noise to least, float64 on the host.

        Shape ``(num_steps + 1,)``, or ``(num_steps + 1, F)`` where the levels differ by frame.

        Raises:
            ValueError: the schedule does not have these levels.
        """
        if num_steps < 1:
            raise ValueError(f"{type(self).__name__}: needs at least one step, got {num_steps}.")
        levels = self.levels(schedule, num_steps)
        if not (levels.ratio[1:] <= levels.ratio[:-1]).all():
            raise ValueError(f"{type(self).__name__}: sigma / alpha must never rise, got {levels.ratio.tolist()}.")
        return levels

    @abstractmethod
    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        """The levels, before it is checked that they never rise."""


class RatioDiscretizer(Discretizer, abstract=True):
    """Nodes placed in ``sigma / alpha`` between two ends.

    Args:
        sigma_min, sigma_max: Ratios of the last node before data and of the first; by default those of the
            schedule's first and last row, or its last time.
        denoise: End at data; otherwise at ``sigma_min``.
    """

    def __init__(self, sigma_min: float | None = None, sigma_max: float | None = None, denoise: bool = True) -> None:
        self.sigma_min, self.sigma_max, self.denoise = sigma_min, sigma_max, denoise

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        num = num_steps if self.denoise else num_steps + 1
        low, high = self._ends(schedule)
        ramp = torch.linspace(0, 1, num, **HOST)
        ratios = self.nodes(ramp, low, high)
        return schedule.at_ratio(end_with_data(ratios) if self.denoise else ratios)

    def _ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        high = self.sigma_max if self.sigma_max is not None else schedule(1.0).ratio.item()
        low = self.sigma_min
        if low is None and schedule.num_rows is not None:
            low = schedule(1 / schedule.num_rows).ratio.item()
        if low is None:
            low = 0.002  # EDM's; continuous schedules have no last level before data
        if not math.isfinite(high):
            raise ValueError(
                f"{type(self).__name__}: {type(schedule).__name__} starts at pure noise, sigma / alpha = inf. "
                "Give sigma_max, or use a discretizer in time: trailing, linspace or uniform."
            )
        if schedule.num_rows is not None and high > schedule(1.0).ratio.item():
            raise ValueError(
                f"{type(self).__name__}: sigma_max = {high:.6g} is more noise than the last row of "
                f"{type(schedule).__name__}, {schedule(1.0).ratio.item():.6g}."
            )
        if not 0 < low < high:
            raise ValueError(f"{type(self).__name__}: needs 0 < sigma_min < sigma_max, got {low} and {high}.")
        return low, high

    @abstractmethod
    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        """Ratios for a ramp from 0 (``high``) to 1 (``low``)."""


class KarrasDiscretizer(RatioDiscretizer):
    r"""Even in :math:`\sigma^{1/\rho}`: short steps at small noise.

    Args:
        rho: 7 is usual; 1 is even in sigma.
        sigma_min, sigma_max, denoise: Ends, see above. EDM: 0.002 and 80.

    References:
        Karras et al., arXiv:2206.00364, eq. 5.
    """

    def __init__(
        self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None, denoise: bool = True
    ) -> None:
        super().__init__(sigma_min, sigma_max, denoise)
        self.rho = rho

    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        top, bottom = high ** (1 / self.rho), low ** (1 / self.rho)
        return (top + ramp * (bottom - top)) ** self.rho


class ExponentialDiscretizer(RatioDiscretizer):
    """Even in ``log(sigma / alpha)``; what solvers that integrate x0 in the log SNR like best."""

    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        return torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))


class TimeDiscretizer(Discretizer, abstract=True):
    """Nodes placed in time; on a table they are rounded to its rows, as the models were trained.

    Args:
        num_rows: Rows to round to; by default the schedule's table, None on continuous schedules: no rounding.
    """

    def __init__(self, num_rows: int | None = None) -> None:
        self.num_rows = num_rows

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        rows = self.num_rows or schedule.num_rows
        if rows is not None and num_steps > rows:
            raise ValueError(f"{type(self).__name__}: {num_steps} steps on a table of {rows} rows.")
        times = self.times(num_steps) if rows is None else (self.rows(num_steps, rows) + 1) / rows
        if times[0] > 1 or times[-1] <= 0:
            raise ValueError(
                f"{type(self).__name__}: {num_steps} steps run from t = {times[0]:.6g} to {times[-1]:.6g}; "
                "they must begin at 1 at most, and end above 0."
            )
        return schedule(end_with_data(times))

    @abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """``num_steps`` falling times on a continuous schedule."""

    @abstractmethod
    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        """``num_steps`` falling rows of a table of ``num_rows``."""


class TrailingDiscretizer(TimeDiscretizer):
    """Even steps counted from the noisy end, which is always visited: what zero-SNR and flow models need.

    References:
        Lin et al., arXiv:2305.08891, table 2.
    """

    def times(self, num_steps: int) -> Tensor:
        return 1 - torch.arange(num_steps, **HOST) / num_steps

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        places = num_rows - torch.arange(num_steps, **HOST) * num_rows / num_steps
        return places.round() - 1


class LeadingDiscretizer(TimeDiscretizer):
    """Even steps counted from the clean end; the noisiest level is skipped (DDIM as published).

    Args:
        offset: Added to every row; Stable Diffusion uses 1.
        num_rows: Rows to round to.
    """

    def __init__(self, offset: int = 0, num_rows: int | None = None) -> None:
        super().__init__(num_rows)
        self.offset = offset

    def times(self, num_steps: int) -> Tensor:
        # On a continuous axis the clean end itself is data, so the first step is half a step from it.
        return (torch.arange(num_steps, **HOST).flip(0) + 0.5) / num_steps

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return torch.arange(num_steps, **HOST).flip(0) * (num_rows // num_steps) + self.offset


class LinspaceDiscretizer(TimeDiscretizer):
    """Both ends of the table are visited.

    Args:
        end: On continuous schedules, the last time before data.
        num_rows: Rows to round to.
    """

    def __init__(self, end: float = 1e-3, num_rows: int | None = None) -> None:
        super().__init__(num_rows)
        self.end = end

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, self.end, num_steps, **HOST)

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return torch.linspace(num_rows - 1, 0, num_steps, **HOST).round()


class UniformDiscretizer(Discretizer):
    """Even in time between two times, no rounding and nothing appended: for continuous schedules and tests.

    Args:
        start, stop: First and last time.
    """

    def __init__(self, start: float = 1.0, stop: float = 0.0) -> None:
        if not 1 >= start > stop >= 0:
            raise ValueError(f"UniformDiscretizer: needs 1 >= start > stop >= 0, got {start} and {stop}.")
        self.start, self.stop = start, stop

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        return schedule(torch.linspace(self.start, self.stop, num_steps + 1, **HOST))


class ExplicitDiscretizer(Discretizer):
    """Exactly these levels; ``num_steps`` of the sampler must agree or be left out.

    Args:
        ratios: Falling values of ``sigma / alpha``, the end included; or
        times: Falling times, the end included. Of either, a list of lists gives the levels of all frames, level by
            level: ``[[1, 1], [0.5, 1], [0, 0.5], [0, 0]]``.
    """

    def __init__(
        self,
        ratios: Sequence[float] | Sequence[Sequence[float]] | None = None,
        times: Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if (ratios is None) == (times is None):
            raise ValueError("ExplicitDiscretizer: give ratios or times, one of them.")
        values = torch.as_tensor(ratios if times is None else times, **HOST)
        highest = math.inf if times is None else 1.0
        is_falling = values.ndim in (1, 2) and len(values) > 1 and (values[1:] <= values[:-1]).all()
        if not is_falling or not (0 <= values[-1].min() and values[0].max() <= highest):
            raise ValueError(
                f"ExplicitDiscretizer: needs two or more values falling from at most {highest} to at least 0, "
                f"got {values.tolist()}."
            )
        self.values, self.is_time = values, ratios is None

    @property
    def num_steps(self) -> int:
        return len(self.values) - 1

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        if num_steps != self.num_steps:
            raise ValueError(f"ExplicitDiscretizer: lists {self.num_steps} steps, the sampler wants {num_steps}.")
        return schedule(self.values) if self.is_time else schedule.at_ratio(self.values)


def usual_discretizer(schedule: NoiseSchedule) -> Discretizer:
    """``trailing``, or ``karras`` on a schedule without a table that never reaches pure noise (EDM)."""
    is_open = schedule.num_rows is None and math.isfinite(schedule(1.0).ratio.item())
    return KarrasDiscretizer() if is_open else TrailingDiscretizer()


def end_with_data(nodes: Tensor) -> Tensor:
    return torch.cat([nodes, nodes.new_zeros(1)])
