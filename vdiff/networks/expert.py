"""The transformer block of CogVideoX: text and video in one sequence, told the noise level each in its own way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdiff.networks.layers import zeroed
from vdiff.networks.modulated import TokenAttention, TokenFeedForward, told


class ExpertBlock(nn.Module):
    r"""Attention and feed-forward of text and video tokens together, with expert adaptive layer norm.

    :math:`x + g\,f(\mathrm{norm}(x)(1 + s) + b)` for attention and feed-forward as in
    :class:`~vdiff.networks.modulated.ModulatedBlock`, with all weights shared but those that make gate g, scale s and
    shift b: the text has its own (arXiv:2408.06072, section 2.2). They begin at zero: a new block is the identity.

    Args:
        emb_dim: Length of what tokens are told.
        inner_dim: Width of the feed-forward.
    """

    role = "transformer_block"

    def __init__(
        self, dim: int, num_heads: int, inner_dim: int, emb_dim: int = 512, backend: str | None = None
    ) -> None:
        super().__init__()
        # For video, then for text: shift, scale and gate of attention, then of feed-forward.
        self.modulation = zeroed(nn.Linear(emb_dim, 12 * dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = TokenAttention(dim, num_heads, backend=backend)
        self.attn1.norm_q, self.attn1.norm_k = (nn.LayerNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = TokenFeedForward(dim, inner_dim)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        num_text: int,
        mask: Tensor | None = None,
        rotations: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, dim)`` to the same, the text being the first ``num_text`` of N.

        Args:
            emb: ``(B, G, emb_dim)``; one for all tokens of a row, or several, of which the text is told the mean.
            mask: Which tokens count, ``(B, N)``, True counts.
            rotations: See :class:`~vdiff.networks.modulated.TokenAttention`.
            groups: Which of the G each video token is told, ``(N - num_text,)``.
        """
        of_video, of_text = self.modulation(emb).chunk(2, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(
            of_text.mean(1, keepdim=True).chunk(6, dim=-1), told(of_video, groups).chunk(6, dim=-1), strict=True
        )
        h = _modulated(self.norm1(x), shift1, scale1, num_text)
        x = _gated(x, gate1, self.attn1(h, mask=mask, rotations=rotations), num_text)
        h = _modulated(self.norm2(x), shift2, scale2, num_text)
        return _gated(x, gate2, self.ff(h), num_text)


Pair = tuple[Tensor, Tensor]  # for text and for video


def _modulated(x: Tensor, shift: Pair, scale: Pair, num_text: int) -> Tensor:
    """``x * (1 + scale) + shift``."""
    parts = _parts(x, num_text)
    return torch.cat([torch.addcmul(b, part, 1 + s) for part, b, s in zip(parts, shift, scale, strict=True)], dim=1)


def _gated(x: Tensor, gate: Pair, h: Tensor, num_text: int) -> Tensor:
    """``x + gate * h``."""
    parts = zip(_parts(x, num_text), gate, _parts(h, num_text), strict=True)
    return torch.cat([torch.addcmul(*part) for part in parts], dim=1)


def _parts(x: Tensor, num_text: int) -> tuple[Tensor, ...]:
    """Text and video; cut at once, for the way back is then one operation."""
    return x.split((num_text, x.shape[1] - num_text), dim=1)
