"""The engine that trains a first stage: pixels in, the same pixels out, through a code that costs something."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.engine.base import Batch, Engine
from vdiff.first_stages import Autoencoder, Reconstruction
from vdiff.losses import LossValues
from vdiff.mixins import Mixin
from vdiff.networks import in_eval
from vdiff.process import RowKeys
from vdiff.registry import did_you_mean


class AutoencoderEngine(Engine, name="autoencoder"):
    """Trains a first stage to give back what it was given. No discriminator and no network that must be downloaded.

    The loss of a row is ``|x - y|`` or its square, averaged over pixel values, plus ``gradient`` times the same error
    of the differences between neighbouring pixels, which sees edges, plus the first stage's penalties. Penalties are
    per pixel value too, so that weights are those of latent diffusion, where everything is summed instead.

    In training the code is drawn where the first stage draws one, by the rows' keys; in eval mode it is the mean.

    Args:
        input_key: The batch field with the pixels.
        first_stage: What is trained.
        reconstruction: ``l1``, the absolute error, or ``l2``, the squared.
        gradient: Weight of the error of differences.
        gradient_scales: At how many sizes, each half the one before; their errors are averaged.
        penalties: Weights of the first stage's penalties by name, by default its own, such as ``{"kl": 1e-6}``.
        mixins: By name, attached to the engine in this order.
        sample_shape: Shape of one sample in pixels, if it is to be checked.
    """

    def __init__(
        self,
        input_key: str,
        first_stage: Autoencoder,
        reconstruction: Literal["l1", "l2"] = "l1",
        gradient: float = 0.5,
        gradient_scales: int = 1,
        penalties: dict[str, float] | None = None,
        mixins: dict[str, Mixin] | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(first_stage, Autoencoder):
            raise ValueError(
                f"AutoencoderEngine: {type(first_stage).__name__} has nothing to train; take an autoencoder."
            )
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"AutoencoderEngine: reconstruction is 'l1' or 'l2', got {reconstruction!r}.")
        if gradient < 0 or gradient_scales < 1:
            raise ValueError(
                f"AutoencoderEngine: gradient is at least 0 and gradient_scales at least 1, got {gradient} and "
                f"{gradient_scales}."
            )
        known = type(first_stage).penalties
        for name in penalties or {}:
            if name not in known:
                raise ValueError(
                    f"AutoencoderEngine: {type(first_stage).__name__} has no penalty {name!r}."
                    f"{did_you_mean(name, known)} It has: {', '.join(known) or 'none'}."
                )
        self.input_key, self.first_stage, self.sample_shape = input_key, first_stage, sample_shape
        self.reconstruction, self.gradient, self.gradient_scales = reconstruction, gradient, gradient_scales
        self.penalties = dict(known) | (penalties or {})
        self.weights = "as constructed"
        self.attach(mixins)

    def training_step(self, batch: Batch) -> LossValues:
        """One value per row; the trainer averages."""
        pixels = batch[self.input_key]
        found = self.first_stage.reconstruct(pixels, RowKeys.of(batch) if self.training else None)
        return self.compare(found, pixels)

    def compare(self, found: Reconstruction, pixels: Tensor) -> LossValues:
        """The loss, and as metrics its parts, PSNR in dB, and mean and mean square of the latents."""
        dtype = torch.promote_types(found.pixels.dtype, torch.float32)
        back, pixels = found.pixels.to(dtype), pixels.to(dtype)
        parts = {"reconstruction": self._error(back - pixels), "gradient": self._gradient(back - pixels)}
        per_row = parts["reconstruction"] + self.gradient * parts["gradient"]
        for name, penalty in found.penalties.items():
            per_row = per_row + self.penalties[name] * penalty
        latents = found.latents.to(dtype).flatten(1)
        parts |= found.penalties
        parts |= {"psnr": psnr(back, pixels, self.first_stage.pixel_range)}
        parts |= {"latent_mean": latents.mean(1), "latent_square": latents.square().mean(1)}
        return LossValues(per_row.float(), {name: value.detach().float() for name, value in parts.items()})

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Pixels and back, as a diffusion model's samples would come out, within ``pixel_range``."""
        low, high = self.first_stage.pixel_range
        with in_eval(self):
            return self.first_stage.decode(self.first_stage.encode(pixels)).clamp(low, high)

    def pictures(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """Inputs and reconstructions."""
        pixels = batch[self.input_key]
        return {"inputs": pixels, "reconstructions": self.reconstruct(pixels)}

    def compile(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the halves of the first stage in place."""
        for name in ("encoder", "decoder"):
            half = getattr(self.first_stage, name, None)
            if isinstance(half, nn.Module):
                half.compile(**options)

    def _error(self, difference: Tensor) -> Tensor:
        error = difference.abs() if self.reconstruction == "l1" else difference.square()
        return error.flatten(1).mean(1)

    def _gradient(self, difference: Tensor) -> Tensor:
        """The error of the differences of neighbours in height and width; it is linear, so that of the difference."""
        if difference.ndim == 5:
            difference = difference.transpose(1, 2).flatten(1, 2)  # frames as channels
        if min(difference.shape[-2:]) < 2**self.gradient_scales:
            raise ValueError(
                f"AutoencoderEngine: pictures of {tuple(difference.shape[-2:])} have no neighbours at "
                f"gradient_scales {self.gradient_scales}; take fewer scales."
            )
        total = torch.zeros(len(difference), dtype=difference.dtype, device=difference.device)
        for scale in range(self.gradient_scales):
            if scale:
                difference = F.avg_pool2d(difference, 2)
            total = total + self._error(difference.diff(dim=-1)) + self._error(difference.diff(dim=-2))
        return total / self.gradient_scales


def psnr(images: Tensor, truth: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    r"""Peak signal-to-noise ratio of each row in dB, :math:`10 \log_{10}(range^2 / MSE)`, ``(B,)``.

    Images are clipped to the range first, as they would be to be shown. Equal ones score 100 dB.
    """
    low, high = pixel_range
    error = (images.clamp(low, high) - truth).square().flatten(1).mean(1)
    return 10 * (math.log10((high - low) ** 2) - error.clamp(min=1e-10 * (high - low) ** 2).log10())
