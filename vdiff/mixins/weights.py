r"""Mixins that stand for a change of weights, :math:`W' = W + s\,D`.

LoRA and its relatives differ in how they write :math:`D`, and each is one small class: a part with parameters and
:meth:`WeightPart.delta`. What follows from that is here: attaching, routing by row, merging and its exact inverse.

Merging lets :math:`W'` stand in the place of :math:`W`, so that the adapter costs nothing. The host's parameter is left
as it is: it is what the state dict says, an optimizer holds and other modules share, and what every change is one of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from vdiff.hooks import PORT, On, Part, Same, move_stand_ins, own, stand_down, stand_in
from vdiff.mixins.base import Mixin
from vdiff.mixins.layers import Layer

Numbers = float | dict[str, float]


class WeightMixin(Mixin, abstract=True):
    """A change of the weights of linear layers, convolutions and embeddings.

    Args:
        rank: Of the change; a number, or numbers by glob over site names, the first that fits.
        alpha: At scale 1 the change is multiplied by alpha / rank; by default alpha is the rank. A number, or
            numbers by glob.
        on, name, scale: See :class:`Mixin`.
    """

    by_site: ClassVar[tuple[str, ...]] = ("rank", "alpha")  # arguments that may be given by glob

    def __init__(
        self,
        rank: int | dict[str, int],
        alpha: float | dict[str, float] | None,
        on: On,
        name: str | None,
        scale: float,
    ) -> None:
        super().__init__(on, name, scale)
        who = type(self).__name__
        ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
        if not ranks or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise ValueError(f"{who}: rank must be a positive whole number, got {rank!r}.")
        self.rank, self.alpha = rank, alpha

    def numbers(self, site: str) -> tuple[int, float]:
        """Rank and alpha at a site."""
        rank = int(at(site, self.rank, "rank", type(self).__name__))
        return rank, rank if self.alpha is None else at(site, self.alpha, "alpha", type(self).__name__)

    def arguments(self) -> dict[str, Any]:
        found = super().arguments()
        if self.is_rebased:  # globs over names from another root say nothing to who reads the file
            for name in (name for name in self.by_site if isinstance(found.get(name), Mapping)):
                found[name] = {s: at(full, found[name], name, type(self).__name__) for s, full in self._known.items()}
        return found

    def check_alike(self, other: Mixin, where: str) -> None:
        """Weights do not tell the alpha that they were trained with.

        Raises:
            ValueError: another alpha at some site, or alpha over another root of the rank.
        """
        assert isinstance(other, WeightMixin)
        for site, full in self._known.items():
            theirs, ours = other.numbers(other._known.get(site, site))[1], self.numbers(full)[1]
            if theirs != ours:
                raise ValueError(
                    f"{where}: alpha at {site!r} is {theirs:g}, here {ours:g}; attach the file's own mixin."
                )
        if getattr(self, "rslora", False) != getattr(other, "rslora", False):
            raise ValueError(
                f"{where}: one of the two is rsLoRA, {self.name!r} or the file's; attach the file's own mixin."
            )

    # Merging -------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Whether the hosts' weights hold the change now."""
        return any(part.is_merged for _, part in self._weight_parts())

    def merge(self) -> Self:
        """Let hosts have the changed weights, for sampling; :meth:`unmerge` takes those away again.

        Their own parameters stay registered, the same objects with the same values, tied or not. Several mixins may be
        merged, and unmerged in any order. Until then the host's weights cannot be loaded or trained, and scale, switch
        and gates are refused.

        Raises:
            ValueError: not attached, off, merged already, in the term of another mixin alone, or on a weight that is
                computed.
        """
        if not self.is_attached or not self.enabled or self.is_merged:
            state = "not attached" if not self.is_attached else "merged already" if self.is_merged else "off"
            raise ValueError(f"{type(self).__name__}: {self.name!r} is {state}, so it cannot be merged.")
        if terms := [part.term for _, part in self._weight_parts() if part.term]:
            raise ValueError(
                f"{type(self).__name__}: {self.name!r} acts in the term of {terms[0]!r} alone, and merged it would act "
                "everywhere."
            )
        for site, (module, _) in self._sites.items():
            if module._parameters.get("weight") is None:
                raise ValueError(
                    f"{type(self).__name__}: the weight of {site!r} is no parameter but computed (parametrised), so "
                    f"{self.name!r} cannot be merged into it."
                )
        for module, part in self._weight_parts():
            part.merge(module)
        return self

    def unmerge(self) -> Self:
        """Take the change out again: the hosts have their own weights, whatever became of those."""
        for module, part in self._weight_parts():
            part.unmerge(module)
        return self

    @contextmanager
    def merged(self) -> Iterator[Self]:
        """Merged inside, not outside."""
        self.merge()
        try:
            yield self
        finally:
            self.unmerge()

    def _weight_parts(self) -> list[tuple[Any, WeightPart]]:
        return [(module, part) for module, part in self._sites.values() if isinstance(part, WeightPart)]

    def _turning(self, what: str) -> None:
        super()._turning(what)
        if self.is_merged:
            raise ValueError(
                f"{what} {self.name!r} while it is merged into its host would do nothing; unmerge() first."
            )

    def detach(self) -> None:
        self.unmerge()
        super().detach()

    def load_state_dict(self, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        if self.is_merged:
            raise ValueError(f"{type(self).__name__}: {self.name!r} is merged into its host; unmerge() before loading.")
        super().load_state_dict(weights, strict)


class WeightPart(Part):
    """A change of one layer's weight: parameters, and :meth:`delta`.

    Parameters are kept in float32 and cast to the input's dtype.

    Attributes:
        layer: What the host is.
        merged_into: The host's own weight, as it was when the change was merged; None where it is not.
    """

    def __init__(self, host: nn.Module, where: str, who: str) -> None:
        super().__init__()
        self.layer = Layer.of(host, where, who)
        self.merged_into: Same | None = None
        self._host = (host,)  # a tuple hides it from the module tree

    @property
    def base(self) -> Tensor:
        """The host's own weight, of which this is a change; without gradient."""
        return own(self._host[0]).detach()

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The change of ``weight`` in its shape, before :attr:`scale`; float32 or wider."""

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the change adds to the output for an input ``x``, at a scale of 1."""
        weight = own(module)
        return self.layer.call(module, x, self.delta(weight).to(x.dtype if x.is_floating_point() else weight.dtype))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.merged_into is not None:
            self._check_merged(module)
            return output
        x = args[0] if args else kwargs["input"]
        change = self.change(module, x)
        change = change if change.dtype == output.dtype else change.to(output.dtype)
        # Scaled as it is added: one kernel, eager or compiled, and nothing more kept for the backward pass.
        return torch.addcmul(output, change, self.amount(change))

    # Merging -------------------------------------------------------------------------------------

    @property
    def merged(self) -> Tensor | None:
        return None if self.merged_into is None else self._host[0].weight  # type: ignore[return-value]

    def merge(self, module: nn.Module) -> None:
        _merge(module, [*_merged_at(module), self])

    def unmerge(self, module: nn.Module) -> None:
        if self.is_merged:
            self.merged_into = None
            _merge(module, _merged_at(module))

    def _check_merged(self, module: nn.Module) -> None:
        """Refuse a call that would be silently wrong."""
        weight = own(module)
        if self.gate is not None:
            fault = "for all rows alike; unmerge() to use gates"
        elif module.training and is_grad_enabled() and any(p.requires_grad for p in (weight, *self.parameters())):
            fault = (
                "and neither would learn in this call, which is one of training. unmerge() to train; "
                "requires_grad_(False) on both to train something else; eval() or torch.no_grad() to sample"
            )
        elif not is_compiling() and self.merged_into != Same(weight):
            fault = "whose own weights have changed since; unmerge() and merge() again"
        else:
            return
        raise ValueError(f"{self.mixin_name!r} is merged into its host, {fault}.")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: ANN401  # as nn.Module has it
        super()._apply(fn, recurse)
        if self.is_merged:
            move_stand_ins(self._host[0], fn)
        return self


def _merged_at(module: nn.Module) -> list[WeightPart]:
    return [part for part in module._modules[PORT].values() if isinstance(part, WeightPart) and part.is_merged]  # type: ignore[union-attr]


def _merge(module: nn.Module, parts: list[WeightPart]) -> None:
    """The weight and all changes, each of that weight, summed in float32 at least and rounded once."""
    stand_down(module)
    if not parts:
        return
    weight = own(module)
    # Whatever surrounds it: autocast would round the changes, and what inference makes is of no use after it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for part in parts:
            total += part.scale.to(total.dtype) * part.delta(weight).to(total.dtype)
            part.merged_into = Same(weight)
    stand_in(module, total.to(weight.dtype))


def at(site: str, value: float | Mapping[str, float], what: str, who: str) -> float:
    """A number for a site."""
    if not isinstance(value, Mapping):
        return value
    for glob, number in value.items():
        if fnmatchcase(site, glob):
            return number
    raise ValueError(f"{who}: no {what} for {site!r}; the globs are {', '.join(value)}. Add '*' for all others.")
