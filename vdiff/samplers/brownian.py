r"""One path of noise per sample, whatever the number of steps.

The fresh noise of the reverse process between two levels is the increment of a Brownian motion W in the
clock :math:`\alpha^2/\sigma^2`, the signal-to-noise ratio, which begins at 0 at pure noise. A walk of more
steps reads the same path at more places, so the same seeds lead to nearly the same samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vdiff.process import upload
from vdiff.samplers.noise import IidNoiseSource, Increments, NoiseSource, gaussian

_CELLS = 2**16  # of the logarithm of sigma / alpha
_LOW, _HIGH = math.log(1e-4), math.log(1e4)


class BrownianNoiseSource(NoiseSource):
    """Increments of one path per seed, as a virtual tree: nothing is stored, any place can be asked for.

    Places are rounded to 1 / 65,536 of the range of sigma / alpha from 1e4 (and beyond) to 1e-4, a step of 0.03 %.

    References:
        Li et al., arXiv:2001.01328, section 4 (the tree); with the bridge in the clock above.
    """

    def __init__(self) -> None:
        self._spans: Mapping[int, tuple[float, float]] | None = None

    def along(self, spans: Mapping[int, tuple[float, float]]) -> BrownianNoiseSource:
        source = BrownianNoiseSource()
        source._spans = dict(spans)
        return source

    def bind(self, seeds: Sequence[int], like: Tensor) -> Increments:
        spans, independent = self._spans, IidNoiseSource().bind(seeds, like)
        if spans is None:
            raise ValueError(
                "BrownianNoiseSource: which stretch of the path a draw is, only a walk knows: along(spans)."
            )
        path = _path(tuple(seeds), tuple(like.shape[1:]))

        def draw(number: int) -> Tensor:
            if number not in spans:  # noise that goes back up
                return independent(number)
            begin, end = (_cell(ratio) for ratio in spans[number])
            if begin == end:
                return independent(number)
            increment = (path(end) - path(begin)) / math.sqrt(_clock(end) - _clock(begin))
            return upload(increment.to(like.dtype), like.device)

        return draw


def _path(seeds: Sequence[int], shape: Sequence[int]) -> Callable[[int], Tensor]:
    @functools.lru_cache(maxsize=64)
    def path(cell: int) -> Tensor:
        """W at the end of a cell, float64: a bridge between the two ends of the branch it halves."""
        fresh = gaussian(seeds, shape, "path", cell).double()
        if cell in (0, _CELLS):
            return fresh * math.sqrt(_clock(cell))
        reach = cell & -cell
        left, right = cell - reach, cell + reach
        before, now, after = _clock(left), _clock(cell), _clock(right)
        share = (now - before) / (after - before)
        return torch.lerp(path(left), path(right), share) + fresh * math.sqrt(share * (after - now))

    return path


def _cell(ratio: float) -> int:
    """0 is pure noise, and whatever is above the range."""
    place = math.log(min(max(ratio, 1e-300), 1e300))
    return min(max(round((_HIGH - place) / (_HIGH - _LOW) * _CELLS), 0), _CELLS)


def _clock(cell: int) -> float:
    return math.exp(-2 * (_HIGH - cell / _CELLS * (_HIGH - _LOW))) if cell else 0.0
