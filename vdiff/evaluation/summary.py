"""Costs as a table to read: the tree of modules, neighbours that are alike on one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby

from vdiff.evaluation.costs import Costs, ModuleCost

_UNITS = ("", "k", "M", "G", "T", "P")


def summary_table(costs: Costs, depth: int = 5, width: int = 120) -> str:
    """A line per module with its parameters, FLOPs and memory.

    Args:
        depth: How many levels below the root.
        width: Of the text.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = ["parameters", "trained", "FLOPs", "returns", "keeps"]
    has_mixins = any(cost.mixins for cost in costs.modules)
    table = Table("module", "type", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    if has_mixins:
        table.add_column("mixins (sites)")
    for label, cost in _lines(costs.modules[0], _children(costs), depth):
        mixins = ", ".join(f"{name} ({sites})" for name, sites in cost.mixins.items())
        table.add_row(label, cost.type, *_figures(cost), *([mixins] if has_mixins else []))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, markup=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join([*(line.rstrip() for line in text.rstrip().splitlines()), "", *_totals(costs)])


def _totals(costs: Costs) -> list[str]:
    root = costs.modules[0]
    lines = [
        f"weights and buffers {_in_bytes(costs.weights)}, gradients {_in_bytes(costs.gradients)}, "
        f"kept for the backward pass {_in_bytes(root.saved)}"
    ]
    if costs.training_flops:
        lines.append(f"forward {_short(root.flops)}FLOP, forward and backward {_short(costs.training_flops)}FLOP")
    return lines


def _figures(cost: ModuleCost) -> list[str]:
    flops = f"{_short(cost.flops)}" if cost.flops else "-"
    trained = "all" if cost.trainable == cost.parameters else f"{cost.trainable:,}"
    memory = [_in_bytes(number) if number else "-" for number in (cost.activations, cost.saved)]
    return [f"{cost.parameters:,}" if cost.parameters else "-", trained if cost.parameters else "-", flops, *memory]


Children = dict[str, list[ModuleCost]]


def _children(costs: Costs) -> Children:
    """By name of the module above; where that has no line of its own, the one above it."""
    children: Children = {cost.name: [] for cost in costs.modules}
    for cost in costs.modules[1:]:
        above = cost.name.rpartition(".")[0]
        while above not in children:
            above = above.rpartition(".")[0]
        children[above].append(cost)
    return children


def _lines(root: ModuleCost, children: Children, depth: int) -> Iterator[tuple[str, ModuleCost]]:
    yield root.name or "(all)", root
    stack = _below(root, children, 1, depth)
    while stack:
        label, cost, level = stack.pop(0)
        yield f"{'  ' * level}{label}", cost
        stack = _below(cost, children, level + 1, depth) + stack


def _below(above: ModuleCost, children: Children, level: int, depth: int) -> list[tuple[str, ModuleCost, int]]:
    """The modules one level below, of neighbours that are alike the first; its figures are those of each."""
    if level > depth:
        return []
    found = []
    for _, alike in groupby(children[above.name], key=lambda cost: _shape(cost, children)):
        first, *others = alike
        label = first.name.removeprefix(f"{above.name}." if above.name else "")
        if others:
            label = f"{label} ... {others[-1].name.rpartition('.')[2]}, each"
        found.append((label, first, level))
    return found


def _shape(cost: ModuleCost, children: Children) -> tuple:
    """Equal for modules that differ in their name only."""
    figures = (cost.type, cost.parameters, cost.trainable, cost.flops, cost.activations, cost.saved)
    below = [(c.name.removeprefix(cost.name), _shape(c, children)) for c in children[cost.name]]
    return (*figures, tuple(cost.mixins.items()), tuple(below))


def _short(number: float) -> str:
    """Three digits and a unit: ``1.23 G``, with a space before what follows."""
    power = 0
    while number >= 999.5 and power < len(_UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_UNITS[power]}"


def _in_bytes(number: int) -> str:
    return f"{_short(number)}B"
