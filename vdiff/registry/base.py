"""The registry: a class is known by name from the moment it is defined.

A *kind* is a section (``sampler``), a *name* an entry in it (``heun``). A kind's contract
declares itself with ``kind=``; every concrete subclass is then an entry under its name in
snake case without the kind's suffix, or under the ``name=`` it asks for::

    class Sampler(Registered, kind="sampler"): ...          # a contract, not an entry
    class EulerAncestralSampler(Sampler): ...               # sampler/euler_ancestral
    class Mine(Sampler, name="mine", aliases=("m",)): ...   # sampler/mine, also as sampler/m

Rooms are imported on the first look-up of their kind, so that ``import vdiff`` stays light.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Where a kind lives. The first look-up of a kind imports its room; a plugin's own kinds need no row.
ROOMS = {
    "schedule": "vdiff.process",
    "parameterization": "vdiff.process",
    "sigma_sampler": "vdiff.process",
    "discretizer": "vdiff.process",
    "boundary": "vdiff.process",
    "network": "vdiff.networks",
    "loss": "vdiff.losses",
    "weighting": "vdiff.losses",
    "dataset": "vdiff.data",
    "derived_map": "vdiff.data",
    "first_stage": "vdiff.first_stages",
    "denoiser": "vdiff.denoisers",
    "conditioner": "vdiff.conditioners",
    "embedder": "vdiff.conditioners",
    "sampler": "vdiff.samplers",
    "guider": "vdiff.samplers",
    "noise_source": "vdiff.samplers",
    "mixin": "vdiff.mixins",
    "engine": "vdiff.engine",
    "metric": "vdiff.evaluation",
    "optimizer": "vdiff.training",
    "lr_schedule": "vdiff.training",
    "logger": "vdiff.training",
    "training": "vdiff.training",
}

PLUGIN_GROUP = "vdiff.plugins"


class RegistryError(ValueError):
    """A name that is taken, or unknown."""


@dataclass(frozen=True)
class Entry:
    """One registered class or factory, and where it was written."""

    kind: str
    name: str
    target: Callable[..., Any]
    file: str
    aliases: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """How the code calls it; a partial or another nameless factory goes by its name here."""
        return getattr(self.target, "__qualname__", self.name)

    @property
    def where(self) -> str:
        return f"{self.target.__module__}.{self.title} ({self.file})"

    def is_same_source(self, other: Entry) -> bool:
        """Whether defining it again is a re-run of the same code, which replaces the old one."""
        return (self.file, self.title) == (other.file, other.title)


_entries: dict[str, dict[str, Entry]] = {}
_contracts: dict[str, Entry] = {}
_plugins_loaded = False


def snake_case(name: str) -> str:
    """``EulerAncestral`` -> ``euler_ancestral``, ``EDMSchedule`` -> ``edm_schedule``."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


def _source_file() -> str:
    """The file whose code runs the definition; notebook cells and prompts are one file."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "abc"):
        frame = frame.f_back
    if frame is None:
        return "<unknown>"
    file = frame.f_code.co_filename
    if frame.f_globals.get("__name__") == "__main__" and not os.path.exists(file):
        return "<interactive>"
    return os.path.realpath(file) if os.path.exists(file) else file


def _add(table: dict[str, Entry], entry: Entry) -> None:
    if isinstance(entry.aliases, str):
        raise TypeError(f"{entry.title}: aliases are a tuple of names, got the text {entry.aliases!r}.")
    names = (entry.name, *entry.aliases)
    for name in names:
        taken = table.get(name)
        if taken is not None and not taken.is_same_source(entry):
            raise RegistryError(
                f"{entry.kind}/{name} is taken: {taken.where} holds it, and {entry.where} asks for it. "
                f"Give one of them another name: class {entry.title}(..., name='...')."
            )
    replaced = table.get(entry.name)
    for name in [name for name, old in table.items() if old is replaced]:
        del table[name]  # its aliases go with it
    table.update(dict.fromkeys(names, entry))


class RegistryMeta(ABCMeta):
    """Registers class *statements*; classes that torch makes at run time stay out of the table."""

    kind: str | None
    registered_name: str | None

    def __new__(
        mcls,
        class_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        *,
        kind: str | None = None,
        name: str | None = None,
        aliases: tuple[str, ...] = (),
        abstract: bool = False,
        **kwargs: Any,
    ) -> RegistryMeta:
        cls = super().__new__(mcls, class_name, bases, namespace, **kwargs)
        # `class` puts __qualname__ into the namespace; type(...) as in fully_shard and parametrize does not.
        is_statement = "__qualname__" in namespace
        if is_statement and "kind" in namespace:
            raise TypeError(
                f"{class_name}.kind is the registry's word. A contract says class {class_name}(..., kind='...')."
            )
        if kind is not None:
            cls.kind = kind
            cls.registered_name = None
            if is_statement:
                _add(_contracts, Entry("kind", kind, cls, _source_file()))
            return cls
        cls.kind = getattr(cls, "kind", None)
        if not is_statement or cls.kind is None:
            return cls
        cls.registered_name = None
        if abstract or inspect.isabstract(cls):
            return cls
        cls.registered_name = name or _default_name(class_name, cls.kind)
        _add(_entries.setdefault(cls.kind, {}), Entry(cls.kind, cls.registered_name, cls, _source_file(), aliases))
        return cls

    def __init__(cls, class_name: str, bases: tuple, namespace: dict, /, **kwargs: Any) -> None:
        super().__init__(class_name, bases, namespace)


def _default_name(class_name: str, kind: str) -> str:
    name = snake_case(class_name)
    suffix = "_" + kind
    return name[: -len(suffix)] if name.endswith(suffix) and name != suffix else name


class Registered(metaclass=RegistryMeta):
    """Base of every contract; see the module's text."""

    if TYPE_CHECKING:

        def __init_subclass__(
            cls,
            *,
            kind: str | None = None,
            name: str | None = None,
            aliases: tuple[str, ...] = (),
            abstract: bool = False,
        ) -> None: ...


