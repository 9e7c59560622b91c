"""Guiders: which branches of the denoiser to ask at each level, and how to combine them.

A guider is planned on the host together with the levels, so an interval or a schedule of scales costs
no synchronisation, and a branch that is not needed is not asked. ``scale`` 1 is the plain conditional
prediction. What a run remembers lives in its walk, never in the guider.

Guiders nest. A :class:`WrappingGuider` takes the plan of the one inside, entry by entry, and appends what it
does to it; so each entry of a plan says by itself how the answers of its call become one prediction. Every
call goes that way, one that asks ``cond`` alone too: whoever is around sees it. A call that an interval leaves
out has a plan of its own, of which the guiders inside the interval know nothing and those around it do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, NoiseLevel, Parameterization, Prediction
from vdiff.registry import Registered
from vdiff.samplers.plan import Node

# A number; one per sample, (B,); one per frame, (1, F) or (B, F); or a function of F that lists one per frame.
Weight = float | Sequence[float] | Sequence[Sequence[float]] | Callable[[int], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Answers:
    """What the branches of one call said.

    Attributes:
        said: Predictions by branch; a companion's in its own language, all others in ``language``.
        weights: Of the guidance, on the device and with axes to multiply ``x_t``.
        x_t: What they were asked about, ``(B, ...)``.
        level: Its noise level.
        language: What the denoiser speaks.
        memory: What a guider remembers until the next call of this walk, by names of its own.
    """

    said: Mapping[str, Prediction]
    weights: Mapping[str, Tensor]
    x_t: Tensor
    level: NoiseLevel
    language: Parameterization
    memory: MutableMapping[str, Tensor]

    def __getitem__(self, branch: str) -> Prediction:
        return self.said[branch]

    def __contains__(self, branch: str) -> bool:
        return branch in self.said

    def prediction(self, value: Tensor, language: Parameterization, renoise: Tensor | None = None) -> Prediction:
        """``value``, in that language, about the same ``x_t``."""
        return Prediction(language, value, self.x_t, self.level, renoise=renoise)


@dataclass(frozen=True)
class Change:
    """What a wrapping guider does to the prediction of the guider inside.

    Attributes:
        apply: ``(guided, answers, number) -> prediction``, pure.
        number: What it is told, such as a strength.
        asks: Branches that it needs besides those of the guider inside.
    """

    apply: Callable[[Prediction, Answers, Tensor], Prediction]
    number: Weight = 1.0
    asks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """What one call asks, and how the answers become one prediction.

    Attributes:
        weights: For each branch its weight; they sum to 1. No branch: the network is not called.
        combine: What makes one prediction of these branches; by default that of the guider that planned it.
        changes: What becomes of it, the innermost guider's first.
    """

    weights: Mapping[str, Weight]
    combine: Callable[[Answers], Prediction] | None = None
    changes: tuple[Change, ...] = ()

    @property
    def branches(self) -> tuple[str, ...]:
        """All that the call asks."""
        return tuple(dict.fromkeys([*self.weights, *(name for change in self.changes for name in change.asks)]))

    def then(self, change: Change) -> Guidance:
        """The same with one more change."""
        if any(name in other.asks for other in self.changes for name in change.asks if name != "cond"):
            raise ValueError(f"guider: two nested guiders ask the branch {change.asks[-1]!r}. Keep one of them.")
        return replace(self, changes=(*self.changes, change))


PLAIN = Guidance({"cond": 1.0})


class Guider(Registered, kind="guider"):
    """Plans which branches a run asks; the default combination is linear."""

    batched: bool = True  # all branches in one call of the network, or one after the other to save memory

    @abstractmethod
    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        """One entry per call of the denoiser, at these levels."""

    def planned(self, nodes: Sequence[Node]) -> list[Guidance]:
        """The plan, each entry with its way to combine: what a guider around this one, or a run, begins with."""
        return [g if g.combine is not None else replace(g, combine=self.combine) for g in self.plan(nodes)]

    def combine(self, answers: Answers) -> Prediction:
        """One prediction of the branches; pure, but for what it remembers. A lone branch is itself."""
        names = list(answers.weights)
        first = answers[names[0]]
        if len(names) == 1:
            return first
        return first.with_(value=sum(answers[name].value * answers.weights[name] for name in names))

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        """The conditions of a branch: ``cond`` and ``null`` here; guiders add their own.

        The null is without conditions, not without company: gates and partners are those of ``cond`` unless it has
        its own.
        """
        if branch == "cond":
            return cond
        if branch == "null":
            if cond.null is None:
                raise ValueError(
                    f"{type(self).__name__}: this conditioning has no null to guide away from. "
                    "Let the conditioner make one, or pass a negative: cond.with_null(...)."
                )
            null = cond.null
            partners = cond.partners if null.partners is None else null.partners
            return null.with_(gates={**cond.gates, **null.gates}, partners=partners)
        raise ValueError(f"{type(self).__name__}: unknown branch {branch!r}.")

    def denoiser(self, branch: str, denoiser: Denoiser) -> Denoiser:
        """Who answers for a branch: the run's denoiser, unless a guider brings a companion."""
        return denoiser


