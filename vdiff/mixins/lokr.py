r"""Low-rank Kronecker product: a small matrix times a block, :math:`D = W_1 \otimes W_2`.

Each factor is a matrix of its own, or where that is larger, a pair of low rank.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vdiff.hooks import On
from vdiff.mixins.loha import tucker
from vdiff.mixins.weights import WeightMixin, WeightPart, at


class LoKr(WeightMixin, name="lokr"):
    """LoKr on linear layers, embeddings and convolutions.

    Args:
        factor: Size of ``W1`` along each axis: this number where it divides the layer's, otherwise the largest
            divisor below it and below the square root; -1 for the latter alone. A number, or numbers by glob.
        decompose_both: Let ``W1`` be a pair, too.
        tucker: A convolution's kernel apart from its channels in the pair of ``W2``.
        rank, alpha, on, name, scale: See :class:`~vdiff.mixins.LoRA`. A factor whose longer side is at most
            twice the rank is a full matrix.

    References:
        Yeh et al., LyCORIS, arXiv:2309.14859. Names of weights are theirs.
    """

    by_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "factor")

    def __init__(
        self,
        rank: int | dict[str, int] = 8,
        alpha: float | dict[str, float] | None = None,
        on: On = "*.to_[qkv]",
        factor: int | dict[str, int] = -1,
        decompose_both: bool = False,
        tucker: bool = False,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(rank, alpha, on, name, scale)
        self.factor, self.decompose_both, self.tucker = factor, decompose_both, tucker

    def part(self, module: nn.Module, site: str) -> LoKrPart:
        rank, alpha = self.numbers(site)
        factor = int(at(site, self.factor, "factor", "LoKr"))
        return LoKrPart(module, rank, alpha / rank, factor, self.decompose_both, self.tucker, f"LoKr: {site!r}")


class LoKrPart(WeightPart):
    """``lokr_w1`` of shape ``(o1, i1)`` and ``lokr_w2`` of shape ``(o2, i2, *kernel)``, or their pairs."""

    def __init__(
        self, host: nn.Module, rank: int, unit: float, factor: int, both: bool, use_tucker: bool, where: str
    ) -> None:
        super().__init__(host, where, "LoKr")
        self.rank, self.unit = rank, unit
        kernel = self.layer.kernel
        o1, o2 = factorization(self.layer.rows, factor)
        i1, i2 = factorization(self.layer.columns // math.prod(kernel), factor)
        self.kernel = kernel
        if both and rank < max(o1, i1) / 2:
            self.lokr_w1_a = nn.Parameter(torch.empty(o1, rank))
            self.lokr_w1_b = nn.Parameter(torch.empty(rank, i1))
        else:
            self.lokr_w1 = nn.Parameter(torch.empty(o1, i1))
        if rank >= max(o2, i2) / 2:
            self.lokr_w2 = nn.Parameter(torch.empty(o2, i2, *kernel))
        elif use_tucker and math.prod(kernel) > 1:
            self.lokr_t2 = nn.Parameter(torch.empty(rank, rank, *kernel))
            self.lokr_w2_a = nn.Parameter(torch.empty(rank, o2))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, i2))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(o2, rank))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, i2 * math.prod(kernel)))
        self.inner = (o2, i2, *kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name in ("lokr_w1", "lokr_w1_a"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def delta(self, weight: Tensor) -> Tensor:
        held = self._parameters
        w1 = self.lokr_w1 if "lokr_w1" in held else self.lokr_w1_a @ self.lokr_w1_b
        if "lokr_w2" in held:
            w2 = self.lokr_w2
        elif "lokr_t2" in held:
            w2 = tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            w2 = (self.lokr_w2_a @ self.lokr_w2_b).reshape(self.inner)
        product = torch.einsum("ab,cd...->acbd...", w1, w2)
        return self.layer.weight(product.reshape(self.layer.rows, self.layer.columns))

    def extra_repr(self) -> str:
        return f"rank {self.rank}, scaled by {self.unit:g}"


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, see :class:`LoKr`."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(n for n in range(most, 0, -1) if size % n == 0)
    return small, size // small
