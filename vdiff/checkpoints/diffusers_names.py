"""What diffusers calls the modules of latent diffusion's UNet, and back.

Both number the same blocks, one in a row, the other by level. The rule needs nothing but the number of residual blocks
of a level, two in every published Stable Diffusion, and one bit that diffusers' names leave out: which levels have
attention.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Inside a block, latent diffusion's name and diffusers'. Transformers are called alike from here on.
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

_BACK = {theirs: ours for ours, theirs in OUTSIDE.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in RES_BLOCK.items()}
_MIDDLE_BACK = {theirs: ours for ours, theirs in MIDDLE.items()}


def to_diffusers(name: str, num_res_blocks: int = 2) -> str | None:
    """diffusers' name of a module, None where latent diffusion has no such name.

    Raises:
        ValueError: a UNet with another number of residual blocks has a module of this name, and this one has not.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    if found := re.fullmatch(r"middle_block\.([012])(?:\.(.+))?", name):
        return _join("mid_block", MIDDLE[found[1]], _inside(found[2]))
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)(?:\.(.+))?", name)
    if not found:
        return None
    is_down, row, child, rest = found[1] == "input", int(found[2]), int(found[3]), found[4] or ""
    level, block = divmod(row - is_down, num_res_blocks + 1)
    where = f"{'down' if is_down else 'up'}_blocks.{level}"
    if is_down and (block == num_res_blocks) != (rest == "op" or (child == 0 and block == num_res_blocks)):
        raise ValueError(
            f"{name}: not a module of a UNet with {num_res_blocks} residual blocks a level. Say which network it is, "
            "vdiff convert ... --host RUN, or how many it has, num_res_blocks=."
        )
    if is_down and block == num_res_blocks:
        return _join(where, "downsamplers.0", "conv" if rest == "op" else rest)
    if not is_down and (child == 2 or rest == "conv"):
        return _join(where, "upsamplers.0", rest)
    return _join(where, f"{'attentions' if child else 'resnets'}.{block}", _inside(rest))


def to_ldm(name: str, num_res_blocks: int = 2, among: Collection[str] = ()) -> str | None:
    """Latent diffusion's name of a module, None where diffusers has no such name.

    Args:
        among: Names that the network has; they tell where an upsampling stands.
    """
    if name in _BACK:
        return _BACK[name]
    if found := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d)(?:\.(.+))?", name):
        return (
            _join("middle_block", _MIDDLE_BACK[found[1]], _inside_back(found[2])) if found[1] in _MIDDLE_BACK else None
        )
    found = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?", name
    )
    if not found:
        return None
    is_down, kind, rest = found[1] == "down", found[3], found[5] or ""
    row = int(found[2]) * (num_res_blocks + 1) + is_down
    where = "input_blocks" if is_down else "output_blocks"
    if kind == "downsamplers":
        return _join(where, str(row + num_res_blocks), "0", "op" if rest == "conv" else rest)
    if kind == "upsamplers":
        either = [_join(where, str(row + num_res_blocks), child, rest) for child in ("1", "2")]
        return next((name for name in either if name in among), None)
    return _join(where, str(row + int(found[4])), "0" if kind == "resnets" else "1", _inside_back(rest))


def _inside(rest: str | None) -> str:
    return RES_BLOCK.get(rest or "", rest or "")


def _inside_back(rest: str | None) -> str:
    return _BLOCK_BACK.get(rest or "", rest or "")


def _join(*steps: str) -> str:
    return ".".join(step for step in steps if step)
