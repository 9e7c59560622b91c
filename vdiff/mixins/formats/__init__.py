"""LoRA and its relatives in the file formats of other programs, read and written.

A file becomes :class:`AdapterWeights`, whatever its format; these become a mixin for a host, or a file of another
format. Tensors go through unchanged, and alpha is always written.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vdiff.checkpoints import WeightFileError, read_metadata
from vdiff.mixins.files import FORMAT, load_mixin
from vdiff.mixins.formats import diffusers, kohya, peft, sat, unicon
from vdiff.mixins.formats.adapter_weights import AdapterWeights, Site
from vdiff.mixins.formats.names import module_names, num_res_blocks
from vdiff.mixins.formats.unicon import UniCon
from vdiff.mixins.weights import WeightMixin

WRITERS = {"peft": peft.write, "diffusers": diffusers.write, "kohya": kohya.write, "sat": sat.write}
FORMATS = ("vdiff", *WRITERS)

__all__ = [
    "FORMATS",
    "AdapterWeights",
    "Site",
    "UniCon",
    "format_of",
    "load_adapter",
    "module_names",
    "num_res_blocks",
    "read_adapter",
    "read_adapters",
    "unicon",
    "write_adapter",
]


def format_of(path: str | Path) -> str:
    """Which format a file or folder is in.

    Raises:
        WeightFileError: none of them, or not there.
    """
    path = Path(path)
    if not path.exists():
        raise WeightFileError(f"{path}: no such file or folder.")
    if path.suffix == ".safetensors" and path.is_file() and read_metadata(path).get("format") == FORMAT:
        return "vdiff"
    for name, reads in (
        ("peft", peft.reads),
        ("unicon", unicon.reads),
        ("kohya", kohya.reads),
        ("diffusers", diffusers.reads),
        ("sat", sat.reads),
    ):
        if reads(path):
            return name
    raise WeightFileError(f"{path}: no adapter in a format that is known: {', '.join(FORMATS)}, unicon.")


def read_adapters(path: str | Path, alpha: float | None = None) -> dict[str, AdapterWeights]:
    """All adapters of a file, by the part of a pipeline that they are for: ``unet``, ``text_encoder``, ...; "" where
    the file does not say.

    Args:
        alpha: For files of SAT, which do not say it.

    Raises:
        WeightFileError: no such format, names that it does not have, or weights that contradict their description.
    """
    path, form = Path(path), format_of(path)
    if form == "vdiff":
        return {"": AdapterWeights.of(load_mixin(path))}
    if form == "sat":
        return sat.read(path, alpha)
    if form == "unicon":
        raise WeightFileError(
            f"{path}: a folder of UniCon holds several adapters; vdiff.mixins.formats.unicon reads it."
        )
    return {"peft": peft.read, "diffusers": diffusers.read, "kohya": kohya.read}[form](path)


def read_adapter(path: str | Path, component: str | None = None, alpha: float | None = None) -> AdapterWeights:
    """The one adapter of a file, or that of a component."""
    found = read_adapters(path, alpha)
    if component is None and len(found) == 1:
        return next(iter(found.values()))
    if component not in found:
        raise WeightFileError(f"{path}: adapters of {', '.join(found)}; say which, component=...; got {component!r}.")
    return found[component]


def load_adapter(
    path: str | Path,
    host: nn.Module,
    component: str | None = None,
    alpha: float | None = None,
    name: str | None = None,
) -> WeightMixin:
    """The adapter of a file of any format, with its weights, ready to be attached to ``host``.

    Args:
        host: The network it goes on; its modules tell what the file's names mean.
        component, alpha: See :func:`read_adapters`.
        name: Of the mixin.

    Raises:
        WeightFileError: see :func:`read_adapters`; or sites that the host does not have.
    """
    names = module_names(host)
    one, family = read_adapter(path, component, alpha), type(host).__name__
    if one.host not in (None, family):
        raise WeightFileError(f"{path}: made for a {one.host}, this is a {family}.")
    if not set(one.sites) <= set(names):
        one = sat.separate(one)
    return one.placed(names, family, num_res_blocks(names)).mixin(name)


def write_adapter(one: AdapterWeights, path: str | Path, to: str, num_res_blocks: int = 2) -> None:
    """Write an adapter as a file, or for peft a folder.

    Args:
        to: One of :data:`FORMATS`. For programs that know diffusers' networks, sites of latent diffusion's UNet and of
            SAT's CogVideoX get diffusers' names.

    Raises:
        ValueError: the format cannot hold such an adapter.
    """
    path = Path(path)
    if to == "vdiff":
        if one.is_flat or one.host is None:
            raise ValueError(
                f"{path}: vdiff's files say which network they are for, and by which names. Read it for a host, "
                "load_adapter(file, host) or --host."
            )
        one.mixin().save(path)
    elif to in WRITERS:
        if one.is_flat and to != "kohya":
            raise ValueError(f"{path}: kohya's names do not tell modules apart without a host: load_adapter or --host.")
        WRITERS[to]({"": one if to == "sat" else sat.separate(one).in_diffusers(num_res_blocks)}, path)
    else:
        raise ValueError(f"No format is called {to!r}; there are {', '.join(FORMATS)}.")
