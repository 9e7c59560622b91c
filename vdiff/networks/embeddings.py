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
