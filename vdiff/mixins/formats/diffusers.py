"""diffusers: one file, ``pytorch_lora_weights.safetensors``, for the network and its text encoders.

Written as diffusers writes it now. Read in all its dialects: ``lora_A`` and ``lora_B``; ``lora.down`` and ``lora.up``;
``to_q_lora.down`` in processors; text encoders' ``lora_linear_layer``; and ComfyUI's, ``diffusion_model.`` in front and
``lora_down`` and ``lora_up`` with an ``alpha``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.checkpoints import read_header, read_metadata, read_weights, save_weights
from vdiff.mixins.formats import peft, untold
from vdiff.mixins.formats.adapter_weights import AdapterWeights
from vdiff.mixins.formats.towers import in_files, is_tower

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# Older spellings, as regular expressions, and today's. In order.
SPELLINGS = (
    (r"^(model\.)?diffusion_model\.", ""),  # ComfyUI and kin, whose files are of the network alone
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.(down|up)", r".to_out.0.lora.\1"),
    (r"\.(to_[qkv])_lora\.(down|up)", r".\1.lora.\2"),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.to_out\.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector"),
    (r"\.lora\.down\.weight$", ".lora_A.weight"),
    (r"\.lora\.up\.weight$", ".lora_B.weight"),
    (r"\.lora\.down$", ".lora_A.weight"),
    (r"\.lora\.up$", ".lora_B.weight"),
    (r"\.lora_down\.weight$", ".lora_A.weight"),
    (r"\.lora_up\.weight$", ".lora_B.weight"),
)
OURS = r"\.lora_A\.weight$|lora\.(down|up)|_lora\.(down|up)|lora_linear_layer|\.lora_down\.|\.lokr_w|\.hada_w"
# Where a file does not say rank and alpha otherwise.
UNTOLD = peft.TABLE | peft.EMBEDDING | {"alpha": "alpha", "dora_scale": "dora_scale", "lora_mid.weight": "mid"}


def reads(path: Path) -> bool:
    file = _file(path)
    if file is None or file.suffix != ".safetensors":
        return False
    return any(re.search(OURS, name) for name in read_header(file))


def read(path: Path) -> dict[str, AdapterWeights]:
    file = _file(path)
    assert file is not None
    tensors = {_spell(name): value for name, value in read_weights(file).items()}
    said = json.loads(read_metadata(file).get(METADATA, "{}"))
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        begin, _, rest = name.partition(".")
        component = begin if begin in COMPONENTS else ""
        found.setdefault(component, {})[rest if component else name] = value
    order = sorted(found, key=("", *COMPONENTS).index)
    return {component: _adapter(component, found[component], said, file) for component in order}


def write(adapters: Mapping[str, AdapterWeights], path: Path) -> None:
    """A file, or in a folder the file that diffusers looks for."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, object] = {}
    for component, one in adapters.items():
        component = component or component_of(one)
        one = one.plain()
        if one.kind == "loha":
            raise ValueError("diffusers reads LoRA, DoRA and LoKr, not LoHa; write kohya or peft.")
        tensors |= peft.tensors(one.renamed(in_files), f"{component}.")
        said |= {f"{component}.{key}": value for key, value in peft.config(one).items()}
    file = path if path.suffix == ".safetensors" else path / FILE
    save_weights(file, tensors, {"format": "pt", METADATA: json.dumps(said, sort_keys=True)})


def component_of(one: AdapterWeights) -> str:
    """What a pipeline calls the network."""
    if is_tower(one.sites):
        return "text_encoder"
    is_unet = any(re.search(r"(^|\.)(down|mid|up)_blocks?\.", site) for site in one.sites)
    return "unet" if is_unet or one.host == "UNet" else "transformer"


def _adapter(component: str, tensors: Mapping[str, Tensor], said: Mapping[str, object], file: Path) -> AdapterWeights:
    where = f"{file}{f', {component}' if component else ''}"
    config = {key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")}
    if "r" not in config:  # older files say nothing, and mean what the shapes say
        return untold.adapter(tensors, UNTOLD, where)
    return peft.adapter(tensors, config, where)


def _spell(name: str) -> str:
    for old, new in SPELLINGS:
        name = re.sub(old, new, name)
    return name


def _file(path: Path) -> Path | None:
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.is_file() else None
