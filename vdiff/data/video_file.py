"""Reading a video by frame number, exactly.

Seeking in a video lands on a key frame near the place that was asked for, not on it; frames are stored in
another order than they are shown in (B-frames); streams may begin at any time; rates vary. So nothing is
counted or computed from a rate here. The table of a file is made of the times in its packets, and a frame is the
right one if it bears the time that the table has under its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FrameTable:
    """When the frames of a file are shown.

    Attributes:
        times: Of every frame, rising, in units of ``tick``.
        keys: Of the key frames among them, from which decoding can begin.
        tick: In seconds.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    tick: float

    def __len__(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> float:
        """Frames per second, the mean over the file; 1 for a single frame."""
        if len(self) < 2:
            return 1.0
        return (len(self) - 1) / ((self.times[-1] - self.times[0]) * self.tick)

    def shown_at(self, seconds: float) -> int:
        """The frame on display so long after the first one appeared."""
        tick = self.times[0] + round(seconds / self.tick + 1e-6)
        return max(bisect_right(self.times, tick) - 1, 0)

    def key_before(self, time: int, back: int = 0) -> int | None:
        """The last key frame up to ``time``, or the one ``back`` before it; None if there is no such."""
        place = bisect_right(self.keys, time) - 1 - back
        return self.keys[place] if place >= 0 else None


def frame_table(file: Path) -> FrameTable:
    """The table of a video file; kept, as long as the file does not change.

    Raises:
        ValueError: the file is no video, or has no frames; names it.
        ImportError: PyAV is not installed; names the extra.
    """
    try:
        state = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: there is no such file.") from error
    return _frame_table(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _frame_table(file: Path, size: int, changed: int) -> FrameTable:
    del size, changed  # they only tell one state of the file from another
    with _opened(file) as container:
        stream = container.streams.video[0]
        times, keys = [], []
        try:
            for packet in container.demux(stream):  # nothing is decoded
                if packet.size and packet.pts is not None and not packet.is_discard and not packet.is_corrupt:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
        except Exception as error:  # PyAV's errors have no common base besides
            raise ValueError(f"{file}: cannot be read: {error}.") from error
        if not times or not keys:
            raise ValueError(f"{file}: the video stream has no frames that bear a time.")
        return FrameTable(tuple(sorted(times)), tuple(sorted(keys)), float(stream.time_base))


def read_frames(file: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """Frames by number, in the order asked for, each ``(h, w, 3)`` uint8 RGB, turned upright.

    Raises:
        IndexError: the file has no such frame.
        ValueError: the file is no video, or a frame cannot be decoded; names file and frame.
    """
    table = frame_table(file)
    for number in numbers:
        if not 0 <= number < len(table):
            raise IndexError(f"{file}: no frame {number}; it has {len(table)}.")
    wanted = sorted({table.times[number] for number in numbers})
    found: dict[int, np.ndarray] = {}
    with _opened(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # workers are the parallelism, and threads would decode far beyond the clip
        walk = _Walk(container, stream, table)
        for time in wanted:
            try:
                found[time] = walk.to(time)
            except Exception as error:
                raise ValueError(
                    f"{file}: frame {table.times.index(time)} of {len(table)} cannot be decoded: {error}."
                ) from error
    return [found[table.times[number]] for number in numbers]


class _Walk:
    """A decoder that goes forward, and jumps where that is shorter."""

    def __init__(self, container: Any, stream: Any, table: FrameTable) -> None:
        self.container, self.stream, self.table = container, stream, table
        self.frames: Any = None
        self.at: int | None = None  # time of the last frame that came

    def to(self, time: int) -> np.ndarray:
        """The frame of this time, which is later than the one before."""
        key = self.table.key_before(time)
        if self.at is not None and (key is None or key <= self.at) and (image := self._forward(time)) is not None:
            return image
        for back in range(len(self.table.keys) + 1):
            # Frames that follow a key frame in the file may be shown before it and need the one before that.
            self._jump(self.table.key_before(time, back))
            if (image := self._forward(time)) is not None:
                return image
            if self.table.key_before(time, back) is None:
                break
        raise ValueError("no frame bears the time that its packet has")

    def _jump(self, key: int | None) -> None:
        first = min(self.table.times[0], 0) if key is None else key
        self.container.seek(first, stream=self.stream, backward=True, any_frame=False)
        self.frames, self.at = self.container.decode(self.stream), None

    def _forward(self, time: int) -> np.ndarray | None:
        """Decode up to a frame; None if what comes begins later or ends before."""
        for frame in self.frames:
            self.at = frame.pts
            if frame.pts == time:
                return _upright(frame)
            if frame.pts is not None and frame.pts > time:
                return None
        return None


def _upright(frame: Any) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def _opened(file: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("VideoFolder: videos are read with PyAV, which is not installed: pip install av") from error
    try:
        container = av.open(str(file))
    except Exception as error:
        raise ValueError(f"{file}: cannot be opened as a video: {_words(error)}.") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{file}: has no video stream.")
    return container


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
