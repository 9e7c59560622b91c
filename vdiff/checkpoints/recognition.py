"""What a checkpoint is, by the names and shapes in it; no weight is read.

Every name is in one of three: a part of a family that has a table, something beside the weights that nobody needs, or
unknown. Unknown names are never passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vdiff.checkpoints.families import FAMILIES, Family
from vdiff.checkpoints.loading import summary
from vdiff.checkpoints.places import NUMBERS, PLACES, places_in
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

ONLY_THERE = "which its layout alone has"  # why a name is left out that a family's table knows

SLOTS = tuple(PLACES)  # the network first

# Places of what may have no table, such as a text tower of another kind: known, and said by name.
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
class Seat:
    """What a place may be: a slot of a layout, and the embedder's number there."""

    slot: str
    layout: str
    number: int


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint.

    Attributes:
        prefix: As found; ``""`` where the file is this part alone.
        names: Names within the part to names in the file.
        averaged: The same to names of the exponential average, where the file has one.
        seats: What it may be, the most likely first: some layouts write a family alike.
    """

    family: Family
    prefix: str
    names: Mapping[str, str]
    averaged: Mapping[str, str]
    seats: tuple[Seat, ...]

    @property
    def layout(self) -> str:
        return self.seats[0].layout

    @property
    def slot(self) -> str:
        return self.seats[0].slot

    @property
    def number(self) -> int:
        return self.seats[0].number


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


def recognise(
    header: Mapping[str, Tensor], where: str = "checkpoint", beside: Mapping[str, str] = BESIDE
) -> Recognised:
    """What a checkpoint is, by names and shapes.

    Args:
        header: Names to tensors, on any device; only their shapes are looked at.
        beside: Patterns of names that nobody needs, and why. A module needs all of its own: none there.

    Raises:
        UnknownFamilyError: no family fits; the message lists how the names begin.
    """
    clean = {_clean(name): name for name in header}
    if len(clean) < len(header):
        raise UnknownFamilyError(f"{where}: some names differ by what a wrapper puts before them, and by nothing else.")
    needless: dict[str, list[str]] = {}
    rest = {}
    for name, full in clean.items():
        reason = next((reason for pattern, reason in beside.items() if re.fullmatch(pattern, name)), None)
        if reason:
            needless.setdefault(reason, []).append(full)
        else:
            rest[name] = full
    averages = {name: rest.pop(name) for name in list(rest) if name.startswith(EMA)}
    parts = []
    folders = {family.folder: family.slots[0] for family in FAMILIES if family.folder}
    for prefix, seats in places_in(rest, folders):
        inner = {name[len(prefix) :]: full for name, full in rest.items() if name.startswith(prefix)}
        if found := _part(prefix, inner, averages, header, [Seat(*seat) for seat in seats]):
            parts.append(found)
            rest = {name: full for name, full in rest.items() if not name.startswith(prefix)}
    if not parts and (found := _part("", rest, {}, header)):
        parts, rest = [found], {}
    if not parts:
        known = ", ".join(family.name for family in FAMILIES)
        raise UnknownFamilyError(
            f"{where}: the names are of no family that is known ({known}). They begin: {summary(header) or 'nothing'}."
        )
    parts = _shared(_agreeing(sorted(parts, key=lambda part: (SLOTS.index(part.slot), part.number))))
    used = {full for part in parts for full in part.averaged.values()}
    unknown = [*rest.values(), *(full for full in averages.values() if full not in used)]
    return Recognised(tuple(parts), {reason: tuple(n) for reason, n in needless.items()}, tuple(unknown))


def is_by_others(header: Mapping[str, Tensor]) -> bool:
    """Whether a file is written by others: a known family in another layout than ours, or one part of it alone with
    more beside it than weights. What is by our names may have a ``loss.`` that is the engine's."""
    try:
        found = recognise(header)
    except UnknownFamilyError:
        return False
    return found.layout != "vdiff" or (found.parts[0].prefix == "" and bool(found.beside))


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


def _part(
    prefix: str,
    names: Mapping[str, str],
    averages: Mapping[str, str],
    header: Mapping[str, Tensor],
    seats: Iterable[Seat] | None = None,
) -> Part | None:
    """The family of these names, at a place of some seats or, without any, alone."""
    tensors = {name: header[full] for name, full in names.items()}
    for family in FAMILIES:
        here: list[Seat] = []
        for layout in family.layouts:
            written = (layout.name, *layout.also)
            alone = [Seat(family.slots[0], name, 0) for name in written]
            may = [s for s in (alone if seats is None else seats) if s.layout in written and s.slot in family.slots]
            here += sorted(may, key=lambda seat: written.index(seat.layout)) if may and layout.is_of(tensors) else []
        if here:
            # LitEma drops the dots: model.diffusion_model.out.2.bias is model_ema.diffusion_modelout2bias.
            dotless = {n: EMA + (prefix + n).removeprefix("model.").replace(".", "") for n in names}
            averaged = {n: averages[ema] for n, ema in dotless.items() if ema in averages}
            if len(set(averaged.values())) < len(averaged):
                raise UnknownFamilyError(f"{prefix}*: two names are the same in the average, which drops dots.")
            return Part(family, prefix, names, averaged, tuple(here))
    return None


def _agreeing(parts: list[Part]) -> list[Part]:
    """The parts, each in the layout that all of them may be in, if there is one."""
    layouts = [[seat.layout for seat in part.seats] for part in parts]
    common = next((name for name in layouts[0] if all(name in others for others in layouts)), None)
    if common is None:
        return parts
    return [replace(part, seats=tuple(sorted(part.seats, key=lambda seat: seat.layout != common))) for part in parts]


def _shared(parts: list[Part]) -> list[Part]:
    """And, in diffusers' pipeline of Stable Video Diffusion, the condition's first stage, which shares the encoder with
    the data's. :func:`vdiff.checkpoints.conversion.convert` makes one of the two again."""
    by_slot = {part.slot: part for part in parts}
    stage, is_whole = by_slot.get("first_stage"), {"network", "picture"} <= by_slot.keys()
    if stage is None or not is_whole or stage.family.name != "temporal_decoder" or stage.layout != "diffusers":
        return parts
    names = {n: full for n, full in stage.names.items() if n.startswith(("encoder.", "quant_conv."))}
    (family,) = (family for family in FAMILIES if family.name == "autoencoder_kl")
    seat = Seat("condition_stage", "diffusers", NUMBERS["condition_stage"])
    return [*parts, Part(family, stage.prefix, names, {}, (seat,))]
