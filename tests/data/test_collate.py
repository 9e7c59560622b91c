"""Collation: rows, what is stacked, and what each row's randomness is keyed by."""

import numpy as np
import pytest
import torch

from vdiff.data import collate, noise_key
from vdiff.process import RowKeys


def row(value, **more):
    return {"image": torch.full((1, 2, 2), float(value)), "label": value, "caption": f"a {value}"} | more


def test_groups_become_adjacent_rows_with_one_key_each():
    batch = collate(
        [[row(0), row(1)], [row(2), row(3)]], positions=[4, 5], keys=[104, 105], global_size=8, indices=[30, 7]
    )
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["image"].shape == (4, 1, 2, 2) and batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch["caption"] == ["a 0", "a 1", "a 2", "a 3"]
    assert batch["noise_key"].tolist() == [104, 104, 105, 105]
    assert batch["position"].tolist() == [4, 4, 5, 5]
    assert batch["index"].tolist() == [30, 30, 7, 7]
    assert batch["global_size"] == 8


def test_the_rows_of_a_pair_get_the_same_noise_and_level():
    keys = RowKeys.of(collate([[row(0), row(1)], [row(2), row(3)]], seed=3, step=9))
    noise = keys.normal("noise", (4,))
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[2])
    assert keys.uniform("level").unique().numel() == 2


def test_the_streams_of_a_joint_sample_have_unrelated_keys():
    pair = [row(0, stream=0), row(1, stream=1)]
    batch = collate([pair, pair], keys=[10, 11])
    keys = batch["noise_key"].tolist()
    assert len(set(keys)) == 4
    assert keys[::2] == [10, 11]  # the first stream draws what a sample alone would draw
    assert batch["stream"].tolist() == [0, 1, 0, 1] and batch["position"].tolist() == [0, 0, 1, 1]
    assert noise_key(10, 1) != noise_key(11, 1) != noise_key(10, 2)


def test_a_batch_of_ones_own_needs_no_keys():
    batch = collate([row(3), row(4)])
    assert batch["noise_key"].tolist() == batch["position"].tolist() == batch["index"].tolist() == [0, 1]
    assert (batch["global_size"], batch["seed"], batch["step"]) == (2, 0, 0)


@pytest.mark.parametrize(
    "values, dtype, shape",
    [
        ([1, 2], torch.int64, (2,)),
        ([1.5, 2], torch.float32, (2,)),
        ([True, False], torch.bool, (2,)),
        ([np.int32(1), np.int64(2)], torch.int64, (2,)),
        ([np.float64(1), np.float32(2)], torch.float32, (2,)),
        ([(480, 720), (320, 320)], torch.int64, (2, 2)),
        ([(0.5, 1), (0.25, 2)], torch.float32, (2, 2)),
        ([np.zeros((3, 2), np.uint8), np.ones((3, 2), np.uint8)], torch.uint8, (2, 3, 2)),
        ([torch.tensor(1.0), torch.tensor(2.0)], torch.float32, (2,)),
    ],
)
def test_numbers_become_tensors(values, dtype, shape):
    field = collate([{"x": value} for value in values])["x"]
    assert field.dtype == dtype and field.shape == shape
    assert np.allclose(field.numpy(), np.array(values, dtype=np.float64))


def test_an_array_that_is_mapped_from_a_file_is_copied():
    array = np.zeros(3, np.float32)
    array.setflags(write=False)
    batch = collate([{"x": array}])
    batch["x"] += 1
    assert array.sum() == 0


@pytest.mark.parametrize(
    "groups, message",
    [
        ([], "no examples came"),
        ([row(0), {"image": torch.zeros(1, 2, 2), "label": 1}], r"example 41 has no 'caption'; example 40 has image"),
        ([row(0), row(1, fps=8)], r"example 41 has 'fps' besides"),
        (
            [row(0), row(1, image=torch.zeros(1, 3, 2))],
            r"same shape in 'image'; example 41 has \(1, 3, 2\), example 40",
        ),
        ([row(0), row(1, image=torch.zeros(1, 2, 2).half())], r"same dtype in 'image'; example 41 has torch.float16"),
        (
            [row(0), row(1, label="one")],
            r"same kind of value in 'label'; example 41 has string, example 40 has integer",
        ),
        ([row(0), row(1, caption=None)], r"'caption' of example 41 is None"),
        ([row(0), row(1, caption={"a": 1})], r"'caption' of example 41 is a dict"),
        ([row(0), row(1, label=True)], r"example 41 has boolean, example 40 has integer"),
        ([row(0, step=3), row(1, step=3)], r"example 40 has a field 'step', a name that collation writes itself"),
        ([row(0), [row(1), row(2)]], r"example 41 has 2 rows, example 40 has 1"),
        ([[row(0), row(1)], [row(2), {"image": 1}]], r"example 41 \(row 1 of 2\) has no 'label'"),
        ([[], []], r"example 40 has 0 rows"),
        ([row(0), 7], r"example 41 is a int; a data set returns a mapping"),
        ([row(0, stream=0.5), row(1, stream=1.0)], r"'stream' .* must be one integer per row"),
    ],
)
def test_an_error_names_the_example(groups, message):
    with pytest.raises(ValueError, match=message):
        collate(groups, indices=[40, 41][: len(groups)])


def test_one_position_and_one_key_per_group():
    with pytest.raises(ValueError, match="2 groups came with 3 keys"):
        collate([row(0), row(1)], keys=[1, 2, 3])
