"""``vdiff list`` and ``vdiff describe``."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch

from vdiff.cli.runs import run_config
from vdiff.registry import contract, did_you_mean, entries, kind_of, kinds, lookup, signature


def names(arguments: argparse.Namespace) -> int:
    """One kind with a line per entry, or all kinds with their names."""
    if arguments.kind is None:
        for kind in kinds():
            print(f"{kind:18} {', '.join(entries(kind)) or '-'}")
        return 0
    for name, entry in entries(arguments.kind).items():
        aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
        print(f"{name + aliases:28} {_first_line(entry.target)}")
    return 0


def describe(arguments: argparse.Namespace) -> int:
    """Signature, text and a YAML line of one entry, or the contract of a kind; of a run, which mixin touches what."""
    kind, _, name = arguments.entry.partition("/")
    if kind not in kinds() and Path(arguments.entry).exists():
        return _describe_run(arguments.entry, arguments.allow_imports)
    if kind not in kinds():
        raise ValueError(f"no kind is called {kind!r}.{did_you_mean(kind, kinds())} Kinds: {', '.join(kinds())}.")
    if not name:
        base = contract(kind)
        print(f"{kind}: {', '.join(entries(kind)) or 'no entries'}\n")
        print(inspect.getdoc(base) or "no contract")
        return 0
    entry = lookup(kind, name)
    parameters = signature(entry.target)
    aliases = f", also {', '.join(entry.aliases)}" if entry.aliases else ""
    print(f"{kind}/{entry.name}{aliases}: {entry.target.__module__}.{entry.target.__qualname__}\n")
    print(inspect.getdoc(entry.target) or "no text")
    print("\narguments:")
    for parameter in parameters.values():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        print(f"  {parameter.name}: {_annotation(parameter)}{default}")
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    print(f"\nin YAML:\n  {kind}: {{type: {entry.name}{''.join(f', {n}: ...' for n in required)}}}")
    return 0


def _describe_run(word: str, allow_imports: bool) -> int:
    from vdiff.engine import Engine
    from vdiff.hooks import describe

    with torch.device("meta"):  # nothing is computed
        print(describe(Engine.from_config(run_config(word, allow_imports))))
    return 0


def _annotation(parameter: inspect.Parameter) -> str:
    if kind := kind_of(parameter.annotation, parameter.name):
        return f"a {kind}"
    if parameter.annotation is parameter.empty:
        return "anything"
    text = inspect.formatannotation(parameter.annotation)
    return text.replace("typing.", "").replace("collections.abc.", "").replace("pathlib.", "")


def _first_line(target: object) -> str:
    return (inspect.getdoc(target) or "").split("\n")[0]
