"""Which modules a mixin touches: by name, by role, by type, or by a question asked of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice

from torch import nn

from vdiff.hooks.port import is_port_key
from vdiff.registry import did_you_mean

On = str | Sequence[str] | Callable[[str, nn.Module], bool]


def match(root: nn.Module, on: On, who: str = "match") -> dict[str, nn.Module]:
    """The modules of ``root`` that ``on`` picks, by name, in the order of ``root.named_modules()``.

    Args:
        on: One pattern or several, each one of

            - a glob over module names (``"*.attn*.to_[qkv]"``; ``*`` crosses dots; ``""`` is the root, which no
              other glob picks),
            - ``"role:self_attention"``: modules whose attribute ``role`` says so,
            - ``"type:Linear"``: modules of a class of that name, subclasses included,

            or a predicate ``(name, module) -> bool``.
        who: Who asks, for error messages.

    Raises:
        ValueError: a pattern picks nothing; says how the names begin and what comes near.
    """
    modules = [(n, m) for n, m in root.named_modules(remove_duplicate=False) if not is_port_key(n)]
    if callable(on):
        found = [(name, module) for name, module in modules if on(name, module)]
        if not found:
            raise ValueError(f"{who}: no module of {type(root).__name__} satisfies `on`. {_beginnings(modules)}")
        return _once(found)
    patterns = [on] if isinstance(on, str) else list(on) if isinstance(on, Sequence) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{who}: `on` is a glob, a list of globs or a predicate, got {on!r}.")
    for pattern in patterns:
        if not any(_picks(pattern, name, module) for name, module in modules):
            raise ValueError(f"{who}: no module of {type(root).__name__} matches {pattern!r}.{_near(pattern, modules)}")
    return _once((n, m) for n, m in modules if any(_picks(pattern, n, m) for pattern in patterns))


def role_sites(root: nn.Module, role: str) -> list[str]:
    """Names of the modules whose attribute ``role`` says so; none is no error."""
    return list(_once((n, m) for n, m in root.named_modules() if _picks(f"role:{role}", n, m)))


def _picks(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("role:"):
        return getattr(module, "role", None) == pattern[5:]
    if pattern.startswith("type:"):
        return any(base.__name__ == pattern[5:] for base in type(module).__mro__)
    return fnmatchcase(name, pattern) if name else not pattern


def _once(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """A module that is shared under several names is one site, under the first."""
    names: dict[nn.Module, str] = {}
    for name, module in modules:
        names.setdefault(module, name)
    return {name: module for module, name in names.items()}


def _near(pattern: str, modules: list[tuple[str, nn.Module]]) -> str:
    if pattern.startswith("role:"):
        known = {role for _, m in modules if isinstance(role := getattr(m, "role", None), str)}
        return f"{did_you_mean(pattern[5:], known)} Roles: {', '.join(sorted(known)) or 'none'}."
    if pattern.startswith("type:"):
        known = {type(m).__name__ for _, m in modules}
        return f"{did_you_mean(pattern[5:], known)} Types: {', '.join(sorted(known))}."
    names = [name for name, _ in modules if name]
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    hint = did_you_mean(pattern.rsplit(".", 1)[-1], leaves) if "*" in pattern else did_you_mean(pattern, names)
    return f"{hint} {_beginnings(modules)}"


def _beginnings(modules: list[tuple[str, nn.Module]]) -> str:
    names = list(islice((name for name, _ in modules if name), 7))
    return f"Modules begin: {', '.join(names[:6])}{', ...' if len(names) > 6 else '.'}" if names else "It has none."
