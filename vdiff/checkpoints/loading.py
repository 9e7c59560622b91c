"""Tensors into a module: strictly, with a readable difference, and nothing is changed if they do not fit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from vdiff.checkpoints.inflation import globs, new_names
from vdiff.checkpoints.inflation import inflate as inflated
from vdiff.hooks import is_port_key

MAX_GROUPS = 8
EMPTY = "still on the meta device, without values"


class MismatchError(ValueError):
    """Weights that do not fit the module; nothing was changed."""


@dataclass(frozen=True)
class LoadReport:
    """What went where.

    Attributes:
        where: Name of the target, as the caller gave it.
        loaded: Names in the module that got their weights.
        ignored: Names, of the module or the file, that ``ignore`` left alone.
        outside: Names in the file that no entry of ``prefix`` takes.
        attachments: Names of attached mixins that the file does not have; they keep their values.
        new: Names of layers that an image network does not have, which keep their values.
        num_new: Their numbers in all.
        reshaped: Names of weights of images that were brought to another shape, and how.
        missing: Names in the module that the file lacks; empty if strict.
        unexpected: Names in the file that the module lacks; empty if strict.
        cast: How many were converted to another floating type.
        empty: Names in the module that are left on the meta device, such as buffers that no file holds.
    """

    where: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    attachments: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    num_new: int = 0
    reshaped: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: int = 0
    empty: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.cast:
            parts.append(f"{self.cast} of them converted to the module's type")
        if self.new:
            found = globs(self.new, {*self.loaded, *self.ignored, *self.attachments, *self.missing})
            words = ", ".join(f"{word} ({count})" for word, count in found.items())
            parts.append(f"new: {len(self.new)} tensors, {self.num_new:,} parameters: {words}")
        if self.reshaped:
            how = [
                f"{change}: {summary(n for n, c in self.reshaped.items() if c == change)}"
                for change in dict.fromkeys(self.reshaped.values())
            ]
            parts.append(f"{len(self.reshaped)} brought to another shape ({'; '.join(how)})")
        for names, text in (
            (self.attachments, "of attached mixins not in the file and kept as they are"),
            (self.ignored, "ignored"),
            (self.outside, "in the file outside the given prefixes"),
            (self.missing, "not in the file and kept as they are"),
            (self.unexpected, "in the file and not in the module"),
            (self.empty, EMPTY),
        ):
            if names:
                parts.append(f"{len(names)} {text} ({summary(names)})")
        return f"{self.where or 'module'}: {'; '.join(parts)}."


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    strict: bool = True,
    ignore: Sequence[str] = (),
    prefix: Mapping[str, str] | None = None,
    inflate: bool = False,
    where: str = "",
) -> LoadReport:
    """Copy tensors into a module's parameters and buffers, or change nothing and say why.

    What is on the meta device takes the tensors as they are, in its own type; what is tied there stays tied.

    Args:
        strict: Whether every name must be on both sides. A wrong shape and a weight that is not
            finite are errors either way, unless ignored.
        ignore: Globs over names in the module; what matches is neither loaded nor missed.
        prefix: How names in the file begin, and with what to replace it:
            ``{"model.diffusion_model.": ""}``. The longest that fits is used. Names that none
            fits are left out and counted; ``{"": ""}`` among them keeps those.
        inflate: Whether these are weights of images for a network of videos, see
            :mod:`vdiff.checkpoints.inflation`: what images have no use for is not missed, and shapes that have an
            exact counterpart fit. All else is as strict as before.
        where: Name of the target in messages.

    Raises:
        MismatchError: a readable difference, grouped by common prefix.
    """
    renamed, outside = by_prefix(tensors, prefix, where)
    reshaped: dict[str, str] = {}
    if inflate:
        renamed, reshaped = inflated(module, renamed)
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}

    def is_ignored(name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in ignore)

    both = [name for name in own if name in renamed and not is_ignored(name)]
    absent = [name for name in own if name not in renamed and not is_ignored(name)]
    attachments = [name for name in absent if is_port_key(name)]
    missing = [name for name in absent if not is_port_key(name)]
    new = new_names(module, missing, renamed) if inflate else []
    missing = [name for name in missing if name not in new]
    unexpected = [name for name in renamed if name not in own and not is_ignored(name)]
    odd = {
        "of another shape or type": [f"{name}: {spelled(renamed[name])} in the file, {spelled(own[name])} in the module"
                                     for name in both if not fits(renamed[name], own[name])],
        "not finite": [name for name in both if not _is_finite(renamed[name])],
    }  # fmt: skip
    if strict:
        odd = {"missing in the file": missing, "unexpected in the file": unexpected, **odd}
    if any(odd.values()):
        raise MismatchError(difference(where, odd, _hint(module, missing, unexpected, prefix, inflate)))
    at = spots(module)
    for name in both:
        if own[name].is_meta:
            realise(own[name], renamed[name], at)
    held = module.state_dict()
    module.load_state_dict({n: held[n] if own[n].is_meta else renamed[n] for n in both}, strict=False)
    return LoadReport(
        where,
        tuple(both),
        tuple(sorted({name for name in (*own, *renamed) if is_ignored(name)})),
        tuple(outside),
        tuple(attachments),
        tuple(new),
        sum(own[name].numel() for name in new),
        {name: how for name, how in reshaped.items() if name in both},
        () if strict else tuple(missing),
        () if strict else tuple(unexpected),
        sum(renamed[name].dtype != own[name].dtype for name in both),
        empty(module) if any(not renamed[name].is_meta for name in both) else (),
    )


def spots(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of each parameter and buffer, where it stands; if it is tied, in several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for owner in module.modules():
        for leaf, value in (*owner._parameters.items(), *owner._buffers.items()):
            if value is not None:
                found[id(value)].append((owner, leaf))
    return found


def realise(old: Tensor, value: Tensor, at: Mapping[int, list[tuple[nn.Module, str]]]) -> None:
    """A tensor in place of one on the meta device, of its type, wherever that stood by :func:`spots`."""
    value = value.to(old.dtype)
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for owner, leaf in at[id(old)]:
        setattr(owner, leaf, new)


def empty(module: nn.Module) -> tuple[str, ...]:
    """Names of parameters and buffers on the meta device."""
    return tuple(name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta)


def check_met(ignore: Sequence[str], names: Iterable[str], where: str) -> None:
    """That every glob meets a name.

    Raises:
        MismatchError: it says which does not.
    """
    names = list(names)
    for glob in ignore:
        if not any(fnmatchcase(name, glob) for name in names):
            raise MismatchError(
                f"{where}: ignore {glob!r} meets no name; nothing was changed. Names begin: {summary(names)}."
            )


def by_prefix(
    tensors: Mapping[str, Tensor], prefix: Mapping[str, str] | None, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by new names, and the names that no prefix takes."""
    if not prefix:
        return dict(tensors), []
    renamed: dict[str, Tensor] = {}
    outside = []
    for name, value in tensors.items():
        begin = max((p for p in prefix if name.startswith(p)), key=len, default=None)
        if begin is None:
            outside.append(name)
            continue
        new = prefix[begin] + name[len(begin) :]
        if new in renamed:
            raise MismatchError(f"{where or 'module'}: the prefixes {dict(prefix)} give two tensors the name {new!r}.")
        renamed[new] = value
    if not renamed:
        raise MismatchError(
            f"{where or 'module'}: no name in the file begins with {' or '.join(map(repr, prefix))}. "
            f"They begin: {summary(tensors)}."
        )
    return renamed, outside


