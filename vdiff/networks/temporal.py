"""Layers that look along time, added to image layers, as in Stable Video Diffusion, arXiv:2311.15127.

Frames are rows: ``B`` videos of ``f`` frames are ``(b f)`` rows, batch-major, and an image layer sees them as
so many images. A layer over time unfolds them. What an image layer says and what a layer over time makes of it are
blended, so that a network of images becomes one of videos without forgetting them (arXiv:2304.08818). Names of
weights are those of generative-models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vdiff.networks.base import run
from vdiff.networks.embeddings import sinusoidal
from vdiff.networks.layers import GroupNorm, zeroed
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import CrossAttention, FeedForward, SpatialTransformer
from vdiff.networks.unet_stages import Direction, mlp

MergeStrategy = Literal["fixed", "learned", "learned_with_images"]


class Clip(NamedTuple):
    """What layers know of the rows they see.

    Attributes:
        num_frames: f of ``(b f)`` rows.
        image_only: Which rows are images, of which time says nothing, ``(b f)``, true where not 0. None: none are.
        context, mask: What image layers attend to, for each video or for each row, ``(b, n, c)`` and ``(b, n)``.
        time_context, time_mask: What layers over time attend to, for each video.
        views, embedding: Of several cameras, see :mod:`vdiff.networks.multi_view`: the first moment's picture of each
            view, ``(b, v, c, h, w)``, and the network's embedding of each row, ``(b f, c)``.
    """

    num_frames: int
    image_only: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None
    time_context: Tensor | None = None
    time_mask: Tensor | None = None
    views: Tensor | None = None
    embedding: Tensor | None = None


class AlphaBlender(nn.Module):
    r""":math:`\alpha\,\mathrm{spatial} + (1 - \alpha)\,\mathrm{temporal}`.

    Args:
        strategy: ``fixed``: alpha is ``factor``, a buffer. ``learned``: the sigmoid of a parameter that begins as
            ``factor``. ``learned_with_images``: the same, and 1 in rows that are images.
    """

    def __init__(self, factor: float = 0.5, strategy: MergeStrategy = "learned_with_images") -> None:
        super().__init__()
        self.strategy = strategy
        value = torch.tensor([float(factor)])
        if strategy == "fixed":
            self.register_buffer("mix_factor", value)
        else:
            self.mix_factor = nn.Parameter(value)

    def forward(self, spatial: Tensor, temporal: Tensor, image_only: Tensor | None = None) -> Tensor:
        """Rows ``(b f)``, any shape after that."""
        time = 1 - (self.mix_factor if self.strategy == "fixed" else self.mix_factor.sigmoid())
        if self.strategy == "learned_with_images" and image_only is not None:
            time = torch.where(image_only != 0, 0, time).view(-1, *[1] * (spatial.ndim - 1))
        return torch.lerp(spatial, temporal.to(spatial.dtype), time.to(spatial.dtype))


class TemporalResBlock(nn.Module):
    """A residual block over ``(b, c, f, h, w)``, whose normalisations see whole videos.

    Args:
        embedding_dim: Length of the embedding; None for a block without.
        kernel: Of the convolutions, over frames, height and width.
    """

    role = "temporal_res_block"

    def __init__(
        self,
        channels: int,
        embedding_dim: int | None = None,
        kernel: int | Sequence[int] = (3, 1, 1),
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        size = (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)
        if len(size) != 3 or any(n % 2 == 0 for n in size):
            raise ValueError(f"TemporalResBlock: a kernel is odd and has sizes for f, h and w; got {kernel}.")
        padding = (size[0] // 2, size[1] // 2, size[2] // 2)
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, channels), nn.SiLU(), nn.Conv3d(channels, channels, size, padding=padding)
        )
        if embedding_dim is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, channels))
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv3d(channels, channels, size, padding=padding)),
        )

    def forward(self, x: Tensor, emb: Tensor | None, num_frames: int) -> Tensor:
        """Rows ``(b f)``: ``(B, C, H, W)`` and ``(B, embedding_dim)`` to ``(B, C, H, W)``."""
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2)
        h = self.in_layers(x)
        if emb is not None:
            h = h + self.emb_layers(emb).unflatten(0, (-1, num_frames)).transpose(1, 2)[..., None, None]
        return (x + self.out_layers(h)).transpose(1, 2).flatten(0, 1)


class VideoResBlock(ResBlock):
    """A residual block on images, then one over time, blended.

    Args:
        channels, embedding_dim, out_channels, dropout, scale_shift_norm, resample, norm_groups: See :class:`ResBlock`.
        kernel: See :class:`TemporalResBlock`.
        merge_factor, merge_strategy: See :class:`AlphaBlender`.
    """

    beyond_images = ("time_stack", "time_mixer")

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        resample: Direction | None = None,
        norm_groups: int = 32,
        kernel: int | Sequence[int] = (3, 1, 1),
        merge_factor: float = 0.5,
        merge_strategy: MergeStrategy = "learned_with_images",
    ) -> None:
        super().__init__(channels, embedding_dim, out_channels, dropout, scale_shift_norm, resample, norm_groups)
        self.time_stack = TemporalResBlock(out_channels or channels, embedding_dim, kernel, dropout, norm_groups)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)

    def forward(self, x: Tensor, emb: Tensor, clip: Clip) -> Tensor:
        x = super().forward(x, emb)
        return self.time_mixer(x, self.time_stack(x, emb, clip.num_frames), clip.image_only)


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, self-attention, cross-attention and feed-forward, all over the frames of one pixel.

    Args:
        context_dim: Length of a context token; None makes the second attention attend to the frames as well.
        extra_ff: Whether it begins with a feed-forward.
        cross_attention: Whether there is a second attention.
    """

    role = "temporal_transformer_block"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        context_dim: int | None = None,
        dropout: float = 0.0,
        extra_ff: bool = True,
        cross_attention: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if extra_ff:
            self.norm_in, self.ff_in = nn.LayerNorm(dim), FeedForward(dim, dropout=dropout)
        self.extra_ff, self.cross_attention = extra_ff, cross_attention
        itself, other = "temporal_self_attention", "temporal_cross_attention"
        self.attn1 = CrossAttention(dim, num_heads, head_dim, None, dropout, itself, backend)
        self.ff = FeedForward(dim, dropout=dropout)
        if cross_attention:
            role = itself if context_dim is None else other
            self.attn2 = CrossAttention(dim, num_heads, head_dim, context_dim, dropout, role, backend)
            self.norm2 = nn.LayerNorm(dim)
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def begin_as_identity(self) -> None:
        """Set to zero the last layer of everything that is added to the input."""
        lasts = [self.attn1.to_out[0], self.ff.net[-1]]
        lasts += [self.ff_in.net[-1]] if self.extra_ff else []
        lasts += [self.attn2.to_out[0]] if self.cross_attention else []
        for layer in lasts:
            zeroed(layer)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None, num_frames: int) -> Tensor:
        """Rows ``(b f)``, ``(B, N, dim)``, with a context for each video, ``(b, n, context_dim)``."""
        num_tokens = x.shape[1]
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
        if self.extra_ff:
            x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        if self.cross_attention:
            x = x + self.attn2(self.norm2(x), context, mask)
        x = x + self.ff(self.norm3(x))
        return x.unflatten(0, (-1, num_tokens)).transpose(1, 2).flatten(0, 1)


