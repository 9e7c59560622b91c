"""An adapter from its tensors alone: files of kohya, LyCORIS and ComfyUI say an alpha for each site and no more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vdiff.checkpoints import WeightFileError
from vdiff.mixins.formats.adapter_weights import AdapterWeights, Site
from vdiff.mixins.formats.leaves import full_rank, kind_of, rank_of, sites_of


def adapter(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], where: str, is_flat: bool = False
) -> AdapterWeights:
    """Rank and kind are as the shapes say; without an alpha, or with 0, it is the rank.

    Args:
        table: How names end, and the leaf that it means: of :data:`~vdiff.mixins.formats.leaves.LEAVES`, or ``alpha``,
            ``mid`` and ``dora_scale``.
        is_flat: Whether names have underscores where the modules' have dots.

    Raises:
        WeightFileError: names that the table lacks, sites of several kinds, or half of one.
    """
    found = {name: _ours(weights, f"{where}: {name!r}") for name, weights in sites_of(tensors, table, where).items()}
    kind = kind_of(found, where)
    sites = {}
    for name, weights in found.items():
        alpha = weights.pop("alpha", None)
        rank = rank_of(kind, weights)
        if rank is None:  # two full factors are taken as they are, whatever alpha says
            rank = full_rank(weights)
            alpha = None
        said = rank if alpha is None or not float(alpha) else float(alpha)
        sites[name] = Site(weights, rank, said, is_embedding=f"{name}.lora_embedding_A" in tensors)
    return AdapterWeights(kind, sites, is_flat=is_flat)


def _ours(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """With vdiff's leaves alone, where they are of LoRA or DoRA."""
    weights = dict(weights)
    if {"A", "B", "mid"} <= weights.keys():
        weights["A"] = _folded(weights["A"], weights.pop("mid"), where)
    if {"B", "dora_scale"} <= weights.keys():
        weights["magnitude"] = _lengths(weights.pop("dora_scale"), len(weights["B"]), where)
    elif "magnitude" in weights:  # peft's is (1, out, 1, ...) for a convolution
        weights["magnitude"] = weights["magnitude"].flatten()
    return weights


def _folded(a: Tensor, mid: Tensor, where: str) -> Tensor:
    """``(rank, in, 1, ...)`` and ``(rank, rank, *kernel)`` as one convolution, for nothing stands between the two
    (LyCORIS' LoCon with a Tucker decomposition); at least float32."""
    if mid.shape[:2] != (len(a), len(a)) or a.flatten(1).shape[1] != a.shape[1]:
        raise WeightFileError(
            f"{where}: lora_down {tuple(a.shape)} and lora_mid {tuple(mid.shape)}; with a lora_mid the first is "
            "(rank, in, 1, 1) and the second (rank, rank, h, w)."
        )
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.einsum("rs...,si->ri...", mid.to(dtype), a.flatten(1).to(dtype))


def _lengths(scale: Tensor, rows: int, where: str) -> Tensor:
    if scale.shape[0] != rows or scale.numel() != rows:
        raise WeightFileError(
            f"{where}: a dora_scale of shape {tuple(scale.shape)} for {rows} outputs. vdiff's DoRA has a length per "
            "output, as the paper; this one has one per input."
        )
    return scale.flatten()
