"""Learning rates over the run: a factor per step, applied by torch's own scheduler.

The factor is a function of the step alone, so resuming needs the step and nothing else.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vdiff.registry import Registered


class LRSchedule(Registered, kind="lr_schedule"):
    """A recipe for a scheduler that is stepped once per optimizer step.

    Args:
        warmup: Steps over which the rate rises in a straight line; step ``s`` of ``warmup`` has
            ``(s + 1) / warmup`` of it, so that the first step is not lost.
    """

    def __init__(self, warmup: int = 0) -> None:
        if warmup < 0:
            raise ValueError(f"{type(self).__name__}: warmup is a number of steps, got {warmup}.")
        self.warmup = warmup

    @abstractmethod
    def after_warmup(self, step: int, num_steps: int) -> float:
        """What the learning rate is multiplied with at ``step`` (from 0) of ``num_steps``."""

    def factor(self, step: int, num_steps: int) -> float:
        """The same, warmup included."""
        return min(1.0, (step + 1) / max(1, self.warmup)) * self.after_warmup(step, num_steps)

    def __call__(self, optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
        return LambdaLR(optimizer, partial(self.factor, num_steps=num_steps))

    def progress(self, step: int, num_steps: int) -> float:
        """How much of the run after the warmup lies behind ``step``, 0 to 1."""
        return min(1.0, max(0.0, (step - self.warmup) / max(1, num_steps - self.warmup)))


class ConstantLRSchedule(LRSchedule, name="constant"):
    """The same rate throughout."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        return 1.0


class LinearLRSchedule(LRSchedule, name="linear"):
    """A straight line from 1 down to ``final``."""

    def __init__(self, warmup: int = 0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = final

    def after_warmup(self, step: int, num_steps: int) -> float:
        return 1 - (1 - self.final) * self.progress(step, num_steps)


class CosineLRSchedule(LRSchedule, name="cosine"):
    """Half a cosine from 1 down to ``final``.

    References:
        Loshchilov and Hutter, arXiv:1608.03983, without restarts.
    """

    def __init__(self, warmup: int = 0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = final

    def after_warmup(self, step: int, num_steps: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * self.progress(step, num_steps)))


class InverseSqrtLRSchedule(LRSchedule, name="inverse_sqrt"):
    r"""Constant for ``decay_from`` steps, then :math:`1 / \sqrt{step / decay\_from}`.

    References:
        Karras et al., arXiv:2312.02696 (EDM2), section 2.5 and appendix B.
    """

    def __init__(self, warmup: int = 0, decay_from: int = 10_000) -> None:
        super().__init__(warmup)
        if decay_from < 1:
            raise ValueError(f"InverseSqrtLRSchedule: decay_from is a number of steps, at least 1; got {decay_from}.")
        self.decay_from = decay_from

    def after_warmup(self, step: int, num_steps: int) -> float:
        return 1 / math.sqrt(max(step / self.decay_from, 1.0))
