"""Data sets over folders of files, of which a few may be broken."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vdiff.data.base import Dataset, Row
from vdiff.data.listing import Listed, list_folder, list_table
from vdiff.data.order import index as shuffled
from vdiff.process import stream

_NAMED = 10  # broken files that a message names


class BrokenFileError(ValueError):
    """A file that cannot be used; the message says why."""


class TooManyBrokenError(ValueError):
    """More broken files than are tolerated."""


class FolderDataset(Dataset, abstract=True):
    """Files of a folder, one example each, with what is known of them beside.

    Broken files are left out, warned about and counted, and named by :attr:`dropped`. Those that are found when
    the folder is opened are no examples. One that is only found when it is read is replaced by another example,
    always the same one, so that a batch stays a function of its number.

    Args:
        folder: Files in it and in all its subfolders, in alphabetical order. The uppermost subfolders
            are classes: a row has their number as ``label`` and their name as ``caption``.
        annotations: A table with the files and their fields instead, see :func:`~vdiff.data.listing.list_table`.
        texts: Whether captions are in a ``.txt`` beside each file.
        max_broken: Share of files that may be broken before it is an error.
        check: What is looked at when the folder is opened: ``headers``, quickly; ``whole`` files, every one decoded;
            or ``nothing``.
    """

    suffixes: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        annotations: Path | None = None,
        texts: bool = False,
        max_broken: float = 0.05,
        check: Literal["headers", "whole", "nothing"] = "headers",
    ) -> None:
        if not 0 <= max_broken <= 1:
            raise ValueError(f"{type(self).__name__}: max_broken is a share from 0 to 1, got {max_broken}.")
        if check not in ("headers", "whole", "nothing"):
            raise ValueError(f"{type(self).__name__}: check must be 'headers', 'whole' or 'nothing', got {check!r}.")
        self.folder, self.max_broken = Path(folder), max_broken
        try:
            if annotations is None:
                self.listed, self.classes = list_folder(self.folder, self.suffixes, texts)
            else:
                self.listed, self.classes = list_table(self.folder, Path(annotations))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{type(self).__name__}: {error}") from error
        self.num_files = len(self.listed)
        self.dropped: dict[str, str] = {}  # type: ignore[reportIncompatibleVariableOverride]
        if check != "nothing":
            kept = [listed for listed in self.listed if not self._is_broken(lambda f=listed: self.look(f, check))]
            self.listed = kept
        if self.dropped:
            warnings.warn(f"{type(self).__name__}: left out {_spell(self.dropped)}", stacklevel=2)

    @abstractmethod
    def read(self, listed: Listed, random: np.random.Generator | None) -> Row:
        """The example of a file.

        Args:
            random: Of this visit; None for the example as it always is.

        Raises:
            BrokenFileError: the file cannot be used.
        """

    @abstractmethod
    def look(self, listed: Listed, check: str) -> None:
        """Whether the file can be used, as far as ``check`` wants to know.

        Raises:
            BrokenFileError: it cannot.
        """

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> Row:
        return self._row(index, lambda listed: self.read(listed, None))

    def visit(self, index: int, key: int) -> Row:
        return self._row(index, lambda listed: self.read(listed, stream("folder", key)))

    def name(self, listed: Listed) -> str:
        """How messages call a file: relative to the folder."""
        file = listed.file
        return file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else str(file)

    def _row(self, index: int, read: Callable[[Listed], Row]) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__}: no example {index}; {self.folder} has {len(self)}.")
        row: list[Row] = []
        place = index
        for attempt in range(1000):
            listed = self.listed[place]
            known = len(self.dropped)
            if not self._is_broken(lambda f=listed: row.append(read(f))):
                return row[0]
            if len(self.dropped) > known:
                warnings.warn(
                    f"{type(self).__name__}: replaced {_spell_one(self.dropped, self.name(listed))}", stacklevel=3
                )
            place = shuffled(0, attempt, index, len(self))
        raise TooManyBrokenError(f"{type(self).__name__}: 1000 files of {self.folder} in a row are broken.")

    def _is_broken(self, use: Callable[[], Any]) -> bool:
        try:
            use()
            return False
        except BrokenFileError as error:
            name, _, reason = str(error).partition(": ")
            self.dropped[name] = reason
        if len(self.dropped) > self.max_broken * self.num_files:
            raise TooManyBrokenError(
                f"{type(self).__name__}: of {self.num_files} files in {self.folder} more than max_broken="
                f"{self.max_broken:g} are broken: {_spell(self.dropped)} Repair or remove them, or raise max_broken."
            )
        return True


def _spell(dropped: dict[str, str]) -> str:
    named = "; ".join(_spell_one(dropped, name) for name in list(dropped)[:_NAMED])
    more = f"; and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else ""
    return f"{len(dropped)} broken: {named}{more}."


def _spell_one(dropped: dict[str, str], name: str) -> str:
    return f"{name} ({dropped[name]})"
