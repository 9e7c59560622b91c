"""Distances between sets of pictures, in pixel space.

The Frechet distance asks whether the samples are distributed like real data, the nearest distance
whether they are copies of the training data. Good samples do well at both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff.evaluation.base import Metric, Reference, Samples

_CHUNK_VALUES = 1 << 26  # at most this many differences in memory at once


class FrechetDistance(Metric):
    r"""Distance between Gaussians fitted to two sets of pictures, over their pixels:
    :math:`|\mu_1 - \mu_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})`.

    ``frechet_distance`` of the samples and ``frechet_distance_real`` of the real training split, both to the
    real test split, and ``frechet_distance_ratio``. Finite sets are never at distance 0, so the ratio says more
    than the distance: 1 is as near as the real training split is. Fewer samples are farther, so compare runs at the
    same number. Squared units of the pixel range.

    Args:
        max_features: Pictures with more values than this are refused; time grows with the cube.

    References:
        Dowson and Landau, The Frechet Distance between Multivariate Normal Distributions, 1982; as a metric of
        generated pictures (over other features), Heusel et al., arXiv:1706.08500.
    """

    ndims = (4, 5)

    def __init__(self, max_features: int = 4096) -> None:
        self.max_features = max_features

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        features = samples.images[0].numel()
        if features > self.max_features:
            raise ValueError(
                f"FrechetDistance: pictures of {features} values need a {features} x {features} covariance, more than "
                f"max_features={self.max_features}. Compare smaller pictures, or raise max_features."
            )
        real = gaussian(reference.test_images)
        distance = frechet(*gaussian(samples.images), *real)
        baseline = frechet(*gaussian(reference.train_images), *real)
        return {
            "frechet_distance": distance,
            "frechet_distance_real": baseline,
            "frechet_distance_ratio": _ratio(distance, baseline),
        }


class NearestDistance(Metric):
    """Median Euclidean distance of a picture to the nearest one of the training split.

    ``nearest_distance`` of the samples, ``nearest_distance_real`` of the real test split, and
    ``nearest_distance_ratio``. A ratio well below 1 means memorising: the samples are nearer to the training
    data than new real data is. Noise has a large one, so a high ratio alone is no merit.
    """

    ndims = (4, 5)

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        distance = nearest(samples.images, reference.train_images).median().item()
        baseline = nearest(reference.test_images, reference.train_images).median().item()
        return {
            "nearest_distance": distance,
            "nearest_distance_real": baseline,
            "nearest_distance_ratio": _ratio(distance, baseline),
        }


def gaussian(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of pictures ``(N, ...)``, float64.

    Raises:
        ValueError: fewer than two pictures.
    """
    if len(images) < 2:
        raise ValueError(f"FrechetDistance: a covariance needs at least two pictures, got {len(images)}.")
    features = images.detach().flatten(1).double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(images) - 1)


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet distance between two Gaussians."""
    # tr (C1 C2)^(1/2) is the sum of the singular values of R1 R2, where R is the symmetric root of C. Unlike the
    # eigenvalues of C1 C2 these lose no digits to another root, and a pixel that never changes does no harm.
    shared = torch.linalg.svdvals(_root(covariance) @ _root(other_covariance)).sum()
    spread = covariance.trace() + other_covariance.trace() - 2 * shared
    return ((mean - other_mean).square().sum() + spread).clamp(min=0).item()


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """Distance of each picture ``(N, ...)`` to the nearest one of ``others`` ``(M, ...)``: ``(N,)`` float64."""
    queries, keys = (x.detach().flatten(1).double() for x in (images, others))
    rows = max(1, _CHUNK_VALUES // keys.numel())
    # Through differences, not through scalar products: a copy is at distance 0, not at the root of a rounding error.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(chunk, keys, compute_mode=mode).amin(1) for chunk in queries.split(rows)])


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues that are zero but for rounding are zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.amax() * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > noise, values, 0).sqrt() @ vectors.T


def _ratio(value: float, baseline: float) -> float:
    return value / baseline if baseline > 0 else float("inf") if value > 0 else 1.0
