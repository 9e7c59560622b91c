"""Noise sources: fresh noise for stochastic samplers, keyed by (sample seed, interval).

The noise of a sample depends on its own seed and on which draw of the walk it is, so it is bitwise the
same whatever batch the sample is in, and on whatever device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vdiff.process import normal, upload
from vdiff.registry import Registered
from vdiff.samplers.plan import Node, Stage

Increments = Callable[[int], Tensor]


def gaussian(seeds: Sequence[int], shape: Sequence[int], *purpose: int | str) -> Tensor:
    """Standard Gaussian noise, one row per seed, float32 on the host, shape ``(len(seeds), *shape)``."""
    return torch.stack([normal(shape, "sample", seed, *purpose) for seed in seeds])


class Drawn:
    """Increments drawn ahead, by number: what a compiled or captured walk reads."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __call__(self, number: int) -> Tensor:
        return self.tensors[number]


class NoiseSource(Registered, kind="noise_source"):
    """Where a stochastic sampler's noise comes from."""

    def along(self, spans: Mapping[int, tuple[float, float]]) -> NoiseSource:
        """The source for a walk whose draws lie between these ratios, by number; by default it does not care."""
        return self

    @abstractmethod
    def bind(self, seeds: Sequence[int], like: Tensor) -> Increments:
        """For a batch with one seed per row: the draw of a number, standard Gaussian, shape and place of ``like``."""


class IidNoiseSource(NoiseSource):
    """Independent noise for every draw."""

    def bind(self, seeds: Sequence[int], like: Tensor) -> Increments:
        if len(seeds) != len(like):
            raise ValueError(f"IidNoiseSource: {len(seeds)} seeds for {len(like)} samples.")
        shape, dtype, device = like.shape[1:], like.dtype, like.device

        def draw(number: int) -> Tensor:
            return upload(gaussian(seeds, shape, "increment", number).to(dtype), device)

        return draw


def spans(stages: Sequence[Stage], last: Node) -> dict[int, tuple[float, float]]:
    """Between which ratios sigma / alpha the draws of a walk lie, by number, ``last`` its end.

    Noise that an update adds belongs to the stretch of its step since the noise before it, so that the stretches
    of a walk never overlap. Noise that is added to go back up (churn) belongs to none.
    """
    levels = [stage.node.ratio for stage in stages] + [last.ratio]
    found, begin = {}, levels[0]
    for i, stage in enumerate(stages):
        if "noise" in stage.update:
            found[2 * i + 1] = (begin, levels[i + 1])
        if "noise" in stage.update or stage.ends_step:
            begin = levels[i + 1]
    return found
