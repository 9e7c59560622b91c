"""Mixins: changes to modules that one does not own.

A mixin picks sites (``on``), puts a :class:`~vdiff.hooks.Part` at each, and holds them together
under one name, one scale and one switch. The host's class, forward, weights and state-dict keys stay
as they are. A mixin of one's own is a constructor that keeps its arguments under their names, and
:meth:`Mixin.part`::

    class Bias(Mixin):
        def __init__(self, width: int, on: On = "*.ff", name: str | None = None, scale: float = 1.0) -> None:
            super().__init__(on, name, scale)
            self.width = width

        def part(self, module: nn.Module, site: str) -> Part:
            return BiasPart(self.width)


    class BiasPart(Part):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(width))

        def after(self, module, args, kwargs, output):
            return output + self.amount(output) * self.bias
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part, insert, match, parts, refuse_in_backward, remove
from vdiff.registry import Registered, signature


class Mixin(Registered, kind="mixin"):
    """An attachment. Not a base class of its host, and not a module itself.

    Parts belong to the host's module tree, so the host moves, trains, freezes and shards them; attach
    before making an optimizer and before wrapping for several devices.

    Args:
        on: Which modules it touches, see :func:`vdiff.hooks.match`.
        name: What it is called at its host; by default the name of its class in the registry.
        scale: How much of it; 0 is none and 1 is as trained.

    Attributes:
        host: Class name of what it is attached to, was attached to or was saved from; None if new. A mixin
            goes on another family only after ``mixin.host = None``.
        own: Names of mixins that act in its term alone (see :func:`vdiff.hooks.within`); they are attached before it.

    The host is the innermost of the library's modules (a network, an embedder, a first stage) that holds every site,
    or else the module given to :meth:`attach`. Sites are named from there, so that an adapter trained in an engine
    goes on the bare network, and the other way round.
    """

    host: str | None = None
    own: Sequence[str] = ()

    def __init__(self, on: On, name: str | None = None, scale: float = 1.0) -> None:
        self.on = on
        self.name = name or type(self).registered_name or type(self).__name__
        self._scale = float(scale)
        self._enabled = True
        self._sites: dict[str, tuple[nn.Module, Part]] = {}
        self._helpers: list[tuple[nn.Module, Part]] = []
        self._weights: Mapping[str, Tensor] = {}  # while not attached, those it will have
        self._is_strict = True  # whether those must be all it has
        self._known: dict[str, str] = {}  # its sites from the host, and from where `on` was first asked

    @abstractmethod
    def part(self, module: nn.Module, site: str) -> Part:
        """A new part for one module; an unfit module is a ValueError."""

    # Attaching -----------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        return bool(self._sites)

    @property
    def _parts(self) -> list[tuple[nn.Module, Part]]:
        """All it has put somewhere: at its sites, and the helpers of those."""
        return [*self._sites.values(), *self._helpers]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the modules it touches, from its host."""
        return tuple(self._sites)

    @property
    def is_rebased(self) -> bool:
        """Whether ``on`` was asked of more than the host, and so is not how the host names its sites."""
        return any(site != name for site, name in self._known.items())

    def attach(self, root: nn.Module, name: str | None = None) -> Self:
        """Put a part at every module that ``on`` picks, or change nothing and say why.

        A mixin that was detached or loaded brings its weights along; a new one makes new ones.

        Args:
            name: What it is called here, instead of its own name.

        Raises:
            ValueError: attached already, a name that is taken, a host of another family, no module
                matches, a module that does not fit, or weights that do not fit.
        """
        who, family = type(self).__name__, type(root).__name__
        name = name or self.name
        if self.is_attached:
            raise ValueError(f"{who}: {self.name!r} is attached to a {self.host} already; detach it first.")
        for part in parts(root):
            if part.mixin_name == name:
                raise ValueError(
                    f"{who}: a mixin called {name!r} is attached to this {family}. Give this one another name."
                )
            if part.mixin is not None and name in part.mixin.own:
                raise ValueError(
                    f"{who}: {part.mixin_name!r} is attached, and {name!r} is to act in its term alone. Detach "
                    f"{part.mixin_name!r}, and attach it again after {name!r}."
                )
        _refuse_wrapped(root, who)
        named, host = self._named(root, who, name)
        sites = {site: (module, self.part(module, full)) for site, (full, module) in named.items()}
        helpers = {
            _join(site, inner): (module.get_submodule(inner), helper)
            for site, (module, part) in sites.items()
            for inner, helper in part.helpers(module).items()
        }
        for module, part in (*sites.values(), *helpers.values()):
            part.to(_device(module, root))
            part.mixin, part.mixin_name, part.enabled = self, name, self._enabled
            part.set_scale(self._scale)
        if self._weights:
            _load(sites, self._weights, self._is_strict, who)
        insert([(site, module, part) for site, (module, part) in (*sites.items(), *helpers.items())], who)
        self._helpers = list(helpers.values())
        self._sites, self._weights, self.name, self.host = sites, {}, name, type(host).__name__
        self._known = {site: full for site, (full, _) in named.items()}
        return self

    def _named(self, root: nn.Module, who: str, name: str) -> tuple[dict[str, tuple[str, nn.Module]], nn.Module]:
        """The sites from the host, each with the name under which it was asked for, and the host."""
        if self.host is None:
            found = match(root, self.on, who)
            begin, host = _innermost(root, list(found))
            return {full[len(begin) :]: (full, module) for full, module in found.items()}, host
        host = _one_of_family(root, self.host, who, name)
        if self._known:
            found = match(host, lambda site, _: site in self._known, who)
            missing = [site for site in self._known if site not in found]
            if missing:
                raise ValueError(f"{who}: {name!r} was on {missing[0]!r}, which this {self.host} does not have.")
            return {site: (self._known[site], found[site]) for site in self._known}, host
        return {site: (site, module) for site, module in match(host, self.on, who).items()}, host

    def detach(self) -> None:
        """Take all parts off; the host is what it was before, bit for bit. The weights stay with the mixin."""
        if not self.is_attached:
            raise ValueError(f"{type(self).__name__}: {self.name!r} is not attached.")
        refuse_in_backward(f"Detaching {self.name!r}")
        weights = self.state_dict()
        remove(self._parts)
        self._sites, self._helpers, self._weights, self._is_strict = {}, [], weights, True

    # How much of it ------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """How much of it; setting it recompiles nothing."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._turning("Scaling")
        self._scale = float(value)
        for _, part in self._parts:
            part.set_scale(self._scale)

    @property
    def enabled(self) -> bool:
        """Whether it does anything. Switching never touches ``requires_grad``."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._turning("Switching")
        self._enabled = bool(value)
        for _, part in self._parts:
            part.enabled = self._enabled

    def _turning(self, what: str) -> None:
        """Raise where the mixin cannot be turned now."""
        refuse_in_backward(f"{what} {self.name!r}")

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Off inside, as before outside."""
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before

    @contextmanager
    def scaled(self, scale: float) -> Iterator[Self]:
        """Another scale inside, the old one outside."""
        before, self.scale = self.scale, scale
        try:
            yield self
        finally:
            self.scale = before

    # Weights -------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters by ``<site>.<leaf>``; none while it is not attached."""
        for site, (_, part) in self._sites.items():
            for leaf, parameter in part.named_parameters():
                yield _join(site, leaf), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights by ``<site>.<leaf>``, attached or not."""
        return _tensors(self._sites) if self.is_attached else dict(self._weights)

    def load_state_dict(self, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy weights in, at once or when it is attached.

        Args:
            strict: Whether every name must be on both sides; a wrong shape is an error either way.

        Raises:
            ValueError: they do not fit; nothing was changed.
        """
        if not self.is_attached:
            self._weights, self._is_strict = (dict(weights) if strict else {**self._weights, **weights}), strict
            return
        _load(self._sites, weights, strict, type(self).__name__)

    def arguments(self) -> dict[str, Any]:
        """What to construct it again with, as plain data: every constructor argument from the attribute of its name.

        A predicate ``on``, or one asked of more than the host, becomes the list of sites.
        """
        found = {}
        for name in signature(type(self)):
            if not hasattr(self, name):
                raise ValueError(f"{type(self).__name__} must keep its argument {name!r} as self.{name} to be saved.")
            found[name] = getattr(self, name)
        if callable(self.on) or self.is_rebased:
            found["on"] = list(self._known)
        return found

    def save(self, file: str | Path) -> None:
        """Write its weights, and what it takes to build it again, as one safetensors file."""
        from vdiff.mixins.files import save_mixin

        save_mixin(self, file)

    def check_alike(self, other: Mixin, where: str) -> None:
        """Raise where the weights of ``other``, of the same kind, would mean something else here; by default never."""

    def load(self, file: str | Path) -> None:
        """Take the weights of a file that a mixin of the same kind and arguments wrote."""
        from vdiff.mixins.files import load_weights

        load_weights(self, file)

    def __repr__(self) -> str:
        where = f"on {len(self._sites)} modules of a {self.host}" if self.is_attached else "not attached"
        return f"<{type(self).__name__} {self.name!r} {where}, scale {self._scale:g}{'' if self._enabled else ', off'}>"


