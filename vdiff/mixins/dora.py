r"""Weight-decomposed low-rank adaptation: a direction of low rank apart, and a length for every output.

.. math:: W' = m \odot \frac{W + s B A}{\lVert W + s B A \rVert}, \qquad s = \mathrm{alpha} / \mathrm{rank}

with a norm per output and :math:`m = \lVert W \rVert` at the start. ``scale`` and gates go from :math:`W` to
:math:`W'`: 0 is the plain host, whatever :math:`m` is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vdiff.hooks import On
from vdiff.mixins.lora import LoRAPart, check_dropout
from vdiff.mixins.weights import WeightMixin, WeightPart


class DoRA(WeightMixin, name="dora"):
    """DoRA on linear layers, embeddings and convolutions.

    Args:
        dropout: On the input of the change, in training.
        rslora: Multiply by alpha / sqrt(rank) instead of alpha / rank.
        rank, alpha, on, name, scale: See :class:`~vdiff.mixins.LoRA`.

    References:
        Liu et al., arXiv:2402.09353, eq. 5; the norm is a constant to the gradient, as in section 4.3.
    """

    def __init__(
        self,
        rank: int | dict[str, int] = 8,
        alpha: float | dict[str, float] | None = None,
        on: On = "*.to_[qkv]",
        dropout: float = 0.0,
        rslora: bool = False,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(rank, alpha, on, name, scale)
        check_dropout(dropout, "DoRA")
        self.dropout, self.rslora = dropout, rslora

    def part(self, module: nn.Module, site: str) -> DoRAPart:
        rank, alpha = self.numbers(site)
        ratio = alpha / (math.sqrt(rank) if self.rslora else rank)
        return DoRAPart(module, rank, ratio, self.dropout, where=f"DoRA: {site!r}")


class DoRAPart(LoRAPart):
    """The pair of LoRA, and ``magnitude`` of shape ``(out,)``."""

    def __init__(self, host: nn.Module, rank: int, ratio: float, dropout: float, where: str) -> None:
        super().__init__(host, rank, 1.0, dropout, where=where, who="DoRA")
        self.ratio = ratio  # inside the norm, so not part of the scale
        self.magnitude = nn.Parameter(self._lengths(self.base))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "magnitude" in self._parameters:  # not yet, where the pair is made
            with torch.no_grad():
                self.magnitude.copy_(self._lengths(self.base))

    def delta(self, weight: Tensor) -> Tensor:
        base = self.layer.matrix(weight.detach().to(self.A.dtype))
        changed = base + self.ratio * self._product(self.A, self.B)
        length = torch.linalg.vector_norm(changed.detach(), dim=1)
        # A row of zeros has no direction to give a length, and is as it is: so layers that begin at zero learn.
        gain = torch.where(length > 0, self.magnitude / length.where(length > 0, 1), 1)
        return self.layer.weight(gain[:, None] * changed - base)

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        return WeightPart.change(self, module, self.dropped(x))

    def _lengths(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.layer.matrix(weight.to(torch.float32)), dim=1)
