r"""Low-rank Hadamard product: two pairs of low rank, multiplied entry by entry.

:math:`D = (A_1 B_1) \odot (A_2 B_2)` has a rank of up to the square of the pairs', for twice the parameters of LoRA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vdiff.hooks import On
from vdiff.mixins.weights import WeightMixin, WeightPart


class LoHa(WeightMixin, name="loha"):
    """LoHa on linear layers, embeddings and convolutions.

    Args:
        tucker: A convolution's kernel apart from its channels: a small core for each pair, arXiv:2108.06098,
            proposition 3.
        rank, alpha, on, name, scale: See :class:`~vdiff.mixins.LoRA`.

    References:
        Hyeon-Woo et al., FedPara, arXiv:2108.06098. Names of weights are those of LyCORIS.
    """

    def __init__(
        self,
        rank: int | dict[str, int] = 8,
        alpha: float | dict[str, float] | None = None,
        on: On = "*.to_[qkv]",
        tucker: bool = False,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(rank, alpha, on, name, scale)
        self.tucker = tucker

    def part(self, module: nn.Module, site: str) -> LoHaPart:
        rank, alpha = self.numbers(site)
        return LoHaPart(module, rank, alpha / rank, self.tucker, f"LoHa: {site!r}")


class LoHaPart(WeightPart):
    """Two pairs: ``a`` of shape ``(out, rank)`` and ``b`` of shape ``(rank, in)``; with cores ``t`` of shape
    ``(rank, rank, *kernel)`` they are ``(rank, out)`` and ``(rank, in)``."""

    def __init__(self, host: nn.Module, rank: int, unit: float, tucker: bool, where: str) -> None:
        super().__init__(host, where, "LoHa")
        self.rank, self.unit = rank, unit
        kernel = self.layer.kernel
        self.tucker = tucker and math.prod(kernel) > 1
        rows, columns = self.layer.rows, self.layer.columns
        if self.tucker:
            a, b = (rank, rows), (rank, self.layer.shape[1])
            self.hada_t1 = nn.Parameter(torch.empty(rank, rank, *kernel))
            self.hada_t2 = nn.Parameter(torch.empty(rank, rank, *kernel))
        else:
            a, b = (rows, rank), (rank, columns)
        self.hada_w1_a, self.hada_w1_b = nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b))
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def delta(self, weight: Tensor) -> Tensor:
        if self.tucker:
            first = tucker(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            return first * tucker(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        return self.layer.weight((self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b))

    def extra_repr(self) -> str:
        return f"rank {self.rank}, scaled by {self.unit:g}"


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A kernel ``(out, in, *k)`` from a core ``(r, r, *k)`` and ``(r, out)``, ``(r, in)``."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)
