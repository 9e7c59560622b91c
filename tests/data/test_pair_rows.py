"""A pair in one row, in either layout, becomes the two rows that `pairs` gives."""

import pytest
import torch

from vdiff.data import Digits, Loader, PairRowsDataset, PairsDataset
from vdiff.registry import build

PAIRS = [(4, 9), (0, 7), (1, 2)]


@pytest.fixture(scope="module")
def digits():
    return Digits("test")


@pytest.mark.parametrize("layout", ["channels", "fields"])
def test_either_layout_flattens_to_adjacent_rows_with_one_key(digits, layout):
    rows = Loader(PairsDataset(digits, PAIRS), 3, shuffle=False).batch(0)
    data = PairRowsDataset(PairsDataset(digits, PAIRS, layout=layout), layout)
    batch = Loader(data, 3, shuffle=False).batch(0)
    assert data.ranges == digits.ranges and set(batch) == set(rows)
    for field in ("image", "label", "noise_key", "position"):
        assert torch.equal(batch[field], rows[field])


def test_it_is_built_from_a_config(digits):
    stacked = PairsDataset(digits, PAIRS, layout="channels")
    data = build({"type": "pair_rows", "dataset": stacked, "data_fields": ["image"]}, "dataset")
    assert torch.equal(data[0][0]["image"], digits.images[4]) and torch.equal(data[0][1]["image"], digits.images[9])
    assert torch.equal(data.visit(0, 5)[1]["image"], digits.images[9]) and len(data) == 3


def test_what_holds_no_pair_is_named(digits):
    with pytest.raises(ValueError, match=r"'image' of shape \(1, 8, 8\) does not hold two"):
        PairRowsDataset(digits)[0]
    with pytest.raises(ValueError, match="declares no ranges that fit 'fields'"):
        PairRowsDataset(digits, "fields")
    with pytest.raises(ValueError, match="no 'win_image'; they have image, label"):
        PairRowsDataset(digits, "fields", data_fields=["image"])[0]
    with pytest.raises(ValueError, match="groups of rows already"):
        PairRowsDataset(PairsDataset(digits, PAIRS))[0]
    with pytest.raises(ValueError, match="layout must be"):
        PairRowsDataset(digits, "rows")
