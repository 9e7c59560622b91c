"""Guiders: which branches of the denoiser to ask at each level, and how to combine them.

A guider is planned on the host together with the levels, so an interval or a schedule of scales costs
no synchronisation, and a branch that is not needed is not asked. ``scale`` 1 is the plain conditional
prediction. What a run remembers lives in :class:`Guided`, never in the guider.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, NoiseLevel, Prediction, spread
from vdiff.registry import Registered
from vdiff.samplers.plan import Node

Weight = float | Sequence[float]


@dataclass(frozen=True)
class Guidance:
    """What one call asks: for each branch its weight, a number or one per sample."""

    weights: Mapping[str, Weight]


class Guider(Registered, kind="guider"):
    """Plans which branches a run asks; the default combination is linear."""

    batched: bool = True  # all branches in one call of the network, or one after the other to save memory

    @abstractmethod
    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        """One entry per call of the denoiser, at these levels."""

    def condition(self, branch: str, cond: Conditioning) -> Conditioning:
        """The conditions of a branch: ``cond`` and ``null`` here; guiders add their own.

        The null is without conditions, not without company: gates and partners are those of ``cond`` unless it has
        its own.
        """
        if branch == "cond":
            return cond
        if branch == "null":
            if cond.null is None:
                raise ValueError(
                    f"{type(self).__name__}: this conditioning has no null to guide away from. "
                    "Let the conditioner make one, or pass a negative: cond.with_null(...)."
                )
            null = cond.null
            partners = cond.partners if null.partners is None else null.partners
            return null.with_(gates={**cond.gates, **null.gates}, partners=partners)
        raise ValueError(f"{type(self).__name__}: unknown branch {branch!r}.")

    def combine(self, predictions: Mapping[str, Prediction], weights: Mapping[str, Tensor]) -> Prediction:
        """One prediction of the branches; the weights are on the device, 0-d or ``(B,)``."""
        first = next(iter(predictions.values()))
        value = sum(p.value * spread(weights[name], p.value) for name, p in predictions.items())
        return Prediction(first.language, value, first.x_t, first.level)  # type: ignore[arg-type]


class NoneGuider(Guider):
    """The plain conditional prediction."""

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        return [Guidance({"cond": 1.0}) for _ in nodes]


class CFGGuider(Guider):
    r"""Classifier-free guidance: :math:`u + w (c - u)`.

    Args:
        scale: The :math:`w` above; 1 is the plain conditional prediction. A list gives each sample its own.
        batched: Both branches in one call (faster) or one after the other (less memory).

    References:
        Ho & Salimans, arXiv:2207.12598, in the convention of Saharia et al. (their w + 1).
    """

    def __init__(self, scale: float | list[float] = 1.0, batched: bool = True) -> None:
        self.scale, self.batched = scale, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        scales = self.scale if isinstance(self.scale, list) else [self.scale]
        if all(s == 1 for s in scales):
            return [Guidance({"cond": 1.0}) for _ in nodes]
        null = [1 - s for s in scales] if isinstance(self.scale, list) else 1 - scales[0]
        return [Guidance({"cond": self.scale, "null": null}) for _ in nodes]

    def combine(self, predictions: Mapping[str, Prediction], weights: Mapping[str, Tensor]) -> Prediction:
        if "null" not in predictions:
            return predictions["cond"]
        cond, null = predictions["cond"], predictions["null"]
        value = torch.lerp(null.value, cond.value, spread(weights["cond"], cond.value))
        return Prediction(cond.language, value, cond.x_t, cond.level)


class Guided:
    """A denoiser under a guider, bound to the levels, conditions and batch of one run.

    Conditions and levels of all branches are laid out once, before the walk.
    """

    def __init__(
        self, denoiser: Denoiser, guider: Guider, nodes: Sequence[Node], cond: Conditioning, like: Tensor
    ) -> None:
        self.denoiser, self.guider = denoiser, guider
        self.dtype, self.device, self.rows = like.dtype, like.device, len(like)
        if cond.num_rows not in (None, self.rows):
            raise ValueError(f"sampling: conditions of {cond.num_rows} rows for {self.rows} samples; each has its own.")
        guidance = guider.plan(nodes)
        self._branches = [tuple(g.weights) for g in guidance]
        assert len(guidance) == len(nodes), f"{type(guider).__name__}.plan: one entry per call"
        self._single = [b == ("cond",) for b in self._branches]
        self._weights = self._upload_weights(guidance)
        self._levels = {k: _levels(nodes, self.rows * k, like) for k in {len(b) for b in self._branches} | {1}}
        self._conds = {b: self._lay_out(b, cond) for b in dict.fromkeys(self._branches)}

    def __call__(self, x: Tensor, call: int) -> Prediction:
        """What the guided denoiser says about ``x`` at the level of this call."""
        branches = self._branches[call]
        level = self._levels[1][call]
        conds = self._conds[branches]
        if self._single[call]:
            return self.denoiser(x, level, conds[0])
        if len(conds) == 1:
            many = self.denoiser(torch.cat([x] * len(branches)), self._levels[len(branches)][call], conds[0])
            values = many.value.chunk(len(branches))
            said = {b: Prediction(many.language, v, x, level) for b, v in zip(branches, values, strict=True)}
        else:
            said = {b: self.denoiser(x, level, c) for b, c in zip(branches, conds, strict=True)}
        return self.guider.combine(said, self._weights[call])

    def _lay_out(self, branches: tuple[str, ...], cond: Conditioning) -> tuple[Conditioning, ...]:
        conds = [self.guider.condition(branch, cond).with_(null=None) for branch in branches]
        if len(conds) > 1 and self.guider.batched:
            return (Conditioning.cat(conds, self.rows),)
        return tuple(conds)

    def _upload_weights(self, guidance: Sequence[Guidance]) -> list[dict[str, Tensor]]:
        """One table, one upload; per call the weights by branch, 0-d or one per row."""
        wanted = [(i, b, w) for i, g in enumerate(guidance) if len(g.weights) > 1 for b, w in g.weights.items()]
        per_row = any(not isinstance(w, int | float) for _, _, w in wanted)
        for _, branch, w in wanted:
            if not isinstance(w, int | float) and len(w) != self.rows:
                raise ValueError(
                    f"{type(self.guider).__name__}: {len(w)} weights of branch {branch!r} for {self.rows} samples."
                )
        flat = [[w] * self.rows if isinstance(w, int | float) else list(w) for _, _, w in wanted] if per_row else None
        out: list[dict[str, Tensor]] = [{} for _ in guidance]
        if wanted:
            table = torch.tensor(
                flat if flat is not None else [w for _, _, w in wanted], dtype=self.dtype, device="cpu"
            )
            for (i, branch, _), row in zip(wanted, table.to(self.device, non_blocking=True).unbind(), strict=True):
                out[i][branch] = row
        return out


def _levels(nodes: Sequence[Node], rows: int, like: Tensor) -> list[NoiseLevel]:
    """The levels on the device, one upload, each as wide as the batch; at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    table = Node.table(nodes).to(dtype).to(like.device, non_blocking=True)
    return [NoiseLevel(*row.unbind()) for row in table[..., None].expand(-1, -1, rows).unbind()]
