"""Arrays from a file: what is in it, and nothing that could run."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vdiff.data import ArraysDataset, Loader
from vdiff.registry import build, load_config

IMAGES = np.linspace(-1, 1, 3 * 4, dtype=np.float64).reshape(3, 1, 2, 2)


def npz(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def test_rows_are_the_slices_of_the_arrays(tmp_path):
    file = npz(tmp_path, image=IMAGES, label=np.array([4, 5, 6]), caption=np.array(["a", "bc", "d"]))
    data = ArraysDataset(file, ranges={"image": (-1, 1)}, classes=["x"] * 7)
    assert len(data) == 3 and data.ranges == {"image": (-1, 1)} and len(data.classes) == 7
    row = data[1]
    assert row["label"] == 5 and row["caption"] == "bc"
    assert row["image"].dtype == torch.float32 and np.allclose(row["image"], IMAGES[1])
    batch = Loader(data, 3, shuffle=False).batch(0)
    assert batch["label"].tolist() == [4, 5, 6] and batch["caption"] == ["a", "bc", "d"]


def test_safetensors_hold_the_same(tmp_path):
    save_file({"image": torch.from_numpy(IMAGES), "label": torch.tensor([4, 5, 6])}, tmp_path / "data.safetensors")
    one, other = ArraysDataset(tmp_path / "data.safetensors"), ArraysDataset(npz(tmp_path, image=IMAGES))
    assert torch.equal(one[2]["image"], other[2]["image"]) and one[2]["label"] == 6


def test_a_config_names_the_file_relative_to_itself(tmp_path):
    npz(tmp_path, image=IMAGES)
    (tmp_path / "run.yaml").write_text("dataset: {type: arrays, file: data.npz, ranges: {image: [-1, 1]}}")
    data = build(load_config(tmp_path / "run.yaml")["dataset"], "dataset")
    assert len(data) == 3 and data.ranges == {"image": (-1.0, 1.0)}
    assert isinstance(build({"type": "tensors", "file": str(tmp_path / "data.npz")}, "dataset"), ArraysDataset)


def test_all_values_are_held_against_the_declared_range(tmp_path):
    file = npz(tmp_path, image=np.full((2, 3), 200, np.uint8))
    with pytest.raises(ValueError, match=r"data.npz: 'image' is declared in \[-1, 1\].*looks like \[0, 255\]"):
        ArraysDataset(file, ranges={"image": (-1, 1)})


def test_pickled_objects_are_refused(tmp_path):
    file = npz(tmp_path, image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="pickled objects are refused"):
        ArraysDataset(file)


@pytest.mark.parametrize(
    "arrays, arguments, message",
    [
        ({"image": IMAGES, "label": np.arange(4)}, {}, r"they differ \(image 3, label 4\)"),
        ({"image": IMAGES, "mean": np.array(0.5)}, {}, r"they differ \(image 3, mean none\)"),
        ({"image": IMAGES}, {"ranges": {"video": (-1, 1)}}, "no array 'video'. It has: image"),
        ({"image": IMAGES}, {"fields": ["label"]}, "no array 'label'"),
        ({}, {}, "holds no arrays"),
    ],
)
def test_arrays_that_do_not_belong_together_are_an_error(tmp_path, arrays, arguments, message):
    with pytest.raises(ValueError, match=message):
        ArraysDataset(npz(tmp_path, **arrays), **arguments)


def test_fields_choose_among_the_arrays(tmp_path):
    data = ArraysDataset(npz(tmp_path, image=IMAGES, other=np.arange(7)), fields=["image"])
    assert list(data[0]) == ["image"]
    with pytest.raises(IndexError, match="no example 3"):
        data[3]


def test_a_file_that_is_not_there_or_not_of_this_kind_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        ArraysDataset(tmp_path / "nothing.npz")
    for name in ("data.npz", "data.safetensors"):
        (tmp_path / name).write_bytes(b"this is text")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            ArraysDataset(tmp_path / name)
    (tmp_path / "data.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="ends in '.pkl'; known are .npz and .safetensors"):
        ArraysDataset(tmp_path / "data.pkl")
