"""The decoder of latent diffusion's autoencoder with layers over time, of Stable Video Diffusion, arXiv:2311.15127.

Frames are rows, ``(b f)``. Names of weights are those of generative-models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.networks.autoencoder import EPS, AutoencoderAttention, AutoencoderResBlock
from vdiff.networks.base import run
from vdiff.networks.layers import GroupNorm, Upsample
from vdiff.networks.temporal import TemporalResBlock


class TemporalAutoencoderResBlock(AutoencoderResBlock):
    r"""A residual block on images, then one over time, blended: :math:`\alpha\,time + (1 - \alpha)\,image`.

    Alpha is the sigmoid of ``mix_factor`` and weighs time here, where :class:`AlphaBlender`'s weighs images.
    """

    beyond_images = ("time_stack", "mix_factor")

    def __init__(
        self, channels: int, out_channels: int | None = None, dropout: float = 0.0, norm_groups: int = 32
    ) -> None:
        super().__init__(channels, out_channels, dropout, norm_groups)
        self.time_stack = TemporalResBlock(out_channels or channels, dropout=dropout, norm_groups=norm_groups)
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        x = super().forward(x)
        told = self.time_stack(x, None, num_frames)
        return torch.lerp(x, told.to(x.dtype), self.mix_factor.sigmoid().to(x.dtype))


class TimeMixedConv(nn.Conv2d):
    """A convolution of images, then one over three frames, which begins as the identity."""

    beyond_images = ("time_mix_conv",)

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        self.time_mix_conv = nn.Conv3d(out_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))
        nn.init.dirac_(self.time_mix_conv.weight)
        nn.init.zeros_(self.time_mix_conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        x = super().forward(x).unflatten(0, (-1, num_frames)).transpose(1, 2)
        return self.time_mix_conv(x).transpose(1, 2).flatten(0, 1)


class TemporalLevel(nn.Module):
    """Residual blocks at one size, each followed by attention over pixels if there is any; then twice the size."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool = False,
        upsample: bool = False,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block = nn.ModuleList(
            TemporalAutoencoderResBlock(out_channels if i else channels, out_channels, dropout, norm_groups)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AutoencoderAttention(out_channels, norm_groups, backend) for _ in range(num_blocks if attention else 0)
        )
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, h: Tensor, num_frames: int) -> Tensor:
        for i, block in enumerate(self.block):
            h = run(block, h, num_frames, recompute=self.checkpointing)
            if len(self.attn):
                h = h + run(self.attn[i], h, recompute=self.checkpointing)
        return h if self.upsample is None else self.upsample(h)


class TemporalMiddle(nn.Module):
    """Two residual blocks around attention over pixels, at the lowest resolution."""

    def __init__(
        self,
        channels: int,
        attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block_1 = TemporalAutoencoderResBlock(channels, None, dropout, norm_groups)
        self.attn_1 = AutoencoderAttention(channels, norm_groups, backend) if attention else None
        self.block_2 = TemporalAutoencoderResBlock(channels, None, dropout, norm_groups)

    def forward(self, h: Tensor, num_frames: int) -> Tensor:
        h = run(self.block_1, h, num_frames, recompute=self.checkpointing)
        if self.attn_1 is not None:
            h = h + run(self.attn_1, h, recompute=self.checkpointing)
        return run(self.block_2, h, num_frames, recompute=self.checkpointing)


class TemporalDecoder(nn.Module):
    """Latents ``(b f)``, ``(B, in_channels, h, w)``, to frames ``(B, out_channels, n h, n w)``.

    The arguments are those of :class:`vdiff.networks.autoencoder.AutoencoderDecoder`; attention is over pixels, in the
    middle, and at ``attention_factors``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        how = (dropout, norm_groups, checkpointing, backend)
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = TemporalMiddle(widths[-1], mid_attention, *how)
        self.up = nn.ModuleList()  # up.0 is the last to run
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            self.up.append(TemporalLevel(before, width, num_res_blocks + 1, 2**i in attention_factors, i > 0, *how))
        self.norm_out = GroupNorm(norm_groups, widths[0], eps=EPS)
        self.conv_out = TimeMixedConv(widths[0], out_channels)

    def forward(self, z: Tensor, num_frames: int = 1) -> Tensor:
        h = self.mid(self.conv_in(z), num_frames)
        for level in reversed(self.up):
            h = level(h, num_frames)
        return self.conv_out(F.silu(self.norm_out(h)), num_frames)
