"""Guiders that keep a guided prediction within the range of what a plain one would be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.process import NoiseLevel, Parameterization, Prediction, X0Parameterization
from vdiff.samplers.guiders import Answers, Guidance, Guider, Weight, WrappingGuider, each
from vdiff.samplers.plan import Node

X0 = X0Parameterization()


class RescaleGuider(WrappingGuider):
    r"""Gives back the spread that guidance added: :math:`y \mapsto \phi\,y\,\sigma_c/\sigma_y + (1 - \phi)\,y`.

    :math:`\sigma` is the standard deviation over all of a sample, c the plain conditional prediction.

    Args:
        phi: The share above; 0 changes nothing. A list gives each sample its own.
        guider: The one inside.
        language: In which the spreads are taken; by default x0. Peers take them of whatever their network says.

    References:
        Lin et al., arXiv:2305.08891, section 3.4.
    """

    def __init__(
        self, phi: float | list[float] = 0.7, guider: Guider | None = None, language: Parameterization | None = None
    ) -> None:
        super().__init__(guider)
        self.phi, self.language = phi, language or X0

    def numbers(self, nodes: Sequence[Node]) -> Sequence[Weight | None]:
        return [None if each(self.phi, lambda phi: phi == 0) else self.phi for _ in nodes]

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        check_language(self, self.language, nodes)
        return super().plan(nodes)

    def change(self, guided: Prediction, answers: Answers, number: Tensor) -> Prediction:
        if "cond" not in answers or guided is answers["cond"]:
            return guided
        value, plain = guided.to(self.language), answers["cond"].to(self.language)
        share = _std(plain) / _std(value)
        return guided.with_(language=self.language, value=value * (1 + number * (share - 1)))


class DynamicThresholdGuider(WrappingGuider):
    r"""Clamps x0 to its own quantile s and divides by it, where that is beyond the range of the data. Pixels only.

    :math:`x_0 \mapsto \mathrm{clamp}(x_0, -s, s) \cdot r / s` with :math:`s = \max(r, Q_p(|x_0|))`, sample by sample.

    Args:
        quantile: The :math:`p` above.
        bound: The :math:`r` above: data lies in [-r, r].
        guider: The one inside.

    References:
        Saharia et al., arXiv:2205.11487, section 2.3.
    """

    def __init__(self, quantile: float = 0.995, bound: float = 1.0, guider: Guider | None = None) -> None:
        super().__init__(guider)
        if not 0 < quantile <= 1 or bound <= 0:
            raise ValueError(f"DynamicThresholdGuider: quantile in (0, 1], bound > 0; got {quantile}, {bound}.")
        self.quantile, self.bound = quantile, bound

    def change(self, guided: Prediction, answers: Answers, number: Tensor) -> Prediction:
        x0 = guided.x0
        s = _quantile(x0.abs(), self.quantile).clamp(min=self.bound)
        return guided.with_(language=X0, value=torch.minimum(torch.maximum(x0, -s), s) * (self.bound / s))


def check_language(guider: Guider, language: Parameterization, nodes: Sequence[Node]) -> None:
    """Refuse a language that says nothing about x0 at one of these levels, before the walk."""
    language.check(NoiseLevel(*Node.table(nodes).unbind(1)), type(guider).__name__)


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Of each row, linear between two values, with the axes of ``x``; torch.quantile refuses large rows."""
    flat = x.flatten(1)
    place = share * (flat.shape[1] - 1)
    low = int(place)
    below = flat.kthvalue(low + 1, dim=1).values
    above = flat.kthvalue(min(low + 2, flat.shape[1]), dim=1).values
    return torch.lerp(below, above, place - low)[(...,) + (None,) * (x.ndim - 1)]
