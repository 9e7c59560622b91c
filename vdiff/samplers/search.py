"""Search for levels along a teacher's walk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, GITSDiscretizer, NoiseLevel, NoiseSchedule
from vdiff.process.gits import euler_costs, shortest_walk
from vdiff.samplers.base import Sampler
from vdiff.samplers.guiders import Guider
from vdiff.samplers.multistep import ABSampler
from vdiff.samplers.plan import Node


def search_levels(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: Tensor,
    num_steps: int,
    cond: Conditioning | None = None,
    *,
    guider: Guider | None = None,
    teacher: Sampler | None = None,
    growth: float = 1.0,
) -> GITSDiscretizer:
    """The ``num_steps`` levels, out of a teacher's, that stray least from the teacher's walk.

    Costs one walk of the teacher over a few rows of noise, say 16 to 256. Use the result as any discretizer, with the
    same guider; a table is one list of numbers, which a config can hold: ``{type: gits, ratios: [...]}``.

    Args:
        denoiser, schedule, noise, cond, guider: As a sampler is called with.
        num_steps: Steps of the walk to place, fewer than the teacher's.
        teacher: A fine, deterministic sampler of one call a step that ends in data; by default ``ab`` over 61 levels
            of its own discretizer. Its first level must not be pure noise.
        growth: See :func:`vdiff.process.gits.shortest_walk`.

    Raises:
        ValueError: the teacher asks more than once a step, starts at pure noise or does not end in data.
    """
    walk = ABSampler(60) if teacher is None else teacher
    levels = walk.levels(schedule)
    if not math.isfinite(levels.ratio[0].item()) or levels.sigma[-1].item() != 0:
        raise ValueError(
            "search_levels: the teacher must walk from a finite sigma / alpha to data, got "
            f"{levels.ratio[0].item():.6g} to {levels.ratio[-1].item():.6g}. Give its discretizer other ends."
        )
    if len(list(walk.plan(Node.of(levels), schedule))) != len(levels.t) - 1:
        raise ValueError(f"search_levels: the teacher must ask once a step, {type(walk).__name__} asks more often.")
    states, x0s = [walk.start(schedule, noise)], []
    for step in walk.steps(denoiser, schedule, noise, cond, guider=guider):
        states.append(step.x)
        x0s.append(step.x0)
    costs = euler_costs(
        NoiseLevel(*(v.to(noise.device) for v in vars(levels).values())), *map(torch.stack, (states, x0s))
    )
    path = shortest_walk(costs, num_steps, growth)
    return GITSDiscretizer(levels.ratio[path[:-1]].tolist())
