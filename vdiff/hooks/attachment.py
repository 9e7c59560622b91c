"""Putting parts into ports, and taking them out without a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, cast

from torch import nn

from vdiff.hooks.port import PORT, Part, Port, ask_after, ask_before, ports
from vdiff.hooks.stand_in import stand_down

TAKEN = frozenset(dir(Port()))  # also what it holds, which its class does not show


def insert(sites: Iterable[tuple[str, nn.Module, Part]], who: str) -> None:
    """Put parts at modules, all of them or, if one cannot be, none.

    Args:
        sites: Name of the site, host, part; the part knows its ``mixin_name``.
        who: Whose parts they are, for error messages.

    Raises:
        ValueError: a host is never called, is wrapped for several devices, holds a part of that name
            already, or holds another part that replaces its output or is innermost as well.
    """
    sites = list(sites)
    for site, host, part in sites:
        _check(site, host, part, who)
    for _, host, part in sites:
        if PORT not in host._modules:
            host.add_module(PORT, Port().train(host.training))
        port = cast(Port, host._modules[PORT])
        port.put(part.train(host.training))
        _register(host, port.values())
    _forget_compiled()


def remove(sites: Iterable[tuple[nn.Module, Part]]) -> None:
    """Take parts away, and ports that are empty with them."""
    for host, part in sites:
        port = cast(Port, host._modules[PORT])
        port.take(part.mixin_name)
        _register(host, port.values())
        if not len(port):
            del host._modules[PORT]
    _forget_compiled()


def bare_copy(module: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> Any:  # noqa: ANN401
    """A deep copy without what is attached or merged, and of some modules inside not a copy but something else."""
    memo: dict[int, Any] = {id(old): new for old, new in (replaced or {}).items()}
    memo |= {id(port): Port() for port in ports(module)}
    copied = deepcopy(module, memo)
    for host in copied.modules():
        stand_down(host)
        if host._modules.pop(PORT, None) is not None:
            _register(host, [])
    return copied


def _register(host: nn.Module, parts: Iterable[Part]) -> None:
    """The hooks, where one of the parts needs them and nowhere else."""
    register: Any
    ways = (
        ("before", ask_before, host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs),
        ("after", ask_after, host._forward_hooks, host._forward_hooks_with_kwargs),
    )
    for name, ask, table, with_kwargs in ways:
        # Found by what they are: a handle would keep pointing at the original of a deep copy.
        held = [key for key, hook in table.items() if hook is ask]
        needed = any(getattr(type(part), name) is not getattr(Part, name) for part in parts)
        if needed and not held:
            register = host.register_forward_pre_hook if name == "before" else host.register_forward_hook
            register(ask, with_kwargs=True)
        elif held and not needed:
            for key in held:
                del table[key]
                with_kwargs.pop(key, None)


def _check(site: str, host: nn.Module, part: Part, who: str) -> None:
    where = f"{who}: {site or 'the module itself'} ({type(host).__name__})"
    if type(host).forward is nn.Module.forward and "forward" not in vars(host):
        raise ValueError(f"{where} is a container that is never called; attach to what is inside it.")
    if any(type(p).__name__ == "DTensor" for p in host.parameters(recurse=False)):
        raise ValueError(f"{where} is sharded already. Attach first, then wrap for several devices.")
    if not part.mixin_name or "." in part.mixin_name or part.mixin_name in TAKEN:
        raise ValueError(f"{who}: a mixin cannot be called {part.mixin_name!r}; use a plain word without dots.")
    port = host._modules.get(PORT)
    if not isinstance(port, Port):
        if hasattr(host, PORT):
            raise ValueError(f"{where} has an attribute {PORT!r} of its own, where vdiff keeps what is attached.")
        return
    if part.mixin_name in port:
        raise ValueError(f"{where} holds a mixin called {part.mixin_name!r} already. Give one of them another name.")
    rival = next((other for other in port.values() if other.replaces and part.replaces), None)
    if rival is not None:
        raise ValueError(
            f"{where}: {rival.mixin_name!r} and {part.mixin_name!r} both replace what this module does. "
            "Keep one of them, or give one an `on` that leaves this module out."
        )
    if part.is_innermost and (rival := next((other for other in port.values() if other.is_innermost), None)):
        raise ValueError(
            f"{where}: {rival.mixin_name!r} and {part.mixin_name!r} both change the shape of what it is given, each "
            "next to it. Keep one of them, or give one an `on` that leaves this module out."
        )


def _forget_compiled() -> None:
    """Compiled code does not look for hooks that were added later, so it is dropped."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo, "reset"):
        dynamo.reset()
