"""Videos to look at: every frame in its place, at its time, in both formats."""

import io
import sys

import numpy as np
import pytest
import torch
from peers import peer
from PIL import Image

from vdiff.evaluation import film, grid, save_film, titled_film, titled_rows


def ramps(num=3, frames=5):
    """Videos of one grey each that becomes brighter with time."""
    grey = torch.linspace(-1, 1, frames)[None] * torch.linspace(0.2, 1, num)[:, None]
    return grey[:, None, :, None, None].expand(-1, 1, -1, 24, 24)


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def test_a_film_is_a_grid_for_every_frame():
    videos = ramps()
    frames = film(videos, columns=3, upscale=1)
    assert len(frames) == 5
    for f, frame in enumerate(frames):
        assert np.array_equal(pixels(frame), pixels(grid(videos[:, :, f], columns=3, upscale=1)))


def test_rows_play_together_and_a_short_one_stays_at_its_end():
    rows = {"inputs": ramps(), "samples": ramps(frames=2)}
    frames = titled_film(rows)
    last = titled_rows({"inputs": rows["inputs"][:, :, 4], "samples": rows["samples"][:, :, 1]})
    assert len(frames) == 5 and np.array_equal(pixels(frames[4]), pixels(last))


def test_a_gif_holds_every_frame_for_its_time_and_repeats(tmp_path):
    frames = film(ramps(), columns=3)
    save_film(frames, tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        for f, frame in enumerate(frames):
            gif.seek(f)
            assert gif.info["duration"] == 100
            assert abs(pixels(gif) - pixels(frame)).max() <= 2  # one palette of 256 colours for all


def test_still_frames_are_not_merged(tmp_path):
    save_film(film(torch.zeros(1, 1, 4, 24, 24)), tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        total = sum((gif.seek(f), gif.info["duration"])[1] for f in range(gif.n_frames))
    assert total == 400


def test_an_mp4_holds_every_frame_at_its_time(tmp_path):
    av = peer("av")
    frames = film(ramps(num=2), columns=2, upscale=1)
    assert frames[0].size == (2 * 26 + 2, 26 + 2)
    odd = [frame.crop((0, 0, 53, 27)) for frame in frames]
    save_film(odd, tmp_path / "a.mp4", fps=5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 5
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(decoded) == 5 and decoded[0].shape == (28, 54, 3)
    for frame, found in zip(odd, decoded, strict=True):
        assert abs(found[:27, :53] - pixels(frame)).mean() < 4  # lossy


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_the_same_film_gives_the_same_bytes(tmp_path, suffix):
    peer("av")
    for name in ("one", "two"):
        save_film(film(ramps()), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_what_is_no_film_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"saved as .gif or .mp4, got 'a.png'"):
        save_film(film(ramps()), tmp_path / "a.png")
    with pytest.raises(ValueError, match="got 0 frames"):
        save_film([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"sizes \[\(1, 1\), \(2, 2\)\]"):
        save_film([Image.new("L", (1, 1)), Image.new("L", (2, 2))], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"expected videos \(N, C, F, H, W\)"):
        film(torch.zeros(2, 1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_extra_is_named_and_a_gif_needs_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install av"):
        save_film(film(ramps()), tmp_path / "a.mp4")
    save_film(film(ramps()), tmp_path / "a.gif")
    assert Image.open(io.BytesIO((tmp_path / "a.gif").read_bytes())).n_frames == 5
