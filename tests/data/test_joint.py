"""Joint samples: a picture and its map, with noise of their own and each other as partner."""

import pytest
import torch
import torch.nn.functional as F

from vdiff.data import ArraysDataset, Digits, JointDataset, Loader, MovingDigits, SobelMap
from vdiff.registry import build


def test_a_group_is_a_picture_and_its_map(tmp_path):
    digits = Digits("test")
    batch = Loader(JointDataset(digits, map=SobelMap()), 4, shuffle=False).batch(0)
    assert batch["image"].shape == (8, 1, 8, 8) and batch["stream"].tolist() == [0, 1] * 4
    assert batch["partner"].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert batch["noise_key"].unique().numel() == 8
    assert torch.equal(batch["image"][::2], digits.images[:4])
    assert torch.equal(batch["image"][1], SobelMap()(digits.images[0]))
    assert batch["label"].tolist() == digits.labels[:4].repeat_interleave(2).tolist()


def test_an_edge_of_full_height_is_one_and_a_flat_picture_has_none():
    picture = -torch.ones(3, 8, 8)
    picture[:, :, 4:] = 1
    edges = SobelMap()(picture)
    assert edges.shape == (3, 8, 8)
    assert (edges[..., 3:5] == 1).all() and (edges[..., :3] == -1).all() and (edges[..., 5:] == -1).all()
    assert (SobelMap(full=2.0)(picture)[..., 3:5] == 0).all()  # half of what would be full
    assert (SobelMap()(torch.full((1, 8, 8), 0.3)) == -1).all()


def test_edges_do_not_care_which_way_the_picture_is_turned():
    picture = Digits("test").images[7]
    for turned in (lambda x: x.rot90(1, (1, 2)), lambda x: x.flip(2), lambda x: x.mT):
        assert torch.allclose(SobelMap()(turned(picture)), turned(SobelMap()(picture)), atol=1e-6)


def test_a_slope_has_its_gradient():
    """Exact inside: Sobel's differences span two pixels, and a slope of g per pixel differs by 2 g over them."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    picture = (0.03 * rows + 0.04 * columns)[None] - 0.5
    inner = SobelMap()(picture)[0, 1:-1, 1:-1]
    assert torch.allclose((inner + 1) / 2, torch.full((6, 6), 2 * 0.05 / 2), atol=1e-6)


def test_videos_are_mapped_frame_by_frame():
    video = MovingDigits("test")[0]["video"]
    edges = SobelMap()(video)
    assert torch.equal(edges[:, 3], SobelMap()(video[:, 3]))
    assert JointDataset(MovingDigits("test"), field="video", map=SobelMap())[0][1]["video"].shape == video.shape


def test_the_map_may_be_in_the_data_already(tmp_path):
    import numpy as np

    image, depth = (np.full((2, 1, 4, 4), v, np.float32) for v in (0.1, 0.9))
    np.savez(tmp_path / "a.npz", image=image, depth=depth)
    data = JointDataset(ArraysDataset(tmp_path / "a.npz", ranges={"image": (-1, 1)}), partner_field="depth")
    first, second = data[0]
    assert set(first) == set(second) == {"image", "stream"}
    assert first["image"].mean() == pytest.approx(0.1) and second["image"].mean() == pytest.approx(0.9)


def test_it_is_built_by_name():
    node = {"type": "joint", "dataset": {"type": "digits", "split": "test"}, "map": {"type": "sobel", "full": 0.5}}
    assert build(node, "dataset").map.full == 0.5
    assert F.mse_loss(*(row["image"] for row in build(node, "dataset")[0])) > 0


def test_what_is_not_said_or_said_twice_is_an_error():
    digits = Digits("test")
    for options in ({}, {"map": SobelMap(), "partner_field": "depth"}):
        with pytest.raises(ValueError, match="say either how the partner is made"):
            JointDataset(digits, **options)
    with pytest.raises(ValueError, match="needs rows with 'image' and 'depth'; Digits has image, label"):
        JointDataset(digits, partner_field="depth")[0]
    with pytest.raises(ValueError, match=r"pictures in \[-1, 1\]; MovingDigits has 'video' in \[0.0, 255.0\]"):
        JointDataset(MovingDigits("test", dtype="uint8"), field="video", map=SobelMap())
