r"""Multistep weights, and levels, that are right for Gaussian data: made on the host, without a network call.

For data of variance v the answer of the exact denoiser is linear in the state, so a multistep walk in the noise
:math:`\epsilon` is one number :math:`X_N(v)` per variance, polynomial in its weights, and the flow ends at
:math:`\sqrt v`. :func:`calibrate` minimises

.. math:: \sum_v \pi(v) \Bigl(\frac{X_N(v) - \sqrt v}{\sqrt v + \delta}\Bigr)^2
          + \lambda\,\|u - u_0\|^2 + \mu\,\|\log h - \log h_0\|^2

over the shares u of the stored answers, and if asked over the steps h in :math:`\log\sigma`, by damped
Gauss-Newton with exact derivatives, in float64. The shares of a step sum to 1, so that data at one point, and
hence every mean, is exact whatever else is. :math:`u_0` are the shares
of exact quadrature, or those of an even grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from vdiff.samplers import quadrature
from vdiff.samplers.multistep import IPNDMSampler
from vdiff.samplers.plan import Node
from vdiff.samplers.quadrature import EpsilonForm

_SOFTENING = 0.03  # the delta above: errors of modes that are smaller than this count absolutely


@dataclass(frozen=True)
class GaussianPrior:
    """Which variances of the data's modes a walk should be right for.

    By default every variance from 1e-4 to 16 counts the same in its logarithm, in units of the space the denoiser
    lives in: it fits data whose overall standard deviation is about 0.3 to 2.

    Attributes:
        variances: Of the modes.
        weights: Of the variances, by default equal; they need not sum to 1.
    """

    variances: tuple[float, ...] = tuple((10 ** np.linspace(-4, 1.2, 60)).tolist())
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.variances or not all(v > 0 and math.isfinite(v) for v in self.variances):
            raise ValueError(f"GaussianPrior: variances must be positive and finite, got {self.variances}.")
        if self.weights is not None and (
            len(self.weights) != len(self.variances) or min(self.weights) < 0 or not sum(self.weights) > 0
        ):
            raise ValueError(f"GaussianPrior: needs one weight >= 0 per variance, got {self.weights}.")

    @staticmethod
    def of_spectrum(variances: np.ndarray | list[float], num: int = 60) -> GaussianPrior:
        """From the data's own spectrum: its power per frequency, the eigenvalues of its covariance, or the variances
        of its channels, in the denoiser's space. At most ``num`` quantiles are kept; zeros are dropped."""
        values = np.asarray(variances, dtype=np.float64).ravel()
        values = values[values > 0]
        if not len(values):
            raise ValueError("GaussianPrior.of_spectrum: no variance is positive.")
        if len(values) > num:
            values = np.exp(np.quantile(np.log(values), (np.arange(num) + 0.5) / num))
        return GaussianPrior(tuple(values.tolist()))


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        ratios: The levels ``sigma / alpha``, falling, the end included.
        shares: Per step, of the answers, newest first; each row sums to 1.
        error: Root of the prior's mean squared relative error at the end of the walk.
    """

    ratios: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    error: float


@lru_cache(maxsize=256)
def calibrate(
    ratios: tuple[float, ...],
    order: int = 4,
    prior: GaussianPrior | None = None,
    pull: float = 1e-3,
    node_pull: float | None = None,
    from_noise: bool = False,
    toward: Literal["quadrature", "even"] = "quadrature",
    num_iterations: int = 60,
) -> Calibration:
    """Shares (and levels) for a walk along strictly falling ratios.

    Args:
        ratios: ``sigma / alpha`` of the levels, the end included, which may be 0; the first is finite.
        order: Answers a step may use.
        prior: By default :class:`GaussianPrior`'s.
        pull: The lambda above.
        node_pull: The mu above, towards the given levels; None leaves the levels alone. The first and the end stay.
        toward: The u_0 above: shares of exact quadrature, or those of an even grid (iPNDM).
        from_noise: The walk came to the first level in one step from pure noise, and so without the data's spread.
        num_iterations: At most so many steps of Gauss-Newton; it stops when one gains less than 1e-4.
    """
    walk = _Walk(np.array(ratios), order, prior or GaussianPrior(), from_noise, node_pull is not None, toward)
    pulls = np.concatenate([np.full(walk.num_shares, pull), np.full(walk.num_moves, node_pull or 0.0)])
    here = np.zeros(len(pulls))
    misses = walk.misses(here)
    best, damping = misses @ misses, 1e-3 * (misses @ misses) / max(1, len(here))
    for _ in range(num_iterations):
        slopes = walk.slopes(here)
        normal = slopes.T @ slopes + np.diag(pulls)
        downhill = -(slopes.T @ misses + pulls * here)
        for _ in range(12):
            there = here + np.linalg.solve(normal + damping * np.eye(len(here)), downhill)
            if np.abs(there - here).max(initial=0.0) < 2.0:
                found = walk.misses(there)
                cost = found @ found + pulls @ there**2
                if cost < best:
                    break
            damping *= 10
        else:
            break
        gain, here, misses, best, damping = (best - cost) / best, there, found, cost, damping / 5
        if gain < 1e-4:
            break
    shares, levels = walk.unpack(here)
    rows = tuple(tuple(row[: min(order, i + 1)].tolist()) for i, row in enumerate(shares))
    return Calibration(tuple(levels.tolist()), rows, float(np.sqrt(misses @ misses)))


class _Walk:
    """The end of a multistep walk per variance, and its derivatives in the shares and the levels."""

    def __init__(
        self,
        ratios: np.ndarray,
        order: int,
        prior: GaussianPrior,
        from_noise: bool,
        moves_levels: bool,
        toward: Literal["quadrature", "even"],
    ) -> None:
        if len(ratios) < 2 or not (np.diff(ratios) < 0).all() or not np.isfinite(ratios).all() or ratios[-1] < 0:
            raise ValueError(f"calibrate: needs two or more finite ratios that fall, to 0 at least, got {ratios}.")
        self.ratios, self.order, self.num_steps = ratios, order, len(ratios) - 1
        self.variances = np.array(prior.variances)
        scale = np.sqrt(self.variances)
        share = np.ones_like(scale) if prior.weights is None else np.array(prior.weights)
        self.start = ratios[0] * np.ones_like(scale) if from_noise else np.hypot(scale, ratios[0])
        self.want = np.hypot(scale, ratios[-1])
        self.weights = np.sqrt(share / share.sum()) / (scale + _SOFTENING)
        used = [(i, j) for i in range(self.num_steps) for j in range(1, min(order, i + 1))]
        self.step_of, self.age_of = np.array(used, dtype=np.int64).reshape(-1, 2).T
        self.num_shares = len(used)
        self.num_moves = self.num_steps - 1 if moves_levels else 0
        inner = ratios if ratios[-1] else ratios[:-1]
        self.widths = -np.diff(np.log(inner))[: self.num_steps - 1]
        self.shares = self._quadrature() if toward == "quadrature" else self._even()

    def _quadrature(self) -> np.ndarray:
        form, coordinate = EpsilonForm(), quadrature.coordinate("sigma_root")
        nodes = [Node(0.0, 1.0, ratio) for ratio in self.ratios.tolist()]
        out = np.zeros((self.num_steps, self.order))
        for i in range(self.num_steps):
            known = [nodes[i - j] for j in range(min(self.order, i + 1))]
            weights = quadrature.weights(form, coordinate, known, nodes[i], nodes[i + 1])
            out[i, : len(known)] = np.array(weights) / form.total(nodes[i], nodes[i + 1])
        return out

    def _even(self) -> np.ndarray:
        out = np.zeros((self.num_steps, self.order))
        for i, row in enumerate(out):
            used = min(self.order, i + 1)
            row[:used] = IPNDMSampler.table[used - 1]
        return out

    def unpack(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares ``(N, order)`` and levels ``(N + 1,)``."""
        shares, levels = self.shares.copy(), self.ratios.copy()
        change = at[: self.num_shares]
        shares[self.step_of, self.age_of] += change
        np.subtract.at(shares[:, 0], self.step_of, change)
        if self.num_moves:
            levels[1:-1] = np.exp(np.log(levels[0]) - np.cumsum(self.widths * np.exp(at[self.num_shares :])))
        return shares, levels

    def misses(self, at: np.ndarray) -> np.ndarray:
        """The weighted errors at the end, one per variance; infinite where the levels no longer fall."""
        shares, levels = self.unpack(at)
        if not (np.diff(levels) < 0).all():
            return np.full_like(self.want, 1e100)
        return (self._states(shares, levels)[0][-1] - self.want) * self.weights

    def _states(self, shares: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States ``(N + 1, V)``, answers and their combinations ``(N, V)``."""
        gains = levels[:-1, None] / (self.variances + levels[:-1, None] ** 2)  # epsilon = gain * x
        states = np.empty((self.num_steps + 1, len(self.variances)))
        answers, slopes = np.empty_like(gains), np.empty_like(gains)
        states[0] = self.start
        for i in range(self.num_steps):
            answers[i] = gains[i] * states[i]
            used = min(self.order, i + 1)
            slopes[i] = shares[i, :used] @ answers[i - used + 1 : i + 1][::-1]
            states[i + 1] = states[i] + (levels[i + 1] - levels[i]) * slopes[i]
        return states, answers, slopes

    def slopes(self, at: np.ndarray) -> np.ndarray:
        """Derivatives of :meth:`misses`, ``(V, num_shares + num_moves)``, by the adjoint of the walk."""
        shares, levels = self.unpack(at)
        states, answers, combined = self._states(shares, levels)
        now, steps = levels[:-1, None], np.diff(levels)
        on_state = np.zeros_like(states)  # of the end
        on_state[-1] = 1.0
        on_answer = np.zeros_like(answers)
        for i in reversed(range(self.num_steps)):
            later = np.arange(min(self.order, self.num_steps - i))
            on_answer[i] = (steps[i + later] * shares[i + later, later]) @ on_state[i + 1 + later]
            on_state[i] = on_state[i + 1] + now[i] / (self.variances + now[i] ** 2) * on_answer[i]
        step, age = self.step_of, self.age_of
        change = answers[np.subtract(step, age)] - answers[step]
        out = on_state[step + 1] * steps[step, None] * change
        if self.num_moves:
            bend = (self.variances - now**2) / (self.variances + now**2) ** 2
            on_level = -on_state[1:] * combined + bend * states[:-1] * on_answer
            on_level[1:] += on_state[1:-1] * combined[:-1]
            shifted = np.cumsum((on_level * now)[:0:-1], 0)[::-1]  # a wider step moves all levels after it
            slopes = -1.0 * self.widths * np.exp(at[self.num_shares :])
            out = np.concatenate([out, slopes[:, None] * shifted])
        return out.T * self.weights[:, None]
