"""Does a classifier of real data recognise the samples as what they were asked to be?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import Tensor

from vdiff.evaluation.base import Metric, Reference, Samples


class ClassifierAccuracy(Metric):
    """Share of samples that a support vector machine, trained on the real training split, puts into their class.

    ``classifier_accuracy`` of the samples and ``classifier_accuracy_real`` of the real test split, both in
    [0, 1]. Meant for small pictures; the pixels are the features. Pictures of one class that all look alike
    score well, so read it beside a distance between distributions.

    Args:
        c: Penalty for a training sample on the wrong side.
        gamma: Width of the radial kernel; ``scale`` is 1 / (features * variance).
    """

    def __init__(self, c: float = 10.0, gamma: float | Literal["scale", "auto"] = "scale") -> None:
        self.c, self.gamma = c, gamma

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError(
                "ClassifierAccuracy: the classifier comes from scikit-learn, which is not installed: "
                "pip install 'vdiff[data]'"
            ) from error
        if samples.labels is None or reference.train_labels is None or reference.test_labels is None:
            raise ValueError(
                "ClassifierAccuracy: samples and both splits of the reference need labels. Draw the samples with "
                "labels, or leave this metric out for an unconditional model."
            )
        classifier = SVC(C=self.c, gamma=self.gamma)  # type: ignore[arg-type]
        classifier.fit(_features(reference.train_images), _classes(reference.train_labels))
        return {
            "classifier_accuracy": _accuracy(classifier, samples.images, samples.labels),
            "classifier_accuracy_real": _accuracy(classifier, reference.test_images, reference.test_labels),
        }


def _accuracy(classifier: Any, images: Tensor, labels: Tensor) -> float:
    return float(classifier.score(_features(images), _classes(labels)))


def _features(images: Tensor) -> np.ndarray:
    return images.detach().flatten(1).double().cpu().numpy()


def _classes(labels: Tensor) -> np.ndarray:
    return labels.detach().cpu().numpy()
