"""Videos from files: the frame that was asked for, whatever the codec did with it."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from peers import peer

from vdiff.data import Loader, VideoFolder, frame_table, read_frames

BITS = 8
BLOCK = 16  # pixels; as large as a codec's, so that no compression takes a bit for another


def numbered(number, size=(2 * BLOCK, 4 * BLOCK)):
    """A frame that says its number: one block, black or white, for each bit."""
    bits = [(number >> b) & 1 for b in range(BITS)]
    blocks = np.array(bits, np.uint8).reshape(2, 4) * 215 + 20
    return np.kron(blocks, np.ones((BLOCK, BLOCK), np.uint8))[..., None].repeat(3, -1)[: size[0], : size[1]]


def number_of(frame):
    means = np.asarray(frame, np.float64)[..., 0].reshape(2, BLOCK, 4, BLOCK).mean((1, 3)).flatten()
    assert (abs(means - 127) > 60).all()  # no bit is in doubt
    return sum(int(mean > 127) << b for b, mean in enumerate(means))


def write(file, num=200, codec="libx264", rate=25, options=None, pts=lambda i: i, gop=24, b_frames=3):
    av = peer("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 4 * BLOCK, 2 * BLOCK, "yuv420p"
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stream.options = {"threads": "1"} | (options or {})
        stream.codec_context.time_base = Fraction(1, rate)
        for i in range(num):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = pts(i), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


FILES = {
    "h264 with B-frames": ("a.mp4", {}),
    "h264 with open groups": ("a.mp4", {"options": {"x264-params": "open-gop=1:bframes=3:keyint=20:scenecut=0"}}),
    "mpeg4 with B-frames": ("a.mp4", {"codec": "mpeg4", "b_frames": 2, "gop": 12}),
    "a stream that starts late": ("a.mkv", {"pts": lambda i: i + 1000}),
    "frames of uneven length": ("a.mkv", {"pts": lambda i: i + i // 3 * 2}),
    "transport stream": ("a.ts", {"pts": lambda i: i + 77}),
    "every frame a key frame": ("a.mp4", {"gop": 1, "b_frames": 0}),
}


@pytest.mark.parametrize("form", FILES)
def test_two_hundred_random_seeks_find_the_frame_with_that_number(tmp_path, form):
    name, how = FILES[form]
    file = write(tmp_path / name, **how)
    table = frame_table(file)
    assert len(table) == 200
    random = np.random.default_rng(0)
    for _ in range(200):
        number = int(random.integers(200))
        (frame,) = read_frames(file, [number])
        assert number_of(frame) == number


def test_the_file_of_the_seeks_has_what_makes_seeking_hard(tmp_path):
    av = peer("av")
    file = write(tmp_path / "a.mp4")
    with av.open(str(file)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert len(frame_table(file).keys) >= 8
    assert sum(a > b for a, b in itertools.pairwise(stored)) > 30  # stored in another order than shown: B-frames
    assert frame_table(write(tmp_path / "late.mkv", num=10, pts=lambda i: i + 1000)).times[0] > 0


def test_clips_by_stride_are_the_frames_with_these_numbers(tmp_path):
    file = write(tmp_path / "a.mp4")
    random = np.random.default_rng(1)
    for _ in range(30):
        stride, num = int(random.integers(1, 12)), int(random.integers(1, 12))
        start = int(random.integers(200 - (num - 1) * stride))
        wanted = [start + i * stride for i in range(num)]
        assert [number_of(f) for f in read_frames(file, wanted)] == wanted
    backwards = [150, 3, 150, 99]
    assert [number_of(f) for f in read_frames(file, backwards)] == backwards
    with pytest.raises(IndexError, match="a.mp4: no frame 200; it has 200"):
        read_frames(file, [200])


def numbers(video):
    return [number_of((f.permute(1, 2, 0).numpy() + 1) * 127.5) for f in video.unbind(1)]


def folder(tmp_path, **options):
    size = (2 * BLOCK, 4 * BLOCK)
    return VideoFolder(tmp_path, **({"size": size, "num_frames": 5} | options))


def test_a_visit_is_a_clip_drawn_by_its_key(tmp_path):
    (tmp_path / "moving_things").mkdir()
    write(tmp_path / "moving_things" / "a.mp4", num=40)
    data = folder(tmp_path, stride=3)
    row = data[0]
    assert row["video"].shape == (3, 5, 32, 64) and row["video"].dtype == torch.float32
    assert row["caption"] == "moving things" and row["fps"] == pytest.approx(25 / 3) and row["start"] == 13
    starts = set()
    for key in range(60):
        row = data.visit(0, key)
        assert numbers(row["video"]) == [row["start"] + 3 * i for i in range(5)]
        starts.add(row["start"])
    assert min(starts) <= 3 and max(starts) >= 24 and max(starts) <= 27  # 40 frames: 0 to 27
    assert torch.equal(data.visit(0, 7)["video"], data.visit(0, 7)["video"])
    assert Loader(data, 2).batch(0)["video"].shape == (2, 3, 5, 32, 64)


def test_a_frame_of_the_clip_is_its_image_where_one_is_wanted(tmp_path):
    write(tmp_path / "a.mp4", num=40)
    assert "image" not in folder(tmp_path)[0]
    first, random = folder(tmp_path, image="first"), folder(tmp_path, image="random", crop="random", flip=0.5)
    shown = set()
    for key in range(30):
        row, plain = first.visit(0, key), folder(tmp_path).visit(0, key)
        assert torch.equal(row["image"], row["video"][:, 0]) and torch.equal(row["video"], plain["video"])
        row = random.visit(0, key)
        (place,) = [i for i in range(5) if torch.equal(row["image"], row["video"][:, i])]
        shown.add(place)
    assert shown == {0, 1, 2, 3, 4}
    assert torch.equal(random[0]["image"], random[0]["video"][:, 0])
    assert random.ranges["image"] == (-1, 1) and Loader(random, 2).batch(0)["image"].shape == (2, 3, 32, 64)
    with pytest.raises(ValueError, match="image is 'first', 'random' or nothing, got 'last'"):
        folder(tmp_path, image="last")


@pytest.mark.parametrize("fps, expected", [(25, [0, 1, 2, 3, 4]), (12.5, [0, 2, 4, 6, 8]), (50, [0, 0, 1, 1, 2])])
def test_a_rate_shows_what_was_on_display(tmp_path, fps, expected):
    write(tmp_path / "a.mp4", num=5 if fps >= 25 else 9)
    data = folder(tmp_path, fps=fps)
    table = frame_table(tmp_path / "a.mp4")
    assert data.clip(table, 0) == expected and data[0]["fps"] == fps


def test_a_rate_counts_time_where_frames_are_uneven(tmp_path):
    pts = list(itertools.accumulate([0, 1, 1, 8, 1, 1, 8, 1]))
    file = write(tmp_path / "a.mkv", num=8, pts=lambda i: pts[i])
    data = folder(tmp_path, fps=5, num_frames=4)  # every 5 ticks of 1/25 s: at 0, 5, 10, 15
    assert data.clip(frame_table(file), 0) == [0, 2, 3, 5]
    assert numbers(data.visit(0, 0)["video"]) == data.clip(frame_table(file), data.visit(0, 0)["start"])


@pytest.mark.filterwarnings("ignore:VideoFolder")
def test_files_that_are_no_videos_or_too_short_are_named(tmp_path):
    write(tmp_path / "a.mp4", num=20)
    write(tmp_path / "b.mp4", num=3)
    (tmp_path / "c.mp4").write_bytes(b"this is text")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "d.mp4").write_bytes(whole[: len(whole) // 2])
    data = folder(tmp_path, max_broken=0.75)
    assert len(data) == 1 and set(data.dropped) == {"b.mp4", "c.mp4", "d.mp4"}
    assert data.dropped["b.mp4"] == "too short, 3 frames at 25 fps for 5 1 apart"
    with pytest.raises(ValueError, match=r"3 broken: b.mp4 \(too short"):
        folder(tmp_path, max_broken=0.5)


def test_what_contradicts_itself_is_an_error(tmp_path):
    write(tmp_path / "a.mp4", num=20)
    with pytest.raises(ValueError, match="both say how far frames are apart"):
        folder(tmp_path, fps=8, stride=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        folder(tmp_path, num_frames=0)
    with pytest.raises(ValueError, match="there is no such file"):
        frame_table(tmp_path / "none.mp4")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    file = write(tmp_path / "a.mp4", num=5)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install av"):
        read_frames(file, [0])
