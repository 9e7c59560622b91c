"""The UNet of VideoCrafter, arXiv:2310.19512 and arXiv:2401.09047, and of DynamiCrafter, arXiv:2310.12190.

The UNet of Stable Diffusion 2 with convolutions over time in its residual blocks and a transformer over the frames of
every pixel after each of its own. The state dict is VideoCrafter's, name by name and shape by shape:
:class:`vdiff.networks.UNet`'s, and::

    fps_embedding                 frames per second, added to the noise number's embedding
    init_attn                     a transformer over time, 8 heads wide, right after the first convolution
    *_blocks.i.0.temopral_conv    convolutions over time (DynamiCrafter's files spell it temporal_conv)
    *_blocks.i.2                  a transformer over time; what stood there moves to 3
    *.attn2.to_k_ip, to_v_ip      attention to the tokens of a picture
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdiff.attention import Backend
from vdiff.networks.base import Network, run
from vdiff.networks.embeddings import guidance_waves, sinusoidal
from vdiff.networks.layers import Downsample, GroupNorm, Upsample, zeroed
from vdiff.networks.lvdm_layers import ConvolvedResBlock, FrameTransformer, ImageCrossAttention
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import SpatialTransformer
from vdiff.networks.unet_stages import (
    Direction,
    assemble,
    check_attention,
    check_size,
    check_widths,
    encode,
    mlp,
    per_level,
)
from vdiff.process import Conditioning

INITIAL_HEADS = 8


class LVDMStage(nn.Sequential):
    """Layers one after the other on rows ``(b f)``, each given what its kind takes."""

    def __init__(self, *layers: nn.Module, checkpointing: bool = False) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing
        self.beyond_images = tuple(name for name, layer in self.named_children() if isinstance(layer, FrameTransformer))

    def forward(self, x: Tensor, emb: Tensor, num_frames: int, context: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ConvolvedResBlock):
                x = run(layer, x, emb, num_frames, recompute=self.checkpointing)
            elif isinstance(layer, ResBlock):
                x = run(layer, x, emb, recompute=self.checkpointing)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            elif isinstance(layer, FrameTransformer):
                x = layer(x, num_frames)
            else:
                x = layer(x)
        return x


class LVDMUNet(Network, name="lvdm_unet"):
    """Videos ``(B, in_channels, F, H, W)`` to ``(B, out_channels, F, H, W)``; how many frames, x says.

    H and W are multiples of ``2 ** (levels - 1)``. ``c_noise`` ``(B,)``, or per frame ``(B, F)``, goes into a
    sinusoidal embedding as it is: whole numbers up to 1000 for the published weights. The defaults are
    VideoCrafter 2's, but for its widths.

    Conditions, each only where the network is built for it:

    - ``cross_attention`` ``(B, n, context_dim)``, and its mask ``(B, n)``, True counts;
    - ``image_tokens`` ``(B, image_tokens, context_dim)``, or per frame ``(B, F, image_tokens, context_dim)``, of a
      picture: see :class:`vdiff.conditioners.ImageTokensEmbedder`;
    - ``fps`` ``(B,)``: frames per second; in DynamiCrafter's model of 256 x 256 the stride between frames;
    - ``guidance`` ``(B,)``: the scale that a distilled network stands for; without it the network does without;
    - ``concat`` ``(B, c, F, H, W)``, or ``(B, c, H, W)`` for all frames alike, put behind x; ``in_channels``
      counts both.

    Args:
        channels: Width of the first level.
        context_dim: Length of the tokens in ``cross_attention`` and ``image_tokens``.
        channel_mult: Width of each level in units of ``channels``; its length is the number of levels.
        num_res_blocks: Residual blocks of each level on the way down; one more on the way up.
        attention_factors: Downsampling factors (1, 2, 4, ...) at which there is attention. The middle always has it.
        num_heads, head_dim: One of them. The other follows from each level's width.
        transformer_depth: Blocks in each transformer, per level or for all; in the middle's as in the last level.
        temporal_depth: Blocks in each transformer over time.
        linear_projection: See :class:`SpatialTransformer`; the first transformer over time has convolutions.
        temporal_kernels: Of the four convolutions over time in a residual block, over frames, height and width; None:
            there are none (VideoCrafter 1). VideoCrafter's option for convolutions aware of space too makes the first
            two (3, 3, 3), DynamiCrafter's alternates (3, 3, 1) and (3, 1, 3).
        max_distance: Transformers over time learn relative positions up to this distance (VideoCrafter 1: 16); None:
            they do not know the order of frames.
        is_causal: Frames attend to none after their own.
        initial_attention: Whether there is a transformer over time after the first convolution.
        fps: Whether it is told the frames per second.
        default_fps: Where ``fps`` is not among the conditions; None makes that an error.
        image_tokens: Tokens of a picture; None: it attends to text alone. 16 in the published networks.
        learned_image_scale: Whether each attention to a picture has a learned weight.
        guidance_dim: Length of the waves that tell ``guidance``: 256 in T2V-Turbo; None: there are none.
        dropout: In residual blocks.
        temporal_dropout: In convolutions over time.
        scale_shift_norm: See :class:`ResBlock`.
        resblock_updown: Resample by residual blocks.
        resample_by_conv: Resample by convolutions, else by averaging and repeating.
        checkpointing: Keep no activations of residual and transformer blocks for the backward pass.
        norm_groups: Groups of every normalisation; all widths are multiples of it.
        attention_backend: See :func:`vdiff.attention.attend`.
    """

    role = "unet"
    accepts = ("cross_attention", "image_tokens", "fps", "guidance", "concat")
    entrance = "input_blocks.0.0"
    beyond_images = ("fps_embedding", "time_cond_proj", "init_attn")
    built_by = {
        "cross_attention": "context_dim",
        "image_tokens": "image_tokens",
        "fps": "fps",
        "guidance": "guidance_dim",
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
        temporal_depth: int = 1,
        linear_projection: bool = True,
        temporal_kernels: Sequence[Sequence[int]] | None = ((3, 1, 1),) * 4,
        max_distance: int | None = None,
        is_causal: bool = False,
        initial_attention: bool = True,
        fps: bool = True,
        default_fps: float | None = None,
        image_tokens: int | None = None,
        learned_image_scale: bool = False,
        guidance_dim: int | None = None,
        dropout: float = 0.0,
        temporal_dropout: float = 0.1,
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
        num_res_blocks = per_level("LVDMUNet", "num_res_blocks", num_res_blocks, levels)
        depths = per_level("LVDMUNet", "transformer_depth", transformer_depth, levels)
        check_widths("LVDMUNet", channels, widths, norm_groups)
        check_attention("LVDMUNet", widths, attention_factors, num_heads, head_dim)
        self.in_channels, self.channels, self.context_dim = in_channels, channels, context_dim
        self.image_tokens, self.default_fps = image_tokens, default_fps
        self.factor = 2 ** (levels - 1)

        embedding_dim = 4 * channels
        self.time_embed = mlp(channels, embedding_dim)
        self.fps_embedding = mlp(channels, embedding_dim) if fps else None
        if self.fps_embedding is not None:
            zeroed(self.fps_embedding[-1])  # it begins by saying nothing, as DynamiCrafter's does
        self.time_cond_proj = nn.Linear(guidance_dim, channels, bias=False) if guidance_dim else None
        built_for = {"cross_attention": True, "concat": True}
        built_for |= {"image_tokens": image_tokens, "fps": fps, "guidance": guidance_dim}
        self.accepts = tuple(name for name in type(self).accepts if built_for[name])

        def over_time(width: int, heads: int, dim: int, depth: int, is_linear: bool) -> FrameTransformer:
            return FrameTransformer(
                width, heads, dim, depth, is_linear, max_distance, is_causal, norm_groups, checkpointing,
                attention_backend,
            )  # fmt: skip

        def res_block(width: int, out_width: int) -> ResBlock:
            if temporal_kernels is None:
                return ResBlock(width, embedding_dim, out_width, dropout, scale_shift_norm, None, norm_groups)
            return ConvolvedResBlock(
                width, embedding_dim, out_width, dropout, scale_shift_norm, norm_groups, temporal_kernels,
                temporal_dropout,
            )  # fmt: skip

        def attention(width: int, level: int | None) -> nn.ModuleList:
            heads = num_heads or width // (head_dim or width)
            depth = depths[-1 if level is None else level]
            over_space = SpatialTransformer(
                width, heads, width // heads, depth, context_dim, linear_projection=linear_projection,
                norm_groups=norm_groups, checkpointing=checkpointing, backend=attention_backend,
            )  # fmt: skip
            if image_tokens is not None:
                for block in over_space.transformer_blocks:
                    block.attn2 = ImageCrossAttention(
                        width, heads, width // heads, context_dim, image_tokens, learned_image_scale, attention_backend
                    )
            return nn.ModuleList([
                over_space, over_time(width, heads, width // heads, temporal_depth, linear_projection)
            ])  # fmt: skip

        def resample(width: int, direction: Direction) -> nn.Module:
            if resblock_updown:
                return ResBlock(width, embedding_dim, width, dropout, scale_shift_norm, direction, norm_groups)
            return {"up": Upsample, "down": Downsample}[direction](width, conv=resample_by_conv)

        def stage(*layers: nn.Module) -> LVDMStage:
            each = [one for layer in layers for one in (layer if isinstance(layer, nn.ModuleList) else [layer])]
            return LVDMStage(*each, checkpointing=checkpointing)

        self.input_blocks, self.middle_block, self.output_blocks, width = assemble(
            in_channels, channels, widths, num_res_blocks, attention_factors, res_block, attention, resample, stage
        )
        self.init_attn = None
        if initial_attention:
            # Its depth is the other transformers', its width and its projections are its own.
            dim = head_dim or channels // (num_heads or 1)
            self.init_attn = nn.Sequential(over_time(channels, INITIAL_HEADS, dim, depths[0], False))
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
        num_frames = x.shape[2]
        told = (self._embedding(c_noise, cond, num_frames, x.dtype), num_frames, *self._context(cond, num_frames))
        h = self.input_blocks[0](x.transpose(1, 2).flatten(0, 1), *told)
        return h if self.init_attn is None else self.init_attn[0](h, num_frames), told

    def _with_concat(self, x: Tensor, cond: Conditioning) -> Tensor:
        concat = cond.get("concat")
        if concat is not None and x.ndim == 5:
            concat = concat[:, :, None] if concat.ndim == 4 else concat
            x = torch.cat([x, concat.expand(-1, -1, x.shape[2], -1, -1)], dim=1)
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            parts = "x" if concat is None else f"x and 'concat' ({concat.shape[1]} channels)"
            raise ValueError(
                f"LVDMUNet: expected {parts} to be (B, {self.in_channels}, F, H, W), got {tuple(x.shape)}."
            )
        check_size("LVDMUNet", x.shape[3], x.shape[4], self.factor)
        return x

    def _embedding(self, c_noise: Tensor, cond: Conditioning, num_frames: int, dtype: torch.dtype) -> Tensor:
        """Of the noise number, of guidance and of the frames per second, for every row ``(b f)``."""
        if c_noise.ndim > 2 or (c_noise.ndim == 2 and c_noise.shape[1] != num_frames):
            raise ValueError(
                f"LVDMUNet: c_noise is one number per row or per frame, (B,) or (B, {num_frames}); "
                f"got the shape {tuple(c_noise.shape)}."
            )
        number = sinusoidal(c_noise, self.channels).to(dtype)
        if self.time_cond_proj is not None and (guidance := cond.get("guidance")) is not None:
            waves = guidance_waves(guidance, self.time_cond_proj.in_features).to(dtype)
            number = number + _for_frames(self.time_cond_proj(waves), number)
        emb = self.time_embed(number)
        if self.fps_embedding is not None:
            fps = cond.get("fps")
            if fps is None and self.default_fps is not None:
                fps = c_noise.new_full((len(c_noise),), self.default_fps)
            fps = self.needed(cond, "fps") if fps is None else fps
            emb = emb + _for_frames(self.fps_embedding(sinusoidal(fps, self.channels).to(dtype)), emb)
        return emb.repeat_interleave(num_frames, dim=0) if emb.ndim == 2 else emb.flatten(0, 1)

    def _context(self, cond: Conditioning, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """Text and, last, a picture, and what of them counts: for every video or, if the picture is, every frame."""
        text = self.needed(cond, "cross_attention")
        mask = cond.masks.get("cross_attention")
        if self.image_tokens is None:
            return text, mask
        image = self.needed(cond, "image_tokens")
        if tuple(image.shape[1:-1]) not in ((self.image_tokens,), (num_frames, self.image_tokens)):
            raise ValueError(
                f"LVDMUNet: 'image_tokens' are {self.image_tokens} for each row, or "
                f"({num_frames}, {self.image_tokens}) for its frames; what feeds them is {tuple(image.shape[1:-1])}."
            )
        if image.ndim == 4:
            image = image.flatten(0, 1)
            text = text.repeat_interleave(num_frames, dim=0)
            mask = None if mask is None else mask.repeat_interleave(num_frames, dim=0)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        return torch.cat([text, image], dim=1), mask


def _for_frames(told: Tensor, like: Tensor) -> Tensor:
    """``(B, c)`` with an axis for frames, if the other has one."""
    return told if like.ndim == 2 else told[:, None]
