"""Whole checkpoints from one layout to another, in one pass: some tensors held at a time, and nothing half written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vdiff.checkpoints.keymap import KeyMapError
from vdiff.checkpoints.loading import summary
from vdiff.checkpoints.recognition import ONLY_THERE, Part, described, recognise
from vdiff.checkpoints.shards import write_streamed
from vdiff.checkpoints.sources import STEMS, WeightSource
from vdiff.checkpoints.translation import Translation
from vdiff.registry import did_you_mean

VECTOR = ("label_emb.", "add_embedding.")  # of a network that is told a vector
DIFFUSERS_OWN = ("network", "control", "first_stage")  # whose files it names; transformers those of towers
NO_DECODER = "of a second autoencoder, where diffusers has one"


@dataclass(frozen=True)
class Converted:
    """What went where.

    Attributes:
        parts: For each, its family, the layout it was in, its tensors and numbers as written, and whether they are of
            the exponential average.
        beside: Names that nobody needs, by reason.
        ignored: Names that were to be left out.
        files: As written.
    """

    parts: tuple[tuple[str, str, int, int, bool], ...]
    beside: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    files: tuple[Path, ...]


def convert(
    source: WeightSource,
    out: str | Path,
    to: str,
    *,
    parts: Collection[str] = (),
    ignore: Sequence[str] = (),
    weights: str = "ema",
    shard_size: int | None = None,
    given: Mapping[str, int] | None = None,
) -> Converted:
    """Write a checkpoint in another layout, as safetensors: whole or not at all.

    Args:
        out: File; for diffusers a folder, where the checkpoint is not one part alone.
        to: Layout, ``vdiff``, ``diffusers``, ``ldm``, ``sgm``, ``sat``, ``lvdm``, ``dynamicrafter`` or
            ``dynamicrafter_256``.
        parts: Families to take. By default all, and then every other name is an error.
        ignore: How names begin that are left out.
        weights: ``ema`` takes the exponential average where the file has one, ``raw`` does not.
        shard_size: Bytes of a shard at most (more where one tensor is larger), with an index. None: one file.
        given: What names and shapes do not tell, see :class:`vdiff.checkpoints.architecture.Told`.

    Raises:
        UnknownFamilyError: no family fits the names.
        KeyMapError: names without a place in the other layout, or of which some are missing.
        MismatchError: shapes that contradict each other, or weights that are not finite.
    """
    out, given = Path(out), dict(given or {})
    ignored = tuple(name for name in source.header if name.startswith(tuple(ignore)))
    for prefix in ignore:
        if not any(name.startswith(prefix) for name in ignored):
            raise KeyMapError(f"{source.path}: no name begins with {prefix!r}. They begin: {summary(source.header)}.")
    left = {name: value for name, value in source.header.items() if name not in set(ignored)}
    found = recognise(left, str(source.path))
    if found.unknown and not parts:
        names = ", ".join(part.family.name for part in found.parts)
        raise KeyMapError(
            f"{source.path}: {len(found.unknown)} tensors have no table: {described(found.unknown)}.\n"
            f"  Leave them out by how they begin, --ignore PREFIX, or say what to take, --part NAME, of: {names}."
        )
    known = {part.family.name: part for part in found.parts}
    for name in parts:
        if name not in known:
            raise ValueError(f"{source.path}: no part {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}.")
    taken, beside = _arranged([part for part in found.parts if not parts or part.family.name in parts], to)
    files = _files(taken, out, to)
    plans = [Translation(source, part, to, weights, given) for part in taken]
    targets: dict[Path, dict[str, Tensor]] = {}
    for plan, (file, prefix) in zip(plans, files, strict=True):
        targets.setdefault(file, {}).update({prefix + name: value for name, value in plan.described.items()})

    def stream() -> Iterator[tuple[Path, str, Tensor]]:
        for plan, (file, prefix) in zip(plans, files, strict=True):
            for name, value in plan.tensors():
                yield file, prefix + name, value

    written = write_streamed(targets, stream(), shard_size)
    said = tuple((p.part.family.name, p.part.layout, len(p.described), p.numbers, p.is_averaged) for p in plans)
    left_out = {ONLY_THERE: tuple(name for plan in plans for name in plan.left_out)} | beside
    beside = {**found.beside, **{reason: names for reason, names in left_out.items() if names}}
    return Converted(said, beside, ignored, tuple(written))


def _arranged(parts: Sequence[Part], to: str) -> tuple[list[Part], dict[str, tuple[str, ...]]]:
    """The parts as a layout has them, and what it has no place for.

    Stable Video Diffusion has an autoencoder for the condition and one for the data, whose encoder needs the ``quant
    conv`` of the other; in diffusers' pipeline they are one.
    """
    by_slot = {part.slot: part for part in parts}
    stage, other = by_slot.get("first_stage"), by_slot.get("condition_stage")
    if stage is None or other is None:
        return list(parts), {}
    convolution = {name: full for name, full in other.names.items() if name.startswith("quant_conv.")}
    if to == "diffusers":
        whole = replace(stage, names={**convolution, **stage.names})
        used = {*whole.names.values()}
        left_out = tuple(full for full in other.names.values() if full not in used)
        return [whole if part is stage else part for part in parts if part is not other], {NO_DECODER: left_out}
    if stage.layout == "diffusers":
        stage_alone = replace(stage, names={n: full for n, full in stage.names.items() if n not in convolution})
        return [stage_alone if part is stage else part for part in parts], {}
    return list(parts), {}


def _files(parts: Sequence[Part], out: Path, to: str) -> list[tuple[Path, str]]:
    """Of each part, the file it goes to and what its names begin with there."""
    is_bare = len(parts) == 1 and parts[0].prefix == ""
    if out.suffix != ".safetensors" and to != "diffusers":
        raise ValueError(f"{out}: what is written is a .safetensors file.")
    if out.suffix == ".safetensors" and (is_bare or (to == "diffusers" and len(parts) == 1)):
        return [(out, "")]
    prefixes = [_prefix(part, to, parts) for part in parts]
    if to != "diffusers":
        return [(out, prefix) for prefix in prefixes]
    if out.suffix == ".safetensors":
        names = ", ".join(part.family.name for part in parts)
        raise ValueError(f"{out}: diffusers keeps {names} in folders of their own; OUT is a folder, or --part one.")
    stems = [STEMS[part.slot not in DIFFUSERS_OWN] for part in parts]
    return [(out / prefix / f"{stem}.safetensors", "") for prefix, stem in zip(prefixes, stems, strict=True)]


def _prefix(part: Part, to: str, parts: Sequence[Part]) -> str:
    """What a part's names begin with. diffusers has a text tower alone in the second place, of SDXL's refiner."""
    alike = [other for other in parts if other.slot == part.slot]
    number, order = part.number, alike.index(part)
    if part.slot == "text" and len(alike) == 1 and part.family.name == "open_clip_text":
        has_vector = any(name.startswith(VECTOR) for other in parts if other.slot == "network" for name in other.names)
        order = int(to == "diffusers" and has_vector)
        number = 0 if part.layout == "diffusers" else number
    try:
        return part.family.prefix(to, part.slot, number, order)
    except ValueError as error:
        what = f"{part.family.name} ({part.prefix}*)"
        raise KeyMapError(f"{what}: {error} Leave it out: --ignore {part.prefix}") from None
