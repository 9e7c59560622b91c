"""Metrics: how near samples are to real data.

A metric compares samples with a training and a test split, and says the same figure for the real
data beside it: a number is only good or bad next to what the real test split would have scored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.data import Dataset, collate, index
from vdiff.registry import Registered


@dataclass(frozen=True, eq=False)
class Samples:
    """What a model drew.

    Attributes:
        images: ``(N, C, H, W)``, or videos ``(N, C, F, H, W)``, in the range that the data set declares, any
            floating type.
        labels: ``(N,)`` integers, what each was asked to be; None for an unconditional model.
    """

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_split("Samples", "images", self.images, self.labels)


@dataclass(frozen=True, eq=False)
class Reference:
    """The real data that samples are compared with.

    Attributes:
        train_images, test_images: ``(N, C, H, W)``, or videos ``(N, C, F, H, W)``, in the range that the data
            set declares.
        train_labels, test_labels: ``(N,)`` integers, or None.
    """

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_split("Reference", "train_images", self.train_images, self.train_labels)
        _check_split("Reference", "test_images", self.test_images, self.test_labels)

    @staticmethod
    def of(
        train: Dataset, test: Dataset, image: str = "image", label: str = "label", most: int | None = None
    ) -> Reference:
        """Two data sets, by the names of their fields; without labels if they have none.

        Args:
            most: Of a larger data set a fixed random choice of this many; by default all of it.
        """
        parts = [collate([data[i] for i in _chosen(len(data), most)]) for data in (train, test)]
        for part in parts:
            if image not in part:
                raise ValueError(f"Reference: the data has no field {image!r}. It has: {', '.join(part)}.")
        images, labels = [part[image] for part in parts], [part.get(label) for part in parts]
        return Reference(images[0], images[1], labels[0], labels[1])


class Metric(Registered, kind="metric"):
    """Figures about samples, by name.

    Attributes:
        ndims: Axes of the samples that it can measure: 4 for images, 5 for videos.
        needs_labels: Whether samples and reference must say what each picture shows.
    """

    ndims: tuple[int, ...] = (4,)
    needs_labels: bool = False

    def fits(self, reference: Reference, has_labels: bool = True) -> bool:
        """Whether it measures samples of the reference's kind."""
        told = has_labels and reference.train_labels is not None and reference.test_labels is not None
        return reference.test_images.ndim in self.ndims and (told or not self.needs_labels)

    @abstractmethod
    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        """Figures: ``name`` for the samples, ``name_real`` for real data in their place, and
        ``name_ratio``, the one by the other, where that says something.

        Raises:
            ValueError: the metric needs something that the samples or the reference do not have.
        """


def evaluate(samples: Samples, reference: Reference, metrics: Sequence[Metric]) -> dict[str, float]:
    """The figures of several metrics together, in order.

    Raises:
        ValueError: the samples do not have the reference's shape, a metric does not measure samples of this kind,
            or two metrics use one name.
    """
    for split in (reference.train_images, reference.test_images):
        if samples.images.shape[1:] != split.shape[1:]:
            raise ValueError(
                f"evaluate: the samples are {tuple(samples.images.shape[1:])} each, the reference is "
                f"{tuple(split.shape[1:])}. Compare at one size."
            )
    figures: dict[str, float] = {}
    for metric in metrics:
        if samples.images.ndim not in metric.ndims:
            raise ValueError(
                f"evaluate: {type(metric).__name__} measures {_spell(metric.ndims)}, and the samples are "
                f"{_spell((samples.images.ndim,))}. Leave it out."
            )
        for name, value in metric(samples, reference).items():
            if name in figures:
                raise ValueError(f"evaluate: two metrics call a figure {name!r}; leave one of them out.")
            figures[name] = value
    return figures


_WORDS = {4: "images", 5: "videos"}


def _spell(ndims: Sequence[int]) -> str:
    return " and ".join(_WORDS[n] for n in ndims)


def _chosen(size: int, most: int | None) -> Sequence[int]:
    return range(size) if most is None or size <= most else sorted(index(0, 0, i, size) for i in range(most))


def _check_split(owner: str, field: str, images: Tensor, labels: Tensor | None) -> None:
    if images.ndim not in _WORDS or len(images) == 0 or not images.is_floating_point():
        raise ValueError(
            f"{owner}: {field} must be (N, C, H, W) or (N, C, F, H, W), N at least 1, of a floating type; got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    is_bad = ~torch.isfinite(images).flatten(1).all(1)
    if is_bad.any():
        raise ValueError(f"{owner}: {int(is_bad.sum())} of {len(images)} {field} hold values that are not finite.")
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"{owner}: {len(images)} {field} need as many whole labels; got {tuple(labels.shape)} of {labels.dtype}."
        )
