"""Discretizers whose levels differ by frame: some frames are clean while others are still noise.

Their levels have the shape ``(num_steps + 1, F)``. A frame that keeps its level over a step is left exactly as it is,
whatever the solver.
"""

from __future__ import annotations

import torch

from vdiff.process.discretizers import Discretizer, TrailingDiscretizer
from vdiff.process.level import HOST, NoiseLevel
from vdiff.process.schedules import NoiseSchedule


class PyramidDiscretizer(Discretizer):
    """Every frame sets out some steps after the one before it, and waits at the first level until then.

    A frame takes ``num_steps - delay * (num_frames - 1)`` steps of its own.

    Args:
        num_frames: Frames of the video, in latents.
        delay: Steps between a frame and the next; 0 lets all go together.
        discretizer: The levels of each frame; by default ``trailing``.

    References:
        Chen et al., arXiv:2407.01392 (Diffusion Forcing), section 3.
    """

    def __init__(self, num_frames: int, delay: int = 1, discretizer: Discretizer | None = None) -> None:
        if num_frames < 1 or delay < 0:
            raise ValueError(f"PyramidDiscretizer: needs num_frames >= 1 and delay >= 0, got {num_frames} and {delay}.")
        self.num_frames, self.delay = num_frames, delay
        self.discretizer = TrailingDiscretizer() if discretizer is None else discretizer

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        waiting = self.delay * (self.num_frames - 1)
        if num_steps <= waiting:
            raise ValueError(
                f"PyramidDiscretizer: the last of {self.num_frames} frames sets out after {waiting} steps, so a walk "
                f"has more than that; got {num_steps}."
            )
        own = self.discretizer(schedule, num_steps - waiting)
        step, frame = torch.arange(num_steps + 1)[:, None], torch.arange(self.num_frames)
        return own[(step - self.delay * frame).clamp(0, num_steps - waiting)]


class RollingDiscretizer(Discretizer):
    """A window that rolls over a long video: frame f of F goes from time (f + 1) / F to f / F.

    After the walk the first frame is clean and leaves, a frame of noise joins at the end, and the next walk begins
    where this one ended. Times are rounded to the rows of a table.

    Args:
        num_frames: Frames of the window, in latents.

    References:
        Ruhe et al., arXiv:2402.09470 (Rolling Diffusion), section 3.
    """

    def __init__(self, num_frames: int) -> None:
        if num_frames < 1:
            raise ValueError(f"RollingDiscretizer: num_frames must be at least 1, got {num_frames}.")
        self.num_frames = num_frames

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        left = 1 - torch.arange(num_steps + 1, **HOST)[:, None] / num_steps
        times = (torch.arange(self.num_frames, **HOST) + left) / self.num_frames
        rows = schedule.num_rows
        return schedule(times if rows is None else (times * rows).round() / rows)


class KnownFramesDiscretizer(Discretizer):
    """Some frames are known and stay as they are; the others walk as usual: image to video, video continuation.

    The walk begins at x0, which holds the known frames: ``sampler(..., x0=video)``.

    Args:
        known: Which frames are known, counted from 0; from the end with a minus.
        num_frames: Frames of the video, in latents.
        ratio: Noise to signal of the known frames, sigma / alpha; 0 is data. A network that is told the logarithm
            cannot be told 0.
        discretizer: The levels of the others; by default ``trailing``.

    References:
        Chen et al., arXiv:2407.01392 (Diffusion Forcing), section 3.
    """

    def __init__(
        self, known: list[int], num_frames: int, ratio: float = 0.0, discretizer: Discretizer | None = None
    ) -> None:
        if not known or not all(-num_frames <= f < num_frames for f in known) or ratio < 0:
            raise ValueError(
                f"KnownFramesDiscretizer: needs some frames of {num_frames} and a ratio of at least 0, got {known} "
                f"and {ratio}."
            )
        self.known, self.num_frames, self.ratio = known, num_frames, ratio
        self.discretizer = TrailingDiscretizer() if discretizer is None else discretizer

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        own, still = self.discretizer(schedule, num_steps), schedule.at_ratio(self.ratio)
        is_known = torch.zeros(self.num_frames, dtype=torch.bool, device="cpu")
        is_known[self.known] = True
        names = ("t", "alpha", "sigma", "d_alpha", "d_sigma")
        return NoiseLevel(*(torch.where(is_known, getattr(still, n), getattr(own, n)[:, None]) for n in names))
