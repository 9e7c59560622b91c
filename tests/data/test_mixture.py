"""A mixture: the right proportions everywhere, and no example twice before all came once."""

import pytest
import torch

from vdiff.data import Dataset, Digits, Loader, MixtureDataset
from vdiff.registry import build


class Counted(Dataset, abstract=True):
    def __init__(self, name, size, ranges=None):
        self.name, self.size, self.ranges = name, size, ranges or {}

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"name": self.name, "number": index}

    def visit(self, index, key):
        return self[index] | {"number": key}


def names(data, numbers):
    return "".join(data[i]["name"] for i in numbers)


def test_any_stretch_has_the_right_proportions_to_within_an_example():
    data = MixtureDataset([Counted("a", 7), Counted("b", 5), Counted("c", 3)], weights=[5, 2, 1], num=400)
    for start in (0, 13, 250):
        for size in (8, 80):
            found = names(data, range(start, start + size))
            for name, share in zip("abc", (5, 2, 1), strict=True):
                assert abs(found.count(name) - size * share / 8) <= 2  # one at each end
    assert names(data, range(400)).count("a") == 250


def test_each_data_set_is_gone_through_before_it_repeats_in_another_order():
    data = MixtureDataset([Counted("a", 7), Counted("b", 5)], weights=[3, 1], num=200)
    visited = [data[i]["number"] for i in range(200) if data[i]["name"] == "a"]
    rounds = [visited[i : i + 7] for i in range(0, len(visited) - 6, 7)]
    assert all(sorted(r) == list(range(7)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 10


def test_by_default_everything_comes_once():
    data = MixtureDataset([Counted("a", 7), Counted("b", 5)])
    assert len(data) == 12
    assert sorted((data[i]["name"], data[i]["number"]) for i in range(12)) == sorted(
        [("a", i) for i in range(7)] + [("b", i) for i in range(5)]
    )


def test_an_example_is_a_function_of_number_and_seed():
    parts = [Counted("a", 70), Counted("b", 50)]
    one, same, other = (MixtureDataset(parts, seed=s) for s in (0, 0, 1))
    assert [one[i] for i in range(120)] == [same[i] for i in range(120)] != [other[i] for i in range(120)]
    assert one.visit(3, 99)["number"] == 99


def test_a_mixture_of_the_splits_is_built_from_a_config():
    node = {"type": "mixture", "datasets": [{"type": "digits"}, {"type": "digits", "split": "test"}], "weights": [1, 1]}
    data = build(node, "dataset")
    assert data.ranges == {"image": (-1.0, 1.0)} and data.classes == Digits.classes
    assert Loader(data, 8).batch(0)["image"].shape == (8, 1, 8, 8)
    assert torch.equal(data[0]["image"], data[0]["image"])


@pytest.mark.parametrize(
    "datasets, weights, message",
    [
        ([], None, "needs data sets with examples"),
        ([Counted("a", 0)], None, r"got sizes \[0\]"),
        ([Counted("a", 1)], [1, 2], "as many weights above 0"),
        ([Counted("a", 1), Counted("b", 1)], [1, 0], "as many weights above 0"),
        (
            [Counted("a", 1, {"x": (0, 1)}), Counted("b", 1, {"x": (-1, 1)})],
            None,
            r"'x' is in \[0, 1\] in one .* \[-1, 1\]",
        ),
    ],
)
def test_what_cannot_be_mixed_is_an_error(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataset(datasets, weights)
