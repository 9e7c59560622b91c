"""Collation: examples become the rows of one batch, and every row learns what its randomness is keyed by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdiff.data.base import Group, Row
from vdiff.process import derive

Batch = dict[str, Any]

OWN_FIELDS = ("noise_key", "position", "global_size", "seed", "step", "index")
"""What collation adds to the fields of the rows."""


def collate(
    groups: Sequence[Group],
    *,
    positions: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    global_size: int | None = None,
    seed: int = 0,
    step: int = 0,
    indices: Sequence[int] | None = None,
) -> Batch:
    """A batch of ``B`` rows from groups of adjacent rows: a pair per group gives w0, l0, w1, l1, ...

    Tensors and arrays are stacked, ``(B, ...)``; integers, floats and booleans become tensors ``(B,)`` (int64,
    float32, bool); sequences of numbers, such as a size, tensors ``(B, n)``; strings stay a list.

    Args:
        groups: Examples of a data set, all with the same number of rows.
        positions: Place of each group in the global batch; by default 0, 1, 2, ...
        keys: What each group's level, noise and dropped conditions depend on; by default its position.
        global_size: Number of groups in the global batch; by default ``len(groups)``.
        seed, step: Of the run and of the optimizer.
        indices: Number of each example in its data set, for messages and look-ups; by default its position.

    Returns:
        The fields of the rows, and ``noise_key``, ``position``, ``index`` (each ``(B,)`` int64), ``global_size``,
        ``seed`` and ``step`` (integers); for groups of several streams also ``partner``, ``(B,)``: the row in this
        batch that each is sampled jointly with.

    Raises:
        ValueError: no groups, groups of unequal size, a field missing in some rows, shapes or types that differ,
            a field under a name that collation uses; it names the example.
    """
    positions = list(range(len(groups)) if positions is None else positions)
    keys = positions if keys is None else list(keys)
    indices = positions if indices is None else list(indices)
    global_size = len(groups) if global_size is None else global_size
    for name, values in (("positions", positions), ("keys", keys), ("indices", indices)):
        if len(values) != len(groups):
            raise ValueError(f"collate: {len(groups)} groups came with {len(values)} {name}; give one per group.")

    rows, names, places = _flatten(groups, indices)
    _check_fields(rows, names)
    batch: Batch = {field: _gather(field, [row[field] for row in rows], names) for field in rows[0]}
    streams = _streams(batch, len(rows))
    batch["noise_key"] = torch.tensor(
        [noise_key(keys[g], s) for g, s in zip(places, streams, strict=True)], device="cpu"
    )
    batch["position"] = torch.tensor([positions[g] for g in places], device="cpu")
    batch["index"] = torch.tensor([indices[g] for g in places], device="cpu")
    if any(streams):
        batch["partner"] = torch.tensor(_partners(places), device="cpu")
    return batch | {"global_size": global_size, "seed": seed, "step": step}


def _partners(places: Sequence[int]) -> list[int]:
    """For every row the next one of its group, around: the row that a joint sample attends to; -1 if it is alone."""
    size = places.count(0)
    if size == 1:
        return [-1] * len(places)
    return [row - row % size + (row + 1) % size for row in range(len(places))]


def noise_key(key: int, stream: int = 0) -> int:
    """The key of a row: its group's, which streams after the first change into unrelated ones."""
    return key if stream == 0 else derive("stream", key, stream)


def _flatten(groups: Sequence[Group], indices: Sequence[int]) -> tuple[list[Row], list[str], list[int]]:
    """Rows, how a message calls each, and which group each is from."""
    if not groups:
        raise ValueError("collate: no examples came; a batch needs at least one.")
    rows, names, places = [], [], []
    for place, (group, number) in enumerate(zip(groups, indices, strict=True)):
        members = [group] if isinstance(group, Mapping) else group
        if not isinstance(members, list | tuple) or not all(isinstance(row, Mapping) for row in members):
            raise ValueError(
                f"collate: example {number} is a {type(group).__name__}; a data set returns a mapping from field to "
                "value, or a list of such mappings for rows that belong together."
            )
        if place == 0:
            size, first = len(members), number
        if len(members) != size or not members:
            raise ValueError(
                f"collate: example {number} has {len(members)} rows, example {first} has {size}. The groups of one "
                "batch need the same number of rows, at least one."
            )
        for i, row in enumerate(members):
            rows.append(row)
            names.append(f"example {number}" if size == 1 else f"example {number} (row {i} of {size})")
            places.append(place)
    return rows, names, places


