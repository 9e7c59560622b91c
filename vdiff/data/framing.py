"""Framing: pictures of any size become pictures of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """What part of a picture is shown.

    Attributes:
        box: (left, upper, right, lower) in the picture's own pixels.
        is_flipped: Left for right.
    """

    box: tuple[float, float, float, float]
    is_flipped: bool = False


class Framing:
    """The largest cut of the right shape, resized with anti-aliasing.

    Args:
        size: Side of a square, or (height, width).
        crop: Where a cut lies that is smaller than the picture, when a random draw may say: ``center`` or ``random``.
        flip: Probability of left for right.
        channels: 1 is grey, 3 is colour; pictures of the other kind are converted.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        channels: Literal[1, 3] = 3,
    ) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 1 or not 0 <= flip <= 1 or channels not in (1, 3):
            raise ValueError(
                f"size must be at least 1, flip a probability and channels 1 or 3; got {size}, {flip} and {channels}."
            )
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got {crop!r}.")
        self.crop, self.flip, self.channels = crop, flip, channels

    def cut(self, size: tuple[int, int], random: np.random.Generator | None = None) -> Cut:
        """The cut of a picture of ``size`` (width, height); in the centre and not flipped without ``random``."""
        width, height = size
        scale = min(width / self.width, height / self.height)
        free = np.array([width - scale * self.width, height - scale * self.height])
        where, coin = (np.full(2, 0.5), 1.0) if random is None else (random.random(2), random.random())
        left, upper = free * (where if self.crop == "random" else 0.5)
        box = (float(left), float(upper), float(left + scale * self.width), float(upper + scale * self.height))
        return Cut(tuple(np.clip(box, 0, (width, height, width, height)).tolist()), coin < self.flip)

    def __call__(self, image: Image.Image, cut: Cut) -> Tensor:
        """``(channels, height, width)``, float32 in [-1, 1]."""
        if image.mode != (mode := "L" if self.channels == 1 else "RGB"):
            image = image.convert(mode)
        image = image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=cut.box)
        if cut.is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).reshape(self.height, self.width, self.channels)
        return pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1


def read_picture(file: Path, framing: Framing) -> Tensor:
    """The centre of a picture in a file, upright, on white where it is transparent: ``(channels, height, width)``.

    Raises:
        ValueError: there is no such file, or it holds no picture.
    """
    try:
        with Image.open(file) as opened:
            image = upright(opened)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like at bad bytes
        raise ValueError(f"{file}: {reason(error)}.") from error
    return framing(image, framing.cut(image.size))


def reason(error: Exception) -> str:
    """Why a picture could not be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, and not a picture"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not a picture"  # Pillow's words repeat the path
    return str(error).partition("\n")[0] or type(error).__name__


def upright(image: Image.Image, background: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """A picture as it is meant to be seen, grey or RGB: turned as its EXIF says, without transparency.

    Args:
        background: What shows through where a picture is transparent.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I") or turned.mode == "F":
        return _from_deep(turned)
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        over = turned.convert("RGBA")
        paper = Image.new("RGBA", over.size, (*background, 255))
        return Image.alpha_composite(paper, over).convert("RGB")
    return turned if turned.mode in ("L", "RGB") else turned.convert("L" if turned.mode == "1" else "RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits in 8; Pillow's own conversion would clip them at 255."""
    values: Any = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode!r} have no usual range")
    return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
