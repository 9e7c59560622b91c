"""First stages: from pixels to latents and back. Scale and shift belong to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from vdiff.registry import Registered


class FirstStage(Registered, nn.Module, kind="first_stage"):
    """``encode`` pixels to latents, ``decode`` latents to pixels.

    Attributes:
        pixel_range: The values it takes and gives, ``(low, high)``.
    """

    pixel_range: tuple[float, float] = (-1.0, 1.0)

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of ``pixels`` in ``pixel_range``, without gradient unless it is being trained."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of ``latents``."""

    @abstractmethod
    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of one sample of shape ``(c, h, w)`` or ``(c, f, h, w)``."""
