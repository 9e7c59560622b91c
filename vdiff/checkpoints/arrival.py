"""What became of a published checkpoint: which part went where, and what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vdiff.checkpoints.loading import EMPTY, summary


@dataclass(frozen=True)
class Arrival:
    """A part that came.

    Attributes:
        into: Where it went, from the module.
        family, layout, prefix: What it is, how it was written, and what its names began with.
        names: In the module.
        numbers: How many, in all.
        cast: How many tensors were converted to another floating type.
        is_averaged: Whether they are of the exponential average.
    """

    into: str
    family: str
    layout: str
    prefix: str
    names: tuple[str, ...]
    numbers: int
    cast: int
    is_averaged: bool


@dataclass(frozen=True)
class PublishedReport:
    """What went where.

    Attributes:
        where: The file.
        parts: That came.
        beside: Names in the file that nobody needs, by reason.
        idle: Names in the module that the file lacks and nothing reads.
        ignored: Names in the module that were to be left alone.
        outside: Names in the file that belong elsewhere or were to be left out.
        empty: Names in the module that are left on the meta device, such as buffers that no file holds.
        otherwise: What a folder says of itself that the module is not, see :mod:`vdiff.checkpoints.stated`.
    """

    where: str
    parts: tuple[Arrival, ...]
    beside: Mapping[str, tuple[str, ...]]
    idle: tuple[str, ...]
    ignored: tuple[str, ...]
    outside: tuple[str, ...]
    empty: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names in the module that got their weights."""
        return tuple(name for part in self.parts for name in part.names)

    def __str__(self) -> str:
        lines = [self.where]
        for part in self.parts:
            more = ", the exponential average" if part.is_averaged else ""
            more += f"; {part.cast} converted to the module's type" if part.cast else ""
            way = f"{f'{part.prefix}*' if part.prefix else 'the file'} -> {part.into or 'the module'}"
            what = f"{part.family} ({part.layout}), {len(part.names)} tensors, {part.numbers:,} numbers"
            lines.append(f"{way}: {what}{more}")
        rest = [(names, f"left out, {reason}") for reason, names in self.beside.items()]
        rest += [(self.outside, "left out, meant for elsewhere"), (self.ignored, "left alone, as asked")]
        rest += [(self.idle, "not in the file and kept as they are, since nothing reads them"), (self.empty, EMPTY)]
        lines += [f"{len(names)} tensors {text} ({summary(names)})" for names, text in rest if names]
        lines += [f"otherwise: {line}" for line in self.otherwise]
        return "\n  ".join(lines)
