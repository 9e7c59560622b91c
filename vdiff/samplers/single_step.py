"""Solvers that look into the middle of a step, with fresh noise or without, and DDPM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from vdiff.process import Discretizer, NoiseSchedule
from vdiff.samplers.base import Sampler
from vdiff.samplers.edits import Clamp, in_turn
from vdiff.samplers.euler import AncestralSampler, ChurnSampler
from vdiff.samplers.executor import Edit, Run
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage, ancestral, transfer
from vdiff.samplers.quadrature import EpsilonForm, Form, X0Form


def midpoint(
    form: Form,
    now: Node,
    then: Node,
    schedule: NoiseSchedule,
    ask: Mapping[str, float] | None = None,
    fresh: float = 0.0,
) -> Iterable[Stage]:
    """A step by what the network says at its middle in log(sigma / alpha): second order, two calls.

    From pure noise and into data, where there is no middle, one call and first order. ``fresh`` is the scale of
    the noise added at the end.
    """
    asked = {"x": 1.0} if ask is None else ask
    noise = {"noise": fresh} if fresh else {}
    keep, gain = transfer(now, then)
    if then.sigma == 0 or not math.isfinite(now.ratio):
        yield Stage(now, {"x": keep, "x0": gain} | noise, asked)
        return
    (middle,) = Node.of(schedule.at_ratio(math.sqrt(now.ratio * then.ratio)))
    half_keep, half_gain = transfer(now, middle)
    yield Stage(now, {"x": half_keep, "x0": half_gain}, asked, {"start": "x"}, ends_step=False)
    (on_x, on_x0), total = form.reading(middle), form.total(now, then)
    update = {"start": form.keep(now, then), "x0": total * on_x0}
    yield Stage(middle, update | ({"x": total * on_x} if on_x else {}) | noise)


class DPM2Sampler(ChurnSampler, name="dpm_2"):
    """DPM-Solver-2: the noise as seen at the middle of the step.

    Args:
        num_steps, churn, churn_min, churn_max, churn_noise, discretizer, noise_source, init: See
            :class:`ChurnSampler`.

    References:
        Lu et al., arXiv:2206.00927, algorithm 1, in the frame of EDM as in k-diffusion.
    """

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            up, ask = self.churned(now, schedule)
            yield from midpoint(EpsilonForm(), up, then, schedule, ask)


class DPMpp2SSampler(Sampler, name="dpmpp_2s"):
    """DPM-Solver++(2S): x0 as seen at the middle of the step.

    Args:
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Lu et al., arXiv:2211.01095, algorithm 1 with r = 1/2.
    """

    def __init__(
        self,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, init=init)

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            yield from midpoint(X0Form(), now, then, schedule)


class _MidpointAncestralSampler(AncestralSampler, abstract=True):
    """The midpoint to less noise than wanted, and fresh noise for the rest."""

    form: Form

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            down, fresh = ancestral(now, then, self.eta)
            yield from midpoint(self.form, now, down, schedule, fresh=fresh)


class DPM2AncestralSampler(_MidpointAncestralSampler, name="dpm_2_ancestral", aliases=("dpm_2_a",)):
    """``dpm_2`` to less noise than wanted, and fresh noise for the rest (Crowson, k-diffusion)."""

    form = EpsilonForm()


class DPMpp2SAncestralSampler(_MidpointAncestralSampler, name="dpmpp_2s_ancestral", aliases=("dpmpp_2s_a",)):
    """``dpmpp_2s`` to less noise than wanted, and fresh noise for the rest (Crowson, k-diffusion)."""

    form = X0Form()


class EulerAncestralFlowSampler(AncestralSampler, name="euler_ancestral_flow"):
    r"""Euler ancestral as flow models know it: with :math:`\tau = \sigma/(\alpha+\sigma)` it steps down to
    :math:`\tau'(1 + \eta(\tau'/\tau - 1))`. Another meaning of eta than in ``euler_ancestral``, and other samples.
    """

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            before, after = (node.sigma / (node.alpha + node.sigma) for node in (now, then))
            low = after * (1 + self.eta * (after / before - 1)) if before else 0.0
            ratio = low / (1 - low) if low < 1 else math.inf
            down = Node(then.t, then.alpha, then.alpha * ratio if math.isfinite(ratio) else then.sigma)
            fresh = math.sqrt(max(0.0, then.sigma**2 - down.sigma**2)) if self.eta else 0.0
            keep, gain = transfer(now, down)
            yield Stage(now, {"x": keep, "x0": gain} | ({"noise": fresh} if fresh else {}))


class DDPMSampler(Sampler, name="ddpm"):
    r"""Ancestral sampling by the posterior of the forward process given x0.

    Between two levels the forward process adds noise of variance
    :math:`\beta = \sigma^2 - (\alpha/\alpha')^2\sigma'^2`, in the schedule's own frame; given x0 as well, the less
    noisy state has variance :math:`\tilde\beta = \beta\,\sigma'^2/\sigma^2`.

    Args:
        v_posterior: Variance of the fresh noise, from 0, :math:`\tilde\beta` (DDIM with eta 1), to 1, :math:`\beta`.
        clip: Lowest and highest value of x0, to which what the network says is clamped at every call; published code
            has (-1, 1) for pixels. None leaves it alone, as latents want it.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Ho et al., arXiv:2006.11239, eq. 6 and 7 and section 3.2.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        v_posterior: float = 0.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_steps, discretizer, noise_source, init)
        if not 0 <= v_posterior <= 1:
            raise ValueError(f"DDPMSampler: v_posterior must lie in [0, 1], got {v_posterior}.")
        self.v_posterior, self.clip = v_posterior, clip

    def bind(self, *args: Any, edit: Edit | None = None, **options: Any) -> Run:
        edits = ([] if self.clip is None else [Clamp(*self.clip)]) + ([] if edit is None else [edit])
        return super().bind(*args, edit=in_turn(*edits) if edits else None, **options)

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            if now.sigma == 0:
                yield Stage(now, {"x": then.alpha / now.alpha})
                continue
            scale = now.alpha / then.alpha if then.alpha else 1.0  # from pure noise to pure noise nothing happens
            beta = max(0.0, now.sigma**2 - (scale * then.sigma) ** 2)
            share = beta / now.sigma**2
            posterior = share * then.sigma**2
            variance = (1 - self.v_posterior) * posterior + self.v_posterior * beta if then.sigma else 0.0
            keep = scale * (then.sigma / now.sigma) ** 2
            noise = {"noise": math.sqrt(variance)} if variance else {}
            yield Stage(now, {"x": keep, "x0": then.alpha * share} | noise)
