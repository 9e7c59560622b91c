"""Large pictures in overlapping tiles, so that memory depends on the tile and not on the picture.

Where tiles overlap their results are averaged, with weights that fall linearly towards the edge of a
tile. What a tile says differs from what the whole would have said: convolutions see zeros beyond its
edge, and normalisation and attention see the tile alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cells(who: str, tile: int | None, overlap: int | None, factor: int) -> tuple[int, int] | None:
    """Side and overlap of tiles in latent cells of ``factor`` pixels a side; None without tiles.

    Args:
        who: Whose they are, for the error.
        tile, overlap: In pixels; the overlap is by default about a quarter of the tile.
    """
    if tile is None:
        return None
    overlap = tile // 4 // factor * factor if overlap is None else overlap
    if tile % factor or overlap % factor or not 0 <= overlap < tile:
        raise ValueError(
            f"{who}: tile and tile_overlap are multiples of {factor} pixels, the overlap smaller than the tile; "
            f"got {tile} and {overlap}."
        )
    return tile // factor, overlap // factor


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, side: int, overlap: int, enter: int = 1, leave: int = 1
) -> Tensor:
    """``function(x)``, computed tile by tile where ``x`` is larger than one.

    Args:
        function: Maps ``(B, C, h * enter, w * enter)`` to ``(B, D, h * leave, w * leave)`` for any h and w.
        side, overlap: Of a tile, in latent cells: the h and w above. Tiles overlap by at least ``overlap``.
        enter, leave: Pixels of the input and of the output per cell and side.

    Returns:
        Exactly ``function(x)`` where one tile covers all.
    """
    size = [n // enter for n in x.shape[-2:]]
    tops, lefts = (starts(n, side, overlap) for n in size)
    if len(tops) == len(lefts) == 1:
        return function(x)
    height, width = (min(side, n) for n in size)
    down = ramp(height * leave, overlap * leave)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = (down[:, None] * ramp(width * leave, overlap * leave)).to(x.device, dtype)
    total, weights = None, x.new_zeros(size[0] * leave, size[1] * leave, dtype=dtype)
    for top in tops:
        for left in lefts:
            part = function(x[..., _cut(top, height, enter), _cut(left, width, enter)])
            if total is None:
                total = part.new_zeros(*part.shape[:-2], *weights.shape, dtype=dtype)
            where = (..., _cut(top, height, leave), _cut(left, width, leave))
            total[where] += part * weight
            weights[where[1:]] += weight
    assert total is not None
    return (total / weights).to(part.dtype)


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles of length ``side`` begin that cover ``length`` with at least ``overlap``, evenly."""
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / (side - overlap))
    return [round(i * (length - side) / steps) for i in range(steps + 1)]


def ramp(length: int, overlap: int) -> Tensor:
    """Weights along one axis of a tile: 1 inside, falling linearly towards both ends, never 0."""
    distance = torch.arange(length, dtype=torch.float64, device="cpu")
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / (overlap + 1)).clamp(max=1)


def _cut(start: int, length: int, scale: int) -> slice:
    return slice(start * scale, (start + length) * scale)
