"""ControlNet: a trained copy of a UNet's encoder that looks at a hint, and adds to what the decoder is handed.

A copy of the network as far as its middle, whatever it is a network of: pictures, or videos, whose frames are rows, so
that each has a hint of its own and layers over time see all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.checkpoints import WeightFileError, open_weights, read_part, save_weights, translated
from vdiff.hooks import On, Part, bare_copy
from vdiff.mixins.base import Mixin
from vdiff.mixins.conditioned import ConditionedPart
from vdiff.mixins.unets import check_unet, hint_rows
from vdiff.networks.layers import zeroed
from vdiff.networks.transformer import repeated
from vdiff.networks.unet_stages import encode
from vdiff.process import Conditioning

PREFIX = "control_model."  # how the names of its weights begin here and in the authors' files
DECODER = ("output_blocks", "out", "id_predictor")  # what the copy does without
DIFFUSERS_FACTOR = 8  # of hints in diffusers' layout, whatever the weights


class ControlNet(Mixin, name="controlnet"):
    """Spatial control by a hint: edges, depth, a pose.

    The copy begins with the host's weights and ends in convolutions that begin at zero, so that attaching changes
    nothing. What it says is added to the skips and to the middle's output, never to the encoder itself. Several of
    them are several mixins, each under a name and with a condition of its own; what they say adds up.

    The copy is of the host's dtype, unlike a LoRA: on a host in bfloat16 an optimizer would round small steps away. To
    train, attach to a host in float32, and let the trainer's precision or autocast compute in bfloat16.

    Args:
        reads: The condition that holds the hint, ``(B, hint_channels, f H, f W)`` for an ``(H, W)`` of the network,
            in [0, 1] for published weights of images; by default the mixin's name. For a video
            ``(B, hint_channels, F, f H, f W)``, or one hint for all frames.
        hint_channels, hint_factor: Of the hint; the factor f is 1, 2, 4 or 8.
        guess: Weaker where the network is shallow, from a tenth up to all of it; then a prompt is not needed. The
            original gives the unconditional branch none of it: ``cond.null.gated(controlnet=0)``.
        pool: Add the average over the picture, or over each frame, as models for style do.
        on: UNets of pictures or videos.
        name, scale: See :class:`Mixin`.

    References:
        Zhang et al., arXiv:2302.05543; for Stable Video Diffusion, svd-temporal-controlnet by CiaraStrawberry.
    """

    def __init__(
        self,
        reads: str | None = None,
        hint_channels: int = 3,
        hint_factor: int = 8,
        guess: bool = False,
        pool: bool = False,
        on: On = "role:unet",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if hint_factor not in (1, 2, 4, 8):
            raise ValueError(f"ControlNet: hint_factor is 1, 2, 4 or 8, got {hint_factor}.")
        self.reads, self.hint_channels, self.hint_factor = reads, hint_channels, hint_factor
        self.guess, self.pool = guess, pool

    def part(self, module: nn.Module, site: str) -> ControlNetPart:
        check_unet(module, site, "ControlNet")
        return ControlNetPart(module, self.reads, self.hint_channels, self.hint_factor, self.guess, self.pool)

    def read(self, file: str | Path) -> None:
        """Weights as published, alone or beside a whole model's, told by their names: the authors' (``zero_convs.*``,
        below ``control_model.`` or not), or diffusers' and svd-temporal-controlnet's (``controlnet_down_blocks.*``).

        Raises:
            WeightFileError: none of them are in the file.
            KeyMapError: names beside them that neither layout has.
            ValueError: they do not fit the host, or a ``hint_factor`` that their layout has not.
        """
        found = read_part(open_weights(file), "control")
        if found is None:
            raise WeightFileError(
                f"{file}: holds no ControlNet; looked for {PREFIX}input_hint_block.0.weight and, in diffusers' layout, "
                "controlnet_cond_embedding.conv_in.weight."
            )
        layout, weights = found
        self._check_factor(layout, str(file))
        self.load_state_dict({PREFIX + name: value for name, value in weights.items()})

    def write(self, file: str | Path, layout: str = "vdiff") -> None:
        """Its weights in a published layout: ``vdiff`` or ``sgm``, which are the authors' names, or ``diffusers``.

        Raises:
            ValueError: not such a layout, or one that has no place for this network or ``hint_factor``.
        """
        self._check_factor(layout, repr(self.name))
        weights = {name.removeprefix(PREFIX): value for name, value in self.state_dict().items()}
        begin = "" if layout == "diffusers" else PREFIX
        save_weights(file, {begin + name: value for name, value in translated(weights, layout, str(file)).items()})

    def _check_factor(self, layout: str, where: str) -> None:
        if layout == "diffusers" and self.hint_factor != DIFFUSERS_FACTOR:
            raise ValueError(
                f"ControlNet: {where} is in diffusers' layout, where a hint is {DIFFUSERS_FACTOR} times as large as x, "
                f"and hint_factor is {self.hint_factor}."
            )


class ControlNetPart(ConditionedPart):
    """At a UNet: the copied encoder with the hint's own in front and convolutions behind, as ``control_model``."""

    def __init__(
        self, host: Any, reads: str | None, hint_channels: int, hint_factor: int, guess: bool, pool: bool
    ) -> None:
        super().__init__(reads)
        self.hint_channels, self.hint_factor, self.guess, self.pool = hint_channels, hint_factor, guess, pool
        decoder = [module for name in DECODER if (module := getattr(host, name, None)) is not None]
        net = bare_copy(host, {module: nn.Sequential() for module in decoder}).requires_grad_(True)
        widths, dtype = skip_widths(net), next(net.parameters()).dtype
        net.input_hint_block = _hint_encoder(hint_channels, hint_factor, widths[0])
        net.zero_convs = nn.ModuleList(nn.Sequential(zeroed(nn.Conv2d(width, width, 1))) for width in widths)
        net.middle_block_out = nn.Sequential(zeroed(nn.Conv2d(widths[-1], widths[-1], 1)))
        self.control_model: Any = net.to(dtype)

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
        rows = hint_rows(value, x, self.hint_channels, self.hint_factor, f"ControlNet {self.mixin_name!r}")
        h, told = net.begin(x, c_noise, cond)
        hint = net.input_hint_block(rows.to(x.dtype))
        h, skips = encode(net, h + repeated(hint, len(h)), told)
        said = [zero(skip) for zero, skip in zip(net.zero_convs, skips, strict=True)] + [net.middle_block_out(h)]
        return [one.mean((2, 3), keepdim=True) for one in said] if self.pool else said


class AddsToSkip(Part):
    """At a block of a decoder, which is called with the stream and a skip as one: the skip's channels are the last.

    What is added is part of the skip for whatever else changes it, as FreeU does."""

    is_outermost = True

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


def skip_widths(net: Any) -> list[int]:  # noqa: ANN401  # whatever is a UNet
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
