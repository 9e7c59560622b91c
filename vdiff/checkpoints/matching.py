"""Which part of a published checkpoint is for which part of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vdiff.checkpoints.loading import MismatchError
from vdiff.checkpoints.recognition import Part


def matched(here: Sequence[Part], there: Sequence[Part], where: str) -> Iterator[tuple[Part, Part | None]]:
    """Each part of a module and the one of the file that is for it."""
    free = list(there)
    for part in here:
        came = next((one for one in free if one.slot == part.slot), None)
        if came is None or part.prefix == "" or came.prefix == "":  # alone, it does not say what it is for
            came = next((one for one in free if is_alike(one, part)), came)
        if came is None:
            yield part, None
            continue
        if not is_alike(came, part):
            raise MismatchError(
                f"{where}: the weights do not fit; nothing was changed. {came.prefix or 'The file'}"
                f"{'*' if came.prefix else ''} is {came.family.name} ({came.layout}), and "
                f"{part.prefix.rstrip('.') or 'the module'} is {part.family.name}."
            )
        free.remove(came)
        yield part, replace(came, family=part.family)


def is_alike(came: Part, part: Part) -> bool:
    if came.family is part.family:
        return True
    # transformers' names do not tell by whom a text tower is.
    if {came.family.slots, part.family.slots} != {("text",)} or came.layout != "diffusers":
        return False
    return part.family.layout("diffusers").has_marks(came.names)
