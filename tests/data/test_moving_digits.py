"""Digits that move: on a straight line at constant speed, and the same digit wherever it stands."""

import numpy as np
import pytest
import torch

from vdiff.data import Digits, Loader, MovingDigits


def moments(video):
    """Mass, centre (row, column) and variance (of rows, of columns) of the ink of each frame, ``(f, 5)`` float64."""
    ink = (video[0].double() + 1) / 2
    place = torch.arange(ink.shape[-1], dtype=torch.float64)
    mass = ink.sum((1, 2))
    found = [mass]
    sides = [ink.sum(2), ink.sum(1)]
    centres = [(side @ place) / mass for side in sides]
    spreads = [(side @ place**2) / mass - c**2 for side, c in zip(sides, centres, strict=True)]
    return torch.stack([*found, *centres, *spreads], dim=1)


@pytest.mark.parametrize("index", range(0, 60, 7))
def test_a_digit_keeps_mass_and_spread_and_its_centre_follows_the_path(index):
    data = MovingDigits("all", paths=2)
    found, still = moments(data[index]["video"]), moments(Digits("all")[index]["image"][:, None])
    path = torch.from_numpy(data.path(index))
    assert torch.allclose(found[:, 0], still[:, 0].expand(8), rtol=1e-5)
    assert torch.allclose(found[:, 1:3], still[:, 1:3] + path, atol=1e-5)
    assert torch.allclose(found[:, 3:], still[:, 3:] + 0.25, atol=1e-4)  # the quadratic spline's own variance


def test_a_path_is_straight_of_the_length_asked_for_and_on_the_canvas():
    data = MovingDigits("test", paths=3, travel=(2.0, 5.0), num_frames=6, size=20)
    paths = np.stack([data.path(i) for i in range(len(data))])
    steps = np.diff(paths, axis=1)
    assert np.allclose(steps, steps[:, :1])
    lengths = np.linalg.norm(paths[:, -1] - paths[:, 0], axis=-1)
    assert 2 <= lengths.min() < 2.1 and 4.9 < lengths.max() <= 5
    assert paths.min() >= 1 and paths.max() <= 20 - 8 - 1
    directions = np.arctan2(*(paths[:, -1] - paths[:, 0]).T)
    assert abs(np.exp(1j * directions).mean()) < 5 / np.sqrt(len(data))  # none is preferred


def test_nothing_of_a_digit_leaves_the_canvas():
    data = MovingDigits("test", paths=1, travel=(6.0, 6.0))
    still = Digits("test")
    for i in range(0, len(data), 9):
        assert torch.allclose((data[i]["video"] + 1).sum((0, 2, 3)), (still[i]["image"] + 1).sum().expand(8), rtol=1e-5)


def test_a_clip_follows_from_its_number():
    one, other = MovingDigits(paths=4), MovingDigits(paths=9)
    assert torch.equal(one[1500]["video"], other[1500]["video"]) and one[1500]["label"] == Digits()[63]["label"]
    assert not torch.equal(one[3]["video"], one[3 + 1437]["video"])  # the same digit on another path
    assert not torch.equal(one[3]["video"], MovingDigits(seed=1)[3]["video"])
    assert len(one) == 4 * 1437
    with pytest.raises(IndexError, match="no clip 5748"):
        one[5748]


def test_the_splits_have_no_digit_in_common():
    train, test = (MovingDigits(split, paths=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(train.digits.images, Digits("train").images)


def test_values_are_in_the_declared_range_and_bytes_say_the_same():
    floats, whole = MovingDigits(), MovingDigits(dtype="uint8")
    assert floats.ranges == {"video": (-1.0, 1.0)} and whole.ranges == {"video": (0.0, 255.0)}
    row, bytes_ = floats[5], whole[5]
    assert row["video"].shape == (1, 8, 16, 16) and row["video"].dtype == torch.float32
    assert row["video"].min() >= -1 and row["video"].max() <= 1 and row["video"][0, :, 0].max() == -1
    assert bytes_["video"].dtype == torch.uint8
    assert (bytes_["video"] / 127.5 - 1 - row["video"]).abs().max() <= 0.5001 / 127.5
    for ours in (floats, whole):
        shown = MovingDigits(dtype=ours.dtype, image="first")
        assert torch.equal(shown[5]["image"], ours[5]["video"][:, 0]) and "image" not in ours[5]
        assert shown.ranges["image"] == ours.ranges["video"] == shown.ranges["video"]
    assert Loader(floats, 3).batch(0)["video"].shape == (3, 1, 8, 16, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 9}, "size 9 at least 10"),
        ({"travel": (3, 7)}, r"from 0 to 6, or a path leaves the canvas of 16 pixels; got \(3, 7\)"),
        ({"num_frames": 0}, "must be at least 1"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"image": "last"}, "image is 'first' or nothing"),
    ],
)
def test_what_does_not_fit_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**options)
