"""The start-up report: what is about to be trained, on what, so that mistakes are seen in the first second."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.data import Dataset, check_range, check_values
from vdiff.data.collate import OWN_FIELDS
from vdiff.training.groups import Selection, frozen_by_slot

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def start_report(
    engine: nn.Module,
    selection: Selection,
    datasets: Mapping[str, Dataset],
    batch: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Samples kept and dropped, parameters trained and frozen, the first batch, and the levels it draws.

    Raises:
        ValueError: the data are not in the range that they declare, or that the first stage expects.
    """
    check_inputs(engine, datasets, batch)
    tables = [_samples(datasets), _slots(engine), _groups(selection), _batch(engine, datasets, batch)]
    if (levels := _levels(engine, batch)) is not None:
        tables.append(levels)
    return _render([table for table in tables if table[2]], [*notes, *_dropped(datasets)])


def check_inputs(engine: nn.Module, datasets: Mapping[str, Dataset], batch: Mapping[str, Any]) -> None:
    """Declared, expected and actual ranges of the engine's input must agree."""
    key = getattr(engine, "input_key", None)
    first_stage = getattr(engine, "first_stage", None)
    if key is None or first_stage is None:
        return
    if key not in batch:
        raise ValueError(f"data: the engine reads {key!r} (input_key), and batches have: {', '.join(_fields(batch))}.")
    for name, dataset in datasets.items():
        check_range(key, dataset.ranges.get(key), getattr(first_stage, "pixel_range", None), where=f"data.{name}")
    shape = getattr(engine, "sample_shape", None)
    if shape is not None and tuple(batch[key].shape[1:]) != tuple(shape):
        raise ValueError(
            f"data.train: {key!r} has the shape {tuple(batch[key].shape[1:])} per example, the engine's sample_shape "
            f"is {tuple(shape)}. Make the two agree, or leave sample_shape out."
        )
    if key in datasets["train"].ranges:
        check_values(key, batch[key], datasets["train"].ranges[key], where="data.train")


def _samples(datasets: Mapping[str, Dataset]) -> Table:
    rows = [[name, type(d).__name__, f"{d.num_kept:,}", f"{d.num_dropped:,}"] for name, d in datasets.items()]
    return "Samples", ("data", "type", "kept", "dropped"), rows


def _dropped(datasets: Mapping[str, Dataset]) -> list[str]:
    """Which examples were left out and why, the first of them by name."""
    lines = []
    for name, dataset in datasets.items():
        named = [f"{example} ({reason})" for example, reason in list(dataset.dropped.items())[:20]]
        more = [f"and {len(dataset.dropped) - 20} more"] if len(dataset.dropped) > 20 else []
        lines += [f"data.{name} left out: {'; '.join(named + more)}."] if named else []
    return lines


def _slots(engine: nn.Module) -> Table:
    rows = [[slot, f"{on:,}", f"{off:,}"] for slot, on, off in frozen_by_slot(engine) if on + off]
    return "Parameters", ("slot", "trained", "frozen"), rows


def _groups(selection: Selection) -> Table:
    rows = [
        [r.name, f"{r.num_tensors:,}", f"{r.num_parameters:,}", f"{r.lr:g}", f"{r.weight_decay:g}"]
        for r in selection.rows
    ]
    return "Trained", ("on", "tensors", "parameters", "lr", "weight decay"), rows


def _batch(engine: nn.Module, datasets: Mapping[str, Dataset], batch: Mapping[str, Any]) -> Table:
    rows = []
    for name in _fields(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            shape = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            rows.append([name, shape, _content(value)])
        else:
            rows.append([name, type(value).__name__, str(value)[:60]])
    return "First batch", ("field", "shape", "values"), rows


def _content(value: Tensor) -> str:
    if value.ndim == 1 and not value.is_floating_point():
        found = value.unique()
        words = ", ".join(str(v) for v in found[:12].tolist())
        return f"{len(found)} different: {words}{', ...' if len(found) > 12 else ''}"
    numbers = value.float()
    return f"{numbers.min():.3g} to {numbers.max():.3g}, mean {numbers.mean():.3g}, std {numbers.std():.3g}"


def _levels(engine: Any, batch: Mapping[str, Any]) -> Table | None:
    if not hasattr(engine, "levels"):
        return None
    ratio = engine.levels(batch).ratio.flatten().double()
    finite = ratio[ratio.isfinite()]
    if not len(finite):
        return None
    at = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    numbers = [f"{v:.3g}" for v in torch.quantile(finite, at).tolist()]
    without_signal = len(ratio) - len(finite)
    if without_signal:
        numbers[-1] += f" ({without_signal} rows without signal)"
    title = ["smallest", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "largest"]
    return "Levels of the first batch, sigma / alpha", title, [numbers]


def _fields(batch: Mapping[str, Any]) -> list[str]:
    return [name for name in batch if name not in OWN_FIELDS]


def _render(tables: Sequence[Table], notes: Sequence[str]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=io.StringIO(), width=110, color_system=None)
    for title, columns, rows in tables:
        table = RichTable(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
