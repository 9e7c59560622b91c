"""Where a walk begins and ends: at any level, from noise, from a sample, and from data back up to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vdiff.process import NoiseLevel, NoiseSchedule, spread, upload
from vdiff.samplers.frames import check_frames
from vdiff.samplers.plan import Node, Stage, transfer


def begin_at(levels: NoiseLevel, schedule: NoiseSchedule, strength: float) -> NoiseLevel:
    """The walk that begins at time ``strength``: noisier levels become that one, which is visited once.

    On a table the time is rounded to its rows.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"sampling: strength is the time at which a walk begins, in (0, 1], got {strength}.")
    if len(levels) < 2:
        raise ValueError(f"sampling: a walk needs two levels at least, got {len(levels)}.")
    if strength == 1:
        return levels
    rows = schedule.num_rows
    first = schedule(strength if rows is None else max(round(strength * rows), 1) / rows)
    is_above = levels.t >= first.t - 1e-9  # a level that is the same but for rounding is the same
    pairs = ((getattr(first, n), getattr(levels, n)) for n in ("t", "alpha", "sigma", "d_alpha", "d_sigma"))
    capped = NoiseLevel(*(torch.where(is_above, new, old) for new, old in pairs))
    moves = (capped.t[1:] != capped.t[:-1]).reshape(len(levels) - 1, -1).any(1).nonzero()
    if not len(moves):
        raise ValueError(
            f"sampling: nothing is left of a walk that begins at t = {strength:.6g}; its last levels are at "
            f"t = {[round(t, 6) for t in levels.t.reshape(len(levels), -1).amax(1).tolist()[-3:]]}."
        )
    return capped[int(moves[0]) :]


def state_at(first: NoiseLevel, noise: Tensor, x0: Tensor | None, init: str | float, where: str) -> Tensor:
    """The start state at a level, ``()`` or ``(F,)`` on the host, in float32 (float64 if the noise is)."""
    for name, value in (("noise", noise), ("x0", x0)):
        if value is not None and not bool(torch.isfinite(value).all()):  # once, before the walk
            raise ValueError(f"{where}: the {name} that the walk begins at has values that are not finite.")
    if first.sigma.ndim:
        check_frames(len(first.sigma), noise, where)
    dtype = torch.promote_types(noise.dtype, torch.float32)
    if x0 is not None:
        if x0.shape != noise.shape:
            raise ValueError(f"{where}: x0 of shape {tuple(x0.shape)} and noise of shape {tuple(noise.shape)}.")
        clean, fresh = x0.to(noise.device, dtype), noise.to(dtype)
        return _beside(first.alpha, fresh) * clean + _beside(first.sigma, fresh) * fresh
    if bool((first.sigma == 0).any()):
        raise ValueError(f"{where}: this walk begins at data (its known frames): say which, with x0=.")
    return noise.to(dtype) * _beside(_spread(first, init), noise)


def noise_at(first: NoiseLevel, state: Tensor, x0: Tensor | None, init: str | float) -> Tensor:
    """The noise that :func:`state_at` makes this state of; zero where there is none in it."""
    if x0 is not None:
        state = state - _beside(first.alpha, state) * x0.to(state.dtype)
    scale = first.sigma if x0 is not None else _spread(first, init)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return state * _beside(inverse, state)


def _spread(first: NoiseLevel, init: str | float) -> Tensor:
    data_std = {"sigma": 0.0, "vp": 1.0}.get(init, init)  # type: ignore[arg-type]
    return torch.hypot(first.sigma, first.alpha * float(data_std))


def _beside(value: Tensor, x: Tensor) -> Tensor:
    """A number, or one per frame, as what multiplies ``x``."""
    value = value.to(torch.promote_types(x.dtype, torch.float32))
    return upload(spread(value[None], x), x.device) if value.ndim else value


def upward(plan: Callable[[Sequence[Node]], Iterable[Stage]], nodes: Sequence[Node], where: str) -> Iterable[Stage]:
    r"""A solver's plan along rising levels, with steps of first order off data and into pure noise.

    The step into data is :math:`x_0 = D(x)`. It is undone by one look at the level above data:
    :math:`x = 2y - \alpha D(y)` with :math:`y = \alpha x_0`, since there :math:`D(y + d) - D(y)` is d
    but for terms of :math:`\sigma^2`.
    """
    if not nodes[0].sigma:
        data, first = nodes[:2]
        if not math.isfinite(first.ratio):
            raise ValueError(f"{where}: an inversion needs a level between data and pure noise: two steps at least.")
        yield Stage(first, {"x": 2.0, "x0": -first.alpha}, {"x": first.alpha / data.alpha})
        nodes = nodes[1:]
    inside = [node for node in nodes if math.isfinite(node.ratio)]
    if len(inside) > 1:
        yield from plan(inside)
    if len(inside) < len(nodes):
        keep, gain = transfer(inside[-1], nodes[-1])
        yield Stage(inside[-1], {"x": keep, "x0": gain})
