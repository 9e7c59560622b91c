"""The UNet of Stable Video Diffusion, arXiv:2311.15127, SV3D, arXiv:2403.12008, and SV4D, arXiv:2407.17470.

The UNet of Stable Diffusion 2 with a layer over time after each of its own. The state dict is that of
generative-models, name by name and shape by shape: :class:`vdiff.networks.UNet`'s, and in every residual block and
transformer ``time_stack``, ``time_mixer`` and, in transformers, ``time_pos_embed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vdiff.attention import Backend
from vdiff.networks.base import Network, run
from vdiff.networks.embeddings import sinusoidal
from vdiff.networks.layers import Downsample, GroupNorm, Upsample, zeroed
from vdiff.networks.multi_view import MultiViewTransformer, ViewAttention
from vdiff.networks.temporal import Clip, MergeStrategy, VideoResBlock, VideoTransformer
from vdiff.networks.unet_stages import (
    Direction,
    assemble,
    check_attention,
    check_size,
    check_widths,
    encode,
    label_embedding,
    mlp,
    per_level,
)
from vdiff.process import Conditioning


class VideoStage(nn.Sequential):
    """Layers one after the other on rows ``(b f)``, each given what its kind takes."""

    def __init__(self, *layers: nn.Module, checkpointing: bool = False) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, emb: Tensor, clip: Clip) -> Tensor:
        for layer in self:
            if isinstance(layer, VideoResBlock):
                x = run(layer, x, emb, clip, recompute=self.checkpointing)
            elif isinstance(layer, VideoTransformer):
                x = layer(x, clip)
            else:
                x = layer(x)
        return x


class VideoUNet(Network, name="video_unet"):
    """Videos ``(B, in_channels, F, H, W)`` to ``(B, out_channels, F, H, W)``; how many frames, x says.

    H and W are multiples of ``2 ** (levels - 1)``. ``c_noise`` ``(B,)``, or per frame ``(B, F)``, goes into a
    sinusoidal embedding as it is: ``0.25 * log(sigma)`` for the published weights. The defaults are Stable Video
    Diffusion's, but for its widths.

    Conditions, each only where the network is built for it:

    - ``cross_attention`` ``(B, n, context_dim)``, and its mask ``(B, n)``, True counts; or per frame,
      ``(B, F, n, context_dim)`` and ``(B, F, n)``, where layers over time see the first frame's;
    - ``vector`` ``(B, vector_dim)``, or per frame ``(B, F, vector_dim)``;
    - ``label`` ``(B,)``, whole numbers, or any numbers where ``num_classes`` is ``continuous``;
    - ``concat`` ``(B, c, F, H, W)``, or ``(B, c, H, W)`` for all frames alike, put behind x; ``in_channels``
      counts both;
    - ``views`` ``(B, motion_context_dim, V, h, w)``, for several cameras: the first moment's picture of each view. The
      frames are then T moments of V views, all views of the first moment, then of the next, and ``cross_attention``
      may be for each moment, ``(B, T, n, context_dim)``;
    - ``image_only`` ``(B,)`` or ``(B, F)``: where not 0, frames are images that have nothing to do with each other.

    Args:
        channels: Width of the first level.
        context_dim: Length of the tokens in ``cross_attention``.
        channel_mult: Width of each level in units of ``channels``; its length is the number of levels.
        num_res_blocks: Residual blocks of each level on the way down; one more on the way up.
        attention_factors: Downsampling factors (1, 2, 4, ...) at which there is attention. The middle always has it.
        num_heads, head_dim: One of them. The other follows from each level's width.
        transformer_depth: Blocks in each transformer, per level or for all.
        transformer_depth_middle: Blocks in the middle's, by default as in the last level.
        linear_projection: See :class:`SpatialTransformer`.
        num_classes: ``sequential`` for a ``vector``, how many labels there are, or ``continuous``; None for neither.
        vector_dim: Length of ``vector``: 768 in SVD, 256 in SV3D_u, 1280 in SV3D_p.
        temporal_kernel: Of convolutions over time, over frames, height and width.
        merge_strategy, merge_factor: How frames and time are blended, see :class:`AlphaBlender`.
        use_spatial_context: Whether the second attention over time attends to ``cross_attention``, else to the frames.
        temporal_cross_attention: Whether there is that second attention.
        extra_ff_mix: Whether blocks over time begin with a feed-forward. Generative-models always builds it.
        max_time_period: Of the sinusoids that number the frames.
        motion_context_dim: For several cameras: channels of ``views``, 4 in SV4D. See
            :class:`vdiff.networks.multi_view.MultiViewTransformer`, also for the next three.
        camera_embedding: Whether a view is known by the embedding of its ``vector`` and noise number (SV4D 2.0), else
            by its number.
        separate_motion_blend: As in SV4D 2.0.
        view_attention: ``released`` in SV4D 2.0 with four views.
        dropout: In residual blocks and transformers.
        scale_shift_norm: See :class:`ResBlock`; of the image layers.
        resblock_updown: Resample by residual blocks.
        resample_by_conv: Resample by convolutions, else by averaging and repeating.
        checkpointing: Keep no activations of residual and transformer blocks for the backward pass.
        norm_groups: Groups of every normalisation; all widths are multiples of it.
        attention_backend: See :func:`vdiff.attention.attend`.
    """

    role = "unet"
    accepts = ("cross_attention", "vector", "label", "concat", "views", "image_only")
    entrance = "input_blocks.0.0"
    beyond_images = ("label_emb",)  # if the image network was told nothing
    built_by = {
        "cross_attention": "context_dim",
        "vector": "num_classes='sequential' and vector_dim",
        "label": "num_classes, a number or 'continuous'",
        "views": "motion_context_dim",
        "image_only": "merge_strategy='learned_with_images'",
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        context_dim: int,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int | Sequence[int] = 2,
        attention_factors: Sequence[int] = (1, 2, 4),
        num_heads: int | None = None,
        head_dim: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        linear_projection: bool = True,
        num_classes: int | Literal["sequential", "continuous"] | None = None,
        vector_dim: int | None = None,
        temporal_kernel: int | Sequence[int] = (3, 1, 1),
        merge_strategy: MergeStrategy = "learned_with_images",
        merge_factor: float = 0.5,
        use_spatial_context: bool = True,
        temporal_cross_attention: bool = True,
        extra_ff_mix: bool = True,
        max_time_period: float = 10000.0,
        motion_context_dim: int | None = None,
        camera_embedding: bool = False,
        separate_motion_blend: bool = False,
        view_attention: ViewAttention = "pixel",
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        resample_by_conv: bool = True,
        checkpointing: bool = False,
        norm_groups: int = 32,
        attention_backend: Backend | None = None,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        widths = [channels * mult for mult in channel_mult]
        num_res_blocks = per_level("VideoUNet", "num_res_blocks", num_res_blocks, levels)
        depths = per_level("VideoUNet", "transformer_depth", transformer_depth, levels)
        check_widths("VideoUNet", channels, widths, norm_groups)
        check_attention("VideoUNet", widths, attention_factors, num_heads, head_dim)
        self.in_channels, self.channels, self.num_classes = in_channels, channels, num_classes
        self.context_dim, self.vector_dim, self.use_spatial_context = context_dim, vector_dim, use_spatial_context
        self.motion_context_dim = motion_context_dim
        self.factor = 2 ** (levels - 1)
        is_for_views = camera_embedding or separate_motion_blend or view_attention != "pixel"
        if is_for_views and motion_context_dim is None:
            raise ValueError(
                "VideoUNet: camera_embedding, separate_motion_blend and view_attention go with motion_context_dim."
            )
        if motion_context_dim is not None and not use_spatial_context:
            raise ValueError("VideoUNet: with motion_context_dim the layers over views attend to cross_attention.")
        if camera_embedding and vector_dim is None:
            raise ValueError("VideoUNet: camera_embedding reads 'vector'; give num_classes='sequential', vector_dim.")

        embedding_dim = 4 * channels
        middle_depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.time_embed = mlp(channels, embedding_dim)
        self.label_emb = label_embedding("VideoUNet", num_classes, vector_dim, embedding_dim)
        if self.label_emb is not None:
            *_, last = (m for m in self.label_emb.modules() if isinstance(m, nn.Linear | nn.Embedding))
            zeroed(last)  # it begins by saying nothing
        built_for = {"cross_attention": True, "vector": vector_dim, "concat": True, "views": motion_context_dim}
        built_for["label"] = num_classes is not None and num_classes != "sequential"
        built_for["image_only"] = merge_strategy == "learned_with_images"
        self.accepts = tuple(name for name in type(self).accepts if built_for[name])

        def res_block(width: int, out_width: int, resample: Direction | None = None) -> VideoResBlock:
            return VideoResBlock(
                width, embedding_dim, out_width, dropout, scale_shift_norm, resample, norm_groups, temporal_kernel,
                merge_factor, merge_strategy,
            )  # fmt: skip

        def attention(width: int, level: int | None) -> VideoTransformer:
            heads = num_heads or width // (head_dim or width)
            depth = middle_depth if level is None else depths[level]
            rest = (
                dropout, linear_projection, extra_ff_mix, temporal_cross_attention, merge_factor, merge_strategy,
                max_time_period, norm_groups, checkpointing, attention_backend,
            )  # fmt: skip
            if motion_context_dim is None:
                time_context_dim = context_dim if use_spatial_context else None
                return VideoTransformer(width, heads, width // heads, depth, context_dim, time_context_dim, *rest)
            camera_dim = embedding_dim if camera_embedding else None
            views = (motion_context_dim, camera_dim, separate_motion_blend, view_attention)
            return MultiViewTransformer(width, heads, width // heads, *views, depth, context_dim, *rest)

        def resample(width: int, direction: Direction) -> nn.Module:
            if resblock_updown:
                return res_block(width, width, direction)
            return {"up": Upsample, "down": Downsample}[direction](width, conv=resample_by_conv)

        def stage(*layers: nn.Module) -> VideoStage:
            return VideoStage(*layers, checkpointing=checkpointing)

        self.input_blocks, self.middle_block, self.output_blocks, width = assemble(
            in_channels, channels, widths, num_res_blocks, attention_factors, res_block, attention, resample, stage
        )
        self.out = nn.Sequential(
            GroupNorm(norm_groups, width), nn.SiLU(), zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        h, told = self.begin(x, c_noise, self.accepted(cond))
        h, skips = encode(self, h, told)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), *told)
        return self.out(h).unflatten(0, (len(x), x.shape[2])).transpose(1, 2)

    def begin(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> tuple[Tensor, tuple]:
        """See :class:`vdiff.networks.unet_stages.Encoder`; rows are ``(b f)``."""
        x = self._with_concat(x, cond)
        num_rows, _, num_frames, *_ = x.shape
        emb = self._embedding(c_noise, cond, num_frames, x.dtype)
        told = (emb, self._clip(cond, num_rows, num_frames, emb))
        return self.input_blocks[0](x.transpose(1, 2).flatten(0, 1), *told), told

    def _with_concat(self, x: Tensor, cond: Conditioning) -> Tensor:
        concat = cond.get("concat")
        if concat is not None and x.ndim == 5:
            concat = concat[:, :, None] if concat.ndim == 4 else concat
            x = torch.cat([x, concat.expand(-1, -1, x.shape[2], -1, -1)], dim=1)
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            parts = "x" if concat is None else f"x and 'concat' ({concat.shape[1]} channels)"
            raise ValueError(
                f"VideoUNet: expected {parts} to be (B, {self.in_channels}, F, H, W), got {tuple(x.shape)}."
            )
        check_size("VideoUNet", x.shape[3], x.shape[4], self.factor)
        return x

    def _embedding(self, c_noise: Tensor, cond: Conditioning, num_frames: int, dtype: torch.dtype) -> Tensor:
        """Of the noise number, and a label or vector, for every row ``(b f)``."""
        if c_noise.ndim > 2 or (c_noise.ndim == 2 and c_noise.shape[1] != num_frames):
            raise ValueError(
                f"VideoUNet: c_noise is one number per row or per frame, (B,) or (B, {num_frames}); "
                f"got the shape {tuple(c_noise.shape)}."
            )
        emb = _per_frame(self.time_embed(sinusoidal(c_noise, self.channels).to(dtype)), 2, num_frames)
        if self.label_emb is None:
            return emb
        if self.num_classes == "sequential":
            vector = self.needed(cond, "vector")
            if vector.shape[1:] not in ((self.vector_dim,), (num_frames, self.vector_dim)):
                raise ValueError(
                    f"VideoUNet: 'vector' is ({self.vector_dim},) or, per frame, ({num_frames}, {self.vector_dim}) "
                    f"for each row; what feeds it is {tuple(vector.shape[1:])}. Make the two agree."
                )
            return emb + _per_frame(self.label_emb(vector), 2, num_frames)
        label = self.needed(cond, "label")
        label = label.to(dtype).view(-1, 1) if self.num_classes == "continuous" else label
        return emb + _per_frame(self.label_emb(label), 2, num_frames)

    def _clip(self, cond: Conditioning, num_rows: int, num_frames: int, emb: Tensor) -> Clip:
        """What all layers are told."""
        views = None if self.motion_context_dim is None else self._views(cond, num_frames)
        moments = num_frames if views is None else num_frames // views.shape[1]
        context, mask = self.needed(cond, "cross_attention"), cond.masks.get("cross_attention")
        if context.ndim == 4 and context.shape[1] != moments:
            frames = "frames" if views is None else "moments"
            raise ValueError(
                f"VideoUNet: 'cross_attention' has tokens for {context.shape[1]} {frames}, and x has {moments}."
            )
        first, first_mask = context, mask
        if context.ndim == 4:
            first, context = context[:, 0], context.flatten(0, 1)
            if mask is not None:
                first_mask, mask = mask[:, 0], mask.flatten(0, 1)
        if not self.use_spatial_context:
            first = first_mask = None
        image_only = cond.get("image_only")
        if image_only is not None:
            image_only = image_only.view(num_rows, -1).expand(-1, num_frames).flatten()
        return Clip(num_frames, image_only, context, mask, first, first_mask, views, emb)

    def _views(self, cond: Conditioning, num_frames: int) -> Tensor:
        views = self.needed(cond, "views")
        if views.ndim != 5 or views.shape[1] != self.motion_context_dim or num_frames % views.shape[2]:
            raise ValueError(
                f"VideoUNet: 'views' is (B, {self.motion_context_dim}, V, h, w), where V divides the {num_frames} "
                f"frames of x; got {tuple(views.shape)}."
            )
        return views.transpose(1, 2)


def _per_frame(x: Tensor, per_row: int, num_frames: int) -> Tensor:
    """``(B, ...)`` with ``per_row`` axes for every frame, or ``(B, F, ...)``, as rows ``(b f)``."""
    return x.repeat_interleave(num_frames, dim=0) if x.ndim == per_row else x.flatten(0, 1)
