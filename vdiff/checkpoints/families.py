"""Published families of checkpoints: how a file's names tell them, and which table leads to ours.

A whole checkpoint has parts, each at a place of its layout (:mod:`vdiff.checkpoints.places`): a network, a first stage,
towers for text and pictures. Families and layouts are one list, :data:`FAMILIES`; a new one is a new entry, with the
marks that tell it and the table that leads from our names to its.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from vdiff.checkpoints.architecture import (
    Stages,
    Told,
    diffusers_stages,
    encoder_stages,
    holds_sincos,
    is_openais,
    num_levels,
    patch_frames,
    prompt_length,
    stages,
)
from vdiff.checkpoints.changes import Made
from vdiff.checkpoints.keymap import KeyMap, KeyMapError
from vdiff.checkpoints.maps import autoencoder, cogvideox, controlnet, lvdm, towers, unet
from vdiff.checkpoints.places import CRAFTERS, prefix

SAME = KeyMap([("*", "*")])


@dataclass(frozen=True)
class Layout:
    """One way to write the weights of a family.

    Attributes:
        marks: Beginnings of names, as patterns, all of which must be there.
        table: Our names to this layout's, for what the tensors tell. It is asked with tensors of either side.
        also: Other layouts that write this family alike.
        fits: What else must be so, where names alone do not tell.
    """

    name: str
    marks: tuple[str, ...]
    table: Callable[[Told], KeyMap]
    also: tuple[str, ...] = ()
    fits: Callable[[Told], bool] = lambda told: True

    def has_marks(self, names: Collection[str]) -> bool:
        """Whether names may be of this."""
        return all(any(re.match(mark, name) for name in names) for mark in self.marks)

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether names and shapes may be of this."""
        return self.has_marks(tensors) and self.fits(Told(tensors))


@dataclass(frozen=True)
class Family:
    """Weights of one class here, and its layouts; the first is our own.

    Attributes:
        slots: Of :data:`vdiff.checkpoints.places.PLACES`, where such weights lie in a whole checkpoint.
        folder: Of diffusers, where it is not the usual one of the slot.
    """

    name: str
    slots: tuple[str, ...]
    layouts: tuple[Layout, ...]
    folder: str | None = None

    def layout(self, name: str) -> Layout:
        """The one of this name.

        Raises:
            ValueError: this family is not written so.
        """
        for layout in self.layouts:
            if name == layout.name or name in layout.also:
                return layout
        known = ", ".join(n for layout in self.layouts for n in (layout.name, *layout.also))
        raise ValueError(f"{self.name} is not written in the layout {name!r}. Known: {known}.")

    def prefix(self, layout: str, slot: str | None = None, number: int | None = None, order: int = 0) -> str:
        """Before its names in a whole checkpoint, see :func:`vdiff.checkpoints.places.prefix`."""
        if layout == "diffusers" and self.folder:
            return f"{self.folder}/"
        return prefix(layout, slot or self.slots[0], number, order)


def _unet(told: Told) -> KeyMap:
    found = _stages(told)
    attention = unet.TRANSFORMER
    if found.plain_attention:
        why = "Projections of plain attention are cut head by head, and no shape tells the length of a head."
        attention = unet.plain_attention(told.say("head_dim", why))
    return unet.unet(found.num_res_blocks, found.attends, found.resblock_updown, attention=attention)


def _video_unet(told: Told) -> KeyMap:
    found = _stages(told)
    return unet.video_unet(found.num_res_blocks, found.attends)


def _unet_3d(told: Told) -> KeyMap:
    found = _stages(told)
    return lvdm.unet_3d(found.num_res_blocks[0], found.attends)


def _controlnet(told: Told) -> KeyMap:
    found = _stages(told)
    if found.plain_attention:
        raise KeyMapError("diffusers' ControlNet has no attention without a context.")
    return controlnet.controlnet(found.num_res_blocks, found.attends)


def _video_controlnet(told: Told) -> KeyMap:
    found = _stages(told)
    return controlnet.video_controlnet(found.num_res_blocks, found.attends)


