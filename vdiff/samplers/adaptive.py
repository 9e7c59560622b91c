"""Adaptive steps: embedded pairs of Runge-Kutta methods, a controller, and a loop that keeps rows apart.

Every row has its own place, its own step and its own acceptance, so that what becomes of it does not depend on the
batch around it; a network call serves all rows, each at its own level. The host reads one number per row and step,
the size of the error, and waits for it: the one synchronisation of the loop.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.process import HOST, spread

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]


class Pair(ABC):
    """A Runge-Kutta method with a second one, of lower order, to know its error by.

    Attributes:
        nodes: Where it looks, in fractions of the step; the first is 0.
        order: To which power of the step the error estimate falls.
        is_fsal: Whether the last look is at the end of the step, and so the first of the next.
    """

    nodes: tuple[float, ...]
    order: int
    is_fsal: bool = False

    @abstractmethod
    def weights(self, begin: Tensor, end: Tensor) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """What the slopes weigh for the steps from ``begin`` to ``end``, both ``(B,)``, each weight ``(B,)``.

        Returns:
            For each look but the first its row; the result; the result of lower order.
        """


class ButcherPair(Pair):
    """A classical pair, by its tableau.

    Args:
        rows: Of the looks after the first.
        high, low: Weights of the result, and of that of lower order.
        order: See :class:`Pair`.
    """

    is_fsal = True

    def __init__(
        self, rows: Sequence[Sequence[float]], high: Sequence[float], low: Sequence[float], order: int
    ) -> None:
        self.rows, self.high, self.low, self.order = rows, high, low, order
        self.nodes = (0.0, *(math.fsum(row) for row in rows))

    def weights(self, begin: Tensor, end: Tensor) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        step = end - begin
        scaled = [[part * step for part in row] for row in (*self.rows, self.high, self.low)]
        return scaled[:-2], scaled[-2], scaled[-1]


_DOPRI5 = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Dormand & Prince, J. Comp. Appl. Math. 6 (1980).
DOPRI5 = ButcherPair(
    _DOPRI5,
    (*_DOPRI5[-1], 0.0),
    (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    order=5,
)

_TSIT5 = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
)
_TSIT5_ERROR = (
    -0.00178001105222577714,
    -0.0008164344596567469,
    0.007880878010261995,
    -0.1447110071732629,
    0.5823571654525552,
    -0.45808210592918697,
    1 / 66,
)
# Tsitouras, Comput. Math. Appl. 62 (2011).
TSIT5 = ButcherPair(
    _TSIT5,
    (*_TSIT5[-1], 0.0),
    tuple(b - e for b, e in zip((*_TSIT5[-1], 0.0), _TSIT5_ERROR, strict=True)),
    order=5,
)


class Controller:
    """Proportional, integral and derivative control of the step, for each row.

    With errors in units of the tolerance, the step grows by ``safety`` times a product of powers of the last three,
    pressed softly towards 1.

    Args:
        order: To which power of the step the error falls.
        first: Size of the first step.
        proportional, integral, derivative: The exponents, over ``order``.
        safety: Factor on the growth.
        accept: A step is accepted unless the next would shrink by more than to this share.

    References:
        Söderlind, ACM Trans. Math. Softw. 29 (2003); Crowson, k-diffusion.
    """

    def __init__(
        self,
        order: int,
        first: float,
        proportional: float = 0.0,
        integral: float = 1.0,
        derivative: float = 0.0,
        safety: float = 0.9,
        accept: float = 0.9,
    ) -> None:
        total = proportional + integral + derivative
        self.exponents = (total / order, -(proportional + 2 * derivative) / order, derivative / order)
        self.first, self.safety, self.accept = first, safety, accept

    def propose(
        self, error: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Growth of the step, whether this one is accepted, and what to remember if it is; all ``(B,)``."""
        inverse = 1 / (error + 1e-8)
        before = (inverse, inverse) if past is None else past
        growth = torch.full_like(error, self.safety)
        for value, power in zip((inverse, *before), self.exponents, strict=True):
            growth = growth * value**power
        growth = 1 + torch.atan(growth - 1)
        accepted = growth >= self.accept
        first, second = (torch.where(accepted, new, old) for new, old in zip((inverse, before[0]), before, strict=True))
        return growth, accepted, (first, second)


@dataclass(frozen=True, eq=False)
class Progress:
    """Where an adaptive walk is.

    Attributes:
        place: Of each row, on the host, ``(B,)``.
        state: Tensors of B rows.
        slope: At the state.
        num_calls: Network calls so far.
        rejected: Steps that were taken back so far, on the host, ``(B,)``.
    """

    place: Tensor
    state: State
    slope: State
    num_calls: int
    rejected: Tensor


