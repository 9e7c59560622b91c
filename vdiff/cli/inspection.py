"""``vdiff inspect`` and ``vdiff doctor``."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.checkpoints import (
    UnknownFamilyError,
    WeightFileError,
    find_checkpoint,
    open_weights,
    read_metadata,
    read_weights,
    recognise,
    steps,
    verify,
)
from vdiff.checkpoints.recognition import described
from vdiff.cli.runs import run_config
from vdiff.mixins.formats import format_of, peft, read_adapters

OPTIONAL = {
    "open_clip_torch": "text and image towers",
    "xformers": "memory-efficient attention",
    "transformers": "extra text: T5 and CLIP-L",
    "av": "extra video: reading and writing video",
    "matplotlib": "extra plot",
    "scikit-learn": "extra data: the digits",
    "tensorboard": "extra tensorboard",
    "torchmetrics": "extra metrics",
    "lightning": "extra lightning (2.6.6 or newer)",
}


def inspect(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        tensors = _inspect_run(path, arguments.allow_imports)
    else:
        file = path / peft.WEIGHTS if peft.reads(path) else path
        tensors = dict(open_weights(file).header)  # names and shapes, no weights
        for key, value in read_metadata(file).items() if file.suffix == ".safetensors" else ():
            print(f"{key}: {value[:200]}")
        _say_family(path, tensors)
    census(tensors, arguments.depth)
    if arguments.keys:
        for name, value in tensors.items():
            print(f"    {name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    if arguments.against:
        return _compare(tensors, arguments)
    return 0


def _say_family(path: Path, tensors: dict[str, Tensor]) -> None:
    """What a file is of, as a whole or as an adapter."""
    try:
        found = recognise(tensors)
    except UnknownFamilyError:
        print(_adapters(path) or "family: none that is published and known")
        return
    print(f"family: {found.family.name}, in the layout {found.layout}")
    for part in found.parts:
        held = [tensors[name] for name in part.names.values()]
        dtypes = ", ".join(dict.fromkeys(str(value.dtype).removeprefix("torch.") for value in held))
        average = "; with an exponential average" if part.averaged else ""
        at = f" at {part.prefix}*" if part.prefix else ""
        parameters = sum(value.numel() for value in held)
        print(f"  {part.family.name}{at}: {len(held)} tensors, {parameters:,} parameters, {dtypes}{average}")
    for reason, names in found.beside.items():
        print(f"  beside: {len(names)} tensors, {reason}")
    print(f"unknown keys: {described(found.unknown) if found.unknown else 'none'}")


def _adapters(path: Path) -> str:
    """The adapters in a file, a line each; nothing where there are none that can be read."""
    try:
        form, found = format_of(path), read_adapters(path)
    except (WeightFileError, ValueError):
        return ""
    return "\n".join(f"adapter{f' of {part}' if part else ''}, as {form} has it: {one}" for part, one in found.items())


def _compare(tensors: dict[str, Tensor], arguments: argparse.Namespace) -> int:
    """Whether the file fills what a config describes, built without memory; 1 if not, with the difference."""
    from vdiff.checkpoints import KeyMapError, MismatchError, WeightSource, check_published, is_by_others, load_into
    from vdiff.engine import DiffusionEngine

    config = run_config(arguments.against, arguments.allow_imports)
    with torch.device("meta"):
        engine = DiffusionEngine.from_config(config)
    where = f"{arguments.path} against {arguments.against}{f' ({arguments.slot})' if arguments.slot else ''}"
    header = {name: value.to("meta") for name, value in tensors.items()}
    try:
        if is_by_others(header):
            print(check_published(engine, WeightSource(Path(arguments.path), {}, header), arguments.slot))
        else:
            print(load_into(engine.get_submodule(arguments.slot), header, where=where))
    except (MismatchError, KeyMapError, UnknownFamilyError) as error:
        print(str(error).replace("the weights do not fit; nothing was changed.", "they do not fit."))
        return 1
    return 0


def _inspect_run(run: Path, allow_imports: bool) -> dict[str, Tensor]:
    """Says what is in a run folder; the weights of its last checkpoint."""
    from vdiff.engine import Engine
    from vdiff.hooks import describe

    root = run / "checkpoints"
    for step in sorted(steps(root)):
        problems = verify(root / f"step-{step:08d}")
        print(f"step {step}: {'; '.join(problems) if problems else 'valid'}")
    with torch.device("meta"):
        engine = Engine.from_config(run_config(run, allow_imports))
    for slot, module in engine.named_children():
        print(f"{slot}: {type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters")
    print(describe(engine))
    return read_weights(find_checkpoint(run) / "model.safetensors")


def census(tensors: dict[str, Tensor], depth: int) -> None:
    """Tensors and parameters by the first parts of their names."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for key, value in tensors.items():
        prefix = ".".join(key.split(".")[:depth])
        count[prefix] += 1
        size[prefix] += value.numel()
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    print(f"{len(tensors)} tensors, {sum(size.values()):,} numbers, {dict(dtypes)}")
    for prefix in count:
        print(f"  {prefix:40} {count[prefix]:5} tensors {size[prefix]:14,} numbers")


def doctor(arguments: argparse.Namespace) -> int:
    from vdiff import __version__
    from vdiff.attention import BACKENDS, AttentionCall, refusal

    print(f"vdiff {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {sys.platform}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")
    else:
        print(f"device: {'mps' if torch.backends.mps.is_available() else 'cpu'}, {torch.get_num_threads()} threads")
    print("attention (1024 tokens, head dimension 64, bfloat16 on CUDA):")
    for name in BACKENDS:
        reason = refusal(name, _typical_call(AttentionCall))
        print(f"  {name:10} {reason or 'fits'}")
    print("optional packages:")
    for name, use in OPTIONAL.items():
        print(f"  {name:16} {_state(name):14} {use}")
    return 0


def _typical_call(call: Any) -> Any:
    if not torch.cuda.is_available():
        return call("cpu", torch.float32, 1024, 1024, 64)
    capability, cudnn = torch.cuda.get_device_capability(), torch.backends.cudnn.version() or 0
    return call("cuda", torch.bfloat16, 1024, 1024, 64, capability=capability, cudnn=cudnn)


def _state(package: str) -> str:
    try:
        found = version(package)
    except PackageNotFoundError:
        return "not installed"
    module = {"open_clip_torch": "open_clip", "scikit-learn": "sklearn"}.get(package, package)
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install is what a doctor is for
        return f"{found}, broken: {error!r:.60}"
    return found
