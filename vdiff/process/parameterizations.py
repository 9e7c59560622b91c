r"""The languages a network may speak, all rows of one table.

Every language is a linear combination of what it is about: ``value = a * x0 + b * noise``.

============ ===================================== ==========================================
language     a                                     b
============ ===================================== ==========================================
x0           1                                     0
epsilon      0                                     1
v            -sigma                                alpha
velocity     d_alpha                               d_sigma
edm          :math:`\sigma / (\sigma_d\sqrt{T})`   :math:`-\alpha\,\sigma_d / \sqrt{T}`
============ ===================================== ==========================================

with :math:`T = \sigma^2 + \alpha^2\sigma_d^2`. Together with ``x_t = alpha x0 + sigma noise`` a value
is one 2x2 system with determinant ``det = alpha b - sigma a``. A value in another language (a', b') is
``((a' b - b' a) x_t + det' value) / det``; where det = 0 the language cannot be left (epsilon where no
signal is left, x0 where no noise is).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vdiff.process.level import NoiseLevel
from vdiff.registry import Registered, build


class UndefinedParameterizationError(ValueError):
    """A language that cannot be read at a level, such as epsilon where no signal is left."""


class Parameterization(Registered, kind="parameterization"):
    """One language: the row ``(a, b)`` of the table at a level."""

    @abstractmethod
    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """``(a, b)``, each of the level's shape."""

    def determinant(self, level: NoiseLevel) -> Tensor:
        """``alpha b - sigma a``; zero where the language is undefined."""
        a, b = self.coefficients(level)
        return level.alpha * b - level.sigma * a

    def value(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The truth in this language; what a network that speaks it should say."""
        a, b = self.coefficients(level.like(x0))
        return a * x0 + b * noise

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """``(p, q)`` with ``x0 = p * x_t + q * value``."""
        return self.translation(level, X0Parameterization())

    def translation(self, level: NoiseLevel, language: Parameterization) -> tuple[Tensor, Tensor]:
        """``(p, q)`` with ``value in language = p * x_t + q * value``: one 2x2 solve."""
        a, b = self.coefficients(level)
        into_a, into_b = language.coefficients(level)
        det = self.determinant(level)
        return (into_a * b - into_b * a) / det, language.determinant(level) / det

    def check(self, level: NoiseLevel, where: str) -> None:
        """Refuse levels at which this language says nothing about x0. ``level`` is on the host.

        Raises:
            UndefinedParameterizationError: with the time at which it happens.
        """
        p, q = self.reading(level)
        bad = ~(p.isfinite() & q.isfinite()).flatten()
        if bool(bad.any()):
            t, alpha, sigma = (value.flatten()[bad][0].item() for value in (level.t, level.alpha, level.sigma))
            raise UndefinedParameterizationError(
                f"{where}: a network that speaks {self.name!r} says nothing about x0 at t = {t:.6g}, where "
                f"alpha = {alpha:.3g} and sigma = {sigma:.3g}. Use another language (v, x0 or edm), or a schedule "
                "(discretizer) that keeps away from there."
            )

    @property
    def name(self) -> str:
        return type(self).registered_name or type(self).__name__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(vars(self).items()))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class X0Parameterization(Parameterization):
    """The clean sample itself."""

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.sigma), torch.zeros_like(level.sigma)

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.sigma), torch.ones_like(level.sigma)  # without noise, too


class EpsilonParameterization(Parameterization):
    """The noise (Ho et al., arXiv:2006.11239). Undefined where no signal is left."""

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.sigma), torch.ones_like(level.sigma)


class VParameterization(Parameterization):
    """``v = alpha * noise - sigma * x0`` (Salimans & Ho, arXiv:2202.00512)."""

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


class VelocityParameterization(Parameterization):
    """``dx_t / dt`` at fixed x0 and noise: flow matching (Lipman et al., arXiv:2210.02747)."""

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.d_alpha, level.d_sigma


class EDMParameterization(Parameterization):
    """EDM's preconditioned target ``(x0 - c_skip x_t) / c_out`` (Karras et al., arXiv:2206.00364, eq. 7 and 8).

    Args:
        sigma_data: Standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}.")
        self.sigma_data = sigma_data

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        # 1 - c_skip alpha written out, so that nothing cancels at small sigma.
        total = (level.sigma**2 + (level.alpha * self.sigma_data) ** 2).sqrt()
        return level.sigma / (self.sigma_data * total), -level.alpha * self.sigma_data / total


def parameterization(name: str | Parameterization) -> Parameterization:
    """A language by name, or itself."""
    return name if isinstance(name, Parameterization) else build({"type": name}, "parameterization")
