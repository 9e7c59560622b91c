"""Data sets: examples by number, with what is known about their fields beforehand.

A data set is a pure function from a number to an example. It owns no order, no batch size and no
random state; the :class:`~vdiff.data.Loader` brings those. It says which range of values its fields
have, so that a picture in [0, 255] never meets a first stage that expects [-1, 1] in silence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vdiff.registry import Registered

Row = dict[str, Any]
"""One sample: tensors, arrays, numbers and strings by field."""

Group = Row | list[Row]
"""One example: a row, or rows that belong together, such as a preferred sample and a rejected one."""


class Dataset(Registered, kind="dataset"):
    """Examples by number.

    An example is one row (a mapping from field to value) or a list of adjacent rows, such as a
    preference pair. Rows of one example share one noise key, and with it level, noise and dropped
    conditions; a row with an integer field ``stream`` has a key of its own for each stream.

    Attributes:
        ranges: Declared lowest and highest value of a field, ``{"image": (-1.0, 1.0)}``.
        classes: Names of the classes that ``label`` counts, or None.
        dropped: Examples that were found and left out, by name, with the reason, for the start-up report.
    """

    ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})
    classes: Sequence[str] | None = None
    dropped: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Group:
        """The example with this number, from 0 to ``len(self) - 1``; the same whenever it is asked for.

        Raises:
            IndexError: there is no such example.
        """

    def visit(self, index: int, key: int) -> Group:
        """The example as one visit of training sees it; the loader calls this.

        A data set that crops or flips at random overrides it and draws from ``generator(key)`` (see
        :mod:`vdiff.process`) alone: then a visit is the same in every worker and after every restart.

        Args:
            index: Number of the example.
            key: A number of 63 bits, unrelated from visit to visit.
        """
        return self[index]

    @property
    def num_kept(self) -> int:
        """Examples that are used, for the start-up report."""
        return len(self)

    @property
    def num_dropped(self) -> int:
        """How many examples were found and left out (too short, unreadable, ...), for the start-up report."""
        return len(self.dropped)
