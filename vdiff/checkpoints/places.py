"""Where the layouts keep the parts of a whole checkpoint.

A place is what names begin with, the slash being a folder's. ``{n}`` is the number of an embedder, which generative
models and vdiff count alike; others have a fixed place for the first of a kind, and some for the second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

CRAFTERS = ("lvdm", "dynamicrafter", "dynamicrafter_256")
ORIGINALS = ("sgm", "ldm", *CRAFTERS, "sat")
EMBEDDER = "conditioner.embedders.{n}."

# By slot and layout; several are of the first, the second, ...
PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "network": {
        "vdiff": ("denoiser.network.",),
        "diffusers": ("unet/",),
        **dict.fromkeys(ORIGINALS, ("model.diffusion_model.",)),
    },
    "first_stage": {
        "vdiff": ("first_stage.",),
        "diffusers": ("vae/",),
        **dict.fromkeys(ORIGINALS, ("first_stage_model.",)),
    },
    "text": {
        **dict.fromkeys(("vdiff", "sgm", "sat"), (EMBEDDER,)),
        **dict.fromkeys(("ldm", *CRAFTERS), ("cond_stage_model.",)),
        "diffusers": ("text_encoder/", "text_encoder_2/"),
    },
    "picture": {"vdiff": (EMBEDDER,), "sgm": (f"{EMBEDDER}open_clip.",), "diffusers": ("image_encoder/",)},
    "control": {
        **dict.fromkeys(("vdiff", "ldm", "sgm"), ("control_model.",)),
        "diffusers": ("controlnet/",),
    },
    # The first stage that a condition goes through, where it is not that of the data.
    "condition_stage": {"vdiff": (f"{EMBEDDER}first_stage.",), "sgm": (f"{EMBEDDER}encoder.",)},
    # A picture as a few tokens: a tower, and what makes the tokens of what it says.
    "tokens_tower": {"vdiff": (f"{EMBEDDER}tower.",), **dict.fromkeys(CRAFTERS, ("embedder.",))},
    "tokens": {"vdiff": (f"{EMBEDDER}resampler.",), **dict.fromkeys(CRAFTERS, ("image_proj_model.",))},
}
# The embedder's number where a layout writes none.
NUMBERS = {"tokens_tower": 1, "tokens": 1, "condition_stage": 3}


def prefix(layout: str, slot: str, number: int | None = None, order: int = 0) -> str:
    """What names of a slot begin with.

    Args:
        number: Of the embedder, by default the usual one; for layouts that number them.
        order: Whether it is the first of its slot, the second, ...; for layouts that do not.

    Raises:
        ValueError: the layout has no place for it.
    """
    places = PLACES[slot].get(layout, ())
    if places and "{n}" in places[0]:
        return places[0].format(n=NUMBERS.get(slot, 0) if number is None else number)
    if order >= len(places):
        raise ValueError(f"the layout {layout!r} has {len(places) or 'no'} place for {slot.replace('_', ' ')}.")
    return places[order]


def places_in(
    names: Collection[str], folders: Mapping[str, str]
) -> Iterator[tuple[str, tuple[tuple[str, str, int], ...]]]:
    """Every place that names begin with, the longer before the shorter; of each, the slots, layouts and numbers that
    have it.

    Args:
        folders: Of diffusers, which families have besides, and their slots.
    """
    found: dict[str, list[tuple[str, str, int]]] = {}
    for slot, layout, pattern, seat in _patterns(folders):
        expression = re.compile(re.escape(pattern).replace(r"\{n\}", r"(\d+)"))
        seen = {match[0]: match for name in names if (match := expression.match(name))}
        for place, match in seen.items():
            number = int(match[1]) if match.groups() else seat + NUMBERS.get(slot, 0)
            found.setdefault(place, []).append((slot, layout, number))
    for place in sorted(found, key=lambda place: (-len(place), place)):
        yield place, tuple(found[place])


def _patterns(folders: Mapping[str, str]) -> Iterator[tuple[str, str, str, int]]:
    for slot, layouts in PLACES.items():
        for layout, places in layouts.items():
            for seat, pattern in enumerate(places):
                yield slot, layout, pattern, seat
    for folder, slot in folders.items():
        yield slot, "diffusers", f"{folder}/", 0
