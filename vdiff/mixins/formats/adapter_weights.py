"""An adapter between two formats: what it is, and the weights of every site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdiff.checkpoints import WeightFileError
from vdiff.checkpoints.diffusers_names import to_diffusers, to_ldm
from vdiff.mixins.base import Mixin
from vdiff.mixins.formats import towers
from vdiff.mixins.formats.leaves import LEAVES
from vdiff.mixins.lokr import factorization
from vdiff.mixins.lora import LoRAPart
from vdiff.mixins.weights import WeightMixin, at
from vdiff.registry import build, did_you_mean


@dataclass(frozen=True)
class Site:
    """The weights at one module.

    Attributes:
        tensors: By the names that :mod:`vdiff.mixins` gives them: ``A``, ``B``, ``magnitude``, ``hada_*``, ``lokr_*``.
        rank, alpha: As the file says, or as the shapes say.
        parts: Of a fused projection, see :class:`~vdiff.mixins.LoRA`.
        is_embedding: The shapes of an embedding's pair do not tell it from a linear layer's.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    parts: int = 1
    is_embedding: bool = False


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter of one network.

    Attributes:
        kind: Name of its mixin: ``lora``, ``dora``, ``loha`` or ``lokr``.
        sites: By name of the module.
        host: Family of the network, None where the file does not say.
        is_flat: Names have underscores where the modules' have dots, as kohya's.
        options: Arguments of the mixin apart from rank, alpha and parts: ``rslora``, ``dropout``.
    """

    kind: str
    sites: Mapping[str, Site]
    host: str | None = None
    is_flat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rank, alpha = (
            ", ".join(f"{number:g}" for number in sorted({getattr(site, name) for site in self.sites.values()}))
            for name in ("rank", "alpha")
        )
        where = f"on {len(self.sites)} modules of a {self.host or 'network'}"
        return f"{self.kind}, rank {rank}, alpha {alpha}, {where}"

    # From a mixin and to one ---------------------------------------------------------------------

    @classmethod
    def of(cls, mixin: Mixin) -> AdapterWeights:
        """What a mixin holds, attached or not.

        Raises:
            ValueError: it is of no kind that other programs know, or it has no weights.
        """
        if not isinstance(mixin, WeightMixin) or mixin.registered_name not in LEAVES:
            raise ValueError(
                f"{mixin.name!r} is a {type(mixin).__name__}; other formats hold {', '.join(LEAVES)}. "
                "Keep it in vdiff's."
            )
        weights: dict[str, dict[str, Tensor]] = {}
        for name, value in mixin.state_dict().items():
            site, _, leaf = name.rpartition(".")
            weights.setdefault(site, {})[leaf] = value
        if not weights:
            raise ValueError(f"{mixin.name!r} was never attached, so it has no weights.")
        known = mixin._known or {site: site for site in weights}
        sites = {}
        for site, tensors in weights.items():
            rank, alpha = mixin.numbers(known[site])
            parts = int(at(known[site], getattr(mixin, "parts", 1), "parts", "LoRA"))
            part = mixin._sites[site][1] if mixin.is_attached else None
            if isinstance(part, LoRAPart) and part.layer.groups > 1:
                raise ValueError(f"{mixin.name!r}: {site!r} has groups, which other formats do not hold.")
            is_embedding = isinstance(part, LoRAPart) and part.layer.kind == "embedding"
            sites[site] = Site(tensors, rank, float(alpha), parts, is_embedding)
        options = {
            name: getattr(mixin, name)
            for name in ("rslora", "dropout", "init", "decompose_both", "factor", "tucker")
            if hasattr(mixin, name)
        }
        return cls(mixin.registered_name or "", sites, mixin.host, options=options)

    def mixin(self, name: str | None = None) -> WeightMixin:
        """The mixin, ready to be attached to a host whose modules have these names."""
        arguments: dict[str, Any] = {
            "on": list(self.sites),
            "rank": _by_site({s: site.rank for s, site in self.sites.items()}),
            "alpha": _by_site({s: site.alpha for s, site in self.sites.items()}),
        }
        arguments |= {key: self.options[key] for key in _TAKES[self.kind] if key in self.options}
        if self.kind == "lora":
            arguments["parts"] = _by_site({s: site.parts for s, site in self.sites.items()})
        if self.kind in ("loha", "lokr"):
            arguments["tucker"] = any("_t" in leaf for site in self.sites.values() for leaf in site.tensors)
        if self.kind == "lokr":
            arguments["factor"] = factors(self.sites)
            arguments["decompose_both"] = any("lokr_w1_a" in site.tensors for site in self.sites.values())
        mixin = build({"type": self.kind, **arguments, **({"name": name} if name else {})}, "mixin", "adapter")
        mixin.host = self.host
        mixin.load_state_dict({f"{s}.{leaf}": v for s, site in self.sites.items() for leaf, v in site.tensors.items()})
        return mixin

    # Names ---------------------------------------------------------------------------------------

    def renamed(self, rename: Callable[[str], str]) -> AdapterWeights:
        """With other names for its sites."""
        sites = {rename(site): value for site, value in self.sites.items()}
        if len(sites) < len(self.sites):
            raise WeightFileError(f"Two of the {len(self.sites)} sites would have one name.")
        return replace(self, sites=sites)

    def placed(self, names: Iterable[str], host: str | None = None, num_res_blocks: int = 2) -> AdapterWeights:
        """With the names that a host gives its modules.

        Args:
            names: Of the host's modules. Where they are latent diffusion's, diffusers' names are understood, too.

        Raises:
            WeightFileError: sites that the host does not have, all listed, or a name that means two modules.
        """
        names, is_unet = list(names), host in (None, "UNet")
        meanings: dict[str, set[str]] = {}
        for name in names:
            for alias in {name, (is_unet and to_diffusers(name, num_res_blocks)) or name, *towers.aliases(name)}:
                meanings.setdefault(alias.replace(".", "_") if self.is_flat else alias, set()).add(name)
        lost = [site for site in self.sites if site not in meanings]
        if lost:
            raise WeightFileError(
                f"{len(lost)} of {len(self.sites)} sites are not in {host or 'the host'}: {', '.join(lost[:8])}"
                f"{', ...' if len(lost) > 8 else '.'}"
                f"{towers.refusal(lost, names) or did_you_mean(lost[0], meanings) + ' Is it made for this network?'}"
            )
        for site in self.sites:
            if len(meanings[site]) > 1:
                raise WeightFileError(
                    f"{site!r} may mean {' or '.join(sorted(meanings[site]))}, and nothing tells which."
                )
        return replace(self.renamed(lambda site: next(iter(meanings[site]))), host=host, is_flat=False)

    def in_diffusers(self, num_res_blocks: int = 2) -> AdapterWeights:
        """With the names of diffusers and transformers, where the names are latent diffusion's or of a text tower;
        otherwise as it is."""
        is_unet = self.host in (None, "UNet")
        return self.renamed(lambda site: towers.today(site) or (is_unet and to_diffusers(site, num_res_blocks)) or site)

    def in_ldm(self, num_res_blocks: int = 2, among: Iterable[str] = ()) -> AdapterWeights:
        """With latent diffusion's names, where the names are diffusers'; otherwise as it is."""
        names = set(among)
        return self.renamed(lambda site: to_ldm(site, num_res_blocks, names) or site)

    # Forms ---------------------------------------------------------------------------------------

    def plain(self) -> AdapterWeights:
        """As one pair per site, which every program can read: fused parts on the diagonal of a larger pair, and a
        start from the base as a second pair that is subtracted. The same change, of a larger rank."""
        if self.kind != "lora":
            return self
        sites = {name: _one_pair(site, bool(self.options.get("rslora"))) for name, site in self.sites.items()}
        return replace(self, sites=sites, options={k: v for k, v in self.options.items() if k != "init"})


VOLUMES = (1, 3, 9, 25, 27, 49)  # of kernels, which files do not tell from channels where the second factor is a pair
_TAKES = {"lora": ("rslora", "dropout", "init"), "dora": ("rslora", "dropout"), "loha": (), "lokr": ()}


def _by_site(values: Mapping[str, Any]) -> Any:
    """One number where all are equal."""
    kinds = set(values.values())
    return next(iter(kinds)) if len(kinds) == 1 else dict(values)


def factors(sites: Mapping[str, Site]) -> int | dict[str, int]:
    """The ``factor`` of LoKr that gives these shapes: one number if one will do for all sites.

    Raises:
        WeightFileError: a site for which there is none.
    """
    shapes = {name: _kronecker(site.tensors) for name, site in sites.items()}
    one = _factor(shapes.values())
    if one is not None:
        return one
    found: dict[str, int] = {}
    for name, sizes in shapes.items():
        factor = _factor([sizes])
        if factor is None:
            raise WeightFileError(
                f"{name}: no `factor` gives the shapes of its Kronecker factors, {sizes[0]} and {sizes[1]}."
            )
        found[name] = factor
    return found


Kronecker = tuple[tuple[int, int], tuple[int, int], bool]


def _kronecker(tensors: Mapping[str, Tensor]) -> Kronecker:
    """Both factors' sizes, outputs and inputs, and whether the second's inputs may have a kernel in them."""

    def size(factor: str) -> tuple[int, int]:
        whole, up, down = (tensors.get(f"{factor}{end}") for end in ("", "_a", "_b"))
        if whole is not None:
            return whole.shape[0], whole.shape[1]
        assert up is not None and down is not None
        return (up.shape[1] if "lokr_t2" in tensors and factor == "lokr_w2" else len(up)), down.shape[1]

    return size("lokr_w1"), size("lokr_w2"), not {"lokr_w2", "lokr_t2"} & tensors.keys()


def _factor(shapes: Iterable[Kronecker]) -> int | None:
    """The ``factor`` that gives all these shapes. It is at least the largest first factor, if not -1."""
    shapes = set(shapes)
    least = max(max(w1) for w1, _, _ in shapes)
    most = max(w1[i] * w2[i] for w1, w2, _ in shapes for i in (0, 1))
    return next((f for f in (-1, *range(least, most + 1)) if all(_gives(f, *sizes) for sizes in shapes)), None)


def _gives(factor: int, w1: tuple[int, int], w2: tuple[int, int], has_kernel: bool) -> bool:
    inputs = [w1[1] * w2[1] // volume for volume in VOLUMES if has_kernel and w2[1] % volume == 0]
    return factorization(w1[0] * w2[0], factor)[0] == w1[0] and any(
        factorization(size, factor)[0] == w1[1] for size in inputs or [w1[1] * w2[1]]
    )


def _one_pair(site: Site, rslora: bool) -> Site:
    a, b, parts = site.tensors["A"], site.tensors["B"], site.parts
    rank = site.rank
    if parts > 1:
        rows, r = len(b) // parts, b.shape[1]
        b = _diagonal(b, parts)
        assert b.shape[:2] == (rows * parts, r * parts)
        rank *= parts
    if "A0" in site.tensors:
        b0 = site.tensors["B0"] if parts == 1 else _diagonal(site.tensors["B0"], parts)
        a, b, rank = torch.cat([a, site.tensors["A0"]]), torch.cat([b, -b0], dim=1), 2 * rank
    grown = rank / site.rank
    alpha = site.alpha * (math.sqrt(grown) if rslora else grown)
    return replace(site, tensors={"A": a, "B": b}, rank=rank, alpha=alpha, parts=1)


def _diagonal(b: Tensor, parts: int) -> Tensor:
    """``(parts * out, r, ...)`` as blocks ``(parts * out, parts * r, ...)``."""
    whole = b.new_zeros(len(b), parts * b.shape[1], *b.shape[2:])
    for part, (rows, block) in enumerate(zip(whole.chunk(parts), b.chunk(parts), strict=True)):
        rows[:, part * b.shape[1] : (part + 1) * b.shape[1]] = block
    return whole
