"""Text towers: what other programs call the modules of vdiff's embedders.

CLIP's names begin with ``text_model`` in files, and in transformers before version 5; since then in neither vdiff nor
transformers. open_clip has other names, and its attention no layers at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CLIP = (
    r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])|"
    r"embeddings\.(token|position)_embedding|final_layer_norm"
)
T5 = r"encoder\.block\.\d+\.layer\..+"
BEGIN = "text_model."
# open_clip's layers that transformers has as well, the block apart.
OPEN_CLIP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
OPEN_CLIP_BLOCK = r"(?:model\.)?transformer\.resblocks\.(\d+)\.(.+)"


def today(name: str) -> str | None:
    """What transformers calls a module of a tower today; None: it is in no text tower."""
    if found := re.fullmatch(OPEN_CLIP_BLOCK, name):
        return f"encoder.layers.{found[1]}.{OPEN_CLIP[found[2]]}" if found[2] in OPEN_CLIP else None
    inside = name.removeprefix("transformer.").removeprefix(BEGIN)
    return inside if re.fullmatch(rf"{CLIP}|{T5}", inside) else None


def in_files(name: str) -> str:
    """As files of diffusers and kohya have it; what is in no tower of CLIP stays as it is."""
    return f"{BEGIN}{name}" if re.fullmatch(CLIP, name) else name


def aliases(name: str) -> tuple[str, ...]:
    """What a module of a host may be called in a file, besides its name there."""
    inside = today(name)
    return () if inside is None else (inside, in_files(inside))


def is_tower(names: Iterable[str]) -> bool:
    """Whether these are of a text tower."""
    return any(today(name) is not None for name in names)


def refusal(lost: Iterable[str], names: Iterable[str]) -> str:
    """Why sites of CLIP find no place in open_clip's tower, and what to do; "" where that is not so."""
    if not any(re.fullmatch(OPEN_CLIP_BLOCK, name) for name in names):
        return ""
    if not any(re.search(r"self_attn[._][qkv]_proj|self_attn[._]out_proj", site) for site in lost):
        return ""
    return (
        " open_clip's attention is one nn.MultiheadAttention, whose projections are no layers, and an adapter of them "
        "is not supported. Load the file's other components, component='unet'; or fuse it into the tower with the "
        "program it is from (diffusers: pipe.fuse_lora(components=['text_encoder_2'])) and load the saved tower."
    )
