r"""Mixins that stand for a change of weights, :math:`W' = W + s\,D`.

LoRA and its relatives differ in how they write :math:`D`, and each is one small class: a part with parameters and
:meth:`WeightPart.delta`. What follows from that is here: attaching, routing by row, merging and its exact inverse.

Merging puts :math:`W'` in the place of :math:`W`, so that the adapter costs nothing. The original is kept, not
computed back, and the host's state dict goes on saying the original.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vdiff.hooks import PORT, On, Part
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
        """Put the change into the hosts' weights, for sampling; :meth:`unmerge` restores them bit for bit.

        Several mixins may be merged, and unmerged in any order. Until then the host's state dict is that of the host
        alone, its weights cannot be loaded, and scale, switch and gates are refused.

        Raises:
            ValueError: not attached, off, merged already, or in the term of another mixin alone.
        """
        if not self.is_attached or not self.enabled or self.is_merged:
            state = "not attached" if not self.is_attached else "merged already" if self.is_merged else "off"
            raise ValueError(f"{type(self).__name__}: {self.name!r} is {state}, so it cannot be merged.")
        if terms := [part.term for _, part in self._weight_parts() if part.term]:
            raise ValueError(
                f"{type(self).__name__}: {self.name!r} acts in the term of {terms[0]!r} alone, and merged it would act "
                "everywhere."
            )
        for module, part in self._weight_parts():
            part.merge(module)
        return self

    def unmerge(self) -> Self:
        """Take the change out again; the weights are what they were, bit for bit."""
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
        original: The host's weight as it was before merging, None where nothing is merged.
    """

    def __init__(self, host: nn.Module, where: str, who: str) -> None:
        super().__init__()
        self.layer = Layer.of(host, where, who)
        self.original: Tensor | None
        self.register_buffer("original", None, persistent=False)

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The change of ``weight`` in its shape, before :attr:`scale`; float32 or wider."""

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the change adds to the output for an input ``x``, at a scale of 1."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return self.layer.call(module, x, self.delta(weight).to(x.dtype if x.is_floating_point() else weight.dtype))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.original is not None:
            return self._unrouted(output)
        x = args[0] if args else kwargs["input"]
        change = self.change(module, x)
        change = change if change.dtype == output.dtype else change.to(output.dtype)
        # Scaled as it is added: one kernel, eager or compiled, and nothing more kept for the backward pass.
        return torch.addcmul(output, change, self.amount(change))

    def _unrouted(self, output: Tensor) -> Tensor:
        if self.gate is not None:
            raise ValueError(
                f"{self.mixin_name!r} is merged into its host, for all rows alike; unmerge() to use gates."
            )
        return output

    # Merging -------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        return self.original is not None

    def merge(self, module: nn.Module) -> None:
        others = _merged_at(module)
        self.original = others[0].original if others else module.weight.data  # type: ignore[union-attr]
        _merge(module, [*others, self])

    def unmerge(self, module: nn.Module) -> None:
        if self.original is None:
            return
        module.weight.data, self.original = self.original, None  # type: ignore[union-attr]
        others = _merged_at(module)
        if others:
            _merge(module, others)

    def stands_for(self) -> dict[str, Tensor]:
        return {} if self.original is None else {"weight": self.original}


def _merged_at(module: nn.Module) -> list[WeightPart]:
    return [part for part in module._modules[PORT].values() if isinstance(part, WeightPart) and part.is_merged]  # type: ignore[union-attr]


@torch.no_grad()
def _merge(module: nn.Module, parts: list[WeightPart]) -> None:
    """The original and all changes, each of the original, summed in float32 at least and rounded once."""
    original = parts[0].original
    assert original is not None
    total = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
    for part in parts:
        total += part.scale.to(total.dtype) * part.delta(original).to(total.dtype)
    module.weight.data = total.to(original.dtype)  # type: ignore[union-attr]


def at(site: str, value: float | Mapping[str, float], what: str, who: str) -> float:
    """A number for a site."""
    if not isinstance(value, Mapping):
        return value
    for glob, number in value.items():
        if fnmatchcase(site, glob):
            return number
    raise ValueError(f"{who}: no {what} for {site!r}; the globs are {', '.join(value)}. Add '*' for all others.")
