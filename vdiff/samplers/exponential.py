r"""Exponential Runge-Kutta: several looks within a step, the linear part of the flow solved exactly.

A method is its nodes, in fractions of the step in :math:`\log(\sigma/\alpha)`, and a row of weights for the way to
each of them. Every stage goes on from the state that the network last saw: it keeps that state and changes the
weights of the answers known by then. In a stochastic solver the fresh noise of the stages is then that of one
path, stretch by stretch, as the order of such a solver asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, ExplicitDiscretizer, ExponentialDiscretizer, NoiseLevel, NoiseSchedule
from vdiff.samplers import quadrature
from vdiff.samplers.base import Sampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage, ancestral
from vdiff.samplers.quadrature import EpsilonForm, Form, X0Form

_LOG_SIGMA = quadrature.coordinate("log_sigma")
Rows = list[list[float]]


def runge_kutta(form: Form, nodes: Sequence[Node], rows: Rows, fresh: float = 0.0) -> Iterable[Stage]:
    """A step through ``nodes``, its two ends included, by weights of the answers at them.

    Args:
        form: What is weighted; a stochastic one brings its own fresh noise.
        nodes: ``K + 1`` of them, the last is not asked.
        rows: The i-th holds ``i + 1`` weights, for the way from the first node to node ``i + 1``.
        fresh: Scale of more noise, at the end.
    """
    before: list[float] = []
    for i, (here, there) in enumerate(pairwise(nodes)):
        keep = form.keep(here, there)
        update = {"x": keep, "x0": 0.0}
        for j, weight in enumerate(rows[i]):
            change = weight - keep * before[j] if j < i else weight
            on_x, on_x0 = form.reading(nodes[j])
            for name, part in (("x", change * on_x), ("x0", change * on_x0)):
                known = name if j == i else f"{name}_{j}"
                if part:
                    update[known] = update.get(known, 0.0) + part
        is_last = i == len(rows) - 1
        noise = form.fresh(here, there) if isinstance(form, X0Form) else 0.0
        if is_last:
            noise = math.hypot(noise, fresh)
        store = {f"{name}_{i}": name for name in (("x", "x0") if form.reads_state else ("x0",))}
        fresh_part = {"noise": noise} if noise else {}
        yield Stage(here, update | fresh_part, store={} if is_last else store, ends_step=is_last)
        before = rows[i]


def inner_nodes(schedule: NoiseSchedule, now: Node, then: Node, fractions: Sequence[float]) -> list[Node]:
    """The levels at these fractions of a step in log(sigma / alpha)."""
    start, width = math.log(now.ratio), math.log(then.ratio / now.ratio)
    return [Node.of(schedule.at_ratio(math.exp(start + part * width)))[0] for part in fractions]


def is_one_call(form: Form, now: Node, then: Node) -> bool:
    """Whether there is no middle to look at: from pure noise, into data, or nowhere."""
    return then.sigma == 0 or not math.isfinite(now.ratio) or now.ratio == then.ratio


def one_call(form: Form, now: Node, then: Node, fresh: float = 0.0) -> Iterable[Stage]:
    """A step of first order."""
    form = form if form.is_finite_at(now) else X0Form()
    return runge_kutta(form, [now, then], [[form.total(now, then)]], fresh)


def midpoint_rows(form: Form, nodes: Sequence[Node], c_2: float) -> Rows:
    """Two calls, order 2: the line through both answers, taken at the middle of the step (DPM-Solver-2)."""
    now, second, then = nodes
    total = form.total(now, then)
    return [[form.total(now, second)], [total * (1 - 0.5 / c_2), total * 0.5 / c_2]]


def line_rows(form: Form, nodes: Sequence[Node]) -> Rows:
    """Two calls, order 2: the line through both answers, integrated exactly."""
    now, second, then = nodes
    return [[form.total(now, second)], quadrature.weights(form, _LOG_SIGMA, [now, second], now, then)]


def three_stage_rows(form: Form, nodes: Sequence[Node], c_2: float, c_3: float) -> Rows:
    """Three calls, order 3: eq. 5.9 of Hochbruck & Ostermann (2005).

    ``c_2 = 1/3, c_3 = 2/3`` is DPM-Solver-3; other nodes are for the form x0 only.
    """
    now, second, third, then = nodes
    gamma = c_3 * (2 - 3 * c_3) / (c_2 * (3 * c_2 - 2))  # 2 (gamma c_2 + c_3) = 3 (gamma c_2^2 + c_3^2)
    line = lambda end: quadrature.weights(form, _LOG_SIGMA, [now, second], now, end)[1]  # noqa: E731
    middle = line(third) + gamma * line(second) * (third.alpha / second.alpha)
    slope = line(then) * c_2 / (gamma * c_2 + c_3)
    return [
        [form.total(now, second)],
        [form.total(now, third) - middle, middle],
        [form.total(now, then) - (1 + gamma) * slope, gamma * slope, slope],
    ]


class RES2SSampler(Sampler, name="res_2s"):
    """The refined exponential solver with two calls a step: the line of x0 through both, integrated exactly.

    Args:
        c_2: Where the second look is, as a fraction of the step in log(sigma / alpha).
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhang et al., arXiv:2308.02157, algorithm 1 (single step, order 2).
    """

    def __init__(
        self,
        num_steps: int = 30,
        c_2: float = 0.5,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, init=init)
        if not 0 < c_2 <= 1:
            raise ValueError(f"RES2SSampler: c_2 must lie in (0, 1], got {c_2}.")
        self.c_2 = c_2

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        form = X0Form()
        for now, then in pairwise(nodes):
            if is_one_call(form, now, then):
                yield from one_call(form, now, then)
                continue
            visited = [now, *inner_nodes(schedule, now, then, [self.c_2]), then]
            yield from runge_kutta(form, visited, line_rows(form, visited))


class RES3SSampler(Sampler, name="res_3s"):
    """The refined exponential solver with three calls a step.

    Args:
        c_2, c_3: Where the second and the third look are. The published 1/2 and 1; 1/3 and 2/3 is
            DPM-Solver++ (3S).
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhang et al., arXiv:2308.02157 (single step, order 3); Hochbruck & Ostermann, SIAM J. Numer. Anal. 43
        (2005), eq. 5.9.
    """

    def __init__(
        self,
        num_steps: int = 30,
        c_2: float = 0.5,
        c_3: float = 1.0,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, init=init)
        if not (0 < c_2 <= 1 and 0 < c_3 <= 1 and c_2 not in (c_3, 2 / 3)):
            raise ValueError(f"RES3SSampler: c_2 and c_3 lie in (0, 1], differ, and c_2 is not 2/3; got {c_2}, {c_3}.")
        self.c_2, self.c_3 = c_2, c_3

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        form = X0Form()
        for now, then in pairwise(nodes):
            if is_one_call(form, now, then):
                yield from one_call(form, now, then)
                continue
            visited = [now, *inner_nodes(schedule, now, then, [self.c_2, self.c_3]), then]
            yield from runge_kutta(form, visited, three_stage_rows(form, visited, self.c_2, self.c_3))


class SEEDSSampler(Sampler, name="seeds"):
    """Exponential Runge-Kutta of the reverse SDE, with the fresh noise of all stages on one path.

    One stage is ``euler_ancestral``, and two with eta 1 are ``dpmpp_sde``. Without fresh noise it is DPM-Solver++
    of that many stages.

    Args:
        stages: Calls a step: 1 to 3.
        eta: Fresh noise: 0 is the probability flow, 1 the reverse SDE.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Gonzalez et al., arXiv:2305.14267, algorithms 1 to 3, in the form that predicts x0.
    """

    def __init__(
        self,
        num_steps: int = 30,
        stages: int = 3,
        eta: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, noise_source, init)
        if stages not in (1, 2, 3):
            raise ValueError(f"SEEDSSampler: stages must be 1, 2 or 3, got {stages}.")
        if eta < 0:
            raise ValueError(f"SEEDSSampler: eta must not be negative, got {eta}.")
        self.stages, self.eta = stages, eta

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        form = X0Form(self.eta)
        for now, then in pairwise(nodes):
            yield from _dpm_step(form, now, then, self.stages, schedule)


class DPMFastSampler(Sampler, name="dpm_fast"):
    """DPM-Solver-fast: steps of three calls while they last, then of the rest.

    Args:
        num_steps: Network calls in all, as k-diffusion's ``n``: they make ``num_steps // 3 + 1`` steps. With listed
            levels, every step has three calls but the last, which has two.
        eta: Share of fresh noise after each step.
        discretizer: By default ``exponential``, even in log(sigma / alpha); without its step into data the walk is
            that of k-diffusion, which ends at its ``sigma_min``.
        noise_source, init: See :class:`Sampler`.

    References:
        Lu et al., arXiv:2206.00927, appendix D.3 (algorithm DPM-Solver-fast).
    """

    def __init__(
        self,
        num_steps: int = 30,
        eta: float = 0.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        discretizer = ExponentialDiscretizer() if discretizer is None else discretizer
        super().__init__(num_steps, discretizer, noise_source, init)
        if eta < 0:
            raise ValueError(f"DPMFastSampler: eta must not be negative, got {eta}.")
        self.eta = eta

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        discretizer = self.discretizer
        assert discretizer is not None
        is_listed = isinstance(discretizer, ExplicitDiscretizer)
        return discretizer(schedule, self.num_steps if is_listed else self.num_steps // 3 + 1)

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        form, calls = EpsilonForm(), self._calls(len(nodes) - 1)
        for (now, then), size in zip(pairwise(nodes), calls, strict=True):
            down, fresh = ancestral(now, then, self.eta)
            yield from _dpm_step(form, now, down, size, schedule, fresh)

    def _calls(self, num_steps: int) -> list[int]:
        """Calls of each step."""
        if num_steps != self.num_steps // 3 + 1:
            return [3] * (num_steps - 1) + [2]
        if self.num_steps % 3:
            return [3] * (num_steps - 1) + [self.num_steps % 3]
        return [3] * (num_steps - 2) + [2, 1]


def _dpm_step(
    form: Form, now: Node, then: Node, calls: int, schedule: NoiseSchedule, fresh: float = 0.0
) -> Iterable[Stage]:
    """DPM-Solver-1, -2 or -3, in either form."""
    if calls == 1 or is_one_call(form, now, then):
        return one_call(form, now, then, fresh)
    fractions = [1 / 2] if calls == 2 else [1 / 3, 2 / 3]
    visited = [now, *inner_nodes(schedule, now, then, fractions), then]
    rows = midpoint_rows(form, visited, 1 / 2) if calls == 2 else three_stage_rows(form, visited, 1 / 3, 2 / 3)
    return runge_kutta(form, visited, rows, fresh)