def _check_fields(rows: Sequence[Row], names: Sequence[str]) -> None:
    taken = [field for field in OWN_FIELDS if field in rows[0]]
    if taken:
        raise ValueError(
            f"collate: {names[0]} has a field {taken[0]!r}, a name that collation writes itself "
            f"({', '.join(OWN_FIELDS)}). Give the field another name."
        )
    for row, name in zip(rows, names, strict=True):
        if row.keys() != rows[0].keys():
            missing = [field for field in rows[0] if field not in row]
            extra = [field for field in row if field not in rows[0]]
            difference = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r} besides"
            raise ValueError(
                f"collate: {name} {difference}; {names[0]} has {', '.join(rows[0])}. All rows of a batch need the same "
                "fields; use an empty string or a zero where there is nothing to say."
            )


def _gather(field: str, values: list[Any], names: Sequence[str]) -> Tensor | list:
    forms = [_form(field, value, name) for value, name in zip(values, names, strict=True)]
    if set(forms) == {"integer", "float"}:
        forms = ["float"] * len(forms)
    _same(field, "kind of value", forms, names, "Convert in the data set.")
    if forms[0] == "string":
        return values
    if forms[0] != "tensor":
        dtype = {"boolean": torch.bool, "integer": torch.int64, "float": torch.float32}[forms[0]]
        return torch.tensor([_number(value) for value in values], dtype=dtype, device="cpu")
    tensors = [value if isinstance(value, Tensor) else _tensor(value) for value in values]
    _same(field, "shape", [tuple(t.shape) for t in tensors], names, "Crop, resize or pad in the data set.")
    _same(field, "dtype", [t.dtype for t in tensors], names, "Convert in the data set.")
    return torch.stack(tensors)


def _form(field: str, value: Any, name: str) -> str:
    match value:
        case str() | bytes():
            return "string"
        case bool() | np.bool_():
            return "boolean"
        case int() | np.integer():
            return "integer"
        case float() | np.floating():
            return "float"
        case Tensor():
            return "tensor"
        case np.ndarray() if value.dtype.kind in "biuf":
            return "tensor"
        case list() | tuple() if value and all(isinstance(v, int | float | np.number) for v in value):
            return "tensor"
    raise ValueError(
        f"collate: {field!r} of {name} is {'None' if value is None else f'a {type(value).__name__}'}; a field holds a "
        "tensor, a numeric array, a number, a sequence of numbers or a string. Convert it in the data set."
    )


def _tensor(value: Any) -> Tensor:
    """A copy: arrays mapped from files cannot be written, and torch shares no such memory."""
    if isinstance(value, np.ndarray):
        return torch.tensor(value, device="cpu")
    is_whole = all(isinstance(v, int | np.integer) for v in value)
    return torch.tensor([_number(v) for v in value], dtype=torch.int64 if is_whole else torch.float32, device="cpu")


def _number(value: Any) -> bool | int | float:
    return value.item() if isinstance(value, np.generic) else value


def _same(field: str, noun: str, values: Sequence[Any], names: Sequence[str], advice: str) -> None:
    for value, name in zip(values, names, strict=True):
        if value != values[0]:
            raise ValueError(
                f"collate: rows of one batch need the same {noun} in {field!r}; {name} has {value}, {names[0]} has "
                f"{values[0]}. {advice}"
            )


def _streams(batch: Batch, num_rows: int) -> list[int]:
    streams = batch.get("stream")
    if streams is None:
        return [0] * num_rows
    if not isinstance(streams, Tensor) or streams.dtype != torch.int64 or streams.ndim != 1:
        raise ValueError(
            "collate: 'stream' says which noise a row of a group takes, so it must be one integer per row. Give an "
            "integer, or another name to a field that means something else."
        )
    return streams.tolist()
