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

    needs_labels = True

    def __init__(self, c: float = 10.0, gamma: float | Literal["scale", "auto"] = "scale") -> None:
        self.c, self.gamma = c, gamma

    def __call__(self, samples: Samples, reference: Reference) -> dict[str, float]:
        labels, train_labels, test_labels = labels_of(samples, reference, type(self).__name__)
        classifier = fitted_classifier(reference.train_images, train_labels, self.c, self.gamma)
        return {
            "classifier_accuracy": class_accuracy(classifier, samples.images, labels),
            "classifier_accuracy_real": class_accuracy(classifier, reference.test_images, test_labels),
        }


def labels_of(samples: Samples, reference: Reference, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the samples, of the training split and of the test split.

    Raises:
        ValueError: some are missing; names the metric that needs them.
    """
    if samples.labels is None or reference.train_labels is None or reference.test_labels is None:
        raise ValueError(
            f"{metric}: samples and both splits of the reference need labels. Draw the samples with "
            "labels, or leave this metric out for an unconditional model."
        )
    return samples.labels, reference.train_labels, reference.test_labels


def fitted_classifier(features: Tensor, labels: Tensor, c: float, gamma: float | str) -> Any:
    """A support vector machine that tells the classes of ``features`` ``(N, ...)`` apart.

    Raises:
        ImportError: scikit-learn is not installed; names the extra.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "ClassifierAccuracy: the classifier comes from scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    classifier = SVC(C=c, gamma=gamma)  # type: ignore[arg-type]
    return classifier.fit(_features(features), _classes(labels))


def class_accuracy(classifier: Any, features: Tensor, labels: Tensor) -> float:
    """Share of ``features`` that the classifier puts into the class of their label."""
    return float(classifier.score(_features(features), _classes(labels)))


def _features(images: Tensor) -> np.ndarray:
    return images.detach().flatten(1).double().cpu().numpy()


def _classes(labels: Tensor) -> np.ndarray:
    return labels.detach().cpu().numpy()
