"""``vdiff convert``: adapters between file formats, and out of runs; whole checkpoints between layouts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from vdiff.checkpoints import (
    UnknownFamilyError,
    WeightFileError,
    WeightSource,
    convert_checkpoint,
    is_in_folders,
    open_weights,
    recognise,
)
from vdiff.cli.runs import run_config
from vdiff.hooks import attached
from vdiff.mixins import Mixin, load_mixin
from vdiff.mixins.formats import (
    AdapterWeights,
    format_of,
    module_names,
    num_res_blocks,
    read_adapter,
    unicon,
    write_adapter,
)
from vdiff.mixins.formats.sat import separate
from vdiff.registry import build, did_you_mean

# Layouts of whole checkpoints alone, and those that adapters are written in as well.
WHOLE = ("ldm", "sgm", "lvdm", "dynamicrafter", "dynamicrafter_256")
BOTH = ("vdiff", "diffusers", "sat")
ADAPTER_LEAVES = ("lora", ".matrix_A.", "hada_", "lokr_")

# Networks that published adapters are for, where no run of one's own has them.
HOSTS = {
    "sd15": {"channel_mult": (1, 2, 4, 4), "attention_factors": (1, 2, 4), "num_heads": 8, "context_dim": 768},
    "sd2": {
        "channel_mult": (1, 2, 4, 4), "attention_factors": (1, 2, 4), "head_dim": 64, "context_dim": 1024,
        "linear_projection": True,
    },
    "sdxl": {
        "channel_mult": (1, 2, 4), "attention_factors": (2, 4), "head_dim": 64, "context_dim": 2048,
        "transformer_depth": (1, 2, 10), "linear_projection": True, "num_classes": "sequential", "vector_dim": 2816,
    },
}  # fmt: skip


def convert(arguments: argparse.Namespace) -> int:
    source, out = Path(arguments.source), Path(arguments.out)
    if (source / "config.yaml").is_file() and not (source / "xy_lora").is_dir():
        mixin = _of_run(source, arguments)
        if arguments.to == "vdiff":
            mixin.save(out)
            print(f"{out}: {type(mixin).__name__} {mixin.name!r} on {len(mixin.sites)} modules of a {mixin.host}")
            return 0
        one = AdapterWeights.of(mixin)
        arguments.host = arguments.host or str(source)
    elif (checkpoint := _checkpoint(source, arguments)) is not None:
        return _whole(checkpoint, out, arguments)
    elif arguments.to == "unicon" or format_of(source) == "unicon":
        return _unicon(source, out, arguments)
    else:
        one = read_adapter(source, arguments.component, arguments.alpha)
    blocks = 2
    if arguments.host is not None:
        host = _host(arguments.host, arguments.allow_imports)
        names = module_names(host)
        blocks = num_res_blocks(names)
        one = one if set(one.sites) <= set(names) else separate(one)
        one = one.placed(names, type(host).__name__, blocks)
    write_adapter(one, out, arguments.to, blocks)
    print(f"{out}: {one}")
    return 0


def _checkpoint(source: Path, arguments: argparse.Namespace) -> WeightSource | None:
    """A whole checkpoint, or None for what is an adapter or meant as one."""
    is_meant = arguments.to in WHOLE or arguments.part or arguments.ignore or arguments.shard_size or arguments.given
    if not is_meant and (arguments.to not in BOTH or (source.is_dir() and not is_in_folders(source))):
        return None
    opened = open_weights(source)
    if is_meant:
        return opened
    if any(leaf in name for name in opened.header for leaf in ADAPTER_LEAVES):
        return None
    try:
        recognise(opened.header, str(source))
    except UnknownFamilyError as error:
        try:
            format_of(source)
        except WeightFileError as other:
            raise UnknownFamilyError(f"{error}\n  Nor is it an adapter.") from other
        return None
    return opened


def _whole(source: WeightSource, out: Path, arguments: argparse.Namespace) -> int:
    done = convert_checkpoint(
        source,
        out,
        arguments.to,
        parts=arguments.part or (),
        ignore=arguments.ignore or (),
        weights=arguments.weights,
        shard_size=arguments.shard_size,
        given=dict(arguments.given or ()),
    )
    for family, layout, tensors, numbers, is_averaged in done.parts:
        average = ", the exponential average" if is_averaged else ""
        print(f"{family}: {layout} to {arguments.to}, {tensors} tensors, {numbers:,} numbers{average}")
    for reason, names in done.beside.items():
        print(f"left out: {len(names)} tensors, {reason}")
    if done.ignored:
        print(f"ignored: {len(done.ignored)} tensors")
    print(f"{out}: {len(done.files)} file{'s' if len(done.files) > 1 else ''}")
    return 0


def _of_run(run: Path, arguments: argparse.Namespace) -> Mixin:
    from vdiff.engine import Engine

    engine = Engine.load(run, arguments.weights, arguments.step, allow_imports=arguments.allow_imports)
    mixins = {name: mixin for name, mixin in attached(engine).items() if mixin.state_dict()}
    if arguments.mixin is None and len(mixins) == 1:
        return next(iter(mixins.values()))
    if arguments.mixin not in mixins:
        known = ", ".join(mixins) or "none"
        hint = did_you_mean(arguments.mixin, mixins) if arguments.mixin else ""
        raise ValueError(f"{run}: which mixin? --mixin NAME.{hint} Attached, with weights: {known}.")
    return mixins[arguments.mixin]


def _host(said: str, allow_imports: bool) -> nn.Module:
    """A network without weights, for its names."""
    from vdiff.engine import Engine
    from vdiff.networks import UNet

    with torch.device("meta"):
        if said in HOSTS:
            return UNet(4, 4, 320, **HOSTS[said])
        if not Path(said).exists():
            raise FileNotFoundError(f"--host {said}: a run, a run file, or one of {', '.join(HOSTS)}.")
        config = run_config(said, allow_imports)
        engine = config.get("engine", config)
        if "denoiser" in engine:
            return build(engine["denoiser"]["network"], "network", "engine.denoiser.network")
        return Engine.from_config(config)


def _unicon(source: Path, out: Path, arguments: argparse.Namespace) -> int:
    """UniCon's folder to a folder of vdiff's adapters, to be attached in the order of `unicon.json`, and back."""
    if arguments.to == "unicon":
        notes = json.loads((source / "unicon.json").read_text(encoding="utf-8"))
        found = {name: load_mixin(source / f"{name}.safetensors") for name in notes["order"]}
        unicon.write(unicon.of(found, notes["about"]), out)
    elif arguments.to == "vdiff" and arguments.host is not None:
        model = unicon.read(source)
        found = unicon.mixins(model, _host(arguments.host, arguments.allow_imports))
        for name, mixin in found.items():
            mixin.save(out / f"{name}.safetensors")
        notes = {"order": list(found), "about": dict(model.about)}
        (out / "unicon.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"{source}: a folder of UniCon is converted --to vdiff --host HOST, such as sd15.")
    print(f"{out}: {', '.join(found)}")
    return 0