def integrate(
    field: Field,
    state: State,
    begin: float,
    end: float,
    pair: Pair,
    controller: Controller,
    rtol: float,
    atol: float,
    max_steps: int,
    where: str,
) -> Iterator[Progress]:
    """Solve ``d state / d place = field(place, state)`` from ``begin`` to ``end``; one item per step.

    Args:
        field: Slopes of the tensors in ``state``, given the rows' places on the host, ``(B,)``, float64.
        state: Tensors of B rows. A row's error is the largest of theirs, each a root mean square in units of
            ``max(atol, rtol * |value|)``.
        max_steps: Attempts, the rejected included.
        where: Names the caller in errors.

    Raises:
        RuntimeError: the end was not reached in ``max_steps``, or slopes are not finite.
    """
    rows, first = len(state[0]), state[0]
    place = torch.full((rows,), begin, **HOST)
    size = torch.full((rows,), min(controller.first, abs(end - begin)), **HOST)
    rejected = torch.zeros(rows, dtype=torch.long, device="cpu")
    past: tuple[Tensor, Tensor] | None = None
    slope, num_calls = field(place, state), 1
    reference = state
    for _ in range(max_steps):
        left = (end - place).abs()
        then = torch.where(size >= left, torch.full_like(place, end), place + math.copysign(1.0, end - begin) * size)
        table = _upload(pair.weights(place, then), first)
        slopes = [slope]
        for fraction, row in zip(pair.nodes[1:], table[:-2], strict=True):
            here = then if fraction == 1 else place + fraction * (then - place)
            slopes.append(field(here, _moved(state, row, slopes)))
        num_calls += len(slopes) - 1
        high, low = _moved(state, table[-2], slopes), _moved(state, table[-1], slopes)
        error = _error(high, low, reference, rtol, atol).cpu().double()  # the one place where the host waits
        is_open = place != end
        if not bool(torch.isfinite(error[is_open]).all()):
            row = int((is_open & ~torch.isfinite(error)).nonzero()[0])
            raise RuntimeError(f"{where}: the slope of row {row} is not finite near {place[row].item():.6g}.")
        growth, accepted, past = controller.propose(error, past)
        accepted &= is_open
        place = torch.where(accepted, then, place)
        rejected += is_open & ~accepted
        size = torch.where(is_open, size.minimum(left) * growth, size)
        mask = accepted.to(first.device)
        state, reference = _where(mask, high, state), _where(mask, low, reference)
        if pair.is_fsal:
            slope = _where(mask, slopes[-1], slope)
        elif bool(accepted.any()):
            slope, num_calls = field(place, state), num_calls + 1
        yield Progress(place, state, slope, num_calls, rejected.clone())
        if bool((place == end).all()):
            return
    late = int((place != end).sum())
    raise RuntimeError(
        f"{where}: {late} of {rows} rows are not there after max_steps = {max_steps} attempts and {num_calls} network "
        f"calls; the last one is at {place[(place - end).abs().argmax()].item():.4g} on the way from {begin:.4g} to "
        f"{end:.4g}. Raise rtol and atol (now {rtol:g} and {atol:g}), or max_steps; or is the denoiser noisy (dropout, "
        "a threshold), which no step resolves?"
    )


def _upload(weights: tuple[list[list[Tensor]], list[Tensor], list[Tensor]], like: Tensor) -> list[list[Tensor]]:
    """All weights in one copy; rows of ``(B,)`` on the device."""
    looks, high, low = weights
    rows = [*looks, high, low]
    flat = torch.stack([part for row in rows for part in row]).to(like.dtype).to(like.device, non_blocking=True)
    parts = iter(flat.unbind())
    return [[next(parts) for _ in row] for row in rows]


def _moved(state: State, weights: Sequence[Tensor], slopes: Sequence[State]) -> State:
    moved = list(state)
    for weight, slope in zip(weights, slopes, strict=False):
        moved = [torch.addcmul(v, s, spread(weight, s)) for v, s in zip(moved, slope, strict=True)]
    return tuple(moved)


def _where(mask: Tensor, new: State, old: State) -> State:
    return tuple(torch.where(spread(mask, a), a, b) for a, b in zip(new, old, strict=True))


def _error(high: State, low: State, reference: State, rtol: float, atol: float) -> Tensor:
    """In units of the tolerance, per row, ``(B,)``."""
    errors = []
    for up, down, before in zip(high, low, reference, strict=True):
        allowed = (rtol * torch.maximum(down.abs(), before.abs())).clamp(min=atol)
        errors.append(((up - down) / allowed).pow(2).reshape(len(up), -1).mean(1).sqrt())
    return torch.stack(errors).amax(0)
