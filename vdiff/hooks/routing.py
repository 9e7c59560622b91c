"""Which rows of a batch get how much of an attachment, and which rows are sampled jointly."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from vdiff.hooks.port import parts
from vdiff.process import Conditioning
from vdiff.registry import did_you_mean


class routed:
    """Hand ``cond.gates`` and ``cond.partners`` to everything attached below ``module``, for one call::

        with routed(network, cond):
            value = network(x, c_noise, cond)

    Where ``cond`` has neither, it costs nothing.

    Args:
        module: The network about to be called.
        cond: Its gates go to the mixins of the same name.
        rows: Rows of the batch, where known: gates and partners must have as many.

    Raises:
        ValueError: a gate for a mixin that is not attached, or gates and partners of unequal length.
    """

    def __init__(self, module: nn.Module, cond: Conditioning | None, rows: int | None = None) -> None:
        self.gates = {} if cond is None else cond.gates
        self.partners = None if cond is None else cond.partners
        self.parts = parts(module) if self.gates or self.partners is not None else []
        if self.gates or self.partners is not None:
            self._check(module, rows)

    def _check(self, module: nn.Module, rows: int | None) -> None:
        names = dict.fromkeys(part.mixin_name for part in self.parts)
        for name in self.gates:
            if name not in names:
                raise ValueError(
                    f"A gate for {name!r}, but no mixin of that name is attached to {type(module).__name__}."
                    f"{did_you_mean(name, names)} Attached: {', '.join(names) or 'none'}."
                )
        routes = {f"the gate of {name!r}": gate for name, gate in self.gates.items()}
        if self.partners is not None:
            routes["partners"] = self.partners
        for name, route in routes.items():
            rows = len(route) if rows is None and route.ndim == 1 else rows
            if route.ndim != 1 or len(route) != rows:
                raise ValueError(f"{name} must hold one number per row, ({rows},); it is {tuple(route.shape)}.")

    def __enter__(self) -> routed:
        self.before = [(part.gate, part.partners) for part in self.parts]
        for part in self.parts:
            part.gate, part.partners = self.gates.get(part.mixin_name), self.partners
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part, (gate, partners) in zip(self.parts, self.before, strict=True):
            part.gate, part.partners = gate, partners
