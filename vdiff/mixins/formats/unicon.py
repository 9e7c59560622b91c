"""UniCon, of joint image diffusion: a folder with three LoRAs, the post-projections and what they mean.

``xy_lora``, ``yx_lora`` and perhaps ``y_lora`` are folders of diffusers' old form whose sites are those of UniCon's own
attention, ``attn1n``, beside ``attn1``; ``model.pth`` holds the projections ``conv1n``, and a JSON file the rest.
In vdiff joint attention goes through the host's own ``attn1``, so that :func:`mixins` makes of it ordinary LoRAs and a
:class:`~vdiff.mixins.JointAttention` that owns two of them; :func:`of` is the way back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.checkpoints.diffusers_names import to_diffusers, to_ldm
from vdiff.mixins.base import Mixin
from vdiff.mixins.formats import diffusers
from vdiff.mixins.formats.adapter_weights import AdapterWeights
from vdiff.mixins.formats.names import module_names, num_res_blocks
from vdiff.mixins.joint_attention import JointAttention

LORAS = ("xy_lora", "yx_lora", "y_lora")
POST = ("model.pth", "model.safetensors")
POST_SITE = "conv1n"


@dataclass(frozen=True)
class UniCon:
    """All of one model.

    Attributes:
        loras: ``xy_lora``, ``yx_lora`` and, where the second stream has one, ``y_lora``.
        post: The projections by the name of their module in the network, without ``weight``.
        about: What the JSON file says: ``model_name``, ``base_model_id``, ``post_joint``, ``trigger_word``, ...
    """

    loras: Mapping[str, AdapterWeights]
    post: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def reads(path: Path) -> bool:
    return path.is_dir() and (path / "xy_lora").is_dir()


def read(path: Path) -> UniCon:
    """A folder of UniCon."""
    loras = {name: _one(diffusers.read(path / name), path / name) for name in LORAS if (path / name).is_dir()}
    missing = [name for name in LORAS[:2] if name not in loras]
    if missing:
        raise WeightFileError(f"{path}: UniCon has {', '.join(LORAS[:2])}; {', '.join(missing)} is missing.")
    file = next((path / name for name in POST if (path / name).is_file()), None)
    weights = {} if file is None else read_weights(file)
    post = {name.removesuffix(".weight"): value for name, value in weights.items() if "lora" not in name}
    notes = sorted(path.glob("*.json"))
    about = json.loads(notes[0].read_text(encoding="utf-8")) if notes else {}
    return UniCon(loras, post, about)


def write(model: UniCon, path: Path) -> None:
    """A folder that UniCon's loader reads, but for ``model.safetensors`` where it has a pickle."""
    for name, one in model.loras.items():
        tensors = {}
        for site, held in one.plain().sites.items():
            if one.kind != "lora" or held.alpha != held.rank:
                raise ValueError(
                    f"{name}: UniCon has LoRA with alpha = rank; {site!r} is {one.kind}, {held.alpha:g}/{held.rank}."
                )
            tensors[f"unet.{site}.lora.down.weight"] = held.tensors["A"]
            tensors[f"unet.{site}.lora.up.weight"] = held.tensors["B"]
        save_weights(path / name / diffusers.FILE, tensors, {"format": "pt"})
    save_weights(path / POST[1], {f"{name}.weight": value for name, value in model.post.items()}, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(model.about), indent=2) + "\n", encoding="utf-8")


def mixins(model: UniCon, host: nn.Module) -> dict[str, Mixin]:
    """The model for a network, to be attached in this order: LoRAs, and joint attention that owns those of the pair.

    Rows of the first stream are gated ``xy_lora=1``, those of the second ``yx_lora=1`` and ``y_lora=1``.
    """
    names, family = module_names(host), type(host).__name__
    blocks = num_res_blocks(names)
    found: dict[str, Mixin] = {}
    for name, one in model.loras.items():
        found[name] = one.renamed(_without_copy).placed(names, family, blocks).mixin(name)
    pair = [name for name in LORAS[:2] if name in found]
    weights = {}
    for name, value in model.post.items():
        site = name.removesuffix(POST_SITE) + "attn1"
        weights[f"{to_ldm(site, blocks) if family == 'UNet' else site}.project.weight"] = value
    joint = JointAttention(
        [name.removesuffix(".project.weight") for name in weights], model.about.get("post_joint", "conv"), pair
    )
    joint.host = family
    joint.load_state_dict(weights)
    return found | {joint.name: joint}


def of(found: Mapping[str, Mixin], about: Mapping[str, Any], blocks: int = 2) -> UniCon:
    """The inverse of :func:`mixins`."""
    joint = next(mixin for mixin in found.values() if isinstance(mixin, JointAttention))
    loras = {name: AdapterWeights.of(found[name]).in_diffusers(blocks) for name in LORAS if name in found}
    loras |= {name: loras[name].renamed(lambda site: site.replace(".attn1.", ".attn1n.")) for name in LORAS[:2]}
    post = {}
    for name, value in joint.state_dict().items():
        site = name.removesuffix(".project.weight")
        post[(to_diffusers(site, blocks) or site).removesuffix("attn1") + POST_SITE] = value
    return UniCon(loras, post, {**about, "post_joint": joint.post})


def _without_copy(site: str) -> str:
    return site.replace(".attn1n.", ".attn1.")


def _one(found: dict[str, AdapterWeights], where: Path) -> AdapterWeights:
    if len(found) != 1:
        raise WeightFileError(f"{where}: adapters of {', '.join(found)}; UniCon's are of the unet.")
    return next(iter(found.values()))
