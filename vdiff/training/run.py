"""From a run file to a trained engine in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdiff.checkpoints import find_checkpoint
from vdiff.data import Dataset
from vdiff.process import forked
from vdiff.registry import Config, ConfigError, check, did_you_mean, load_config, save_config
from vdiff.training.base import FitResult, Training

CONFIG = "config.yaml"

# What may change from one part of a run to the next: how long, and what only watches.
FREE = (
    "training.num_steps",
    "training.logging",
    "training.checkpoint",
    "training.validation",
    "training.num_workers",
    "training.device",
)


def train(config: Config | Mapping[str, Any], out: str | Path) -> FitResult:
    """Train what a run file describes, in the folder ``out``; continues the run that is there.

    Args:
        config: Sections ``engine``, ``data`` (``train`` and, if wanted, ``validation``) and ``training``. A run
            that ``training.init`` starts from and names the ``config`` of is trained before, if it is not yet.

    Raises:
        ConfigError: something in the file cannot be built, or the run there was begun with another config.
        NonFiniteError, RunLockedError, Interrupted: see :meth:`Trainer.fit`.
    """
    out = Path(out)
    config = config if isinstance(config, Config) else Config(dict(config))
    plans = check_run(config)
    training: Training = plans["training"].make()
    if not _has_checkpoint(out):
        for number, source in enumerate(getattr(training, "init", ())):
            if source.config is not None:
                train(load_config(source.config), source.file)  # a finished run has no steps left
            elif not source.file.exists():
                path = f"training.init.{number}.file"
                raise ConfigError(f"{config.where(path)}{path}: there is no file or folder {source.file}.")
    resolved = resolve(plans, config, out)
    settle_config(resolved, out)
    with forked(training.seed, "init"):
        engine = plans["engine"].make()
    data: dict[str, Dataset] = {name: plan.make() for name, plan in plans["data"].items()}
    return training.fit(engine, data, out)


def check_run(config: Config) -> dict[str, Any]:
    """The plans of all sections, every fault of the whole file at once."""
    known = ("engine", "data", "training", "imports")
    faults = [
        f"{config.where(key)}{key}: a run file has the sections engine, data, training and imports."
        f"{did_you_mean(key, known)}"
        for key in config
        if key not in known
    ]
    plans: dict[str, Any] = {}
    for section, kind in (("engine", "engine"), ("training", "training")):
        node = config.get(section, {}) if section == "training" else config.get(section)
        if node is None:
            faults.append(f"{section}: this run file has no section {section!r}.")
            continue
        if section == "training" and isinstance(node, Mapping) and "type" not in node:
            node = node.with_(type="loop") if isinstance(node, Config) else {"type": "loop", **node}
        _collect(plans, faults, section, node, kind, section)
    data = config.get("data")
    if isinstance(data, Mapping):
        data = {"train": data} if "type" in data else {name: node for name, node in data.items() if node is not None}
    if not isinstance(data, Mapping) or not data:
        faults.append("data: this run file names no data; give data: {train: {type: ...}}.")
        data = {}
    elif "train" not in data:
        faults.append(f"data: there is {', '.join(data)}, and no 'train'.")
    plans["data"] = {}
    for name in data:
        if name not in ("train", "validation"):
            faults.append(f"data.{name}: data has the entries train and validation.")
            continue
        _collect(plans["data"], faults, name, data[name], "dataset", f"data.{name}")
    if faults:
        raise ConfigError("\n".join(faults))
    return plans


def _collect(plans: dict[str, Any], faults: list[str], name: str, node: Any, kind: str, path: str) -> None:
    try:
        plans[name] = check(node, kind, path)
    except ConfigError as error:
        faults.append(str(error))


def resolve(plans: Mapping[str, Any], config: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The whole config as plain data, files written relative to the run folder."""
    tree = {
        "engine": plans["engine"].tree(out),
        "data": {name: plan.tree(out) for name, plan in plans["data"].items()},
        "training": plans["training"].tree(out),
    }
    imports = config.get("imports")
    return tree | ({"imports": imports} if imports else {})


def settle_config(resolved: dict[str, Any], out: Path) -> None:
    """Write the resolved config into the run folder, unless a run with another one is under way there.

    Raises:
        ConfigError: names the keys that differ.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / CONFIG
    if file.is_file() and _has_checkpoint(out):
        before, now = _flat(load_config(file, interpolate=False).to_dict()), _flat(resolved)
        keys = sorted({key for key in before.keys() | now.keys() if before.get(key) != now.get(key)})
        fixed = [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in FREE)]
        if fixed:
            lines = [f"  {key}: {_word(before, key)} there, {_word(now, key)} now" for key in fixed]
            raise ConfigError(
                f"{out}: a run with another config is under way here; to continue it, these must be as they were:\n"
                + "\n".join(lines)
                + "\nUndo the change, or choose another folder (and this run's weights as the start: training.init)."
            )
    temporary = file.with_name(f".{CONFIG}.new")
    save_config(resolved, temporary)
    os.replace(temporary, file)


def _has_checkpoint(out: Path) -> bool:
    try:
        find_checkpoint(out)
    except (OSError, ValueError):
        return False
    return True


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {
            k: v for name, item in tree.items() for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()
        }
    return {path: list(tree) if isinstance(tree, tuple) else tree}


def _word(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not given"