class NoneGuider(Guider):
    """The plain conditional prediction."""

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        return [PLAIN for _ in nodes]


class CFGGuider(Guider):
    r"""Classifier-free guidance: :math:`u + w (c - u)`.

    Args:
        scale: The :math:`w` above; 1 is the plain conditional prediction. A list gives each sample its own, a list
            of lists ``(1, F)`` or ``(B, F)`` each frame.
        batched: Both branches in one call (faster) or one after the other (less memory).

    References:
        Ho & Salimans, arXiv:2207.12598, in the convention of Saharia et al. (their w + 1).
    """

    def __init__(self, scale: float | list[float] | list[list[float]] = 1.0, batched: bool = True) -> None:
        self.scale, self.batched = scale, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        return [away_from_null(self.scale) for _ in nodes]

    def combine(self, answers: Answers) -> Prediction:
        if "null" not in answers.weights:
            return answers["cond"]
        cond, null = answers["cond"], answers["null"]
        return cond.with_(value=torch.lerp(null.value, cond.value, answers.weights["cond"]))


class WrappingGuider(Guider, abstract=True):
    """A guider around another: override :meth:`change`, and :meth:`numbers` where it differs by call.

    Args:
        guider: The one inside; by default the plain conditional prediction.
    """

    asks: tuple[str, ...] = ()  # branches that the change needs besides those of the guider inside

    def __init__(self, guider: Guider | None = None) -> None:
        self.guider = NoneGuider() if guider is None else guider

    def change(self, guided: Prediction, answers: Answers, number: Tensor) -> Prediction:
        """What becomes of the guided prediction. Where only ``cond`` was asked, ``guided`` is that very answer."""
        return guided

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        """For each call the number that :meth:`change` is told; None: it is left out."""
        return [1.0 for _ in nodes]

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        inner = zip(self.guider.planned(nodes), self.numbers(nodes), strict=True)
        return [g if number is None else g.then(Change(self.change, number, self.asks)) for g, number in inner]

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        return self.guider.condition(branch, cond, rows)

    def denoiser(self, branch: str, denoiser: Denoiser) -> Denoiser:
        return self.guider.denoiser(branch, denoiser)

    @property
    def batched(self) -> bool:  # type: ignore[override]
        """As the guider inside says."""
        return self.guider.batched

    @property
    def scale(self) -> Any:  # noqa: ANN401
        """The scale of the guider inside, if it has one."""
        return self.guider.scale  # type: ignore[attr-defined]

    @scale.setter
    def scale(self, value: Any) -> None:  # noqa: ANN401
        self.guider.scale = value  # type: ignore[attr-defined]


def away_from_null(scale: Weight) -> Guidance:
    """``cond`` at this scale and ``null`` at what is left; the null is not asked where the scale is 1."""
    return PLAIN if each(scale, lambda s: s == 1) else Guidance({"cond": scale, "null": mapped(scale, lambda s: 1 - s)})


def mapped(weight: Weight, change: Callable[[float], float]) -> Weight:
    """A weight with every number changed."""
    if callable(weight):
        return lambda num_frames: [change(value) for value in weight(num_frames)]
    if isinstance(weight, Sequence):
        return [mapped(value, change) for value in weight]  # type: ignore[return-value]
    return change(weight)


def each(weight: Weight, holds: Callable[[float], bool]) -> bool:
    """Whether something is known to hold for every number of a weight."""
    if callable(weight):
        return False
    return all(each(value, holds) for value in weight) if isinstance(weight, Sequence) else holds(weight)
