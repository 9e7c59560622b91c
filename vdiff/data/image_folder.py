"""One's own pictures, from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vdiff.data.base import Row
from vdiff.data.folder import BrokenFileError, FolderDataset
from vdiff.data.framing import Framing, reason, upright
from vdiff.data.listing import Listed


class ImageFolder(FolderDataset):
    """PNG, JPEG and WebP files of a folder; ``{type: image_folder, folder: flowers, size: 64}``.

    A row has ``image``, ``(channels, h, w)`` float32 in [-1, 1]; ``label`` and ``caption`` where there are any, or
    the table's fields; and ``file``, ``original_size`` and ``target_size`` (height, width) and ``crop_top_left`` (of
    the cut, in pixels of the original), which some networks are told. Pictures are turned as their EXIF says;
    transparent ones lie on ``background``; grey and colour become what ``channels`` says.

    An example asked for by number is cut in the centre. A visit of training draws crop and flip from its own key,
    which seed, epoch and example decide.

    Args:
        folder, annotations, texts, max_broken, check: See :class:`~vdiff.data.folder.FolderDataset`.
        size, crop, flip, channels: See :class:`~vdiff.data.framing.Framing`.
        background: Red, green and blue, from 0 to 255.
    """

    ranges = {"image": (-1.0, 1.0)}
    suffixes = (".png", ".jpg", ".jpeg", ".webp")

    def __init__(
        self,
        folder: Path,
        size: int | tuple[int, int],
        annotations: Path | None = None,
        texts: bool = False,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        channels: Literal[1, 3] = 3,
        background: Sequence[int] = (255, 255, 255),
        max_broken: float = 0.05,
        check: Literal["headers", "whole", "nothing"] = "headers",
    ) -> None:
        try:
            self.framing = Framing(size, crop, flip, channels)
        except ValueError as error:
            raise ValueError(f"ImageFolder: {error}") from error
        self.background = tuple(background)
        super().__init__(folder, annotations, texts, max_broken, check)

    def read(self, listed: Listed, random: np.random.Generator | None) -> Row:
        image = self.picture(listed)
        cut = self.framing.cut(image.size, random)
        left, upper = (round(place) for place in cut.box[:2])
        pixels = self.framing(image, cut)
        return {
            "image": pixels,
            **listed.fields,
            "file": self.name(listed),
            "original_size": (image.height, image.width),
            "crop_top_left": (upper, left),
            "target_size": (pixels.shape[-2], pixels.shape[-1]),
        }

    def picture(self, listed: Listed) -> Image.Image:
        """The whole picture, grey or RGB."""
        try:
            with Image.open(listed.file) as image:
                return upright(image, self.background)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like at bad bytes
            raise BrokenFileError(f"{self.name(listed)}: {reason(error)}") from error

    def look(self, listed: Listed, check: str) -> None:
        if check == "whole":
            self.picture(listed)
            return
        try:
            with Image.open(listed.file):
                pass
        except Exception as error:
            raise BrokenFileError(f"{self.name(listed)}: {reason(error)}") from error
