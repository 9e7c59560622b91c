"""Denoisers: networks that say something about noisy samples, and exact ones for tests."""

from vdiff.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser, PowerLawDenoiser
from vdiff.denoisers.base import Denoiser, NetworkDenoiser
from vdiff.denoisers.networks import EDMDenoiser, EpsilonDenoiser, VDenoiser, VelocityDenoiser, X0Denoiser

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "EpsilonDenoiser",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "NetworkDenoiser",
    "PowerLawDenoiser",
    "VDenoiser",
    "VelocityDenoiser",
    "X0Denoiser",
]
