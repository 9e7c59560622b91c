"""A few tokens out of many: learned latents that look at them, as in Flamingo, arXiv:2204.14198."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdiff.attention import attend


class PerceiverAttention(nn.Module):
    """Latents attend to the picture's tokens and to themselves."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, backend: str | None = None) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.backend = num_heads, backend
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """``(B, m, dim)`` from the picture's tokens ``(B, n, dim)`` and latents ``(B, m, dim)``."""
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.to_out(attend(q, k, v, backend=self.backend).flatten(2))


class Resampler(nn.Module):
    """Any number of tokens to ``num_queries``: learned latents that look at them, layer by layer.

    Names of weights are those of VideoCrafter's and DynamiCrafter's ``image_proj_model``, and of IP-Adapter's
    ``image_proj``.

    Args:
        in_dim: Length of a token that comes.
        out_dim: Length of a token that goes.
        num_queries: How many go.
        dim: Length of a latent.
        depth: Layers of attention and feed-forward.
        num_heads, head_dim: Of each attention.
        mult: Width of the feed-forward in units of ``dim``.
        backend: See :func:`vdiff.attention.attend`.

    References:
        Alayrac et al., arXiv:2204.14198, section 3.1.1 and appendix A.1.1; Ye et al., arXiv:2308.06721.
    """

    def __init__(
        self,
        in_dim: int = 1280,
        out_dim: int = 1024,
        num_queries: int = 16,
        dim: int = 1024,
        depth: int = 4,
        num_heads: int = 12,
        head_dim: int = 64,
        mult: int = 4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(in_dim, dim)
        self.proj_out = nn.Linear(dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, num_heads, head_dim, backend), _feed_forward(dim, mult)])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n, in_dim)`` to ``(B, num_queries, out_dim)``."""
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(mult * dim, dim, bias=False),
    )
