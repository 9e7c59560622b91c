"""Noticing that a module is run again inside backward in another state than in forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vdiff.hooks.stand_in import Same

if TYPE_CHECKING:
    from vdiff.hooks.port import Port


def in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def refuse_in_backward(what: str) -> None:
    """Raise where a backward pass is running: what it recomputes would differ from what was computed."""
    if in_backward():
        raise RuntimeError(f"{what} inside backward would change what is being recomputed. Do it before or after.")


class Witness:
    """Remembers the state in which a port last ran forward, and raises when it runs again in another.

    Recomputation is recognised by the backward pass that runs around it. More than one state since
    the last backward is as bad as a changed one: the second run cannot tell which it repeats.
    """

    def __init__(self, port: Port | None = None) -> None:
        self.seen = None if port is None else _fingerprint(port)
        self.is_ambiguous = False
        self.is_spent = False  # a backward has used it up, so the next forward starts afresh

    def check(self, port: Port) -> None:
        """Asked where a gradient is recorded, in forward and in what backward runs again."""
        now = _fingerprint(port)
        if in_backward():
            self.is_spent = True
            if now != self.seen or self.is_ambiguous:
                raise RuntimeError(_CHANGED.format(", ".join(port)))
            return
        is_fresh = self.seen is None or self.is_spent
        self.is_ambiguous = not is_fresh and (self.is_ambiguous or now != self.seen)
        self.seen, self.is_spent = now, False

    def __getstate__(self) -> dict[str, Any]:
        return {"seen": None, "is_ambiguous": False, "is_spent": False}  # a copy has run nothing yet


_CHANGED = (
    "A checkpointed module with mixins ({}) is recomputed in backward, but not in the one state in which it ran "
    "forward: a scale, gate, partner or switch was changed in between, or it ran in several, or what a mixin further "
    "out had worked out for it in that call (a ControlNet from its hint) is gone. The gradient would be wrong. "
    "Checkpoint through vdiff.hooks.checkpoint(..., module=...), which restores the state, or keep it (and `with "
    "routed(...)`) unchanged until backward is done. Reentrant checkpointing is not supported."
)


def _fingerprint(port: Port) -> list[tuple]:
    # Of what was given only whether it was: after the call it is gone, and a call that is repeated whole gives it anew.
    return [
        (name, part.strength, Same.of(part.gate), Same.of(part.partners), part.given is None)
        if part.enabled
        else (name,)
        for name, part in port.items()
    ]