def register(kind: str, name: str, aliases: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register a foreign class or a factory: ``register("network", "my_unet")(UNet2DModel)``.

    Its signature is its schema, like that of any other entry.
    """

    file = _source_file()

    def add(target: Callable) -> Callable:
        _add(_entries.setdefault(kind, {}), Entry(kind, name, target, file, aliases))
        return target

    return add


def _import_room(kind: str) -> None:
    global _plugins_loaded
    if kind in ROOMS:
        importlib.import_module(ROOMS[kind])
    if not _plugins_loaded:
        from importlib.metadata import entry_points

        _plugins_loaded = True
        for point in entry_points(group=PLUGIN_GROUP):
            try:
                point.load()
            except Exception as error:  # a broken plugin must not break the library
                warnings.warn(f"plugin {point.name!r} ({point.value}) could not be imported: {error!r}", stacklevel=3)


def kinds() -> list[str]:
    """All kinds, those of plugins included."""
    _import_room("")
    return sorted({*ROOMS, *_contracts, *_entries})


def contract(kind: str) -> type | None:
    """The abstract class that declares a kind."""
    _import_room(kind)
    return _contracts[kind].target if kind in _contracts else None  # type: ignore[return-value]


def entries(kind: str) -> dict[str, Entry]:
    """The entries of a kind by name, aliases left out."""
    _import_room(kind)
    if kind not in ROOMS and kind not in _entries and kind not in _contracts:
        raise RegistryError(f"no kind is called {kind!r}.{did_you_mean(kind, kinds())} Kinds: {', '.join(kinds())}.")
    table = _entries.get(kind, {})
    return {name: table[name] for name in sorted(table) if name == table[name].name}


def lookup(kind: str, name: str) -> Entry:
    """The entry under a name or an alias.

    Raises:
        RegistryError: no such name; it lists the known ones and the nearest spelling.
    """
    known = entries(kind)
    table = _entries.get(kind, {})
    if isinstance(name, str) and name in table:
        return table[name]
    hint = did_you_mean(str(name), table)
    if "." in str(name) and not hint:
        hint = " A config imports nothing: register the class, and name its module under `imports:`."
    raise RegistryError(f"no {kind} is called {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


def did_you_mean(name: str, known: Any) -> str:
    """`` Did you mean 'width'?`` or nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


@contextmanager
def isolated() -> Iterator[None]:
    """What is registered inside is forgotten outside: for tests and documentation."""
    _import_room("")  # plugins load once, so what they bring must not be forgotten
    before = {kind: dict(table) for kind, table in _entries.items()}
    contracts_before = dict(_contracts)
    try:
        yield
    finally:
        for kind, table in list(_entries.items()):
            _restore(table, before.get(kind, {}))
            if not table:
                del _entries[kind]
        _restore(_contracts, contracts_before)


def _restore(table: dict[str, Entry], before: dict[str, Entry]) -> None:
    # Rooms imported meanwhile stay imported, so their entries must stay known.
    ours = {name: entry for name, entry in table.items() if entry.target.__module__.startswith("vdiff.")}
    table.clear()
    table.update(ours | before)
