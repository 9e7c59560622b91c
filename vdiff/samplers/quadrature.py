r"""Multistep weights by exact quadrature, on the host in float64.

With the ratio :math:`r = \sigma/\alpha` the probability flow is linear in the state up to one integral of
what the network says (Lu et al., arXiv:2211.01095; Zhang & Chen, arXiv:2204.13902). In the schedule's own
frame, from a level to the next (primed),

============ ================================================================== =====================
form         step                                                               its output :math:`m`
============ ================================================================== =====================
x0           :math:`x' = (\sigma'/\sigma)\,x + \sigma' \int m\,d(1/r)`            x0
epsilon      :math:`x' = (\alpha'/\alpha)\,x + \alpha' \int m\,dr`                the noise
velocity     :math:`x' = (S'/S)\,x + S' \int m\,d\tau`                            noise - x0
trig         :math:`x' = (T'/T)\,x + T' \int m\,d\theta`                          :math:`dy/d\theta`
============ ================================================================== =====================

where :math:`S = \alpha + \sigma`, :math:`\tau = \sigma / S` is the time of the straight flow,
:math:`T^2 = \sigma^2 + \alpha^2\sigma_d^2`, :math:`\theta = \operatorname{atan}(r/\sigma_d)` and :math:`y = x/T`.
A multistep solver puts a polynomial in some coordinate of r through stored outputs and integrates it;
:func:`weights` does so to rounding, whatever the form, the coordinate and the levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from vdiff.samplers.plan import Node, transfer

FormName = Literal["x0", "epsilon", "velocity", "trig"]
CoordinateName = Literal["log_sigma", "sigma", "sigma_root", "angle"]
Coordinate = Callable[[np.ndarray], np.ndarray]
Basis = Callable[[np.ndarray], np.ndarray]

_LEGENDRE = np.polynomial.legendre.leggauss(24)  # on panels one wide in log r: exact to rounding
_LAGUERRE = np.polynomial.laguerre.laggauss(16)  # the tail into data: exact for polynomials in log r
_TAIL = 14.0  # begins e^-14 below the last level


class Form(ABC):
    """What is interpolated, and the measure it is integrated under.

    Attributes:
        reads_state: Whether its output needs the state the network saw, besides x0.
        starts_at_noise: Whether a step from pure noise is finite.
    """

    reads_state = True
    starts_at_noise = True

    @abstractmethod
    def reading(self, node: Node) -> tuple[float, float]:
        """``(p, q)``: the output is ``p * x_t + q * x0``."""

    @abstractmethod
    def keep(self, now: Node, then: Node) -> float:
        """The coefficient of the state."""

    @abstractmethod
    def total(self, now: Node, then: Node) -> float:
        """The weight of an output that does not change."""

    @abstractmethod
    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        """Weight per unit of log r on the way down to ``then``."""

    def is_finite_at(self, node: Node) -> bool:
        """Whether a step from ``node`` is finite in this form."""
        return self.starts_at_noise or math.isfinite(node.ratio)

    def euler(self, now: Node, then: Node) -> dict[str, float]:
        """The step along which the output does not change, in the names of a :class:`~vdiff.samplers.plan.Stage`."""
        if not self.is_finite_at(now):
            keep, gain = transfer(now, then)
            return {"x": keep, "x0": gain}
        (on_x, on_x0), total = self.reading(now), self.total(now, then)
        return {"x": self.keep(now, then) + total * on_x, "x0": total * on_x0}

    def integral(self, basis: Basis, now: Node, then: Node) -> np.ndarray:
        """The integral of functions of r, ``(n,) -> (k, n)``, over the step; shape ``(k,)``."""
        high = math.log(now.ratio)
        low = math.log(then.ratio) if then.sigma else high - _TAIL
        points, masses = _panels(low, high)
        out = (basis(np.exp(points)) * (masses * self.density(points, then))).sum(1)
        if then.sigma:
            return out
        depth, mass = _LAGUERRE
        return out + (basis(np.exp(low - depth)) * (mass * np.exp(depth) * self.density(low - depth, then))).sum(1)


class X0Form(Form):
    r"""x0 itself: exact where x0 does not change.

    Args:
        eta: 0 is the probability flow; 1 the reverse SDE, 0 < eta between: :math:`(1/r)^{1+\eta}` in place of
            1/r, and fresh noise (Lu et al., arXiv:2211.01095, appendix; Xue et al., arXiv:2309.05019, with
            :math:`\eta = \tau^2`).
    """

    reads_state = False

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = eta

    def reading(self, node: Node) -> tuple[float, float]:
        return 0.0, 1.0

    def keep(self, now: Node, then: Node) -> float:
        keep = transfer(now, then)[0]
        return keep * shrink(now, then) ** self.eta if self.eta else keep

    def total(self, now: Node, then: Node) -> float:
        if not self.eta:
            return transfer(now, then)[1]
        return then.alpha * (1.0 - shrink(now, then) ** (1 + self.eta))

    def fresh(self, now: Node, then: Node) -> float:
        """Scale of the fresh noise of a step."""
        return then.sigma * math.sqrt(max(0.0, 1.0 - shrink(now, then) ** (2 * self.eta))) if self.eta else 0.0

    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        rate = 1 + self.eta
        return then.alpha * rate * np.exp(-rate * (log_ratio - math.log(then.ratio)))

    def integral(self, basis: Basis, now: Node, then: Node) -> np.ndarray:
        if not then.sigma:  # all of the mass lies at data
            return then.alpha * basis(np.zeros(1))[:, 0]
        return super().integral(basis, now, then)


class EpsilonForm(Form):
    """The noise: what DDIM, PNDM, DEIS and the linear multistep of k-diffusion interpolate."""

    starts_at_noise = False  # nothing is left of the state in units of the data

    def reading(self, node: Node) -> tuple[float, float]:
        return 1.0 / node.sigma, -node.alpha / node.sigma

    def keep(self, now: Node, then: Node) -> float:
        return then.alpha / now.alpha

    def total(self, now: Node, then: Node) -> float:
        return then.alpha * (then.ratio - now.ratio)

    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        return -then.alpha * np.exp(log_ratio)


class VelocityForm(Form):
    """The velocity along the straight line from data to noise: what flow matching trains."""

    def reading(self, node: Node) -> tuple[float, float]:
        return 1.0 / node.sigma, -(node.alpha + node.sigma) / node.sigma

    def keep(self, now: Node, then: Node) -> float:
        return (then.alpha + then.sigma) / (now.alpha + now.sigma)

    def total(self, now: Node, then: Node) -> float:
        times = [node.sigma / (node.alpha + node.sigma) for node in (now, then)]
        return (then.alpha + then.sigma) * (times[1] - times[0])

    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        ratio = np.exp(log_ratio)
        return -(then.alpha + then.sigma) * ratio / (1 + ratio) ** 2


class TrigForm(Form):
    r"""The velocity along the circle, EDM's own output: exact for Gaussian data of standard deviation sigma_data.

    Args:
        sigma_data: The :math:`\sigma_d` above.

    References:
        Karras et al., arXiv:2206.00364, eq. 7 (up to its sign); Lu & Song, arXiv:2410.11081, eq. 3.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def _radius(self, node: Node) -> float:
        return math.hypot(node.sigma, node.alpha * self.sigma_data)

    def reading(self, node: Node) -> tuple[float, float]:
        radius, std = self._radius(node), self.sigma_data
        return node.alpha * std / (radius * node.sigma), -radius / (std * node.sigma)

    def keep(self, now: Node, then: Node) -> float:
        return self._radius(then) / self._radius(now)

    def total(self, now: Node, then: Node) -> float:
        angles = [math.atan2(node.sigma, node.alpha * self.sigma_data) for node in (now, then)]
        return self._radius(then) * (angles[1] - angles[0])

    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        ratio, std = np.exp(log_ratio), self.sigma_data
        return -self._radius(then) * std * ratio / (ratio**2 + std**2)


