"""What a network is told besides the noisy sample: named tensors, one row per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Named tensors for a batch of B rows.

    Attributes:
        tensors: By the name of what they feed: ``cross_attention`` ``(B, n, c)``, ``vector``
            ``(B, c)``, ``concat`` ``(B, c, ...)``, ``label`` ``(B,)``, ``fps`` ``(B,)``, ...
        masks: For some of them, which entries count: True counts, e.g. ``(B, n)``.
        null: The same without the condition, or a negative one; what guidance moves away from.
        gates: Per attachment, by its name, how much of it each row gets, ``(B,)``; for joint attention to several
            partners also ``(B, P)``.
        partners: For every row the row it is sampled jointly with, -1 for none, ``(B,)``; or P rows each, ``(B, P)``.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    null: Conditioning | None = None
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    partners: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    @property
    def num_rows(self) -> int | None:
        """B, or None where nothing tells."""
        for value in (*self.tensors.values(), *self.gates.values()):
            return len(value)
        return None if self.partners is None else len(self.partners)

    def with_(self, **changes: object) -> Conditioning:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_null(self, null: Conditioning) -> Conditioning:
        """The same conditions against another null: a negative prompt."""
        if null.num_rows not in (None, self.num_rows):
            raise ValueError(f"Conditioning: {self.num_rows} rows against a null of {null.num_rows}.")
        return replace(self, null=null)

    def gated(self, rows: int | None = None, **gates: float | Tensor) -> Conditioning:
        """The same with some attachments turned up or down: ``cond.gated(pag=0)``; the null is gated alike."""
        rows = rows or self.num_rows
        if rows is None:
            raise ValueError("Conditioning.gated: an empty conditioning has no rows; say how many: gated(rows=4, ...).")
        device = self.device
        shapes = {name: gate.shape for name, gate in self.gates.items()}  # (B, P) stays (B, P)
        new = {
            name: g if isinstance(g, Tensor) else torch.full(shapes.get(name, (rows,)), float(g), device=device)
            for name, g in gates.items()
        }
        null = None if self.null is None else self.null.gated(rows, **gates)
        return replace(self, gates={**self.gates, **new}, null=null)

    @property
    def device(self) -> torch.device | None:
        for value in (*self.tensors.values(), *self.gates.values()):
            return value.device
        return None

    def to(self, *args: torch.device | torch.dtype | str) -> Conditioning:
        """Moved; a dtype applies to floating features only: a number per row (fps, a size) stays exact, as do masks,
        labels, gates and partners."""
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        places = [a for a in args if not isinstance(a, torch.dtype)]

        def move(value: Tensor, cast: bool) -> Tensor:
            value = value.to(*places) if places else value  # type: ignore[call-overload]
            return value.to(dtypes[0]) if cast and dtypes and value.is_floating_point() and value.ndim > 1 else value

        return Conditioning(
            {k: move(v, True) for k, v in self.tensors.items()},
            {k: move(v, False) for k, v in self.masks.items()},
            None if self.null is None else self.null.to(*args),
            {k: move(v, False) for k, v in self.gates.items()},
            None if self.partners is None else move(self.partners, False),
        )

    @staticmethod
    def cat(conds: Sequence[Conditioning], rows: int) -> Conditioning:
        """Branches of ``rows`` rows each as one batch; partners point within their own branch.

        Raises:
            ValueError: the branches are not conditioned on the same names, or differ in shape.
        """
        first = conds[0]
        for cond in conds[1:]:
            for what, one, other in (("", first.tensors, cond.tensors), ("masks for ", first.masks, cond.masks)):
                if set(one) != set(other):
                    raise ValueError(
                        f"Conditioning.cat: one branch has {what}{sorted(one)}, another {sorted(other)}; "
                        "a null needs every condition that the network gets."
                    )
        gates = {
            name: torch.cat([cond.gates.get(name, _ones_like_some(name, conds)) for cond in conds])
            for name in dict.fromkeys(name for cond in conds for name in cond.gates)
        }
        partners = None
        if any(cond.partners is not None for cond in conds):
            partners = torch.cat([_offset(cond.partners, i * rows, rows, conds) for i, cond in enumerate(conds)])
        try:
            return Conditioning(
                {name: torch.cat([cond.tensors[name] for cond in conds]) for name in first.tensors},
                {name: torch.cat([cond.masks[name] for cond in conds]) for name in first.masks},
                None,
                gates,
                partners,
            )
        except RuntimeError as error:
            shapes = {n: [tuple(c.tensors[n].shape) for c in conds] for n in first.tensors}
            raise ValueError(f"Conditioning.cat: branches differ in shape: {shapes}. ({error})") from error


def _ones_like_some(name: str, conds: Sequence[Conditioning]) -> Tensor:
    return torch.ones_like(next(cond.gates[name] for cond in conds if name in cond.gates))


def _offset(partners: Tensor | None, by: int, rows: int, conds: Sequence[Conditioning]) -> Tensor:
    if partners is None:
        some = next(cond.partners for cond in conds if cond.partners is not None)
        return torch.full((rows, *some.shape[1:]), -1, dtype=some.dtype, device=some.device)
    return torch.where(partners < 0, partners, partners + by)
