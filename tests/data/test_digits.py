"""The digits: the real ones, split once and for all."""

import sys

import pytest
import torch

from vdiff.data import Digits, check_values
from vdiff.data.digits import _numbers
from vdiff.registry import ConfigError, build


def test_the_splits_share_no_digit_and_together_are_the_whole_set():
    from sklearn.datasets import load_digits

    labels = load_digits().target.tolist()
    train, test = _numbers(labels, "train"), _numbers(labels, "test")
    assert not set(train) & set(test)
    assert sorted(train + test) == _numbers(labels, "all") == list(range(1797))
    assert (len(train), len(test)) == (len(Digits("train")), len(Digits("test"))) == (1437, 360)


def test_every_fifth_digit_of_each_class_is_for_testing():
    whole, test = (Digits(split).labels.bincount() for split in ("all", "test"))
    assert (test - whole / 5).abs().max() < 1


def test_the_split_stays_the_same_from_version_to_version():
    """Figures of two versions are comparable only while these numbers stand."""
    from sklearn.datasets import load_digits

    numbers = _numbers(load_digits().target.tolist(), "test")
    assert numbers[:12] == [0, 1, 4, 15, 17, 21, 28, 30, 53, 56, 59, 68]


def test_a_row_is_the_picture_that_scikit_learn_has():
    from sklearn.datasets import load_digits

    source, digits = load_digits(), Digits("all")
    for i in (0, 1000, 1796):
        row = digits[i]
        assert row["image"].shape == (1, 8, 8) and row["image"].dtype == torch.float32
        assert torch.equal((row["image"][0] + 1) * 8, torch.from_numpy(source.images[i]).float())
        assert row["label"] == source.target[i] and isinstance(row["label"], int)


def test_the_declared_range_is_the_range_and_zero_is_paper():
    digits = Digits("all")
    assert (digits.images.min().item(), digits.images.max().item()) == digits.ranges["image"] == (-1, 1)
    check_values("image", digits.images, digits.ranges["image"])
    assert digits.images[:, 0, :, 0].mean() < -0.9  # no digit touches the left edge
    assert len(digits.images.unique()) == 17


def test_labels_count_the_classes():
    assert Digits("train").labels.unique().tolist() == list(range(len(Digits.classes)))


def test_the_start_up_report_hears_of_all_digits():
    digits = Digits("test")
    assert (digits.num_kept, digits.num_dropped) == (360, 0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        Digits()


def test_digits_are_built_by_name():
    assert len(build({"type": "digits", "split": "test"}, "dataset")) == 360
    with pytest.raises(ConfigError, match="'train', 'test', 'all'"):
        build({"type": "digits", "split": "val"}, "dataset")
    with pytest.raises(ValueError, match="split must be 'train', 'test' or 'all', got 'val'"):
        Digits("val")
