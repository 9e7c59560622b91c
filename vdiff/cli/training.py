"""``vdiff train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vdiff.registry import load_config
from vdiff.training import EXIT_CODE, Interrupted
from vdiff.training import train as train_run


def train(arguments: argparse.Namespace) -> int:
    files = [a for a in arguments.config if "=" not in a]
    overrides = [a for a in arguments.config if "=" in a]
    if not files:
        raise ValueError("no run file given, only overrides.")
    run = _run_folder(Path(files[0])) if len(files) == 1 else None
    sources = [run / "config.yaml"] if run else files
    config = load_config(*sources, overrides=overrides, allow_imports=arguments.allow_imports)
    out = Path(arguments.out) if arguments.out else run or Path("outputs") / Path(files[-1]).stem
    try:
        result = train_run(config, out)
    except Interrupted as stop:
        print(f"{out}: told to stop, saved after step {stop.step}. The same command goes on from there.")
        return EXIT_CODE
    print(f"{out}: trained {result.step} steps. Next: vdiff sample {out}")
    return 0


def _run_folder(path: Path) -> Path | None:
    """The run to continue, if that is what was named: its folder or the config in it."""
    folder = path.parent if path.name == "config.yaml" else path
    return folder if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir() else None
