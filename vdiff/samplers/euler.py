"""First-order samplers: Euler with churn, DDIM, Euler ancestral."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, NoiseSchedule
from vdiff.samplers.base import Sampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage, ancestral, transfer


class AncestralSampler(Sampler, abstract=True):
    """A step to less noise than wanted, and fresh noise for the rest.

    Args:
        eta: Share of fresh noise: 0 is the probability flow, 1 as much as DDPM.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.
    """

    def __init__(
        self,
        num_steps: int = 30,
        eta: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, noise_source, init)
        if eta < 0:
            raise ValueError(f"{type(self).__name__}: eta must not be negative, got {eta}.")
        self.eta = eta

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            down, fresh = ancestral(now, then, self.eta)
            keep, gain = transfer(now, down)
            yield Stage(now, {"x": keep, "x0": gain} | ({"noise": fresh} if fresh else {}))


class EulerAncestralSampler(AncestralSampler, aliases=("euler_a",)):
    """Euler ancestral: DDIM with eta 1, under the name k-diffusion gave it."""


class DDIMSampler(AncestralSampler):
    """DDIM: exact where x0 does not change.

    Args:
        eta: Fresh noise: 0 is the probability flow, 1 as much as DDPM.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Song et al., arXiv:2010.02502, eq. 12 and 16.
    """

    def __init__(
        self,
        num_steps: int = 30,
        eta: float = 0.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, eta, discretizer, noise_source, init)


class ChurnSampler(Sampler, abstract=True):
    r"""A sampler of EDM's family: before a step it may add fresh noise and go back up.

    Args:
        churn: :math:`S_{churn}`: 0 is deterministic.
        churn_min, churn_max: Ratios sigma / alpha between which it happens (:math:`S_{min}, S_{max}`).
        churn_noise: Scale of the fresh noise (:math:`S_{noise}`).
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Karras et al., arXiv:2206.00364, algorithm 2.
    """

    def __init__(
        self,
        num_steps: int = 30,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, noise_source, init)
        if churn < 0:
            raise ValueError(f"{type(self).__name__}: churn must not be negative, got {churn}.")
        self.churn, self.churn_min, self.churn_max, self.churn_noise = churn, churn_min, churn_max, churn_noise

    def churned(self, now: Node, schedule: NoiseSchedule) -> tuple[Node, dict[str, float]]:
        """The level at which the network is asked, and what it sees."""
        gamma = min(self.churn / self.num_steps, math.sqrt(2) - 1)
        if gamma == 0 or not math.isfinite(now.ratio) or not self.churn_min <= now.ratio <= self.churn_max:
            return now, {"x": 1.0}
        up = Node.of(schedule.at_ratio(now.ratio * (1 + gamma)))[0]
        fresh = math.sqrt(max(up.ratio**2 - now.ratio**2, 0.0)) * self.churn_noise
        return up, {"x": up.alpha / now.alpha, "noise": up.alpha * fresh}


class EulerSampler(ChurnSampler):
    """Euler in sigma / alpha, which is DDIM in any frame, with EDM's churn."""

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            up, ask = self.churned(now, schedule)
            keep, gain = transfer(up, then)
            yield Stage(up, {"x": keep, "x0": gain}, ask)
