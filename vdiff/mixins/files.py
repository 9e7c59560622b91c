"""Adapter files: one safetensors file that says what it is, what it takes to build it and for whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import vdiff
from vdiff.checkpoints import WeightFileError, read_metadata, read_weights, save_weights
from vdiff.mixins.base import Mixin
from vdiff.registry import build, lookup

FORMAT = "vdiff.mixin/1"


def save_mixin(mixin: Mixin, file: str | Path) -> None:
    """Write a mixin, attached or not."""
    kind = type(mixin)
    if kind.registered_name is None or lookup("mixin", kind.registered_name).target is not kind:
        raise ValueError(f"{kind.__name__} is not in the registry, so its file could not be read back.")
    if not mixin.is_attached and mixin.host is None:
        raise ValueError(f"{kind.__name__}: {mixin.name!r} was never attached, so it has nothing to save.")
    try:
        arguments = json.dumps(mixin.arguments())  # in order: of several globs the first counts
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__}: its arguments are not plain data ({error}); override arguments()."
        ) from error
    metadata = {
        "format": FORMAT,
        "vdiff": vdiff.__version__,
        "type": kind.registered_name,
        "arguments": arguments,
        "host": mixin.host or "",
    }
    save_weights(file, mixin.state_dict(), metadata)


def load_mixin(file: str | Path) -> Mixin:
    """The mixin of a file, ready to be attached; built through the registry, so the file executes nothing.

    Raises:
        WeightFileError: not such a file, or damaged.
        ConfigError: a mixin that is not registered, or arguments that it does not take.
    """
    kind, arguments, host = _read_head(file)
    mixin = build({**arguments, "type": kind}, "mixin", str(file))
    mixin.host = host
    mixin.load_state_dict(read_weights(file))
    return mixin


def load_weights(mixin: Mixin, file: str | Path) -> None:
    """The weights of a file into a mixin that exists.

    Raises:
        WeightFileError: not such a file, or of another kind or host family.
        ValueError: weights of another rank, alpha or other sites; nothing was changed.
    """
    kind, _, host = _read_head(file)
    if kind != type(mixin).registered_name:
        raise WeightFileError(f"{file}: holds a {kind}; {mixin.name!r} is a {type(mixin).registered_name}.")
    if None not in (host, mixin.host) and host != mixin.host:
        raise WeightFileError(f"{file}: made for a {host}; {mixin.name!r} is for a {mixin.host}.")
    mixin.check_alike(load_mixin(file), str(file))
    mixin.load_state_dict(read_weights(file))


def _read_head(file: str | Path) -> tuple[str, dict[str, Any], str | None]:
    if Path(file).is_dir():
        raise WeightFileError(
            f"{file}: a folder, and vdiff keeps an adapter in one file. A folder of peft's is read with "
            "vdiff.mixins.load_adapter(FOLDER, host)."
        )
    metadata = read_metadata(file)
    if metadata.get("format") != FORMAT:
        said = metadata.get("format")
        raise WeightFileError(
            f"{file}: not an adapter file of vdiff (format {FORMAT!r}, here {said!r}). Weights of a whole model are "
            "read with vdiff.checkpoints.load_into."
        )
    try:
        arguments = json.loads(metadata["arguments"])
        kind = metadata["type"]
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightFileError(f"{file}: damaged metadata: {error!r}.") from error
    if not isinstance(arguments, dict) or "type" in arguments:
        raise WeightFileError(f"{file}: damaged metadata: its arguments are no mapping of names to values.")
    return kind, arguments, metadata.get("host") or None
