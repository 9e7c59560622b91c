"""Autoencoders whose encoder says a Gaussian over the code, and not the code."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdiff.first_stages.base import Autoencoder, Reconstruction
from vdiff.process import RowKeys, upload

TrainsOn = Literal["mean", "sample"]


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

    def drawn(self, keys: RowKeys) -> Tensor:
        """A sample of each row, by its key."""
        noise = upload(keys.normal("posterior", self.mean.shape[1:]), self.mean.device)
        return self.sample(noise.to(self.mean.dtype))

    def kl(self) -> Tensor:
        r""":math:`\mathrm{KL}(\cdot \,\|\, N(0, 1)) = \frac12 \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)` of each
        row in nats, at least float32, ``(B,)``."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, log_variance = self.mean.to(dtype), self.log_variance.to(dtype)
        return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class GaussianAutoencoder(Autoencoder, abstract=True):
    """Latents are those of the mean, but for what a diffusion model is trained on.

    Attributes:
        trains_on: ``mean``, or ``sample`` as latent diffusion and its kin do: then a row's latents are drawn anew at
            every step, by the row's key.
    """

    penalties = {"kl": 1e-6}  # latent diffusion's weight
    trains_on: TrainsOn = "mean"

    @abstractmethod
    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """The distribution of z given pixels, neither scaled nor shifted."""

    @abstractmethod
    def pixels(self, z: Tensor) -> Tensor:
        """Pixels of a code z, neither scaled nor shifted."""

    @abstractmethod
    def latents(self, z: Tensor) -> Tensor:
        """Latents of a code z."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean's."""
        return self.latents(self.posterior(pixels).mean)

    def encode_for_training(self, pixels: Tensor, keys: RowKeys) -> Tensor:
        if self.trains_on == "mean":
            return self.encode(pixels)
        return self.latents(self.posterior(pixels).drawn(keys))

    def reconstruct(self, pixels: Tensor, keys: RowKeys | None = None) -> Reconstruction:
        """Through a z that is drawn by the rows' keys, or through the mean without them.

        The penalty ``kl`` is in nats per pixel value.
        """
        posterior = self.posterior(pixels)
        z = posterior.mean if keys is None else posterior.drawn(keys)
        return Reconstruction(self.pixels(z), self.latents(z), {"kl": posterior.kl() / pixels[0].numel()})


def check_trains_on(said: str, who: str) -> None:
    """That it is one of the two.

    Raises:
        ValueError: it is not.
    """
    if said not in ("mean", "sample"):
        raise ValueError(f"{who}: trains_on is 'mean' or 'sample', of the encoder's Gaussian; got {said!r}.")
