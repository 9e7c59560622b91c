"""Names of weights in two layouts, as a table that is read both ways.

A :class:`KeyMap` is a list of rules, each a pattern here and a pattern there. In a pattern ``{name}`` stands for one
step of a dotted name, and ``*`` at its end for all that is left::

    KeyMap([("time_embed.0.*", "time_embedding.linear_1.*"), ("blocks.{i}.attn.*", "layers.{i}.attention.*")])

The first rule that fits a name is the one that counts. A rule may have several names on a side, and say what happens to
the tensors: a fused projection is :class:`Split` in three. Small tables make large ones, by ``+`` and
:meth:`KeyMap.under`. Nothing is lost on the way: every name must be in the table, and every new name must lead back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from vdiff.checkpoints.changes import Change, Made, Same

STEP = re.compile(r"\{(\w+)\}")


class KeyMapError(ValueError):
    """Names that a table does not know, or of which some are missing."""


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        here, there: Patterns, with the same ``{names}`` in all. One side may have none: then what the other has is
            left out on the way, and on the way back brought by :class:`vdiff.checkpoints.changes.Made` or not at all.
        change: From the tensors here to those there.
    """

    here: tuple[str, ...]
    there: tuple[str, ...]
    change: Change = field(default_factory=Same)

    @staticmethod
    def of(here: str | Sequence[str], there: str | Sequence[str], change: Change | None = None) -> Rule:
        one, other = ((side,) if isinstance(side, str) else tuple(side) for side in (here, there))
        return Rule(one, other, change or Same())

    @property
    def inverse(self) -> Rule:
        return Rule(self.there, self.here, self.change.inverse)


@dataclass(frozen=True)
class Move:
    """One rule at one place: these tensors become those."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The targets, from the sources in their order."""
        if not self.targets:
            return {}
        return dict(zip(self.targets, self.change(*tensors), strict=True))


class KeyMap:
    """A table of names, see the module's text. Called with tensors by their names here, gives them by those there.

    Args:
        rules: :class:`Rule`, or ``(here, there)`` or ``(here, there, change)`` for :meth:`Rule.of`.
    """

    def __init__(self, rules: Iterable[Rule | tuple] = ()) -> None:
        self.rules = tuple(rule if isinstance(rule, Rule) else Rule.of(*rule) for rule in rules)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors under their names there, not copied unless they change.

        Raises:
            KeyMapError: a name that is not in the table, or a part of what belongs together.
        """
        out: dict[str, Tensor] = {}
        for move in self.moves(tensors):
            out |= move(*(tensors[name] for name in move.sources))
        return out

    def __add__(self, other: KeyMap) -> KeyMap:
        """The rules of both, these first."""
        return KeyMap(self.rules + other.rules)

    def under(self, here: str, there: str) -> KeyMap:
        """The same table for what stands below a name here and one there; ``""`` is no name."""

        def below(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{prefix}.{name}" if prefix else name for name in names)

        return KeyMap(Rule(below(here, rule.here), below(there, rule.there), rule.change) for rule in self.rules)

    @cached_property
    def inverse(self) -> KeyMap:
        """The way back."""
        return KeyMap(rule.inverse for rule in self.rules)

    def moves(self, names: Iterable[str]) -> list[Move]:
        """What happens to these names, place by place, so that a file can be rewritten without being held at once.

        Raises:
            KeyMapError: as when called.
        """
        places: dict[tuple[int, tuple], dict[int, str]] = {}
        unknown = []
        for name in names:
            if (found := self._find(name)) is None:
                unknown.append(name)
            else:
                rule, part, steps = found
                places.setdefault((rule, tuple(sorted(steps.items()))), {})[part] = name
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise KeyMapError(f"The table of names has no {', '.join(unknown[:8])}{more}.")
        moves = []
        for (index, place), parts in places.items():
            rule, steps = self.rules[index], dict(place)
            sources, targets = (tuple(_fill(p, steps) for p in side) for side in (rule.here, rule.there))
            if len(parts) < len(sources):
                missing = ", ".join(sorted(set(sources) - set(parts.values())))
                raise KeyMapError(f"{', '.join(parts.values())} come with {missing}, which is not there.")
            for part, target in enumerate(targets):
                if self.inverse._find(target) != (index, part, steps):
                    raise KeyMapError(f"The table leads from {sources[0]} to {target} and not back. Order its rules.")
            moves.append(Move(sources, targets, rule.change))
        made = [rule for rule in self.rules if isinstance(rule.change, Made)]
        return moves + [Move((), rule.there, rule.change) for rule in made]

    def _find(self, name: str) -> tuple[int, int, dict[str, str]] | None:
        """The rule that a name belongs to, which of its names it is, and what stands for ``{names}`` and ``*``."""
        beginnings = ["", *accumulate(name.split("."), lambda a, b: f"{a}.{b}")]
        for index, part, pattern in sorted(entry for b in beginnings for entry in self._patterns.get(b, ())):
            if (match := re.fullmatch(pattern, name)) is not None:
                return index, part, match.groupdict()
        return None

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[int, int, str]]]:
        """Index, part and regular expression of every pattern here, by its steps before the first open one."""
        table: dict[str, list[tuple[int, int, str]]] = {}
        for index, rule in enumerate(self.rules):
            for part, pattern in enumerate(rule.here):
                steps = pattern.split(".")
                fixed = next((i for i, step in enumerate(steps) if STEP.search(step) or step == "*"), len(steps))
                table.setdefault(".".join(steps[:fixed]), []).append((index, part, _expression(pattern)))
        return table


def _expression(pattern: str) -> str:
    text, rest = (pattern[:-1], "(?P<rest>.+)") if pattern.endswith("*") else (pattern, "")
    pieces = STEP.split(text)  # text and names of steps in turn
    names = [f"(?P<step_{name}>[^.]+)" for name in pieces[1::2]]
    texts = [re.escape(piece) for piece in pieces[::2]]
    return "".join(a + b for a, b in zip(texts, [*names, rest], strict=True))


def _fill(pattern: str, steps: Mapping[str, str]) -> str:
    text = pattern[:-1] + steps["rest"] if pattern.endswith("*") else pattern
    return STEP.sub(lambda found: steps[f"step_{found[1]}"], text) if "{" in pattern else text
