r"""Noise schedules: how much signal and noise remain at each time.

Time 0 is data, time 1 is noise, and ``x_t = alpha * x0 + sigma * noise``. A schedule owns no
weights and knows no network. Its product, the :class:`NoiseLevel`, is what every other room
accepts in its place. Schedules compute in float64 and cast last.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vdiff.process.level import HOST, NoiseLevel
from vdiff.registry import Registered


class NoiseSchedule(Registered, kind="schedule"):
    """``schedule(t) -> NoiseLevel`` and its inverse, nothing else.

    Attributes:
        num_rows: Rows of a tabulated schedule, whose row ``index`` stands at ``t = (index + 1) / num_rows``;
            None where time is continuous.
    """

    num_rows: int | None = None

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The level at time ``t`` in [0, 1], any shape; in the dtype of ``t`` (Python numbers: float64)."""
        time = t if isinstance(t, Tensor) else torch.tensor(t, **HOST)
        if time.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_time(type(self).__name__, time)
        values = self.at(time.double())
        return NoiseLevel(time, *(v.to(time.dtype) for v in values))

    def at_ratio(self, ratio: Tensor | float) -> NoiseLevel:
        """The level whose ``sigma / alpha`` is ``ratio``, from 0 (data) to infinity (pure noise).

        Beyond the last row of a table: the last row.
        """
        wanted = ratio if isinstance(ratio, Tensor) else torch.tensor(ratio, **HOST)
        t = self.time_at_ratio(wanted.double())
        return NoiseLevel(t.to(wanted.dtype), *(v.to(wanted.dtype) for v in self.at(t)))

    @abstractmethod
    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``alpha, sigma, d_alpha, d_sigma`` at float64 times."""

    @abstractmethod
    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The float64 time at which ``sigma / alpha`` is ``ratio``."""


def _check_time(who: str, time: Tensor) -> None:
    """Steps of a table, 0 to 999, are a mistake that would go unnoticed."""
    if time.numel() and not (time.min() >= -1e-6 and time.max() <= 1 + 1e-6):
        raise ValueError(
            f"{who}: time runs from 0, data, to 1, noise; got {time.min().item():g} to {time.max().item():g}. "
            "Row `index` of a table of N rows stands at t = (index + 1) / N."
        )


class EDMSchedule(NoiseSchedule):
    r"""Variance exploding: the data keeps its scale, :math:`\alpha = 1`, :math:`\sigma = \sigma_{max}\,t^\rho`.

    Time is a label here: training draws ``sigma`` directly and a sampler's nodes come from its discretizer.

    Args:
        sigma_max: Noise at t = 1.
        rho: How much of the time axis goes to small noise.

    References:
        Karras et al., arXiv:2206.00364, whose eq. 5 is :math:`t \mapsto \sigma` with an offset ``sigma_min``
        at t = 0; here t = 0 is the data itself.
    """

    def __init__(self, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if sigma_max <= 0 or rho < 1:
            raise ValueError(f"EDMSchedule: needs sigma_max > 0 and rho >= 1, got {sigma_max} and {rho}.")
        self.sigma_max, self.rho = sigma_max, rho

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = self.sigma_max * t**self.rho
        return torch.ones_like(t), sigma, torch.zeros_like(t), self.sigma_max * self.rho * t ** (self.rho - 1)

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_max) ** (1 / self.rho)


