"""From a config tree to objects: check everything first, then construct inside out.

The constructor's signature is the schema: names, types, defaults. The annotation of a parameter
tells the kind of the component that belongs there. Nothing is constructed before the whole tree
has been checked, and every fault is reported with its path, not just the first.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vdiff.registry.base import ROOMS, Entry, RegistryError, RegistryMeta, did_you_mean, entries, lookup
from vdiff.registry.config import Config, plain


class ConfigError(ValueError):
    """A config that cannot be built; the message has one line per fault."""


def build(node: Any, kind: str | None = None, path: str = "") -> Any:
    """Build the component that ``node`` describes.

    Args:
        node: A mapping with ``type:`` (a name or alias of ``kind``) and the constructor's
            arguments, a bare name (``"heun"``), or a finished object, which is returned as it is.
        kind: The kind of the component. May be left out where the node's path ends in one.
        path: Where the node stands, for error messages.

    Raises:
        ConfigError: unknown, missing or ill-typed keys and unknown names, all of them, each with
            its path; or a constructor refused its arguments.
    """
    return _make(check(node, kind, path))


@dataclass
class Plan:
    """A checked node: what will be constructed, from what. The entry of a plain class has no file."""

    entry: Entry
    arguments: dict[str, Any]
    path: str
    where: str = ""

    def make(self) -> Any:
        arguments = {name: _make(value) for name, value in self.arguments.items()}
        try:
            return self.entry.target(**arguments)
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise ConfigError(f"{self.where}{self.path}: {error}") from error
        except Exception as error:  # a fault of the code rather than of the config; it stays what it is
            error.add_note(f"while building {self.where}{self.path}")
            raise

    def tree(self, folder: Path | None = None) -> dict[str, Any]:
        """The node again as plain data, for saving: paths absolute, or relative to the ``folder`` it is saved in."""
        named = {"type": self.entry.name} if self.entry.file else {}
        return named | {name: _tree(value, folder) for name, value in self.arguments.items()}


def _make(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.make()
    if type(value) is dict:
        return {key: _make(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_make(item) for item in value)
    return value


def _tree(value: Any, folder: Path | None) -> Any:
    if isinstance(value, Plan):
        return value.tree(folder)
    if isinstance(value, dict):
        return {key: _tree(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tree(item, folder) for item in value]
    if isinstance(value, Path):
        return str(value.absolute()) if folder is None else os.path.relpath(value, folder)
    return value


def check(node: Any, kind: str | None = None, path: str = "") -> Any:
    """The :class:`Plan` of a node, or the node itself if it is a finished object.

    Raises:
        ConfigError: see :func:`build`.
    """
    if isinstance(node, Config):
        path = path or node.path
    kind = kind or path.rpartition(".")[2]
    if not kind and _is_plain(node):
        raise ConfigError(
            "build: of which kind? Say build(node, 'sampler'), or hand over a section: config['sampler']."
        )
    checker = _Checker()
    plan = checker.argument(node, Any, path or kind, node, kind)
    if checker.faults:
        raise ConfigError("\n".join(checker.faults))
    return plan


def signature(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor or factory, annotations resolved to types where they can be."""
    function = target.__init__ if inspect.isclass(target) else target
    while isinstance(function, functools.partial):
        function = function.func
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        name: parameter.replace(annotation=_resolved(parameter.annotation, scope))
        for name, parameter in inspect.signature(target).parameters.items()
    }


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    """One by one, since foreign classes may annotate with names that only a type checker sees."""
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), scope)["it"]
    except Exception:
        return annotation


def kind_of(annotation: Any, name: str = "") -> str | None:
    """The kind of component an annotated parameter takes, or None for plain data."""
    if isinstance(annotation, RegistryMeta):
        return annotation.kind
    if _is_union(annotation):
        return next((k for a in typing.get_args(annotation) if (k := kind_of(a, name))), None)
    if inspect.isclass(annotation) and annotation.__name__ == "Module" and name in ROOMS:
        return name  # `network: nn.Module` takes any network
    return None


