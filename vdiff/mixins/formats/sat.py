"""SwissArmyTransformer, of CogVideoX: ``matrix_A.i`` and ``matrix_B.i`` for every part of a fused projection.

These files lie among all weights of the model and do not say alpha, so that whoever reads one says it. Written are the
adapter's weights alone, with alpha in the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vdiff.checkpoints import WeightFileError, read_header, read_metadata, read_weights, save_weights
from vdiff.mixins.formats.adapter_weights import AdapterWeights, Site

PREFIX = "model.diffusion_model."
ALPHA = "alpha"  # in the metadata: a number, or numbers by site

# CogVideoX: SAT's site, and diffusers' for each of its parts.
COGVIDEOX = {
    r"transformer\.layers\.(\d+)\.attention\.query_key_value": tuple(
        rf"transformer_blocks.\1.attn1.to_{name}" for name in "qkv"
    ),
    r"transformer\.layers\.(\d+)\.attention\.dense": (r"transformer_blocks.\1.attn1.to_out.0",),
}
_LEAF = re.compile(r"(?P<site>.+)\.matrix_(?P<which>[AB])\.(?P<part>\d+)")


def reads(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return path.is_file() and any(_LEAF.fullmatch(name) for name in read_header(path))
    return path.is_file() and path.suffix in (".pt", ".ckpt", ".pth", ".bin")


def read(path: Path, alpha: float | None = None) -> dict[str, AdapterWeights]:
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    said = json.loads(metadata[ALPHA]) if ALPHA in metadata else alpha
    if said is None:
        raise WeightFileError(
            f"{path}: SAT's files do not say alpha. Give it, `alpha=` or --alpha; it is `lora_alpha` of the training's "
            "configuration, and 1 where that says nothing."
        )
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, value in read_weights(path).items():
        leaf = _LEAF.fullmatch(name.removeprefix(PREFIX))
        if leaf:
            found.setdefault(leaf["site"], {"A": {}, "B": {}})[leaf["which"]][int(leaf["part"])] = value
    if not found:
        raise WeightFileError(f"{path}: no weights called matrix_A and matrix_B in it.")
    sites = {}
    for name, pair in found.items():
        parts = len(pair["A"])
        if sorted(pair["A"]) != list(range(parts)) or sorted(pair["B"]) != list(range(parts)):
            raise WeightFileError(
                f"{path}: {name!r} has the parts {sorted(pair['A'])} of A and {sorted(pair['B'])} of B."
            )
        a, b = (torch.cat([pair[which][part] for part in range(parts)]) for which in "AB")
        number = said[name] if isinstance(said, dict) else said
        sites[name] = Site({"A": a, "B": b}, len(pair["A"][0]), float(number), parts)
    return {"": AdapterWeights("lora", sites)}


def write(adapters: Mapping[str, AdapterWeights], path: Path) -> None:
    (one,) = adapters.values()
    if one.kind != "lora" or one.options.get("rslora"):
        raise ValueError(
            f"SAT's files hold plain LoRA, not {'rsLoRA' if one.kind == 'lora' else one.kind}; write peft."
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: written as .safetensors, whose tensors have SAT's names.")
    tensors = {}
    if any("A0" in site.tensors for site in one.sites.values()):
        one = one.plain()
    one = fused(one)
    for name, site in one.sites.items():
        for which in "AB":
            for part, value in enumerate(site.tensors[which].chunk(site.parts)):
                tensors[f"{PREFIX}{name}.matrix_{which}.{part}"] = value
    save_weights(path, tensors, {ALPHA: json.dumps({name: site.alpha for name, site in one.sites.items()})})


def separate(one: AdapterWeights) -> AdapterWeights:
    """CogVideoX's sites under diffusers' names, every part a site of its own; others as they are."""
    sites: dict[str, Site] = {}
    for name, site in one.sites.items():
        theirs = next((new for old, new in COGVIDEOX.items() if re.fullmatch(old, name)), ())
        if len(theirs) != site.parts:
            sites[name] = site
            continue
        old = next(old for old in COGVIDEOX if re.fullmatch(old, name))
        pairs = zip(theirs, site.tensors["A"].chunk(site.parts), site.tensors["B"].chunk(site.parts), strict=True)
        for new, a, b in pairs:
            sites[re.sub(old, new, name)] = Site({"A": a, "B": b}, site.rank, site.alpha)
    return AdapterWeights(one.kind, sites, one.host, one.is_flat, one.options)


def fused(one: AdapterWeights) -> AdapterWeights:
    """The inverse of :func:`separate`.

    Raises:
        ValueError: some of q, k and v have an adapter and others none, or of another rank.
    """
    sites: dict[str, Site] = {}
    groups: dict[str, dict[int, tuple[str, Site]]] = {}
    sizes: dict[str, int] = {}
    for name, site in one.sites.items():
        place = _place(name)
        if place is None:
            sites[name] = site
        else:
            whole, part, sizes[whole] = place
            groups.setdefault(whole, {})[part] = (name, site)
    for whole, members in groups.items():
        pairs = [site for _, (_, site) in sorted(members.items())]
        if len(members) != sizes[whole] or len({(site.rank, site.alpha) for site in pairs}) > 1:
            names = ", ".join(name for name, _ in members.values())
            raise ValueError(
                f"{whole}: SAT has one projection for {sizes[whole]}, of one rank and alpha; here {names}."
            )
        tensors = {leaf: torch.cat([site.tensors[leaf] for site in pairs]) for leaf in "AB"}
        sites[whole] = Site(tensors, pairs[0].rank, pairs[0].alpha, len(pairs))
    return AdapterWeights(one.kind, sites, one.host, one.is_flat, one.options)


def _place(name: str) -> tuple[str, int, int] | None:
    """SAT's site, the part of it and how many it has, for a name of diffusers' CogVideoX."""
    for old, theirs in COGVIDEOX.items():
        for part, new in enumerate(theirs):
            found = re.fullmatch(re.escape(new).replace(r"\\1", r"(\d+)"), name)
            if found:
                whole = old.replace(r"(\d+)", found[1]).replace("\\", "")
                return whole, part, len(theirs)
    return None
