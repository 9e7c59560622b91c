"""Layers over time, and attention to pictures, of VideoCrafter and DynamiCrafter.

Frames are rows, ``(b f)``, batch-major: an image layer sees them as so many images, a layer over time unfolds them.
Every layer over time is added to its input and begins at zero, so that a network of images becomes one of videos that
says of each frame what it said of an image. Names of weights are those of VideoCrafter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.networks.base import run
from vdiff.networks.layers import GroupNorm, zeroed
from vdiff.networks.resblock import ResBlock
from vdiff.networks.temporal import TemporalTransformerBlock
from vdiff.networks.transformer import CrossAttention, repeated


class TemporalConvolution(nn.Module):
    """Four convolutions over ``(b, c, f, h, w)``, each after normalisation and SiLU, added to the input.

    Normalisations see whole videos. The last convolution begins at zero. ModelScope's, arXiv:2308.06571.

    Args:
        kernels: Of the four, over frames, height and width.
        dropout: Before all but the first.
    """

    role = "temporal_convolution"

    def __init__(
        self,
        channels: int,
        kernels: Sequence[Sequence[int]] = ((3, 1, 1),) * 4,
        dropout: float = 0.1,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        sizes = [tuple(kernel) for kernel in kernels]
        if len(sizes) != 4 or any(len(size) != 3 or any(n % 2 == 0 for n in size) for size in sizes):
            raise ValueError(
                f"TemporalConvolution: kernels are four, each of three odd sizes over f, h and w; got {sizes}."
            )

        def layers(size: tuple[int, ...], *between: nn.Module) -> nn.Sequential:
            f, h, w = size
            conv = nn.Conv3d(channels, channels, (f, h, w), padding=(f // 2, h // 2, w // 2))
            return nn.Sequential(GroupNorm(norm_groups, channels), nn.SiLU(), *between, conv)

        self.conv1 = layers(sizes[0])
        self.conv2, self.conv3, self.conv4 = (layers(size, nn.Dropout(dropout)) for size in sizes[1:])
        zeroed(self.conv4[-1])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Rows ``(b f)``, ``(B, C, H, W)``."""
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2)
        x = x + self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return x.transpose(1, 2).flatten(0, 1)


class ConvolvedResBlock(ResBlock):
    """A residual block on images, then convolutions over time.

    Args:
        channels, embedding_dim, out_channels, dropout, scale_shift_norm, norm_groups: See :class:`ResBlock`.
        kernels, temporal_dropout: See :class:`TemporalConvolution`.
    """

    beyond_images = ("temopral_conv",)

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        norm_groups: int = 32,
        kernels: Sequence[Sequence[int]] = ((3, 1, 1),) * 4,
        temporal_dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, embedding_dim, out_channels, dropout, scale_shift_norm, None, norm_groups)
        # Spelled so in every published file.
        self.temopral_conv = TemporalConvolution(out_channels or channels, kernels, temporal_dropout, norm_groups)

    def forward(self, x: Tensor, emb: Tensor, num_frames: int) -> Tensor:
        return self.temopral_conv(super().forward(x, emb), num_frames)


class RelativePositions(nn.Module):
    """A vector for every distance between a query and a key, the same beyond ``max_distance`` to either side."""

    def __init__(self, dim: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.embeddings_table = nn.Parameter(torch.empty(2 * max_distance + 1, dim))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """``(queries, keys, dim)``; the table goes from keys long before the query to keys long after it."""
        device = self.embeddings_table.device
        distance = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device)[:, None]
        return self.embeddings_table[distance.clamp(-self.max_distance, self.max_distance) + self.max_distance]


