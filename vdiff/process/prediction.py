"""What a denoiser says about a noisy sample, readable in every language."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vdiff.process.level import NoiseLevel
from vdiff.process.parameterizations import (
    EpsilonParameterization,
    Parameterization,
    X0Parameterization,
    parameterization,
)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer of a denoiser about ``x_t``.

    Attributes:
        language: The parameterization that ``value`` is in.
        value: The answer, shape of ``x_t``.
        x_t: The noisy sample, in float32 or float64.
        level: Its noise level, ``(B,)`` or ``(B, F)``.
        reference: What a reference policy says about the same ``x_t``, if one is attached.
        renoise: The clean sample whose noise goes on, where that is another than this prediction's (CFG++): solvers
            then take x0 from here and the noise from there.
        target: What is said a step of a teacher further down, at an ``x_t`` and ``level`` of its own, if there is a
            teacher: what the x0 of this one is to agree with (few-step training).
    """

    language: Parameterization
    value: Tensor
    x_t: Tensor
    level: NoiseLevel
    reference: Prediction | None = None
    renoise: Tensor | None = None
    target: Prediction | None = None

    def to(self, language: str | Parameterization) -> Tensor:
        """The prediction in another language."""
        language = parameterization(language)
        if language == self.language:
            return self.value
        p, q = self.language.translation(self.level.like(self.x_t), language)
        return p * self.x_t + q * self.value

    @property
    def x0(self) -> Tensor:
        """The clean sample it sees."""
        if isinstance(self.language, X0Parameterization):
            return self.value
        p, q = self.language.reading(self.level.like(self.x_t))
        return p * self.x_t + q * self.value

    @property
    def noise(self) -> Tensor:
        """The noise it sees."""
        return self.to(EpsilonParameterization())

    def with_(self, **changes: object) -> Prediction:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
