"""First stages: from pixels to latents and back. Scale and shift belong to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.process import RowKeys
from vdiff.registry import Registered


class FirstStage(Registered, nn.Module, kind="first_stage"):
    """``encode`` pixels to latents, ``decode`` latents to pixels.

    Both are functions of what they are given and draw nothing: where an encoder says a distribution, the latents
    are its mean. What may be drawn is what a diffusion model is trained on, ``encode_for_training``. A
    :class:`vdiff.engine.DiffusionEngine` freezes its first stage.

    Attributes:
        pixel_range: The values it takes and gives, ``(low, high)``.
    """

    pixel_range: tuple[float, float] = (-1.0, 1.0)

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of ``pixels`` in ``pixel_range``, without gradient unless it is being trained."""

    def encode_for_training(self, pixels: Tensor, keys: RowKeys) -> Tensor:
        """Latents to train on, in the shape that :meth:`encode` gives: those, or drawn by the rows' ``keys`` where a
        first stage says so."""
        return self.encode(pixels)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of ``latents``."""

    @abstractmethod
    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of one sample of shape ``(c, h, w)`` or ``(c, f, h, w)``."""

    def check_pixels(self, pixels: Tensor, who: str) -> None:
        """That pixels are no bytes and not broken; it looks at every value.

        Raises:
            ValueError: whole numbers, not finite ones, or some far outside of ``pixel_range``; samples overshoot it a
                little.
        """
        low, high = self.pixel_range
        reach = 8 * (high - low)  # samples overshoot, and latents as pixels may do so more; bytes are further out
        least, most = (x.item() for x in pixels.detach().aminmax())  # one NaN makes both so
        if not pixels.is_floating_point() or not (low - reach <= least and most <= high + reach):
            raise ValueError(
                f"{who} takes floating pixels in [{low:g}, {high:g}]; got {pixels.dtype} from {least:g} to {most:g}. "
                "For [-1, 1] bytes are x / 127.5 - 1."
            )

    def latent_mask(self, mask: Tensor, size: Sequence[int]) -> Tensor:
        """The largest value of a mask in the cell of pixels that each latent stands for.

        Args:
            mask: ``(B, 1, h, w)`` or ``(B, 1, f, h, w)``.
            size: Of the latents, after the channels.

        Returns:
            ``(B, 1, *size)``, float32.
        """
        pool = F.adaptive_max_pool2d if mask.ndim == 4 else F.adaptive_max_pool3d
        return pool(mask.float(), tuple(size))


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What comes back from pixels that went through a first stage.

    Attributes:
        pixels: In the shape of what went in.
        latents: As ``encode`` gives them, but for what was drawn.
        penalties: What the code costs, by name, each ``(B,)`` and in units of the mean over pixel values, so that
            it can be added to a mean error per pixel value.
    """

    pixels: Tensor
    latents: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)


class Autoencoder(FirstStage, abstract=True):
    """A first stage that can be trained, by :class:`vdiff.engine.AutoencoderEngine`.

    Attributes:
        penalties: Names of the penalties it reports, and their usual weights.
    """

    penalties: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def reconstruct(self, pixels: Tensor, keys: RowKeys | None = None) -> Reconstruction:
        """Encode and decode, with gradient.

        Args:
            keys: Of the rows, for what is drawn in training; None draws nothing, as ``encode``.
        """
