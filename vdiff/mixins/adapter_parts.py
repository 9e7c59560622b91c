"""What an adapter puts into a block: one part with the weights, and helpers that read and write inside the block."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import Part

if TYPE_CHECKING:
    from vdiff.mixins.adapter import Adapter

# In the order in which a block comes by; what it writes lies behind what it reads.
READS = ("attn1i", "attn1o", "attn2i", "attn2o", "ffni", "ffnm", "ffno", "transo")
STREAM = {"attn1i": 0, "attn2i": 2, "ffni": 4, "transo": 7}  # writable, and from which place in READS on it is seen
DIRECT = {"attn1o-attn2i": "attn1", "attn2o-ffni": "attn2", "ffno-transo": "ff"}  # added to what a layer says
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity,
}  # fmt: skip


class AdapterPart(Part):
    """The adapter of one block: it holds the weights, and its helpers inside the block do the reading and writing."""

    down: nn.Module
    up: nn.Module

    def __init__(self, mixin: Adapter) -> None:
        super().__init__()
        self.reads, self.writes = mixin.reads, mixin.writes
        self.match, self.init = mixin.match, mixin.init
        self.activation = ACTIVATIONS[mixin.activation]()
        self.factor = nn.Parameter(torch.ones(())) if mixin.learn_scale else None
        self.wire = Wire(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in (*self.down.modules(), self.up):
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
                layer.reset_parameters()
        if self.init == "zero":
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)
        if self.factor is not None:
            nn.init.ones_(self.factor)

    def delta(self, h: Tensor) -> Tensor:
        """What is added, in the shape of ``h`` but for its width."""
        dtype = next(self.up.parameters()).dtype
        delta = self.up(self.activation(self.down(h.to(dtype))))
        if self.factor is not None:
            delta = delta * self.factor
        return (delta * self.amount(delta)).to(h.dtype)

    def added(self, value: Tensor, delta: Tensor) -> Tensor:
        if delta.shape[1:] != value.shape[1:] and not (delta.ndim == 3 and delta.shape[1] == value.shape[1]):
            delta = self._matched(delta, value)
        return value + delta

    def _matched(self, delta: Tensor, value: Tensor) -> Tensor:
        if self.match == "refuse":
            raise ValueError(
                f"Adapter {self.mixin_name!r}: what it reads gives {tuple(delta.shape)}, where it writes there is "
                f"{tuple(value.shape)}. Set match='interpolate', or narrow `on`."
            )
        if delta.ndim == 3:
            return F.interpolate(delta.transpose(1, 2), value.shape[1], mode="linear").transpose(1, 2)
        return F.interpolate(delta, value.shape[2:], mode="nearest")


class TokenAdapterPart(AdapterPart):
    """Two linear layers, at a transformer block."""

    def __init__(self, mixin: Adapter, block: nn.Module, where: str) -> None:
        super().__init__(mixin)
        inner, place = dict(block.named_children()), f"{self.reads}-{self.writes}"
        needed = {"attn1", "ff"} | ({"attn2"} if "attn2" in place else set())
        if self.writes == "attn2i" and self.reads in ("attn1i", "attn1o"):
            needed -= {"attn2"}  # without cross-attention, the stream in front of it is there all the same
        missing = sorted(name for name in needed if name not in inner)
        if missing or not _norms(inner):
            lacking = ", ".join(missing) or "norm1, norm2 and so on"
            there = ", ".join(name for name in ("attn1", "attn2", "ff") if name in inner) or "none of attn1, attn2, ff"
            raise ValueError(f"{where} has no {lacking}, and {place} asks for it. It has {there}.")
        is_across = place not in DIRECT and not {self.reads, self.writes} <= {"attn1i", "transo", "attn2c"}
        if getattr(block, "role", None) == "temporal_transformer_block" and is_across:
            raise ValueError(
                f"{where} has frames as rows outside and pixels inside, and {place} lies on both sides. There are "
                f"sequential-attn1, sequential-attn2, sequential-ffn, sequential-whole and parallel-whole."
            )
        width = inner["attn1"].to_q.in_features  # type: ignore[union-attr]
        read = width
        if self.reads == "attn2c":
            width = read = inner["attn2"].to_k.in_features  # type: ignore[union-attr]
        if self.reads == "ffnm":
            read = inner["ff"].get_submodule(_last_linear(inner["ff"])).in_features  # type: ignore[union-attr]
        self.down, self.up = nn.Linear(int(read), mixin.width), nn.Linear(mixin.width, int(width))  # type: ignore[arg-type]
        self.reset_parameters()

    def helpers(self, module: nn.Module) -> dict[str, Part]:
        inner = dict(module.named_children())
        place = f"{self.reads}-{self.writes}"
        if place in DIRECT:
            return {DIRECT[place]: Adds(self.wire)}
        if place == "attn2c-attn2c":
            return {"attn2": AdaptsContext(self.wire)}
        helpers: dict[str, Part] = {}
        for stream, norm in _norms(inner).items():
            is_read = self.reads == stream
            is_written = STREAM[self.writes] <= STREAM[stream] and self.writes != "attn1i"
            if is_read or is_written:
                helpers[norm] = AtStream(self.wire, is_read, is_written)
        if self.reads in ("attn1o", "attn2o", "ffno"):
            helpers[{"attn1o": "attn1", "attn2o": "attn2", "ffno": "ff"}[self.reads]] = Reads(self.wire)
        if self.reads == "ffnm":
            helpers[f"ff.{_last_linear(inner['ff'])}"] = AtStream(self.wire, True, False)
        return helpers

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.reads != "attn1i":
            return args, kwargs
        x = args[0]
        delta = self.delta(x)
        if self.writes == "attn1i":
            return (self.added(x, delta), *args[1:]), kwargs
        self.wire.delta = delta
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.reads == "transo":
            return self.added(output, self.delta(output))
        delta, self.wire.delta = self.wire.delta, None
        return output if delta is None else self.added(output, delta)


class ResAdapterPart(AdapterPart):
    """Normalisation, SiLU and two convolutions of size 3, at a residual block."""

    def __init__(self, mixin: Adapter, block: nn.Module, where: str) -> None:
        super().__init__(mixin)
        first, last = (
            _convolution(block, "in_layers", "conv1", where),
            _convolution(block, "out_layers", "conv2", where),
        )
        channels, out_channels = block.get_submodule(first).in_channels, block.get_submodule(last).out_channels  # type: ignore[union-attr]
        self.first = first
        read = int(channels if self.reads == "resi" else out_channels)  # type: ignore[arg-type]
        written = int(channels if self.writes == "resi" else out_channels)  # type: ignore[arg-type]
        self.down = nn.Sequential(
            nn.GroupNorm(math.gcd(32, read), read), nn.SiLU(), nn.Conv2d(read, mixin.width, 3, padding=1)
        )
        self.up = nn.Conv2d(mixin.width, written, 3, padding=1)
        self.reset_parameters()

    def helpers(self, module: nn.Module) -> dict[str, Part]:
        return {self.first: Reads(self.wire)} if self.reads == "resm" else {}

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.writes != "resi":
            return args, kwargs
        return (self.added(args[0], self.delta(args[0])), *args[1:]), kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.writes == "resi":
            return output
        if self.reads == "resm":
            delta, self.wire.delta = self.wire.delta, None
            return output if delta is None else self.added(output, delta)
        return self.added(output, self.delta(args[0] if self.reads == "resi" else output))


class Wire:
    """Between the parts of one adapter: whose weights they use, and what was read and is yet to be written."""

    def __init__(self, part: AdapterPart) -> None:
        self.part = part
        self.delta: Tensor | None = None


class Helper(Part):
    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire


class Adds(Helper):
    """Reads what a layer says, and adds to it."""

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return self.wire.part.added(output, self.wire.part.delta(output))


class Reads(Helper):
    """Reads what a layer says."""

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        self.wire.delta = self.wire.part.delta(output)
        return output


class AtStream(Helper):
    """In front of a normalisation, where the residual stream can be read; and what was added to the stream before is
    to be seen."""

    def __init__(self, wire: Wire, is_read: bool, is_written: bool) -> None:
        super().__init__(wire)
        self.is_read, self.is_written = is_read, is_written

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.is_read:
            self.wire.delta = self.wire.part.delta(args[0])
        if self.is_written and self.wire.delta is not None:
            return (self.wire.part.added(args[0], self.wire.delta), *args[1:]), kwargs
        return args, kwargs


class AdaptsContext(Helper):
    """Reads the context of cross-attention, and adds to it."""

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = next((n for n in ("context", "encoder_hidden_states") if n in kwargs), None)
        x, *others = args
        context = kwargs[name] if name else others[0] if others else None
        if context is None:
            raise ValueError(f"Adapter: a {type(module).__name__} was called without a context, which attn2c reads.")
        context = self.wire.part.added(context, self.wire.part.delta(context))
        return (args, {**kwargs, name: context}) if name else ((x, context, *others[1:]), kwargs)


def _norms(inner: dict[str, nn.Module]) -> dict[str, str]:
    """The normalisations in front of cross-attention, if there is one, and feed-forward; by the stream they see."""
    numbered = sorted(name for name in inner if re.fullmatch(r"norm\d", name))
    if not numbered:
        return {}
    return ({"attn2i": numbered[1]} if "attn2" in inner else {}) | {"ffni": numbered[-1]}


def _last_linear(module: nn.Module) -> str:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]


def _convolution(block: nn.Module, group: str, own: str, where: str) -> str:
    """The name of a residual block's convolution: the last of a group of layers, or one of its own."""
    if isinstance(getattr(block, own, None), nn.Conv2d):
        return own
    found = [
        f"{group}.{n}" for n, m in getattr(block, group, nn.Identity()).named_modules() if isinstance(m, nn.Conv2d)
    ]
    if not found:
        raise ValueError(f"{where} has neither {group} with a convolution nor {own}; adapters go on residual blocks.")
    return found[-1]
