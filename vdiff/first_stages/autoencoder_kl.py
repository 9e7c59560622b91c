"""The variational autoencoder of latent diffusion, Stable Diffusion and their video models' frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.first_stages.base import Reconstruction
from vdiff.first_stages.convolutional import ConvolutionalAutoencoder
from vdiff.process import RowKeys, upload


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """A Gaussian with independent numbers.

    Attributes:
        mean, log_variance: In one shape, the first axis being rows; the log variance in [-30, 20].
    """

    mean: Tensor
    log_variance: Tensor

    @staticmethod
    def of(moments: Tensor) -> DiagonalGaussian:
        """From mean and log variance one after the other along axis 1."""
        mean, log_variance = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, log_variance.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise`` for standard Gaussian noise."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        r""":math:`\mathrm{KL}(\cdot \,\|\, N(0, 1)) = \frac12 \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)` of each
        row in nats, at least float32, ``(B,)``."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, log_variance = self.mean.to(dtype), self.log_variance.to(dtype)
        return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class AutoencoderKL(ConvolutionalAutoencoder, name="autoencoder_kl"):
    """Pictures to the mean of a Gaussian over latents, arXiv:2112.10752, section 3.1 with the KL penalty.

    By default that of Stable Diffusion 1 and 2, whose latents have ``scale=0.18215`` (0.13025 in SDXL). Published
    ones differ from it by:

    ==== ========================= ================= ===================
    f    ``channel_mult``          latent_channels   attention_factors
    ==== ========================= ================= ===================
    4    ``(1, 2, 4)``             3                 ``()``
    8    ``(1, 2, 4, 4)``          4                 ``()``
    16   ``(1, 1, 2, 2, 4)``       16                ``(16,)``
    32   ``(1, 1, 2, 2, 4, 4)``    64                ``(16, 32)``
    ==== ========================= ================= ===================

    with ``quant_conv=False`` in SVD and since SD 3. The arguments are those of
    :class:`vdiff.first_stages.convolutional.ConvolutionalAutoencoder`.
    """

    code_factor = 2
    penalties = {"kl": 1e-6}  # latent diffusion's weight

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """The distribution of z given pixels, neither scaled nor shifted."""
        return DiagonalGaussian.of(self.said(pixels))

    def code(self, said: Tensor) -> Tensor:
        return DiagonalGaussian.of(said).mean

    def reconstruct(self, pixels: Tensor, keys: RowKeys | None = None) -> Reconstruction:
        """Through a z that is drawn by the rows' keys, or through the mean without them.

        The penalty ``kl`` is in nats per pixel value.
        """
        posterior = self.posterior(pixels)
        z = posterior.mean
        if keys is not None:
            z = posterior.sample(upload(keys.normal("posterior", z.shape[1:]), z.device).to(z.dtype))
        return Reconstruction(self.pixels(z), self.scaled(z), {"kl": posterior.kl() / pixels[0].numel()})