@dataclass
class _Checker:
    """Walks a tree beside the signatures. ``source`` is the config node that an entry was written in."""

    faults: list[str] = field(default_factory=list)

    def fault(self, path: str, text: str, source: Any, origin: str | None = None) -> None:
        """``origin`` is the path whose line is named, where it is not the path itself."""
        self.faults.append(f"{_where(origin or path, source)}{path}: {text}")

    def argument(self, value: Any, annotation: Any, path: str, source: Any, kind: str | None = None) -> Any:
        """``value`` as its annotation (or, where it is known, its kind) wants it, or a fault and None."""
        try:
            if kind:
                return self.component(value, kind, path, source)
            return self.convert(value, annotation, path, source)
        except _Mismatch:
            self.fault(
                path, f"expected {_spell_kind(kind) if kind else _spell(annotation)}, got {value!r:.100}.", source
            )
            return None

    def component(self, node: Any, kind: str, path: str, source: Any) -> Any:
        if not _is_plain(node):
            if isinstance(type(node), RegistryMeta) and type(node).kind not in (kind, None):
                raise _Mismatch
            return node
        if isinstance(node, str):
            node = {"type": node}
        if not isinstance(node, Mapping):
            raise _Mismatch
        source = node if isinstance(node, Config) else source
        try:
            if "type" not in node:
                known = ", ".join(entries(kind)) or "none"
                raise RegistryError(f"{_spell_kind(kind)} needs a `type:`. Known: {known}.")
            entry = lookup(kind, node["type"])
        except RegistryError as error:
            self.fault(path, str(error), source, f"{path}.type" if "type" in node else path)
            return None
        return self.plan(entry, {key: value for key, value in node.items() if key != "type"}, path, source)

    def plan(self, entry: Entry, given: Mapping[str, Any], path: str, source: Any) -> Plan:
        parameters = signature(entry.target)
        named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        name = entry.title.rpartition(".")[2]
        for key in given:
            if key not in named and not takes_any:
                hint = did_you_mean(key, named) or f" It takes: {', '.join(named) or 'nothing'}."
                self.fault(f"{path}.{key}", f"{name} takes no {key!r}.{hint}", source)
        missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
        if missing:
            self.fault(path, f"{name} needs {', '.join(map(repr, missing))}.", source)
        arguments = {}
        for key, value in given.items():
            annotation = named[key].annotation if key in named else Any
            arguments[key] = self.argument(value, annotation, f"{path}.{key}", source)
        return Plan(entry, arguments, path, _where(path, source))

    def convert(self, value: Any, annotation: Any, path: str, source: Any) -> Any:
        """``value`` as the annotation wants it; containers are walked, components inside them checked."""
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        container = origin or annotation
        if annotation in (Any, object, inspect.Parameter.empty):
            return plain(value)
        if _is_union(annotation):
            return self.one_of(value, args, path, source)
        if kind := kind_of(annotation, path.rpartition(".")[2]):
            return self.component(value, kind, path, source)
        if origin is Literal:
            if not any(type(value) is type(a) and value == a for a in args):
                raise _Mismatch
            return value
        if not _is_plain(value):  # a finished object; its class is its own affair, unless plain data is asked for
            if annotation in (bool, int, float, str, type(None)) and not isinstance(value, annotation):
                raise _Mismatch
            return value
        if container in (list, tuple, Sequence, Iterable, Collection):
            return self.items(value, container, args, path, source)
        if inspect.isclass(container) and issubclass(container, Mapping):
            if not isinstance(value, Mapping):
                raise _Mismatch
            source = value if isinstance(value, Config) else source
            item = args[1] if len(args) == 2 else Any
            if kind_of(item) is not None:  # null takes away what a base has
                value = {k: v for k, v in value.items() if v is not None}
            return {k: self.argument(v, item, f"{path}.{k}", source) for k, v in value.items()}
        if annotation is Path:
            if not isinstance(value, str):
                raise _Mismatch
            return source.locate(path, value) if isinstance(source, Config) else Path(value)
        if isinstance(value, Mapping) and inspect.isclass(annotation) and annotation.__module__ != "builtins":
            source = value if isinstance(value, Config) else source  # a plain class: its signature is the schema
            return self.plan(Entry(path.rpartition(".")[2], annotation.__name__, annotation, ""), value, path, source)
        return _as_scalar(value, annotation)

    def items(self, value: Any, container: Any, args: tuple, path: str, source: Any) -> list | tuple:
        if not isinstance(value, list | tuple):
            raise _Mismatch
        is_fixed = container is tuple and args and args[-1] is not Ellipsis
        if is_fixed and len(args) != len(value):
            raise _Mismatch
        each = args if is_fixed else [args[0] if args else Any] * len(value)
        out = [self.argument(v, a, f"{path}.{i}", source) for i, (v, a) in enumerate(zip(value, each, strict=True))]
        return tuple(out) if container is tuple else out

    def one_of(self, value: Any, options: tuple, path: str, source: Any) -> Any:
        """The first option that takes the value without fault; else the faults of the first that takes it at all."""
        faults = None
        for option in sorted(options, key=lambda option: type(value) is not option):  # no conversion where none is due
            trial = _Checker()
            try:
                converted = trial.convert(value, option, path, source)
            except _Mismatch:
                continue
            if not trial.faults:
                return converted
            faults = faults or trial.faults
        if faults is None:
            raise _Mismatch
        self.faults += faults
        return None


class _Mismatch(Exception):
    pass


def _as_scalar(value: Any, annotation: Any) -> Any:
    if annotation is float and type(value) is int:
        return float(value)
    if inspect.isclass(annotation):
        try:
            is_fit = isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))
        except TypeError:  # a protocol
            is_fit = False
        if not is_fit:
            raise _Mismatch
        return value
    if (typing.get_origin(annotation) or annotation) is Callable:
        raise _Mismatch
    return plain(value)  # an annotation that says nothing to us


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Mapping) or type(value) in (list, tuple)


def _where(path: str, source: Any) -> str:
    return source.where(path) if isinstance(source, Config) else ""


def _spell_kind(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _spell(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return " or ".join(_spell(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if annotation is type(None):
        return "nothing"
    if annotation is Ellipsis:
        return "..."
    if kind := kind_of(annotation):
        return _spell_kind(kind)
    if inspect.isclass(origin) and args and origin is not Callable:
        return f"{origin.__name__}[{', '.join(map(_spell, args))}]"
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")
