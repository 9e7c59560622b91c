r"""Weightings: how much the error at a level counts.

A weighting says how much the squared error *of x0* counts. In another language the same error is larger
by the squared ratio of determinants (see :mod:`vdiff.process.parameterizations`), so a weighting means the
same whatever the network speaks: ``min_snr`` on a v network is Hang et al.'s v formula, with no option to set.
Only ``unit`` weighs the error in the very language in which it is measured.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vdiff.process import NoiseLevel, Parameterization
from vdiff.registry import Registered


class Weighting(Registered, kind="weighting"):
    """A weight as a function of the level."""

    def __call__(self, level: NoiseLevel, language: Parameterization) -> Tensor:
        """Weight of the squared error measured in ``language``; the shape of the level."""
        # An error d in the language is an error -sigma / det * d of x0.
        return self.on_x0(level) * (level.sigma / language.determinant(level)) ** 2

    @abstractmethod
    def on_x0(self, level: NoiseLevel) -> Tensor:
        """Weight of the squared error of x0."""


class UnitWeighting(Weighting):
    """1 in the language of the loss: with the network's own language, its plain squared error."""

    def __call__(self, level: NoiseLevel, language: Parameterization) -> Tensor:
        return torch.ones_like(level.sigma)

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return torch.ones_like(level.sigma)


class EDMWeighting(Weighting):
    r""":math:`(\sigma^2 + \sigma_d^2) / (\sigma\sigma_d)^2`, which is 1 on EDM's own target.

    Args:
        sigma_data: Standard deviation of the data.

    References:
        Karras et al., arXiv:2206.00364, table 1.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return self.sigma_data**-2 + level.snr


class SNRWeighting(Weighting):
    """The signal-to-noise ratio to a power, between two bounds.

    Args:
        power: 1 weighs like a plain epsilon loss.
        low: Least SNR counted; 1 is the truncated SNR of arXiv:2202.00512.
        high: Largest SNR counted.
    """

    def __init__(self, power: float = 1.0, low: float = 0.0, high: float = float("inf")) -> None:
        self.power, self.low, self.high = power, low, high

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return level.snr.clamp(self.low, self.high) ** self.power


class MinSNRWeighting(Weighting):
    """``min(SNR, gamma)``: low noise counts no more than it is worth.

    Args:
        gamma: 5 is usual.

    References:
        Hang et al., arXiv:2303.09556, eq. 8 (v and epsilon forms follow from the language).
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"MinSNRWeighting: gamma must be positive, got {gamma}.")
        self.gamma = gamma

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return level.snr.clamp(max=self.gamma)


class VWeighting(Weighting):
    """``1 + SNR``: a plain v loss, whatever the network speaks."""

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return 1 + level.snr


class EpsilonWeighting(Weighting):
    """``SNR``: a plain epsilon loss, whatever the network speaks."""

    def on_x0(self, level: NoiseLevel) -> Tensor:
        return level.snr