def _join(site: str, leaf: str) -> str:
    return f"{site}.{leaf}" if site else leaf


def _tensors(sites: Mapping[str, tuple[nn.Module, Part]]) -> dict[str, Tensor]:
    return {_join(site, leaf): value for site, (_, part) in sites.items() for leaf, value in part.state_dict().items()}


def _load(sites: Mapping[str, tuple[nn.Module, Part]], weights: Mapping[str, Tensor], strict: bool, who: str) -> None:
    own = _tensors(sites)
    faults = []
    if strict:
        faults += [f"{name} is missing" for name in own if name not in weights]
        faults += [f"{name} belongs to no site" for name in weights if name not in own]
    shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights}
    faults += [f"{name} is {theirs}, here {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"{who}: these weights do not fit: {'; '.join(faults[:4])}{more}. Rank or `on` differ?")
    with torch.no_grad():
        for name in shapes:
            own[name].copy_(weights[name])


def _innermost(root: nn.Module, sites: list[str]) -> tuple[str, nn.Module]:
    """The innermost module of the library that holds all sites, and how their names begin with it."""
    begin, host, place = "", root, root
    paths = [site.split(".") if site else [] for site in sites]
    for depth, step in enumerate(min(paths, key=len)):
        if any(path[depth] != step for path in paths):
            break
        place = place.get_submodule(step)
        if isinstance(place, Registered):
            begin, host = ".".join(paths[0][: depth + 1]), place
    return (f"{begin}." if begin and any(site != begin for site in sites) else begin), host


def _one_of_family(root: nn.Module, family: str, who: str, name: str) -> nn.Module:
    """The one module of that class: ``root``, or one of the library's below it."""
    if type(root).__name__ == family:
        return root
    families = {path: type(module).__name__ for path, module in root.named_modules() if isinstance(module, Registered)}
    found = [path for path, other in families.items() if other == family]
    if len(found) == 1:
        return root.get_submodule(found[0])
    if found:
        raise ValueError(
            f"{who}: {name!r} was made for a {family}, and this {type(root).__name__} holds {len(found)}: "
            f"{', '.join(found[:4])}. Attach it to one of them."
        )
    raise ValueError(
        f"{who}: {name!r} was made for a {family}, this is a {type(root).__name__}"
        f"{' without one' if len(families) > 1 else ''}. "
        "To try it all the same, set its `host` to None first."
    )


def _device(module: nn.Module, root: nn.Module) -> torch.device:
    for place in (module, root):
        for tensor in (*place.parameters(), *place.buffers()):
            return tensor.device
    return torch.get_default_device()


def _refuse_wrapped(root: nn.Module, who: str) -> None:
    """Parameters that appear after wrapping are not synchronised, in silence."""
    for name, module in root.named_modules():
        is_wrapper = type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
        if is_wrapper or any(str(key).startswith("__composable_api_state") for key in vars(module)):
            raise ValueError(
                f"{who}: {name or 'this module'} ({type(module).__name__}) is wrapped for several devices already, "
                "and would not synchronise what is attached now. Attach first, then wrap."
            )
