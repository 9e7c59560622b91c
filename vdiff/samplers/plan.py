r"""Solver plans: a sampler as a table of coefficients made on the host.

Every sampler that does not adapt its step is, per network call, a linear combination of the state,
of what it stored and of fresh noise, with coefficients that depend only on the levels. A solver
writes those combinations down, one :class:`Stage` per call, in Python floats; one executor runs
them all. The state is carried in the schedule's own frame, :math:`x_t = \alpha x_0 + \sigma\epsilon`,
so that the same coefficients serve variance-exploding, variance-preserving and flow schedules, and a
start at pure noise (:math:`\alpha = 0`) is an ordinary level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdiff.process import HOST, NoiseLevel


@dataclass(frozen=True)
class Node:
    """One noise level on the host, as Python floats.

    Attributes:
        t, alpha, sigma, d_alpha, d_sigma: As in :class:`~vdiff.process.NoiseLevel`.
    """

    t: float
    alpha: float
    sigma: float
    d_alpha: float = 0.0
    d_sigma: float = 0.0

    @property
    def ratio(self) -> float:
        """``sigma / alpha``, infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr_half(self) -> float:
        """``log(alpha / sigma)``, the lambda of DPM-Solver; infinite at either end."""
        if not self.sigma:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf

    @staticmethod
    def of(level: NoiseLevel) -> list[Node]:
        """The entries of a level of shape ``(N,)``, or the one of shape ``()``."""
        columns = (v.reshape(-1).tolist() for v in (level.t, level.alpha, level.sigma, level.d_alpha, level.d_sigma))
        return [Node(*row) for row in zip(*columns, strict=True)]

    @staticmethod
    def table(nodes: Sequence[Node]) -> Tensor:
        """Nodes as the rows of a tensor on the host, ``(N, 5)``, float64."""
        return torch.tensor([[n.t, n.alpha, n.sigma, n.d_alpha, n.d_sigma] for n in nodes], **HOST)

    @staticmethod
    def columns(levels: NoiseLevel) -> list[list[Node]]:
        """The levels of a walk frame by frame, from ``(N, F)``; a single list from ``(N,)``."""
        if levels.t.ndim < 2:
            return [Node.of(levels)]
        return [Node.of(levels[:, f]) for f in range(levels.t.shape[1])]


@dataclass(frozen=True)
class Stage:
    """One network call and what becomes of its answer.

    Combinations map names to coefficients. Names: ``x`` (in ``ask`` the state, in ``update`` what the
    network saw), ``x0`` (its answer), ``noise`` (a fresh standard Gaussian, another one in ``ask`` than in
    ``update``), and whatever was stored before.

    Attributes:
        node: The level at which the network is asked.
        update: The next state.
        ask: What the network sees; by default the state.
        store: After the update, ``name: source`` with source ``x``, ``x0`` or a stored name; read first, then
            written, so that a history shifts in one go.
        ends_step: Whether this call completes a step of the sampler.
    """

    node: Node
    update: Mapping[str, float]
    ask: Mapping[str, float] = field(default_factory=lambda: {"x": 1.0})
    store: Mapping[str, str] = field(default_factory=dict)
    ends_step: bool = True


def transfer(now: Node, then: Node) -> tuple[float, float]:
    r"""``(keep, gain)`` of the first-order step ``x' = keep * x + gain * x0``: DDIM, Euler.

    Exact where x0 does not change: :math:`\sigma'/\sigma` and :math:`\alpha' - \alpha\sigma'/\sigma`, finite at pure
    noise too.
    """
    if now.sigma == 0:
        return then.alpha / now.alpha, 0.0
    keep = then.sigma / now.sigma
    return keep, then.alpha - keep * now.alpha


def ancestral(now: Node, then: Node, eta: float) -> tuple[Node, float]:
    r"""Split a step into a deterministic one to less noise and fresh noise: ``(down, noise_scale)``.

    With :math:`r = \sigma/\alpha`, fresh noise :math:`r_{up} = \eta\, r' \sqrt{1 - (r'/r)^2}`, which is DDIM's eta and
    Euler ancestral's (Song et al., arXiv:2010.02502, eq. 16).
    """
    shrink = then.sigma * now.alpha / (now.sigma * then.alpha) if now.sigma and then.alpha else 1.0
    share = min(1.0, eta * math.sqrt(max(0.0, 1.0 - shrink**2)))
    down = Node(then.t, then.alpha, then.sigma * math.sqrt(1.0 - share**2))
    return down, then.sigma * share
