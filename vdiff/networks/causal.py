"""Layers of video that never look ahead: a clip may come whole, or chunk by chunk with what each layer remembers.

The first frame of a clip stands for itself, and halving the time takes the others in pairs, so that ``2 n + 1`` frames
become ``n + 1``; doubling it is the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Chunk:
    """Where in its clip a chunk stands.

    Attributes:
        is_first: Whether the clip begins with it.
        past: The last frames that each convolution has seen, which it replaces by its own; None where the clip comes
            whole and nothing needs to be remembered.
    """

    is_first: bool = True
    past: dict[nn.Module, Tensor] | None = None


WHOLE = Chunk()  # a clip that comes all at once


class CausalConv3d(nn.Module):
    """A convolution that sees no later frames, ``(B, C, F, H, W) -> (B, D, F, H, W)``.

    Before a clip stands its first frame, repeated; before a chunk what came before it.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.before = kernel_size - 1
        side = kernel_size // 2
        self.conv = nn.Conv3d(channels, out_channels, kernel_size, padding=(0, side, side))

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        if self.before:
            past = None if chunk.past is None else chunk.past.pop(self, None)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, self.before, -1, -1)
            x = torch.cat([past, x], dim=2)
            if chunk.past is not None:
                chunk.past[self] = x[:, :, -self.before :].clone()  # a view would keep the whole chunk in memory
        return self.conv(x)


class CausalDownsample(nn.Module):
    """Half the height and width by a convolution frame by frame, padded to the right and below only.

    Args:
        with_time: Whether pairs of frames are averaged before.
    """

    def __init__(self, channels: int, with_time: bool = False) -> None:
        super().__init__()
        self.with_time = with_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        if self.with_time:
            first, rest = _apart(x, chunk)
            x = torch.cat([first, rest.unflatten(2, (-1, 2)).mean(3)], dim=2)
        return _by_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class CausalUpsample(nn.Module):
    """Twice the height and width by nearest neighbours, and a convolution frame by frame.

    Args:
        with_time: Whether frames are doubled as well.
    """

    def __init__(self, channels: int, with_time: bool = False) -> None:
        super().__init__()
        self.with_time = with_time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        if self.with_time:
            first, rest = _apart(x, chunk)
            x = torch.cat([first, rest.repeat_interleave(2, dim=2)], dim=2)
        return _by_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)


def like(z: Tensor, shape: torch.Size, chunk: Chunk) -> Tensor:
    """``z`` repeated to the frames, height and width of ``shape``, ``(B, D, F, H, W)``."""
    frames, *sides = size = shape[2:]
    if z.shape[2:] == size:
        return z
    first, rest = _apart(z, chunk)
    if z.shape[2] == frames or not first.shape[2]:  # all frames alike
        return F.interpolate(z, size=size)
    parts = F.interpolate(first, size=(1, *sides)), F.interpolate(rest, size=(frames - 1, *sides))
    return torch.cat(parts, dim=2)


def _apart(x: Tensor, chunk: Chunk) -> tuple[Tensor, ...]:
    """The frame that stands for itself, if the chunk has one, and the others."""
    return x.split((int(chunk.is_first), x.shape[2] - int(chunk.is_first)), dim=2)


def _by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
