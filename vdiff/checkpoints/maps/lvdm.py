"""VideoCrafter's UNet, whose names are those of :class:`vdiff.networks.LVDMUNet`: DynamiCrafter, diffusers, images."""

from __future__ import annotations

from collections.abc import Sequence

from vdiff.checkpoints.changes import DropOnes
from vdiff.checkpoints.keymap import KeyMap
from vdiff.checkpoints.maps.unet import ENDS, RES, TRANSFORMER

PLACES = ("input_blocks.{i}.{j}", "middle_block.{j}", "output_blocks.{i}.{j}")


def dynamicrafter(fps: str = "fps_embedding") -> KeyMap:
    """VideoCrafter's names to DynamiCrafter's, who spells a word otherwise.

    Args:
        fps: What it calls the embedding of the frames per second; ``framestride_embed`` in the file of 256 x 256.
    """
    words = KeyMap((f"{place}.temopral_conv.*", f"{place}.temporal_conv.*") for place in PLACES)
    return words + KeyMap([("fps_embedding.*", f"{fps}.*"), ("*", "*")])


def unet_3d(num_res_blocks: int = 2, attends: Sequence[bool] = (True, True, True, False)) -> KeyMap:
    """VideoCrafter's names to those of diffusers' ``UNet3DConditionModel`` (ModelScope).

    That has no frames per second, relative positions or pictures: a network with ``fps=False`` and without these.

    Args:
        num_res_blocks: Of every level on the way down.
        attends: For each level, whether it has attention.
    """
    # The first transformer over time has convolutions here, matrices there.
    initial = [(f"init_attn.0.{name}.*", f"transformer_in.{name}.*", DropOnes(1)) for name in ("proj_in", "proj_out")]
    table = ENDS + KeyMap([*initial, ("init_attn.0.*", "transformer_in.*")])
    levels = len(attends)

    def stage(here: str, there: str, block: int, is_attending: bool) -> KeyMap:
        rules = _res(f"{here}.0", there, block)
        if is_attending:
            rules += TRANSFORMER.under(f"{here}.1", f"{there}.attentions.{block}")
            rules += TRANSFORMER.under(f"{here}.2", f"{there}.temp_attentions.{block}")
        return rules

    for level in range(levels):
        first = 1 + level * (num_res_blocks + 1)
        for block in range(num_res_blocks):
            table += stage(f"input_blocks.{first + block}", f"down_blocks.{level}", block, attends[level])
        if level < levels - 1:
            below = f"down_blocks.{level}.downsamplers.0.conv"
            table += KeyMap([(f"input_blocks.{first + num_res_blocks}.0.op.*", f"{below}.*")])
    table += stage("middle_block", "mid_block", 0, True) + _res("middle_block.3", "mid_block", 1)
    for order, level in enumerate(reversed(range(levels))):
        first, there = order * (num_res_blocks + 1), f"up_blocks.{order}"
        for block in range(num_res_blocks + 1):
            table += stage(f"output_blocks.{first + block}", there, block, attends[level])
        if level:
            child = 3 if attends[level] else 1
            table += KeyMap([(f"output_blocks.{first + num_res_blocks}.{child}.*", f"{there}.upsamplers.0.*")])
    return table


def image_unet() -> KeyMap:
    """Names of an image UNet (Stable Diffusion 2.1) to those of the video UNet that is made of it.

    What stands behind an attention makes room for the transformer over time. What the table does not lead to is new;
    the way back is for the weights that came from there.
    """
    moved = ("middle_block", "output_blocks.{i}")
    return KeyMap([*((f"{place}.2.*", f"{place}.3.*") for place in moved), ("*", "*")])


def _res(here: str, there: str, block: int) -> KeyMap:
    """A residual block, and its convolutions over time, which there stand beside it."""
    convolutions = KeyMap([(f"{here}.temopral_conv.*", f"{there}.temp_convs.{block}.*")])
    return convolutions + RES.under(here, f"{there}.resnets.{block}")
