"""Few-step samplers of consistency models: to data, or towards it, and back up with fresh noise.

Their levels are ``trailing`` ones by default, on EDM's schedule too: a last call next to data would be wasted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, NoiseSchedule, TrailingDiscretizer
from vdiff.samplers.base import Sampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage, transfer


class ConsistencySampler(Sampler):
    r"""Multistep consistency sampling: to data in one call, then back up with fresh noise.

    Args:
        sigma_min: The ratio sigma / alpha that a consistency model calls data; its square is taken from the
            variance of the fresh noise.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Song et al., arXiv:2303.01469, algorithm 1.
    """

    def __init__(
        self,
        num_steps: int = 2,
        sigma_min: float = 0.002,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer or TrailingDiscretizer(), noise_source, init)
        if sigma_min < 0:
            raise ValueError(f"{type(self).__name__}: sigma_min must not be negative, got {sigma_min}.")
        self.sigma_min = sigma_min

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            fresh = math.sqrt(max(0.0, then.sigma**2 - (then.alpha * self.sigma_min) ** 2))
            yield Stage(now, {"x0": then.alpha} | ({"noise": fresh} if fresh else {}))


class LCMSampler(ConsistencySampler, name="lcm", aliases=("trigflow",)):
    r"""Latent consistency models, on flow schedules too: to data in one call, then back up with fresh noise.

    In the angle that is sCM's sampler: :math:`x' = \cos\theta'\,x_0 + \sin\theta'\,\sigma_d z` with
    :math:`x_0 = \cos\theta\,x - \sin\theta\,\sigma_d F`, which the denoiser makes of its network's F.

    Args:
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Luo et al., arXiv:2310.04378, algorithm 3; Lu & Song, arXiv:2410.11081, section 2 (``trigflow``).
    """

    def __init__(
        self,
        num_steps: int = 4,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, 0.0, discretizer, noise_source, init)


class TCDSampler(Sampler, name="tcd"):
    """Trajectory consistency: along the trajectory to an earlier time, then back up with fresh noise.

    Args:
        gamma: How far beyond the next level: 0 is DDIM, 1 goes to data, as ``lcm``.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Zheng et al., arXiv:2402.19159, algorithm 4 (strategic stochastic sampling).
    """

    def __init__(
        self,
        num_steps: int = 4,
        gamma: float = 0.3,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer or TrailingDiscretizer(), noise_source, init)
        if not 0 <= gamma <= 1:
            raise ValueError(f"TCDSampler: gamma must lie in [0, 1], got {gamma}.")
        self.gamma = gamma

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            (beyond,) = Node.of(schedule((1 - self.gamma) * then.t)) if self.gamma else (then,)
            keep, gain = transfer(now, beyond)
            back = then.alpha / beyond.alpha if beyond.alpha else 1.0
            fresh = math.sqrt(max(0.0, then.sigma**2 - (back * beyond.sigma) ** 2))
            yield Stage(now, {"x": back * keep, "x0": back * gain} | ({"noise": fresh} if fresh else {}))
