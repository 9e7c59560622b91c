"""Videos to look at: grids and titled rows that move, as GIF or MP4."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vdiff.evaluation.files import write_whole
from vdiff.evaluation.pictures import grid, titled_rows

FILM_SUFFIXES = (".gif", ".mp4")

Film = list[Image.Image]
"""Frames of one size, in order."""


def film(videos: Tensor, columns: int | None = None, low: float = -1.0, high: float = 1.0, **looks: Any) -> Film:
    """Videos in rows and columns, playing together.

    Args:
        videos: ``(N, 1 or 3, F, H, W)`` from ``low`` (black) to ``high`` (white).
        columns, low, high: See :func:`~vdiff.evaluation.grid`.
        **looks: ``upscale``, ``labels`` and ``smooth``, likewise.
    """
    return [grid(frame, columns, low, high, **looks) for frame in _frames(videos)]


def titled_film(rows: Mapping[str, Tensor], low: float = -1.0, high: float = 1.0, **looks: Any) -> Film:
    """Rows of videos ``(N, 1 or 3, F, H, W)`` with their title to the left, see
    :func:`~vdiff.evaluation.titled_rows`. A video that ends before the others stays at its last frame."""
    split = {title: _frames(videos) for title, videos in rows.items()}
    num = max((len(frames) for frames in split.values()), default=0)
    moments = [{title: frames[min(f, len(frames) - 1)] for title, frames in split.items()} for f in range(num)]
    return [titled_rows(moment, low, high, **looks) for moment in moments or [{}]]


def save_film(frames: Sequence[Image.Image], file: str | Path, fps: float = 8.0) -> None:
    """Write a GIF or an MP4 in one act; its suffix says which.

    The same frames give the same bytes. A GIF repeats for ever and counts in hundredths of a second, so frame rates
    that do not divide 100 are rounded; an MP4 (H.264, 4:2:0) has even sides, so a last row or column may be doubled.

    Raises:
        ValueError: another suffix, no frames, frames of different sizes.
        ImportError: an MP4 needs PyAV; names the extra.
    """
    file = Path(file)
    check_film_suffix(file)
    if not frames or len({frame.size for frame in frames}) > 1 or not fps > 0:
        sizes = sorted({frame.size for frame in frames})
        raise ValueError(
            f"save_film: expected frames of one size, at least one, and fps above 0; got {len(frames)} frames of "
            f"sizes {sizes} at {fps:g} fps."
        )
    content = _gif(frames, fps) if file.suffix.lower() == ".gif" else _mp4(frames, fps)
    write_whole(file, content)


def check_film_suffix(file: Path) -> None:
    """To be asked before the work is done that the file is to keep.

    Raises:
        ValueError: names the suffixes that are known.
    """
    if file.suffix.lower() not in FILM_SUFFIXES:
        raise ValueError(f"save_film: videos are saved as {' or '.join(FILM_SUFFIXES)}, got {file.name!r}.")


def _frames(videos: Tensor) -> tuple[Tensor, ...]:
    if videos.ndim != 5 or 0 in videos.shape:
        raise ValueError(f"film: expected videos (N, C, F, H, W), none of them 0; got {tuple(videos.shape)}.")
    return videos.unbind(2)


def _gif(frames: Sequence[Image.Image], fps: float) -> bytes:
    # One palette for all frames and no dithering: a grey that stands still does not flicker.
    strip = Image.new("RGB", (frames[0].width, sum(frame.height for frame in frames)))
    for place, frame in enumerate(frames):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    duration = max(20, 10 * round(100 / fps))  # in milliseconds; viewers slow down what is faster than 50 fps
    drawn[0].save(
        content, format="GIF", save_all=True, append_images=drawn[1:], duration=duration, loop=0, optimize=False
    )
    return content.getvalue()


def _mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    av = import_av("save_film")
    content = io.BytesIO()
    with av.open(content, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        width, height = frames[0].size
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.options = {"crf": "12", "preset": "medium", "threads": "1"}
        for frame in frames:
            pixels = np.pad(np.asarray(frame.convert("RGB")), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def import_av(owner: str) -> Any:
    """PyAV, or an error that names the extra."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{owner}: MP4 files are written with PyAV, which is not installed: pip install av. A .gif needs nothing."
        ) from error
    return av
