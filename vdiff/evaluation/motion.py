"""Metrics of one moving thing: does it go straight, does it keep its shape, is it still what it was asked to be?

Meant for light things on dark ground, such as the ``moving_digits``. Ink is what is brighter than the darkest
value of the real training split, from 0 to 1; its centre of mass is where the thing is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.evaluation.base import Metric, Reference, Samples
from vdiff.evaluation.classifier import class_accuracy, fitted_classifier, labels_of


class Straightness(Metric):
    r"""How far the centre of mass strays from uniform motion in a straight line, and how much the shape changes.

    The line of a video is the least-squares fit :math:`\hat c_t = a + b t` to its centres; it is at most as near
    as the nearest line that may be walked at any speed, so a thing that jerks along a straight path strays as
    well. Each figure has its ``_real`` beside it, of the real test split:

    - ``stray``: pixels from the line, the worst frame of a video, median over videos; ``stray_95``: the
      value that 95 of 100 videos stay below;
    - ``straight``: share of videos that never stray more than ``tolerance``;
    - ``travel``: length of the line from first to last frame in pixels, median. A thing that stands still goes
      straight, and only this shows it;
    - ``shape_change``: difference between a frame and the first, both cut out around their centre, as a
      share of the first one's norm; mean over frames, median over videos.

    Args:
        tolerance: In pixels.
        floor: Ink below this share of full ink does not count, or faint noise in a corner would pull the centre.
        size: Side of the cut-out in pixels.
    """

    ndims = (5,)

    def __init__(self, tolerance: float = 0.5, floor: float = 0.1, size: int = 12) -> None:
        self.tolerance, self.floor, self.size = tolerance, floor, size

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        low, high = paper_and_ink(reference)
        figures: dict[str, float] = {}
        for suffix, videos in (("", samples.images), ("_real", reference.test_images)):
            ink = (videos.detach().double() - low) / (high - low)
            for name, value in self.figures(ink).items():
                figures[name + suffix] = value
        return figures

    def figures(self, ink: Tensor) -> dict[str, float]:
        """Of videos ``(N, C, F, H, W)``, 0 is paper and 1 is ink."""
        centres = centres_of_mass(ink, self.floor)
        away, way = strays(centres)
        return {
            "stray": _quantile(away, 0.5),
            "stray_95": _quantile(away, 0.95),
            "straight": (away <= self.tolerance).double().mean().item(),
            "travel": _quantile(way, 0.5),
            "shape_change": _quantile(_shape_change(cut_out(ink, centres, self.size)), 0.5),
        }


class VideoClassifierAccuracy(Metric):
    """Share of samples that a support vector machine, trained on real frames, puts into their class by one frame.

    The frame is cut out around its centre of mass, so that the classifier knows shapes and not places; it
    is trained on that frame of the real training split. ``video_classifier_accuracy`` of the samples
    and ``video_classifier_accuracy_real`` of the real test split, in [0, 1].

    Args:
        frame: Which; by default the last, where a shape has had most time to dissolve.
        floor, size: See :class:`Straightness`.
        c, gamma: See :class:`ClassifierAccuracy`.
    """

    ndims = (5,)
    needs_labels = True

    def __init__(
        self, frame: int = -1, floor: float = 0.1, size: int = 12, c: float = 10.0, gamma: float | str = "scale"
    ) -> None:
        self.frame, self.floor, self.size, self.c, self.gamma = frame, floor, size, c, gamma

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        labels, train_labels, test_labels = labels_of(samples, reference, type(self).__name__)
        low, high = paper_and_ink(reference)

        def features(videos: Tensor) -> Tensor:
            ink = (videos.detach()[:, :, self.frame, None].double() - low) / (high - low)
            return cut_out(ink, centres_of_mass(ink, self.floor), self.size)

        classifier = fitted_classifier(features(reference.train_images), train_labels, self.c, self.gamma)
        return {
            "video_classifier_accuracy": class_accuracy(classifier, features(samples.images), labels),
            "video_classifier_accuracy_real": class_accuracy(classifier, features(reference.test_images), test_labels),
        }


def paper_and_ink(reference: Reference) -> tuple[float, float]:
    """The darkest and the brightest value of the real training split."""
    low, high = reference.train_images.min().item(), reference.train_images.max().item()
    if not high > low:
        raise ValueError(f"motion: every value of the training split is {low:g}, so nothing is seen to move.")
    return low, high


def centres_of_mass(ink: Tensor, floor: float = 0.0) -> Tensor:
    """(row, column) of the centre in each frame of ``(N, C, F, H, W)``: ``(N, F, 2)``; NaN without ink.

    Args:
        floor: Subtracted from the ink first; what is below does not count.
    """
    mass = (ink - floor).clamp(min=0).sum(1)
    rows, columns = (torch.arange(n, dtype=mass.dtype, device=mass.device) for n in mass.shape[-2:])
    total = mass.sum((-1, -2))
    return torch.stack([(mass.sum(-1) @ rows) / total, (mass.sum(-2) @ columns) / total], dim=-1)


def strays(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of centres ``(N, F, 2)``: the largest distance from the line of uniform motion, ``(N,)``, infinite where a
    centre is not known; and the length of that line, ``(N,)``."""
    num = centres.shape[1]
    time = torch.arange(num, dtype=centres.dtype, device=centres.device) - (num - 1) / 2
    mean = centres.mean(1, keepdim=True)
    speed = torch.einsum("f,nfd->nd", time, centres - mean) / time.square().sum().clamp(min=1)
    away = (centres - mean - time[:, None] * speed[:, None]).norm(dim=-1).amax(-1)
    return away.nan_to_num(nan=torch.inf), (speed.norm(dim=-1) * (num - 1)).nan_to_num(nan=0.0)


def cut_out(ink: Tensor, centres: Tensor, size: int) -> Tensor:
    """Squares of ``size`` pixels around the centres, ``(N, C, F, size, size)``; beyond the canvas there is no ink."""
    videos, (height, width) = ink.transpose(1, 2).flatten(0, 1), ink.shape[-2:]
    known = centres.flatten(0, 1).nan_to_num(nan=0.0)
    around = torch.arange(size, dtype=ink.dtype, device=ink.device) - (size - 1) / 2
    rows = (2 * (known[:, :1] + around) + 1) / height - 1  # grid_sample's units: -1 and 1 are the canvas's edges
    columns = (2 * (known[:, 1:] + around) + 1) / width - 1
    where = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    cut = F.grid_sample(videos, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    return cut.unflatten(0, centres.shape[:2]).transpose(1, 2)


def _shape_change(cuts: Tensor) -> Tensor:
    first = cuts[:, :, :1]
    size = first.flatten(1).norm(dim=1).clamp(min=1e-12)
    return (cuts - first).transpose(1, 2).flatten(2).norm(dim=2)[:, 1:].sum(1) / size / max(cuts.shape[2] - 1, 1)


def _quantile(values: Tensor, q: float) -> float:
    """A value that occurs: none is made between a finite and an infinite one."""
    return torch.quantile(values, q, interpolation="higher").item()
