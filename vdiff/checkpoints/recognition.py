"""What a checkpoint is, by the names and shapes in it; no weight is read.

Every name is in one of three: a part of a family that has a table, something beside the weights that nobody needs, or
unknown. Unknown names are never passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vdiff.checkpoints.families import FAMILIES, PREFIXES, Family
from vdiff.checkpoints.loading import summary
from vdiff.checkpoints.weights import WeightFileError

# What wrappers put around names: DeepSpeed's and data-parallel training in front, torch.compile's anywhere.
WRAPPERS = ("module.", "_forward_module.")
COMPILED = "_orig_mod."
EMA = "model_ema."

# Beside the weights, and made anew by whoever reads them; the pattern is of a whole name.
BESIDE = {
    r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_.+|lvlb_weights|logvar|"
    r"scale_factor|scale_arr|diffusion_scheduler\..+": "tables of a schedule",
    r"denoiser\.sigmas": "tables of a schedule",
    r"(.+\.)?loss\..+|first_stage_model\.logvar": "of a loss",
    r"model_ema\.(decay|num_updates)": "counters of an average",
    r"ref_model\..+": "a copied reference",
}

# Parts that no table leads from: known, and said by name.
WITHOUT_TABLE = {
    "cond_stage_model.": "text tower",
    "conditioner.": "conditioner",
    "embedder.": "picture tower",
    "image_proj_model.": "picture resampler",
    "text_encoder/": "text tower",
    "text_encoder_2/": "text tower",
    "image_encoder/": "picture tower",
}


class UnknownFamilyError(WeightFileError):
    """Names that fit no family."""


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint.

    Attributes:
        prefix: As found; ``""`` where the file is this part alone.
        names: Names within the part to names in the file.
        averaged: The same to names of the exponential average, where the file has one.
    """

    family: Family
    layout: str
    prefix: str
    names: Mapping[str, str]
    averaged: Mapping[str, str]


@dataclass(frozen=True)
class Recognised:
    """What is in a checkpoint, every name of it in one of three.

    Attributes:
        parts: With a table.
        beside: What nobody needs, by reason.
        unknown: The rest.
    """

    parts: tuple[Part, ...]
    beside: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]

    @property
    def family(self) -> Family:
        """Of the network, or of the only part."""
        return self.parts[0].family

    @property
    def layout(self) -> str:
        return self.parts[0].layout


def recognise(header: Mapping[str, Tensor], where: str = "checkpoint") -> Recognised:
    """What a checkpoint is, by names and shapes.

    Args:
        header: Names to tensors, on any device; only their shapes are looked at.

    Raises:
        UnknownFamilyError: no family fits; the message lists how the names begin.
    """
    clean = {_clean(name): name for name in header}
    if len(clean) < len(header):
        raise UnknownFamilyError(f"{where}: some names differ by what a wrapper puts before them, and by nothing else.")
    beside: dict[str, list[str]] = {}
    rest = {}
    for name, full in clean.items():
        reason = next((reason for pattern, reason in BESIDE.items() if re.fullmatch(pattern, name)), None)
        if reason:
            beside.setdefault(reason, []).append(full)
        else:
            rest[name] = full
    averages = {name: rest.pop(name) for name in list(rest) if name.startswith(EMA)}
    parts = []
    for prefix in _prefixes():
        inner = {name[len(prefix) :]: full for name, full in rest.items() if name.startswith(prefix)}
        if inner and (found := _part(prefix, inner, averages)):
            parts.append(found)
            rest = {name: full for name, full in rest.items() if not name.startswith(prefix)}
    if not parts and (found := _part("", rest, {})):
        parts, rest = [found], {}
    if not parts:
        known = ", ".join(family.name for family in FAMILIES)
        raise UnknownFamilyError(
            f"{where}: the names are of no family that is known ({known}). They begin: {summary(header) or 'nothing'}."
        )
    parts.sort(key=lambda part: part.family.slot != "network")
    used = {full for part in parts for full in part.averaged.values()}
    unknown = [*rest.values(), *(full for full in averages.values() if full not in used)]
    return Recognised(tuple(parts), {reason: tuple(n) for reason, n in beside.items()}, tuple(unknown))


def described(names: Iterable[str]) -> str:
    """Unknown names, those of known parts by what they are."""
    groups: dict[str, int] = {}
    others = []
    for name in names:
        prefix = next((p for p in WITHOUT_TABLE if _clean(name).startswith(p)), None)
        if prefix is None:
            others.append(name)
        else:
            groups[prefix] = groups.get(prefix, 0) + 1
    words = [f"{prefix}* ({count}, {WITHOUT_TABLE[prefix]})" for prefix, count in groups.items()]
    return ", ".join([*words, *([summary(others)] if others else [])])


def _clean(name: str) -> str:
    name = name.replace(COMPILED, "")
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name[len(wrapper) :]
    return name


def _prefixes() -> list[str]:
    ways = [prefix for slot in PREFIXES.values() for prefix in slot.values()]
    return list(dict.fromkeys([*ways, *(f"{family.folder}/" for family in FAMILIES if family.folder)]))


def _part(prefix: str, names: Mapping[str, str], averages: Mapping[str, str]) -> Part | None:
    for family in FAMILIES:
        for layout in family.layouts:
            fits = all(any(re.match(mark, name) for name in names) for mark in layout.marks)
            keeps = [n for n in (layout.name, *layout.also) if prefix in ("", family.prefix(n))]
            if fits and keeps:
                # LitEma drops the dots: model.diffusion_model.out.2.bias is model_ema.diffusion_modelout2bias.
                dotless = {n: EMA + (prefix + n).removeprefix("model.").replace(".", "") for n in names}
                averaged = {n: averages[ema] for n, ema in dotless.items() if ema in averages}
                if len(set(averaged.values())) < len(averaged):
                    raise UnknownFamilyError(f"{prefix}*: two names are the same in the average, which drops dots.")
                return Part(family, keeps[0], prefix, names, averaged)
    return None
