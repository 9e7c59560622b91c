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
    config = load_config(*files, overrides=overrides, allow_imports=arguments.allow_imports)
    out = Path(arguments.out or Path("outputs") / Path(files[-1]).stem)
    try:
        result = train_run(config, out)
    except Interrupted as stop:
        print(f"{out}: told to stop, saved after step {stop.step}. The same command goes on from there.")
        return EXIT_CODE
    print(f"{out}: trained {result.step} steps. Next: vdiff sample {out}")
    return 0
