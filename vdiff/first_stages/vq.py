"""The autoencoder of latent diffusion whose code is a word from a codebook in every cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.first_stages.base import Reconstruction
from vdiff.first_stages.convolutional import ConvolutionalAutoencoder
from vdiff.process import RowKeys


class Codebook(nn.Module):
    """Words of ``dim`` numbers; each vector is replaced by the nearest, arXiv:1711.00937."""

    def __init__(self, num_words: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_words, 1 / num_words)

    def forward(self, z: Tensor) -> Tensor:
        """Index of the nearest word for each vector of ``(B, dim, ...)``, ``(B, ...)``."""
        flat = z.movedim(1, -1)
        dtype = torch.promote_types(z.dtype, torch.float32)  # of distances, as under autocast
        rows = flat.reshape(-1, flat.shape[-1])
        return torch.cdist(rows.to(dtype), self.embedding.weight.to(dtype)).argmin(-1).view(flat.shape[:-1])

    def words(self, index: Tensor) -> Tensor:
        """The words at ``(B, ...)``, ``(B, dim, ...)``."""
        return F.embedding(index, self.embedding.weight).movedim(-1, 1)


class VQAutoencoder(ConvolutionalAutoencoder, name="vq"):
    r"""Pictures to a vector per cell, which the decoder first replaces by the nearest of its words.

    ``encode`` gives the vector as it is and ``decode`` finds the word, so that a diffusion model works on smooth
    latents (arXiv:2112.10752, appendix G). In training the gradient passes the replacement as if it were not there;
    the penalties are those of arXiv:1711.00937, eq. 3: ``codebook``, :math:`\|sg[z] - e\|^2`, moves words to vectors,
    and ``commitment``, :math:`\|z - sg[e]\|^2`, vectors to words. Latent diffusion's own configs weigh them the other
    way round: 0.25 and 1.

    Args:
        num_words: Of the codebook: 8192 at f 4 and 16384 at f 8 in latent diffusion, with 3 and 4
            ``latent_channels`` and ``attention_factors`` ``()`` and ``(8,)``.
        latent_channels, and all other arguments: See
            :class:`vdiff.first_stages.convolutional.ConvolutionalAutoencoder`.
    """

    penalties = {"codebook": 1.0, "commitment": 0.25}

    def __init__(
        self,
        num_words: int = 8192,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 3,
        code_channels: int | None = None,
        attention_factors: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        scale: float = 1.0,
        shift: float = 0.0,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        max_rows: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, channels, channel_mult, num_res_blocks, latent_channels, code_channels, attention_factors,
            mid_attention, dropout, norm_groups, True, scale, shift, pixel_range, max_rows, tile, tile_overlap,
            checkpointing, backend,
        )  # fmt: skip
        self.quantize = Codebook(num_words, latent_channels)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.latents(self.said(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        z = latents / self.scale + self.shift
        return self.pixels(self.quantize.words(self.quantize(z)).to(z.dtype))

    def reconstruct(self, pixels: Tensor, keys: RowKeys | None = None) -> Reconstruction:
        """Nothing is drawn, with keys or without. Penalties are means over the numbers of the code."""
        z = self.said(pixels)
        words = self.quantize.words(self.quantize(z)).to(z.dtype)
        penalties = {"codebook": _distance(z.detach(), words), "commitment": _distance(z, words.detach())}
        return Reconstruction(self.pixels(z + (words - z).detach()), self.latents(z), penalties)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).to(torch.promote_types(a.dtype, torch.float32)).square().flatten(1).mean(1)
