"""``vdiff sample`` and ``vdiff evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from vdiff.cli.conditions import Fields, asked_fields, cycled, fields_of, negative_fields, numbers, together
from vdiff.cli.reconstruction import evaluate_autoencoder
from vdiff.cli.runs import run_config
from vdiff.data import Dataset
from vdiff.engine import AutoencoderEngine, DiffusionEngine, Engine
from vdiff.evaluation import Metric, Reference, Samples, film, grid, save_figures, save_film, save_picture, table
from vdiff.evaluation import evaluate as measure
from vdiff.evaluation.videos import FILM_SUFFIXES, import_av
from vdiff.process import ExplicitDiscretizer
from vdiff.registry import build, entries, lookup, signature
from vdiff.samplers import CFGGuider, NoneGuider, Sampler
from vdiff.training import choose_device

MOST = 4096  # examples of each split that samples are held against


def sample(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments)
    if not isinstance(engine, DiffusionEngine):
        raise ValueError(
            f"{arguments.folder}: {type(engine).__name__} draws no samples. How well it reconstructs: vdiff evaluate."
        )
    fields = asked_fields(engine, arguments)
    against = negative_fields(engine, arguments.negative)
    out = _out(engine, arguments)
    rows = cycled(fields, arguments.num)
    images = draw(engine, arguments, rows, arguments.num, against)
    if out.suffix == ".safetensors":
        from vdiff.checkpoints import save_weights

        save_weights(out, {"samples": images, **numbers(engine, rows)}, {"weights": engine.weights})
    else:
        low, high = engine.first_stage.pixel_range
        turns = max((len(values) for values in fields.values()), default=1)
        turns = turns if 1 < turns <= 32 else 10
        columns = arguments.columns or (turns if fields and arguments.num % turns == 0 else None)
        looks = {"upscale": arguments.upscale, "smooth": not arguments.crisp}
        if images.ndim == 5:
            save_film(film(images, columns, low, high, **looks), out, arguments.fps)
        else:
            save_picture(grid(images, columns, low, high, **looks), out)
    print(f"{out}: {arguments.num} samples with the {engine.weights}")
    return 0


def _out(engine: DiffusionEngine, arguments: argparse.Namespace) -> Path:
    """The file to write, refused before the work is done that it is to keep."""
    is_video = len(engine.sample_shape or ()) == 4
    legal = (*(FILM_SUFFIXES if is_video else (".png",)), ".safetensors")
    out = Path(arguments.out or Path(arguments.folder) / f"samples{legal[0]}")
    if out.suffix not in legal:
        raise ValueError(
            f"--out {out}: samples of this run are {'videos' if is_video else 'pictures'}; they are saved as "
            f"{', '.join(legal)}."
        )
    if out.suffix == ".mp4":
        import_av("--out")
    return out


def evaluate(arguments: argparse.Namespace) -> int:
    run = Path(arguments.folder)
    engine = load_engine(arguments)
    config = run_config(arguments.folder, arguments.allow_imports)
    data: dict[str, Dataset] = {name: build(node, "dataset", f"data.{name}") for name, node in config["data"].items()}
    if "validation" not in data:
        raise ValueError(f"{run}: its config has no data.validation to compare with.")
    if isinstance(engine, AutoencoderEngine):
        return evaluate_autoencoder(engine, data, arguments)
    assert isinstance(engine, DiffusionEngine)
    reference = Reference.of(data["train"], data["validation"], image=engine.input_key, most=MOST)
    num = arguments.num or len(reference.train_images) + len(reference.test_images)
    told = [arguments.prompts_of] if arguments.prompts_of else ["train", "validation"]
    fields, labels = fields_of(engine, [data[name] for name in told], num)
    metrics = _metrics(arguments.metric, reference, labels is not None)
    images = draw(engine, arguments, fields, num)
    figures = {"num_samples": float(num), **measure(Samples(images, labels), reference, metrics)}
    out = Path(arguments.out or run / "evaluation.json")
    save_figures(figures, out)
    print(f"{run}: {num} samples with the {engine.weights}, solver {_spell(engine.sampler)}")
    print(table(figures))
    print(f"figures in {out}")
    return 0


def _metrics(asked: Sequence[str] | None, reference: Reference, has_labels: bool) -> list[Metric]:
    """Those asked for, refused before samples are drawn for them, or all that fit."""
    metrics = [build({"type": name}, "metric") for name in asked or entries("metric")]
    for metric in metrics if asked else ():
        if not metric.fits(reference, has_labels):
            raise ValueError(
                f"evaluate: {type(metric).__name__} does not fit this run: it measures other samples, or needs labels, "
                "which these data or this engine's conditions do not have."
            )
    return [metric for metric in metrics if metric.fits(reference, has_labels)]


def load_engine(arguments: argparse.Namespace) -> Engine:
    """The engine of the run; that of a diffusion model with solver and guidance as asked for."""
    weights = arguments.weights
    if weights is None and (Path(arguments.folder) / "config.yaml").is_file():
        training = run_config(arguments.folder, arguments.allow_imports).get("training", {})
        weights = "raw" if training.get("ema") is None else "ema"
    engine = Engine.load(arguments.folder, weights or "ema", arguments.step, arguments.allow_imports)
    engine.to(choose_device(arguments.device))
    if not isinstance(engine, DiffusionEngine):
        return engine
    if arguments.solver is not None or arguments.steps is not None:
        engine.sampler = resampled(engine.sampler, arguments.solver, arguments.steps)
    if arguments.guidance is not None:
        _guide(engine, arguments.guidance)
    return engine


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


def draw(
    engine: DiffusionEngine, arguments: argparse.Namespace, fields: Fields, num: int, negative: Fields | None = None
) -> Tensor:
    """Samples in batches, with a progress bar; each depends on its own seed and conditions alone.

    Args:
        fields: For each batch field one value per sample.
        negative: Fields to put in their place for what guidance moves away from, one value for all samples.
    """
    from rich.progress import Progress

    images = []
    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=num)
        for start in range(0, num, arguments.batch_size):
            rows = min(arguments.batch_size, num - start)
            cond = {name: together(values[start : start + rows]) for name, values in fields.items()} or None
            against = cond and negative and {**cond, **{name: values * rows for name, values in negative.items()}}
            images.append(engine.sample(cond, negative=against, num=rows, seeds=arguments.seed + start).cpu())
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


def _spell(sampler: Sampler) -> str:
    return f"{type(sampler).registered_name} with {sampler.num_steps} steps"