class VideoTransformer(SpatialTransformer):
    """Transformer blocks over the pixels of a frame, each followed by one over the frames of a pixel, blended.

    What looks along time begins as the identity, whatever its share: frames are then so many images.

    Args:
        channels, num_heads, head_dim, depth, context_dim, dropout: See :class:`SpatialTransformer`.
        linear_projection, norm_groups, checkpointing, backend: See :class:`SpatialTransformer`.
        time_context_dim: Length of the context tokens of layers over time; None makes them attend to themselves.
        extra_ff, temporal_cross_attention: See :class:`TemporalTransformerBlock`.
        merge_factor, merge_strategy: See :class:`AlphaBlender`.
        max_time_period: Of the sinusoids that number the frames.
    """

    beyond_images = ("time_stack", "time_pos_embed", "time_mixer")

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        context_dim: int | None = None,
        time_context_dim: int | None = None,
        dropout: float = 0.0,
        linear_projection: bool = False,
        extra_ff: bool = True,
        temporal_cross_attention: bool = True,
        merge_factor: float = 0.5,
        merge_strategy: MergeStrategy = "learned_with_images",
        max_time_period: float = 10000.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            channels, num_heads, head_dim, depth, context_dim, dropout, linear_projection, False, norm_groups,
            checkpointing, backend,
        )  # fmt: skip
        inner = num_heads * head_dim
        self.channels, self.max_time_period = channels, max_time_period
        self.time_stack = nn.ModuleList(
            TemporalTransformerBlock(
                inner, num_heads, head_dim, time_context_dim, dropout, extra_ff, temporal_cross_attention, backend
            )
            for _ in range(depth)
        )
        self.time_pos_embed = mlp(channels, 4 * channels, inner)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)
        for block in self.time_stack:
            block.begin_as_identity()  # type: ignore[operator]
        zeroed(self.time_pos_embed[-1])

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """Rows ``(b f)``, ``(B, C, H, W)``."""
        h = self.tokens(x)
        number = self.positions(len(x), clip.num_frames, h)
        for block, over_time in zip(self.transformer_blocks, self.time_stack, strict=True):
            h = run(block, h, clip.context, clip.mask, recompute=self.checkpointing)
            told = run(
                over_time, h + number, clip.time_context, clip.time_mask, clip.num_frames, recompute=self.checkpointing
            )
            h = self.time_mixer(h, told, clip.image_only)
        return self.added(x, h)

    def positions(self, rows: int, num_frames: int, like: Tensor) -> Tensor:
        """The number of each frame as a vector, ``(b f, 1, inner)``."""
        return self.numbered(self.time_pos_embed, rows, num_frames, like)

    def numbered(self, embed: nn.Module, rows: int, count: int, like: Tensor) -> Tensor:
        """Rows numbered from 0 to ``count`` again and again, through ``embed``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        numbers = torch.arange(count, dtype=dtype, device=like.device)
        waves = sinusoidal(numbers, self.channels, self.max_time_period).to(like.dtype)
        return embed(waves.repeat(rows // count, 1))[:, None]
