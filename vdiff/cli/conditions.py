"""What samples are asked to be: from words on the command line, or from the rows of data sets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.conditioners import ClassLabelEmbedder, Embedder, EmbedderConditioner, FieldEmbedder, TextEmbedder
from vdiff.data import Dataset, Framing, Row, read_picture
from vdiff.engine import DiffusionEngine
from vdiff.samplers import NoneGuider

_READS: dict[str, Callable[[DiffusionEngine, Embedder], bool]] = {
    "classes": lambda _, embedder: isinstance(embedder, ClassLabelEmbedder),
    "text": lambda _, embedder: isinstance(embedder, TextEmbedder),
    "pictures": lambda engine, embedder: _is_picture(engine, embedder.reads),
}
Fields = dict[str, Any]
"""By batch field a list, or a tensor, of values: one per sample, or some to be gone through in turn."""


def asked_fields(engine: DiffusionEngine, arguments: argparse.Namespace) -> Fields:
    """What the conditions were asked to be, for every field of the engine, to be gone through in turn.

    If nothing is asked, a field takes its default, or goes through all its values where they can be counted.
    """
    words = [(field, word, f"--field {field}={word}") for field, word in arguments.field or ()]
    for label in arguments.label or ():
        words.append((_the(engine, "classes", "--label"), str(label), f"--label {label}"))
    for file in arguments.image or ():
        words.append((_the(engine, "pictures", "--image"), file, "--image"))
    prompts = list(arguments.prompt or ())
    for file in arguments.prompts or ():
        prompts += _lines(Path(file))
    words += [(_the(engine, "text", "--prompt"), prompt, "--prompt") for prompt in prompts]
    readers, gated = {e.reads: e for e in _embedders(engine)}, _gated(engine)
    fields: Fields = {}
    for field, word, option in words:
        if field not in readers and field not in gated:
            known = ", ".join([*readers, *gated]) or "nothing"
            raise ValueError(f"{option}: this engine is told {known}, and no {field!r}.")
        try:
            if field in gated:
                value = _gating(word, gated[field])
            else:
                value = _picture(engine, Path(word)) if _is_picture(engine, field) else readers[field].parse(word)
            fields.setdefault(field, []).append(value)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
    for field, embedder in readers.items():
        usual = embedder.choices if embedder.default is None else [embedder.default]
        if field not in fields and usual is not None:
            fields[field] = list(usual)
    if missing := [field for field in readers if field not in fields]:
        if unsaid := [field for field in missing if not _can_say(engine, readers[field])]:
            given = ", ".join(f"{field!r}: ..." for field in missing)
            raise ValueError(
                f"this engine is also told {', '.join(missing)}, and no word can say {', '.join(unsaid)}. Sample from "
                f"Python: DiffusionEngine.load(RUN).sample({{{given}}})."
            )
        ways = " and ".join(_way(engine, readers[field]) for field in missing)
        raise ValueError(f"this engine is also told {', '.join(missing)}; say {ways}.")
    return {field: fields[field] for field in readers} | {field: fields.get(field, [0]) for field in gated}


def negative_fields(engine: DiffusionEngine, prompt: str | None) -> Fields | None:
    if prompt is None:
        return None
    field = _the(engine, "text", "--negative")
    if isinstance(engine.guider, NoneGuider) or getattr(engine.guider, "scale", None) == 1:
        raise ValueError("--negative: without guidance there is nothing to move away from; add --guidance, such as 3.")
    return {field: [prompt]}


def _embedders(engine: DiffusionEngine) -> list[Embedder]:
    conditioner = engine.conditioner
    return list(conditioner.embedders) if isinstance(conditioner, EmbedderConditioner) else []  # type: ignore[arg-type]


def _gated(engine: DiffusionEngine) -> dict[str, list[Any]]:
    """Fields that gates read and no embedder, with the values they name; where a batch has none of them, it is 0."""
    conditioner = engine.conditioner
    fields: dict[str, list[Any]] = {}
    for rule in conditioner.gates.values() if isinstance(conditioner, EmbedderConditioner) else ():
        for field, values in rule.items():
            fields.setdefault(field, []).extend(values)
    return {field: values for field, values in fields.items() if field not in {e.reads for e in _embedders(engine)}}


def _gating(word: str, named: Sequence[Any]) -> Any:
    """One of the values that gates name, or a number that may be none of them."""
    for value in named:
        if word == str(value):
            return value
    try:
        return int(word)
    except ValueError:
        known = ", ".join(str(value) for value in dict.fromkeys(named))
        raise ValueError(f"a gate reads {known} there, or a whole number for none.") from None


def _the(engine: DiffusionEngine, noun: str, option: str) -> str:
    """The one field that an option means."""
    fields = list(dict.fromkeys(e.reads for e in _embedders(engine) if _READS[noun](engine, e)))
    if not fields:
        raise ValueError(f"{option}: this engine is not conditioned on {noun}.")
    if len(fields) > 1:
        raise ValueError(f"{option}: this engine is told {noun} by {', '.join(fields)}; say --field {fields[0]}=...")
    return fields[0]


def _is_picture(engine: DiffusionEngine, field: str) -> bool:
    """Whether all that reads a field takes a picture in the shape of samples."""
    shape = engine.sample_shape
    is_of_pixels = shape is None or tuple(engine.first_stage.latent_shape(shape))[-2:] == tuple(shape)[-2:]
    # What is handed on as it is lies on latents, as the mask of Stable Diffusion's inpainting does.
    return all(
        embedder.is_picture and (is_of_pixels or not isinstance(embedder, FieldEmbedder))
        for embedder in _embedders(engine)
        if embedder.reads == field
    )


def _can_say(engine: DiffusionEngine, embedder: Embedder) -> bool:
    if embedder.is_picture:
        return _is_picture(engine, embedder.reads)
    return type(embedder).parse is not Embedder.parse


def _way(engine: DiffusionEngine, embedder: Embedder) -> str:
    """How a field is said on the command line."""
    if _is_picture(engine, embedder.reads):
        is_only = all(e.reads == embedder.reads for e in _embedders(engine) if _READS["pictures"](engine, e))
        return "--image FILE" if is_only else f"--field {embedder.reads}=FILE"
    return "--prompt TEXT" if isinstance(embedder, TextEmbedder) else f"--field {embedder.reads}=..."


def _picture(engine: DiffusionEngine, file: Path) -> Tensor:
    """A picture as the engine's data are: its centre in their shape, in the values of their pixels."""
    shape = engine.sample_shape
    if shape is None or shape[0] not in (1, 3):
        raise ValueError(f"pictures are cut as samples are, and engine.sample_shape is {shape}; sample from Python.")
    pixels = read_picture(file, Framing((shape[-2], shape[-1]), channels=shape[0]))  # type: ignore[arg-type]
    low, high = engine.first_stage.pixel_range
    return pixels if (low, high) == (-1, 1) else low + (pixels + 1) / 2 * (high - low)


