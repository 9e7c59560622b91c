"""Per-row values for rows that were folded into the batch axis, always batch-major: ``(b f)`` or ``(b h w)``."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_gate(gate: Tensor, rows: int) -> Tensor:
    """A gate of shape ``(B,)`` for ``rows = B * f`` rows folded batch-major, ``(b f)``."""
    return gate if len(gate) == rows else gate.repeat_interleave(_fold(len(gate), rows), dim=0)


def expand_partners(partners: Tensor, rows: int) -> Tensor:
    """Partners of shape ``(B,)`` or ``(B, P)`` for rows folded ``(b f)``: frame by frame, -1 where a row has none."""
    if len(partners) == rows:
        return partners
    fold = _fold(len(partners), rows)
    frames = torch.arange(fold, device=partners.device).view(-1, *(1,) * (partners.ndim - 1))
    folded = partners[:, None] * fold + frames
    return torch.where(partners[:, None] < 0, -1, folded).flatten(0, 1)


def check_partners(partners: Tensor, rows: int) -> None:
    """Refuse partners that are none: of the wrong shape, and by value where looking waits for no device.

    Raises:
        ValueError: names the first row that is at fault.
    """
    shape = tuple(partners.shape)
    if partners.ndim not in (1, 2):
        raise ValueError(f"partners hold one row number per row, ({rows},), or P each, ({rows}, P); they are {shape}.")
    if partners.is_floating_point() or partners.is_complex() or partners.dtype == torch.bool:
        raise ValueError(f"partners hold row numbers, int64, and -1 for none; they are {partners.dtype}.")
    if shape[0] < rows:
        raise ValueError(
            f"partners are given for {shape[0]} of {rows} rows: row {shape[0]} has none. Give -1 to a row that is "
            "sampled alone."
        )
    if shape[0] > rows:
        raise ValueError(f"partners are given for {shape[0]} rows of {rows}: there is no row {rows}.")
    if torch.compiler.is_compiling() or partners.device.type != "cpu":
        return
    own = torch.arange(rows, device="cpu").view(-1, *(1,) * (partners.ndim - 1))
    wrong = (partners < -1) | (partners >= rows) | (partners == own)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0, 0])
    said = partners[row].tolist()
    if said == row or isinstance(said, list) and row in said:
        raise ValueError(f"partners: row {row} is its own partner. Give -1 to a row that is sampled alone.")
    raise ValueError(f"partners: the partner of row {row} is {said}; there are rows 0 to {rows - 1}, and -1 is none.")


def _fold(batch: int, rows: int) -> int:
    if rows % batch:
        raise ValueError(
            f"{rows} rows reached a module that is routed for a batch of {batch}. "
            "Rows folded into the batch axis must be batch-major, '(b f)' or '(b h w)'."
        )
    return rows // batch
