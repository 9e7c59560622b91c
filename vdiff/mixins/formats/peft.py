"""peft: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.mixins.formats.adapter_weights import AdapterWeights, Site, factors
from vdiff.mixins.formats.leaves import FUSE, LEAVES, commonest, kind_of, sites_of
from vdiff.mixins.formats.towers import BEGIN, in_files

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

TABLE = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
} | {leaf: leaf for kind in ("loha", "lokr") for leaf in LEAVES[kind]}
EMBEDDING = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")  # starts that peft also takes out of the base
# Options that ask for more than the pair, what they are where they do not, and what they ask for.
UNREAD = {
    "bias": ("none", "biases of the network were trained besides, and are no adapter's"),
    "lora_bias": (False, "the pairs have biases, which vdiff's LoRA lacks"),
    "modules_to_save": ((), "whole modules were trained besides, and are no adapter's"),
    "trainable_token_indices": (None, "rows of an embedding were trained besides"),
    "target_parameters": ((), "parameters that are no layer's weight"),
    "layer_replication": (None, "layers of the network are used several times"),
}
TYPES = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}


def reads(path: Path) -> bool:
    return path.is_dir() and (path / CONFIG).is_file()


def read(path: Path) -> dict[str, AdapterWeights]:
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") not in TYPES:
        raise WeightFileError(
            f"{path}: a peft adapter of type {config.get('peft_type')}; vdiff reads {', '.join(TYPES)}."
        )
    if config.get("fan_in_fan_out"):
        raise WeightFileError(f"{path}: made for transposed linear layers (fan_in_fan_out), which vdiff does not have.")
    tensors = read_weights(path / WEIGHTS)
    return {"": adapter(tensors, config, str(path), PREFIX)}


def write(adapters: Mapping[str, AdapterWeights], path: Path) -> None:
    (one,) = adapters.values()
    one = one.plain()
    path.mkdir(parents=True, exist_ok=True)
    save_weights(path / WEIGHTS, tensors(one, PREFIX), {"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config(one), indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Also the inside of diffusers' files -----------------------------------------------------------------


def adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str, prefix: str = "") -> AdapterWeights:
    """An adapter from tensors and what their configuration says.

    Raises:
        WeightFileError: names or shapes that contradict it, something that vdiff has not, or weights that belong to a
            base that peft changed.
    """
    if str(start := config.get("init_lora_weights")).lower().startswith(RESIDUAL):
        raise WeightFileError(
            f"{where}: init_lora_weights is {start!r}, so these weights belong to a base from which peft took their "
            "start, and on the base itself they would be wrong. Save them again as a plain LoRA: in peft, "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=<the adapter before training>). One of "
            "loftq stays with its quantised base: merge it there."
        )
    for option, (plain, what) in UNREAD.items():
        if config.get(option) not in (None, plain, False, [], {}):
            raise WeightFileError(f"{where}: {option} is {config[option]!r}: {what}. {FUSE} (merge_and_unload).")
    odd = [name for name in tensors if not name.startswith(prefix)]
    if odd:
        raise WeightFileError(f"{where}: names begin with {prefix!r} there, and {odd[0]!r} does not.")
    found = sites_of({n[len(prefix) :]: v for n, v in tensors.items()}, TABLE | EMBEDDING, where)
    kind = kind_of(found, where)
    sites = {}
    for site, weights in found.items():
        rank = int(_at(site, config.get("rank_pattern"), config["r"]))
        alpha = float(_at(site, config.get("alpha_pattern"), config.get("lora_alpha", config.get("alpha"))))
        if kind in ("lora", "dora") and len(weights["A"]) != rank:
            raise WeightFileError(
                f"{where}: {site!r} is said to have rank {rank}, and its weights have {len(weights['A'])}."
            )
        if "magnitude" in weights:  # (1, out, 1, ...) for a convolution
            weights["magnitude"] = weights["magnitude"].flatten()
        is_embedding = f"{prefix}{site}.lora_embedding_A" in tensors
        sites[site] = Site(weights, rank, alpha, is_embedding=is_embedding)
    options: dict[str, Any] = {}
    if kind in ("lora", "dora"):
        options = {"rslora": bool(config.get("use_rslora")), "dropout": float(config.get("lora_dropout") or 0)}
    return AdapterWeights(kind, sites, options=options)


def tensors(one: AdapterWeights, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by peft's names."""
    found = {}
    for name, site in one.sites.items():
        back = {leaf: ending for ending, leaf in {**TABLE, **(EMBEDDING if site.is_embedding else {})}.items()}
        back["magnitude"] = "lora_magnitude_vector"
        for leaf, value in site.tensors.items():
            if leaf == "magnitude" and site.tensors["A"].ndim > 2:
                value = value.reshape(1, -1, *(1,) * (site.tensors["A"].ndim - 2))
            found[f"{prefix}{name}.{back[leaf]}" if name else f"{prefix}{back[leaf]}"] = value
    return found


def config(one: AdapterWeights) -> dict[str, Any]:
    """peft's configuration, with rank and alpha of every site that differs from most."""
    rank = int(commonest(site.rank for site in one.sites.values()))
    alpha = commonest(site.alpha for site in one.sites.values())
    said = {
        "peft_type": one.kind.upper() if one.kind != "dora" else "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "target_modules": list(one.sites),
        "rank_pattern": {_pattern(n): site.rank for n, site in one.sites.items() if site.rank != rank},
        "alpha_pattern": {_pattern(n): site.alpha for n, site in one.sites.items() if site.alpha != alpha},
    }
    leaves = {leaf for site in one.sites.values() for leaf in site.tensors}
    if one.kind in ("lora", "dora"):
        return said | {
            "lora_alpha": alpha,
            "lora_dropout": one.options.get("dropout", 0.0),
            "use_rslora": bool(one.options.get("rslora")),
            "use_dora": one.kind == "dora",
            "fan_in_fan_out": False,
            "bias": "none",
            "init_lora_weights": True,
        }
    said |= {"alpha": alpha, "init_weights": True, "use_effective_conv2d": any("_t" in leaf for leaf in leaves)}
    if one.kind == "lokr":
        factor = factors(one.sites)
        if not isinstance(factor, int):
            raise ValueError(
                f"peft and diffusers have one decompose_factor for all sites, and here it is {factor}. Write kohya, or "
                "make a file for each."
            )
        said |= {"decompose_both": "lokr_w1_a" in leaves, "decompose_factor": factor}
    return said


def _pattern(name: str) -> str:
    """peft takes them as regular expressions that may begin anywhere; of a tower, before and after transformers 5."""
    return f"^{f'({re.escape(BEGIN)})?' if in_files(name) != name else ''}{re.escape(name)}"


def _at(site: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
    for pattern, number in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return number
    return otherwise
