"""Published families of checkpoints: how a file's names tell them, and which table leads to ours.

A whole checkpoint has parts, each below a prefix of its layout: a network, a first stage, towers for text and pictures.
Families and layouts are one list, :data:`FAMILIES`; a new one is a new entry, with the marks that tell it and the table
that leads from our names to its.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vdiff.checkpoints.architecture import (
    Stages,
    Told,
    diffusers_stages,
    holds_sincos,
    num_levels,
    patch_frames,
    stages,
)
from vdiff.checkpoints.changes import Made
from vdiff.checkpoints.keymap import KeyMap
from vdiff.checkpoints.maps import autoencoder, cogvideox, lvdm, unet

SAME = KeyMap([("*", "*")])
ORIGINALS = ("sgm", "lvdm", "dynamicrafter", "sat")

# Where a layout keeps a part of a whole checkpoint; the slash is a folder's.
PREFIXES = {
    "network": {
        "vdiff": "denoiser.network.",
        "diffusers": "unet/",
        **dict.fromkeys(ORIGINALS, "model.diffusion_model."),
    },
    "first_stage": {
        "vdiff": "first_stage.",
        "diffusers": "vae/",
        **dict.fromkeys(ORIGINALS, "first_stage_model."),
    },
}


@dataclass(frozen=True)
class Layout:
    """One way to write the weights of a family.

    Attributes:
        marks: Beginnings of names, as patterns, all of which must be there.
        table: Our names to this layout's, for what the tensors tell. It is asked with tensors of either side.
        also: Other layouts that write this family alike.
    """

    name: str
    marks: tuple[str, ...]
    table: Callable[[Told], KeyMap]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Weights of one class here, and its layouts; the first is our own."""

    name: str
    slot: str
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

    def prefix(self, layout: str) -> str:
        """Before its names in a whole checkpoint."""
        if layout == "diffusers" and self.folder:
            return f"{self.folder}/"
        return PREFIXES[self.slot][layout]


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


def _stages(told: Told) -> Stages:
    return stages(told) if told.has(r"output_blocks\.") else diffusers_stages(told)


def _sat(told: Told) -> KeyMap:
    positions = Made(cogvideox.sincos_table) if holds_sincos(told) else None
    return cogvideox.sat_transformer(bool(told.given.get("convolution", 0)), positions)


def _cogvideox(told: Told) -> KeyMap:
    return cogvideox.diffusers_transformer((patch_frames(told), 2, 2))


def _same(told: Told) -> KeyMap:
    return SAME


LDM = (r"input_blocks\.0\.0\.weight", r"output_blocks\.0\.", r"out\.2\.")
DIFFUSERS = (r"conv_in\.weight", r"down_blocks\.0\.", r"up_blocks\.0\.", r"mid_block\.")
VDIFF_SAT = (r"encoder\.down\.0\.block\.0\.conv1\.conv\.weight", r"decoder\.up\.0\.")


def _family(name: str, slot: str, marks: tuple[str, ...], *others: Layout, same: tuple[str, ...] = ()) -> Family:
    """One whose names are those of an original, ``same``."""
    originals = (Layout(same[0], marks, _same, same[1:]),) if same else ()
    return Family(name, slot, (Layout("vdiff", marks, _same), *originals, *others))


# The special ones first: a video UNet has all the marks of an image UNet.
FAMILIES = (
    Family(
        "sv4d_unet", "network",
        (
            Layout("vdiff", (*LDM, r"input_blocks\.\d+\.\d\.motion_stack\."), _same),
            Layout("sgm", (*LDM, r"input_blocks\.\d+\.\d\.motion_blocks\."), lambda told: unet.sv4d()),
        ),
    ),
    _family(
        "video_unet", "network", (*LDM, r"input_blocks\.\d+\.0\.time_stack\."),
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.resnets\.0\.temporal_res_block\."), _video_unet),
        same=("sgm",),
    ),
    _family(
        "lvdm_unet", "network", (*LDM, r"input_blocks\.\d+\.0\.temopral_conv\."),
        Layout("dynamicrafter", (*LDM, r"input_blocks\.\d+\.0\.temporal_conv\."), lambda told: lvdm.dynamicrafter()),
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.temp_convs\."), _unet_3d),
        same=("lvdm",),
    ),
    _family(
        "unet", "network", LDM,
        Layout("diffusers", (*DIFFUSERS, r"down_blocks\.0\.resnets\.0\.time_emb_proj\."), _unet),
        same=("sgm",),
    ),
    Family(
        "cogvideox", "network",
        (
            Layout("vdiff", (r"blocks\.0\.modulation\.", r"text_embed\.", r"noise_embed\."), _same),
            Layout("sat", (r"transformer\.layers\.0\.attention\.query_key_value\.", r"mixins\.adaln_layer\."), _sat),
            Layout("diffusers", (r"transformer_blocks\.0\.norm1\.linear\.", r"patch_embed\.text_proj\."), _cogvideox),
        ),
        folder="transformer",
    ),
    _family(
        "autoencoder_kl_cogvideox", "first_stage", VDIFF_SAT,
        Layout(
            "diffusers", (r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.conv\.weight", r"decoder\.up_blocks\.0\."),
            lambda told: cogvideox.diffusers_autoencoder(num_levels(told)),
        ),
        same=("sat",),
    ),
    _family(
        "temporal_decoder", "first_stage", (r"decoder\.up\.0\.block\.0\.time_stack\.",),
        Layout(
            "diffusers", (r"decoder\.up_blocks\.0\.resnets\.0\.temporal_res_block\.",),
            lambda told: autoencoder.temporal_decoder(num_levels(told)),
        ),
        same=("sgm",),
    ),
    _family(
        "autoencoder_kl", "first_stage", (r"encoder\.down\.0\.block\.0\.conv1\.weight", r"decoder\.up\.0\."),
        Layout(
            "diffusers", (r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.weight", r"decoder\.up_blocks\.0\."),
            lambda told: autoencoder.autoencoder_kl(num_levels(told)),
        ),
        same=("sgm", "lvdm", "dynamicrafter"),
    ),
)  # fmt: skip
