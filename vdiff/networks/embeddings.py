"""Numbers as vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoidal(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    r"""Cosines, then sines, of ``values`` at ``dim // 2`` geometric frequencies from 1 to ``1 / max_period``.

    :math:`\cos(v\,\omega_i), \sin(v\,\omega_i)` with :math:`\omega_i = P^{-i / (d / 2)}`, as in
    arXiv:2006.11239; the order is that of latent diffusion.

    Args:
        values: ``(...)``.
        dim: Length of a vector; an odd one ends in zero.

    Returns:
        ``(..., dim)``, float64 for float64 values and float32 for all others.
    """
    values = values if values.dtype is torch.float64 else values.float()
    half = dim // 2
    steps = torch.arange(half, dtype=values.dtype, device=values.device)
    angles = values[..., None] * torch.exp(steps * (-math.log(max_period) / half))
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def guidance_waves(scale: Tensor, dim: int) -> Tensor:
    r"""The scale of a guidance that a distilled network stands for: sines, then cosines, of :math:`1000\,(s - 1)`.

    Args:
        scale: ``(B,)``, of classifier-free guidance: 1 is the conditional prediction alone. (The papers and their code
            count from 0, so that their 7.5 is 8.5 here; diffusers' ``guidance_scale`` counts as here.)
        dim: Length of a vector, even.

    Returns:
        ``(B, dim)``, float64 for float64 values and float32 for all others. The frequencies go from 1 to exactly 1e-4,
        as in the code of Luo et al., arXiv:2310.04378.

    Raises:
        ValueError: not one number per row.
    """
    if scale.ndim != 1:
        raise ValueError(f"'guidance' is one scale per row, (B,); got {tuple(scale.shape)}.")
    values = 1000 * ((scale if scale.dtype is torch.float64 else scale.float()) - 1)
    steps = torch.arange(dim // 2, dtype=values.dtype, device=values.device)
    angles = values[:, None] * torch.exp(steps * (-math.log(10000.0) / (dim // 2 - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
