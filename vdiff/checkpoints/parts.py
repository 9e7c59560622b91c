"""Parts of a checkpoint by our names, out of whatever layout it is in, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdiff.checkpoints.architecture import Told
from vdiff.checkpoints.keymap import KeyMapError
from vdiff.checkpoints.places import prefix
from vdiff.checkpoints.recognition import UnknownFamilyError, described, recognise
from vdiff.checkpoints.sources import WeightSource
from vdiff.checkpoints.translation import Translation


def read_part(source: WeightSource, slot: str) -> tuple[str, dict[str, Tensor]] | None:
    """The layout and, by our names, the tensors of what stands at a slot, alone or beside others; None: nothing does.

    Args:
        slot: Of :data:`vdiff.checkpoints.places.PLACES`.

    Raises:
        KeyMapError: names within it that have no place here, or of which some are missing.
        MismatchError: shapes that contradict each other, or weights that are not finite.
    """
    try:
        parts = recognise(source.header, str(source.path)).parts
    except UnknownFamilyError:
        return None
    part = next((part for part in parts if part.slot == slot), None)
    return None if part is None else (part.layout, dict(Translation(source, part, "vdiff").tensors()))


class Given(dict[str, int]):
    """What names and shapes do not tell, which knows whether a table asked for it."""

    def __init__(self, given: Mapping[str, int] | None = None) -> None:
        super().__init__(given or {})
        self.asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def check(self, where: str) -> None:
        """That all of it was needed.

        Raises:
            ValueError: it says what was not.
        """
        if idle := self.keys() - self.asked:
            told = ", ".join(sorted(idle))
            raise ValueError(
                f"{where}: given {told}, which nothing here asks for; names and shapes tell. Leave it out."
            )


def read_parts(
    source: WeightSource, below: str = "", weights: str = "ema", given: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """The tensors of all parts, by the names that an engine gives them.

    Args:
        below: How the names begin of those that are wanted, such as ``denoiser.network.``; the rest is not read.
        weights, given: See :class:`~vdiff.checkpoints.translation.Translation`.

    Raises:
        UnknownFamilyError: no part is known, none of them is wanted, or all are and there are names besides.
        KeyMapError, MismatchError: as with :func:`read_part`.
        ValueError: something was given that nothing asks for.
    """
    found = recognise(source.header, str(source.path))
    places = {prefix("vdiff", part.slot, part.number): part for part in found.parts}
    wanted = {place: part for place, part in places.items() if place.startswith(below)}
    if not wanted or (found.unknown and not below):
        known = ", ".join(f"{place}* ({part.family.name}, {part.layout})" for place, part in places.items())
        odd = f"; unknown: {described(found.unknown)}" if found.unknown else ""
        raise UnknownFamilyError(f"{source.path}: looked for {below or 'known parts only'}; it holds {known}{odd}.")
    given = Given(given)
    plans = {place: Translation(source, part, "vdiff", weights, given) for place, part in wanted.items()}
    given.check(str(source.path))
    return {place + name: value for place, plan in plans.items() for name, value in plan.tensors()}


def translated(tensors: Mapping[str, Tensor], layout: str, where: str) -> dict[str, Tensor]:
    """Tensors of one part by our names, in another layout.

    Raises:
        UnknownFamilyError: they are of none.
        ValueError: the family is not written so.
        KeyMapError: names that have no place there.
    """
    (part,) = recognise(tensors, where).parts
    target = part.family.layout(layout)
    try:
        return target.table(Told(tensors))(tensors)
    except KeyMapError as error:
        raise KeyMapError(f"{where} ({part.family.name}), to {layout}: {error}") from error
