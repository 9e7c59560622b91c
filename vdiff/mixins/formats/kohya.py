"""kohya and LyCORIS: one file whose names are the modules' with underscores, and an alpha for every module.

Underscores do not tell where a dot was, so that these names are read beside the names of a host's modules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vdiff.checkpoints import WeightFileError, read_header, read_weights, save_weights
from vdiff.mixins.formats import untold
from vdiff.mixins.formats.adapter_weights import AdapterWeights, Site
from vdiff.mixins.formats.leaves import LEAVES, commonest, rank_of
from vdiff.mixins.formats.towers import in_files

PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
}
READ = {"lora_te1_": "text_encoder", "lycoris_": "unet"} | {prefix: name for name, prefix in PREFIXES.items()}

TABLE = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
} | {leaf: leaf for kind in ("loha", "lokr") for leaf in LEAVES[kind]}
WRITTEN = {leaf: ending for ending, leaf in TABLE.items()} | {"magnitude": "dora_scale"}
ALGORITHMS = {"loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}}


def reads(path: Path) -> bool:
    return (
        path.is_file() and path.suffix == ".safetensors" and any(n.startswith(tuple(READ)) for n in read_header(path))
    )


def read(path: Path) -> dict[str, AdapterWeights]:
    found: dict[str, dict[str, Tensor]] = {}
    odd = []
    for name, value in read_weights(path).items():
        prefix = next((prefix for prefix in READ if name.startswith(prefix)), None)
        if prefix is None:
            odd.append(name)
        else:
            found.setdefault(READ[prefix], {})[name[len(prefix) :]] = value
    if odd:
        raise WeightFileError(f"{path}: {len(odd)} unknown names: {', '.join(odd[:8])}; they begin {', '.join(READ)}.")
    return {part: untold.adapter(tensors, TABLE, f"{path}, {part}", is_flat=True) for part, tensors in found.items()}


def write(adapters: Mapping[str, AdapterWeights], path: Path) -> None:
    from vdiff.mixins.formats.diffusers import component_of

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for component, one in adapters.items():
        one = one.plain()
        prefix = PREFIXES[component or component_of(one)]
        for name, site in one.sites.items():
            if site.is_embedding:
                raise ValueError(f"kohya's files hold no embeddings, such as {name!r}; write peft.")
            begin = prefix + in_files(name).replace(".", "_")
            weights = _theirs(one, site)
            if f"{begin}.alpha" in tensors:
                raise ValueError(f"Two sites would both be called {begin!r}.")
            tensors |= {f"{begin}.{ending}": value for ending, value in weights.items()}
        metadata |= _metadata(one)
    save_weights(path, tensors, {"format": "pt", **metadata})


def _theirs(one: AdapterWeights, site: Site) -> dict[str, Tensor]:
    alpha = site.alpha * (math.sqrt(site.rank) if one.options.get("rslora") else 1.0)
    weights = dict(site.tensors)
    if one.kind == "lokr" and rank_of("lokr", weights) is None and site.alpha != site.rank:
        weights["lokr_w1"] = weights["lokr_w1"] * (site.alpha / site.rank)  # for alpha is not read then
    if "magnitude" in weights:
        weights["magnitude"] = weights["magnitude"].reshape(-1, *(1,) * (weights["A"].ndim - 1))
    return {WRITTEN[leaf]: value for leaf, value in weights.items()} | {"alpha": torch.tensor(alpha)}


def _metadata(one: AdapterWeights) -> dict[str, str]:
    is_lycoris = one.kind != "lora"
    return {
        "ss_network_module": "lycoris.kohya" if is_lycoris else "networks.lora",
        "ss_network_dim": str(commonest(site.rank for site in one.sites.values())),
        "ss_network_alpha": str(commonest(site.alpha for site in one.sites.values())),
        "ss_network_args": json.dumps(ALGORITHMS.get(one.kind, {"dora_wd": True} if one.kind == "dora" else {})),
    }