def form(name: FormName, eta: float = 0.0, sigma_data: float = 0.5) -> Form:
    """A form by name."""
    if eta and name != "x0":
        raise ValueError(f"fresh noise (eta = {eta}) goes with the form x0, got {name!r}.")
    table: dict[str, Callable[[], Form]] = {
        "x0": lambda: X0Form(eta),
        "epsilon": EpsilonForm,
        "velocity": VelocityForm,
        "trig": lambda: TrigForm(sigma_data),
    }
    return table[name]()


def coordinate(name: CoordinateName, rho: float = 7.0, sigma_data: float = 0.5) -> Coordinate:
    """The variable of the polynomials as a function of r; infinite at an end where it has none."""
    table: dict[str, Coordinate] = {
        "log_sigma": np.log,
        "sigma": np.asarray,
        "sigma_root": lambda ratio: np.asarray(ratio) ** (1 / rho),
        "angle": lambda ratio: np.arctan(np.asarray(ratio) / sigma_data),
    }

    def at(ratio: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return table[name](ratio)

    return at


def weights(form: Form, coordinate: Coordinate, nodes: Sequence[Node], now: Node, then: Node) -> list[float]:
    """The weights of the outputs at ``nodes``, first the one that counts where only one can.

    ``x' = form.keep(now, then) * x + sum(weight * output)``. A node whose coordinate is infinite, or that of a
    node before it, has weight zero: the polynomial goes through the others. A step from pure noise, and one of
    x0 into data in a coordinate that does not reach it, use the first alone.

    Args:
        form, coordinate: What is interpolated, and in which variable.
        nodes: Where the outputs were seen, not data.
        now, then: Both ends of the step.
    """
    places = coordinate(np.array([node.ratio for node in nodes]))
    use = [j for j, place in enumerate(places) if np.isfinite(place) and place not in places[:j]]
    is_blind = isinstance(form, X0Form) and not then.sigma and not np.isfinite(coordinate(np.zeros(1)))[0]
    if len(use) < 2 or is_blind or not math.isfinite(now.ratio):
        only = use[0] if use and math.isfinite(now.ratio) else 0
        return [form.total(now, then) if j == only else 0.0 for j in range(len(nodes))]
    if now.ratio == then.ratio:
        return [0.0] * len(nodes)
    found = form.integral(_lagrange(coordinate, places[use]), now, then)
    values = dict(zip(use, found.tolist(), strict=True))
    return [values.get(j, 0.0) for j in range(len(nodes))]


def shrink(now: Node, then: Node) -> float:
    """How the ratio falls over a step, ``r' / r`` in [0, 1]; 0 from pure noise to anything less."""
    if now.ratio == then.ratio:
        return 1.0
    return then.sigma * now.alpha / (now.sigma * then.alpha)


def _lagrange(coordinate: Coordinate, places: np.ndarray) -> Basis:
    others = [[i for i in range(len(places)) if i != j] for j in range(len(places))]
    scales = [1.0 / math.prod(places[j] - places[i] for i in others[j]) for j in range(len(places))]

    def basis(ratio: np.ndarray) -> np.ndarray:
        gaps = coordinate(ratio) - places[:, None]
        return np.stack([scales[j] * math.prod(gaps[i] for i in others[j]) for j in range(len(places))])

    return basis


def _panels(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and masses of a rule on [low, high], on panels at most one wide."""
    edges = np.linspace(low, high, max(1, math.ceil(abs(high - low))) + 1)
    half = np.diff(edges) / 2
    points = (edges[:-1] + half)[:, None] + half[:, None] * _LEGENDRE[0]
    return points.ravel(), (half[:, None] * _LEGENDRE[1]).ravel()
