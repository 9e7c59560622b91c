"""Per-row values for rows that were folded into the batch axis, always batch-major: ``(b f)`` or ``(b h w)``."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_gate(gate: Tensor, rows: int) -> Tensor:
    """A gate of shape ``(B,)`` for ``rows = B * f`` rows folded batch-major, ``(b f)``."""
    return gate if len(gate) == rows else gate.repeat_interleave(_fold(len(gate), rows))


def expand_partners(partners: Tensor, rows: int) -> Tensor:
    """Partners of shape ``(B,)`` for rows folded ``(b f)``: frame by frame, -1 where a row has none."""
    if len(partners) == rows:
        return partners
    fold = _fold(len(partners), rows)
    frames = torch.arange(fold, device=partners.device)
    folded = partners[:, None] * fold + frames
    return torch.where(partners[:, None] < 0, -1, folded).flatten()


def _fold(batch: int, rows: int) -> int:
    if rows % batch:
        raise ValueError(
            f"{rows} rows reached a module that is routed for a batch of {batch}. "
            "Rows folded into the batch axis must be batch-major, '(b f)' or '(b h w)'."
        )
    return rows // batch
