r"""Boundary conditions: what makes of any prediction a consistency function.

A consistency function takes every point of a trajectory to the trajectory's end, the level that counts as data; there
it must be the identity. A boundary writes it as :math:`f = c_{skip}\,x_t + c_{out}\,\hat x_0` with
:math:`c_{skip} = 1 / \alpha` (as good as 1) and :math:`c_{out} = 0` at that level and below it, and nearly 0 and 1 far
above it.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vdiff.process.level import NoiseLevel
from vdiff.registry import Registered


class Boundary(Registered, kind="boundary"):
    """``boundary(level) -> (c_skip, c_out)``, each of the level's shape; of ``x_t`` and of x0 as predicted."""

    @abstractmethod
    def __call__(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The coefficients at a level."""


class EDMBoundary(Boundary, name="edm"):
    r"""Consistency models': EDM's preconditioning with :math:`\sigma - \sigma_{min}` in the place of :math:`\sigma`,
    :math:`f = \frac{\sigma_d^2}{(\sigma-\sigma_{min})^2 + \sigma_d^2}\,x
    + \frac{\sigma_d\,(\sigma-\sigma_{min})}{\sqrt{\sigma^2 + \sigma_d^2}}\,F`.

    With an ``edm`` denoiser of the same ``sigma_data``, F is what its network says, and the function at first the
    denoiser's x0 but for a share of about :math:`\sigma_{min} / \sigma`. What another denoiser says is read as if EDM
    had said it. Under other schedules :math:`\sigma` is sigma / alpha.

    Args:
        sigma_min: The ratio sigma / alpha that counts as data.
        sigma_data: Standard deviation of the data.

    References:
        Song et al., arXiv:2303.01469, eq. 5 and appendix C.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_data: float = 0.5) -> None:
        if sigma_min < 0 or sigma_data <= 0:
            raise ValueError(
                f"EDMBoundary: needs sigma_min of at least 0 and sigma_data above, got {sigma_min} and {sigma_data}."
            )
        self.sigma_min, self.sigma_data = sigma_min, sigma_data

    def __call__(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        # F = (x0 - c_skip x) / c_out in EDM's own coefficients; times powers of alpha, so that pure noise is finite.
        above = (level.sigma - self.sigma_min * level.alpha).clamp(min=0)
        data = (level.alpha * self.sigma_data) ** 2
        c_out = above / level.sigma.clamp(min=torch.finfo(level.sigma.dtype).tiny)  # 0 / 0 is 0: data itself
        c_skip = level.alpha * self.sigma_data**2 * (1 / (above**2 + data) - c_out / (level.sigma**2 + data))
        return c_skip, c_out


class LCMBoundary(Boundary, name="lcm"):
    r"""Latent consistency models': :math:`c_{skip} = \frac{\sigma_d^2}{s^2 + \sigma_d^2}`,
    :math:`c_{out} = \frac{s}{\sqrt{s^2 + \sigma_d^2}}`, with s the row of the table times ``scaling``.

    The identity at row 0, and 1 % away from the plain x0 at row 1 at most: published weights barely notice it.

    Args:
        scaling: Of the row; ``timestep_scaling`` in their code.
        sigma_data: As above.
        num_rows: Of the table; between rows and on other schedules s follows the time.

    References:
        Luo et al., arXiv:2310.04378, section 3 and appendix D.
    """

    def __init__(self, scaling: float = 10.0, sigma_data: float = 0.5, num_rows: int = 1000) -> None:
        if scaling <= 0 or sigma_data <= 0 or num_rows < 1:
            raise ValueError(f"LCMBoundary: all are above 0, got {scaling}, {sigma_data} and {num_rows}.")
        self.scaling, self.sigma_data, self.num_rows = scaling, sigma_data, num_rows

    def __call__(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        s = self.scaling * (level.t * self.num_rows - 1).clamp(min=0)
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / total, s / total.sqrt()
