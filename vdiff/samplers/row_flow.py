"""The probability flow as an ordinary differential equation, in a coordinate, with every row at its own level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import HOST, Conditioning, NoiseLevel, NoiseSchedule, Prediction, spread
from vdiff.samplers.executor import Edit
from vdiff.samplers.guiders import Answers, Guider, NoneGuider, Weight
from vdiff.samplers.plan import Node

AxisName = Literal["angle", "log_sigma", "sigma"]


class Axis(ABC):
    """The probability flow as an ordinary differential equation: ``d y / d u = p * x_t + q * x0``, ``y = x_t / scale``.

    Levels and places are on the host, ``(B,)``, float64.
    """

    @abstractmethod
    def place(self, level: NoiseLevel) -> Tensor:
        """Where a level is, the ``u`` above."""

    @abstractmethod
    def ratio(self, place: Tensor) -> Tensor:
        """sigma / alpha at a place."""

    @abstractmethod
    def scale(self, level: NoiseLevel) -> Tensor:
        """By what the state is divided."""

    @abstractmethod
    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The ``p`` and ``q`` above."""


class AngleAxis(Axis):
    r""":math:`\theta = \operatorname{atan}(r / \sigma_d)`: finite at both ends, and a straight line for Gaussian data.

    Args:
        sigma_data: The spread of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def place(self, level: NoiseLevel) -> Tensor:
        return torch.atan2(level.sigma, level.alpha * self.sigma_data)

    def ratio(self, place: Tensor) -> Tensor:
        ratio = self.sigma_data * torch.tan(place)
        return torch.where(place >= math.pi / 2, math.inf, ratio)

    def scale(self, level: NoiseLevel) -> Tensor:
        return torch.hypot(level.sigma, level.alpha * self.sigma_data)

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        radius, std = self.scale(level), self.sigma_data
        return level.alpha * std / (radius * level.sigma), -radius / (std * level.sigma)


class LogAxis(Axis):
    """log(sigma / alpha)."""

    def place(self, level: NoiseLevel) -> Tensor:
        return level.ratio.log()

    def ratio(self, place: Tensor) -> Tensor:
        return place.exp()

    def scale(self, level: NoiseLevel) -> Tensor:
        return level.alpha

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return 1 / level.alpha, -torch.ones_like(level.alpha)


class SigmaAxis(LogAxis):
    """sigma / alpha: its steps are blind to small noise, see docs/samplers.md."""

    def place(self, level: NoiseLevel) -> Tensor:
        return level.ratio

    def ratio(self, place: Tensor) -> Tensor:
        return place

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return 1 / level.sigma, -level.alpha / level.sigma


class NoiseAxis(LogAxis):
    """log(sigma / alpha) as the place, with the noise in place of the slope: what a :class:`DPMPair` weighs."""

    def reading(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return 1 / level.sigma, -level.alpha / level.sigma


class RowFlow:
    """The probability flow of a guided denoiser along an axis, each row at its own level.

    Args:
        denoiser, schedule, axis: See above.
        like: A batch like those it will be asked about.
        cond, guider: As when sampling; the guider is planned anew for the levels of each call.
        edit: Changes what is said of x0, told the level of the row with the most noise.
        ends: Levels whose places stand for themselves, to the last bit: the ends of the walk.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        axis: Axis,
        like: Tensor,
        cond: Conditioning | None = None,
        guider: Guider | None = None,
        edit: Edit | None = None,
        ends: NoiseLevel | None = None,
    ) -> None:
        self.denoiser, self.schedule, self.axis = denoiser, schedule, axis
        self.guider, self.cond, self.edit = guider or NoneGuider(), cond or Conditioning(), edit
        self._calls = 0
        self.rows, self.dtype, self.device = len(like), like.dtype, like.device
        self._conds: dict[str, Conditioning] = {}
        self._ends = {} if ends is None else dict(zip(axis.place(ends).tolist(), ends.ratio.tolist(), strict=True))

    def level(self, place: Tensor) -> NoiseLevel:
        """The levels at these places, on the host."""
        ratio = self.axis.ratio(place)
        for end, exact in self._ends.items():
            ratio = torch.where(place == end, exact, ratio)
        return self.schedule.at_ratio(ratio)

    def slope(self, place: Tensor, y: Tensor) -> Tensor:
        """``d y / d u`` for rows of scaled states."""
        level = self.level(place)
        p, q, scale = self._upload(*self.axis.reading(level), self.axis.scale(level))
        x = y * spread(scale, y)
        return spread(p, y) * x + spread(q, y) * self.ask(x, level)

    def read(self, level: NoiseLevel, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The state, and the x0 behind its slope."""
        p, q, scale = (spread(value, y) for value in self._upload(*self.axis.reading(level), self.axis.scale(level)))
        x = y * scale
        return x, (slope - p * x) / q

    def ask(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """What the guided denoiser says of x0, for rows at these levels, ``(B,)``, on the host.

        Rows that their levels guide in different ways, such as those inside an interval and those outside, are
        combined one way after the other.
        """
        guidance = self.guider.planned(Node.of(level))
        told = level.to(torch.promote_types(self.dtype, torch.float32)).upload(self.device)
        said = {name: self._branch(name, x, told) for name in dict.fromkeys(n for g in guidance for n in g.branches)}
        ways: dict[tuple, list[int]] = {}
        for row, own in enumerate(guidance):
            ways.setdefault((own.combine, own.branches, *(change.apply for change in own.changes)), []).append(row)
        x0 = None
        for rows in ways.values():
            own = guidance[rows[0]]
            weights = {name: self._by_row([g.weights.get(name, 0.0) for g in guidance], x) for name in own.weights}
            answers = Answers({name: said[name] for name in own.branches}, weights, x, told, self.denoiser.language, {})
            assert own.combine is not None
            prediction = own.combine(answers)
            for i, change in enumerate(own.changes):
                numbers = [g.changes[i].number if i < len(g.changes) else 0.0 for g in guidance]
                prediction = change.apply(prediction, answers, self._by_row(numbers, x))
            mask = torch.zeros(self.rows, dtype=torch.bool, device="cpu").index_fill_(0, torch.tensor(rows), True)
            x0 = prediction.x0 if x0 is None else torch.where(spread(mask.to(self.device), x), prediction.x0, x0)
        assert x0 is not None
        self._calls += 1
        if self.edit is None:
            return x0
        return self.edit(x0, Node.of(level)[int(level.ratio.argmax())], self._calls - 1)

    def _branch(self, name: str, x: Tensor, level: NoiseLevel) -> Prediction:
        denoiser = self.guider.denoiser(name, self.denoiser)
        if name not in self._conds:
            cond = self.guider.condition(name, self.cond, self.rows).with_(null=None).to(self.device)
            self._conds[name] = denoiser.prepared(cond)
        said = denoiser(x, level, self._conds[name])
        if denoiser.language == self.denoiser.language:
            return said
        return Prediction(self.denoiser.language, said.to(self.denoiser.language), x, level)

    def _by_row(self, weights: Sequence[Weight], x: Tensor) -> Tensor:
        """Each row's own share of its weight, with axes to multiply ``x``."""
        values = []
        for row, weight in enumerate(weights):
            value = list(weight(x.shape[2])) if callable(weight) else weight
            if isinstance(value, Sequence):
                table = torch.as_tensor(value, **HOST)
                value = table if callable(weight) else table[row if len(table) == self.rows else 0]
            values.append(torch.as_tensor(value, **HOST))
        return spread(self._upload(*torch.broadcast_tensors(*values)), x)

    def _upload(self, *values: Tensor) -> Tensor:
        """In one copy, one after the other along the first axis."""
        return torch.stack(values).to(self.dtype).to(self.device, non_blocking=True)


def axis(name: AxisName, sigma_data: float = 0.5) -> Axis:
    """An axis by name."""
    return {"angle": AngleAxis(sigma_data), "log_sigma": LogAxis(), "sigma": SigmaAxis()}[name]
