"""Data sets, the order they are visited in, and batches by number."""

from vdiff.data.arrays import ArraysDataset
from vdiff.data.base import Dataset, Group, Row
from vdiff.data.collate import Batch, collate, noise_key
from vdiff.data.digits import Digits
from vdiff.data.loader import Loader
from vdiff.data.order import index
from vdiff.data.ranges import check_range, check_values

__all__ = [
    "ArraysDataset",
    "Batch",
    "Dataset",
    "Digits",
    "Group",
    "Loader",
    "Row",
    "check_range",
    "check_values",
    "collate",
    "index",
    "noise_key",
]