class FlowSchedule(NoiseSchedule):
    r"""Straight line from data to noise: :math:`x_t = (1 - t)\,x_0 + t\,\epsilon`.

    Large images need more time at high noise; ``shift`` moves it there:
    :math:`t \mapsto s t / (1 + (s - 1) t)`, which multiplies the ratio sigma / alpha by :math:`s`.

    Args:
        shift: The :math:`s` above. 1 leaves time as it is.

    References:
        Liu et al., arXiv:2209.03003; for the shift, Esser et al., arXiv:2403.03206.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"FlowSchedule: shift must be positive, got {shift}.")
        self.shift = shift

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope = self.shift / (1 + (self.shift - 1) * t)
        sigma, d_sigma = slope * t, slope**2 / self.shift
        return (1 - t) * slope / self.shift, sigma, -d_sigma, d_sigma

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + self.shift / ratio)


class CosineSchedule(NoiseSchedule):
    r"""Variance-preserving quarter circle: :math:`\alpha = \cos(\pi t / 2)`, :math:`\sigma = \sin(\pi t / 2)`.

    References:
        Nichol & Dhariwal, arXiv:2102.09672, eq. 17 without its offset, so that t = 0 is data and t = 1 pure noise.
    """

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = math.pi / 2
        alpha, sigma = torch.sin(half * (1 - t)), torch.sin(half * t)
        return alpha, sigma, -half * sigma, half * alpha

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) / (math.pi / 2)


class TabulatedSchedule(NoiseSchedule):
    """A table of cumulative products, as DDPM-like models are trained on; between rows the angle is linear.

    Row ``index`` (0 is the least noise) stands at ``t = (index + 1) / N``; t = 0 is data. Exactly zero
    signal in the last row is legal.

    Args:
        betas: Variances of the N forward steps; or
        alphas_cumprod: The squared signal scale after each step, decreasing.

    References:
        Ho et al., arXiv:2006.11239.
    """

    def __init__(self, betas: Sequence[float] | None = None, alphas_cumprod: Sequence[float] | None = None) -> None:
        if (betas is None) == (alphas_cumprod is None):
            raise ValueError("TabulatedSchedule: give betas or alphas_cumprod, one of them.")
        if betas is not None:
            table = torch.cumprod(1 - torch.as_tensor(betas, **HOST), 0)
        else:
            table = torch.as_tensor(alphas_cumprod, **HOST)
        falls = table.ndim == 1 and len(table) > 0 and (table.diff(prepend=table.new_ones(1)) < 0).all()
        if not falls or table[-1] < 0:
            raise ValueError(
                "TabulatedSchedule: alphas_cumprod must fall from below 1 to at least 0, betas lie in (0, 1]."
            )
        self.alphas_cumprod = table
        self.num_rows = len(table)
        # The angle and its complement are kept apart, so that both ends of the quarter circle are exact.
        noise = torch.atan2((1 - table).sqrt(), table.sqrt())
        signal = torch.atan2(table.sqrt(), (1 - table).sqrt())
        self._noise_angle = torch.cat([torch.zeros(1, **HOST), noise])
        self._signal_angle = torch.cat([torch.full((1,), math.pi / 2, **HOST), signal])

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        if not isinstance(t, Tensor) or t.dtype == torch.float64:
            return super().__call__(t)
        # The time of a row is seldom a float32 number; what lies within its rounding is the row.
        assert self.num_rows is not None
        place = t.double() * self.num_rows
        row = place.round()
        exact = torch.where((place - row).abs() <= 1e-7 * self.num_rows, row, place) / self.num_rows
        return replace(super().__call__(exact).to(t.dtype), t=t)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.num_rows is not None
        place = (t.cpu() * self.num_rows).clamp(0, self.num_rows)
        low = place.floor().clamp(max=self.num_rows - 1).long()
        part = place - low
        noise = torch.lerp(self._noise_angle[low], self._noise_angle[low + 1], part)
        signal = torch.lerp(self._signal_angle[low], self._signal_angle[low + 1], part)
        slope = (self._noise_angle[low + 1] - self._noise_angle[low]) * self.num_rows
        alpha, sigma = torch.sin(signal), torch.sin(noise)
        return tuple(v.to(t.device) for v in (alpha, sigma, -sigma * slope, alpha * slope))  # type: ignore[return-value]

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        assert self.num_rows is not None
        angle = torch.atan(ratio.cpu())
        high = torch.searchsorted(self._noise_angle, angle).clamp(1, self.num_rows)
        low = high - 1
        part = (angle - self._noise_angle[low]) / (self._noise_angle[high] - self._noise_angle[low])
        return ((low + part).clamp(0, self.num_rows) / self.num_rows).to(ratio.device)


class LinearSchedule(TabulatedSchedule):
    """Betas on a straight line (DDPM). What latent-diffusion's YAML files call ``sqrt_linear``.

    Args:
        start, end: First and last beta.
        num_rows: Length of the table.

    References:
        Ho et al., arXiv:2006.11239.
    """

    def __init__(self, start: float = 1e-4, end: float = 2e-2, num_rows: int = 1000) -> None:
        super().__init__(betas=torch.linspace(start, end, num_rows, **HOST))  # type: ignore[arg-type]


class ScaledLinearSchedule(TabulatedSchedule):
    """Square roots of beta on a straight line: Stable Diffusion. What latent-diffusion's YAML files call ``linear``.

    Args:
        start, end: First and last beta.
        num_rows: Length of the table.

    References:
        Rombach et al., arXiv:2112.10752.
    """

    def __init__(self, start: float = 0.00085, end: float = 0.012, num_rows: int = 1000) -> None:
        super().__init__(betas=_scaled_linear(start, end, num_rows))  # type: ignore[arg-type]


class ZeroSNRSchedule(TabulatedSchedule):
    r"""Scaled linear, rescaled so that the last row is pure noise, with an optional shift of the SNR.

    The shift multiplies the SNR by :math:`1 / k`: :math:`\bar\alpha \mapsto \bar\alpha / (k + (1 - k)\bar\alpha)`.
    CogVideoX-2b shifts by 3 before it rescales.

    Args:
        start, end: First and last beta.
        num_rows: Length of the table.
        shift: The :math:`k` above.
        shift_order: Whether the shift comes before or after the rescaling.

    References:
        Lin et al., arXiv:2305.08891, algorithm 1; Yang et al., arXiv:2408.06072 (CogVideoX).
    """

    def __init__(
        self,
        start: float = 0.00085,
        end: float = 0.012,
        num_rows: int = 1000,
        shift: float = 1.0,
        shift_order: Literal["before", "after"] = "before",
    ) -> None:
        if shift <= 0:
            raise ValueError(f"ZeroSNRSchedule: shift must be positive, got {shift}.")
        table = torch.cumprod(1 - _scaled_linear(start, end, num_rows), 0)
        if shift_order == "before":
            table = table / (shift + (1 - shift) * table)
        root = table.sqrt()
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if shift_order == "after":
            table = table / (shift + (1 - shift) * table)
        super().__init__(alphas_cumprod=table)  # type: ignore[arg-type]


def _scaled_linear(start: float, end: float, num_rows: int) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, num_rows, **HOST) ** 2
