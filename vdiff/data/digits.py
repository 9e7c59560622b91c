"""Handwritten digits: real data without a download."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch

from vdiff.data.base import Dataset, Row
from vdiff.data.order import index


class Digits(Dataset):
    """The 1,797 handwritten digits of 8 x 8 pixels that come inside scikit-learn.

    A row has ``image``, ``(1, 8, 8)`` float32 in [-1, 1] (17 grey values, -1 is paper and 1 is ink), and
    ``label``, 0 to 9.

    The split is fixed and depends on no library's random numbers: the digits are lined up class after class,
    in keyed order within a class, and every fifth is for testing. So both splits hold every class in the
    proportions of the whole: 360 digits to test, 1,437 to train.

    Args:
        split: ``train``, ``test`` or ``all``.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, doi:10.24432/C50P49.
    """

    ranges = {"image": (-1.0, 1.0)}
    classes = tuple("0123456789")

    def __init__(self, split: Literal["train", "test", "all"] = "train") -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "Digits: the digits come inside scikit-learn, which is not installed: pip install scikit-learn"
            ) from error
        if split not in ("train", "test", "all"):
            raise ValueError(f"Digits: split must be 'train', 'test' or 'all', got {split!r}.")
        source = cast(Any, load_digits())
        labels = torch.from_numpy(source.target).to(torch.int64)
        images = torch.from_numpy(source.images).to(torch.float32)[:, None] / 8 - 1  # grey values 0 ... 16
        chosen = _numbers(labels.tolist(), split)
        self.split = split
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        return {"image": self.images[index], "label": int(self.labels[index])}


def _numbers(labels: list[int], split: str) -> list[int]:
    """Which digits of the whole set are in a split, in the order of the whole set."""
    line: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        line += [members[index(0, label, i, len(members))] for i in range(len(members))]
    test = set(line[::5])
    return [i for i in range(len(labels)) if split == "all" or (i in test) == (split == "test")]
