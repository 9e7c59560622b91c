"""Pictures as a few tokens, for networks whose attention sees text and pictures apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdiff.checkpoints import load_into, read_weights
from vdiff.conditioners.base import Embedder, Embedding, Feeds
from vdiff.networks import Resampler

PREFIXES = ("image_proj_model.", "image_proj.", "")


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
        self.tower, self.frames, self.is_picture = tower, frames, tower.is_picture
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

    def check(self, batch: Mapping[str, Any]) -> None:
        self.tower.check(batch)

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