def fits(new: Tensor, old: Tensor) -> bool:
    """Whether a tensor may be copied into another."""
    return new.shape == old.shape and new.is_floating_point() == old.is_floating_point()


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or value.is_meta or bool(value.float().isfinite().all())


def spelled(value: Tensor) -> str:
    """Shape and type in words."""
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def summary(names: Iterable[str]) -> str:
    """Names grouped by their common beginnings: ``input_blocks.* (88), out.0.weight, ...``."""
    names = list(names)
    groups: dict[str, list[str]] = {}
    for depth in (4, 3, 2, 1):
        groups = defaultdict(list)
        for name in names:
            groups[".".join(name.split(".")[:depth])].append(name)
        if len(groups) <= MAX_GROUPS:
            break
    words = [f"{key}.* ({len(found)})" if len(found) > 1 else found[0] for key, found in groups.items()]
    more = f", and {len(words) - MAX_GROUPS} groups more" if len(words) > MAX_GROUPS else ""
    return ", ".join(words[:MAX_GROUPS]) + more


def difference(where: str, odd: Mapping[str, list[str]], hint: str) -> str:
    """The text of an error: what is odd, by reason, and what to do."""
    lines = [f"{where or 'module'}: the weights do not fit; nothing was changed."]
    for text, names in odd.items():
        if not names:
            continue
        if text == "of another shape or type":
            more = f"; and {len(names) - MAX_GROUPS} more" if len(names) > MAX_GROUPS else ""
            lines.append(f"  {len(names)} {text}: {'; '.join(names[:MAX_GROUPS])}{more}")
        else:
            lines.append(f"  {len(names)} {text}: {summary(names)}")
    return "\n".join([*lines, f"  {hint}"])


def _hint(
    module: nn.Module, missing: list[str], unexpected: list[str], prefix: Mapping[str, str] | None, inflate: bool
) -> str:
    """What to do; where names differ by their beginning, by which."""
    votes: Counter[str] = Counter()
    if not prefix:
        wanted = set(missing)
        for name in unexpected[:2000]:
            steps = name.split(".")
            for i in range(1, len(steps)):
                if ".".join(steps[i:]) in wanted:
                    votes[".".join(steps[:i]) + "."] += 1
                    break
    if votes:
        best, count = votes.most_common(1)[0]
        return f'{count} names would fit without {best!r}: prefix {{"{best}": ""}} takes it off.'
    if not inflate and new_names(module, missing, ()):
        return "Weights of an image network for one of videos? Then `inflate` keeps what is new as it was built."
    return "Name what may differ with `ignore` (globs), or turn `strict` off to load what is on both sides."
