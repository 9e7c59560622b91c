"""YAML as plain trees and back: the small, harmless part of it that a config needs.

Mappings, lists and scalars. Words stay words (``on``, ``no``, dates), ``1e-3`` is a number and ``010``
is ten. There are no tags and no objects, aliases cannot make a short file endless, and every entry
remembers its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import yaml

from vdiff.registry.config import ConfigFileError

MAX_NODES = 10_000  # aliases can make a short file expand without end
MAX_DEPTH = 100

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_WORDS = {  # which unquoted words are not text, and the letters they begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (rf"[-+]?{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Keeps the resolvers of YAML 1.1 beside ours: what either would misread is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.Node:
        # PyYAML folds these three line breaks into spaces unless they are escaped.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar(_TAG + "str", data, style)


_Dumper.add_representer(str, _Dumper.text)
for _tag, (_pattern, _first) in _WORDS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text.replace("_", "")),
    "float": _float,
}


def dump(tree: Mapping[str, Any]) -> str:
    """Plain data as YAML text that :func:`parse` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """YAML text as plain data, and the line of every entry by dotted path; ``name`` is for messages.

    Raises:
        ConfigFileError: not YAML, a duplicate key, a tag, or aliases without end.
    """
    reader = _Reader(name)
    try:
        root = yaml.compose(text, Loader=_Loader)
        return (None if root is None else reader.value(root, "", 0)), reader.lines
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise ConfigFileError(f"{name}{line}: not YAML that a config may use: {reason}.") from error


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, int] = {}
        self.count = 0

    def fail(self, node: yaml.Node, text: str) -> NoReturn:
        raise ConfigFileError(f"{self.name}:{node.start_mark.line + 1}: {text}")

    def value(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            self.fail(node, f"more than {MAX_NODES} entries or {MAX_DEPTH} levels; aliases gone wild?")
        if path:
            self.lines.setdefault(path, node.start_mark.line + 1)
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, _below(path, str(i)), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            try:
                return _SCALARS[tag](node.value)
            except (ValueError, KeyError):
                self.fail(node, f"{path}: {node.value[:40]!r} is no {tag}.")
        self.fail(node, f"{path}: a config has no use for the tag {node.tag!r}.")

    def mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, f"{path}: a key must be a word.")
            if key.tag == _TAG + "merge":
                parts = self.value(item, path, depth + 1)
                for part in parts if isinstance(parts, list) else [parts]:
                    if not isinstance(part, dict):
                        self.fail(item, f"{path}: `<<:` takes a mapping or a list of them.")
                    merged = part | merged
                continue
            below = _below(path, key.value)
            if key.value in own:
                self.fail(key, f"{below} is given twice.")
            own[key.value] = self.value(item, below, depth + 1)
            self.lines[below] = key.start_mark.line + 1
        return merged | own


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
