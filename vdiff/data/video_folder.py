"""One's own videos, from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from vdiff.data.base import Row
from vdiff.data.folder import BrokenFileError, FolderDataset
from vdiff.data.framing import Framing
from vdiff.data.listing import Listed
from vdiff.data.video_file import FrameTable, frame_table, read_frames


class VideoFolder(FolderDataset):
    """Clips of the video files of a folder; ``{type: video_folder, folder: clips, size: 64, num_frames: 16, fps: 8}``.

    A row has ``video``, ``(channels, f, h, w)`` float32 in [-1, 1]; ``label`` and ``caption`` where there are any,
    or the table's fields; and ``file``, ``fps`` (of the clip, a float) and ``start`` (its first frame's number). Asked
    for, ``image``, ``(channels, h, w)``, is one of the clip's frames: what image-to-video models are told.
    Frames are exact: the numbered ones of the file, whatever its key frames, B-frames, start time and rate.

    An example asked for by number is the clip in the middle, cut in the centre. A visit of training draws place,
    crop and flip from its own key, which seed, epoch and example decide. A file too short for a clip is broken.

    Args:
        folder, annotations, texts, max_broken: See :class:`~vdiff.data.folder.FolderDataset`.
        size, crop, flip, channels: See :class:`~vdiff.data.framing.Framing`; one cut for all frames.
        num_frames: f.
        fps: Show what was on display every 1/fps seconds; frames repeat where the file has fewer.
        stride: Every so many frames instead; 1 if neither is given.
        image: Which frame a row has as ``image`` as well: the ``first``, or in training a ``random`` one, as
            DynamiCrafter was trained; None: there is no such field.
        check: ``headers`` also reads the times of all frames, ``whole`` also decodes the last one.
    """

    ranges = {"video": (-1.0, 1.0), "image": (-1.0, 1.0)}
    suffixes = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")

    def __init__(
        self,
        folder: Path,
        size: int | tuple[int, int],
        num_frames: int,
        fps: float | None = None,
        stride: int | None = None,
        annotations: Path | None = None,
        texts: bool = False,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        channels: Literal[1, 3] = 3,
        max_broken: float = 0.05,
        check: Literal["headers", "whole", "nothing"] = "headers",
        image: Literal["first", "random"] | None = None,
    ) -> None:
        if image not in ("first", "random", None):
            raise ValueError(f"VideoFolder: image is 'first', 'random' or nothing, got {image!r}.")
        if fps is not None and stride is not None:
            raise ValueError(
                f"VideoFolder: fps {fps:g} and stride {stride} both say how far frames are apart; give one."
            )
        if num_frames < 1 or (fps is not None and not fps > 0) or (stride is not None and stride < 1):
            raise ValueError(
                f"VideoFolder: num_frames and stride must be at least 1 and fps above 0; got {num_frames}, {stride} "
                f"and {fps}."
            )
        try:
            self.framing = Framing(size, crop, flip, channels)
        except ValueError as error:
            raise ValueError(f"VideoFolder: {error}") from error
        self.num_frames, self.fps, self.stride, self.image = num_frames, fps, stride or 1, image
        super().__init__(folder, annotations, texts, max_broken, check)

    def read(self, listed: Listed, random: np.random.Generator | None) -> Row:
        table = self._table(listed)
        starts = self.num_starts(table)
        start = (starts - 1) // 2 if random is None else int(random.integers(starts))
        try:
            frames = [Image.fromarray(pixels) for pixels in read_frames(listed.file, self.clip(table, start))]
        except ValueError as error:
            raise self._broken(listed, error) from error
        cut = self.framing.cut(frames[0].size, random)
        video = torch.stack([self.framing(frame, cut) for frame in frames], dim=1)
        shown = int(random.integers(len(frames))) if self.image == "random" and random is not None else 0
        return {
            "video": video,
            **({} if self.image is None else {"image": video[:, shown].clone()}),
            **listed.fields,
            "file": self.name(listed),
            "fps": table.fps / self.stride if self.fps is None else self.fps,
            "start": start,
        }

    def clip(self, table: FrameTable, start: int) -> list[int]:
        """Numbers of the frames of the clip that begins at frame ``start``."""
        if self.fps is None:
            return [start + i * self.stride for i in range(self.num_frames)]
        begin = (table.times[start] - table.times[0]) * table.tick
        return [table.shown_at(begin + i / self.fps) for i in range(self.num_frames)]

    def num_starts(self, table: FrameTable) -> int:
        """How many frames of a file a clip can begin at: 0 if the file is too short."""
        if self.fps is None:
            return max(len(table) - (self.num_frames - 1) * self.stride, 0)
        last = (table.times[-1] - table.times[0]) * table.tick - (self.num_frames - 1) / self.fps
        return 0 if last < -table.tick / 2 else table.shown_at(max(last, 0.0)) + 1

    def look(self, listed: Listed, check: str) -> None:
        table = self._table(listed)
        if check == "whole":
            try:
                read_frames(listed.file, [len(table) - 1])
            except ValueError as error:
                raise self._broken(listed, error) from error

    def _table(self, listed: Listed) -> FrameTable:
        try:
            table = frame_table(listed.file)
        except ValueError as error:
            raise self._broken(listed, error) from error
        if not self.num_starts(table):
            apart = f"{self.stride} apart" if self.fps is None else f"at {self.fps:g} fps"
            raise BrokenFileError(
                f"{self.name(listed)}: too short, {len(table)} frames at {table.fps:.4g} fps for {self.num_frames} "
                f"{apart}"
            )
        return table

    def _broken(self, listed: Listed, error: ValueError) -> BrokenFileError:
        return BrokenFileError(f"{self.name(listed)}: {str(error).removeprefix(f'{listed.file}: ').rstrip('.')}")
