"""Pictures as a few tokens, for networks whose attention sees text and pictures apart."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.checkpoints import load_into, read_weights
from vdiff.conditioners.base import Embedder, Embedding, Feeds

PREFIXES = ("image_proj_model.", "image_proj.", "")


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


class ImageTokensEmbedder(Embedder, name="image_tokens", aliases=("resampler",)):
    """A picture as a few tokens: a tower, and a :class:`Resampler` after it.

    ``(B, num_tokens, width)``, or with ``frames`` that many for each frame, ``(B, frames, num_tokens, width)``:
    VideoCrafter 1 and DynamiCrafter, see :class:`vdiff.networks.LVDMUNet`.

    Args:
        tower: Pictures to tokens: ``{type: open_clip_image, output: hidden}``. It reads what it reads; what it feeds,
            drops and says as null is not asked.
        resampler: After it. Its ``num_queries`` are ``num_tokens * frames``: 16 in VideoCrafter, 256 in DynamiCrafter.
        weights: A file in VideoCrafter's, DynamiCrafter's or IP-Adapter's layout, for the resampler. None: random.
        feeds, drop: See :class:`Embedder`.
        null: ``empty``: the tokens of a picture that is all 0, mid-grey from -1 to 1, as published; ``zero``: zeros.
        frames: Frames that have tokens of their own.
        trainable: Otherwise frozen; the tower says for itself.
    """

    has_empty = True

    def __init__(
        self,
        tower: Embedder,
        resampler: Resampler | None = None,
        weights: Path | None = None,
        feeds: str = "image_tokens",
        drop: float = 0.0,
        null: Literal["zero", "empty"] = "empty",
        frames: int | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__(tower.reads, feeds, drop, null)
        self.tower, self.frames = tower, frames
        self.resampler = resampler if resampler is not None else Resampler()
        num_queries = self.resampler.latents.shape[1]
        if frames is not None and (frames < 1 or num_queries % frames):
            raise ValueError(
                f"ImageTokensEmbedder: {num_queries} queries do not divide among {frames} frames; num_queries is the "
                "number of tokens of a frame times frames."
            )
        if weights is not None and not self.resampler.latents.is_meta:
            tensors = read_weights(weights)
            prefix = next(p for p in PREFIXES if any(n.startswith(p) for n in tensors))
            load_into(self.resampler, tensors, prefix={prefix: ""}, where=f"ImageTokensEmbedder from {weights}")
        elif weights is None and not trainable and not self.resampler.latents.is_meta:
            warnings.warn(
                "ImageTokensEmbedder: the resampler has random weights and is frozen; give weights: FILE, or load an "
                "engine's.",
                stacklevel=2,
            )
        if not trainable:
            self.resampler.requires_grad_(False)

    def forward(self, value: Any) -> Tensor:
        (seen,) = self.tower.named(self.tower(value)).values()
        if seen.tensor.ndim != 3:
            raise ValueError(
                f"ImageTokensEmbedder: {type(self.tower).__name__} gives {tuple(seen.tensor.shape)}, and tokens "
                "(B, n, width) are needed; set the tower's output to hidden."
            )
        tokens = self.resampler(seen.tensor)
        return tokens if self.frames is None else tokens.unflatten(1, (self.frames, -1))

    def with_null(self, value: Any) -> tuple[Feeds, Feeds]:
        if self.null_kind == "zero":
            return super().with_null(value)
        said = self(value)
        nothing = self(torch.zeros_like(value[:1])).expand_as(said)
        return {self.feeds: Embedding(said)}, {self.feeds: Embedding(nothing)}


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(mult * dim, dim, bias=False),
    )
