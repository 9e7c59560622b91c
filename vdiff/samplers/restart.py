"""Restart: parts of a walk are done again from fresh noise, which takes back errors made above them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vdiff.process import KarrasDiscretizer, NoiseLevel, NoiseSchedule
from vdiff.samplers.base import Sampler
from vdiff.samplers.plan import Node, Stage


@dataclass(frozen=True)
class RestartInterval:
    """Where a walk goes back up, and how often.

    Attributes:
        low, high: Ratios sigma / alpha: reaching ``low`` it is noised to ``high`` and comes down again.
        repeats: How often.
        num_steps: Steps of every way down, at levels even in sigma^(1/7).
    """

    low: float
    high: float
    repeats: int = 1
    num_steps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf or self.repeats < 1 or self.num_steps < 2:
            raise ValueError(
                f"RestartInterval: needs 0 < low < high, repeats of at least 1 and num_steps of at least 2, got {self}."
            )


class RestartSampler(Sampler, name="restart"):
    """Any sampler, with restarts: at the level nearest to ``low`` of an interval, noise is added up to its ``high``
    and the sampler walks down again.

    A multistep solver begins anew on every way down.

    Args:
        sampler: What walks.
        intervals: From most noise to least; they do not overlap.

    References:
        Xu et al., arXiv:2306.14878, algorithm 2.
    """

    def __init__(self, sampler: Sampler, intervals: list[RestartInterval]) -> None:
        super().__init__(sampler.num_steps, sampler.discretizer, sampler.noise_source, sampler.init)  # type: ignore[arg-type]
        lows = [interval.low for interval in intervals]
        if lows != sorted(lows, reverse=True) or any(b.high > a.low for a, b in zip(intervals, intervals[1:])):  # noqa: B905
            raise ValueError(f"RestartSampler: intervals go from most noise to least and do not overlap: {intervals}.")
        self.sampler, self.intervals = sampler, intervals

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        """The levels after every step; one that rises stands for going back up and a step down from there."""
        levels = self.sampler.levels(schedule)
        if levels.t.ndim > 1:
            raise ValueError("RestartSampler: goes back up with all frames at once; its levels cannot differ by frame.")
        pieces, begin = [], 0
        for interval in self.intervals:
            nearest = int((levels.ratio.log() - math.log(interval.low)).abs().argmin())
            if nearest <= max(begin - 1, 0) or levels.ratio[nearest] >= interval.high:
                raise ValueError(
                    f"RestartSampler: no level of this walk is near {interval.low:.6g}, below {interval.high:.6g} and "
                    f"below the interval before it; it visits {[round(r, 4) for r in levels.ratio.tolist()]}."
                )
            low = levels[nearest : nearest + 1]
            down = KarrasDiscretizer(sigma_min=low.ratio.item(), sigma_max=interval.high, denoise=False)
            inner = down(schedule, interval.num_steps)[1:-1]
            pieces += [levels[begin : nearest + 1], *[inner, low] * interval.repeats]
            begin = nearest + 1
        return NoiseLevel.cat([*pieces, levels[begin:]])

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        way = [nodes[0]]
        low: Node | None = None  # where the way before this one ended
        for then in nodes[1:]:
            if then.ratio > way[-1].ratio:
                yield from self._down(way, low, schedule)
                low, way = way[-1], [self._top(then, schedule)]
            way.append(then)
        yield from self._down(way, low, schedule)

    def _top(self, then: Node, schedule: NoiseSchedule) -> Node:
        """Where the way down that comes by ``then`` begins."""
        high = min(interval.high for interval in self.intervals if interval.high > then.ratio)
        return Node.of(schedule.at_ratio(high))[0]

    def _down(self, way: Sequence[Node], low: Node | None, schedule: NoiseSchedule) -> Iterable[Stage]:
        first, *others = self.sampler.plan(way, schedule)
        if low is not None:
            grow = way[0].alpha / low.alpha
            fresh = way[0].alpha * math.sqrt(way[0].ratio ** 2 - low.ratio**2)
            keep, noise = first.ask["x"], first.ask.get("noise", 0.0)
            first = replace(first, ask={"x": keep * grow, "noise": math.hypot(keep * fresh, noise)})
        return [first, *others]
