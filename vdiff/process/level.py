"""The noise level: how much signal and how much noise is in each sample.

``x_t = alpha * x0 + sigma * noise``, at time ``t`` between 0 (data) and 1 (noise). A schedule
makes a :class:`NoiseLevel`; mixing, denoising, weighting and solving spend it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where levels are planned, whatever torch's default device and dtype are.
HOST: Any = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """How noisy each sample, or each frame of each sample, is.

    Levels stay in float32 (float64 on the host) whatever the dtype of model and data.

    Attributes:
        t: Time in [0, 1], shape ``(B,)``, per frame ``(B, F)``, or ``()`` on the host.
        alpha, sigma: Scale of signal and of noise, same shape.
        d_alpha, d_sigma: Their derivatives in ``t``, same shape.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def ratio(self) -> Tensor:
        """Noise to signal, ``sigma / alpha``; infinite where no signal is left. The "sigma" of EDM."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Tensor:
        """Signal to noise, ``(alpha / sigma)^2``."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        return 2 * (self.alpha.log() - self.sigma.log())

    def like(self, x: Tensor) -> NoiseLevel:
        """The same level with axes to multiply ``x``: ``(B,)`` over all of a row, ``(B, F)`` over ``b c f h w``."""
        return NoiseLevel(*(spread(value, x) for value in self._values()))

    def mix(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``alpha * x0 + sigma * noise``."""
        return spread(self.alpha, x0) * x0 + spread(self.sigma, x0) * noise

    def to(self, *args: torch.device | torch.dtype | str) -> NoiseLevel:
        return NoiseLevel(*(value.to(*args) for value in self._values()))  # type: ignore[call-overload]

    def upload(self, device: torch.device) -> NoiseLevel:
        """On the device, in one copy for which the host does not wait."""
        return NoiseLevel(*upload(torch.stack(self._values()), device).unbind())

    def paired(self, lower: NoiseLevel) -> LevelPair:
        """This level with a lower one beside it."""
        return LevelPair(self.t, self.alpha, self.sigma, self.d_alpha, self.d_sigma, lower)

    def __getitem__(self, index: Any) -> NoiseLevel:
        return NoiseLevel(*(value[index] for value in self._values()))

    def __len__(self) -> int:
        return len(self.t)

    def _values(self) -> list[Tensor]:
        return [self.t, self.alpha, self.sigma, self.d_alpha, self.d_sigma]

    @staticmethod
    def cat(levels: list[NoiseLevel]) -> NoiseLevel:
        """Levels one after the other along the first axis."""
        return NoiseLevel(*(torch.cat(values) for values in zip(*(n._values() for n in levels), strict=True)))


@dataclass(frozen=True, eq=False)
class LevelPair(NoiseLevel):
    """A level and a lower one beside it: the two ends of a step, between which few-step training compares.

    Attributes:
        lower: As many levels, none with more noise.
    """

    lower: NoiseLevel

    def to(self, *args: torch.device | torch.dtype | str) -> LevelPair:
        return super().to(*args).paired(self.lower.to(*args))

    def upload(self, device: torch.device) -> LevelPair:
        return super().upload(device).paired(self.lower.upload(device))

    def __getitem__(self, index: Any) -> LevelPair:
        return super().__getitem__(index).paired(self.lower[index])


def upload(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on the device; the host does not wait for it: CUDA copies pinned memory while work goes on."""
    if device.type != "cuda":
        return value.to(device)
    return (value if value.is_cuda else value.pin_memory()).to(device, non_blocking=True)


def spread(value: Tensor, x: Tensor) -> Tensor:
    """``value``, one number per row or per frame, with the axes of ``x``: ``(B,)`` or ``(B, F)`` on ``b c f h w``."""
    if value.ndim == 2 and x.ndim > 2:
        value = value[:, None]
    return value[(...,) + (None,) * (x.ndim - value.ndim)] if value.ndim else value
