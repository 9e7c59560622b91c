"""The UNet of latent diffusion, Stable Diffusion 1 and 2 and SDXL, arXiv:2112.10752.

The state dict is theirs, name by name and shape by shape::

    time_embed, label_emb            the noise number, and a label or vector, as one embedding
    input_blocks.0                   convolution into ``channels``
    input_blocks.i, output_blocks.i  one :class:`Stage` each: a residual block, perhaps attention, perhaps resampling
    middle_block                     residual block, attention, residual block
    out                              normalisation, SiLU, convolution
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vdiff.attention import Backend
from vdiff.networks.base import Network, behind, run
from vdiff.networks.embeddings import guidance_waves, sinusoidal
from vdiff.networks.layers import CONVOLUTIONS, Downsample, GroupNorm, Upsample, zeroed
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import AttentionBlock, SpatialTransformer
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


class Stage(nn.Sequential):
    """Layers one after the other, each given what its kind takes."""

    def __init__(self, *layers: nn.Module, checkpointing: bool = False) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = run(layer, x, emb, recompute=self.checkpointing)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            elif isinstance(layer, AttentionBlock):
                x = x + run(layer, x, recompute=self.checkpointing)
            else:
                x = layer(x)
        return x


class UNet(Network, name="unet"):
    """Images ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``.

    H and W are multiples of ``2 ** (levels - 1)``. ``c_noise`` goes into a sinusoidal embedding as it
    is: whole numbers up to 1000 for the published weights.

    Conditions, each only where the network is built for it:

    - ``cross_attention`` ``(B, n, context_dim)``, and its mask ``(B, n)``, True counts;
    - ``vector`` ``(B, vector_dim)``;
    - ``label`` ``(B,)``, whole numbers, or any numbers where ``num_classes`` is ``continuous``;
    - ``guidance`` ``(B,)``: the scale of guidance that a distilled network stands for; without it the network does
      without;
    - ``concat`` ``(B, c, H, W)``, put behind x; ``in_channels`` counts both.

    Args:
        channels: Width of the first level.
        channel_mult: Width of each level in units of ``channels``; its length is the number of levels.
        num_res_blocks: Residual blocks of each level on the way down; one more on the way up.
        attention_factors: Downsampling factors (1, 2, 4, ...) at which there is attention. The middle
            always has it.
        num_heads, head_dim: One of them. The other follows from each level's width.
        context_dim: Length of the tokens in ``cross_attention``. None gives plain self-attention
            blocks in place of transformers.
        transformer_depth: Blocks in each transformer, per level or for all.
        transformer_depth_middle: Blocks in the middle's, by default as in the last level.
        linear_projection: See :class:`SpatialTransformer`.
        dropout: In residual blocks and transformers.
        scale_shift_norm: See :class:`ResBlock`.
        resblock_updown: Resample by residual blocks.
        resample_by_conv: Resample by convolutions, else by averaging and repeating.
        num_classes: How many labels there are (one embedding each; for guidance count the empty label
            as well), ``continuous``, or ``sequential`` for a ``vector``.
        vector_dim: Length of ``vector``.
        disable_self_attentions: Per level, whether transformers attend to the context only.
        new_attention_order: See :class:`AttentionBlock`.
        checkpointing: Keep no activations of residual and transformer blocks for the backward pass.
        norm_groups: Groups of every normalisation; all widths are multiples of it.
        attention_backend: See :func:`vdiff.attention.attend`.
        dims: Axes of x after the channels: 1 for sequences ``(B, in_channels, L)``, 3 for volumes
            ``(B, in_channels, D, H, W)``, whose first axis is not resampled. Attention is among all positions;
            transformers with other than 2 want ``linear_projection``.
        num_codes: Instead of a sample, logits of that many codes of a ``vq`` first stage, ``(B, num_codes, H, W)``.
            The layers of the sample stay in the state dict.
        guidance_dim: Length of the waves that tell ``guidance``, see
            :func:`~vdiff.networks.embeddings.guidance_waves`: 256 in latent consistency models. Their projection begins
            at zero.
    """

    role = "unet"
    accepts = ("cross_attention", "vector", "label", "guidance", "concat")
    entrance = "input_blocks.0.0"
    built_by = {
        "cross_attention": "context_dim",
        "vector": "num_classes='sequential' and vector_dim",
        "label": "num_classes, a number or 'continuous'",
        "guidance": "guidance_dim",
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int | Sequence[int] = 2,
        attention_factors: Sequence[int] = (1, 2, 4),
        num_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        linear_projection: bool = False,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        resample_by_conv: bool = True,
        num_classes: int | Literal["sequential", "continuous"] | None = None,
        vector_dim: int | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        new_attention_order: bool = False,
        checkpointing: bool = False,
        norm_groups: int = 32,
        attention_backend: Backend | None = None,
        dims: Literal[1, 2, 3] = 2,
        num_codes: int | None = None,
        guidance_dim: int | None = None,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        widths = [channels * mult for mult in channel_mult]
        num_res_blocks = per_level("UNet", "num_res_blocks", num_res_blocks, levels)
        depths = per_level("UNet", "transformer_depth", transformer_depth, levels)
        disabled = per_level("UNet", "disable_self_attentions", disable_self_attentions or False, levels)
        check_widths("UNet", channels, widths, norm_groups)
        if context_dim is None and (linear_projection or any(disabled) or max(depths) > 1):
            raise ValueError(
                "UNet: linear_projection, transformer_depth and disable_self_attentions belong to transformers, "
                "which this network has none of. Give context_dim, or leave them out."
            )
        check_attention("UNet", widths, attention_factors, num_heads, head_dim)
        if context_dim is not None and dims != 2 and not linear_projection:
            raise ValueError(f"UNet: transformers over {dims} axes want linear_projection: true.")
        self.in_channels, self.channels, self.num_classes = in_channels, channels, num_classes
        self.context_dim, self.dims = context_dim, dims
        self.factor = 2 ** (levels - 1)

        embedding_dim = 4 * channels
        middle_depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.time_embed = mlp(channels, embedding_dim)
        self.vector_dim = vector_dim
        self.label_emb = label_embedding("UNet", num_classes, vector_dim, embedding_dim)
        self.time_cond_proj = zeroed(nn.Linear(guidance_dim, channels, bias=False)) if guidance_dim else None
        built_for = {"cross_attention": context_dim, "vector": vector_dim, "guidance": guidance_dim, "concat": True}
        built_for["label"] = num_classes is not None and num_classes != "sequential"
        self.accepts = tuple(name for name in type(self).accepts if built_for[name])

        def res_block(width: int, out_width: int, resample: Direction | None = None) -> ResBlock:
            return ResBlock(width, embedding_dim, out_width, dropout, scale_shift_norm, resample, norm_groups, dims)

        def attention(width: int, level: int | None) -> nn.Module:
            heads = num_heads or width // (head_dim or width)
            depth = middle_depth if level is None else depths[level]
            is_self_disabled = level is not None and disabled[level]
            if context_dim is None:
                return AttentionBlock(width, heads, norm_groups, new_attention_order, attention_backend)
            return SpatialTransformer(
                width, heads, width // heads, depth, context_dim, dropout, linear_projection, is_self_disabled,
                norm_groups, checkpointing, attention_backend,
            )  # fmt: skip

        def resample(width: int, direction: Direction) -> nn.Module:
            if resblock_updown:
                return res_block(width, width, direction)
            return {"up": Upsample, "down": Downsample}[direction](width, conv=resample_by_conv, dims=dims)

        def stage(*layers: nn.Module) -> Stage:
            return Stage(*layers, checkpointing=checkpointing)

        self.input_blocks, self.middle_block, self.output_blocks, width = assemble(
            in_channels, channels, widths, num_res_blocks, attention_factors, res_block, attention, resample, stage,
            CONVOLUTIONS[dims],
        )  # fmt: skip
        self.out = nn.Sequential(
            GroupNorm(norm_groups, width), nn.SiLU(), zeroed(CONVOLUTIONS[dims](width, out_channels, 3, padding=1))
        )
        self.id_predictor = None
        if num_codes is not None:
            self.id_predictor = nn.Sequential(GroupNorm(norm_groups, width), CONVOLUTIONS[dims](width, num_codes, 1))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        h, told = self.begin(x, c_noise, self.accepted(cond))
        h, skips = encode(self, h, told)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), *told)
        return self.out(h) if self.id_predictor is None else self.id_predictor(h)

    def begin(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> tuple[Tensor, tuple]:
        """See :class:`vdiff.networks.unet_stages.Encoder`."""
        h = self._with_concat(x, cond)
        emb = self._embedding(c_noise, cond, x.dtype)
        context = None if self.context_dim is None else self.needed(cond, "cross_attention")
        told = (emb, context, cond.masks.get("cross_attention"))
        return self.input_blocks[0](h, *told), told

    def _with_concat(self, x: Tensor, cond: Conditioning) -> Tensor:
        concat = cond.get("concat")
        if concat is not None:
            x = behind(x, concat, "UNet")
        if x.ndim != 2 + self.dims or x.shape[1] != self.in_channels:
            parts = "x" if concat is None else f"x and 'concat' ({concat.shape[1]} channels)"
            axes = {1: "L", 2: "H, W", 3: "D, H, W"}[self.dims]
            raise ValueError(f"UNet: expected {parts} to be (B, {self.in_channels}, {axes}), got {tuple(x.shape)}.")
        check_size("UNet", x.shape[-min(self.dims, 2)], x.shape[-1], self.factor)
        return x

    def _embedding(self, c_noise: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        if c_noise.ndim != 1:
            raise ValueError(f"UNet: c_noise is one number per row, (B,); got the shape {tuple(c_noise.shape)}.")
        number = sinusoidal(c_noise, self.channels).to(dtype)
        if self.time_cond_proj is not None and (guidance := cond.get("guidance")) is not None:
            number = number + self.time_cond_proj(guidance_waves(guidance, self.time_cond_proj.in_features).to(dtype))
        emb = self.time_embed(number)
        if self.label_emb is None:
            return emb
        if self.num_classes == "sequential":
            vector = self.needed(cond, "vector")
            if vector.shape[1:] != (self.vector_dim,):
                raise ValueError(
                    f"UNet: vector_dim is {self.vector_dim}, and the embeddings that feed 'vector' are "
                    f"{tuple(vector.shape[1:])} wide. Make the two agree."
                )
            return emb + self.label_emb(vector)
        label = self.needed(cond, "label")
        return emb + self.label_emb(label.to(dtype).view(-1, 1) if self.num_classes == "continuous" else label)
