"""Averaged weights: an exponential moving average of what is trained.

The average lives in float32 beside the engine, by parameter name, and belongs to the run. Frozen
parameters and buffers have no average: they are the engine's own, in the checkpoint as in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vdiff.hooks import parts
from vdiff.mixins import Teacher


class EMA:
    r"""Every ``every`` steps: :math:`average \leftarrow d\,average + (1 - d)\,weights`.

    Args:
        decay: The :math:`d` of one step; an update after ``every`` steps uses its power.
        half_life: Instead of ``decay``, the number of steps after which a weight counts half.
        warmup: Whether early updates forget faster, ``min(d, (1 + n) / (10 + n))`` at update n,
            so that the average does not remember the initial weights.
        every: Steps between updates.
    """

    def __init__(
        self, decay: float | None = None, half_life: float | None = None, warmup: bool = True, every: int = 1
    ) -> None:
        if decay is not None and half_life is not None:
            raise ValueError("EMA: decay and half_life say the same thing; give one.")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"EMA: half_life is a positive number of steps, got {half_life}.")
        if every < 1:
            raise ValueError(f"EMA: every is a number of steps, at least 1; got {every}.")
        self.decay = 0.5 ** (1 / half_life) if half_life is not None else 0.999 if decay is None else float(decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {self.decay}.")
        self.warmup, self.every = warmup, every
        self._average: dict[str, Tensor] = {}

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Begin the average at the present values of these parameters."""
        self._average = {name: value.detach().float().clone() for name, value in weights.items()}

    def decay_at(self, update: int) -> float:
        """The decay of update number ``update``, from 1."""
        decay = self.decay**self.every
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after ``step`` steps; does nothing between updates."""
        if step % self.every:
            return
        now = [weights[name].detach().float() for name in self._average]  # float() of float32 is no copy
        torch._foreach_lerp_(list(self._average.values()), now, 1 - self.decay_at(step // self.every))

    @contextmanager
    def applied(self, engine: nn.Module) -> Iterator[None]:
        """The engine with averaged weights inside; its own are back afterwards, bit for bit.

        Also between a forward and its backward, and under autocast; but no backward of the engine runs inside.
        """
        params = dict(engine.named_parameters())
        mine: list[Tensor] = [params[name] for name in self._average]
        kept = [p.detach().clone() for p in mine]
        try:
            _put(mine, list(self._average.values()))
            yield
        finally:
            _put(mine, kept)

    def to(self, device: torch.device) -> None:
        """Move the average to where the weights are."""
        self._average = {name: value.to(device) for name, value in self._average.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._average)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError if these are not averages of the same parameters."""
        if odd := sorted(set(tensors) ^ set(self._average)):
            raise ValueError(f"EMA: the checkpoint averages other parameters; {len(odd)} differ: {', '.join(odd[:4])}.")
        for name, value in tensors.items():
            self._average[name].copy_(value)


@contextmanager
def lend(ema: EMA | None, engine: nn.Module) -> Iterator[None]:
    """Inside, teachers attached to the engine may ask its average.

    Raises:
        ValueError: one wants to, and the run keeps none.
    """
    found = {id(part.mixin): part.mixin for part in parts(engine)}.values()
    asking = [mixin for mixin in found if isinstance(mixin, Teacher) and mixin.target == "ema"]
    if asking and ema is None:
        raise ValueError(
            f"Teacher: {asking[0].name!r} is to ask the run's average of the student, and nothing keeps one. Set "
            "training.ema, or use target: student."
        )
    try:
        for mixin in asking:
            mixin.average = None if ema is None else partial(ema.applied, engine)
        yield
    finally:
        for mixin in asking:
            mixin.average = None


def _put(params: list[Tensor], values: list[Tensor]) -> None:
    """As if nothing had been written, for what autograd keeps: the old values are back before it reads them."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(params)):
        if params:
            torch._foreach_copy_(params, values)
    torch.clear_autocast_cache()  # it holds casts of the values before
