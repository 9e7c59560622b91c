"""T2I-Adapter: a small network that turns a hint into features, one map per resolution of a UNet's encoder."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vdiff.checkpoints import read_weights, save_weights
from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin
from vdiff.mixins.conditioned import ConditionedPart
from vdiff.mixins.controlnet import AddsToOutput
from vdiff.mixins.unets import check_unet, hint_rows, resamples
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import repeated
from vdiff.process import Conditioning


class T2IAdapter(Mixin, name="t2i_adapter"):
    """Spatial control by a hint that is looked at once, whatever the noise: cheaper than a ControlNet.

    The features are added behind the last residual block of each resolution of the encoder, to what goes on and to
    the skip alike. As published, a new one begins with torch's own initialisation and so changes the output at once.
    In a UNet of videos every frame has the features of its own hint; they know nothing of each other.

    Args:
        reads: The condition that holds the hint, ``(B, hint_channels, f H, f W)`` for an ``(H, W)`` of the network;
            by default the mixin's name. For a video ``(B, hint_channels, F, f H, f W)``, or one hint for all frames.
        hint_channels, hint_factor: Of the hint. The published ones have 3 (or 1, drawings) and 8.
        num_blocks: Residual blocks per resolution.
        on: UNets of pictures or videos.
        name, scale: See :class:`Mixin`.

    References:
        Mou et al., arXiv:2302.08453.
    """

    def __init__(
        self,
        reads: str | None = None,
        hint_channels: int = 3,
        hint_factor: int = 8,
        num_blocks: int = 2,
        on: On = "role:unet",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if min(hint_factor, num_blocks, hint_channels) < 1:
            raise ValueError("T2IAdapter: hint_channels, hint_factor and num_blocks are at least 1.")
        self.reads, self.hint_channels, self.hint_factor = reads, hint_channels, hint_factor
        self.num_blocks = num_blocks

    def part(self, module: nn.Module, site: str) -> T2IAdapterPart:
        check_unet(module, site, "T2IAdapter")
        return T2IAdapterPart(module, self.reads, self.hint_channels, self.hint_factor, self.num_blocks)

    def read(self, file: str | Path) -> None:
        """Weights in the authors' layout (``body.0.block1 ...``) or that of diffusers (``adapter.body.0.resnets ...``).

        Raises:
            ValueError: they do not fit the host.
        """
        weights = {name.removeprefix("adapter."): value for name, value in read_weights(file).items()}
        if any(".resnets." in name for name in weights):
            weights = {_from_diffusers(name, self.num_blocks): value for name, value in weights.items()}
        self.load_state_dict(weights)

    def write(self, file: str | Path) -> None:
        """Its weights in the authors' layout."""
        save_weights(file, self.state_dict())


class T2IAdapterPart(ConditionedPart):
    """At a UNet: pixels of the hint as channels, a convolution, then residual blocks at each resolution."""

    def __init__(self, host: Any, reads: str | None, hint_channels: int, hint_factor: int, num_blocks: int) -> None:
        super().__init__(reads)
        self.hint_channels, self.hint_factor, self.num_blocks = hint_channels, hint_factor, num_blocks
        self.ends = _ends(host)
        widths = [_width(host.input_blocks[end]) for end in self.ends]
        self.unshuffle = nn.PixelUnshuffle(hint_factor)
        self.conv_in = nn.Conv2d(hint_channels * hint_factor**2, widths[0], 3, padding=1)
        self.body = nn.ModuleList()
        for level, width in enumerate(widths):
            for i in range(num_blocks):
                before = widths[max(level - 1, 0)] if i == 0 else width
                self.body.append(HintBlock(before, width, halves=i == 0 and level > 0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def hands_at(self, module: nn.Module) -> dict[str, Part]:
        return {f"input_blocks.{end}": AddsToOutput() for end in self.ends}

    def said(self, value: Tensor, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Sequence[Tensor]:
        rows = hint_rows(value, x, self.hint_channels, self.hint_factor, f"T2IAdapter {self.mixin_name!r}")
        h = self.conv_in(self.unshuffle(rows.to(self.conv_in.weight.dtype)))
        said = []
        for i, block in enumerate(self.body):
            h = block(h)
            if i % self.num_blocks == self.num_blocks - 1:
                said.append(repeated(h, len(x) * math.prod(x.shape[2:-2])))
        return said


class HintBlock(nn.Module):
    """A residual block of two convolutions; names of weights are the authors'."""

    def __init__(self, channels: int, out_channels: int, halves: bool) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(2, ceil_mode=True) if halves else None
        self.in_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None
        self.block1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = nn.ReLU()
        self.block2 = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.down is None else self.down(x)
        x = x if self.in_conv is None else self.in_conv(x)
        return self.block2(self.act(self.block1(x))) + x


def _from_diffusers(name: str, num_blocks: int) -> str:
    found = re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)|in_conv)\.(.*)", name)
    if found is None:
        return name
    place = int(found[1]) * num_blocks + int(found[2] or 0)
    return f"body.{place}.{found[3]}" if found[2] else f"body.{place}.in_conv.{found[3]}"


def _ends(net: Any) -> list[int]:
    """The last block of the encoder at each resolution."""
    halves = [resamples(block) for block in net.input_blocks]
    return [i for i in range(len(halves)) if i + 1 == len(halves) or halves[i + 1]]


def _width(block: nn.Module) -> int:
    return [int(m.out_layers[-1].out_channels) for m in block.modules() if isinstance(m, ResBlock)][-1]  # type: ignore[union-attr, arg-type]
