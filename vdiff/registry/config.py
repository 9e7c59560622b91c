"""Config files: YAML trees with inheritance, interpolation and overrides.

``base:`` names files to start from, several files merge in order, ``key=value`` overrides come
last. A relative path is relative to the file that names it; ``${oc.env:VDIFF_DATA}`` is the data
root. A file imports nothing: ``imports:`` is honoured only when the *caller* allows it.

YAML and OmegaConf are imported where they are used, so that ``import vdiff`` stays light.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class ConfigFileError(ValueError):
    """A config file that cannot be read; says file and line."""


Origins = dict[str, tuple[Path, int] | None]  # dotted path -> file and line; None for an override


class Config(Mapping):
    """A node of a loaded config: a read-only mapping that knows which file and line said what.

    Attributes:
        path: Dotted path of this node from the root of the file.
    """

    def __init__(self, tree: dict[str, Any], origins: Origins | None = None, path: str = "") -> None:
        self._tree = tree
        self._origins = origins or {}
        self.path = path

    def __getitem__(self, key: str) -> Any:
        return self._wrap(self._tree[key], f"{self.path}.{key}" if self.path else key)

    def _wrap(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return Config(value, self._origins, path)
        if isinstance(value, list):
            return [self._wrap(item, f"{path}.{i}") for i, item in enumerate(value)]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def __repr__(self) -> str:
        return f"Config({self._tree!r})"

    def with_(self, **entries: Any) -> Config:
        """A copy of this node with some entries given anew."""
        return Config({**self._tree, **entries}, self._origins, self.path)

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain data."""
        return plain(self._tree)

    def _origin(self, path: str) -> tuple[Path, int] | None:
        while path not in self._origins and path:
            path = path.rpartition(".")[0]
        return self._origins.get(path)

    def where(self, path: str) -> str:
        """``file:line:`` of the entry at a full dotted path, or nothing for an override."""
        origin = self._origin(path)
        return f"{_short(origin[0])}:{origin[1]}: " if origin else ""

    def locate(self, path: str, value: str) -> Path:
        """The file that ``value`` names: relative to the file that wrote it at the full dotted ``path``.

        What an override names is relative to the current directory.
        """
        file = Path(os.path.expanduser(value))
        origin = self._origin(path)
        return origin[0].parent / file if origin else file


def load_config(
    *files: str | Path,
    overrides: Sequence[str] = (),
    allow_imports: bool | Sequence[str] = False,
    interpolate: bool = True,
) -> Config:
    """Read config files, later ones over earlier ones, then ``key=value`` overrides.

    Args:
        files: YAML files; each may name its ``base:`` (a path or a list of them).
        overrides: Such as ``engine.sampler.num_steps=30``; the value is read as YAML.
        allow_imports: Whether the modules under ``imports:`` may be imported (they run code):
            True, or the module prefixes that may.
        interpolate: Resolve ``${...}``. Off for configs that came out of a checkpoint.

    Raises:
        ConfigFileError: not found, not YAML, a base that includes itself, a bad override or
            interpolation, or ``imports:`` without the caller's leave.
    """
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for file in files:
        own, own_origins = _read(Path(file), ())
        _merge(tree, own)
        origins |= own_origins
    for override in sorted(overrides, key=_types_first):
        _override(tree, origins, override)
    config = Config(tree, origins)
    config = Config(_interpolate(config) if interpolate else plain(tree, _unescape), origins)
    _import_modules(config, allow_imports)
    return config


def save_config(config: Mapping[str, Any], file: str | Path) -> None:
    """Write a resolved config as YAML that :func:`load_config` reads back equal."""
    from vdiff.registry.plain_yaml import dump

    Path(file).write_text(dump(plain(config, _escape)), encoding="utf-8")


def plain(value: Any, text: Callable[[str], str] = str) -> Any:
    """A copy in dicts and lists, every string in it passed through ``text``."""
    if isinstance(value, Mapping):
        return {key: plain(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, text) for item in value]
    return text(value) if type(value) is str else value


def _read(file: Path, including: tuple[Path, ...], named: str = "") -> tuple[dict[str, Any], Origins]:
    """``named`` is where the file is named, for its error message."""
    from vdiff.registry.plain_yaml import parse

    try:
        file = file.expanduser()
        resolved = file.resolve()
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # missing, not UTF-8, a NUL in the name, a circle of links
        raise ConfigFileError(f"{named}{_short(file)}: cannot read this config: {error}.") from error
    if resolved in including:
        chain = " -> ".join(_short(f) for f in (*including, resolved))
        raise ConfigFileError(f"{_short(file)}: `base:` goes in a circle: {chain}.")
    own, lines = parse(text, _short(file))
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigFileError(f"{_short(file)}: a config is a mapping, got {own!r:.60}.")
    tree: dict[str, Any] = {}
    origins: Origins = {}
    where = f"{_short(file)}:{lines.get('base')}: base"
    for base in _names(own.pop("base", None), where, "files"):
        base_tree, base_origins = _read(resolved.parent / Path(base).expanduser(), (*including, resolved), f"{where}: ")
        _merge(tree, base_tree)
        origins |= base_origins
    _merge(tree, own)
    return tree, origins | {path: (resolved, line) for path, line in lines.items()}


