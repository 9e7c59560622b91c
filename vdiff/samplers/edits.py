"""Edits: what becomes of the clean sample that the network sees, before the solver moves on it.

An edit is any callable ``edit(x0, node, call) -> x0``: the clean sample of shape ``(B, ...)``, the level on the host
and the number of the call. It serves every sampler, since all of them move on x0, and what a solver remembers is
edited too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff.samplers.executor import Edit
from vdiff.samplers.plan import Node


class Inpainting:
    """Known parts of the clean sample take the place of what the network says of them.

    A walk that begins at ``alpha * x0 + sigma * noise`` stays there in the known parts, at every level with the one
    noise it began with, and ends at x0, with every deterministic solver and to rounding: along a straight line in
    x0 and noise none of them errs. With a stochastic solver the noise is renewed as it is everywhere, and the known
    parts have exactly the spread of their level.

    Args:
        x0: The known sample, ``(B, ...)``, in the space of the denoiser.
        mask: 1 where the sample is made anew, 0 where it is known; broadcasts to x0.
    """

    def __init__(self, x0: Tensor, mask: Tensor) -> None:
        torch.broadcast_shapes(x0.shape, mask.shape)  # now rather than at the first call
        self.x0, self.mask = x0, mask.to(x0)

    def __call__(self, x0: Tensor, node: Node, call: int) -> Tensor:
        return torch.lerp(self.x0.to(x0.dtype), x0, self.mask.to(x0.dtype))


class Clamp:
    """The clean sample stays within its range: ``clip_range`` of DDPM, for every sampler.

    Args:
        low, high: Of the data.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        if not low < high:
            raise ValueError(f"Clamp: needs low < high, got {low} and {high}.")
        self.low, self.high = low, high

    def __call__(self, x0: Tensor, node: Node, call: int) -> Tensor:
        return x0.clamp(self.low, self.high)


def in_turn(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(x0: Tensor, node: Node, call: int) -> Tensor:
        for each in edits:
            x0 = each(x0, node, call)
        return x0

    return edit
