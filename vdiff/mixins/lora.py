r"""Low-rank adaptation: a trained difference of low rank beside a frozen weight.

:math:`W' x = W x + s\,B\,(A\,x)` with :math:`s = \mathrm{scale}\cdot\mathrm{alpha}/\mathrm{rank}`; one of the two
starts at zero, so that attaching changes nothing. Initialisations that need the base start with
:math:`B_0 A_0 \neq 0` and train :math:`B A - B_0 A_0`: the base stays as it is, and other adapters and "mixins off"
keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On
from vdiff.mixins.layers import Layer
from vdiff.mixins.weights import WeightMixin, WeightPart, at

POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Start = Literal["kaiming", "gaussian", "pissa", "olora"]


class LoRA(WeightMixin, name="lora"):
    r"""LoRA on linear layers, embeddings and 1, 2 and 3-dimensional convolutions.

    A convolution's ``A`` is a convolution like the host's (kernel, stride, padding, dilation, groups) to ``rank``
    channels, its ``B`` one of size 1. Weights are kept in float32 and cast to the input's dtype.

    Args:
        rank: Of the difference; a number, or numbers by glob over site names, the first that fits.
        alpha: At scale 1 the difference is multiplied by alpha / rank; by default alpha is the rank.
            A number, or numbers by glob.
        on: By default projections called ``to_q``, ``to_k`` and ``to_v``. Plain attention blocks have one for
            all three: ``*.qkv``.
        dropout: On the input of ``A``, in training.
        rslora: Multiply by alpha / sqrt(rank) instead, arXiv:2312.03732.
        parts: Of a fused projection whose outputs lie one after the other: 3 for one that makes q, k and v. Each
            part gets a pair of its own rank. A number, or numbers by glob.
        init: How the pair starts: ``kaiming`` (uniform) or ``gaussian`` A and zero B; ``pissa``, the largest
            singular vectors of the base (arXiv:2404.02948); ``olora``, its QR decomposition (arXiv:2406.01775). On an
            embedding of the first two, A is zero and B is drawn.
        name, scale: See :class:`Mixin`.

    References:
        Hu et al., arXiv:2106.09685.
    """

    by_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "parts")

    def __init__(
        self,
        rank: int | dict[str, int] = 8,
        alpha: float | dict[str, float] | None = None,
        on: On = "*.to_[qkv]",
        dropout: float = 0.0,
        rslora: bool = False,
        parts: int | dict[str, int] = 1,
        init: Start = "kaiming",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(rank, alpha, on, name, scale)
        check_dropout(dropout, "LoRA")
        if any(p < 1 for p in (parts.values() if isinstance(parts, Mapping) else [parts])):
            raise ValueError(f"LoRA: parts must be 1 or more, got {parts!r}.")
        if init not in ("kaiming", "gaussian", "pissa", "olora"):
            raise ValueError(f"LoRA: init is kaiming, gaussian, pissa or olora, got {init!r}.")
        self.dropout, self.rslora, self.parts = dropout, rslora, parts
        self.init: Start = init

    def part(self, module: nn.Module, site: str) -> LoRAPart:
        rank, alpha = self.numbers(site)
        parts = int(at(site, self.parts, "parts", "LoRA"))
        unit = alpha / (math.sqrt(rank) if self.rslora else rank)
        is_plain = isinstance(module, nn.Linear) and parts == 1 and self.init in ("kaiming", "gaussian")
        kind = LinearLoRAPart if is_plain else LoRAPart
        return kind(module, rank, unit, self.dropout, parts, self.init, where=f"LoRA: {site!r}")


class LoRAPart(WeightPart):
    """The difference at one layer: ``A`` of shape ``(rank, in, *kernel)``, ``B`` of shape ``(out, rank, *1s)``.

    Where the output lies in several parts (of a fused projection, or the groups of a convolution) each has its own
    rows of A and of B; A then has the rows of all of them, and B as many columns as one.
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        unit: float,
        dropout: float = 0.0,
        parts: int = 1,
        init: Start = "kaiming",
        where: str = "LoRA",
        who: str = "LoRA",
    ) -> None:
        super().__init__(host, where, who)
        self.unit, self.init = unit, init
        self.parts, down, up = _shapes(self.layer, rank, parts, where)
        self.A = nn.Parameter(torch.empty(down, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(up, dtype=torch.float32))
        self.dropout = dropout
        self.A0: Tensor | None
        self.B0: Tensor | None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if init in ("pissa", "olora"):
            most = min(self.layer.rows // self.parts, self.layer.columns)
            if self.rank > most:
                raise ValueError(
                    f"{where}: init={init!r} takes the rank from the base, whose own is at most {most}; got "
                    f"{self.rank}."
                )
            self.A0, self.B0 = torch.empty_like(self.A.data), torch.empty_like(self.B.data)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.A0 is not None and self.B0 is not None:
            down, up = self._start()
            with torch.no_grad():
                for tensor, value in ((self.A, down), (self.A0, down), (self.B, up), (self.B0, up)):
                    tensor.copy_(value.reshape(tensor.shape))
            return
        drawn, zero = (self.B, self.A) if self.layer.kind == "embedding" else (self.A, self.B)
        if self.init == "gaussian" or drawn is self.B:
            nn.init.normal_(drawn, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        nn.init.zeros_(zero)

    @property
    def rank(self) -> int:
        """Of each part."""
        return self.B.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        delta = self._product(self.A, self.B)
        if self.A0 is not None and self.B0 is not None:
            delta = delta - self._product(self.A0, self.B0)
        return self.layer.weight(delta)

    def dropped(self, x: Tensor) -> Tensor:
        """An input after dropout, which indices do not know."""
        return F.dropout(x, self.dropout, self.training) if self.dropout and x.is_floating_point() else x

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        x = self.dropped(x)
        change = self._through(module, x, self.A, self.B)
        if self.A0 is not None and self.B0 is not None:  # by the same steps, so that equal pairs cancel exactly
            change = change - self._through(module, x, self.A0, self.B0)
        return change

    def _through(self, module: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self.layer.kind == "embedding":
            return F.linear(F.embedding(x, down.T), up)
        if down.dtype != x.dtype:
            down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = self.layer.call(module, x, down)
        if self.layer.kind == "conv":
            return POINTWISE[up.ndim - 2](hidden, up, groups=self.parts)
        if self.parts == 1:
            return F.linear(hidden, up)
        hidden = hidden.unflatten(-1, (self.parts, -1))
        return torch.einsum("...pr,por->...po", hidden, up.unflatten(0, (self.parts, -1))).flatten(-2)

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        """``B A`` as a matrix, part by part."""
        down, up = down.flatten(1), up.flatten(1)
        if self.parts == 1:
            return up @ down
        return (up.unflatten(0, (self.parts, -1)) @ down.unflatten(0, (self.parts, -1))).flatten(0, 1)

    @torch.no_grad()
    def _start(self) -> tuple[Tensor, Tensor]:
        """A pair A and B whose product is the part of the base that is to be trained first."""
        rank, rows = self.rank, self.layer.matrix(self.base.to(torch.float32)).unflatten(0, (self.parts, -1))
        if self.init == "pissa":
            u, s, v = torch.linalg.svd(rows, full_matrices=False)
            root = (s[:, :rank] / self.unit).sqrt()
            return root[..., None] * v[:, :rank], u[..., :rank] * root[:, None]
        q, r = torch.linalg.qr(rows)
        return r[:, :rank], q[..., :rank]

    def extra_repr(self) -> str:
        parts = f", {self.parts} parts" if self.parts > 1 else ""
        return f"rank {self.rank}, scaled by {self.unit:g}{parts}"


class LinearLoRAPart(LoRAPart):
    """What most are: one pair beside a linear layer. Compiled code looks at every question anew in each call, and here
    are few."""

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.dropout:
            return super().change(module, x)
        down, up = self.A, self.B
        if down.dtype != x.dtype:
            down, up = down.to(x.dtype), up.to(x.dtype)
        return F.linear(F.linear(x, down), up)


def check_dropout(dropout: float, who: str) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be in [0, 1), got {dropout}.")


def _shapes(layer: Layer, rank: int, parts: int, where: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Parts of the output, and the shapes of A and B."""
    if layer.groups > 1:
        if rank % layer.groups:
            raise ValueError(f"{where} has {layer.groups} groups; its rank must be a multiple of that, got {rank}.")
        if parts > 1:
            raise ValueError(f"{where} has {layer.groups} groups; it cannot have {parts} fused parts as well.")
        parts, rank = layer.groups, rank // layer.groups
    if layer.rows % parts or (parts > 1 and layer.kind == "embedding"):
        raise ValueError(f"{where} has {layer.rows} outputs, which are not {parts} fused parts.")
    ones = (1,) * len(layer.kernel)
    columns = layer.columns if layer.kind != "conv" else layer.shape[1]
    return parts, (parts * rank, columns, *layer.kernel), (layer.rows, rank, *ones)
