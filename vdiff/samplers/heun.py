"""Heun's method: a second look at the end of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, NoiseSchedule
from vdiff.samplers.euler import ChurnSampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage
from vdiff.samplers.quadrature import EpsilonForm, Form, TrigForm, VelocityForm


class HeunSampler(ChurnSampler):
    r"""Second order: the mean of the slopes at both ends of the step. Two calls a step, one into data.

    Args:
        coordinate: Against what the slopes are taken, which for Heun makes a difference: ``sigma``, the ratio
            :math:`\sigma/\alpha` of EDM, where a step from pure noise takes one look only; ``flow``, the time of the
            straight flow; or ``angle``, with the data's spread taken out.
        sigma_data: Of ``angle``: the spread of the data.
        num_steps, churn, churn_min, churn_max, churn_noise, discretizer, noise_source, init: See
            :class:`ChurnSampler`.

    References:
        Karras et al., arXiv:2206.00364, algorithms 1 and 2.
    """

    def __init__(
        self,
        num_steps: int = 30,
        coordinate: Literal["sigma", "flow", "angle"] = "sigma",
        sigma_data: float = 0.5,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, churn, churn_min, churn_max, churn_noise, discretizer, noise_source, init)
        self.form: Form = {"sigma": EpsilonForm(), "flow": VelocityForm(), "angle": TrigForm(sigma_data)}[coordinate]

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        for now, then in pairwise(nodes):
            up, ask = self.churned(now, schedule)
            euler = self.form.euler(up, then)
            if then.sigma == 0 or not self.form.is_finite_at(up):
                yield Stage(up, euler, ask)
                continue
            yield Stage(up, euler, ask, {"start": "x", "first": "x0"}, ends_step=False)
            keep, half = self.form.keep(up, then), self.form.total(up, then) / 2
            (x_first, x0_first), (x_last, x0_last) = self.form.reading(up), self.form.reading(then)
            yield Stage(
                then,
                {"start": keep + half * x_first, "first": half * x0_first, "x": half * x_last, "x0": half * x0_last},
            )
