"""The Gaussian-calibrated multistep: weights, and levels, tuned on the host for the variances that data may have."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from vdiff.process import Discretizer, ExplicitDiscretizer, NoiseLevel, NoiseSchedule
from vdiff.process.level import HOST
from vdiff.samplers import quadrature
from vdiff.samplers.calibration import Calibration, GaussianPrior, calibrate
from vdiff.samplers.multistep import MultistepSampler
from vdiff.samplers.plan import Node, Stage
from vdiff.samplers.quadrature import EpsilonForm, Form


class GaussianCalibratedSampler(MultistepSampler, name="gaussian_calibrated"):
    r"""Adams and Bashforth on the noise whose weights make the whole walk right for Gaussians of every variance.

    A quadrature rule makes each step right in the limit of many; these weights make the sum of all steps right at
    the number there are. They are found in a fraction of a second on the host (see
    :mod:`vdiff.samplers.calibration`), ask no network, are kept for the process, and depend only on the ratios of
    the levels and on the prior, so every schedule shares them. Data that is not Gaussian is a bet on its modes
    being locally so; it pays most below 20 calls (``docs/benchmarks/solver_anchor.md``). Of no declared order.

    Args:
        num_steps: One call each.
        order: Answers a step may use, 1 to 4.
        prior: Variances of the data's modes in the denoiser's space; by default 1e-4 to 16, even in the logarithm. From
            data: ``GaussianPrior.of_spectrum(eigenvalues, or power per frequency, or channel variances)``.
        pull: Towards the weights that ``toward`` names.
        toward: ``quadrature``, the weights of ``ab``, or ``even``, those of ``ipndm``.
        node_pull: Let the levels between the first and the last move too, held to the discretizer's by this much;
            None, the default, leaves them. A listed discretizer's, and levels by frame, never move.
        discretizer, init: See :class:`Sampler`. A walk that an image enters below its first level, or that goes
            upwards (``invert``), keeps the levels; upwards the weights are those of quadrature.

    References:
        The idea of fitting weights to the whole walk: Zheng et al., arXiv:2310.13268 and S4S, arXiv:2502.17423,
        who ask the network.
    """

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 4,
        prior: GaussianPrior | None = None,
        pull: float = 1e-3,
        node_pull: float | None = None,
        toward: Literal["quadrature", "even"] = "quadrature",
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            EpsilonForm(),
            quadrature.coordinate("sigma_root"),
            order,
            num_steps=num_steps,
            discretizer=discretizer,
            init=init,
        )
        if pull <= 0 or (node_pull is not None and node_pull <= 0):
            raise ValueError(f"GaussianCalibratedSampler: pulls must be positive, got {pull} and {node_pull}.")
        self.prior, self.pull, self.node_pull, self.toward = prior, pull, node_pull, toward
        self.shares: Mapping[tuple[float, float], Sequence[float]] = {}

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        levels = super().levels(schedule)
        if self.node_pull is None or levels.t.ndim > 1 or isinstance(self.discretizer, ExplicitDiscretizer):
            return levels
        ratios = levels.ratio.tolist()
        places = [i for i, ratio in enumerate(ratios) if math.isfinite(ratio)]
        found = self._calibrate([ratios[i] for i in places], len(places) < len(ratios), self.node_pull)
        if found is None:
            return levels
        inner = torch.tensor(found.ratios[1:-1], **HOST)
        lowest = 0.0 if schedule.num_rows is None else schedule(1 / schedule.num_rows).ratio.item()
        if len(inner) and inner[-1] < lowest:  # a network with a table knows no level below its first row
            logs, top = inner.log(), math.log(found.ratios[0])
            inner = torch.exp(top + (logs - top) * (math.log(lowest) - top) / (logs[-1] - top))
        ends = [
            NoiseLevel(*(v[part] for v in vars(levels).values())) for part in (slice(places[0] + 1), slice(-1, None))
        ]
        parts = [ends[0], schedule.at_ratio(inner), ends[1]]
        return NoiseLevel(*(torch.cat(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        ratios = list(dict.fromkeys(node.ratio for node in nodes if math.isfinite(node.ratio)))
        found = self._calibrate(ratios, not math.isfinite(nodes[0].ratio), None)
        walk = copy.copy(self)
        pairs = zip(ratios, ratios[1:], strict=False)
        walk.shares = {} if found is None else dict(zip(pairs, found.shares, strict=True))
        return super(GaussianCalibratedSampler, walk).plan(nodes, schedule)

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        shares = self.shares.get((now.ratio, then.ratio))
        if shares is None:
            return super().weights(form, nodes, now, then)
        total = form.total(now, then)
        return [total * share for share in shares] + [0.0] * (len(nodes) - len(shares))  # not that of pure noise

    def _calibrate(self, ratios: Sequence[float], from_noise: bool, node_pull: float | None) -> Calibration | None:
        if len(ratios) < 2 or any(then >= now for now, then in zip(ratios, ratios[1:], strict=False)):
            return None
        return calibrate(tuple(ratios), self.order, self.prior, self.pull, node_pull, from_noise, self.toward)
