"""Numbers that must be finite: a bad loss or gradient stops the run before the weights take it in.

On the host each step is looked at. On a device a look would wait for it, so the look is taken at
logging, validation and checkpoint steps, and until then fused optimizers are told on the device to
leave the weights alone: a bad step does nothing, later steps are judged likewise, and what is found
out afterwards is which step it was.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the weights are those of the last good step."""


class FiniteGuard:
    """Judges every step; knows the first bad one.

    Args:
        is_immediate: Whether ``check`` may look at its tensors, which costs a synchronisation on a device.
    """

    def __init__(self, is_immediate: bool) -> None:
        self.is_immediate = is_immediate
        self._first: tuple[Tensor, Tensor] | None = None  # step, -1 for none, and which rows

    def check(self, step: int, per_row: Tensor, norm: Tensor | None) -> Tensor | None:
        """Judge a step before the optimizer takes it.

        Args:
            per_row: Loss of each row, ``(B,)``.
            norm: Of the gradient; None where it may overflow by design (float16, whose scaler skips such steps).

        Returns:
            None if immediate; else a float32 scalar on the device, 1 for a bad step and 0 for a good one.

        Raises:
            BadStep: immediate and not finite.
        """
        if self.is_immediate:
            # One sum, one look: a sum is finite only if every part is (or on overflow, which is no better).
            total = per_row.detach().sum() if norm is None else per_row.detach().sum() + norm
            if not torch.isfinite(total).item():
                raise BadStep(step, (~torch.isfinite(per_row.detach())).nonzero().flatten().tolist())
            return None
        bad_rows = ~torch.isfinite(per_row.detach())
        bad = bad_rows.any() if norm is None else bad_rows.any() | ~torch.isfinite(norm)
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=per_row.device), torch.zeros_like(bad_rows)
        first_step, first_rows = self._first
        is_first = bad & (first_step < 0)
        first_step.masked_fill_(is_first, step)
        first_rows |= bad_rows & is_first
        return bad.float()

    def look(self) -> None:
        """Raise :class:`BadStep` if some step since the last look was bad; waits for the device."""
        if self._first is not None and (step := int(self._first[0])) >= 0:
            raise BadStep(step, self._first[1].nonzero().flatten().tolist())


class BadStep(Exception):
    """Internal: which step and which of its rows; the trainer turns it into a message with examples."""

    def __init__(self, step: int, rows: list[int]) -> None:
        super().__init__(step, rows)
        self.step, self.rows = step, rows
