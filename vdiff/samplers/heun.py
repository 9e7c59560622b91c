"""Heun's method: a second look at the end of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from vdiff.process import NoiseSchedule
from vdiff.samplers.euler import ChurnSampler
from vdiff.samplers.plan import Node, Stage, transfer


class HeunSampler(ChurnSampler):
    r"""Second order: the mean of the slopes at both ends of the step, in :math:`r = \sigma/\alpha`.

    A step from pure noise or into data takes one look only. Two calls a step, one for those.

    References:
        Karras et al., arXiv:2206.00364, algorithms 1 and 2.
    """

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            up, ask = self.churned(now, schedule)
            keep, gain = transfer(up, then)
            if then.sigma == 0 or not math.isfinite(up.ratio):
                yield Stage(up, {"x": keep, "x0": gain}, ask)
                continue
            yield Stage(up, {"x": keep, "x0": gain}, ask, {"start": "x", "first": "x0"}, ends_step=False)
            # X + (r' - r) (e1 + e2) / 2 with X = x / alpha and e = (X - x0) / r, times the new alpha
            step, alpha = (then.ratio - up.ratio) / 2, then.alpha
            yield Stage(
                then,
                {
                    "start": alpha / up.alpha * (1 + step / up.ratio),
                    "first": -alpha * step / up.ratio,
                    "x": step / then.ratio,
                    "x0": -alpha * step / then.ratio,
                },
            )