class FrameAttention(CrossAttention):
    r"""Attention among the frames of a pixel that knows their order.

    With relative positions :math:`K` and :math:`V`, both learned, arXiv:1803.02155, eq. 3 and 4:
    :math:`w_{ij} = \mathrm{softmax}_j\, s\, q_i (k_j + K_{j-i})` and :math:`\sum_j w_{ij} (v_j + V_{j-i})`.

    Args:
        max_distance: Beyond which distances are alike; None leaves positions out.
        is_causal: Frames attend to none after their own.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        max_distance: int | None = None,
        is_causal: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, role="temporal_self_attention", backend=backend)
        self.max_distance, self.is_causal = max_distance, is_causal
        if max_distance is not None:
            self.relative_position_k = RelativePositions(head_dim, max_distance)
            self.relative_position_v = RelativePositions(head_dim, max_distance)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, partners: Tensor | None = None
    ) -> Tensor:
        """As :class:`CrossAttention`; the context is frames as well."""
        context = x if context is None else context
        heads = (self.num_heads, -1)
        q, k, v = (
            layer(y).unflatten(-1, heads) for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        if partners is not None:
            k, v, mask = k[partners], v[partners], None if mask is None else mask[partners]
        if self.max_distance is None:
            out = attend(q, k, v, mask, causal=self.is_causal, backend=self.backend)
        else:
            out = self._by_distance(q, k, v, mask)
        return self.to_out(out.flatten(2))

    def _by_distance(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What no fused kernel does: the values, too, depend on the distance. Frames are few, so the weights fit."""
        num_queries, num_keys = q.shape[1], k.shape[1]
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k)
        logits = logits + torch.einsum("bqhd,qkd->bhqk", q, self.relative_position_k(num_queries, num_keys).to(q))
        logits = logits.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        if self.is_causal:
            after = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(after, -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        weights = logits.softmax(-1).to(v.dtype)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return out + torch.einsum("bhqk,qkd->bqhd", weights, self.relative_position_v(num_queries, num_keys).to(v))


class FrameTransformer(nn.Module):
    """Transformer blocks over the frames of every pixel, added to the input; begins as the identity.

    Both attentions of a block are among frames. The normalisation sees whole videos.

    Args:
        channels, num_heads, head_dim, depth, norm_groups, checkpointing, backend: See :class:`SpatialTransformer`.
        linear_projection: Project in and out by linear layers, else by 1 x 1 convolutions. The same function.
        max_distance, is_causal: See :class:`FrameAttention`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        linear_projection: bool = False,
        max_distance: int | None = None,
        is_causal: bool = False,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.linear_projection, self.checkpointing = linear_projection, checkpointing
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else nn.Conv1d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(inner, num_heads, head_dim, extra_ff=False, backend=backend) for _ in range(depth)
        )
        if max_distance is not None or is_causal:
            for block in self.transformer_blocks:
                block.attn1, block.attn2 = (
                    FrameAttention(inner, num_heads, head_dim, max_distance, is_causal, backend) for _ in range(2)
                )
        self.proj_out = zeroed(nn.Linear(inner, channels) if linear_projection else nn.Conv1d(inner, channels, 1))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Rows ``(b f)``, ``(B, C, H, W)``."""
        h = self.norm(x.unflatten(0, (-1, num_frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1).flatten(2)
        h = self.proj_in(h.transpose(1, 2)) if self.linear_projection else self.proj_in(h).transpose(1, 2)
        for block in self.transformer_blocks:
            h = run(block, h, None, None, num_frames, recompute=self.checkpointing)
        h = self.proj_out(h).transpose(1, 2) if self.linear_projection else self.proj_out(h.transpose(1, 2))
        return x + h.unflatten(2, x.shape[2:])


class ImageCrossAttention(CrossAttention):
    r"""Attention to text, and by the same queries to the tokens of a picture: :math:`A_{text} + s\,A_{image}`.

    As in IP-Adapter, arXiv:2308.06721.

    Args:
        num_image_tokens: How many of the context's last tokens are the picture's.
        learned_scale: Whether :math:`s = 1 + \tanh a` with a learned a that begins at 0; else s is 1.
    """

    beyond_images = ("to_k_ip", "to_v_ip", "alpha")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        context_dim: int,
        num_image_tokens: int,
        learned_scale: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, context_dim, backend=backend)
        self.num_image_tokens = num_image_tokens
        inner = num_heads * head_dim
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False)
        self.alpha = nn.Parameter(torch.zeros(())) if learned_scale else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, partners: Tensor | None = None
    ) -> Tensor:
        """As :class:`CrossAttention`; the context is text, then the picture."""
        if context is None or context.shape[1] <= self.num_image_tokens:
            raise ValueError(
                f"ImageCrossAttention: the context is tokens of text and, last, {self.num_image_tokens} of a picture; "
                f"got {'none' if context is None else context.shape[1]} in all."
            )
        lengths = (context.shape[1] - self.num_image_tokens, self.num_image_tokens)
        text, image = context.split(lengths, 1)
        text_mask, image_mask = (None, None) if mask is None else mask.split(lengths, 1)
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        out = self._told(q, self.to_k(text), self.to_v(text), text_mask, partners)
        shown = self._told(q, self.to_k_ip(image), self.to_v_ip(image), image_mask, partners)
        if self.alpha is not None:
            shown = shown * (1 + self.alpha.tanh())
        return self.to_out(out + shown)

    def _told(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, partners: Tensor | None) -> Tensor:
        k, v = (repeated(y, len(q)).unflatten(-1, (self.num_heads, -1)) for y in (k, v))
        mask = None if mask is None else repeated(mask, len(q))
        if partners is not None:
            k, v, mask = k[partners], v[partners], None if mask is None else mask[partners]
        return attend(q, k, v, mask, backend=self.backend).flatten(2)
