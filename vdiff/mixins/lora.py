r"""Low-rank adaptation: a trained difference of low rank beside a frozen weight.

:math:`W' x = W x + s\,B\,(A\,x)` with :math:`s = \mathrm{scale}\cdot\mathrm{alpha}/\mathrm{rank}`; ``B`` starts
at zero, so that attaching changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRA(Mixin, name="lora"):
    r"""LoRA on linear layers and 1, 2 and 3-dimensional convolutions.

    A convolution's ``A`` is a convolution like the host's (kernel, stride, padding, dilation, groups) to ``rank``
    channels, its ``B`` one of size 1. Weights are kept in float32 and cast to the input's dtype.

    Args:
        rank: Of the difference; a number, or numbers by glob over site names, the first that fits.
        alpha: At scale 1 the difference is multiplied by alpha / rank; by default alpha is the rank.
            A number, or numbers by glob.
        on: By default projections called ``to_q``, ``to_k`` and ``to_v``. Plain attention blocks have one for
            all three: ``*.qkv``.
        dropout: On the input of ``A``, in training.
        name, scale: See :class:`Mixin`.

    References:
        Hu et al., arXiv:2106.09685.
    """

    def __init__(
        self,
        rank: int | dict[str, int] = 8,
        alpha: float | dict[str, float] | None = None,
        on: On = "*.to_[qkv]",
        dropout: float = 0.0,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
        if not ranks or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise ValueError(f"LoRA: rank must be a positive whole number, got {rank!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA: dropout must be in [0, 1), got {dropout}.")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def part(self, module: nn.Module, site: str) -> LoRAPart:
        rank = int(_at(site, self.rank, "rank"))
        alpha = rank if self.alpha is None else _at(site, self.alpha, "alpha")
        return LoRAPart(module, rank, alpha, self.dropout, where=f"LoRA: {site!r}")


class LoRAPart(Part):
    """The difference at one layer: ``A`` of shape ``(rank, in, *kernel)``, ``B`` of shape ``(out, rank, *1s)``."""

    def __init__(self, host: nn.Module, rank: int, alpha: float, dropout: float, where: str = "LoRA") -> None:
        super().__init__()
        down, up, self.groups = _shapes(host, rank, where)
        self.unit = alpha / rank
        self.A = nn.Parameter(torch.empty(down, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(up, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if self.dropout.p:
            x = self.dropout(x)
        down, up = self.A.to(x.dtype), self.B.to(x.dtype)
        if isinstance(module, nn.Linear):
            hidden = F.linear(x, down)
            delta = F.linear(hidden * self.amount(hidden), up)
        else:
            # The host's own stride, padding and padding mode.
            hidden = cast(Convolution, module)._conv_forward(x, down, None)
            delta = POINTWISE[up.ndim - 2](hidden * self.amount(hidden), up, groups=self.groups)
        return output + delta.to(output.dtype)

    def extra_repr(self) -> str:
        return f"rank {len(self.A)}, alpha {self.unit * len(self.A):g}"


def _shapes(host: nn.Module, rank: int, where: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    if type(host).__name__ == "NonDynamicallyQuantizableLinear":
        raise ValueError(f"{where} is the output of nn.MultiheadAttention, which never calls it; nothing would happen.")
    if isinstance(host, nn.Linear):
        return (rank, host.in_features), (host.out_features, rank), 1
    if not isinstance(host, Convolution):
        raise ValueError(
            f"{where} is a {type(host).__name__}; LoRA goes on Linear, Conv1d, Conv2d and Conv3d. "
            "Narrow `on`; 'type:Linear' picks all linear layers."
        )
    stock = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(host, c))
    if type(host).forward is not stock.forward:
        raise ValueError(f"{where} is a {type(host).__name__} with a forward of its own, which LoRA cannot follow.")
    if rank % host.groups:
        raise ValueError(f"{where} has {host.groups} groups; its rank must be a multiple of that, got {rank}.")
    ones = (1,) * len(host.kernel_size)
    down = (rank, host.in_channels // host.groups, *host.kernel_size)
    return down, (host.out_channels, rank // host.groups, *ones), host.groups


def _at(site: str, value: float | Mapping[str, float], what: str) -> float:
    if not isinstance(value, Mapping):
        return value
    for glob, number in value.items():
        if fnmatchcase(site, glob):
            return number
    raise ValueError(f"LoRA: no {what} for {site!r}; the globs are {', '.join(value)}. Add '*' for all others.")
