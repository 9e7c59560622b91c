"""Samplers that choose their own steps: ``dopri5``, ``tsit5`` and ``dpm_adaptive``."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import HOST, Conditioning, Discretizer, NoiseLevel, NoiseSchedule
from vdiff.samplers.adaptive import DOPRI5, TSIT5, ButcherPair, Controller, Pair, Progress, integrate
from vdiff.samplers.base import Sampler
from vdiff.samplers.ends import begin_at
from vdiff.samplers.executor import Edit, SamplerStep
from vdiff.samplers.guiders import Guider
from vdiff.samplers.plan import Node, Stage
from vdiff.samplers.row_flow import Axis, AxisName, NoiseAxis, RowFlow, axis


class DPMPair(Pair):
    """DPM-Solver-2 with -1 inside (order 2), or DPM-Solver-3 with -2 inside (order 3), on a :class:`NoiseAxis`."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.nodes = (0.0, 0.5) if order == 2 else (0.0, 1 / 3, 2 / 3)

    def weights(self, begin: Tensor, end: Tensor) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        def gone(part: float) -> tuple[Tensor, Tensor]:
            """The weight of noise that does not change on that part of the way, and of its change along it."""
            width = part * (end - begin)
            sigma = (begin + width).exp()
            safe = torch.where(width == 0, torch.ones_like(width), width)
            line = torch.where(width == 0, torch.zeros_like(width), sigma * (1 + torch.expm1(-safe) / safe))
            return -sigma * torch.expm1(-width), line

        if self.order == 2:
            (whole, _), (half, _) = gone(1.0), gone(0.5)
            return [[half]], [torch.zeros_like(whole), whole], [whole]
        (whole, whole_line), (second, _), (third, third_line) = gone(1.0), gone(1 / 3), gone(2 / 3)
        rows = [[second], [third - 2 * third_line, 2 * third_line]]
        return rows, [whole - 1.5 * whole_line, torch.zeros_like(whole), 1.5 * whole_line], [whole * -0.5, whole * 1.5]


@dataclass(frozen=True, eq=False)
class AdaptiveStep(SamplerStep):
    """What a callback sees after each attempt of an adaptive sampler.

    Attributes:
        index, num_steps: Which attempt, from 0, of how many at most.
        stage: The level of the row with the most noise.
        x, x0: As of every sampler; rows are at unlike levels.
        level: Of each row, on the host, ``(B,)``, float64.
        num_calls: Network calls so far.
        rejected: Attempts that each row took back so far, on the host, ``(B,)``.
    """

    level: NoiseLevel
    num_calls: int
    rejected: Tensor


