"""Which rows of a batch get how much of an attachment, and which rows are sampled jointly."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from vdiff.hooks.port import parts
from vdiff.hooks.rows import check_partners
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
        ValueError: a gate for a mixin that is not attached, gates and partners of unequal length, or partners that
            are none (:func:`check_partners`).
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
        several = None if self.partners is None or self.partners.ndim == 1 else self.partners.shape[1]
        for name, gate in self.gates.items():
            rows = len(gate) if rows is None and gate.ndim else rows
            is_each = several is not None and all(p.weighs_partners for p in self.parts if p.mixin_name == name)
            if tuple(gate.shape) != (rows,) and not (is_each and tuple(gate.shape) == (rows, several)):
                each = f", or one for each partner, ({rows}, {several})" if is_each else ""
                raise ValueError(
                    f"the gate of {name!r} must hold one number per row, ({rows},){each}; it is {tuple(gate.shape)}."
                )
        if self.partners is not None:
            check_partners(self.partners, len(self.partners) if rows is None and self.partners.ndim else rows or 0)

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
