"""Encoder and decoder of CogVideoX's video autoencoder, arXiv:2408.06072, section 2.1.

Those of latent diffusion with convolutions over time that never look ahead, without attention. The decoder's
normalisations are told the latent (arXiv:2209.09002). Names of weights are the original's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import checkpoint
from vdiff.networks.autoencoder import EPS
from vdiff.networks.causal import WHOLE, CausalConv3d, CausalDownsample, CausalUpsample, Chunk, like
from vdiff.networks.layers import GroupNorm


class PlainNorm(GroupNorm):
    """Group normalisation that is told nothing."""

    def forward(self, x: Tensor, z: Tensor | None, chunk: Chunk) -> Tensor:
        return super().forward(x)


class LatentNorm(nn.Module):
    """Group normalisation whose scale and shift are linear in the latent above each voxel."""

    def __init__(self, groups: int, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels, eps=EPS)
        self.conv_y = CausalConv3d(latent_channels, channels, 1)
        self.conv_b = CausalConv3d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor | None, chunk: Chunk) -> Tensor:
        assert z is not None
        # Both look at a voxel alone, so they may come before the latent is repeated, at a fraction of the cost.
        told = torch.cat([self.conv_y(z, chunk), self.conv_b(z, chunk)], dim=1)
        scale, shift = like(told, x.shape, chunk).chunk(2, dim=1)
        return torch.addcmul(shift, self.norm_layer(x), scale)


def _norm(groups: int, channels: int, latent_channels: int | None) -> PlainNorm | LatentNorm:
    if latent_channels is None:
        return PlainNorm(groups, channels, eps=EPS)
    return LatentNorm(groups, channels, latent_channels)


class CausalResBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``.

    Args:
        latent_channels: Of the latent that the normalisations are told; None for nothing.
    """

    role = "res_block"

    def __init__(
        self,
        channels: int,
        out_channels: int,
        latent_channels: int | None = None,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(norm_groups, channels, latent_channels)
        self.conv1 = CausalConv3d(channels, out_channels)
        self.norm2 = _norm(norm_groups, out_channels, latent_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.nin_shortcut = nn.Identity() if out_channels == channels else nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, z: Tensor | None, chunk: Chunk) -> Tensor:
        """``(B, C, F, H, W) -> (B, D, F, H, W)``, told a latent of any size z."""
        h = self.conv1(F.silu(self.norm1(x, z, chunk)), chunk)
        h = self.conv2(self.dropout(F.silu(self.norm2(h, z, chunk))), chunk)
        return self.nin_shortcut(x) + h


class CausalLevel(nn.Module):
    """Residual blocks at one resolution, then a change of it."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_blocks: int,
        latent_channels: int | None = None,
        resample: Literal["up", "down"] | None = None,
        with_time: bool = False,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block = nn.ModuleList(
            CausalResBlock(channels if i == 0 else out_channels, out_channels, latent_channels, dropout, norm_groups)
            for i in range(num_blocks)
        )
        self.downsample = CausalDownsample(out_channels, with_time) if resample == "down" else None
        self.upsample = CausalUpsample(out_channels, with_time) if resample == "up" else None

    def forward(self, h: Tensor, z: Tensor | None, chunk: Chunk) -> Tensor:
        for block in self.block:
            h = _run(block, h, z, chunk, self.checkpointing)
        if self.downsample is not None:
            return self.downsample(h, chunk)
        return h if self.upsample is None else self.upsample(h, chunk)


class CausalMiddle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(
        self,
        channels: int,
        latent_channels: int | None = None,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block_1, self.block_2 = (
            CausalResBlock(channels, channels, latent_channels, dropout, norm_groups) for _ in range(2)
        )

    def forward(self, h: Tensor, z: Tensor | None, chunk: Chunk) -> Tensor:
        for block in (self.block_1, self.block_2):
            h = _run(block, h, z, chunk, self.checkpointing)
        return h


def _run(block: nn.Module, h: Tensor, z: Tensor | None, chunk: Chunk, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled() and chunk.past is None:  # a past that was replaced cannot be read again
        return checkpoint(block, h, z, chunk, module=block)
    return block(h, z, chunk)


class CausalEncoder(nn.Module):
    """Clips ``(B, in_channels, F, H, W)`` to features ``(B, out_channels, (F - 1) / t + 1, H / f, W / f)``.

    A chunk that is not the first has F / t frames.

    Args:
        out_channels: Twice the latent's where mean and log variance are meant.
        channels: Of the first level.
        channel_mult: By level, times ``channels``; f is 2 to the power of their number less one.
        num_res_blocks: Per level.
        time_factor: The t above, a power of 2: the first levels halve the time as well.
        checkpointing: Keep no activations of the blocks for the backward pass, where a clip comes whole.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        time_factor: int = 4,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        _check_time(time_factor, len(widths))
        rest = (dropout, norm_groups, checkpointing)
        self.conv_in = CausalConv3d(in_channels, channels)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
            resample = "down" if i < len(widths) - 1 else None
            self.down.append(CausalLevel(before, width, num_res_blocks, None, resample, 2**i < time_factor, *rest))
        self.mid = CausalMiddle(widths[-1], None, *rest)
        self.norm_out = PlainNorm(norm_groups, widths[-1], eps=EPS)
        self.conv_out = CausalConv3d(widths[-1], out_channels)

    def forward(self, x: Tensor, chunk: Chunk = WHOLE) -> Tensor:
        h = self.conv_in(x, chunk)
        for level in self.down:
            h = level(h, None, chunk)
        h = self.mid(h, None, chunk)
        return self.conv_out(F.silu(self.norm_out(h, None, chunk)), chunk)


class CausalDecoder(nn.Module):
    """Latents ``(B, in_channels, F, h, w)`` to clips ``(B, out_channels, (F - 1) t + 1, f h, f w)``.

    A chunk that is not the first becomes F t frames. Its levels have a block more than the encoder's; the first to
    run double the time. For the other arguments see :class:`CausalEncoder`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        time_factor: int = 4,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        _check_time(time_factor, len(widths))
        rest = (dropout, norm_groups, checkpointing)
        self.conv_in = CausalConv3d(in_channels, widths[-1])
        self.mid = CausalMiddle(widths[-1], in_channels, *rest)
        self.up = nn.ModuleList()  # up.0 is the last to run
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            resample = "up" if i else None
            with_time = 2 ** (len(widths) - 1 - i) < time_factor
            self.up.append(CausalLevel(before, width, num_res_blocks + 1, in_channels, resample, with_time, *rest))
        self.norm_out = LatentNorm(norm_groups, widths[0], in_channels)
        self.conv_out = CausalConv3d(widths[0], out_channels)

    def forward(self, z: Tensor, chunk: Chunk = WHOLE) -> Tensor:
        h = self.mid(self.conv_in(z, chunk), z, chunk)
        for level in reversed(self.up):
            h = level(h, z, chunk)
        return self.conv_out(F.silu(self.norm_out(h, z, chunk)), chunk)


def _check_time(time_factor: int, num_levels: int) -> None:
    known = [2**i for i in range(num_levels)]
    if time_factor not in known:
        raise ValueError(
            f"time_factor: {num_levels} levels change resolution {num_levels - 1} times, by which time can shrink "
            f"{', '.join(map(str, known))} times, got {time_factor}."
        )
