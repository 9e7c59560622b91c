"""How well an autoencoder gives back pictures it was not trained on, and how its latents spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.data import Dataset, collate
from vdiff.engine import AutoencoderEngine
from vdiff.engine.autoencoder import psnr
from vdiff.networks import in_eval


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """A data set that went through an autoencoder.

    Attributes:
        figures: ``psnr`` in dB, the mean over examples, ``psnr_worst``, that of the worst one, and ``l1``, the mean
            absolute error per pixel value.
        inputs, reconstructions: Of the first batch, on the host.
    """

    figures: dict[str, float]
    inputs: Tensor
    reconstructions: Tensor


def reconstruction_figures(engine: AutoencoderEngine, dataset: Dataset, batch_size: int = 256) -> Reconstructions:
    """Every example through the mean of its code and back, clipped to the pixel range."""
    ratios, errors, shown = [], [], []
    for pixels in _batches(engine, dataset, batch_size):
        back = engine.reconstruct(pixels)
        ratios.append(psnr(back, pixels, engine.first_stage.pixel_range))
        errors.append((back - pixels).abs().flatten(1).mean(1))
        shown = shown or [pixels.cpu(), back.cpu()]
    ratio, error = torch.cat(ratios), torch.cat(errors)
    figures = {"psnr": ratio.mean().item(), "psnr_worst": ratio.min().item(), "l1": error.mean().item()}
    return Reconstructions(figures, *shown)


@torch.no_grad()
def latent_statistics(engine: AutoencoderEngine, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
    """``latent_mean`` and ``latent_std`` over all numbers of a data set's code z, before scale and shift.

    With ``scale = 1 / latent_std`` and ``shift = latent_mean`` the latents have mean 0 and variance 1.
    """
    first_stage, count, total, square = engine.first_stage, 0, 0.0, 0.0
    with in_eval(engine):
        for pixels in _batches(engine, dataset, batch_size):
            z = first_stage.encode(pixels).double()
            count, total, square = count + z.numel(), total + z.sum().item(), square + z.square().sum().item()
    mean = total / count
    scale, shift = getattr(first_stage, "scale", 1.0), getattr(first_stage, "shift", 0.0)
    std = max(square / count - mean**2, 0.0) ** 0.5
    return {"latent_mean": mean / scale + shift, "latent_std": std / abs(scale)}


def _batches(engine: AutoencoderEngine, dataset: Dataset, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        yield collate(rows)[engine.input_key].to(engine.device)
