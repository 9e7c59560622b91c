"""Pictures: the right pixel at the right place, and the same bytes every time."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vdiff.evaluation import grid, save_picture, titled_rows

PAPER = 255


def pixels(image):
    return np.asarray(image)


def test_values_become_grey_from_low_to_high():
    values = torch.tensor([-1.0, 0.0, 1.0, 5.0, -5.0, float("nan")]).reshape(6, 1, 1, 1)
    found = pixels(grid(values, columns=6, upscale=1))[2, 2::3, 0]
    assert found.tolist() == [0, 128, 255, 255, 0, 0]
    assert pixels(grid(torch.full((1, 1, 1, 1), 51.0), low=0, high=255, upscale=1))[2, 2].tolist() == [51] * 3


def test_colours_keep_their_channel():
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    assert pixels(grid(red, upscale=1))[2, 2].tolist() == [255, 0, 0]


def test_pictures_fill_rows_from_the_left():
    images = torch.linspace(-1, 0.5, 5).reshape(5, 1, 1, 1).expand(-1, 1, 24, 24)
    found = pixels(grid(images, columns=3, upscale=1))
    assert found.shape == (2 * 26 + 2, 3 * 26 + 2, 3)
    centres = found[14::26, 14::26, 0]
    assert centres.flatten().tolist() == [0, 48, 96, 143, 191, PAPER]
    assert (found[:2] == PAPER).all() and (found[:, :2] == PAPER).all() and (found[26:28] == PAPER).all()


def test_a_grid_is_about_square_by_default():
    assert grid(torch.zeros(9, 1, 48, 48)).size == grid(torch.zeros(8, 1, 48, 48)).size == (3 * 52 + 4, 3 * 52 + 4)


@pytest.mark.parametrize("side, tile", [(8, 48), (28, 56), (64, 64), (512, 512)])
def test_only_small_pictures_grow_by_default(side, tile):
    gap = max(2, tile // 12)
    assert grid(torch.zeros(1, 1, side, side)).size == (tile + 2 * gap, tile + 2 * gap)


def test_crisp_enlargement_repeats_pixels_and_smooth_enlargement_blends_them():
    images = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).reshape(1, 1, 2, 2)
    crisp, smooth = (pixels(grid(images, upscale=12, smooth=s))[2:-2, 2:-2, 0] for s in (False, True))
    assert np.array_equal(crisp, np.kron([[0, 255], [255, 0]], np.ones((12, 12))))
    assert len(np.unique(smooth)) > 20


def test_labels_stand_under_their_pictures():
    images = -torch.ones(2, 1, 48, 48)
    bare, labelled = grid(images, columns=2), grid(images, columns=2, labels=torch.tensor([3, 8]))
    assert labelled.height > bare.height and labelled.width == bare.width
    below = pixels(labelled)[52:, :, 0]
    assert (below[:, :52] < PAPER).any() and (below[:, 52:] < PAPER).any()
    assert not np.array_equal(below[:, 4:52], below[:, 56:104])
    with pytest.raises(ValueError, match="2 pictures came with 1 labels"):
        grid(images, labels=["one"])


def test_a_long_label_is_shortened_and_keeps_out_of_its_neighbours():
    images = -torch.ones(2, 1, 48, 48)
    below = pixels(grid(images, columns=2, labels=["a very long caption of a picture", ""]))[52:, :, 0]
    assert (below[:, 4:52] < PAPER).any() and (below[:, 53:] == PAPER).all()


def test_rows_have_their_title_to_the_left():
    one, other = -torch.ones(3, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    found = pixels(titled_rows({"inputs": one, "samples": other}))
    width, height = titled_rows({"inputs": one, "samples": other}).size
    assert height == 2 * 52 + 4
    margin = width - 3 * 52
    assert (found[30, margin : margin + 48, 0] == 0).all()
    assert (found[30 + 52, margin : margin + 48, 0] == 128).all()
    assert (found[30 + 52, margin + 2 * 52 :] == PAPER).all()  # the second row has no third picture
    assert (found[:52, :margin] < PAPER).any() and (found[52:, :margin] < PAPER).any()


@pytest.mark.parametrize("images", [torch.zeros(8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(0, 1, 8, 8)])
def test_what_is_no_picture_is_an_error(images):
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        grid(images)


def test_rows_of_different_sizes_are_an_error():
    with pytest.raises(ValueError, match="pictures of one size"):
        titled_rows({"a": torch.zeros(1, 1, 8, 8), "b": torch.zeros(1, 1, 9, 9)})
    with pytest.raises(ValueError, match="no rows came"):
        titled_rows({})
    with pytest.raises(ValueError, match="high must be the larger"):
        grid(torch.zeros(1, 1, 8, 8), low=1, high=-1)


def test_the_same_picture_gives_the_same_bytes(tmp_path):
    image = grid(torch.zeros(4, 1, 8, 8), labels=list("abcd"))
    annotated = image.copy()
    annotated.info["comment"] = "made on some day"
    save_picture(image, tmp_path / "one.png")
    save_picture(annotated, tmp_path / "deep" / "er" / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "deep" / "er" / "two.png").read_bytes()
    assert np.array_equal(pixels(Image.open(tmp_path / "one.png")), pixels(image))


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "samples.png"
    save_picture(grid(torch.zeros(1, 1, 8, 8)), file)
    before = file.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_picture(grid(torch.ones(1, 1, 8, 8)), file)
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["samples.png"]


def test_pictures_are_png(tmp_path):
    with pytest.raises(ValueError, match="saved as .png, got 'a.jpg'"):
        save_picture(grid(torch.zeros(1, 1, 8, 8)), tmp_path / "a.jpg")
