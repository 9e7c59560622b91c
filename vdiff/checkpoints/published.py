"""A published checkpoint into an engine: every part to its place, tensor by tensor, and strictly.

Nothing is changed if the weights do not fit.

File and engine are recognised alike, and their parts go together by what they are for: the network, the first stage,
the first text tower, the second. Every key of the file must arrive somewhere, and every weight of the engine come from
somewhere, but for weights that nothing reads: a module says which these are by a method ``idle_weights()``, globs over
the names below it.

What a folder of diffusers' says of itself besides is compared, see :mod:`vdiff.checkpoints.stated`: another number of
heads does not fit, and another language, noise or scale is warned of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from vdiff.checkpoints.arrival import Arrival, PublishedReport
from vdiff.checkpoints.loading import (
    MismatchError,
    check_met,
    difference,
    empty,
    fits,
    realise,
    spelled,
    spots,
    summary,
)
from vdiff.checkpoints.matching import matched
from vdiff.checkpoints.parts import Given
from vdiff.checkpoints.recognition import ONLY_THERE, Part, UnknownFamilyError, recognise
from vdiff.checkpoints.sources import WeightSource, open_weights
from vdiff.checkpoints.stated import SCHEDULER, other_heads, other_noise, other_scale, read_config
from vdiff.checkpoints.translation import Translation
from vdiff.hooks import is_port_key
from vdiff.registry import did_you_mean

BY_CONFIG = (
    "Build the network with other num_heads or head_dim; a weight file opened by its own name says nothing of heads."
)


def load_published(
    module: nn.Module,
    source: str | Path | WeightSource,
    into: str = "",
    *,
    weights: str = "ema",
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    given: Mapping[str, int] | None = None,
) -> PublishedReport:
    """Fill an engine, or a part of one, from a checkpoint in its original layout or in diffusers'.

    The file is mapped and read one tensor after the other, twice: to see that all are finite, and to copy.

    Args:
        module: The engine, or one of its networks, first stages or embedders alone. On the meta device it takes the
            tensors as they are, in its own type.
        source: A file, an index of shards, or a folder of diffusers'.
        into: Of the module's parts, those below this name alone; what else the file has is left out then.
        weights: ``ema`` takes the exponential average where the file has one, ``raw`` does not.
        ignore: Globs over names in the module, below ``into``, that are left alone.
        leave_out: How names in the file begin that are left out.
        given: What names and shapes do not tell, see :class:`vdiff.checkpoints.architecture.Told`.

    Raises:
        UnknownFamilyError: the names of the file, or of the module, are of no published family.
        KeyMapError, MismatchError: they do not fit; a readable difference. Nothing was changed then.
        ValueError: no such module, or something ignored, left out or given that meets nothing. Nor then.
        OSError: reading failed. Of the second time it says that the module is half filled.

    Warns:
        UserWarning: once, of all that a folder says of itself and the module is not, but for what is refused.
    """
    pairs, report = _fit(module, source, into, weights, ignore, leave_out, given)
    _warn(report)
    for pair in pairs:
        for _ in pair.tensors():  # which looks at each
            pass
    at = spots(module)
    try:
        for pair in pairs:
            pair.fill(module, at)
    except OSError as error:
        raise OSError(
            f"{report.where}: reading failed and the module is half filled; build it anew. {error}"
        ) from error
    begin = f"{into}." if into else ""
    return replace(report, empty=tuple(begin + name for name in empty(module.get_submodule(into))))


def check_published(
    module: nn.Module, source: str | Path | WeightSource, into: str = "", *, ignore: Sequence[str] = ()
) -> PublishedReport:
    """What :func:`load_published` would say, by names and shapes alone; no weight is read."""
    _, report = _fit(module, source, into, ignore=ignore)
    _warn(report)
    return report


def _warn(report: PublishedReport) -> None:
    """Before anything is changed, for a warning may be made an error."""
    if report.otherwise:
        lines = "\n  ".join(report.otherwise)
        warnings.warn(
            f"{report.where}: the weights fit, but their folder says of itself what this is not. Where that is not "
            f"meant, change the config, or samples will be wrong.\n  {lines}",
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Pair:
    """A part of the file and the one of the module that it is for.

    Attributes:
        own: Names within the part to names in the module, of those that are filled.
    """

    translation: Translation
    part: Part
    own: Mapping[str, str]
    held: Mapping[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By names in the module."""
        for name, value in self.translation.tensors():
            if name in self.own:
                yield self.own[name], value

    @torch.no_grad()
    def fill(self, module: nn.Module, at: Mapping[int, list[tuple[nn.Module, str]]]) -> None:
        for name, value in self.tensors():
            if self.held[name].is_meta:
                realise(self.held[name], value, at)
            else:
                self.held[name].copy_(value)
        if self.part.slot not in ("network", "first_stage", "control"):
            tower = module.get_submodule(self.part.prefix.rstrip("."))
            tower.load_state_dict(tower.state_dict())  # an embedder forgets what it remembers when weights come

    @property
    def arrival(self) -> Arrival:
        names, came = tuple(self.own.values()), self.translation.part
        return Arrival(
            self.part.prefix.rstrip("."), self.part.family.name, came.layout, came.prefix, names,
            sum(self.held[name].numel() for name in names),
            sum(self.held[full].dtype != self.translation.described[name].dtype for name, full in self.own.items()),
            self.translation.is_averaged,
        )  # fmt: skip


