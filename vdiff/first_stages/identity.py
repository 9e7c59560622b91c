"""Diffusion in pixel space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vdiff.first_stages.base import FirstStage


class IdentityFirstStage(FirstStage):
    """Pixels are the latents, up to a scale and a shift: ``latent = (pixel - shift) * scale``.

    Args:
        scale, shift: Bring the data to the spread that the denoiser expects.
        pixel_range: The values of the pixels.
    """

    def __init__(self, scale: float = 1.0, shift: float = 0.0, pixel_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__()
        if scale == 0:
            raise ValueError("IdentityFirstStage: scale must not be 0.")
        self.scale, self.shift, self.pixel_range = scale, shift, pixel_range

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels if (self.scale, self.shift) == (1, 0) else (pixels - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return latents if (self.scale, self.shift) == (1, 0) else latents / self.scale + self.shift

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(pixel_shape)
