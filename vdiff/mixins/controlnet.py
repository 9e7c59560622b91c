"""ControlNet: a trained copy of a UNet's encoder that looks at a hint, and adds to what the decoder is handed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.hooks import On, Part, bare_copy
from vdiff.mixins.base import Mixin
from vdiff.mixins.conditioned import ConditionedPart
from vdiff.networks import UNet
from vdiff.networks.layers import zeroed
from vdiff.process import Conditioning

PREFIX = "control_model."  # how the names of its weights begin here and in published files


class ControlNet(Mixin, name="controlnet"):
    """Spatial control by a hint: edges, depth, a pose.

    The copy begins with the host's weights and ends in convolutions that begin at zero, so that attaching changes
    nothing. What it says is added to the skips and to the middle's output, never to the encoder itself. Several of
    them are several mixins, each under a name and with a condition of its own; what they say adds up.

    Args:
        reads: The condition that holds the hint, ``(B, hint_channels, f H, f W)`` for an ``(H, W)`` of the network,
            in [0, 1] for published weights; by default the mixin's name.
        hint_channels, hint_factor: Of the hint; the factor f is 1, 2, 4 or 8.
        guess: Weaker where the network is shallow, from a tenth up to all of it; then a prompt is not needed. The
            original gives the unconditional branch none of it: ``cond.null.gated(controlnet=0)``.
        pool: Add the average over the picture, as models for style do.
        on: UNets.
        name, scale: See :class:`Mixin`.

    References:
        Zhang et al., arXiv:2302.05543.
    """

    def __init__(
        self,
        reads: str | None = None,
        hint_channels: int = 3,
        hint_factor: int = 8,
        guess: bool = False,
        pool: bool = False,
        on: On = "type:UNet",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if hint_factor not in (1, 2, 4, 8):
            raise ValueError(f"ControlNet: hint_factor is 1, 2, 4 or 8, got {hint_factor}.")
        self.reads, self.hint_channels, self.hint_factor = reads, hint_channels, hint_factor
        self.guess, self.pool = guess, pool

    def part(self, module: nn.Module, site: str) -> ControlNetPart:
        if not isinstance(module, UNet):
            raise ValueError(f"ControlNet: {site or 'the module itself'} is a {type(module).__name__}, not a UNet.")
        return ControlNetPart(module, self.reads, self.hint_channels, self.hint_factor, self.guess, self.pool)

    def read(self, file: str | Path) -> None:
        """Weights in the published layout, ``control_model.*``, alone or beside a whole model's.

        Raises:
            WeightFileError: none of them are in the file.
            ValueError: they do not fit the host.
        """
        weights = read_weights(file)
        if not any(name.startswith(PREFIX) for name in weights):
            weights = {PREFIX + name: value for name, value in weights.items()}
        weights = {name: value for name, value in weights.items() if name.startswith(PREFIX)}
        if f"{PREFIX}input_hint_block.0.weight" not in weights:
            raise WeightFileError(f"{file}: holds no ControlNet; looked for {PREFIX}input_hint_block.0.weight.")
        self.load_state_dict(weights)

    def write(self, file: str | Path) -> None:
        """Its weights in the published layout."""
        save_weights(file, self.state_dict())


class ControlNetPart(ConditionedPart):
    """At a UNet: the copied encoder with the hint's own in front and convolutions behind, as ``control_model``."""

    def __init__(
        self, host: UNet, reads: str | None, hint_channels: int, hint_factor: int, guess: bool, pool: bool
    ) -> None:
        super().__init__(reads)
        self.hint_channels, self.hint_factor, self.guess, self.pool = hint_channels, hint_factor, guess, pool
        net = bare_copy(host, {host.output_blocks: nn.ModuleList(), host.out: nn.Identity()}).requires_grad_(True)
        widths = skip_widths(net)
        net.input_hint_block = _hint_encoder(hint_channels, hint_factor, widths[0])
        net.zero_convs = nn.ModuleList(nn.Sequential(zeroed(nn.Conv2d(width, width, 1))) for width in widths)
        net.middle_block_out = nn.Sequential(zeroed(nn.Conv2d(widths[-1], widths[-1], 1)))
        self.control_model: UNet = net

    def hands_at(self, module: nn.Module) -> dict[str, Part]:
        skips = len(self.control_model.input_blocks)
        # The last skip goes into the first block of the decoder.
        hands: dict[str, Part] = {f"output_blocks.{skips - 1 - i}": AddsToSkip() for i in range(skips)}
        hands["middle_block"] = AddsToOutput()
        if self.guess:
            for i, hand in enumerate(hands.values()):
                hand.unit = 10 ** (i / skips - 1)
        return hands

    def said(self, value: Tensor, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Sequence[Tensor]:
        net = self.control_model
        size = tuple(n * self.hint_factor for n in x.shape[2:])
        if value.shape[1:] != (self.hint_channels, *size):
            raise ValueError(
                f"ControlNet {self.mixin_name!r}: a hint for {tuple(x.shape[2:])} is (B, {self.hint_channels}, "
                f"{size[0]}, {size[1]}), got {tuple(value.shape)}."
            )
        h = net._with_concat(x, cond)
        emb = net._embedding(c_noise, cond, x.dtype)
        context = None if net.context_dim is None else net.needed(cond, "cross_attention")
        mask = cond.masks.get("cross_attention")
        hint = cast(nn.Module, net.input_hint_block)(value.to(x.dtype))
        said = []
        for i, (block, zero) in enumerate(zip(net.input_blocks, cast(nn.ModuleList, net.zero_convs), strict=True)):
            h = block(h, emb, context, mask)
            h = h + hint if i == 0 else h
            said.append(zero(h))
        said.append(cast(nn.Module, net.middle_block_out)(net.middle_block(h, emb, context, mask)))
        return [one.mean((2, 3), keepdim=True) for one in said] if self.pool else said


class AddsToSkip(Part):
    """At a block of a decoder, which is called with the stream and a skip as one: the skip's channels are the last."""

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.given is None:
            return args, kwargs
        h, added = args[0], self.given * self.amount(self.given)
        width = h.shape[1] - added.shape[1]
        return (torch.cat([h[:, :width], h[:, width:] + added.to(h.dtype)], dim=1), *args[1:]), kwargs


class AddsToOutput(Part):
    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.given is None:
            return output
        return output + (self.given * self.amount(self.given)).to(output.dtype)


def _hint_encoder(channels: int, factor: int, width: int) -> nn.Sequential:
    """Convolutions of size 3 to 16, 32, 96 and 256 channels, each step to more of them halving the picture or not."""
    halvings = int(math.log2(factor))
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1), nn.SiLU()]
    for i, (narrow, wide) in enumerate(((16, 32), (32, 96), (96, 256))):
        layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(narrow, wide, 3, padding=1, stride=2 if i < halvings else 1), nn.SiLU()]
    return nn.Sequential(*layers, zeroed(nn.Conv2d(256, width, 3, padding=1)))


def skip_widths(net: UNet) -> list[int]:
    """Channels behind every block of the encoder."""
    widths: list[int] = []
    for block in net.input_blocks:
        convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        res = [m for m in block.children() if hasattr(m, "out_layers")]
        if res:
            widths.append(int(res[-1].out_layers[-1].out_channels))  # type: ignore[index, union-attr]
        else:
            widths.append(convolutions[-1].out_channels if convolutions else widths[-1])
    return widths
