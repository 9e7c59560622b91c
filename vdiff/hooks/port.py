"""The port: one child per touched module, that holds what mixins put there; its host's forward hooks ask it.

A module calls its hooks before and after ``forward``. A mixin puts a :class:`Part` at every site it
touches; all parts at one site live in one :class:`Port`, a child of the host, in the order in which
they were attached. The registered hooks are two functions that look for the port of the module they are
called for: unlike a closure, they hold nothing, so that a copied or unpickled network is independent of the
first, and compiled code finds the weights of parts as it finds those of any child. The host's class, forward and
existing state-dict keys stay as they are; the keys of parts are ``<host>._port.<mixin>.<leaf>``.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, ValuesView
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from vdiff.hooks.rows import expand_gate
from vdiff.hooks.witness import Witness

PORT = "_port"  # the port's name among its host's children


class Part(nn.Module):
    """What a mixin puts at one site: override :meth:`before`, :meth:`after` or both.

    A part holds the mixin's weights for this site as its own parameters. It never changes the host.

    Attributes:
        is_outermost: Whether it comes before the parts that were attached earlier, and so is given what the host was
            called with, not what another part made of it.
        is_innermost: Whether it comes after the parts that are attached later: what it hands the host has another
            shape than what they are given and give back.
        brings: Names of arguments with which it calls its host, where the host was called without.
        replaces: Whether it puts its own value in the place of the host's, rather than adding to it;
            a site takes one such part.
        weighs_partners: Whether its gate may hold a number for each of P partners.
        unit: What the buffer ``scale`` holds when the mixin's scale is 1 (LoRA: alpha / rank).
        term: The name of the mixin in whose term alone it acts, see :func:`within`; by default it acts
            wherever its host is called in the ordinary way.
        accepts: Names of conditions that it reads, at a network that may know nothing of them.
        mixin, mixin_name: Whose part it is.
        enabled: A part that is off is passed over.
        port: Where it is, as a tuple of one, or of none: a tuple hides it from the module tree.
        scale: ``()``, how much of it; a buffer, so that changing it recompiles nothing.
        gate: ``(B,)``, how much of it each row gets, or None for 1; ``(B, P)`` where it is one number for each of
            P partners. Set per call by :class:`routed`.
        partners: ``(B,)``, for every row the row it is sampled jointly with, -1 for none, or ``(B, P)``. Set per call.
        given: What another part of the mixin, further out, left for this one in this call.
    """

    is_outermost: ClassVar[bool] = False
    is_innermost: ClassVar[bool] = False
    brings: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    weighs_partners: ClassVar[bool] = False
    unit: float = 1.0
    accepts: tuple[str, ...] = ()
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mixin: Any = None
        self.mixin_name = ""
        self.port: tuple[Port, ...] = ()
        self._enabled, self._term = True, ""
        self.strength = 1.0
        self.gate: Tensor | None = None
        self.partners: Tensor | None = None
        self.given: Tensor | None = None
        self.register_buffer("scale", torch.ones(()), persistent=False)

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        for port in self.port:
            port.refresh()

    @property
    def term(self) -> str:
        return self._term

    @term.setter
    def term(self, value: str) -> None:
        self._term = value
        for port in self.port:
            port.refresh()

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What the host is called with instead of ``args`` and ``kwargs``."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """What the host returns instead of ``output``; ``args`` and ``kwargs`` are what it was called with."""
        return output

    def companions(self) -> tuple[nn.Module, ...]:
        """Frozen modules that it asks, outside the host's tree: in no optimizer, average or checkpoint."""
        return ()

    def helpers(self, module: nn.Module) -> dict[str, Part]:
        """Parts without weights that it needs at modules inside its host, by their names there."""
        return {}

    def amount(self, x: Tensor, place: int = 0) -> Tensor:
        """Scale times gate, shaped to multiply ``x`` of shape ``(rows, ...)``, whose rows may be folded ``(b f)``.

        ``place`` says which of several partners it is for, where the gate has a number for each.
        """
        # A copy where autograd will keep it, so that the scale may change before backward.
        scale = self.scale.clone() if is_grad_enabled() else self.scale
        if self.gate is None:
            return scale
        gate = self.gate if self.gate.ndim == 1 else self.gate[:, place]
        amount = scale * expand_gate(gate, len(x)).view(-1, *(1,) * (x.ndim - 1))  # faster than indexing
        return amount if amount.dtype == x.dtype else amount.to(x.dtype)  # a cast that does nothing costs as well

    def set_scale(self, value: float) -> None:
        self.strength = float(value)
        self.scale.fill_(self.strength * self.unit)

    @property
    def merged(self) -> Tensor | None:
        """The weight in the place of its host's that it is a part of now; None where it is beside the host's own."""
        return None

    @property
    def is_merged(self) -> bool:
        """Whether it is in the weights of its host now, rather than beside them."""
        return self.merged is not None

    def reset_parameters(self) -> None:
        """Start again, as after ``to_empty``. Parts with weights draw them here and call ``super()``."""
        self.set_scale(self.strength)