class AdaptiveSampler(Sampler, abstract=True):
    """A sampler that chooses its steps by the error it makes, each row its own, down to the last level before data.

    A last step, at no further call, goes into data.

    Args:
        rtol, atol: Error of a step: relative, and in units of the scaled state.
        max_steps: Attempts at most.
        discretizer: Its first level, its last before data and its end are those of the walk. By default all of the
            schedule: from time 1 to its first row, or to a ratio of 0.002.
        init: See :class:`Sampler`.
    """

    pair: Pair
    axis: Axis
    controller: Controller

    def __init__(
        self,
        rtol: float,
        atol: float,
        max_steps: int = 1000,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(discretizer=discretizer, init=init)
        if rtol < 0 or atol <= 0:
            raise ValueError(f"{type(self).__name__}: needs rtol >= 0 and atol > 0, got {rtol} and {atol}.")
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        raise TypeError(f"{type(self).__name__} finds its steps while it walks; it has no plan to compile or to bind.")

    def bind(self, *args: object, **kwargs: object) -> NoReturn:  # type: ignore[override]
        """An adaptive walk cannot be bound."""
        raise TypeError(f"{type(self).__name__} finds its steps while it walks; it has no plan to compile or to bind.")

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        """The first level, the last before data, and data if the walk ends there."""
        if self.discretizer is None:
            low = 0.002 if schedule.num_rows is None else schedule(1 / schedule.num_rows).ratio.item()
            ratios = torch.tensor([schedule(1.0).ratio.item(), low, 0.0], **HOST)
            return schedule.at_ratio(ratios)
        levels = self.discretizer(schedule, self.num_steps)
        last = int((levels.sigma > 0).sum()) - 1
        return levels[[0, last] if last == len(levels) - 1 else [0, last, last + 1]]

    @torch.no_grad()
    def steps(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        noise: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
        after: SamplerStep | None = None,
    ) -> Generator[AdaptiveStep, Tensor | None, None]:
        """The walk from ``noise``, attempt by attempt; the arguments are those of :class:`Sampler`.

        An ``edit`` is told the level of the row with the most noise. A callback cannot change the state.
        """
        name = type(self).__name__
        if after is not None:
            raise ValueError(f"{name}: an adaptive walk does not go on from a step; begin it at a level (strength=).")
        levels = begin_at(self.levels(schedule), schedule, strength)
        start = self.start(schedule, noise, x0, strength)
        denoiser.check(levels[:2], name)
        begin, end = self.axis.place(levels[:2]).tolist()
        if not math.isfinite(begin):
            raise ValueError(
                f"{name}: this walk starts at pure noise, where its coordinate is infinite. Take coordinate: angle, or "
                "a discretizer with sigma_max."
            )
        flow = RowFlow(denoiser, schedule, self.axis, start, cond, guider, edit, levels[:2])
        field = lambda place, state: (flow.slope(place, state[0]),)  # noqa: E731
        state = (start / self.axis.scale(levels[0]).item(),)
        tolerances = self.rtol, self.atol, self.max_steps
        walk = integrate(field, state, begin, end, self.pair, self.controller, *tolerances, name)
        for index, progress in enumerate(walk):
            is_there = bool((progress.place == end).all())
            yield self._seen(index, progress, flow, levels[2] if is_there and len(levels) == 3 else None)

    def _seen(self, index: int, progress: Progress, flow: RowFlow, data: NoiseLevel | None) -> AdaptiveStep:
        level = flow.level(progress.place)
        x, x0 = flow.read(level, progress.state[0], progress.slope[0])
        if data is not None:
            x = x0 * data.alpha.item()
        noisiest = Node.of(level)[int(level.ratio.argmax())]
        stage = Stage(noisiest, {"x0": 1.0})
        return AdaptiveStep(
            index,
            self.max_steps,
            stage,
            x,
            x0,
            memory={},
            level=level,
            num_calls=progress.num_calls,
            rejected=progress.rejected,
        )


class _RungeKuttaSampler(AdaptiveSampler, abstract=True):
    """A classical embedded pair along the probability flow.

    Args:
        rtol, atol, max_steps, discretizer, init: See :class:`AdaptiveSampler`.
        coordinate: ``angle`` needs the fewest calls and alone starts at pure noise; ``log_sigma``; ``sigma``, whose
            error control does not see small noise.
        sigma_data: Of ``angle``: the spread of the data.
    """

    pair: ButcherPair

    def __init__(
        self,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        max_steps: int = 1000,
        coordinate: AxisName = "angle",
        sigma_data: float = 0.5,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(rtol, atol, max_steps, discretizer, init)
        self.axis = axis(coordinate, sigma_data)
        first = {"angle": 0.05, "log_sigma": 0.25, "sigma": 1.0}[coordinate]
        self.controller = Controller(self.pair.order, first)


class Dopri5Sampler(_RungeKuttaSampler, name="dopri5"):
    """Dormand & Prince's pair of order 5 (J. Comp. Appl. Math. 6, 1980), six calls a step."""

    pair = DOPRI5


class Tsit5Sampler(_RungeKuttaSampler, name="tsit5"):
    """Tsitouras's pair of order 5 (Comput. Math. Appl. 62, 2011), six calls a step."""

    pair = TSIT5


class DPMAdaptiveSampler(AdaptiveSampler, name="dpm_adaptive"):
    """DPM-Solver of adaptive step, 12 or 23: for one sample that of k-diffusion, whose batches share their steps.

    Args:
        order: 2 or 3, and as many calls a step.
        rtol, atol, max_steps, init: See :class:`AdaptiveSampler`.
        first: Size of the first step in log(sigma / alpha).
        proportional, integral, derivative, accept: See :class:`~vdiff.samplers.adaptive.Controller`.
        discretizer: See :class:`AdaptiveSampler`; it must start short of pure noise.

    References:
        Lu et al., arXiv:2206.00927, appendix C (DPM-Solver-12 and -23); Crowson, k-diffusion (the controller).
    """

    def __init__(
        self,
        order: int = 3,
        rtol: float = 0.05,
        atol: float = 0.0078,
        max_steps: int = 1000,
        first: float = 0.05,
        proportional: float = 0.0,
        integral: float = 1.0,
        derivative: float = 0.0,
        accept: float = 0.81,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(rtol, atol, max_steps, discretizer, init)
        if order not in (2, 3):
            raise ValueError(f"DPMAdaptiveSampler: order must be 2 or 3, got {order}.")
        self.pair, self.axis = DPMPair(order), NoiseAxis()
        self.controller = Controller(order, first, proportional, integral, derivative, safety=1.0, accept=accept)
