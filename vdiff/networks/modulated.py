"""The transformer block whose normalisations are told the noise level: adaLN-zero, arXiv:2212.09748."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.networks.layers import zeroed
from vdiff.networks.positions import rotate


def linear(dim: int, out_dim: int) -> nn.Linear:
    """A linear layer as transformers begin: Glorot's uniform weights (as DiT), no bias yet."""
    layer = nn.Linear(dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TokenAttention(nn.Module):
    """Attention of tokens to a context, or to themselves, that may know where they stand.

    Args:
        dim: Length of a token.
        context_dim: Length of a context token, by default ``dim``.
        role: ``self_attention`` or ``cross_attention``.
        qk_norm: Normalise each head's queries and keys, which keeps the logits small (arXiv:2302.05442).
        backend: See :func:`vdiff.attention.attend`.
    """

    norm_q: nn.Module
    norm_k: nn.Module

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context_dim: int | None = None,
        role: str = "self_attention",
        qk_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        context_dim = context_dim or dim
        self.num_heads, self.role, self.backend = num_heads, role, backend
        self.to_q = linear(dim, dim)
        self.to_k = linear(context_dim, dim)
        self.to_v = linear(context_dim, dim)
        self.norm_q, self.norm_k = (
            nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotations: Tensor | None = None,
        partners: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, dim)`` from x ``(B, N, dim)`` and context ``(B, M, context_dim)``, by default x.

        Args:
            mask: Which context tokens count, ``(B, M)``, True counts.
            rotations: Where tokens stand, ``(N, dim / 2, 2)`` for a head's ``dim``, see
                :func:`~vdiff.networks.positions.rotations`; x and context stand in the same places.
            partners: The row whose keys and values each row attends to, ``(B,)``; by default its own.
        """
        context = x if context is None else context
        heads = (self.num_heads, -1)
        q = self.norm_q(self.to_q(x).unflatten(-1, heads))
        k = self.norm_k(self.to_k(context).unflatten(-1, heads))
        v = self.to_v(context).unflatten(-1, heads)
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        if partners is not None:
            k, v, mask = k[partners], v[partners], None if mask is None else mask[partners]
        return self.to_out(attend(q, k, v, mask, backend=self.backend).flatten(2))


class TokenFeedForward(nn.Module):
    """Two linear layers around a GELU, token by token."""

    role = "feed_forward"

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.up, self.down = linear(dim, inner_dim), linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class ModulatedBlock(nn.Module):
    r"""Self-attention, cross-attention if there is a context, and feed-forward.

    :math:`x + g\,f(\mathrm{norm}(x)(1 + s) + b)` for attention and feed-forward, with gate g, scale s and
    shift b linear in an embedding of the noise level. They begin at zero, and so does what cross-attention
    adds: a new block is the identity.

    Args:
        context_dim: Length of a context token; None for no cross-attention.
        inner_dim: Width of the feed-forward.
    """

    role = "transformer_block"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        inner_dim: int,
        context_dim: int | None = None,
        qk_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(dim, 6 * dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = TokenAttention(dim, num_heads, None, "self_attention", qk_norm, backend)
        self.norm2, self.attn2 = None, None
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(dim, eps=1e-6)
            self.attn2 = TokenAttention(dim, num_heads, context_dim, "cross_attention", qk_norm, backend)
            zeroed(self.attn2.to_out)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = TokenFeedForward(dim, inner_dim)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotations: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, dim)`` to the same.

        Args:
            emb: ``(B, G, dim)``; one for all tokens of a row, or several.
            context, mask: For cross-attention; without it the mask says which of x count.
            rotations: See :class:`TokenAttention`.
            groups: Which of the G each token is told, ``(N,)``.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = told(self.modulation(emb), groups).chunk(6, dim=-1)
        own_mask = mask if self.attn2 is None else None
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(h, mask=own_mask, rotations=rotations)
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + gate2 * self.ff(self.norm3(x) * (1 + scale2) + shift2)


class ModulatedOut(nn.Module):
    """From tokens to patches; begins at zero.

    Args:
        emb_dim: Length of what tokens are told, by default ``dim``.
        affine: Whether the normalisation has a scale and shift of its own.
    """

    def __init__(self, dim: int, out_dim: int, emb_dim: int | None = None, affine: bool = False) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(emb_dim or dim, 2 * dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)
        self.proj = zeroed(nn.Linear(dim, out_dim))

    def forward(self, x: Tensor, emb: Tensor, groups: Tensor | None = None) -> Tensor:
        shift, scale = told(self.modulation(emb), groups).chunk(2, dim=-1)
        return self.proj(self.norm(x) * (1 + scale) + shift)


def told(values: Tensor, groups: Tensor | None) -> Tensor:
    """What each token is told, ``(B, N, d)`` of ``(B, G, d)``, or ``(B, 1, d)`` where all are told the same."""
    return values if groups is None else values[:, groups]
