"""The UNets of latent diffusion, Stable Diffusion and Stable Video Diffusion: names of theirs, and diffusers.

Latent diffusion numbers the blocks in a row, diffusers by level; inside a block the table is the same at every place.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdiff.checkpoints.changes import DropOnes, InTurn, Split
from vdiff.checkpoints.diffusers_names import OUTSIDE, RES_BLOCK
from vdiff.checkpoints.keymap import KeyMap

RES = KeyMap((f"{here}.*", f"{there}.*") for here, there in RES_BLOCK.items())
TRANSFORMER = KeyMap([("*", "*")])
_OUTSIDE = [(f"{here}.*", f"{there}.*") for here, there in OUTSIDE.items()]
INTO = KeyMap([*(rule for rule in _OUTSIDE if not rule[0].startswith("out.")), ("label_emb.*", "class_embedding.*")])
ENDS = INTO + KeyMap(rule for rule in _OUTSIDE if rule[0].startswith("out."))

VIDEO_RES = (
    RES.under("time_stack", "temporal_res_block")
    + KeyMap([("time_mixer.*", "time_mixer.*")])
    + RES.under("", "spatial_res_block")
)
VIDEO_TRANSFORMER = KeyMap(
    [
        ("time_stack.*", "temporal_transformer_blocks.*"),
        ("time_pos_embed.0.*", "time_pos_embed.linear_1.*"),
        ("time_pos_embed.2.*", "time_pos_embed.linear_2.*"),
        ("*", "*"),
    ]
)


def plain_attention(head_dim: int) -> KeyMap:
    """Attention without a context: q, k and v in one, head by head, as a convolution; diffusers has three matrices."""
    cut = InTurn((DropOnes(1), Split(3, length=head_dim)))
    return KeyMap(
        [
            ("norm.*", "group_norm.*"),
            ("qkv.weight", ("to_q.weight", "to_k.weight", "to_v.weight"), cut),
            ("qkv.bias", ("to_q.bias", "to_k.bias", "to_v.bias"), cut),
            ("proj_out.*", "to_out.0.*", DropOnes(1)),
        ]
    )


def unet(
    num_res_blocks: int | Sequence[int] = 2,
    attends: Sequence[bool] = (True, True, True, False),
    resblock_updown: bool = False,
    res: KeyMap = RES,
    attention: KeyMap = TRANSFORMER,
) -> KeyMap:
    """Latent diffusion's names, which are those of :class:`vdiff.networks.UNet`, to diffusers'.

    Args:
        num_res_blocks: Of each level on the way down.
        attends: For each level, whether it has attention: ``(False, True, True)`` in SDXL, whose refiner has
            ``(False, True, True, False)``.
        resblock_updown: Whether residual blocks resample.
        res, attention: The tables inside a block.
    """
    levels, stage = len(attends), 0
    numbers = _by_level(num_res_blocks, levels)
    up = res if resblock_updown else KeyMap([("*", "*")])
    table = ENDS + encoder(num_res_blocks, attends, resblock_updown, res, attention)
    for level in reversed(range(levels)):
        there = f"up_blocks.{levels - 1 - level}"
        for block in range(numbers[level] + 1):
            here = f"output_blocks.{stage}"
            table += res.under(f"{here}.0", f"{there}.resnets.{block}")
            if attends[level]:
                table += attention.under(f"{here}.1", f"{there}.attentions.{block}")
            if level and block == numbers[level]:
                table += up.under(f"{here}.{1 + attends[level]}", f"{there}.upsamplers.0")
            stage += 1
    return table


def encoder(
    num_res_blocks: int | Sequence[int],
    attends: Sequence[bool],
    resblock_updown: bool = False,
    res: KeyMap = RES,
    attention: KeyMap = TRANSFORMER,
) -> KeyMap:
    """Of the same table what comes before the way up."""
    levels, stage = len(attends), 1
    numbers = _by_level(num_res_blocks, levels)
    down = res if resblock_updown else KeyMap([("op.*", "conv.*")])
    table = INTO
    for level in range(levels):
        for block in range(numbers[level]):
            here, there = f"input_blocks.{stage}", f"down_blocks.{level}"
            table += res.under(f"{here}.0", f"{there}.resnets.{block}")
            if attends[level]:
                table += attention.under(f"{here}.1", f"{there}.attentions.{block}")
            stage += 1
        if level < levels - 1:
            table += down.under(f"input_blocks.{stage}.0", f"down_blocks.{level}.downsamplers.0")
            stage += 1
    for child, (part, there) in enumerate([(res, "resnets.0"), (attention, "attentions.0"), (res, "resnets.1")]):
        table += part.under(f"middle_block.{child}", f"mid_block.{there}")
    return table


def video_unet(num_res_blocks: int | Sequence[int] = 2, attends: Sequence[bool] = (True, True, True, False)) -> KeyMap:
    """Generative-models' names, which are those of :class:`vdiff.networks.VideoUNet`, to diffusers'."""
    return unet(num_res_blocks, attends, res=VIDEO_RES, attention=VIDEO_TRANSFORMER)


def sv4d() -> KeyMap:
    """Names of :class:`vdiff.networks.VideoUNet` with several cameras to those of generative-models' SV4D."""
    names = {
        "time_stack": "time_mix_blocks",
        "time_pos_embed": "time_mix_time_embed",
        "motion_stack": "motion_blocks",
        "motion_pos_embed": "time_mix_motion_embed",
        "motion_mixer": "time_mixer_motion",
    }
    places = ("input_blocks.{i}.{j}", "middle_block.{j}", "output_blocks.{i}.{j}")
    rules = [(f"{place}.{ours}.*", f"{place}.{theirs}.*") for place in places for ours, theirs in names.items()]
    return KeyMap([*rules, ("*", "*")])


def _by_level(num_res_blocks: int | Sequence[int], levels: int) -> list[int]:
    return [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
