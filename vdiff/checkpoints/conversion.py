"""Whole checkpoints from one layout to another, in one pass: some tensors held at a time, and nothing half written.

Every tensor goes by our names, over two tables: from the layout it is in, to the one it is wanted in. What is fused in
one and cut in the other is read and written together, and nothing else is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.checkpoints.architecture import Told
from vdiff.checkpoints.keymap import KeyMapError, Move
from vdiff.checkpoints.loading import MismatchError, summary
from vdiff.checkpoints.recognition import Part, described, recognise
from vdiff.checkpoints.shards import write_streamed
from vdiff.checkpoints.sources import WeightSource
from vdiff.registry import did_you_mean

# Pairs of weights, by the ends of their names, and an axis of each that have the same length.
AGREEING = (
    (".to_k.weight", 0, ".to_v.weight", 0),
    (".to_k.weight", 1, ".to_v.weight", 1),
    (".to_q.weight", 0, ".to_k.weight", 0),
    (".in_layers.0.weight", 0, ".in_layers.2.weight", 1),
    (".out_layers.0.weight", 0, ".out_layers.3.weight", 1),
    (".norm1.weight", 0, ".conv1.weight", 1),
    (".norm2.weight", 0, ".conv2.weight", 1),
)


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


@dataclass(frozen=True)
class Step:
    """Tensors that are read together, by their names in the part, and what is done to them."""

    sources: tuple[str, ...]
    to_ours: tuple[Move, ...]
    to_theirs: tuple[Move, ...]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = _moved(self.to_ours, tensors)
        return _moved(self.to_theirs, ours)


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
        to: Layout, ``vdiff``, ``diffusers``, ``sgm``, ``sat``, ``lvdm`` or ``dynamicrafter``.
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
    taken = [part for part in found.parts if not parts or part.family.name in parts]
    files = _files(taken, out, to)
    plans = [_Plan(source, part, to, weights, given) for part in taken]
    targets: dict[Path, dict[str, Tensor]] = {}
    for plan, (file, prefix) in zip(plans, files, strict=True):
        targets.setdefault(file, {}).update({prefix + name: value for name, value in plan.described().items()})

    def stream() -> Iterator[tuple[Path, str, Tensor]]:
        for plan, (file, prefix) in zip(plans, files, strict=True):
            for name, value in plan.tensors():
                yield file, prefix + name, value

    written = write_streamed(targets, stream(), shard_size)
    said = tuple((p.part.family.name, p.part.layout, p.count, p.numbers, p.is_averaged) for p in plans)
    return Converted(said, found.beside, ignored, tuple(written))


class _Plan:
    """The steps of one part."""

    def __init__(self, source: WeightSource, part: Part, to: str, weights: str, given: Mapping[str, int]) -> None:
        self.part, self._source = part, source
        self.is_averaged = weights == "ema" and bool(part.averaged)
        self._names = {**part.names, **(part.averaged if self.is_averaged else {})}
        meta = {name: source.header[full] for name, full in self._names.items()}
        for name, full in self._names.items():
            if meta[name].shape != source.header[part.names[name]].shape:
                raise MismatchError(f"{source.path}: {full} has another shape than {part.names[name]}.")
        where = f"{source.path} ({part.family.name})"
        target = part.family.layout(to)
        try:
            back = part.family.layout(part.layout).table(Told(meta, given)).inverse.moves(meta)
            ours = _moved(back, meta)
            _check_shapes(ours, where)
            there = target.table(Told(ours, given)).moves(ours)
        except KeyMapError as error:
            raise KeyMapError(f"{where}, {part.layout} to {to}: {error}") from error
        self._steps = _joined(back, there)
        self._dtype = Counter(value.dtype for value in meta.values()).most_common(1)[0][0]
        self._targets = {n: v.to("meta") for step in self._steps for n, v in self._done(step, meta).items()}
        self.count = len(self._targets)
        self.numbers = sum(value.numel() for value in self._targets.values())

    def described(self) -> dict[str, Tensor]:
        """Names and shapes that come out, on the meta device."""
        return self._targets

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What comes out, one step after the other."""
        for step in self._steps:
            tensors = {}
            for name in step.sources:
                tensors[name] = self._source[self._names[name]]
                if not _is_finite(tensors[name]):
                    raise MismatchError(
                        f"{self._source.path}: {self._names[name]} is not finite (NaN or infinite weights); "
                        "nothing was written."
                    )
            yield from self._done(step, tensors).items()

    def _done(self, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        done = step({name: tensors[name] for name in step.sources})
        return done if step.sources else {name: value.to(self._dtype) for name, value in done.items()}


def _files(parts: Sequence[Part], out: Path, to: str) -> list[tuple[Path, str]]:
    """Of each part, the file it goes to and what its names begin with there."""
    is_bare = len(parts) == 1 and parts[0].prefix == ""
    if to == "diffusers" and out.suffix != ".safetensors":
        return [(out / part.family.prefix(to) / "diffusion_pytorch_model.safetensors", "") for part in parts]
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: what is written is a .safetensors file.")
    if to == "diffusers":
        if len(parts) > 1:
            names = ", ".join(part.family.name for part in parts)
            raise ValueError(f"{out}: diffusers keeps {names} in folders of their own; OUT is a folder, or --part one.")
        return [(out, "")]
    return [(out, "" if is_bare else part.family.prefix(to)) for part in parts]


def _joined(back: Sequence[Move], there: Sequence[Move]) -> list[Step]:
    """Moves that share a tensor, together."""
    owner = {name: i for i, move in enumerate(back) for name in move.targets}
    group = list(range(len(back)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for move in there:
        for name in move.sources:
            group[root(owner[name])] = root(owner[move.sources[0]])
    ours: dict[int, list[Move]] = {}
    theirs: dict[int, list[Move]] = {}
    for i, move in enumerate(back):
        ours.setdefault(root(i), []).append(move)
    for move in there:
        if move.sources:
            theirs.setdefault(root(owner[move.sources[0]]), []).append(move)
    steps = [
        Step(tuple(name for move in moves for name in move.sources), tuple(moves), tuple(theirs.get(i, ())))
        for i, moves in ours.items()
    ]
    return steps + [Step((), (), (move,)) for move in there if not move.sources]


def _moved(moves: Sequence[Move], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for move in moves:
        try:
            out |= move(*(tensors[name] for name in move.sources))
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in move.sources)
            raise MismatchError(f"{shapes}: cannot become {', '.join(move.targets)} by {move.change}.") from error
    return out


def _check_shapes(ours: Mapping[str, Tensor], where: str) -> None:
    """That shapes beside each other agree; of an architecture nothing is known but its names."""
    odd = []
    for name, weight in ours.items():
        bias = ours.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
        if bias is not None and bias.shape != weight.shape[:1]:
            odd.append(f"{name} {tuple(weight.shape)} and its bias {tuple(bias.shape)}")
        for end, axis, other_end, other_axis in AGREEING:
            other = ours.get(name.removesuffix(end) + other_end) if name.endswith(end) else None
            if other is None or max(axis - weight.ndim, other_axis - other.ndim) >= 0:
                continue
            if weight.shape[axis] != other.shape[other_axis]:
                odd.append(f"{name} {tuple(weight.shape)} and {other_end[1:]} {tuple(other.shape)}")
    if odd:
        more = f"; and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise MismatchError(f"{where}: wrong shapes, which contradict each other: {'; '.join(odd[:8])}{more}.")


def _is_finite(value: Tensor) -> bool:
    """By the least and the greatest, which are found without another tensor and are NaN if any is."""
    if not value.is_floating_point() or not value.numel():
        return True
    if value.element_size() == 1:  # torch compares no float8
        value = value.to(torch.bfloat16)
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))
