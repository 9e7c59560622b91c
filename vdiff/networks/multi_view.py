"""Layers for a scene that several cameras see over time, as in Stable Video 4D, arXiv:2407.17470.

Rows are ``(b t v)``: all views of the first moment, then of the next. To the pixels of a frame and the frames of a
pixel comes a third kind of attention: one over the views of a moment, one over the moments of a view.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.networks.base import run
from vdiff.networks.layers import zeroed
from vdiff.networks.temporal import AlphaBlender, Clip, MergeStrategy, TemporalTransformerBlock, VideoTransformer
from vdiff.networks.unet_stages import mlp

ViewAttention = Literal["pixel", "moment", "released"]


class MultiViewTransformer(VideoTransformer):
    """Transformer blocks over the pixels of a frame, the views of a moment and the moments of a view, blended.

    Those over views attend to the context of their moment, those over moments to the first moment's picture of their
    view, at their own pixel.

    Args:
        motion_context_dim: Channels of these pictures.
        camera_dim: Length of the network's embedding, of which the first moment's takes the place of the view's number;
            None: the number.
        separate_motion_blend: Whether moments are blended by a factor of their own, else by that of views.
        view_attention: What the layers over views let attend to each other.

            - ``pixel``: one pixel in all views of a moment (SV4D; SV4D 2.0 with eight views).
            - ``moment``: all pixels of all views of a moment, the 3D attention of arXiv:2503.16396.
            - ``released``: what generative-models computes under that name, and the weights of SV4D 2.0 with four
              views come with: V pixels in a row, in each view alone. For the context see :func:`_dealt`.
        channels, num_heads, head_dim, and all others: See :class:`vdiff.networks.VideoTransformer`.
    """

    beyond_images = (*VideoTransformer.beyond_images, "motion_stack", "motion_pos_embed", "motion_mixer")

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        motion_context_dim: int,
        camera_dim: int | None = None,
        separate_motion_blend: bool = False,
        view_attention: ViewAttention = "pixel",
        depth: int = 1,
        context_dim: int | None = None,
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
            channels, num_heads, head_dim, depth, context_dim, context_dim, dropout, linear_projection, extra_ff,
            temporal_cross_attention, merge_factor, merge_strategy, max_time_period, norm_groups, checkpointing,
            backend,
        )  # fmt: skip
        inner = num_heads * head_dim
        self.has_camera, self.view_attention = camera_dim is not None, view_attention
        if camera_dim is not None:
            self.time_pos_embed = mlp(camera_dim, 4 * channels, inner)
        over_moments = [
            TemporalTransformerBlock(
                inner, num_heads, head_dim, motion_context_dim, dropout, extra_ff, temporal_cross_attention, backend
            )
            for _ in range(depth)
        ]
        self.motion_stack, self.motion_pos_embed = nn.ModuleList(over_moments), mlp(channels, 4 * channels, inner)
        for block in over_moments:
            block.begin_as_identity()
        for embed in (self.time_pos_embed, self.motion_pos_embed):
            zeroed(embed[-1])
        self.motion_mixer = AlphaBlender(merge_factor, merge_strategy) if separate_motion_blend else None

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """Rows ``(b t v)``, ``(B, C, H, W)``."""
        assert clip.views is not None
        num_views = clip.views.shape[1]
        moments = clip.num_frames // num_views
        h = self.tokens(x)
        view = self._cameras(clip, moments) if self.has_camera else self.positions(len(x), num_views, h)
        moment = self.numbered(self.motion_pos_embed, len(x), moments, h)
        pictures = F.interpolate(clip.views.flatten(0, 1), size=x.shape[2:], mode="bilinear")
        pictures = pictures.flatten(2).transpose(1, 2).flatten(0, 1)[:, None]  # (b v h w, 1, c)
        mixer = self.time_mixer if self.motion_mixer is None else self.motion_mixer
        image_only = clip.image_only
        swapped = None if image_only is None else _swapped(image_only, moments, num_views)
        layers = zip(self.transformer_blocks, self.time_stack, self.motion_stack, strict=True)
        for block, over_views, over_moments in layers:
            h = run(block, h, clip.context, clip.mask, recompute=self.checkpointing)
            told = self._over_views(over_views, h + view, clip, num_views)
            h = _swapped(self.time_mixer(h, told, image_only), moments, num_views)  # (b v t)
            told = run(over_moments, h + moment, pictures, None, moments, recompute=self.checkpointing)
            h = _swapped(mixer(h, told, swapped), num_views, moments)
        return self.added(x, h)

    def _cameras(self, clip: Clip, moments: int) -> Tensor:
        """The network's embedding of each view at the first moment, for every moment, ``(b t v, 1, inner)``."""
        assert clip.embedding is not None
        first = clip.embedding.unflatten(0, (-1, clip.num_frames)).unflatten(1, (moments, -1))[:, :1]
        return self.time_pos_embed(first).expand(-1, moments, -1, -1).flatten(0, 2)[:, None]

    def _over_views(self, layer: nn.Module, h: Tensor, clip: Clip, num_views: int) -> Tensor:
        """Rows ``(b t v)``, ``(B, H * W, inner)``."""
        context, mask, together = clip.context, clip.mask, num_views
        if self.view_attention == "pixel":
            return run(layer, h, context, mask, together, recompute=self.checkpointing)
        videos, pixels = len(h) // clip.num_frames, h.shape[1]
        if self.view_attention == "moment":
            together = num_views * pixels
        else:
            context, mask = _dealt(context, videos, pixels), _dealt(mask, videos, pixels)
        # The pixels of a moment, view after view, as rows of one token: so many of them in turn attend to each other.
        told = run(layer, h.flatten(0, 1)[:, None], context, mask, together, recompute=self.checkpointing)
        return told.view_as(h)


def _dealt(x: Tensor | None, videos: int, pixels: int) -> Tensor | None:
    """Contexts ``(b t)`` for groups of pixels ``(b t g)``, as many groups as pixels, in generative-models' order.

    There contexts lie by moment and pixel, groups by number and moment: group g of moment t gets that of moment
    ``(g T + t) // pixels``. The same for all where a video has one context.
    """
    if x is None or len(x) == videos:
        return x
    x = x.unflatten(0, (videos, -1)).repeat_interleave(pixels, dim=1)
    return x.unflatten(1, (pixels, -1)).transpose(1, 2).flatten(0, 2)


def _swapped(x: Tensor, outer: int, inner: int) -> Tensor:
    """Rows ``(b outer inner)`` as ``(b inner outer)``."""
    return x.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)