def _names(value: Any, where: str, what: str) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigFileError(f"{where}: expected a list of {what}, got {value!r}.")
    return names


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Mappings merge key by key, except that another ``type:`` starts the node anew; all else replaces."""
    for key, value in over.items():
        old = tree.get(key)
        if isinstance(old, str) and isinstance(value, dict) and "type" not in value:
            old = {"type": old}  # `sampler: heun`, and then `sampler: {num_steps: 30}`
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and ("type" not in old or value.get("type", old["type"]) == old["type"])
        ):
            tree[key] = old
            _merge(old, value)
        else:
            tree[key] = value


def _types_first(override: str) -> tuple[bool, int]:
    """Another type takes a node's arguments away, and must not take away what other overrides gave it."""
    key = override.partition("=")[0]
    return (not key.endswith(".type"), key.count(".") if key.endswith(".type") else 0)


def _override(tree: dict[str, Any], origins: Origins, override: str) -> None:
    """Set one entry; sections on the way are made, and a bare name becomes one: `sampler: heun`."""
    from vdiff.registry.plain_yaml import parse

    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigFileError(f"override {override!r}: expected key=value, such as engine.sampler.num_steps=30.")
    value, _ = parse(text, f"override {override!r}") if text.strip() else ("", {})
    node: Any = tree
    for depth, name in enumerate(parents, 1):
        place = _place(node, name, override)
        below = node[place] if isinstance(node, list) else node.get(place)
        below = {} if below is None else {"type": below} if isinstance(below, str) else below
        if not isinstance(below, dict | list):
            raise ConfigFileError(f"override {override!r}: {'.'.join(parents[:depth])} is {below!r}, not a section.")
        node[place] = node = below
    place = _place(node, last, override)
    if last == "type" and isinstance(node, dict) and node.get("type", value) != value:
        node.clear()  # the arguments of one component mean nothing to another
        for path in [path for path in origins if path.startswith(f"{'.'.join(parents)}.")]:
            del origins[path]
    node[place] = value
    for path in [path for path in origins if path.startswith(f"{key}.")]:
        del origins[path]
    origins[key] = None


def _place(node: dict | list, name: str, override: str) -> Any:
    if isinstance(node, dict):
        return name
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigFileError(f"override {override!r}: {name!r} is no entry of a list of {len(node)}.")
    return int(name)


def _interpolate(config: Config) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.create(config.to_dict())
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        path = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "").lstrip(".")
        reason = str(error).partition("\n")[0].removeprefix("KeyError raised while resolving interpolation: ")
        raise ConfigFileError(f"{config.where(path)}{path}: cannot interpolate: {reason}") from error


def _escape(text: str) -> str:
    """``text`` so that OmegaConf reads it back as it is: ``${`` is no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)


def _unescape(text: str) -> str:
    return re.sub(r"(\\*)\\\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", text)


def _import_modules(config: Config, allow: bool | Sequence[str]) -> None:
    where = f"{config.where('imports')}imports"
    modules = _names(plain(config.get("imports")), where, "modules")
    for module in modules:  # all of them before the first runs
        if not (allow if isinstance(allow, bool) else any(module == p or module.startswith(f"{p}.") for p in allow)):
            raise ConfigFileError(
                f"{where}: this config wants to import {module!r}, which runs its code. "
                "If you trust it, allow it: allow_imports=True, or --allow-imports on the command line."
            )
    origin = config._origin("imports")
    # A module may lie beside the file that names it, or, as for the config of a run folder, where the command is given.
    here = os.getcwd()
    places = [here] if origin is None else [str(origin[0].parent), here]
    for module in modules:
        before = sys.path[:]
        sys.path[:0] = places
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a lab's module raises
            hint = " Leave out '.py'." if module.endswith(".py") else ""
            looked = f" Looked beside the config ({_short(Path(places[0]))}), here, and among what is installed."
            hint = hint or (looked if isinstance(error, ModuleNotFoundError) else "")
            raise ConfigFileError(f"{where}: cannot import {module!r}: {error!r}.{hint}") from error
        finally:
            sys.path[:] = before


def _short(file: Path) -> str:
    try:
        return os.path.relpath(file)
    except ValueError:
        return str(file)
