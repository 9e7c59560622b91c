"""What a folder of files holds, and what is known of each: labels and captions from subfolders, texts or a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE_COLUMNS = ("file", "file_name", "path", "image", "video")


@dataclass(frozen=True)
class Listed:
    """One file and the fields that are known beside it."""

    file: Path
    fields: dict[str, Any]


def list_folder(folder: Path, suffixes: Sequence[str], texts: bool = False) -> tuple[list[Listed], list[str] | None]:
    """All files below a folder in alphabetical order, and the names of their classes.

    With subfolders each file has a ``label``, the number of its uppermost folder among all, and a ``caption``,
    that folder's name in plain words; files that lie beside subfolders are an error. Without subfolders there is
    neither.

    Args:
        suffixes: Which files; upper case is the same.
        texts: Captions are in a ``.txt`` file beside each file instead.

    Raises:
        ValueError: no files, or files with and without a class.
        FileNotFoundError: no folder, or a file without its text.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in suffixes and not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} has no files that end in {', '.join(suffixes)}.")
    tops = [f.relative_to(folder).parts[0] if f.parent != folder else None for f in files]
    classes = sorted({top for top in tops if top is not None})
    if not classes:
        fields: list[dict[str, Any]] = [{} for _ in files]
    elif None in tops:
        raise ValueError(
            f"{folder} has files in subfolders ({classes[0]}, ...) and beside them ({files[tops.index(None)].name}), "
            "so some would have a class and some none. Sort them all into subfolders, or name them in a table "
            "(annotations: labels.csv)."
        )
    else:
        fields = [{"label": classes.index(str(t)), "caption": str(t).replace("_", " ")} for t in tops]
    if texts:
        fields = [f | {"caption": _text_beside(file)} for f, file in zip(fields, files, strict=True)]
    return [Listed(file, f) for file, f in zip(files, fields, strict=True)], classes or None


def list_table(folder: Path, table: Path) -> tuple[list[Listed], list[str] | None]:
    """The files that a table names, in its order, and the names of their classes.

    - ``.csv`` with a line of column names, or ``.jsonl`` with one object per line;
    - ``.json`` with a list of objects, or one object from file to its fields or to its caption.

    One column says the file, relative to ``folder``: file, file_name, path, image or video. The others become
    fields; columns of numbers in a CSV become numbers. Labels that are words become numbers, in alphabetical order.

    Raises:
        ValueError: it cannot be read as what its suffix says, a line has no file or lacks a field.
    """
    if not table.is_file():
        raise FileNotFoundError(f"there is no table {table}.")
    rows = _rows(table)
    if not rows:
        raise ValueError(f"{table} names no files.")
    column = next((c for c in _FILE_COLUMNS if c in rows[0]), None)
    if column is None:
        raise ValueError(
            f"{table}: no column says which file; it has {', '.join(rows[0])}, and one must be "
            f"{', '.join(_FILE_COLUMNS)}."
        )
    for number, row in enumerate(rows, 1):
        if missing := [name for name in rows[0] if row.get(name) is None]:
            raise ValueError(f"{table}: entry {number} has no {missing[0]!r}. All entries need the same fields.")
    classes = None
    if "label" in rows[0] and any(isinstance(row["label"], str) for row in rows):
        classes = sorted({str(row["label"]) for row in rows})
        rows = [row | {"label": classes.index(str(row["label"]))} for row in rows]
    names = [name for name in rows[0] if name != column]
    return [Listed(folder / str(row[column]), {name: row[name] for name in names}) for row in rows], classes


def _text_beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise FileNotFoundError(f"{file} has no text beside it ({text.name}), and `texts` asks for one per file.")
    return text.read_text(encoding="utf-8").strip()


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        text = table.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
        match table.suffix.lower():
            case ".csv":
                return _numbers(list(csv.DictReader(text.splitlines())))
            case ".jsonl":
                found: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
            case ".json":
                found = json.loads(text)
            case suffix:
                raise ValueError(f"it ends in {suffix!r}; known are .csv, .json and .jsonl.")
        if isinstance(found, Mapping):
            found = [{"file": k} | (dict(v) if isinstance(v, Mapping) else {"caption": v}) for k, v in found.items()]
        if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
            raise ValueError("it holds something else than objects, one per file.")
        return [dict(row) for row in found]
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error


def _numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Columns of a CSV in which everything is a number, as numbers; captions and files stay words."""
    for name in rows[0] if rows else ():
        if name in ("caption", *_FILE_COLUMNS):
            continue
        for kind in (int, float):
            try:
                values = [kind(row[name]) for row in rows]
            except (ValueError, TypeError):
                continue
            rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
            break
    return rows
