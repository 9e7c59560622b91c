"""``vdiff summary``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.data import Loader
from vdiff.engine import Engine
from vdiff.evaluation import count_costs, summary_table
from vdiff.registry import Config, build, load_config
from vdiff.training.loop import ON_HOST


def summary(arguments: argparse.Namespace) -> int:
    """Modules with what one training step of a batch costs."""
    files = [Path(word) for word in arguments.config if "=" not in word]
    if not files:
        raise ValueError("no run file given, only overrides.")
    overrides = [word for word in arguments.config if "=" in word]
    sources = [file / "config.yaml" if file.is_dir() else file for file in files]
    config = load_config(*sources, overrides=overrides, allow_imports=arguments.allow_imports)
    device = torch.device(arguments.device)
    with device:
        engine: Engine = build(config.get("engine", config), "engine", "engine")
    batch = first_batch(config, engine, arguments.batch_size, device)
    try:
        costs = count_costs(engine.train(), lambda: engine(batch).per_row)
    except (NotImplementedError, RuntimeError) as error:
        if device.type != "meta":
            raise
        raise RuntimeError(f"it cannot be done without computing: {error}\nTry --device cpu.") from error
    print(f"{', '.join(map(str, files))}: one training step of a batch of {arguments.batch_size}")
    print(summary_table(costs, arguments.depth, arguments.width))
    return 0


def first_batch(config: Config, engine: Engine, batch_size: int, device: torch.device) -> Mapping[str, Any]:
    """A batch of the training data, or without data of what the engine samples, keys of randomness on the host."""
    data = config.get("data")
    if data:
        node = data if "type" in data else data["train"]
        batch = Loader(build(node, "dataset", "data.train"), batch_size).batch(0)
    elif (shape := getattr(engine, "sample_shape", None)) is not None:
        rows = torch.zeros(batch_size, *shape)
        batch = {engine.input_key: rows, "noise_key": torch.arange(batch_size), "step": 0}
    else:
        raise ValueError("there are neither data nor the engine's sample_shape, so nothing says what a batch is.")
    return {k: v.to(device) if isinstance(v, Tensor) and k not in ON_HOST else v for k, v in batch.items()}
