"""The executor: runs every plan with the state in float32, no synchronisation and no tensor made per step.

Coefficients are Python floats handed to the kernels; under ``torch.compile`` they are one table,
uploaded once, so that another schedule is another table and not another graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vdiff.process import Parameterization, Prediction
from vdiff.samplers.guiders import Guided
from vdiff.samplers.noise import Drawn, Increments
from vdiff.samplers.plan import Stage

# Names and coefficients of a linear combination. The first is a 0-d tensor on the host, which multiplies at half
# the cost of a Python float; the others are floats. Under torch.compile all are 0-d tensors on the device.
Combination = list[tuple[str, float | Tensor]]


class Terms(NamedTuple):
    """A stage as the executor runs it.

    Attributes:
        ask: What the network sees; None: the state.
        read: How its answer becomes x0; None: it is.
        update: The next state.
        store: What is stored.
    """

    ask: Combination | None
    read: Combination | None
    update: Combination
    store: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """What a callback sees after each step.

    Attributes:
        index, num_steps: Which step of how many, from 0.
        stage: The last network call of the step.
        x: The state after the step, ``(B, ...)``.
        x0: The clean sample as the network last saw it: a preview.
    """

    index: int
    num_steps: int
    stage: Stage
    x: Tensor
    x0: Tensor


class Run:
    """A plan bound to a guided denoiser and a batch.

    Args:
        stages: The plan.
        ask: The guided denoiser, called with what the network sees and the number of the call.
        language: In which the guided denoiser answers.
        readings: For each call ``(p, q)`` with ``x0 = p * x + q * value`` in that language.
        increments: Fresh noise by number; None if the plan wants none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        ask: Guided,
        language: Parameterization,
        readings: Sequence[tuple[float, float]],
        increments: Increments | None,
    ) -> None:
        self.stages = tuple(stages)
        self.ask = ask
        self.language = language
        self.increments = increments
        self._terms = [
            Terms(
                None if dict(stage.ask) == {"x": 1.0} else _terms(stage.ask, ask.dtype),
                None if language.name == "x0" else _terms({"x": p, "value": q}, ask.dtype),
                _terms(stage.update, ask.dtype),
                stage.store,
            )
            for stage, (p, q) in zip(self.stages, readings, strict=True)
        ]
        flat = [float(c) for t in self._terms for terms in (t.ask, t.read, t.update) for _, c in terms or ()]
        self._table = torch.tensor(flat, dtype=ask.dtype, device="cpu").to(ask.device, non_blocking=True)

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

    def steps(self, x: Tensor) -> Iterator[SamplerStep]:
        """The walk, step by step."""
        registers = {"x": x}
        index, num_steps = 0, self.num_steps
        for i, terms in enumerate(self._coefficients()):
            self._advance(i, registers, terms)
            if self.stages[i].ends_step:
                yield SamplerStep(index, num_steps, self.stages[i], registers["x"], registers["x0"])
                index += 1

    def _advance(self, i: int, registers: dict[str, Tensor], terms: Terms) -> None:
        """One call of the network: ``registers`` holds the state under ``x`` and what was stored."""
        ask, read, update, store = terms
        if ask is not None:
            registers["x"] = combine(ask, registers, self.increments, 2 * i)
        prediction = self.ask(registers["x"], i)
        registers["x0"] = self._read(prediction, registers["x"], read)
        state = combine(update, registers, self.increments, 2 * i + 1)
        if store:
            registers.update({name: registers[source] for name, source in store.items()})
        registers["x"] = state

    def _read(self, prediction: Prediction, x: Tensor, read: Combination | None) -> Tensor:
        if prediction.language is not self.language:  # a guider may answer in x0 directly
            return prediction.x0
        return prediction.value if read is None else combine(read, {"x": x, "value": prediction.value}, None, 0)

    def _coefficients(self) -> Sequence[Terms]:
        if not torch.compiler.is_compiling():
            return self._terms
        values = iter(self._table.unbind())

        def on_device(combination: Combination) -> Combination:
            return [(name, next(values)) for name, _ in combination]

        return [
            Terms(t.ask and on_device(t.ask), t.read and on_device(t.read), on_device(t.update), t.store)
            for t in self._terms
        ]


def combine(
    combination: Combination, registers: Mapping[str, Tensor], increments: Increments | None, number: int
) -> Tensor:
    """``sum(coefficient * tensor)``: one kernel per term; ``noise`` is the increment of that number."""
    total = None
    for name, coefficient in combination:
        tensor = registers[name] if name != "noise" else increments(number)  # type: ignore[misc]
        if total is None:
            total = torch.mul(tensor, coefficient)
        elif isinstance(coefficient, float):
            total.add_(tensor, alpha=coefficient)
        else:
            total = torch.addcmul(total, tensor, coefficient)  # type: ignore[arg-type]
    return total  # type: ignore[return-value]


def _terms(combination: Mapping[str, float], dtype: torch.dtype) -> Combination:
    (name, first), *others = combination.items()
    return [(name, torch.tensor(first, dtype=dtype, device="cpu")), *((n, float(c)) for n, c in others)]


def _is_noisy(combination: Combination | None) -> bool:
    return combination is not None and any(name == "noise" for name, _ in combination)
