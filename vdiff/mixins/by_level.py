"""How much of a mixin at which noise level: a scale that follows the walk of sampling."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin
from vdiff.process import Conditioning, NoiseLevel


class ByLevel(Mixin):
    """Multiplies the gate of another mixin by a function of sigma / alpha.

    It sits at the denoiser, the one place that is told the level, and asks for more or less of ``mixin`` row by row.
    So it acts in training and under every sampler and guider, and costs no synchronisation and no graph of its own. A
    video has one level; one per frame is an error::

        lora.attach(engine)
        ByLevel("lora", {0.3: 0.0, 3.0: 1.0}).attach(engine)  # composition only: nothing below 0.3, all above 3

    Args:
        mixin: Name of the mixin, attached to the network.
        scales: Scale by sigma / alpha. Linear in the logarithm between them, constant outside.
        on: The denoiser.
        name, scale: See :class:`Mixin`. At scale 0 the other mixin is as without it.
    """

    def __init__(
        self,
        mixin: str,
        scales: dict[float, float],
        on: On = "role:denoiser",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        points = sorted((float(ratio), float(value)) for ratio, value in scales.items())
        if not points or not all(0 < ratio < math.inf and math.isfinite(value) for ratio, value in points):
            raise ValueError(f"ByLevel: scales are numbers by sigma / alpha, which is positive; got {scales!r}.")
        self.mixin, self.scales = mixin, dict(points)

    def part(self, module: nn.Module, site: str) -> ByLevelPart:
        return ByLevelPart(self.mixin, self.scales)


class ByLevelPart(Part):
    """At a denoiser, called with ``(x_t, level, cond)``."""

    def __init__(self, gated: str, scales: dict[float, float]) -> None:
        super().__init__()
        self.gated = gated
        self.points = [(math.log(ratio), value) for ratio, value in scales.items()]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x_t, level, cond = _arguments(*args, **kwargs)
        if level.t.ndim > 1:
            raise ValueError(
                f"ByLevel: {self.gated!r} is gated per row, and the level is per frame, {tuple(level.t.shape)}."
            )
        cond = Conditioning() if cond is None else cond
        wanted = 1 + self.amount(x_t.new_ones(len(x_t))) * (self.at(level) - 1)
        gate = cond.gates.get(self.gated)
        wanted = wanted.expand(len(x_t))
        gates = {**cond.gates, self.gated: wanted if gate is None else gate * wanted}
        return (x_t, level, cond.with_(gates=gates)), {}

    def at(self, level: NoiseLevel) -> Tensor:
        """The scale at a level, ``(B,)``; by comparisons on the level's own device."""
        at = level.sigma.log() - level.alpha.log()
        value = torch.full_like(at, self.points[0][1])
        for (left, low), (right, high) in itertools.pairwise(self.points):
            value = value + (high - low) * ((at - left) / (right - left)).clamp(0, 1)
        return value.to(torch.float32)


def _arguments(
    x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None
) -> tuple[Tensor, NoiseLevel, Conditioning | None]:
    return x_t, level, cond
