"""DPM-Solver++: multistep in the logarithm of the signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from vdiff.process import NoiseSchedule
from vdiff.samplers.base import Sampler
from vdiff.samplers.plan import Node, Stage, transfer


class DPMpp2MSampler(Sampler, name="dpmpp_2m"):
    """Second order with one call a step: x0 is extrapolated to the middle of the step from the last two answers.

    The first step, a step from pure noise and the step into data are of first order.

    References:
        Lu et al., arXiv:2211.01095, algorithm 2.
    """

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        before = None  # width of the previous step in lambda = log(alpha / sigma)
        for now, then in pairwise(nodes):
            keep, gain = transfer(now, then)
            width = then.log_snr_half - now.log_snr_half
            # From pure noise `before` is infinite and the share 0; into data the width is.
            share = width / (2 * before) if before and math.isfinite(width) else 0.0
            yield Stage(
                now,
                {"x": keep, "x0": gain * (1 + share)} | ({"last": -gain * share} if share else {}),
                store={"last": "x0"},
            )
            before = width
