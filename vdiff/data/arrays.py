"""One's own arrays, from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdiff.data.base import Dataset, Row
from vdiff.data.ranges import check_values


class ArraysDataset(Dataset, aliases=("tensors",)):
    """Arrays in a ``.npz`` or ``.safetensors`` file, one field each; the first axis counts the examples.

    ``{type: arrays, file: shapes.npz, ranges: {image: [-1, 1]}}``. Arrays are held in memory. Doubles become
    float32; arrays of strings (``.npz`` only) are fields of strings, such as captions. Pickled objects are
    refused.

    Args:
        file: Where the arrays are.
        ranges: Lowest and highest value of the fields that have one; checked against all values at once.
        classes: Names of the classes that ``label`` counts.
        fields: Which arrays to use; by default all.
    """

    def __init__(
        self,
        file: Path,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        classes: Sequence[str] | None = None,
        fields: Sequence[str] | None = None,
    ) -> None:
        self.file = Path(file)
        self.ranges = dict(ranges or {})
        self.classes = tuple(classes) if classes is not None else None
        arrays = _read(self.file)
        for field in (*(fields or ()), *self.ranges):
            if field not in arrays:
                raise ValueError(f"ArraysDataset: {self.file} has no array {field!r}. It has: {', '.join(arrays)}.")
        self.arrays = {field: arrays[field] for field in fields or arrays}
        _check_lengths(self.arrays, self.file)
        for field, declared in self.ranges.items():
            if field in self.arrays:
                check_values(field, self.arrays[field], declared, where=str(self.file))

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"ArraysDataset: no example {index}; {self.file} has {len(self)}.")
        return {field: _item(array[index]) for field, array in self.arrays.items()}


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def _check_lengths(arrays: Mapping[str, Any], file: Path) -> None:
    if not arrays:
        raise ValueError(f"ArraysDataset: {file} holds no arrays.")
    lengths = {field: len(array) if np.ndim(array) else None for field, array in arrays.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        found = ", ".join(f"{field} {'none' if n is None else n}" for field, n in lengths.items())
        raise ValueError(
            f"ArraysDataset: the first axis of every array in {file} counts the examples, and they differ ({found}). "
            "Choose those that belong together with `fields`."
        )


def _read(file: Path) -> dict[str, Tensor | list[str]]:
    if not file.is_file():
        raise FileNotFoundError(f"ArraysDataset: there is no file {file}.")
    match file.suffix:
        case ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                arrays: dict[str, Any] = load_file(file)
            except SafetensorError as error:
                raise ValueError(f"ArraysDataset: {file} cannot be read as safetensors: {error}.") from error
        case ".npz":
            try:
                with np.load(file, allow_pickle=False) as archive:
                    arrays = {field: _from_numpy(archive[field]) for field in archive.files}
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(
                    f"ArraysDataset: {file} cannot be read: {error} Save plain arrays with numpy.savez(file, "
                    "image=..., label=...); pickled objects are refused because they can run code."
                ) from error
        case suffix:
            raise ValueError(f"ArraysDataset: {file} ends in {suffix!r}; known are .npz and .safetensors.")
    return {
        f: a.to(torch.float32) if isinstance(a, Tensor) and a.dtype == torch.float64 else a for f, a in arrays.items()
    }


def _from_numpy(array: np.ndarray) -> Tensor | list[str]:
    if array.dtype.kind in "US":
        return np.char.decode(array).tolist() if array.dtype.kind == "S" else array.tolist()
    return torch.from_numpy(array)
