r"""How alike two sets of activations are: of two networks, of two sites, of one site before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = False) -> Tensor:
    r"""Centred kernel alignment :math:`\|Y^\top X\|_F^2 / (\|X^\top X\|_F \|Y^\top Y\|_F)` of centred columns.

    1 for representations that are the same up to rotation and one scale, whatever their widths; in float64, ``()``.

    Args:
        x, y: ``(n, p)`` and ``(n, q)``, the same n samples.
        unbiased: By unbiased estimates, which few samples of wide features need; may be below 0. Wants n > 3.

    References:
        Kornblith et al., arXiv:1905.00414; unbiased, Nguyen et al., arXiv:2010.15327, eq. 3.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"linear_cka: expected (n, p) and (n, q), got {tuple(x.shape)} and {tuple(y.shape)}.")
    if len(x) < (4 if unbiased else 2):
        raise ValueError(f"linear_cka: {len(x)} samples are too few.")
    x, y = (one.double() - one.double().mean(0) for one in (x, y))
    if unbiased:
        k, l = x @ x.T, y @ y.T  # noqa: E741  # the paper's letters
        return _hsic(k, l) / (_hsic(k, k) * _hsic(l, l)).sqrt()
    if max(x.shape[1], y.shape[1]) > len(x):  # by the smaller matrices
        k, l = x @ x.T, y @ y.T  # noqa: E741
        return (k * l).sum() / (k.norm() * l.norm())
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    n = len(k)
    k, l = (one - torch.diag(one.diagonal()) for one in (k, l))  # noqa: E741
    cross = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)
    return ((k * l).sum() + cross) / (n * (n - 3))


@dataclass(frozen=True)
class Change:
    """What became of one site.

    Attributes:
        cka: :func:`linear_cka` of before and after.
        relative: Norm of the difference in units of the norm before.
        cosine: Mean over samples of the cosine between before and after.
    """

    cka: float
    relative: float
    cosine: float


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Change]:
    """Sites that both have, such as two recordings (:meth:`Record.last`) of the same inputs.

    Tokens and pixels are samples, features are their last axis, or the second of a feature map ``(B, C, H, W)``.

    Raises:
        ValueError: they share no site, or a site differs in shape.
    """
    shared = [site for site in before if site in after]
    if not shared:
        raise ValueError(f"compare: no site is in both: {list(before)[:3]} and {list(after)[:3]}.")
    found = {}
    for site in shared:
        if before[site].shape != after[site].shape:
            raise ValueError(f"compare: {site} is {tuple(before[site].shape)}, then {tuple(after[site].shape)}.")
        x, y = samples(before[site]).double(), samples(after[site]).double()
        cosine = torch.cosine_similarity(x, y, dim=1).mean()
        found[site] = Change(float(linear_cka(x, y)), float((y - x).norm() / x.norm()), float(cosine))
    return found


def samples(x: Tensor) -> Tensor:
    """Activations as ``(n, features)``."""
    return (x.movedim(1, -1) if x.ndim in (4, 5) else x).reshape(-1, x.shape[1 if x.ndim in (4, 5) else -1])
