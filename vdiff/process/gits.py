r"""Levels found by search: the walk of n steps that strays least from given trajectories.

Along a fine walk of a teacher, whose states and answers are known, a single step of first order from level i to
level j lands :math:`c_{ij}` away from the teacher's state. The shortest path of n such steps is found by dynamic
programming, exactly, without another call of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.process.discretizers import Discretizer, end_with_data
from vdiff.process.level import HOST, NoiseLevel
from vdiff.process.schedules import NoiseSchedule


class GITSDiscretizer(Discretizer, name="gits"):
    """The levels of a table found by :func:`vdiff.samplers.search_levels`; other numbers of steps are log-linear in it.

    Args:
        ratios: Falling ``sigma / alpha``, the end at data left out; the table's own number of steps.

    References:
        Chen et al., arXiv:2405.11326 (GITS).
    """

    def __init__(self, ratios: Sequence[float]) -> None:
        values = torch.tensor(tuple(ratios), **HOST)
        if values.ndim != 1 or not len(values) or not (values.diff() < 0).all() or not 0 < values[-1]:
            raise ValueError(f"GITSDiscretizer: a table is one or more falling ratios above 0, got {values.tolist()}.")
        if not torch.isfinite(values).all():
            raise ValueError(
                "GITSDiscretizer: a table begins at a finite ratio; pure noise is the schedule's own level."
            )
        self.ratios = values

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        num = len(self.ratios)
        if num_steps == num:
            return schedule.at_ratio(end_with_data(self.ratios))
        if num == 1:
            raise ValueError(f"GITSDiscretizer: a table of one level has no levels for {num_steps} steps.")
        place = torch.linspace(0, num - 1, num_steps, **HOST)
        low = place.floor().clamp(max=num - 2).long()
        logs = self.ratios.log()
        return schedule.at_ratio(end_with_data(torch.lerp(logs[low], logs[low + 1], place - low).exp()))


def euler_costs(levels: NoiseLevel, states: Tensor, x0s: Tensor) -> Tensor:
    r"""How far a first-order step from level i lands from the trajectory at level j, :math:`c_{ij}`.

    The step is :math:`x_j = (\sigma_j/\sigma_i) x_i + (\alpha_j - \alpha_i\sigma_j/\sigma_i) x_{0,i}`; the distance is
    the mean over trajectories of the root mean square, in units of the data: divided by alpha.

    Args:
        levels: Of the trajectory, falling, shape ``(N + 1,)``; the last may be data.
        states: ``(N + 1, B, ...)``.
        x0s: What the denoiser said at every level but the last, ``(N, B, ...)``.

    Returns:
        ``(N + 1, N + 1)``, float64, infinite where j <= i.
    """
    num = len(levels.t)
    if len(states) != num or len(x0s) != num - 1 or states.shape[1:] != x0s.shape[1:]:
        raise ValueError(
            f"euler_costs: {num} levels need states ({num}, B, ...) and x0s ({num - 1}, B, ...), got "
            f"{tuple(states.shape)} and {tuple(x0s.shape)}."
        )
    states, x0s = states.flatten(2).double(), x0s.flatten(2).double()
    alpha, sigma = levels.alpha.to(states), levels.sigma.to(states)
    costs = states.new_full((num, num), float("inf"))
    for i in range(num - 1):
        keep = (sigma[i + 1 :] / sigma[i])[:, None, None]
        landed = keep * states[i] + (alpha[i + 1 :, None, None] - keep * alpha[i]) * x0s[i]
        away = ((landed - states[i + 1 :]) ** 2).mean(-1).sqrt().mean(-1)
        costs[i, i + 1 :] = away / alpha[i + 1 :]
    return costs


def shortest_walk(costs: Tensor, num_steps: int, growth: float = 1.0) -> list[int]:
    """The path of ``num_steps`` steps from the first level to the last whose costs add up to least.

    Args:
        costs: ``(N + 1, N + 1)`` from i to j, infinite where a step is not allowed.
        num_steps: From 1 to N.
        growth: By how much what later steps cost counts more than what this one does, per step: a local error is
            carried on and grows or shrinks. GITS takes 1.1 to 1.15.

    Returns:
        ``num_steps + 1`` indices, the first 0 and the last N.
    """
    num = len(costs)
    if not 1 <= num_steps <= num - 1:
        raise ValueError(f"shortest_walk: needs 1 to {num - 1} steps between {num} levels, got {num_steps}.")
    table = costs.double().cpu()
    best = torch.full((num,), float("inf"), dtype=torch.float64)  # from each level to the end, in k steps
    best[-1] = 0.0
    nexts = []
    for _ in range(num_steps):
        best, follow = (table + growth * best).min(1)
        nexts.append(follow)
    if not torch.isfinite(best[0]):
        raise ValueError(f"shortest_walk: no path of {num_steps} allowed steps leads from the first level to the last.")
    path = [0]
    for follow in reversed(nexts):
        path.append(int(follow[path[-1]]))
    return path
