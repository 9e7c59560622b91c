"""The problems of the solver anchor: mixtures of Gaussians, whose denoiser and flow are known.

Three make the anchor. Twelve more are drawn from seeds: eight to tune tables on, four to test them on, which
nothing was tuned on. Errors are distances from the exact flow to data, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from vdiff.process import EDMSchedule, NoiseLevel, derive

SIGMA_MAX, SIGMA_MIN = 80.0, 0.002
BUDGETS = (5, 8, 10, 16, 20, 32, 50)
TUNING_SEEDS = tuple(range(100, 108))
UNSEEN_SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Problem:
    """Exact data, where walks start, and where the flow takes them.

    Attributes:
        title: What the data is.
        denoiser: ``E[x0 | x_t]``.
        start: States at ``sigma = 80``, ``(N, D)``, from the exact marginal.
        want: The exact flow's samples.
        metric: ``rms`` or ``median``, over samples; where samples may fall to another mode than the flow's, few of
            them would make all of the rms.
    """

    title: str
    denoiser: GaussianDenoiser | GaussianMixtureDenoiser
    start: Tensor
    want: Tensor
    metric: str

    def errors(self, got: Tensor) -> dict[str, float]:
        """Per number: the rms, and the median over samples of each one's rms."""
        rows = ((got - self.want) ** 2).mean(1)
        return {"rms": rows.mean().sqrt().item(), "median": rows.sqrt().median().item()}

    def error(self, got: Tensor) -> float:
        return self.errors(got)[self.metric]


def solve(title, denoiser, random, num_samples, metric, num_steps=800):
    """The problem with its exact answers.

    800 Runge-Kutta steps of fourth order are within 1e-6 of the limit, a fiftieth of the smallest error in the table.
    """
    if isinstance(denoiser, GaussianDenoiser):
        shape = (num_samples, len(denoiser.mean))
        x0 = denoiser.mean + denoiser.variance.sqrt() * torch.randn(shape, dtype=torch.float64, generator=random)
    else:
        pick = torch.multinomial(denoiser.log_weights.exp(), num_samples, True, generator=random)
        shape = (num_samples, denoiser.means.shape[1])
        own = torch.randn(shape, dtype=torch.float64, generator=random)
        x0 = denoiser.means[pick] + denoiser.variances[pick].sqrt() * own
        x0 = x0 if denoiser.axes is None else x0 @ denoiser.axes.T
    start = x0 + SIGMA_MAX * torch.randn(shape, dtype=torch.float64, generator=random)
    ends = EDMSchedule(SIGMA_MAX)(torch.tensor([1.0, 0.0], dtype=torch.float64))
    first, last = (NoiseLevel(*(v[i] for v in vars(ends).values())) for i in (0, 1))
    steps = {} if isinstance(denoiser, GaussianDenoiser) else {"num_steps": num_steps}
    return Problem(title, denoiser, start, denoiser.flow(start, first, last, **steps), metric)


def anchor(num_samples: int = 512) -> dict[str, Problem]:
    """Power law in 64 dimensions, a mixture in 16, one Gaussian in 32."""
    random, double = torch.Generator().manual_seed(0), {"dtype": torch.float64}
    spectrum = (1 + torch.arange(64, **double)) ** -2.0
    spectrum = spectrum / spectrum.mean() * 0.25
    means = torch.randn(4, 64, generator=random, **double) * spectrum.sqrt()
    variances = spectrum * (0.15 + 0.5 * torch.rand(4, 64, generator=random, **double))
    axes, _ = torch.linalg.qr(torch.randn(64, 64, generator=random, **double))
    power_law = GaussianMixtureDenoiser(means, variances.sqrt(), axes=axes)

    random = torch.Generator().manual_seed(0)
    means = torch.randn(8, 16, generator=random, **double) * 0.5
    stds = 0.08 + 0.22 * torch.rand(8, 16, generator=random, **double)
    mixture = GaussianMixtureDenoiser(means, stds, 0.5 + torch.rand(8, generator=random, **double))

    gaussian = GaussianDenoiser(torch.linspace(-1, 1, 32, **double), 10 ** torch.linspace(0, -2, 32, **double))
    starts = torch.Generator().manual_seed(1)
    return {
        "powerlaw": solve("64-D, 4 components, spectrum 1/k^2", power_law, starts, num_samples, "rms"),
        "gmm": solve("16-D, 8 components", mixture, starts, num_samples, "median"),
        "gauss": solve("32-D, variances 1 to 1e-4", gaussian, starts, num_samples, "rms"),
    }


def drawn(seed: int, num_samples: int = 512, num_steps: int = 800) -> Problem:
    """A mixture whose dimension, components, spectrum and scale are drawn from ``seed``."""
    random, double = torch.Generator().manual_seed(derive("anchor problem", seed)), {"dtype": torch.float64}

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=random, **double).item()

    dim, num = round(math.exp(uniform(math.log(8), math.log(96)))), round(uniform(1.5, 10.5))
    exponent, std, within = uniform(0, 2.5), uniform(0.3, 1.0), uniform(0.05, 0.6)
    spectrum = (1 + torch.arange(dim, **double)) ** -exponent
    spectrum = spectrum / spectrum.mean() * std**2
    means = torch.randn(num, dim, generator=random, **double) * (spectrum * (1 - within)).sqrt()
    variances = spectrum * within * (0.5 + torch.rand(num, dim, generator=random, **double))
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=random, **double))
    weights = 0.5 + torch.rand(num, generator=random, **double)
    denoiser = GaussianMixtureDenoiser(means, variances.sqrt(), weights, axes)
    title = f"{dim}-D, {num} components, spectrum 1/k^{exponent:.2f}, std {std:.2f}, within components {within:.0%}"
    return solve(title, denoiser, random, num_samples, "median", num_steps)
