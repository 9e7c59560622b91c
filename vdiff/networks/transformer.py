"""Attention over the pixels of a feature map, plain or in transformer blocks.

Modules that attend carry a ``role``, ``self_attention`` or ``cross_attention``, and have
``forward(x, context=None, mask=None, partners=None)``, so that they can be asked to attend from one sequence
to any other of the same kind, and from one row of the batch to another. Names of weights are those of latent
diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.networks.base import run
from vdiff.networks.layers import GroupNorm, zeroed


class CrossAttention(nn.Module):
    """Attention of tokens to a context, or to themselves.

    Args:
        dim: Length of a token.
        context_dim: Length of a context token, by default ``dim``.
        role: ``self_attention`` or ``cross_attention``: what the module is for, see the module's text.
        backend: See :func:`vdiff.attention.attend`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        context_dim: int | None = None,
        dropout: float = 0.0,
        role: str = "cross_attention",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        context_dim = context_dim or dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.role = role
        self.backend = backend
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, partners: Tensor | None = None
    ) -> Tensor:
        """``(B, N, dim)`` from x ``(B, N, dim)`` and context ``(B, M, context_dim)``, by default x.

        Args:
            mask: Which context tokens count, ``(B, M)``, True counts.
            partners: The row whose keys and values each row attends to, ``(B,)``; by default its own.

        Where the rows of x are folded, ``(b f)`` or ``(b h w)``, context and mask may have b rows.
        """
        context = x if context is None else context
        if context.shape[1] == 1 and mask is None and partners is None and not self._needs_scores():
            # The softmax of one number is 1: every token gets the value, whatever it asks.
            value = repeated(self.to_out(self.to_v(context)), len(x))
            return value.expand(-1, x.shape[1], -1)
        heads = (self.num_heads, -1)
        q = self.to_q(x).unflatten(-1, heads)
        k = repeated(self.to_k(context), len(x)).unflatten(-1, heads)
        v = repeated(self.to_v(context), len(x)).unflatten(-1, heads)
        mask = None if mask is None else repeated(mask, len(x))
        if partners is not None:
            k, v, mask = k[partners], v[partners], None if mask is None else mask[partners]
        return self.to_out(attend(q, k, v, mask, backend=self.backend).flatten(2))

    def _needs_scores(self) -> bool:
        """Whether queries and keys are computed where they make no difference: so that all that is trained stays in
        the graph, be its gradient zero, and every token has a dropout of its own."""
        if self.training and self.dropout:
            return True
        layers = (self.to_q, self.to_k)
        return torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters())


def repeated(x: Tensor, rows: int) -> Tensor:
    """``rows`` rows, each of x standing for as many in a row."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0, output_size=rows)


class GEGLU(nn.Module):
    """``value * gelu(gate)``, both linear in x, arXiv:2002.05202."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to ``mult`` times the width and back, token by token."""

    role = "feed_forward"

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on the normalised input and added to it.

    Args:
        context_dim: Length of a context token; None makes the second attention attend to x as well.
        disable_self_attention: The first attention attends to the context, too.
    """

    role = "transformer_block"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        context_dim: int | None = None,
        dropout: float = 0.0,
        disable_self_attention: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.disable_self_attention = disable_self_attention
        roles = ("cross_attention" if disable_self_attention else "self_attention", "cross_attention")
        first_context = context_dim if disable_self_attention else None
        self.attn1 = CrossAttention(dim, num_heads, head_dim, first_context, dropout, roles[0], backend)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, num_heads, head_dim, context_dim, dropout, roles[1], backend)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.disable_self_attention:
            x = x + self.attn1(self.norm1(x), context, mask)
        else:
            x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of ``(B, C, H, W)``, added to it; begins as the identity.

    Args:
        channels: C.
        depth: How many blocks.
        linear_projection: Project in and out by linear layers (Stable Diffusion 2 and later), else by
            1 x 1 convolutions. The same function, with weights of another shape.
        checkpointing: Keep no activations of the blocks for the backward pass.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        linear_projection: bool = False,
        disable_self_attention: bool = False,
        norm_groups: int = 32,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.linear_projection = linear_projection
        self.checkpointing = checkpointing
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, num_heads, head_dim, context_dim, dropout, disable_self_attention, backend)
            for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Linear(inner, channels) if linear_projection else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.tokens(x)
        for block in self.transformer_blocks:
            h = run(block, h, context, mask, recompute=self.checkpointing)
        return self.added(x, h)

    def tokens(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to what the blocks take, ``(B, H * W, inner)``."""
        h = self.norm(x)
        if self.linear_projection:
            return self.proj_in(h.flatten(2).transpose(1, 2))
        # Once in memory order here, or every block would put its tokens in order again.
        return self.proj_in(h).flatten(2).transpose(1, 2).contiguous()

    def added(self, x: Tensor, h: Tensor) -> Tensor:
        """x, and what the blocks say of it."""
        size = x.shape[2:]
        if self.linear_projection:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, size)
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, size))
        return x + h  # in this order the sum lies in memory as x does


class AttentionBlock(nn.Module):
    """Self-attention of the pixels of ``(B, C, H, W)``, as in networks without a context.

    Returns what is to be *added* to its input; it begins at zero.

    Args:
        new_attention_order: How the 3 C channels of ``qkv`` are cut: first into q, k and v and then
            into heads, or (False) first into heads and then into the q, k and v of each.
    """

    role = "self_attention"

    def __init__(
        self,
        channels: int,
        num_heads: int,
        norm_groups: int = 32,
        new_attention_order: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_attention_order = new_attention_order
        self.backend = backend
        self.norm = GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, partners: Tensor | None = None
    ) -> Tensor:
        """``(B, C, H, W)`` from x and context, by default x, each ``(B, C, H, W)``.

        Args:
            mask: Which of the context's pixels count, ``(B, H * W)``, True counts.
            partners: The row whose keys and values each row attends to, ``(B,)``; by default its own.
        """
        q, k, v = self._project(x)
        if context is not None:
            _, k, v = self._project(context)
        if partners is not None:
            k, v, mask = k[partners], v[partners], None if mask is None else mask[partners]
        out = attend(q, k, v, mask, backend=self.backend)
        return self.proj_out(out.flatten(2).transpose(1, 2)).unflatten(2, x.shape[2:])

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each ``(B, H * W, heads, dim)``, ``dim`` innermost in memory as the fused kernels need it."""
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).contiguous()
        if self.new_attention_order:
            return qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return qkv.unflatten(2, (self.num_heads, 3, -1)).unbind(3)
