"""The sampler that picks its solver and its levels by the number of network calls, from a measured table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vdiff.process import Discretizer, NoiseLevel, NoiseSchedule
from vdiff.process.discretizers import RatioDiscretizer
from vdiff.samplers.auto_table import TABLE
from vdiff.samplers.base import Sampler
from vdiff.samplers.calibrated import GaussianCalibratedSampler
from vdiff.samplers.calibration import GaussianPrior
from vdiff.samplers.multistep import ABSampler
from vdiff.samplers.plan import Node, Stage

_TOP = 80.0  # where the levels after pure noise would begin: that of the table's problems


@dataclass(frozen=True)
class Choice:
    """What goes with a number of network calls.

    Attributes:
        solver: Name of a sampler of one call a step.
        options: Its arguments.
        bend: Levels are even in ``sigma ** bend``: 1/7 are the Karras levels, 0 is even in log sigma.
        sigma_min: Ratio of the last level before data.
    """

    solver: Literal["gaussian_calibrated", "ab"]
    options: Mapping[str, Any]
    bend: float
    sigma_min: float


def choose(num_calls: int) -> Choice:
    """The table's choice for a number of calls.

    Solver and options are those of the nearest budget in the table, by the ratio of calls; the levels' bend and last
    ratio change evenly in the logarithm of the number of calls. Beyond the table: its ends.
    """
    budgets = sorted(TABLE)
    calls = min(max(num_calls, budgets[0]), budgets[-1])
    below = max(n for n in budgets if n <= calls)
    above = min(n for n in budgets if n >= calls)
    share = math.log(calls / below) / math.log(above / below) if above > below else 0.0
    low, high = Choice(**TABLE[below]), Choice(**TABLE[above])
    near = low if share < 0.5 else high
    bend = low.bend + share * (high.bend - low.bend)
    return Choice(near.solver, near.options, bend, low.sigma_min ** (1 - share) * high.sigma_min**share)


class AutoSampler(Sampler, name="auto"):
    """Whatever is best at this number of network calls: one call a step, deterministic.

    The table behind it (``vdiff/samplers/auto_table.py``) was tuned on the problems of
    ``benchmarks/solver_anchor.py``, all mixtures of Gaussians with a standard deviation near 0.5, whose flow is known,
    and tested on four that it was not tuned on; ``python benchmarks/solver_anchor.py --write-tables`` makes it anew,
    and ``docs/benchmarks/solver_anchor.md`` says where it loses.

    Levels are placed in ``sigma / alpha``, so that it runs under every schedule. The first is the schedule's own: pure
    noise where it starts there, with the others as if it were 80. The last before data is the table's, or the
    schedule's lowest row if that is more noise. Ends other than the table's 80 and 0.002 to 0.04 are no obstacle, the
    weights are made for the levels at hand, but nothing was tuned there.

    Args:
        num_steps: Network calls.
        prior: Variances of the data's modes, for the budgets that calibrate; see ``gaussian_calibrated``.
        discretizer: Levels to keep to; the table then picks the solver alone.
        init: See :class:`Sampler`.
    """

    def __init__(
        self,
        num_steps: int = 20,
        prior: GaussianPrior | None = None,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, None, init)
        self.prior = prior

    def chosen(self) -> Sampler:
        """The sampler that does the work."""
        choice = choose(self.num_steps)
        options = {**choice.options, "init": self.init}
        levels = self.discretizer or RampDiscretizer(choice.bend, choice.sigma_min)
        if choice.solver == "ab":
            return ABSampler(self.num_steps, discretizer=levels, **options)
        if self.discretizer is not None:
            options["node_pull"] = None
        return GaussianCalibratedSampler(self.num_steps, prior=self.prior, discretizer=levels, **options)

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        return self.chosen().levels(schedule)

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        return self.chosen().plan(nodes, schedule)


class RampDiscretizer(RatioDiscretizer, abstract=True):
    """Even in ``sigma ** bend``, or in log sigma where the bend is 0, from the schedule's first level.

    Part of ``auto``, not an entry of the registry: with ends of one's own use ``karras`` or ``exponential``.

    Args:
        bend: 1/rho of the Karras levels.
        sigma_min: Ratio of the last level before data, if the schedule reaches that low.
    """

    def __init__(self, bend: float, sigma_min: float) -> None:
        super().__init__()
        self.bend, self.lowest = bend, sigma_min

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        first = schedule(torch.ones(1, dtype=torch.float64))
        high = first.ratio.item() if math.isfinite(first.ratio.item()) else _TOP
        rows = schedule.num_rows
        floor = self.lowest if rows is None else max(self.lowest, schedule(1 / rows).ratio.item())
        ratios = self.nodes(torch.linspace(0, 1, num_steps, dtype=torch.float64), min(floor, high / 2), high)
        rest = schedule.at_ratio(torch.cat([ratios[1:], ratios.new_zeros(1)]))
        return NoiseLevel(*map(torch.cat, zip(vars(first).values(), vars(rest).values(), strict=True)))

    def nodes(self, ramp: Tensor, low: float, high: float) -> Tensor:
        if self.bend == 0:
            return torch.exp(math.log(high) + ramp * math.log(low / high))
        return (high**self.bend + ramp * (low**self.bend - high**self.bend)) ** (1 / self.bend)