def _fit(
    module: nn.Module,
    source: str | Path | WeightSource,
    into: str = "",
    weights: str = "ema",
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    given: Mapping[str, int] | None = None,
) -> tuple[list[_Pair], PublishedReport]:
    """How a file fills a module, or an error if it does not."""
    source = source if isinstance(source, WeightSource) else open_weights(source)
    where = f"{source.path}{f' into {into}' if into else ''}"
    if weights not in ("ema", "raw"):
        raise ValueError(f"{where}: weights is 'ema' or 'raw', got {weights!r}.")
    own_all = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not is_port_key(name)
    }
    _check_into(module, into, own_all, where)
    begin = f"{into}." if into else ""
    held = {name: value for name, value in own_all.items() if name.startswith(begin)}
    check_met(ignore, [name.removeprefix(begin) for name in held], where)
    for start in leave_out:
        if not any(name.startswith(start) for name in source.header):
            names = summary(source.header)
            raise MismatchError(f"{where}: leave_out {start!r} meets no name in the file. They begin: {names}.")
    given = Given(given)
    put_aside = [name for name in source.header if leave_out and name.startswith(tuple(leave_out))]
    there = recognise({n: v for n, v in source.header.items() if n not in set(put_aside)}, str(source.path))
    here = recognise(held, f"{into or type(module).__name__}, which is to be filled", {})
    ignored = {name for name in held if _any(name.removeprefix(begin), ignore)}
    idle = _idle(module)

    pairs: list[_Pair] = []
    missing, misfits = [*here.unknown], []
    used: set[str] = set()
    alone: set[str] = set()  # in the file, and not in the part of the module that it is for
    for part, came in matched(here.parts, there.parts, where):
        if came is None:
            missing += part.names.values()
            continue
        plan = Translation(source, came, "vdiff", weights, given)
        own = {n: full for n, full in part.names.items() if n in plan.described and full not in ignored}
        missing += [full for n, full in part.names.items() if n not in own]
        taken = [n for n, full in part.names.items() if n in plan.origin and (n in own or full in ignored)]
        used |= {came.names[inner] for n in taken for inner in plan.origin[n]} | set(plan.left_out)
        alone |= {came.names[inner] for n in plan.described.keys() - part.names for inner in plan.origin[n]}
        misfits += [
            f"{full}: {spelled(plan.described[n])} in the file, {spelled(held[full])} in the module"
            for n, full in own.items()
            if not fits(plan.described[n], held[full])
        ]
        pairs.append(_Pair(plan, part, own, held))
    given.check(where)
    unused = {file for part in there.parts for file in part.names.values()} - used | set(there.unknown)
    is_part = bool(into) or any(part.prefix == "" for part in here.parts)
    elsewhere = unused - alone if is_part else set()
    absent = [name for name in missing if name not in ignored]
    odd = {
        "missing in the file": [name for name in absent if not _any(name, idle)],
        "in the file and without a place": sorted(unused - elsewhere),
        "of another shape or type": misfits,
    }
    heads, otherwise = _stated(module, source.path, pairs, not into)
    if any((odd | heads).values()):
        hint = "Of the module, `ignore` (globs) leaves names alone; of the file, `leave_out` (how they begin) leaves "
        hint += "them out; `into` fills a part alone."
        if there.layout == "vdiff" and any(name in source.header for name in odd["missing in the file"]):
            hint = "The file has some by these very names; load_into(...) takes a file by our names."
        if heads:
            hint = f"{BY_CONFIG}\n  {hint}" if any(odd.values()) else BY_CONFIG
        raise MismatchError(difference(where, odd | heads, hint))
    left_out = tuple(name for pair in pairs for name in pair.translation.left_out)
    return pairs, PublishedReport(
        where,
        tuple(pair.arrival for pair in pairs),
        {**there.beside, **({ONLY_THERE: left_out} if left_out else {})},
        tuple(name for name in absent if _any(name, idle)),
        tuple(sorted(ignored)),
        (*put_aside, *sorted(elsewhere)),
        otherwise=otherwise,
    )


