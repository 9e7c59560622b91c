r"""Where a token stands, in an image (rows, columns) or a video (frames, rows, columns).

Two ways to tell a transformer: sines and cosines that are added to the tokens (arXiv:1706.03762), and
rotations of queries and keys, after which their product depends on the difference of two positions
alone (RoPE, arXiv:2104.09864). Both give each axis a share of the channels. Both are computed for any
size when it comes, and nothing is kept: a network has no table that a size could outgrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_PERIOD = 10000.0


def coordinates(
    sizes: Sequence[int], trained_sizes: Sequence[float] | None = None, device: torch.device | None = None
) -> Tensor:
    """Positions of all tokens of a grid, the last axis fastest, ``(N, axes)`` in float32.

    Args:
        sizes: How many tokens there are along each axis.
        trained_sizes: If given, the grid is stretched or squeezed to cover as much as one of these sizes
            does, instead of going on beyond it.
    """
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in sizes]
    if trained_sizes is not None:
        axes = [axis * (trained / size) for axis, trained, size in zip(axes, trained_sizes, sizes, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def fitted(sizes: Sequence[int], trained_sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Positions of a video whose pictures are scaled to fit into a trained size, centred, ``(N, 3)`` in float32.

    Pictures keep their shape, to a whole number of tokens; frames are counted as they come. So diffusers samples
    CogVideoX at sizes that it was not trained for.

    Args:
        sizes: Tokens along frames, height and width.
        trained_sizes: Tokens along height and width.
    """
    frames, *sides = sizes
    scale = min(trained / side for trained, side in zip(trained_sizes, sides, strict=True))
    axes = [torch.arange(frames, dtype=torch.float32, device=device)]
    for trained, side in zip(trained_sizes, sides, strict=True):
        covers = round(side * scale)
        start = round((trained - covers) / 2)
        stop = (start + covers) * (side - 1) / side
        axes.append(torch.linspace(start, stop, side, dtype=torch.float32, device=device))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def shares(dim: int, num_axes: int) -> tuple[int, ...]:
    """How many of ``dim`` channels each axis gets: half and half, or a quarter for frames and the rest halved.

    Raises:
        ValueError: a share would not be an even number.
    """
    parts, unit = ((dim // 2,) * 2, 4) if num_axes == 2 else ((dim // 4, *(3 * dim // 8,) * 2), 16)
    if dim % unit:
        raise ValueError(
            f"positions along {num_axes} axes divide the channels into even shares, for which their number must be "
            f"a multiple of {unit}; got {dim}."
        )
    return parts


def sincos(where: Tensor, dim: int) -> Tensor:
    r"""Sines, then cosines, of each axis' position at :math:`\omega_i = P^{-2i/d}`, d the axis' share of ``dim``.

    Axes come in the order of the published tables: frames, columns, rows (arXiv:2212.09748, and
    arXiv:2408.06072 for videos).

    Args:
        where: ``(N, axes)``.

    Returns:
        ``(N, dim)``.
    """
    *frames, rows, columns = where.unbind(-1)
    angles = [_angles(axis, share) for axis, share in zip((*frames, columns, rows), _of(where, dim), strict=True)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)


def rotations(where: Tensor, dim: int) -> Tensor:
    """Cosine and sine of the angle by which each pair of a head's channels is turned, ``(N, dim / 2, 2)``.

    Axes come in their own order: frames, rows, columns.

    Args:
        where: ``(N, axes)``; at the origin nothing is turned.
        dim: Channels of a head.
    """
    axes = zip(where.unbind(-1), _of(where, dim), strict=True)
    angles = torch.cat([_angles(axis, share) for axis, share in axes], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring channels of ``x``, ``(B, N, heads, dim)``, in float32 at least; see :func:`rotations`."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def _of(where: Tensor, dim: int) -> tuple[int, ...]:
    return shares(dim, where.shape[-1])


def _angles(axis: Tensor, share: int) -> Tensor:
    steps = torch.arange(share // 2, dtype=torch.float32, device=axis.device)
    return axis[:, None] * torch.exp(steps * (-2 * math.log(MAX_PERIOD) / share))
