"""Activation checkpointing that knows what was attached, and how much of it, in the forward pass.

A checkpointed block runs again inside backward. By then a scale may have been changed, a mixin
switched, a gate withdrawn, and the second run would differ from the first: wrong gradients, and
nothing says so. :func:`checkpoint` puts the state of the forward pass back for the second run. Where
foreign code checkpoints, every port remembers the state in which it ran, and a second run in another
state is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from vdiff.hooks.port import Part, Port, ports
from vdiff.hooks.witness import Witness


def checkpoint(function: Callable[..., Any], *args: Any, module: nn.Module, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, its activations recomputed in backward as they were.

    Args:
        function: The module's forward or a part of it. It may draw (dropout): the random state is kept.
        module: Where to look for attachments: everything that ``function`` calls lies at or below it.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():  # scales and gates are inputs of the graph there, and kept with it
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    snapshot = Snapshot(ports(module))
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=snapshot.contexts, **kwargs)


class Snapshot:
    """The state of some ports, to be put back later for a while."""

    def __init__(self, ports: list[Port]) -> None:
        self.states = [(port, [_state(part, copy=True) for part in port.values()], list(port)) for port in ports]
        self.merged = [[part.merged for part in port.values()] for port in ports]

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self

    def __enter__(self) -> Snapshot:
        for (port, _, names), merged in zip(self.states, self.merged, strict=True):
            if list(port) != names:
                raise RuntimeError(
                    f"Between forward and backward the mixins of a module changed from {names} to {list(port)}. "
                    "Attach and detach after backward."
                )
            if any(part.merged is not before for part, before in zip(port.values(), merged, strict=True)):
                raise RuntimeError(
                    f"Between forward and backward mixins of a module ({', '.join(names)}) were merged or unmerged. "
                    "The gradient would be wrong. Do it after backward."
                )
        self.after = [([_state(part) for part in port.values()], port.witness) for port, _, _ in self.states]
        for port, states, _ in self.states:
            _put(port, states)
            port.witness = Witness(port)
        return self

    def __exit__(self, *error: object) -> None:
        for (port, _, _), (states, witness) in zip(self.states, self.after, strict=True):
            _put(port, states)
            port.witness = witness


def _state(part: Part, copy: bool = False) -> dict[str, Any]:
    names = ("enabled", "strength", "scale", "gate", "partners", "given")
    state = {name: getattr(part, name) for name in names}
    return state | {"scale": part.scale.clone()} if copy else state


def _put(port: Port, states: list[dict[str, Any]]) -> None:
    for part, state in zip(port.values(), states, strict=True):
        for name, value in state.items():
            setattr(part, name, value)