def _stated(
    module: nn.Module, folder: Path, pairs: Sequence[_Pair], is_whole: bool
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """What a folder of diffusers' says that the module is not: heads, and what is warned of."""
    heads: dict[str, list[str]] = {}
    otherwise: list[str] = []
    for pair in pairs if folder.is_dir() else ():
        came, slot, name = pair.translation.part, pair.part.slot, pair.part.prefix.rstrip(".")
        if came.layout != "diffusers" or slot not in ("network", "first_stage", "control"):
            continue
        part = module.get_submodule(name)
        if config := read_config(folder, f"{came.prefix}config.json"):
            heads |= other_heads(config, part, pair.translation.origin, pair.part.prefix, pair.own)
            otherwise += other_scale(config, part, name or type(module).__name__) if slot == "first_stage" else ()
        if slot == "network" and is_whole and (config := read_config(folder, SCHEDULER)):
            otherwise += other_noise(config, module)
    return heads, tuple(otherwise)


def _check_into(module: nn.Module, into: str, own: Mapping[str, Tensor], where: str) -> None:
    """That it is there, and a whole part or above one."""
    try:
        module.get_submodule(into)
    except AttributeError:
        hint = did_you_mean(into, [name for name, _ in module.named_modules() if name])
        raise ValueError(f"{where}: the module has no {into!r}.{hint}") from None
    if not into:
        return
    try:
        parts = recognise(own, where, {}).parts
    except UnknownFamilyError:
        return
    if any(f"{into}.".startswith(part.prefix) and f"{into}." != part.prefix for part in parts):
        whole = ", ".join(part.prefix.rstrip(".") or "the module" for part in parts)
        raise ValueError(f"{where}: {into} is below a part, and parts are filled whole. There are: {whole}.")


def _idle(module: nn.Module) -> tuple[str, ...]:
    """Globs over names of weights that nothing reads."""
    found: list[str] = []
    for name, owner in module.named_modules():
        said: Callable[[], Iterable[str]] = getattr(owner, "idle_weights", tuple)
        found += [f"{name}.{glob}" if name else glob for glob in said()]
    return tuple(found)


def _any(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
