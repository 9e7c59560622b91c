"""Checkpoint folders that are whole or absent.

A folder holds safetensors files, ``state.json`` (plain data) and ``manifest.json`` (sha256 and size
of every file, and of itself). It is written under a hidden name, synced file by file, and renamed;
whoever is killed at whatever moment leaves the folders that were there. Reading checks the sums:
a flipped bit in a tensor file loads silently otherwise.

One writer per root folder; the trainer holds a lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vdiff.checkpoints.weights import read_weights, sync, sync_folder, write_safetensors

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_HIDDEN = re.compile(r"^\.(?P<name>.+)\.(?P<role>new|old|gone)$")  # being written, being replaced, being deleted


class DamagedCheckpointError(ValueError):
    """A checkpoint folder that is not what was written."""


def write(folder: str | Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint folder; a folder of that name is replaced once the new one is complete.

    Args:
        files: Tensors by file name, without the suffix: ``{"model": {...}, "ema": {...}}``.
        state: Plain data for ``state.json``.

    Raises:
        OSError: the disk is full or refuses; nothing of the attempt is left, and what was there stays.
    """
    folder = Path(folder)
    new, old = _hidden(folder, "new"), _hidden(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder.parent)
        new.mkdir()
        listing: dict[str, dict[str, Any]] = {}
        for name, tensors in files.items():
            sha256, size = write_safetensors(new / f"{name}.safetensors", tensors)
            listing[f"{name}.safetensors"] = {"sha256": sha256, "size": size}
        listing[STATE] = _write_json(new / STATE, dict(state))
        _write_json(new / MANIFEST, _signed({"format": FORMAT, "files": listing}))
        sync_folder(new)
        if folder.exists():
            os.rename(folder, old)  # a kill between the two renames is undone by tidy()
        os.rename(new, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        reason = f"{folder}: this checkpoint was not written: {error.strerror or error}. Earlier ones are untouched."
        raise OSError(error.errno, reason) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def verify(folder: str | Path, only: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint folder; nothing if it is what was written.

    Args:
        only: Names (without suffix) of the tensor files to check; ``state.json`` always is.
    """
    folder = Path(folder)
    try:
        listing = _listing(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    problems = [f"{name} does not belong to it" for name in sorted(_names(folder) - set(listing) - {MANIFEST})]
    for name, entry in listing.items():
        if only is not None and name != STATE and name.removesuffix(".safetensors") not in only:
            continue
        problem = _size_problem(folder / name, entry)
        if problem is None and _sha256(folder / name) != entry["sha256"]:
            problem = f"{name} has other bytes than were written (sha256 differs)"
        problems += [problem] if problem else []
    return problems


def read(folder: str | Path, only: Sequence[str] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Files and state of a checkpoint folder, verified.

    Args:
        only: Names of the tensor files wanted; the others are neither checked nor read.

    Raises:
        DamagedCheckpointError: what is wrong with it.
    """
    folder = Path(folder)
    if problems := verify(folder, only):
        raise DamagedCheckpointError(f"{folder}: a damaged checkpoint: {'; '.join(problems)}.")
    names = [name.removesuffix(".safetensors") for name in _listing(folder) if name != STATE]
    if absent := sorted(set(only or ()) - set(names)):
        raise DamagedCheckpointError(f"{folder}: has no {', '.join(absent)}. It has: {', '.join(names)}.")
    files = {name: read_weights(folder / f"{name}.safetensors") for name in names if only is None or name in only}
    return files, json.loads((folder / STATE).read_text(encoding="utf-8"))


def step_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies: ``root/step-00000200``."""
    return Path(root) / f"step-{step:08d}"


def steps(root: str | Path) -> dict[int, Path]:
    """The checkpoint folders under a root by step, newest first, valid or not."""
    found = {}
    for folder in Path(root).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and folder.is_dir():
            found[int(number)] = folder
    return dict(sorted(found.items(), reverse=True))


def newest_valid(root: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the damaged ones passed over, each with the reason."""
    damaged = []
    for folder in steps(root).values():
        problems = verify(folder)
        if not problems:
            return folder, damaged
        damaged.append((folder, "; ".join(problems)))
    return None, damaged


def prune(root: str | Path, keep: int | None, protect: Iterable[str | Path] = ()) -> list[Path]:
    """Delete all but the newest ``keep`` checkpoints and those protected; returns what was deleted.

    Folders with missing or cut files do not count among the kept, so they never push out a good one.
    """
    if keep is None:
        return []
    protected = {Path(folder).name for folder in protect}
    whole = [folder for folder in steps(root).values() if not _looks_damaged(folder)]
    deleted = [folder for folder in whole[keep:] if folder.name not in protected]
    for folder in deleted:
        gone = _hidden(folder, "gone")
        os.rename(folder, gone)  # half a folder is never seen under its own name
        shutil.rmtree(gone, ignore_errors=True)
    return deleted


def tidy(root: str | Path) -> None:
    """Remove what killed writers left, and put back what they were replacing. For the one who may write."""
    for path in list(Path(root).glob(".*")):
        match = _HIDDEN.match(path.name)
        if match is None or not path.is_dir():
            continue
        if match["role"] == "old" and not path.with_name(match["name"]).exists():
            os.rename(path, path.with_name(match["name"]))
        else:
            shutil.rmtree(path, ignore_errors=True)


def _hidden(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _write_json(file: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(data, indent=1).encode()
    with open(file, "wb") as out:
        out.write(text)
        sync(out)
    return {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(manifest, sort_keys=True).encode()
    return manifest | {"sha256": hashlib.sha256(text).hexdigest()}


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        unsigned = {key: value for key, value in manifest.items() if key != "sha256"}
        is_whole = _signed(unsigned) == manifest
        listing, form = unsigned["files"], unsigned["format"]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error!r}") from error
    if not is_whole:
        raise DamagedCheckpointError(f"{MANIFEST} has other bytes than were written")
    if form > FORMAT:
        raise DamagedCheckpointError(f"written in format {form}, newer than this library's {FORMAT}; update vdiff")
    if any(Path(name).name != name for name in listing) or STATE not in listing:
        raise DamagedCheckpointError(f"{MANIFEST} lists files outside the folder, or no {STATE}")
    return listing


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _size_problem(file: Path, entry: Mapping[str, Any]) -> str | None:
    if file.is_symlink() or not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    return None if size == entry["size"] else f"{file.name} has {size:,} bytes of {entry['size']:,}"


def _looks_damaged(folder: Path) -> bool:
    """By names and sizes only."""
    try:
        return any(_size_problem(folder / name, entry) for name, entry in _listing(folder).items())
    except DamagedCheckpointError:
        return True


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