def _lines(file: Path) -> list[str]:
    """Prompts of a file, one a line; an empty line is none."""
    if not file.is_file():
        raise ValueError(f"--prompts: there is no file {file}.")
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    if not any(prompts):
        raise ValueError(f"--prompts: {file} has no line with a prompt.")
    return [prompt for prompt in prompts if prompt]


def cycled(fields: Fields, num: int) -> Fields:
    return {name: [rows[i % len(rows)] for i in range(num)] for name, rows in fields.items()}


def numbers(engine: DiffusionEngine, fields: Fields) -> dict[str, Tensor]:
    """Those of the fields that are numbers; the class of each sample as ``labels``."""
    names = {e.reads: "labels" if isinstance(e, ClassLabelEmbedder) else e.reads for e in _embedders(engine)}
    return {
        names.get(field, field): torch.as_tensor(values)
        for field, values in fields.items()
        if not any(isinstance(value, str | Tensor) for value in values)
    }


def fields_of(engine: DiffusionEngine, data: Sequence[Dataset], num: int) -> tuple[Fields, Tensor | None]:
    """The fields that the engine is told, and the labels, of ``num`` rows of several data sets, from the beginning
    again where they end."""
    embedders, gated = _embedders(engine), _gated(engine)
    if not embedders and not gated:
        return {}, None
    rows: list[Row] = []
    for dataset in data:
        for i in range(len(dataset)):
            if len(rows) < num:
                group = dataset[i]
                rows += group if isinstance(group, list) else [group]
    rows = [rows[i % len(rows)] for i in range(num)]
    labels = torch.tensor([int(row["label"]) for row in rows]) if embedders and "label" in rows[0] else None
    defaults = {e.reads: e.default for e in embedders} | dict.fromkeys(gated, 0)
    return {field: _column(rows, field, default) for field, default in defaults.items()}, labels


def _column(rows: Sequence[Row], field: str, default: Any) -> Any:
    if field not in rows[0] and default is not None:
        return [default] * len(rows)
    if field not in rows[0]:
        raise ValueError(f"the engine is told {field!r}, which the data have not. They have: {', '.join(rows[0])}.")
    return together([row[field] for row in rows])


def together(values: Any) -> Any:
    """Values of rows, as one tensor where each is one."""
    return torch.stack(values) if isinstance(values, list) and isinstance(values[0], Tensor) else values
