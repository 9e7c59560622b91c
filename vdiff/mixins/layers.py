"""Layers with a weight, seen alike: a matrix from what goes in to what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
STOCK = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer, a convolution or an embedding.

    Attributes:
        kind: Which of the three.
        rows, columns: Of the matrix. A convolution's columns are the channels of a group times the kernel, an
            embedding's are its entries.
        shape: Of the weight.
        groups: Of a convolution, otherwise 1.
    """

    kind: Literal["linear", "conv", "embedding"]
    rows: int
    columns: int
    shape: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, host: nn.Module, where: str, who: str) -> Layer:
        """What ``host`` is.

        Raises:
            ValueError: none of the three, one whose forward is its own and cannot be followed, or one whose weight
                is kept in another form.
        """
        if type(host).__name__ == "NonDynamicallyQuantizableLinear":
            raise ValueError(
                f"{where} is the output of nn.MultiheadAttention, which never calls it; nothing would happen."
            )
        stock = next((kind for kind in STOCK if isinstance(host, kind)), None)
        if stock is None:
            raise ValueError(
                f"{where} is a {type(host).__name__}; {who} goes on Linear, Conv1d, Conv2d, Conv3d and Embedding. "
                "Narrow `on`; 'type:Linear' picks all linear layers."
            )
        if stock is not nn.Linear and type(host).forward is not stock.forward:
            raise ValueError(
                f"{where} is a {type(host).__name__} with a forward of its own, which {who} cannot follow."
            )
        shape = tuple(host.weight.shape)  # type: ignore[union-attr]
        if isinstance(host, nn.Embedding):
            return cls("embedding", shape[1], shape[0], shape)
        if isinstance(host, nn.Linear):
            if shape != (host.out_features, host.in_features):
                raise ValueError(
                    f"{where} ({type(host).__name__}) goes from {host.in_features} to {host.out_features}, and its "
                    f"weight is {shape}: packed, or sharded. {who} changes plain weights; load the host unquantised."
                )
            return cls("linear", shape[0], shape[1], shape)
        return cls("conv", shape[0], host.weight[0].numel(), shape, host.groups)  # type: ignore[union-attr, arg-type]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as ``(rows, columns)``."""
        return weight.T if self.kind == "embedding" else weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return matrix.T if self.kind == "embedding" else matrix.reshape(self.shape)

    def call(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        """What the host would say with another weight and no bias."""
        if self.kind == "linear":
            return F.linear(x, weight)
        if self.kind == "embedding":
            return F.embedding(x, weight)
        return host._conv_forward(x, weight, None)  # the host's own stride, padding and padding mode
