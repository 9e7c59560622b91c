"""The executor: runs every plan with the state in float32, no synchronisation and no tensor made per step.

Coefficients are Python floats handed to the kernels; under ``torch.compile``, and where levels differ by frame,
they are one table, uploaded once, so that another schedule is another table and not another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vdiff.process import Parameterization, Prediction, upload
from vdiff.samplers.frames import FrameStage
from vdiff.samplers.guided import Guided
from vdiff.samplers.noise import Drawn, Increments
from vdiff.samplers.plan import Node, Stage

# Names and coefficients of a linear combination. The first is a 0-d tensor on the host, which multiplies at half
# the cost of a Python float; the others are floats. Under torch.compile all are 0-d tensors on the device, and where
# levels differ by frame one number per frame.
Coefficient = float | tuple[float, ...]
Combination = list[tuple[str, Coefficient | Tensor]]
# Changes the clean sample that the network sees, ``(B, ...)``, given the level and the number of the call.
Edit = Callable[[Tensor, Node, int], Tensor]


class EarlyStop(Exception):
    """Raised by a callback to end the walk with the clean sample as last seen."""


class Terms(NamedTuple):
    """A stage as the executor runs it.

    Attributes:
        ask: What the network sees; None: the state.
        read: How its answer becomes x0; None: it is.
        update: The next state.
        store: What is stored: a source, or a combination of sources by frame.
    """

    ask: Combination | None
    read: Combination | None
    update: Combination
    store: Mapping[str, str | Combination]


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """What a callback sees after each step.

    Attributes:
        index, num_steps: Which step of how many, from 0.
        stage: The last network call of the step.
        x: The state after the step, ``(B, ...)``.
        x0: The clean sample as the network last saw it, after the edit if there is one: a preview.
        memory: What the solver stored, by name; with it the walk goes on from here (:meth:`Run.steps`).
    """

    index: int
    num_steps: int
    stage: Stage | FrameStage
    x: Tensor
    x0: Tensor
    memory: Mapping[str, Tensor]


class Run:
    """A plan bound to a guided denoiser and a batch.

    Args:
        stages: The plan.
        ask: The guided denoiser, called with what the network sees and the number of the call.
        language: In which the guided denoiser answers.
        readings: For each call ``(p, q)`` with ``x0 = p * x + q * value`` in that language; where levels differ by
            frame, one number per frame each.
        increments: Fresh noise by number; None if the plan wants none.
        edit: Changes what the network said of x0, at every call.
        axes: Where levels differ by frame, the shape in which one number per frame meets the state: ``(F, 1, 1)``.
    """

    def __init__(
        self,
        stages: Sequence[Stage] | Sequence[FrameStage],
        ask: Guided,
        language: Parameterization,
        readings: Sequence[tuple[Coefficient, Coefficient]],
        increments: Increments | None,
        edit: Edit | None = None,
        axes: tuple[int, ...] = (),
    ) -> None:
        self.stages: tuple[Stage | FrameStage, ...] = tuple(stages)
        self.ask = ask
        self.language = language
        self.increments = increments
        self.edit = edit
        planned = [
            Terms(
                None if set(stage.ask) == {"x"} and _is_one(stage.ask["x"]) else list(stage.ask.items()),
                None if language.name == "x0" else [("x", p), ("value", q)],
                list(stage.update.items()),
                {name: s if isinstance(s, str) else list(s.items()) for name, s in stage.store.items()},
            )
            for stage, (p, q) in zip(self.stages, readings, strict=True)
        ]
        flat = [value for terms in planned for combination in _combinations(terms) for _, value in combination]
        table = torch.tensor(flat, dtype=ask.dtype, device="cpu")
        self._table = upload(table.reshape(len(flat), *axes), ask.device)
        # By frame there is one way to multiply. Otherwise the first number of a combination is a tensor on the host.
        self._terms = _filled(planned, self._table) if axes else _filled(planned, table, first_only=True)

    @property
    def num_steps(self) -> int:
        return sum(stage.ends_step for stage in self.stages)

    def draw_ahead(self) -> Run:
        """Draw all fresh noise now, so that the walk can be compiled or captured whole; returns itself."""
        if self.increments is not None:
            used = [
                n for i, t in enumerate(self._terms) for n, c in ((2 * i, t.ask), (2 * i + 1, t.update)) if _is_noisy(c)
            ]
            self.increments = Drawn({number: self.increments(number) for number in used})
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """The end of the walk from the start state ``x``."""
        registers = {"x": x}
        for i, terms in enumerate(self._coefficients()):
            self._advance(i, registers, terms)
        return registers["x"]

    def steps(self, x: Tensor, after: SamplerStep | None = None) -> Generator[SamplerStep, Tensor | None, None]:
        """The walk, step by step; a state sent back takes the place of the one that came.

        Args:
            x: The state it begins at.
            after: The step it goes on from, bit for bit as if it had never stopped; then ``x`` is ``after.x``.
        """
        registers = {"x": x} if after is None else {"x": x, **after.memory}
        ends = [i for i, stage in enumerate(self.stages) if stage.ends_step]
        index = 0 if after is None else after.index + 1
        terms = self._coefficients()
        for i in range(ends[index - 1] + 1 if index else 0, len(self.stages)):
            self._advance(i, registers, terms[i])
            if i == ends[index]:
                memory = {name: value for name, value in registers.items() if name not in ("x", "x0")}
                changed = yield SamplerStep(index, len(ends), self.stages[i], registers["x"], registers["x0"], memory)
                if changed is not None:
                    registers["x"] = changed
                index += 1

    def _advance(self, i: int, registers: dict[str, Tensor], terms: Terms) -> None:
        """One call of the network: ``registers`` holds the state under ``x`` and what was stored."""
        ask, read, update, store = terms
        if ask is not None:
            registers["x"] = combine(ask, registers, self.increments, 2 * i)
        prediction = self.ask(registers["x"], i, registers)
        x0 = self._read(prediction, registers["x"], read)
        if prediction.renoise is not None:  # the noise that the solver reads from x and x0 is then that one's
            alpha = prediction.level.like(x0).alpha
            registers["x"] = registers["x"] + alpha * (x0 - prediction.renoise)
        registers["x0"] = x0 if self.edit is None else self.edit(x0, self.stages[i].node, i)
        state = combine(update, registers, self.increments, 2 * i + 1)
        if store:
            registers.update(
                {
                    name: registers[source] if isinstance(source, str) else combine(source, registers, None, 0)
                    for name, source in store.items()
                }
            )
        registers["x"] = state

    def _read(self, prediction: Prediction, x: Tensor, read: Combination | None) -> Tensor:
        if prediction.language is not self.language:  # a guider may answer in x0 directly
            return prediction.x0
        return prediction.value if read is None else combine(read, {"x": x, "value": prediction.value}, None, 0)

    def _coefficients(self) -> Sequence[Terms]:
        return _filled(self._terms, self._table) if torch.compiler.is_compiling() else self._terms


def combine(
    combination: Combination, registers: Mapping[str, Tensor], increments: Increments | None, number: int
) -> Tensor:
    """``sum(coefficient * tensor)``: one kernel per term; ``noise`` is the increment of that number."""
    total = None
    for name, coefficient in combination:
        tensor = registers[name] if name != "noise" else increments(number)  # type: ignore[misc]
        if total is None:
            total = torch.mul(tensor, coefficient)  # type: ignore[arg-type]
        elif isinstance(coefficient, float):
            total.add_(tensor, alpha=coefficient)
        else:
            total = torch.addcmul(total, tensor, coefficient)  # type: ignore[arg-type]
    return total  # type: ignore[return-value]


def _combinations(terms: Terms) -> Iterator[Combination]:
    yield from (c for c in (terms.ask, terms.read, terms.update) if c is not None)
    yield from (source for source in terms.store.values() if not isinstance(source, str))


def _filled(plan: Sequence[Terms], table: Tensor, first_only: bool = False) -> list[Terms]:
    """The same terms with the rows of the table, in the order of :func:`_combinations`, as coefficients."""
    rows = iter(table.unbind())

    def fill(combination: Combination) -> Combination:
        found = [(name, next(rows), own) for name, own in combination]
        return [(name, own if first_only and i else row) for i, (name, row, own) in enumerate(found)]

    return [
        Terms(
            t.ask and fill(t.ask),
            t.read and fill(t.read),
            fill(t.update),
            {name: source if isinstance(source, str) else fill(source) for name, source in t.store.items()},
        )
        for t in plan
    ]


def _is_one(coefficient: Coefficient) -> bool:
    return coefficient == 1.0 or isinstance(coefficient, tuple) and set(coefficient) == {1.0}


def _is_noisy(combination: Combination | None) -> bool:
    return combination is not None and any(name == "noise" for name, _ in combination)
