"""What names and shapes tell of an architecture: as much as a table of names wants to know, and not more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# CogVideoX has 16 channels of latents, so rows of its last layer tell the frames of a patch of (frames, 2, 2).
FRAMES_OF_ROWS = {64: 1, 128: 2}
OPENAIS_WIDTHS = (512, 768)  # of CLIP's text towers by OpenAI; those that open_clip trained for diffusion are wider
WIDTH_OF_2B = 1920  # the one with sines and cosines, which its file holds as a table


class UntoldError(ValueError):
    """A table wants to know what neither names nor shapes tell."""


@dataclass(frozen=True)
class Told:
    """The tensors of one part, for what can be read off them.

    Attributes:
        tensors: By their names within the part, on the meta device.
        given: What a caller knows besides: ``head_dim``, ``patch_frames``, ``convolution``.
    """

    tensors: Mapping[str, Tensor]
    given: Mapping[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group finds at the beginning of a name, or 0."""
        return 1 + max((int(found[1]) for name in self.tensors if (found := re.match(pattern, name))), default=-1)

    def has(self, pattern: str) -> bool:
        """Whether a name begins so."""
        return any(re.match(pattern, name) for name in self.tensors)

    def say(self, what: str, why: str) -> int:
        """What was given, or an error that says why it is needed."""
        if what not in self.given:
            raise UntoldError(f"{why} Say it: --given {what}=NUMBER.")
        return self.given[what]


@dataclass(frozen=True)
class Stages:
    """Of a UNet: residual blocks of each level on the way down, whether it has attention, and what resamples."""

    num_res_blocks: tuple[int, ...]
    attends: tuple[bool, ...]
    resblock_updown: bool
    plain_attention: bool


def stages(told: Told) -> Stages:
    """Of latent diffusion's names. A level ends, on the way up, with a row that has an upsampling."""
    numbers, attends, rows = [], [], 0
    last = told.count(r"output_blocks\.(\d+)\.") - 1
    for row in range(last + 1):
        here = rf"output_blocks\.{row}\."
        rows += 1
        if row == last or told.has(here + r"[1-9]\.(conv|in_layers)\."):
            numbers.append(rows - 1)
            attends.append(told.has(here + r"1\.(norm|qkv|proj_in)\."))
            rows = 0
    updown = told.has(r"output_blocks\.\d+\.[1-9]\.in_layers\.")
    return Stages(tuple(numbers[::-1]), tuple(attends[::-1]), updown, told.has(r"middle_block\.1\.qkv\."))


def encoder_stages(told: Told) -> Stages:
    """Of latent diffusion's names without a way up. A level ends, on the way down, with a convolution alone.

    Raises:
        UntoldError: what ends one is no such convolution.
    """
    levels: list[list[int]] = [[]]
    for row in range(1, told.count(r"input_blocks\.(\d+)\.")):
        if told.has(rf"input_blocks\.{row}\.0\.op\."):
            levels.append([])
        else:
            levels[-1].append(row)
    for rows in levels:
        biases = [told.tensors.get(f"input_blocks.{row}.0.out_layers.3.bias") for row in rows]
        if len({None if bias is None else len(bias) for bias in biases}) != 1 or biases[0] is None:
            raise UntoldError(f"Nothing tells where a level ends among input_blocks {rows}: no convolution resamples.")
    attends = tuple(any(told.has(rf"input_blocks\.{row}\.1\.") for row in rows) for rows in levels)
    return Stages(tuple(map(len, levels)), attends, False, told.has(r"middle_block\.1\.qkv\."))


def diffusers_stages(told: Told) -> Stages:
    """Of diffusers' names, with a way up or without."""
    downs = range(told.count(r"down_blocks\.(\d+)\."))
    numbers = tuple(told.count(rf"down_blocks\.{down}\.resnets\.(\d+)\.") for down in downs)
    attends = tuple(told.has(rf"down_blocks\.{down}\.attentions\.") for down in downs)
    updown = told.has(r"down_blocks\.\d+\.downsamplers\.0\.conv1\.")
    return Stages(numbers, attends, updown, told.has(r"mid_block\.attentions\.0\.group_norm\."))


def num_levels(told: Told) -> int:
    """Of an autoencoder, whose encoder or decoder may be missing."""
    return told.count(r"(?:encoder|decoder)\.(?:down|up)(?:_blocks)?\.(\d+)\.")


def patch_frames(told: Told) -> int:
    """Of CogVideoX."""
    for name in ("patch_embed.proj.weight", "mixins.patch_embed.proj.weight"):
        if name in told.tensors and told.tensors[name].ndim == 4:
            return 1
    if "patch_frames" in told.given:
        return told.given["patch_frames"]
    if "transformer_blocks.0.norm1.linear.weight" in told.tensors:  # diffusers has a matrix only for several
        return 2
    for name in ("out.proj.weight", "mixins.final_layer.linear.weight"):
        if name in told.tensors and told.tensors[name].shape[0] in FRAMES_OF_ROWS:
            return FRAMES_OF_ROWS[told.tensors[name].shape[0]]
    return told.say("patch_frames", "Nothing tells how many frames CogVideoX takes into a patch, 1 or 2.")


def holds_sincos(told: Told) -> bool:
    """Whether SAT's file holds a table of sines and cosines where others have learned positions, or none.

    Such a network sees no picture: as many channels go in as come out.
    """
    if "mixins.pos_embed.pos_embedding" in told.tensors:
        into, out = (told.tensors[f"mixins.{name}.weight"] for name in ("patch_embed.proj", "final_layer.linear"))
        return into[0].numel() == out.shape[0]
    embed = told.tensors.get("patch_embed.weight")
    return embed is not None and "positions" not in told.tensors and embed.shape[0] == WIDTH_OF_2B


def prompt_length(told: Told) -> int:
    """Tokens of a prompt, by the positions that CLIP's text tower knows."""
    (table,) = (v for name, v in told.tensors.items() if name.endswith("embeddings.position_embedding.weight"))
    return len(table)


def is_openais(told: Told) -> bool:
    """Whether a text tower in transformers' layout is OpenAI's, which is built from transformers here as well.

    Names are the same of open_clip's.
    """
    (table,) = (v for name, v in told.tensors.items() if name.endswith("embeddings.token_embedding.weight"))
    return table.shape[1] in OPENAIS_WIDTHS and "text_projection.weight" not in told.tensors
