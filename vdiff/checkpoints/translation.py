"""A part of a checkpoint from the layout it is in to another, some tensors held at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.checkpoints.architecture import Told
from vdiff.checkpoints.keymap import KeyMapError, Move
from vdiff.checkpoints.loading import MismatchError
from vdiff.checkpoints.recognition import Part
from vdiff.checkpoints.sources import WeightSource

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
class Step:
    """Tensors that are read together, by their names in the part, and what is done to them."""

    sources: tuple[str, ...]
    to_ours: tuple[Move, ...]
    to_theirs: tuple[Move, ...]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = _moved(self.to_ours, tensors)
        return _moved(self.to_theirs, ours)


class Translation:
    """One part of a checkpoint in another layout, tensor by tensor.

    Every tensor goes by our names, over two tables: from the layout it is in, to the one it is wanted in. What is fused
    in one and cut in the other is read and written together, and nothing else is held.

    Args:
        source: Of the tensors.
        part: Of it, with its layout.
        to: Layout.
        weights: ``ema`` takes the exponential average where the part has one, ``raw`` does not.
        given: What names and shapes do not tell, see :class:`vdiff.checkpoints.architecture.Told`.

    Attributes:
        described: Names and shapes that come out, on the meta device.
        origin: Names that come out, and those within the part that each is made of.
        left_out: Names in the source that only its layout has.

    Raises:
        KeyMapError: names without a place in the other layout, or of which some are missing.
        MismatchError: shapes that contradict each other.
    """

    def __init__(
        self,
        source: WeightSource,
        part: Part,
        to: str,
        weights: str = "ema",
        given: Mapping[str, int] | None = None,
    ) -> None:
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
            back = part.family.layout(part.layout).table(Told(meta, given or {})).inverse.moves(meta)
            ours = _moved(back, meta)
            _check_shapes(ours, where)
            there = target.table(Told(ours, given or {})).moves(ours)
        except KeyMapError as error:
            raise KeyMapError(f"{where}, {part.layout} to {to}: {error}") from error
        self._steps = _joined(back, there)
        self._dtype = Counter(value.dtype for value in meta.values()).most_common(1)[0][0]
        self.described: dict[str, Tensor] = {}
        self.origin: dict[str, tuple[str, ...]] = {}
        for step in self._steps:
            done = {name: value.to("meta") for name, value in self._done(step, meta).items()}
            self.described |= done
            self.origin |= dict.fromkeys(done, step.sources)
        self.left_out = tuple(self._names[name] for move in back if not move.targets for name in move.sources)
        self.numbers = sum(value.numel() for value in self.described.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What comes out, one step after the other."""
        for step in self._steps:
            tensors = {}
            for name in step.sources:
                tensors[name] = self._source[self._names[name]]
                if not _is_finite(tensors[name]):
                    raise MismatchError(
                        f"{self._source.path}: {self._names[name]} is not finite (NaN or infinite weights)."
                    )
            yield from self._done(step, tensors).items()

    def _done(self, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        done = step({name: tensors[name] for name in step.sources})
        if step.sources:
            return done
        return {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in done.items()}


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
