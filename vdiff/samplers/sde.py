"""Solvers of the reverse SDE: the multistep ones of DPM-Solver++ with fresh noise, SA-Solver, and DPM++ SDE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, NoiseSchedule
from vdiff.samplers.dpmpp import X0MultistepSampler, halved_second_difference, two_node_weights
from vdiff.samplers.euler import AncestralSampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage, ancestral, transfer
from vdiff.samplers.quadrature import Form


class DPMpp2MSDESampler(X0MultistepSampler, name="dpmpp_2m_sde", aliases=("vpsde_dpmpp_2m",)):
    """``dpmpp_2m`` of the reverse SDE. From pure noise its first step is exact: CogVideoX's VPSDE DPM++ 2M.

    Args:
        variant: ``midpoint`` takes x0 at the middle of the step, ``heun`` integrates its line exactly.
        eta: Fresh noise: 0 is the probability flow, 1 the reverse SDE.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Lu et al., arXiv:2211.01095, section 5 (SDE-DPM-Solver++ 2M).
    """

    def __init__(
        self,
        num_steps: int = 30,
        variant: Literal["midpoint", "heun"] = "midpoint",
        eta: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(2, eta=eta, num_steps=num_steps, discretizer=discretizer, noise_source=noise_source, init=init)
        self.variant = variant

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        if self.variant == "midpoint":
            return two_node_weights(form, nodes, now, then, form.total(now, then) / 2)
        return super().weights(form, nodes, now, then)


class DPMpp3MSDESampler(X0MultistepSampler, name="dpmpp_3m_sde"):
    """``dpmpp_3m`` of the reverse SDE.

    Args:
        variant: ``exact``, or ``legacy`` with half the weight on the second difference, as published.
        eta: Fresh noise: 0 is the probability flow, 1 the reverse SDE.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Crowson, k-diffusion, after Lu et al., arXiv:2211.01095.
    """

    def __init__(
        self,
        num_steps: int = 30,
        variant: Literal["exact", "legacy"] = "exact",
        eta: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(3, eta=eta, num_steps=num_steps, discretizer=discretizer, noise_source=noise_source, init=init)
        self.variant = variant

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        exact = super().weights(form, nodes, now, then)
        return halved_second_difference(form, exact, nodes, now, then) if self.variant == "legacy" else exact


class SASampler(X0MultistepSampler, name="sa"):
    r"""SA-Solver: Adams of x0 with fresh noise of strength :math:`\tau`, and a corrector that costs no call.

    Args:
        order: Nodes of the predictor.
        corrector: Nodes of the corrector, the newest included; 0 is none.
        tau: 0 is the probability flow, 1 the reverse SDE (:math:`\eta = \tau^2`).
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Xue et al., arXiv:2309.05019, eq. 14 and 17.
    """

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 2,
        corrector: int = 2,
        tau: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            order,
            corrector,
            eta=tau**2,
            num_steps=num_steps,
            discretizer=discretizer,
            noise_source=noise_source,
            init=init,
        )


class DPMppSDESampler(AncestralSampler, name="dpmpp_sde"):
    r"""``dpmpp_2s`` with fresh noise in the middle and at the end of a step, both of one Brownian path.

    The noise over a whole step is that of its first half, read off the state the network saw there, together with
    that of the second; so the pair has the covariance of a path in the clock :math:`\alpha^2/\sigma^2`, and the
    spread of the samples is right to second order. With independent noise it is to first order only.

    Args:
        eta: Share of fresh noise.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Crowson, k-diffusion, after Lu et al., arXiv:2211.01095.
    """

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            down, fresh = ancestral(now, then, self.eta)
            keep, gain = transfer(now, down)
            if then.sigma == 0 or not math.isfinite(now.ratio) or now.ratio == then.ratio:
                yield Stage(now, {"x": keep, "x0": gain} | ({"noise": fresh} if fresh else {}))
                continue
            (middle,) = Node.of(schedule.at_ratio(math.sqrt(now.ratio * then.ratio)))
            half_down, half_fresh = ancestral(now, middle, self.eta)
            half_keep, half_gain = transfer(now, half_down)
            update = {"x": half_keep, "x0": half_gain} | ({"noise": half_fresh} if half_fresh else {})
            yield Stage(now, update, store={"start": "x", "first": "x0"}, ends_step=False)
            if not fresh:
                yield Stage(middle, {"start": keep, "x0": gain})
                continue
            clock = [1 / node.ratio**2 for node in (now, middle, then)]
            share = (clock[1] - clock[0]) / (clock[2] - clock[0])
            # noise of the first half = (x - half_keep * start - half_gain * first) / half_fresh
            known = fresh * math.sqrt(share) / half_fresh
            yield Stage(
                middle,
                {
                    "start": keep - known * half_keep,
                    "first": -known * half_gain,
                    "x": known,
                    "x0": gain,
                    "noise": fresh * math.sqrt(1 - share),
                },
            )
