"""The values that metrics read, and several metrics together."""

import json

import pytest
import torch

from vdiff.data import Digits
from vdiff.evaluation import Metric, Reference, Samples, evaluate, save_figures, table

IMAGES = torch.zeros(4, 1, 2, 2)
LABELS = torch.arange(4)


class Mean(Metric, abstract=True):
    def __init__(self, name="mean"):
        self.name = name

    def __call__(self, samples, reference):
        return {self.name: samples.images.mean().item()}


def test_a_reference_is_made_of_two_data_sets():
    train, test = Digits("train"), Digits("test")
    reference = Reference.of(train, test)
    assert torch.equal(reference.train_images, train.images) and torch.equal(reference.test_labels, test.labels)
    assert Reference.of(train, test, label="no such field").train_labels is None
    with pytest.raises(ValueError, match="no field 'video'. It has: image, label"):
        Reference.of(train, test, image="video")


def test_figures_come_in_the_order_of_the_metrics():
    figures = evaluate(Samples(IMAGES + 2), Reference(IMAGES, IMAGES), [Mean("b"), Mean("a")])
    assert list(figures.items()) == [("b", 2.0), ("a", 2.0)]


def test_two_metrics_under_one_name_are_an_error():
    with pytest.raises(ValueError, match="two metrics call a figure 'mean'"):
        evaluate(Samples(IMAGES), Reference(IMAGES, IMAGES), [Mean(), Mean()])


def test_samples_of_another_size_are_an_error():
    with pytest.raises(ValueError, match=r"samples are \(1, 2, 2\) each, the reference is \(3, 2, 2\)"):
        evaluate(Samples(IMAGES), Reference(IMAGES, IMAGES.expand(-1, 3, -1, -1)), [Mean()])


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES[0], None, r"must be \(N, C, H, W\).* got \(1, 2, 2\)"),
        (IMAGES[:0], None, "N at least 1"),
        (IMAGES.long(), None, "got .* of torch.int64"),
        (IMAGES.clone().index_fill_(0, torch.tensor([1, 3]), float("nan")), None, "2 of 4 images .* not finite"),
        (IMAGES, LABELS[:3], r"4 images need as many whole labels; got \(3,\)"),
        (IMAGES, LABELS.float(), "got .* of torch.float32"),
    ],
)
def test_bad_samples_are_refused_before_anything_is_measured(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Samples(images, labels)


def test_the_table_puts_real_data_beside_the_samples():
    figures = {"a_b": 0.5, "a_b_real": 1.0, "a_b_ratio": 0.5, "c": 1e-5, "odd_real": 3.0}
    assert table(figures).splitlines() == [
        "           samples      real     ratio",
        "a b         0.5000    1.0000    0.5000",
        "c            1e-05",
        "odd real    3.0000",
    ]


def test_figures_are_kept_as_json(tmp_path):
    save_figures({"a": 0.1, "b": float("inf")}, tmp_path / "new" / "figures.json")
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == {"a": 0.1, "b": None}
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["figures.json"]
