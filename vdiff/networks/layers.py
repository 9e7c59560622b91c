"""The small layers that image networks share. Names of weights are those of latent diffusion."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # by the number of axes
AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 at least, returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def zeroed(layer: Layer) -> Layer:
    """The layer with its weights set to zero: what it is added to begins as it is."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Downsample(nn.Module):
    """Half the height and width, ``(B, C, H, W) -> (B, D, H/2, W/2)``.

    Args:
        out_channels: D, by default C; another only with ``conv``.
        conv: By a convolution with stride 2, else by averaging 2 x 2 pixels.
        dims: Axes after the channels, 1 to 3. Of three, the first keeps its length.
    """

    def __init__(self, channels: int, out_channels: int | None = None, conv: bool = True, dims: int = 2) -> None:
        super().__init__()
        out_channels = out_channels or channels
        if not conv and out_channels != channels:
            raise ValueError(f"Downsample: averaging keeps {channels} channels, and {out_channels} are asked for.")
        stride = (1, 2, 2) if dims == 3 else 2
        if conv:
            self.op = CONVOLUTIONS[dims](channels, out_channels, 3, stride=stride, padding=1)
        else:
            self.op = AVERAGES[dims](stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width by nearest neighbours, ``(B, C, H, W) -> (B, D, 2H, 2W)``.

    Args:
        out_channels: D, by default C; another only with ``conv``.
        conv: Whether a convolution follows.
        dims: Axes after the channels, 1 to 3. Of three, the first keeps its length.
    """

    def __init__(self, channels: int, out_channels: int | None = None, conv: bool = True, dims: int = 2) -> None:
        super().__init__()
        out_channels = out_channels or channels
        if not conv and out_channels != channels:
            raise ValueError(f"Upsample: repeating keeps {channels} channels, and {out_channels} are asked for.")
        self.conv = CONVOLUTIONS[dims](channels, out_channels, 3, padding=1) if conv else None
        self.factor = (1.0, 2.0, 2.0) if dims == 3 else 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x if self.conv is None else self.conv(x)
