"""Noise sources: fresh noise for stochastic samplers, keyed by (sample seed, interval).

The noise of a sample depends on its own seed and on which draw of the walk it is, so it is bitwise the
same whatever batch the sample is in, and on whatever device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vdiff.process import normal
from vdiff.registry import Registered

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

    @abstractmethod
    def bind(self, seeds: Sequence[int], like: Tensor) -> Increments:
        """For a batch with one seed per row: the draw of a number, standard Gaussian, shape and place of ``like``."""


class IidNoiseSource(NoiseSource):
    """Independent noise for every draw."""

    def bind(self, seeds: Sequence[int], like: Tensor) -> Increments:
        if len(seeds) != len(like):
            raise ValueError(f"IidNoiseSource: {len(seeds)} seeds for {len(like)} samples.")
        shape, pin = like.shape[1:], like.device.type == "cuda"

        def draw(number: int) -> Tensor:
            noise = gaussian(seeds, shape, "increment", number).to(like.dtype)
            return (noise.pin_memory() if pin else noise).to(like.device, non_blocking=True)

        return draw
