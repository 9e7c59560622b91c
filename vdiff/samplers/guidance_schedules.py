"""Guidance that differs by call: only between some levels, growing along the walk, or scaling x0 as it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vdiff.process import HOST, Prediction, X0Parameterization, X0Scale
from vdiff.samplers.guiders import (
    PLAIN,
    Answers,
    CFGGuider,
    Guidance,
    Guider,
    Weight,
    WrappingGuider,
    away_from_null,
)
from vdiff.samplers.plan import Node

X0 = X0Parameterization()


class IntervalGuider(WrappingGuider):
    r"""The guider inside where :math:`lo < \sigma/\alpha \le hi`; outside, the plain conditional prediction.

    In noise, not in fractions of the steps, so it means the same for every number of steps and schedule. Outside,
    nothing but ``cond`` is asked, and the guiders inside have no say.

    Args:
        lo, hi: Bounds of sigma / alpha.
        guider: The one inside.

    References:
        Kynkaanniemi et al., arXiv:2404.07724.
    """

    def __init__(self, lo: float = 0.0, hi: float = math.inf, guider: Guider | None = None) -> None:
        super().__init__(guider)
        if not 0 <= lo < hi:
            raise ValueError(f"IntervalGuider: needs 0 <= lo < hi, got {lo} and {hi}.")
        self.lo, self.hi = lo, hi

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        inner = zip(self.guider.planned(nodes), nodes, strict=True)
        return [g if self.lo < node.ratio <= self.hi else PLAIN for g, node in inner]


class DynamicCFGGuider(Guider, name="dynamic_cfg"):
    r"""A scale that grows along the walk: :math:`1 + w\,(1 - \cos(\pi (k/N)^p)) / 2` at call k of N, from 0.

    Args:
        scale: The :math:`w` above; 0 is the plain conditional prediction throughout.
        exponent: The :math:`p` above. With 5 the scale stays near 1 for the first half of the walk.
        legacy_cogvideox: Reproduce what CogVideoX's released pipelines do: they put ``N - index`` in the place of k,
            with the index of the table's row (0 to 999), so that the scale jumps about between 1 and w + 1.
        num_rows: Length of that table.
        batched: See :class:`CFGGuider`.

    References:
        Yang et al., arXiv:2408.06072, whose code is meant.
    """

    def __init__(
        self,
        scale: float = 6.0,
        exponent: float = 5.0,
        legacy_cogvideox: bool = False,
        num_rows: int = 1000,
        batched: bool = True,
    ) -> None:
        self.scale, self.exponent, self.legacy_cogvideox = scale, exponent, legacy_cogvideox
        self.num_rows, self.batched = num_rows, batched

    def scales(self, nodes: Sequence[Node]) -> list[float]:
        """The scale of each call."""
        num = len(nodes)
        calls = [num - (round(n.t * self.num_rows) - 1) for n in nodes] if self.legacy_cogvideox else range(num)
        return [1 + self.scale * (1 - math.cos(math.pi * (k / num) ** self.exponent)) / 2 for k in calls]

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        return [away_from_null(scale) for scale in self.scales(nodes)]

    combine = CFGGuider.combine


class X0ScaleGuider(WrappingGuider, name="x0_scale"):
    r"""VideoCrafter's scaled x0: a step from t to t' multiplies it by :math:`s(t')/s(t)`.

    For models trained on :math:`s(t)\,x_0`, see :class:`vdiff.process.X0Scale`; an engine with ``x0_scale`` does this
    by itself. The noise goes on as it is. Meant for samplers with one call per step; the last step ends at data.

    Args:
        last, num_falling, num_rows: See :class:`vdiff.process.X0Scale`.
        guider: The one inside.

    References:
        Chen et al., arXiv:2310.19512 and arXiv:2401.09047, ``use_scale`` in their code.
    """

    def __init__(
        self, last: float = 0.7, num_falling: int = 400, num_rows: int = 1000, guider: Guider | None = None
    ) -> None:
        super().__init__(guider)
        self.x0_scale = X0Scale(last, num_falling, num_rows)

    def s(self, t: float) -> float:
        """What the clean sample is multiplied by at time ``t``."""
        return self.x0_scale.at(torch.tensor(t, **HOST)).item()

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        times = [*(node.t for node in nodes), 0.0]
        return [self.s(then) / self.s(now) for now, then in pairwise(times)]

    def change(self, guided: Prediction, answers: Answers, number: Tensor) -> Prediction:
        x0 = guided.x0
        return answers.prediction(x0 * number, X0, renoise=x0 if guided.renoise is None else guided.renoise)
