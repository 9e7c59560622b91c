"""Guidance away from a worse prediction under the same conditions: of a weaker model, or of the same one disturbed
or left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, Prediction, X0Parameterization
from vdiff.samplers.guiders import Answers, Guider, Weight, WrappingGuider, each, mapped
from vdiff.samplers.plan import Node

X0 = X0Parameterization()


class AwayGuider(WrappingGuider, abstract=True):
    """Adds ``s (c - d)`` to what the guider inside says, with c of ``cond`` and d of another branch."""

    branch: str

    def change(self, guided: Prediction, answers: Answers, number: Tensor) -> Prediction:
        cond, worse = answers["cond"], answers[self.branch]
        if guided.language == cond.language == worse.language:
            return guided.with_(value=guided.value + number * (cond.value - worse.value))
        return guided.with_(language=X0, value=guided.x0 + number * (cond.x0 - worse.x0))  # what all can be read in


class AutoguidanceGuider(AwayGuider):
    r"""Guidance by a weaker model of the same conditions: :math:`d + w (c - d)`, around another guider plus the same.

    Args:
        weak: The weaker denoiser (smaller, or less trained), of any language, with the schedule of the other. It is
            a companion: nobody trains or saves it, and it is moved to where the samples are.
        scale: The :math:`w` above; 1 is the guider inside alone. A list gives each sample its own.
        guider: The one inside; by default the plain conditional prediction.

    References:
        Karras et al., arXiv:2406.02507, eq. 2.
    """

    branch = "weak"
    asks = ("cond", branch)
    scale: float | list[float] = 1.0  # its own, not that of the guider inside

    def __init__(self, weak: Denoiser, scale: float | list[float] = 2.0, guider: Guider | None = None) -> None:
        super().__init__(guider)
        self.weak, self.scale = weak.eval().requires_grad_(False), scale

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        return [None if each(self.scale, lambda s: s == 1) else mapped(self.scale, lambda s: s - 1) for _ in nodes]

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        return self.guider.condition("cond" if branch == self.branch else branch, cond, rows)

    def denoiser(self, branch: str, denoiser: Denoiser) -> Denoiser:
        return self.weak if branch == self.branch else self.guider.denoiser(branch, denoiser)


class PerturbedGuider(AwayGuider):
    r"""Guidance away from the same network, disturbed by a mixin: :math:`+ s\,(c - \tilde c)`.

    The mixin is attached to the network and does nothing but where its gate says so; the disturbed branch is one more
    row of the batch whose gate is 1. PAG, SEG and skip-layer guidance differ in the mixin alone.

    Args:
        mixin: Its name where it is attached: ``pag``, ``seg``, ``skip_layer`` or one's own.
        strength: The :math:`s` above, as the papers count: 0 is the guider inside alone. A list gives each sample
            its own.
        lo, hi: The branch is asked where ``lo < sigma / alpha <= hi``.
        guider: The one inside; by default the plain conditional prediction.

    References:
        Ahn et al., arXiv:2403.17377, eq. 15; Hong, arXiv:2408.00760; Hyung et al., arXiv:2411.18664.
    """

    def __init__(
        self,
        mixin: str = "pag",
        strength: float | list[float] = 3.0,
        lo: float = 0.0,
        hi: float = math.inf,
        guider: Guider | None = None,
    ) -> None:
        super().__init__(guider)
        self.mixin, self.strength, self.lo, self.hi = mixin, strength, lo, hi
        self.branch = f"disturbed by {mixin}"
        self.asks = ("cond", self.branch)

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        is_off = each(self.strength, lambda s: s == 0)
        return [self.strength if self.lo < node.ratio <= self.hi and not is_off else None for node in nodes]

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        if branch == self.branch:
            return self.guider.condition("cond", cond, rows).gated(rows, **{self.mixin: 1.0})
        return self.guider.condition(branch, cond, rows).gated(rows, **{self.mixin: 0.0})


class JointGuider(AwayGuider):
    r"""Guidance by company: :math:`d + w (c - d)` with d the samples made jointly, each as if alone, around another
    guider plus the same.

    The branch of its own has the gate of joint attention closed; everything else, LoRAs of the streams too, is as in
    the joint one.

    Args:
        scale: The :math:`w` above; 1 is the guider inside alone. A list gives each row its own: of a pair in which one
            stream is given, only the other need be guided.
        mixin: Name of the joint attention where it is attached.
        lo, hi: The branch is asked where ``lo < sigma / alpha <= hi``.
        guider: The one inside; by default the plain conditional prediction.

    References:
        Li et al., arXiv:2410.11439, whose scale is w - 1.
    """

    branch = "apart"
    asks = ("cond", branch)
    scale: float | list[float] = 1.0  # its own, not that of the guider inside

    def __init__(
        self,
        scale: float | list[float] = 2.0,
        mixin: str = "joint_attention",
        lo: float = 0.0,
        hi: float = math.inf,
        guider: Guider | None = None,
    ) -> None:
        super().__init__(guider)
        self.scale, self.mixin, self.lo, self.hi = scale, mixin, lo, hi

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        more = None if each(self.scale, lambda s: s == 1) else mapped(self.scale, lambda s: s - 1)
        return [more if self.lo < node.ratio <= self.hi else None for node in nodes]

    def condition(self, branch: str, cond: Conditioning, rows: int) -> Conditioning:
        if branch == self.branch:
            return self.guider.condition("cond", cond, rows).gated(rows, **{self.mixin: 0.0})
        return self.guider.condition(branch, cond, rows)
