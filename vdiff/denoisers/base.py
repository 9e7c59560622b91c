"""Denoisers: from a noisy sample and its level to a :class:`Prediction`.

A denoiser owns its network and knows which language it speaks. It scales what goes in and tells the
network the level; it never converts what comes out, which is what a :class:`Prediction` is for.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from vdiff.hooks import routed
from vdiff.process import Conditioning, NoiseLevel, Parameterization, Prediction
from vdiff.registry import Registered

NoiseInput = Literal["log_sigma", "sigma", "index", "time", "time_1000"]


class Denoiser(Registered, nn.Module, kind="denoiser"):
    """``denoiser(x_t, level, cond) -> Prediction``.

    Attributes:
        language: The parameterization of its predictions.
    """

    role = "denoiser"
    language: Parameterization

    @abstractmethod
    def forward(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None) -> Prediction:
        """What it says about ``x_t`` of shape ``(B, ...)`` at ``level`` of shape ``(B,)`` or ``(B, F)``."""

    def prepared(self, cond: Conditioning) -> Conditioning:
        """The conditions as they are taken in; a run does this once, so that its calls need not."""
        return cond

    def check(self, level: NoiseLevel, where: str) -> None:
        """Refuse levels at which its predictions mean nothing. ``level`` is on the host.

        Raises:
            UndefinedParameterizationError: see :class:`Parameterization`.
        """
        self.language.check(level, where)


class NetworkDenoiser(Denoiser, abstract=True):
    """A denoiser that asks a network.

    Args:
        network: ``(x, c_noise, cond) -> tensor``.
        c_noise: How the network is told the level: ``log_sigma`` (a quarter of the logarithm of
            sigma / alpha, as EDM), ``sigma`` (sigma / alpha), ``index`` (row of the table, from 0),
            ``time`` (in [0, 1]) or ``time_1000``.
        num_rows: Length of the table that ``index`` counts in.
    """

    def __init__(self, network: nn.Module, c_noise: NoiseInput, num_rows: int = 1000) -> None:
        super().__init__()
        self.network = network
        self.c_noise: str = c_noise
        self.num_rows = num_rows

    def forward(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None) -> Prediction:
        cond = Conditioning() if cond is None else cond
        dtype = self.dtype or x_t.dtype
        scaled = self.scale_input(x_t, level).to(dtype)
        told = cond.with_(null=None).to(dtype)
        with routed(self.network, cond, rows=len(x_t)):
            value = self.network(scaled, self.noise_input(level), told)
        return Prediction(self.language, value.to(x_t.dtype), x_t, level)

    def prepared(self, cond: Conditioning) -> Conditioning:
        """Cast to what the network computes in."""
        return cond if self.dtype is None else cond.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the network computes in; None if it has no weights."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

    def scale_input(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """What the network sees; by default ``x_t`` as it is."""
        return x_t

    def noise_input(self, level: NoiseLevel) -> Tensor:
        """``c_noise``, one number per row, float32 or float64."""
        if self.c_noise == "log_sigma":
            return (level.sigma.log() - level.alpha.log()) / 4
        if self.c_noise == "sigma":
            return level.ratio
        if self.c_noise == "index":
            return level.t * self.num_rows - 1
        return level.t if self.c_noise == "time" else level.t * 1000

    def check(self, level: NoiseLevel, where: str) -> None:
        super().check(level, where)
        told = self.noise_input(level)
        if not bool(torch.isfinite(told).all()):
            raise ValueError(
                f"{where}: a network told the level as {self.c_noise!r} cannot be told pure noise or pure data "
                f"(t = {level.t[~torch.isfinite(told)].flatten()[0].item():.6g}). Use c_noise: time or index, "
                "or levels that stop short of it."
            )
