"""Images and videos as sequences of patches, and back. Every image is a video of one frame here."""

from __future__ import annotations

from torch import Tensor

Patch = tuple[int, int, int]


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """``(B, C, F, H, W)`` to ``(B, N, C * f * h * w)``: frame by frame, row by row.

    Args:
        patch: ``(f, h, w)``, frames, height and width of a patch; F, H and W are multiples of them.
    """
    f, h, w = patch
    cut = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, f))  # B C F f H h W w
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, patch: Patch, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`.

    Args:
        grid: How many patches there are along frames, height and width.
    """
    cut = tokens.unflatten(1, grid).unflatten(4, (-1, *patch))  # B F H W C f h w
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
