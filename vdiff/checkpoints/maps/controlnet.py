"""ControlNets: names of theirs, which continue latent diffusion's, and diffusers'.

A copy of a UNet's way down and middle, the hint's own encoder in front, and a convolution behind every block.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdiff.checkpoints.keymap import KeyMap
from vdiff.checkpoints.maps.unet import VIDEO_RES, VIDEO_TRANSFORMER, encoder

BETWEEN = 6  # convolutions of the hint's encoder, without the first and the last; activations are numbered as well
HINT, EMBEDDING = "input_hint_block", "controlnet_cond_embedding"
OWN = KeyMap(
    [
        (f"{HINT}.0.*", f"{EMBEDDING}.conv_in.*"),
        *((f"{HINT}.{2 + 2 * i}.*", f"{EMBEDDING}.blocks.{i}.*") for i in range(BETWEEN)),
        (f"{HINT}.{2 + 2 * BETWEEN}.*", f"{EMBEDDING}.conv_out.*"),
        ("zero_convs.{i}.0.*", "controlnet_down_blocks.{i}.*"),
        ("middle_block_out.0.*", "controlnet_mid_block.*"),
    ]
)


def controlnet(num_res_blocks: int | Sequence[int] = 2, attends: Sequence[bool] = (True, True, True, False)) -> KeyMap:
    """The authors' names, below ``control_model.``, to those of diffusers' ``ControlNetModel``.

    Args:
        num_res_blocks: Of each level.
        attends: For each level, whether it has attention.
    """
    return OWN + encoder(num_res_blocks, attends)


def video_controlnet(
    num_res_blocks: int | Sequence[int] = 2, attends: Sequence[bool] = (True, True, True, False)
) -> KeyMap:
    """The same of a video UNet: generative-models' names inside a block, to those of svd-temporal-controlnet."""
    return OWN + encoder(num_res_blocks, attends, res=VIDEO_RES, attention=VIDEO_TRANSFORMER)
