"""Handwritten digits that move: real video data without a download."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from vdiff.data.base import Dataset, Row
from vdiff.data.digits import Digits
from vdiff.process import stream

_SIDE = 8  # of a digit
_REACH = 1  # a spline writes this many pixels beyond a digit's own


class MovingDigits(Dataset):
    r"""Handwritten digits on straight paths, one per clip, at a constant velocity.

    A row has ``video``, ``(1, f, size, size)``, -1 is paper and 1 is ink, and ``label``, 0 to 9; with ``image: first``
    also its first frame as ``image``, ``(1, size, size)``. Everything about a clip follows from its number: digit
    ``index % digits`` of the split on a path of its own, whose direction is uniform, whose length is uniform in
    ``travel``, and whose start is uniform where the whole path is on the canvas. The splits have no digit in common,
    see :class:`Digits`.

    A digit stands between pixels through the quadratic B-spline,
    :math:`y_j = \sum_i x_i\,\beta^2(j - i - p)`. It reproduces polynomials up to the second degree, so
    mass, centre and spread of the ink are the same wherever the digit stands, up to the path itself and a
    constant blur of a quarter of a squared pixel. Bilinear placement would blur between pixels and not on
    them, and a digit that flickers is what a model would learn.

    Args:
        split: ``train``, ``test`` or ``all``, of digits.
        num_frames: f.
        size: Side of the square canvas in pixels.
        paths: How many clips are made of each digit.
        travel: Shortest and longest path over the whole clip, in pixels.
        dtype: ``float32`` in [-1, 1], or ``uint8`` in [0, 255].
        seed: Another one gives other paths.
        image: ``first``: a row has its first frame as ``image`` too, for networks that set a picture in motion.

    References:
        The digits: doi:10.24432/C50P49. Moving ones, of another collection: Srivastava et al., arXiv:1502.04681.
        Splines: Unser, Splines: A Perfect Fit for Signal and Image Processing, 1999.
    """

    classes = Digits.classes

    def __init__(
        self,
        split: Literal["train", "test", "all"] = "train",
        num_frames: int = 8,
        size: int = 16,
        paths: int = 8,
        travel: tuple[float, float] = (3.0, 6.0),
        dtype: Literal["float32", "uint8"] = "float32",
        seed: int = 0,
        image: Literal["first"] | None = None,
    ) -> None:
        room = size - _SIDE - 2 * _REACH
        if num_frames < 1 or paths < 1 or room < 0:
            raise ValueError(
                f"MovingDigits: num_frames {num_frames} and paths {paths} must be at least 1, and size {size} at least "
                f"{_SIDE + 2 * _REACH}."
            )
        if not 0 <= travel[0] <= travel[1] <= room:
            raise ValueError(
                f"MovingDigits: travel is (shortest, longest) from 0 to {room}, or a path leaves the canvas of {size} "
                f"pixels; got {tuple(travel)}."
            )
        if dtype not in ("float32", "uint8"):
            raise ValueError(f"MovingDigits: dtype must be 'float32' or 'uint8', got {dtype!r}.")
        if image not in ("first", None):
            raise ValueError(f"MovingDigits: image is 'first' or nothing, got {image!r}.")
        self.digits, self.image = Digits(split), image
        self.split, self.num_frames, self.size, self.paths = split, num_frames, size, paths
        self.travel, self.dtype, self.seed = (travel[0], travel[1]), dtype, seed
        values = (-1.0, 1.0) if dtype == "float32" else (0.0, 255.0)
        self.ranges = {name: values for name in (["video"] if image is None else ["video", "image"])}

    def __len__(self) -> int:
        return len(self.digits) * self.paths

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"MovingDigits: no clip {index}; there are {len(self)}.")
        number = index % len(self.digits)
        ink = (self.digits.images[number, 0].double().numpy() + 1) / 2
        rows, columns = (_placement(places, self.size) for places in self.path(index).T)
        video = (rows @ ink @ columns.swapaxes(1, 2))[None]
        row = (video * 255).round().astype(np.uint8) if self.dtype == "uint8" else (2 * video - 1).astype(np.float32)
        pixels = torch.from_numpy(row)
        shown = {} if self.image is None else {"image": pixels[:, 0].clone()}
        return {"video": pixels, **shown, "label": int(self.digits.labels[number])}

    def path(self, index: int) -> np.ndarray:
        """Where the digit's upper left pixel is in each frame, (row, column), ``(f, 2)``."""
        random = stream("moving_digits", self.seed, self.split, index)
        angle, length = random.uniform(0, 2 * math.pi), random.uniform(self.travel[0], self.travel[1])
        way = length * np.array([math.sin(angle), math.cos(angle)])
        free = self.size - _SIDE - 2 * _REACH - abs(way)
        start = _REACH + random.random(2) * free + np.maximum(-way, 0)
        return start + np.linspace(0, 1, self.num_frames)[:, None] * way


def _placement(places: np.ndarray, size: int) -> np.ndarray:
    """What pixel j of the canvas takes of pixel i of a digit that stands at each place, ``(f, size, 8)``."""
    distance = abs(np.arange(size)[:, None] - np.arange(_SIDE) - places[:, None, None])
    within, beyond = 0.75 - distance**2, np.maximum(1.5 - distance, 0) ** 2 / 2  # half a pixel
    return np.where(distance <= 0.5, within, beyond)
