"""Classifier-free guidance with a scale per frame, as image-to-video and multi-view models use it.

The number of frames is that of the samples, ``b c f h w``; nobody has to say it twice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from vdiff.samplers.guiders import CFGGuider, Guidance, Guider, away_from_null
from vdiff.samplers.plan import Node


class FrameGuider(Guider, abstract=True):
    """Classifier-free guidance whose scale follows :meth:`profile`, from ``min_scale`` at 0 to ``max_scale`` at 1.

    Args:
        max_scale, min_scale: Ends of the scale; 1 is the plain conditional prediction.
        batched: See :class:`CFGGuider`.
    """

    def __init__(self, max_scale: float, min_scale: float = 1.0, batched: bool = True) -> None:
        self.max_scale, self.min_scale, self.batched = max_scale, min_scale, batched

    @abstractmethod
    def profile(self, num_frames: int) -> Sequence[float]:
        """For each frame a number in [0, 1]."""

    def scales(self, num_frames: int) -> list[float]:
        """The scale of each frame."""
        return [self.min_scale + (self.max_scale - self.min_scale) * p for p in self.profile(num_frames)]

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        is_flat = self.min_scale == self.max_scale
        return [away_from_null(self.max_scale if is_flat else self.scales) for _ in nodes]

    combine = CFGGuider.combine


class LinearGuider(FrameGuider):
    """A straight line from the first frame to the last: SVD (1 to 2.5; SVD-XT 1.5 to 3) and SV4D.

    Args:
        max_scale, min_scale, batched: See :class:`FrameGuider`.

    References:
        Blattmann et al., arXiv:2311.15127, appendix D.
    """

    def profile(self, num_frames: int) -> Sequence[float]:
        return _line(num_frames)


class TriangleGuider(FrameGuider):
    """Up to the middle of the orbit and down again: SV3D (1 to 2.5).

    Args:
        max_scale, min_scale, batched: See :class:`FrameGuider`.
        period: Length of a wave, as a share of the frames; or several waves.
        fusing: How several waves become one.

    References:
        Voleti et al., arXiv:2403.12008, section 3.
    """

    def __init__(
        self,
        max_scale: float,
        min_scale: float = 1.0,
        period: float | list[float] = 1.0,
        fusing: Literal["max", "mean", "multiply"] = "max",
        batched: bool = True,
    ) -> None:
        super().__init__(max_scale, min_scale, batched)
        self.period = [float(p) for p in (period if isinstance(period, list) else [period])]
        self.fusing = fusing
        if not self.period or min(self.period) <= 0:
            raise ValueError(f"TriangleGuider: periods must be positive, got {period}.")

    def profile(self, num_frames: int) -> Sequence[float]:
        waves = [[_triangle(v / p) for v in _line(num_frames)] for p in self.period]
        if self.fusing == "max":
            return [max(values) for values in zip(*waves, strict=True)]
        if self.fusing == "mean":
            return [sum(values) / len(values) for values in zip(*waves, strict=True)]
        product = [1.0] * num_frames
        for wave in waves:
            product = [a * b for a, b in zip(product, wave, strict=True)]
        return product


class TrapezoidGuider(FrameGuider):
    """Up over the first frames, ``max_scale`` on the plateau, down over the last: SV3D.

    The released class leaves the plateau at 1 whatever ``max_scale`` is; this one does what its name says.

    Args:
        max_scale, min_scale, batched: See :class:`FrameGuider`.
        edge: Share of the frames in each ramp.
    """

    def __init__(self, max_scale: float, min_scale: float = 1.0, edge: float = 0.1, batched: bool = True) -> None:
        super().__init__(max_scale, min_scale, batched)
        if not 0 <= edge <= 0.5:
            raise ValueError(f"TrapezoidGuider: edge must be in [0, 0.5], got {edge}.")
        self.edge = edge

    def profile(self, num_frames: int) -> Sequence[float]:
        ramp = _line(int(num_frames * self.edge))
        return [*ramp, *[1.0] * (num_frames - 2 * len(ramp)), *reversed(ramp)]


class SpatiotemporalGuider(FrameGuider):
    """Half a line over time and half a triangle over views: SV4D 2.0 (1.5 to 2 for eight views).

    Frames are time-major: all views of the first moment, then of the next.

    Args:
        max_scale, min_scale, batched: See :class:`FrameGuider`.
        num_views: How many frames share a moment.

    References:
        Yao et al., arXiv:2503.16396.
    """

    def __init__(self, max_scale: float, min_scale: float = 1.0, num_views: int = 1, batched: bool = True) -> None:
        super().__init__(max_scale, min_scale, batched)
        self.num_views = num_views

    def profile(self, num_frames: int) -> Sequence[float]:
        if num_frames % self.num_views:
            raise ValueError(f"SpatiotemporalGuider: {num_frames} frames are not made of {self.num_views} views each.")
        views = [_triangle(v) for v in _line(self.num_views)]
        return [0.5 * time + 0.5 * view for time in _line(num_frames // self.num_views) for view in views]


def _line(num: int) -> list[float]:
    return [i / max(1, num - 1) for i in range(num)]


def _triangle(v: float) -> float:
    """0 at whole numbers, 1 half way between."""
    return 2 * abs(v - (v + 0.5) // 1)