def _stages(told: Told) -> Stages:
    if told.has(r"output_blocks\."):
        return stages(told)
    return encoder_stages(told) if told.has(r"input_blocks\.") else diffusers_stages(told)


def _sat(told: Told) -> KeyMap:
    positions = Made(cogvideox.sincos_table) if holds_sincos(told) else None
    return cogvideox.sat_transformer(bool(told.given.get("convolution", 0)), positions)


def _cogvideox(told: Told) -> KeyMap:
    return cogvideox.diffusers_transformer((patch_frames(told), 2, 2))


def _same(told: Told) -> KeyMap:
    return SAME


def _clip_in_original(told: Told) -> KeyMap:
    return towers.clip_text("text_model", prompt_length(told)).under("transformer", "transformer")


def _clip(told: Told) -> KeyMap:
    is_bare = told.has(r"embeddings\.")  # as transformers 5 saves it
    return towers.clip_text("" if is_bare else "text_model").under("transformer", "")


LDM = (r"input_blocks\.0\.0\.weight", r"output_blocks\.0\.", r"out\.2\.")
DIFFUSERS = (r"conv_in\.weight", r"down_blocks\.0\.", r"up_blocks\.0\.", r"mid_block\.")
KL = (r"(encoder\.down|decoder\.up)\.0\.block\.0\.conv1\.weight",)  # SV3D's files have the decoder alone
DIFFUSERS_KL = (r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.weight", r"decoder\.up_blocks\.0\.")
CONTROL = (r"input_hint_block\.0\.weight", r"zero_convs\.0\.0\.", r"middle_block_out\.0\.")
DIFFUSERS_CONTROL = (
    r"controlnet_cond_embedding\.conv_in\.", r"controlnet_down_blocks\.0\.", r"controlnet_mid_block\."
)  # fmt: skip
# VideoCrafter 2 has convolutions over time, VideoCrafter 1 relative positions.
OVER_TIME = r"input_blocks\.\d+\.(0\.temopral_conv|2\.transformer_blocks\.0\.attn1\.relative_position_k)\."
CODEBOOK = r"quantize\.embedding\.weight"
CLIP = r"(text_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight"
OPEN_CLIP = r"transformer\.resblocks\.0\.attn\.in_proj_weight"
VDIFF_SAT = (r"encoder\.down\.0\.block\.0\.conv1\.conv\.weight", r"decoder\.up\.0\.")


def _family(
    name: str,
    slots: tuple[str, ...],
    marks: tuple[str, ...],
    *others: Layout,
    same: tuple[str, ...] = (),
    folder: str | None = None,
) -> Family:
    """One whose names are those of an original, ``same``."""
    originals = (Layout(same[0], marks, _same, same[1:]),) if same else ()
    return Family(name, slots, (Layout("vdiff", marks, _same), *originals, *others), folder)


# The special ones first: a video UNet has all the marks of an image UNet.
FAMILIES = (
    Family(
        "sv4d_unet", ("network",),
        (
            Layout("vdiff", (*LDM, r"input_blocks\.\d+\.\d\.motion_stack\."), _same),
            Layout("sgm", (*LDM, r"input_blocks\.\d+\.\d\.motion_blocks\."), lambda told: unet.sv4d()),
        ),
    ),
    _family(
        "video_unet", ("network",), (*LDM, r"input_blocks\.\d+\.0\.time_stack\."),
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.resnets\.0\.temporal_res_block\."), _video_unet),
        same=("sgm",),
    ),
    _family(
        "lvdm_unet", ("network",), (*LDM, OVER_TIME),
        Layout(
            "dynamicrafter_256", (*LDM, r"framestride_embed\."), lambda told: lvdm.dynamicrafter("framestride_embed")
        ),
        Layout("dynamicrafter", (*LDM, r"input_blocks\.\d+\.0\.temporal_conv\."), lambda told: lvdm.dynamicrafter()),
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.temp_convs\."), _unet_3d),
        same=("lvdm",),
    ),
    _family(
        "unet", ("network",), LDM,
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.resnets\.0\.time_emb_proj\."), _unet),
        same=("sgm", "ldm"),
    ),
    Family(
        "sv4d_controlnet", ("control",),
        (Layout("vdiff", (*CONTROL, r"input_blocks\.\d+\.\d\.motion_stack\."), _same),),
    ),
    _family(
        "video_controlnet", ("control",), (*CONTROL, r"input_blocks\.\d+\.0\.time_stack\."),
        Layout(
            "diffusers", (*DIFFUSERS_CONTROL, r"down_blocks\.0\.resnets\.0\.temporal_res_block\."), _video_controlnet
        ),
        same=("sgm",),
    ),
    _family(
        "controlnet", ("control",), CONTROL,
        Layout("diffusers", DIFFUSERS_CONTROL, _controlnet),
        same=("ldm", "sgm"),
    ),
    Family(
        "cogvideox", ("network",),
        (
            Layout("vdiff", (r"blocks\.0\.modulation\.", r"text_embed\.", r"noise_embed\."), _same),
            Layout("sat", (r"transformer\.layers\.0\.attention\.query_key_value\.", r"mixins\.adaln_layer\."), _sat),
            Layout("diffusers", (r"transformer_blocks\.0\.norm1\.linear\.", r"patch_embed\.text_proj\."), _cogvideox),
        ),
        folder="transformer",
    ),
    _family(
        "autoencoder_kl_cogvideox", ("first_stage",), VDIFF_SAT,
        Layout(
            "diffusers", (r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.conv\.weight", r"decoder\.up_blocks\.0\."),
            lambda told: cogvideox.diffusers_autoencoder(num_levels(told)),
        ),
        same=("sat",),
    ),
    _family(
        "temporal_decoder", ("first_stage",), (r"decoder\.up\.0\.block\.0\.time_stack\.",),
        Layout(
            "diffusers", (r"decoder\.up_blocks\.0\.resnets\.0\.temporal_res_block\.",),
            lambda told: autoencoder.temporal_decoder(num_levels(told)),
        ),
        same=("sgm",),
    ),
    _family(
        "vq", ("first_stage",), (*KL, CODEBOOK),
        Layout("diffusers", (*DIFFUSERS_KL, CODEBOOK), lambda told: autoencoder.vq(num_levels(told))),
        same=("ldm", "sgm"), folder="vqvae",
    ),
    _family(
        "autoencoder_kl", ("first_stage", "condition_stage"), KL,
        Layout("diffusers", DIFFUSERS_KL, lambda told: autoencoder.autoencoder_kl(num_levels(told))),
        same=("sgm", "ldm", *CRAFTERS),
    ),
    Family(
        "clip_text", ("text",),
        (
            Layout("vdiff", (r"transformer\.encoder\.layers\.0\.self_attn\.q_proj\.weight",), _same),
            Layout("sgm", (r"transformer\.text_model\.encoder\.layers\.0\.",), _clip_in_original, ("ldm",)),
            Layout("diffusers", (CLIP,), _clip, fits=is_openais),
        ),
    ),
    _family(
        "open_clip_text", ("text",), (rf"model\.{OPEN_CLIP}",),
        Layout("diffusers", (CLIP,), lambda told: towers.open_clip_text()),
        same=("sgm", "ldm", *CRAFTERS),
    ),
    Family(
        "open_clip_image", ("picture", "tokens_tower"),
        (
            Layout("vdiff", (rf"model\.visual\.{OPEN_CLIP}",), _same),
            Layout(
                "sgm", (rf"model\.visual\.{OPEN_CLIP}",), lambda told: towers.image_in_original(),
                CRAFTERS,
            ),
            Layout("diffusers", (r"vision_model\.encoder\.layers\.0\.",), lambda told: towers.open_clip_image()),
        ),
    ),
    _family(
        "resampler", ("tokens",), (r"latents$", r"layers\.0\.0\.to_kv\.weight", r"norm_out\."),
        same=CRAFTERS,
    ),
    _family(
        "t5_text", ("text",), (r"transformer\.encoder\.block\.0\.layer\.0\.SelfAttention\.q\.",),
        Layout("diffusers", (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.",), lambda told: towers.t5()),
        same=("sat", "sgm"),
    ),
)  # fmt: skip
