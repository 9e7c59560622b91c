"""The classifier: knows real digits, and is not fooled by labels."""

import sys

import pytest
import torch

from vdiff.data import Digits
from vdiff.evaluation import ClassifierAccuracy, Reference, Samples
from vdiff.registry import build


@pytest.fixture(scope="module")
def reference():
    return Reference.of(Digits("train"), Digits("test"))


def test_real_digits_are_recognised(reference):
    figures = ClassifierAccuracy()(Samples(reference.test_images, reference.test_labels), reference)
    assert figures["classifier_accuracy"] == figures["classifier_accuracy_real"] > 0.98


def test_digits_under_other_labels_are_not(reference):
    samples = Samples(reference.test_images, (reference.test_labels + 1) % 10)
    figures = ClassifierAccuracy()(samples, reference)
    assert figures["classifier_accuracy"] < 0.01
    assert figures["classifier_accuracy_real"] > 0.98


def test_noise_is_recognised_by_chance_only(reference):
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    figures = ClassifierAccuracy()(Samples(noise, torch.arange(200) % 10), reference)
    assert figures["classifier_accuracy"] < 0.25


@pytest.mark.parametrize("missing", ["samples", "train_labels", "test_labels"])
def test_without_labels_there_is_nothing_to_compare(reference, missing):
    labels = {"train_labels": reference.train_labels, "test_labels": reference.test_labels} | {missing: None}
    labels.pop("samples", None)
    samples = Samples(reference.test_images, None if missing == "samples" else reference.test_labels)
    with pytest.raises(ValueError, match="need labels"):
        ClassifierAccuracy()(samples, Reference(reference.train_images, reference.test_images, **labels))


def test_without_scikit_learn_the_extra_is_named(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        ClassifierAccuracy()(Samples(reference.test_images, reference.test_labels), reference)


def test_metrics_are_built_by_name():
    assert build({"type": "classifier_accuracy", "gamma": 0.064}, "metric").gamma == 0.064
    assert build({"type": "classifier_accuracy", "gamma": "scale"}, "metric").gamma == "scale"
    assert build("frechet_distance", "metric") and build("nearest_distance", "metric")
