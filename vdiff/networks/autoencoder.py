"""Encoder and decoder of latent diffusion's image autoencoders, arXiv:2112.10752.

Levels of residual blocks, each at half the height and width of the one before, and attention in the
middle. Names of weights are those of latent diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.networks.base import run
from vdiff.networks.layers import GroupNorm, Upsample

EPS = 1e-6  # of every normalisation here


class AutoencoderResBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``: a residual block without an embedding."""

    role = "res_block"

    def __init__(
        self, channels: int, out_channels: int | None = None, dropout: float = 0.0, norm_groups: int = 32
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = GroupNorm(norm_groups, channels, eps=EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, D, H, W)``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AutoencoderAttention(nn.Module):
    """Self-attention of the pixels of ``(B, C, H, W)`` with one head; returns what is to be *added* to its input."""

    role = "self_attention"

    def __init__(self, channels: int, norm_groups: int = 32, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.norm = GroupNorm(norm_groups, channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` from x and context, by default x, each ``(B, C, H, W)``.

        ``mask`` says which of the context's pixels count, ``(B, H * W)``, True counts.
        """
        here = self.norm(x)
        there = here if context is None else self.norm(context)
        out = attend(_tokens(self.q(here)), _tokens(self.k(there)), _tokens(self.v(there)), mask, backend=self.backend)
        return self.proj_out(out.squeeze(2).transpose(1, 2).unflatten(2, x.shape[2:]))


def _tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W) -> (B, H * W, 1, C)``, channels innermost in memory as the fused kernels need them."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(2)


class AsymmetricDownsample(nn.Module):
    """Half the height and width by a convolution with stride 2, padded to the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if there is any, then a change of resolution."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool = False,
        resample: Literal["up", "down"] | None = None,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block = nn.ModuleList(
            AutoencoderResBlock(channels if i == 0 else out_channels, out_channels, dropout, norm_groups)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AutoencoderAttention(out_channels, norm_groups, backend) for _ in range(num_blocks if attention else 0)
        )
        self.downsample = AsymmetricDownsample(out_channels) if resample == "down" else None
        self.upsample = Upsample(out_channels) if resample == "up" else None

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = run(block, h, recompute=self.checkpointing)
            if len(self.attn):
                h = h + run(self.attn[i], h, recompute=self.checkpointing)
        if self.downsample is not None:
            return self.downsample(h)
        return h if self.upsample is None else self.upsample(h)


class Middle(nn.Module):
    """Two residual blocks around attention, at the lowest resolution."""

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
        self.block_1 = AutoencoderResBlock(channels, None, dropout, norm_groups)
        self.attn_1 = AutoencoderAttention(channels, norm_groups, backend) if attention else None
        self.block_2 = AutoencoderResBlock(channels, None, dropout, norm_groups)

    def forward(self, h: Tensor) -> Tensor:
        h = run(self.block_1, h, recompute=self.checkpointing)
        if self.attn_1 is not None:
            h = h + run(self.attn_1, h, recompute=self.checkpointing)
        return run(self.block_2, h, recompute=self.checkpointing)


class AutoencoderEncoder(nn.Module):
    """Pictures ``(B, in_channels, H, W)`` to features ``(B, out_channels, H / f, W / f)``.

    Args:
        out_channels: Twice the latent's where mean and log variance are meant.
        channels: Of the first level.
        channel_mult: By level, times ``channels``; ``f`` is 2 to the power of their number less one.
        num_res_blocks: Per level.
        attention_factors: By how much a level with attention is smaller than the picture: 1, 2, 4, ...
        mid_attention: Whether the middle attends.
        checkpointing: Keep no activations of the blocks for the backward pass.
        backend: See :func:`vdiff.attention.attend`.
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
        _check_factors(attention_factors, len(widths))
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
            resample = "down" if i < len(widths) - 1 else None
            attends = 2**i in attention_factors
            self.down.append(
                Level(before, width, num_res_blocks, attends, resample, dropout, norm_groups, checkpointing, backend)
            )
        self.mid = Middle(widths[-1], mid_attention, dropout, norm_groups, checkpointing, backend)
        self.norm_out = GroupNorm(norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class AutoencoderDecoder(nn.Module):
    """Latents ``(B, in_channels, h, w)`` to pictures ``(B, out_channels, f h, f w)``.

    Its levels have a block more than the encoder's. For the other arguments see :class:`AutoencoderEncoder`.
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
        _check_factors(attention_factors, len(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], mid_attention, dropout, norm_groups, checkpointing, backend)
        self.up = nn.ModuleList()  # up.0 is the last to run
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            resample = "up" if i else None
            attends = 2**i in attention_factors
            self.up.append(
                Level(
                    before, width, num_res_blocks + 1, attends, resample, dropout, norm_groups, checkpointing, backend
                )
            )
        self.norm_out = GroupNorm(norm_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _check_factors(attention_factors: Sequence[int], num_levels: int) -> None:
    known = [2**i for i in range(num_levels)]
    if odd := [factor for factor in attention_factors if factor not in known]:
        raise ValueError(
            f"attention_factors: {', '.join(map(str, odd))} is the factor of no level; "
            f"these levels have: {', '.join(map(str, known))}."
        )
