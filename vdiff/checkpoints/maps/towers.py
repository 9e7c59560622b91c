"""Towers for text and pictures: names of open_clip and of transformers, whose files diffusers' pipelines hold.

Both write the same network: one fused projection there, three here; a matrix to multiply by there, a layer here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vdiff.checkpoints.changes import Made, Split, Tied, Transpose
from vdiff.checkpoints.keymap import KeyMap

LAYER = KeyMap(
    [
        ("ln_1.*", "layer_norm1.*"),
        *(
            (f"attn.in_proj_{leaf}", tuple(f"self_attn.{x}_proj.{leaf}" for x in "qkv"), Split(3))
            for leaf in ("weight", "bias")
        ),
        ("attn.out_proj.*", "self_attn.out_proj.*"),
        ("ln_2.*", "layer_norm2.*"),
        ("mlp.c_fc.*", "mlp.fc1.*"),
        ("mlp.c_proj.*", "mlp.fc2.*"),
    ]
)
# What older versions of transformers write beside the weights: 0, 1, 2, ...
COUNTED = "embeddings.position_ids"


def clip_text(theirs: str = "text_model", num_counted: int | None = None) -> KeyMap:
    """Names of :class:`vdiff.conditioners.CLIPTextEmbedder` below ``transformer`` to those of transformers.

    Args:
        theirs: What the names begin with there; none in files of transformers 5.
        num_counted: Tokens of a prompt, where its positions are written out, as in files of Stable Diffusion.
    """
    below = f"{theirs}." if theirs else ""
    made = None if num_counted is None else Made(partial(counted, num_counted))
    return KeyMap([((), f"{below}{COUNTED}", made), ("*", f"{below}*")])


def open_clip_text() -> KeyMap:
    """Names of :class:`vdiff.conditioners.OpenCLIPTextEmbedder` to those of transformers' CLIP.

    All layers are written. diffusers' own files of Stable Diffusion 2 hold one less, the one whose output is not used.
    """
    return KeyMap(
        [
            ("model.token_embedding.*", "text_model.embeddings.token_embedding.*"),
            ("model.positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("model.ln_final.*", "text_model.final_layer_norm.*"),
            ("model.text_projection", "text_projection.weight", Transpose()),
            ("model.logit_scale", "logit_scale"),  # which the class for text alone does not have
            ((), f"text_model.{COUNTED}"),
        ]
    ) + LAYER.under("model.transformer.resblocks.{i}", "text_model.encoder.layers.{i}")


def open_clip_image() -> KeyMap:
    """Names of :class:`vdiff.conditioners.OpenCLIPImageEmbedder` to those of transformers' CLIP."""
    return KeyMap(
        [
            ("class_embedding", "vision_model.embeddings.class_embedding"),
            ("conv1.*", "vision_model.embeddings.patch_embedding.*"),
            ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("ln_pre.*", "vision_model.pre_layrnorm.*"),  # spelled so
            ("ln_post.*", "vision_model.post_layernorm.*"),
            ("proj", "visual_projection.weight", Transpose()),
            ((), f"vision_model.{COUNTED}"),
        ]
    ).under("model.visual", "") + LAYER.under(
        "model.visual.transformer.resblocks.{i}", "vision_model.encoder.layers.{i}"
    )


def image_in_original() -> KeyMap:
    """The image tower in files of generative-models and VideoCrafter, which keep the text tower but for its blocks."""
    stump = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.*", "ln_final.*")
    return KeyMap([("model.visual.*", "model.visual.*"), *(((), f"model.{name}") for name in stump)])


def t5() -> KeyMap:
    """Names of :class:`vdiff.conditioners.T5TextEmbedder` to those of transformers, who write a shared table once.

    A whole T5 has a decoder besides.
    """
    shared = ("transformer.shared.weight", "transformer.encoder.embed_tokens.weight")
    return KeyMap(
        [
            (shared, "shared.weight", Tied(2)),
            *(((), name) for name in ("encoder.embed_tokens.weight", "decoder.*", "lm_head.*")),
            ("transformer.*", "*"),
        ]
    )


def counted(length: int) -> Tensor:
    """``(1, length)``: 0, 1, 2, ..."""
    return torch.arange(length, device="cpu")[None]