class Port(nn.ModuleDict):
    """The parts at one module, by the name of their mixin, in the order of attachment, outermost ones first and
    innermost ones last.

    Attributes:
        term: On whose behalf its host is called now, see :func:`within`.
        acting: The parts that are on and of that term: what a call of the host asks. Kept rather than found, since
            every call of every host would find it anew.
    """

    if TYPE_CHECKING:
        _modules: dict[str, Part]  # type: ignore[assignment]

        def items(self) -> ItemsView[str, Part]: ...

        def values(self) -> ValuesView[Part]: ...

    def __init__(self) -> None:
        super().__init__()
        self.term = ""
        self.acting: tuple[Part, ...] = ()
        self.witness = Witness()

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The identity: an ``nn.Sequential`` calls all its children, its port among them."""
        return x

    def put(self, part: Part) -> None:
        """Take a part in, at its place."""
        self.add_module(part.mixin_name, part)
        if part.is_outermost:
            self._modules = {part.mixin_name: part} | self._modules
        self._modules = dict(sorted(self._modules.items(), key=lambda item: item[1].is_innermost))
        part.port = (self,)
        self.refresh()

    def take(self, name: str) -> None:
        """Give a part up."""
        part = self._modules.pop(name)
        part.port = tuple(port for port in part.port if port is not self)  # a copy may share a part with its original
        self.refresh()

    def refresh(self, term: str | None = None) -> None:
        """Find the parts that act: after one was switched, or for another term."""
        self.term = self.term if term is None else term
        self.acting = tuple(part for part in self.values() if part.enabled and part.term == self.term)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name, part in self.items():
            if part.is_merged:
                args[-1].append(f"{prefix}{name} is merged into the weights of its host; unmerge() it before loading.")
        # A file of the plain host says nothing about attachments: they stay as they are, in strict mode too.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def ask_before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The hook before ``forward`` of a module with a port."""
    port: Any = module._modules[PORT]
    if is_grad_enabled() and not is_compiling():
        port.witness.check(port)
    for part in port.acting:
        args, kwargs = part.before(module, args, kwargs)
    return args, kwargs


def ask_after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """The hook after it."""
    port: Any = module._modules[PORT]
    if is_grad_enabled() and not is_compiling():
        port.witness.check(port)
    for part in port.acting:
        output = part.after(module, args, kwargs, output)
    return output


def ports(root: nn.Module) -> list[Port]:
    """All ports at ``root`` and below it. About 0.1 ms for a thousand modules, so nothing is cached."""
    found, stack = [], [root]
    while stack:
        children = stack.pop()._modules
        if PORT in children and isinstance(children[PORT], Port):
            found.append(children[PORT])
        stack.extend(child for name, child in children.items() if child is not None and name != PORT)
    return found


def parts(root: nn.Module) -> list[Part]:
    """All parts at ``root`` and below it."""
    return [part for port in ports(root) for part in port.values()]


@contextmanager
def within(module: nn.Module, term: str) -> Iterator[None]:
    """Inside, the layers of ``module`` are called on behalf of a mixin: of the parts at them, those of that term act
    and no others."""
    found = ports(module)
    before = [port.term for port in found]
    try:
        for port in found:
            port.refresh(term)
        yield
    finally:
        for port, one in zip(found, before, strict=True):
            port.refresh(one)


def accepts(module: nn.Module) -> tuple[str, ...]:
    """Names of conditions that what is attached to the module itself reads, switched on or not."""
    port = module._modules.get(PORT)
    return tuple(name for part in port.values() for name in part.accepts) if isinstance(port, Port) else ()


def bringer(module: nn.Module, argument: str) -> str | None:
    """The name of the mixin at a module that brings an argument, for error messages; None: the caller did."""
    port = module._modules.get(PORT)
    found = port.items() if isinstance(port, Port) else ()
    return next((name for name, part in found if argument in part.brings and part.enabled), None)


def is_port_key(key: str) -> bool:
    """Whether a state-dict key belongs to an attachment rather than to the host."""
    return PORT in key.split(".")


def attached(root: nn.Module) -> dict[str, Any]:
    """The mixins attached at ``root`` or below it, by name; works on deep copies and unpickled hosts.

    Where two networks below one root each carry a mixin of the same name, the second is ``name@site``.
    """
    found: dict[str, Any] = {}
    for site, port in _named_ports(root):
        for name, part in port.items():
            if all(part.mixin is not mixin for mixin in found.values()):
                found[f"{name}@{site}" if name in found else name] = part.mixin
    return found


def describe(root: nn.Module) -> str:
    """A line per site: its parts in order, with what they hold and whether they are on."""
    lines = []
    for site, port in _named_ports(root):
        row = [f"{name} ({_summary(part)})" for name, part in port.items()]
        lines.append((site or "(itself)", " -> ".join(row)))
    width = max((len(site) for site, _ in lines), default=0)
    return "\n".join(f"{site:{width}}  {row}" for site, row in lines) or "nothing is attached"


def _named_ports(root: nn.Module) -> Iterator[tuple[str, Port]]:
    for name, module in root.named_modules():
        port = module._modules.get(PORT)
        if isinstance(port, Port):
            yield name, port


def _summary(part: Part) -> str:
    num = sum(p.numel() for p in part.parameters())
    words = [type(part).__name__, part.extra_repr(), f"{num:,} parameters" if num else "", f"scale {part.strength:g}"]
    words += ["replaces"] * part.replaces + ["off"] * (not part.enabled)
    return ", ".join(word for word in words if word)
