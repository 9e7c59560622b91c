r"""Exact denoisers of known distributions: oracles for solvers, guiders and losses.

For data from a mixture of Gaussians the best guess of x0 has a closed form, and so has the
probability flow of a single Gaussian: :math:`(x_t - \alpha\mu) / \sqrt{\alpha^2 v + \sigma^2}` does
not change along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.denoisers.base import Denoiser
from vdiff.process import Conditioning, NoiseLevel, Prediction, X0Parameterization, generator, spread


class GaussianDenoiser(Denoiser):
    """Data is Gaussian, elementwise.

    Args:
        mean, std: Of the data: numbers, or sequences over the last axis.
    """

    language = X0Parameterization()
    mean: Tensor
    variance: Tensor

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        self.register_buffer("variance", torch.as_tensor(std, dtype=torch.float64) ** 2)

    def forward(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None) -> Prediction:
        alpha, sigma = spread(level.alpha, x_t), spread(level.sigma, x_t)
        mean, variance = self.mean.to(x_t.dtype), self.variance.to(x_t.dtype)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return Prediction(self.language, mean + gain * (x_t - alpha * mean), x_t, level)

    def flow(self, x_t: Tensor, start: NoiseLevel, stop: NoiseLevel) -> Tensor:
        """Where the probability flow takes ``x_t`` from one level (0-d) to another; exact, at pure noise too."""
        before = (start.alpha**2 * self.variance + start.sigma**2).sqrt()
        after = (stop.alpha**2 * self.variance + stop.sigma**2).sqrt()
        return stop.alpha * self.mean + (x_t - start.alpha * self.mean) * after / before

    def draw(self, shape: Sequence[int], seed: int = 0) -> Tensor:
        """Samples of the data, float64."""
        noise = torch.randn(tuple(shape), dtype=torch.float64, generator=generator("gaussian", seed))
        return self.mean + self.variance.sqrt() * noise


class GaussianMixtureDenoiser(Denoiser):
    """Data is a mixture of Gaussians with one set of axes; rows are flattened to ``D`` numbers.

    Args:
        means: Of the K components along the axes, ``(K, D)``.
        stds: Their standard deviations along the axes, ``(K, D)``.
        weights: ``(K,)``, by default equal.
        axes: Orthonormal ``(D, D)``, by default the coordinates.
    """

    language = X0Parameterization()
    means: Tensor
    variances: Tensor
    log_weights: Tensor
    axes: Tensor | None

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None, axes: Tensor | None = None) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        shares = means.new_ones(len(means)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.register_buffer("means", means)
        self.register_buffer("variances", torch.as_tensor(stds, dtype=torch.float64) ** 2)
        self.register_buffer("log_weights", (shares / shares.sum()).log())
        self.register_buffer("axes", axes)

    def forward(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None) -> Prediction:
        x0 = self.posterior_mean(x_t.flatten(1), level.alpha[:, None], level.sigma[:, None])
        return Prediction(self.language, x0.view_as(x_t), x_t, level)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``E[x0 | x_t]`` for rows ``(B, D)`` and levels that broadcast to them."""
        own = x if self.axes is None else x @ self.axes.to(x)
        means, variances = self.means.to(x), self.variances.to(x)
        alpha, sigma = alpha[..., None, :], sigma[..., None, :]
        total = alpha**2 * variances + sigma**2
        off = own[:, None] - alpha * means
        share = torch.softmax(self.log_weights.to(x) - 0.5 * (off**2 / total + total.log()).sum(-1), -1)[..., None]
        x0 = (share * (means + alpha * variances / total * off)).sum(1)
        return x0 if self.axes is None else x0 @ self.axes.to(x).T

    def flow(self, x_t: Tensor, start: NoiseLevel, stop: NoiseLevel, num_steps: int = 2000) -> Tensor:
        """The probability flow by fourth-order Runge-Kutta in the angle ``atan(sigma / alpha)``, float64.

        Levels are 0-d. The last bit to data, where the angle's axis ends, is extrapolated: the state is smooth
        in sigma^2, with an error of its fourth power at sigma = 1e-4.
        """
        begin = math.atan2(start.sigma.item(), start.alpha.item())
        end = max(math.atan2(stop.sigma.item(), stop.alpha.item()), 1e-4)
        u = x_t.double().flatten(1) / math.hypot(start.sigma.item(), start.alpha.item())

        def slope(u: Tensor, angle: float) -> Tensor:
            alpha, sigma = math.cos(angle), math.sin(angle)
            x0 = self.posterior_mean(u, u.new_full((1, 1), alpha), u.new_full((1, 1), sigma))
            return (alpha * u - x0) / sigma  # cos * noise - sin * x0 with the noise solved for

        # Even in log(tan): the flow bends on that scale near the data and on the angle's own near the noise.
        grid = _between(begin, end, num_steps)
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            h = b - a
            k1 = slope(u, a)
            k2 = slope(u + h / 2 * k1, a + h / 2)
            k3 = slope(u + h / 2 * k2, a + h / 2)
            k4 = slope(u + h * k3, b)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if stop.sigma.item() == 0:
            x = u / math.cos(end)
            x0 = self.posterior_mean(u, u.new_full((1, 1), math.cos(end)), u.new_full((1, 1), math.sin(end)))
            return (stop.alpha * (x - 0.5 * (x - x0))).view_as(x_t)
        return (u * math.hypot(stop.sigma.item(), stop.alpha.item())).view_as(x_t)

    def draw(self, num: int, seed: int = 0) -> Tensor:
        """``(num, D)`` samples of the data, float64."""
        random = generator("mixture", seed)
        pick = torch.multinomial(self.log_weights.exp(), num, True, generator=random)
        noise = torch.randn(num, self.means.shape[1], dtype=torch.float64, generator=random)
        own = self.means[pick] + self.variances[pick].sqrt() * noise
        return own if self.axes is None else own @ self.axes.T


class PowerLawDenoiser(GaussianMixtureDenoiser):
    """A mixture whose spectrum falls like that of natural images, ``1 / k^exponent``, in random axes.

    Args:
        dim: Numbers per row.
        num_components: Of the mixture.
        exponent: Of the spectrum.
        std: Overall standard deviation.
        seed: Of means, spreads and axes.
    """

    def __init__(
        self, dim: int = 64, num_components: int = 4, exponent: float = 2.0, std: float = 0.5, seed: int = 0
    ) -> None:
        random = generator("power_law", seed)
        spectrum = (1.0 + torch.arange(dim, dtype=torch.float64)) ** -exponent
        spectrum = spectrum / spectrum.mean() * std**2
        means = torch.randn(num_components, dim, dtype=torch.float64, generator=random) * spectrum.sqrt()
        spread_ = 0.15 + 0.5 * torch.rand(num_components, dim, dtype=torch.float64, generator=random)
        axes, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=random))
        super().__init__(means, (spectrum * spread_).sqrt(), axes=axes)


def _between(begin: float, end: float, num_steps: int) -> list[float]:
    """Angles even in ``log tan(angle / 2)``, whose ends are finite for angles inside (0, pi)."""
    low, high = math.log(math.tan(begin / 2)), math.log(math.tan(end / 2))
    grid = [2 * math.atan(math.exp(low + (high - low) * i / num_steps)) for i in range(num_steps + 1)]
    return [begin, *grid[1:-1], end]
