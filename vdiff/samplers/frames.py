"""Plans whose levels differ by frame: the plans of all frames, side by side in one walk.

Each frame is planned by itself, by the solver as it is. A stage of the walk is one call for all frames; its
coefficients are one number per frame, zero for a name that a frame does not use. A frame whose level does not
change has no say in the step: it keeps its state and its history, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vdiff.samplers.noise import Increments, NoiseSource, spans
from vdiff.samplers.plan import Node, Stage

Vector = tuple[float, ...]  # one number per frame


@dataclass(frozen=True)
class FrameStage:
    """One network call for frames at levels of their own.

    Attributes:
        frames: The level of each frame.
        node: The noisiest level among the frames that move: what guiders and edits go by.
        ask, update: As in :class:`Stage`, with one coefficient per frame.
        store: ``name: combination``; 0 and 1 choose what each frame stores or keeps.
        ends_step: Whether this call completes a step of the sampler.
    """

    frames: tuple[Node, ...]
    node: Node
    ask: Mapping[str, Vector]
    update: Mapping[str, Vector]
    store: Mapping[str, Mapping[str, Vector]]
    ends_step: bool


def along(plan: Callable[[Sequence[Node]], Iterable[Stage]], nodes: Sequence[Node]) -> list[Stage]:
    """The walk of all frames along one list of levels. Once at data it rests there."""
    moving = list(nodes)
    while len(moving) > 1 and moving[-1].sigma == moving[-2].sigma == 0:
        moving.pop()
    rests = [Stage(nodes[-1], {"x": 1.0}) for _ in range(len(nodes) - len(moving))]
    return [*(plan(moving) if len(moving) > 1 else ()), *rests]


def steps_of(plan: Callable[[Sequence[Node]], Iterable[Stage]], nodes: Sequence[Node]) -> list[list[Stage]]:
    """The stages of each step of one frame; none where its level does not change."""
    moving = [nodes[0], *(then for now, then in pairwise(nodes) if then.ratio != now.ratio)]
    planned: list[list[Stage]] = [[]]
    for stage in plan(moving) if len(moving) > 1 else ():
        planned[-1].append(stage)
        if stage.ends_step:
            planned.append([])
    walk = iter(planned)
    return [next(walk) if then.ratio != now.ratio else [] for now, then in pairwise(nodes)]


def side_by_side(
    plan: Callable[[Sequence[Node]], Iterable[Stage]], columns: Sequence[Sequence[Node]]
) -> tuple[list[FrameStage], list[list[Stage]]]:
    """The walk of all frames, and what each of them does in it, one stage per call.

    A frame with fewer calls in a step waits at its level until its own begin.
    """
    planned = {column: steps_of(plan, column) for column in dict.fromkeys(map(tuple, columns))}
    lanes: dict[tuple[Node, ...], list[Stage]] = {column: [] for column in planned}
    still: dict[tuple[Node, ...], list[bool]] = {column: [] for column in planned}
    for step in range(len(columns[0]) - 1):
        num_calls = max(1, *(len(steps[step]) for steps in planned.values()))
        for column, steps in planned.items():
            own = steps[step]
            for call in range(num_calls):
                waits = call < num_calls - len(own)
                stage = Stage(column[step], {"x": 1.0}, ends_step=call == num_calls - 1)
                lanes[column].append(stage if waits else own[call - (num_calls - len(own))])
                still[column].append(waits)
    by_frame = [lanes[tuple(column)] for column in columns]
    waits_by_frame = [still[tuple(column)] for column in columns]
    known: set[str] = {"x", "x0"}
    stages = []
    for row, waits in zip(zip(*by_frame, strict=True), zip(*waits_by_frame, strict=True), strict=True):
        stages.append(_joined(row, waits, known))
        known.update(stages[-1].store)
    return stages, by_frame


def _joined(stages: Sequence[Stage], waits: Sequence[bool], known: set[str]) -> FrameStage:
    moving = [s.node for s, w in zip(stages, waits, strict=True) if not w] or [s.node for s in stages]
    store = {}
    for name in dict.fromkeys(name for stage in stages for name in stage.store):
        kept = name if name in known else "x0"  # before anything is stored, anything may stand there
        store[name] = _vectors([{stage.store.get(name, kept): 1.0} for stage in stages])
    return FrameStage(
        tuple(stage.node for stage in stages),
        max(moving, key=lambda node: node.ratio),
        _vectors([stage.ask for stage in stages]),
        _vectors([stage.update for stage in stages]),
        store,
        stages[0].ends_step,
    )


def _vectors(combinations: Sequence[Mapping[str, float]]) -> dict[str, Vector]:
    names = dict.fromkeys(name for terms in combinations for name in terms)
    return {name: tuple(terms.get(name, 0.0) for terms in combinations) for name in names}


def noise_by_frame(
    source: NoiseSource, lanes: Sequence[Sequence[Stage]], ends: Sequence[Node], seeds: Sequence[int], like: Tensor
) -> Increments:
    """Fresh noise for frames that walk at levels of their own: each follows its own stretches of the path."""
    spanned = [spans(lane, end) for lane, end in zip(lanes, ends, strict=True)]
    sources = [source.along(own) for own in spanned]
    if all(own is sources[0] for own in sources):
        return sources[0].bind(seeds, like)
    bound: list[Increments] = []
    for i, own in enumerate(sources):
        first = spanned.index(spanned[i])
        bound.append(bound[first] if first < i else own.bind(seeds, like))
    axis = frame_axis(like)

    def draw(number: int) -> Tensor:
        drawn = {id(increments): increments(number) for increments in bound}
        return torch.stack([drawn[id(own)].select(axis, f) for f, own in enumerate(bound)], axis)

    return draw


def frame_axis(x: Tensor) -> int:
    """The axis of the frames: ``b c f ...``, or ``b f``."""
    return 2 if x.ndim > 2 else 1


def check_frames(num_frames: int, x: Tensor, where: str) -> None:
    """Refuse levels by frame for samples that do not have as many frames."""
    if x.ndim < 2 or x.shape[frame_axis(x)] != num_frames:
        raise ValueError(
            f"{where}: levels of {num_frames} frames for samples of shape {tuple(x.shape)}. Their frames are the third "
            "axis, b c f h w, or the second of b f."
        )
