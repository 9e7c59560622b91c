"""Several conditions at once, each with its own scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vdiff.process import Conditioning
from vdiff.samplers.guiders import Guidance, Guider
from vdiff.samplers.plan import Node

Scale = float | list[float]


class MultiCFGGuider(Guider, name="multi_cfg"):
    r"""Classifier-free guidance by several conditions, each with its own scale.

    ``nested`` adds one after the other, in the order given, as InstructPix2Pix (:math:`\varnothing` is the null):
    :math:`D(\varnothing) + w_1 (D(c_1) - D(\varnothing)) + w_2 (D(c_1, c_2) - D(c_1)) + \dots`, which is the plain
    conditional prediction where all scales are 1. ``apart`` takes each by itself, as composed diffusion:
    :math:`D(\varnothing) + \sum_i w_i (D(c_i) - D(\varnothing))`. Branches of weight 0 are not asked.

    Args:
        scales: By the name of the condition (``concat``, ``cross_attention``, ...), in order; a list gives each
            sample its own. Conditions that are not named are in every branch.
        how: As above.
        batched: See :class:`CFGGuider`.

    References:
        Brooks et al., arXiv:2211.09800, eq. 3; Liu et al., arXiv:2206.01714, eq. 11.
    """

    def __init__(
        self,
        scales: Mapping[str, float | list[float]],
        how: Literal["nested", "apart"] = "nested",
        batched: bool = True,
    ) -> None:
        if not scales:
            raise ValueError("MultiCFGGuider: name at least one condition and its scale.")
        self.scales, self.how, self.batched = scales, how, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        names, scales = list(self.scales), list(self.scales.values())
        if self.how == "nested":
            with_first = [self._branch(names[:i]) for i in range(len(names) + 1)]
            weights = [_minus(a, b) for a, b in zip([1.0, *scales], [*scales, 0.0], strict=True)]
        else:
            with_first = [self._branch([]), *(self._branch([name]) for name in names)]
            weights = [_left(scales), *scales]
        asked = {b: w for b, w in zip(with_first, weights, strict=True) if w != 0 and not _all_zero(w)}
        return [Guidance(asked) for _ in nodes]

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        if branch == "cond":
            return cond
        null = super().condition("null", cond, rows)
        away = [name for name in self.scales if name not in branch.removeprefix("with:").split("+")]
        for name in away:
            if name not in cond or name not in null:
                raise ValueError(
                    f"MultiCFGGuider: there is no condition {name!r} to take away. The conditions are "
                    f"{', '.join(cond.tensors) or 'none'}, those of the null {', '.join(null.tensors) or 'none'}."
                )
        tensors = {name: null[name] if name in away else value for name, value in cond.tensors.items()}
        masks = {name: null.masks.get(name, mask) if name in away else mask for name, mask in cond.masks.items()}
        return cond.with_(tensors=tensors, masks=masks)

    def _branch(self, kept: Sequence[str]) -> str:
        return "cond" if set(kept) == set(self.scales) else "with:" + "+".join(kept)


def _minus(a: Scale, b: Scale) -> Scale:
    """``a - b``, sample by sample where either is."""
    if not isinstance(a, list) and not isinstance(b, list):
        return a - b
    num = len(a) if isinstance(a, list) else len(b)  # type: ignore[arg-type]
    first, second = (v if isinstance(v, list) else [v] * num for v in (a, b))
    return [x - y for x, y in zip(first, second, strict=True)]


def _left(scales: Sequence[Scale]) -> Scale:
    left: Scale = 1.0
    for scale in scales:
        left = _minus(left, scale)
    return left


def _all_zero(weight: Scale) -> bool:
    return isinstance(weight, list) and not any(weight)
