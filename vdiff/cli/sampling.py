"""``vdiff sample`` and ``vdiff evaluate``."""

from __future__ import annotations

import argparse
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from vdiff.conditioners import ClassLabelEmbedder, EmbedderConditioner
from vdiff.data import Dataset
from vdiff.engine import DiffusionEngine
from vdiff.evaluation import Reference, Samples, grid, save_figures, save_picture, table
from vdiff.evaluation import evaluate as measure
from vdiff.process import ExplicitDiscretizer
from vdiff.registry import Config, build, entries, load_config, lookup, signature
from vdiff.samplers import CFGGuider, NoneGuider, Sampler
from vdiff.training import choose_device


def sample(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments)
    labels = _labels(engine, arguments.label, arguments.num)
    images = draw(engine, arguments, labels, arguments.num)
    out = Path(arguments.out or Path(arguments.folder) / "samples.png")
    if out.suffix == ".safetensors":
        from vdiff.checkpoints import save_weights

        save_weights(
            out, {"samples": images} | ({} if labels is None else {"labels": labels}), {"weights": engine.weights}
        )
    else:
        low, high = engine.first_stage.pixel_range
        columns = arguments.columns or (10 if labels is not None and arguments.num % 10 == 0 else None)
        picture = grid(images, columns, low, high, upscale=arguments.upscale, smooth=not arguments.crisp)
        save_picture(picture, out)
    print(f"{out}: {arguments.num} samples with the {engine.weights}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    run = Path(arguments.folder)
    engine = load_engine(arguments)
    config = _config(arguments)
    metrics = [build({"type": name}, "metric") for name in arguments.metric or entries("metric")]
    data: dict[str, Dataset] = {name: build(node, "dataset", f"data.{name}") for name, node in config["data"].items()}
    if "validation" not in data:
        raise ValueError(f"{run}: its config has no data.validation to compare with.")
    reference = Reference.of(data["train"], data["validation"], image=engine.input_key)
    labels = None
    if _embedders(engine) and reference.train_labels is not None and reference.test_labels is not None:
        labels = torch.cat([reference.train_labels, reference.test_labels])
    num = arguments.num or len(reference.train_images) + len(reference.test_images)
    if labels is not None:
        labels = labels[torch.arange(num) % len(labels)]
    images = draw(engine, arguments, labels, num)
    figures = {"num_samples": float(num), **measure(Samples(images, labels), reference, metrics)}
    out = Path(arguments.out or run / "evaluation.json")
    save_figures(figures, out)
    print(f"{run}: {num} samples with the {engine.weights}, solver {_spell(engine.sampler)}")
    print(table(figures))
    print(f"figures in {out}")
    return 0


def load_engine(arguments: argparse.Namespace) -> DiffusionEngine:
    """The engine of the run, with solver and guidance as asked for."""
    weights = arguments.weights
    if weights is None and (Path(arguments.folder) / "config.yaml").is_file():
        weights = "raw" if _config(arguments).get("training", {}).get("ema") is None else "ema"
    engine = DiffusionEngine.load(arguments.folder, weights or "ema", arguments.step, arguments.allow_imports)
    assert isinstance(engine, DiffusionEngine)
    engine.to(choose_device(arguments.device))
    if arguments.solver is not None or arguments.steps is not None:
        engine.sampler = resampled(engine.sampler, arguments.solver, arguments.steps)
    if arguments.guidance is not None:
        _guide(engine, arguments.guidance)
    return engine


def _config(arguments: argparse.Namespace) -> Config:
    file = Path(arguments.folder) / "config.yaml"
    return load_config(file, interpolate=False, allow_imports=arguments.allow_imports)


def resampled(sampler: Sampler, solver: str | None, steps: int | None) -> Sampler:
    """Another number of steps, or another solver with what all of them share: levels, noise source and start.

    A list of levels fits one number of steps; for another the solver chooses its own.
    """
    if solver is None:
        changed = copy(sampler)
    else:
        taken = signature(lookup("sampler", solver).target)
        shared = {name: getattr(sampler, name) for name in signature(Sampler) if name in taken}
        changed = build({"type": solver, **shared}, "sampler")
    if steps is not None:
        if isinstance(changed.discretizer, ExplicitDiscretizer) and steps != changed.num_steps:
            changed.discretizer = None
        changed.num_steps = steps
    return changed


def draw(engine: DiffusionEngine, arguments: argparse.Namespace, labels: Tensor | None, num: int) -> Tensor:
    """Samples in batches, with a progress bar; each depends on its own seed and label alone."""
    from rich.progress import Progress

    images = []
    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=num)
        for start in range(0, num, arguments.batch_size):
            rows = min(arguments.batch_size, num - start)
            cond = None if labels is None else {_label_field(engine): labels[start : start + rows]}
            images.append(engine.sample(cond, num=rows, seeds=arguments.seed + start).cpu())
            bar.advance(task, rows)
    low, high = engine.first_stage.pixel_range
    return torch.cat(images).clamp(low, high)


def _guide(engine: DiffusionEngine, scale: float) -> None:
    """The run's own guider at another scale; one without a scale is not replaced behind the user's back."""
    if isinstance(engine.guider, NoneGuider):
        engine.guider = CFGGuider(scale)
    elif hasattr(engine.guider, "scale"):
        engine.guider.scale = scale  # type: ignore[attr-defined]
    else:
        raise ValueError(f"--guidance: this run's guider, {type(engine.guider).__name__}, has no scale.")


def _embedders(engine: DiffusionEngine) -> list[ClassLabelEmbedder]:
    conditioner = engine.conditioner
    found = conditioner.embedders if isinstance(conditioner, EmbedderConditioner) else []
    return [e for e in found if isinstance(e, ClassLabelEmbedder)]


def _label_field(engine: DiffusionEngine) -> str:
    embedders = _embedders(engine)
    if len(embedders) != 1:
        raise ValueError(f"labels: this engine has {len(embedders)} class embedders, the command line serves one.")
    return embedders[0].reads


def _labels(engine: DiffusionEngine, asked: list[int] | None, num: int) -> Tensor | None:
    """Asked ones in turn, or all classes in turn, or None for an engine without classes."""
    if not _embedders(engine):
        if asked:
            raise ValueError("--label: this engine is not conditioned on classes.")
        return None
    num_classes = _embedders(engine)[0].num_classes
    if wrong := [label for label in asked or () if not 0 <= label < num_classes]:
        raise ValueError(f"--label {wrong[0]}: the classes of this engine are 0 to {num_classes - 1}.")
    cycle = asked or list(range(num_classes))
    return torch.tensor([cycle[i % len(cycle)] for i in range(num)])


def _spell(sampler: Sampler) -> str:
    return f"{type(sampler).registered_name} with {sampler.num_steps} steps"
