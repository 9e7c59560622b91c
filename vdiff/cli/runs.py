"""A run on the command line: its folder, or the file that it would be made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vdiff.registry import Config, load_config


def run_config(word: str | Path, allow_imports: bool | Sequence[str] = False) -> Config:
    """The config of a run's folder, as it stands there, or of a run file.

    Raises:
        ConfigFileError: see :func:`vdiff.registry.load_config`.
    """
    path = Path(word)
    file = path / "config.yaml" if path.is_dir() else path
    return load_config(file, interpolate=not path.is_dir(), allow_imports=allow_imports)
