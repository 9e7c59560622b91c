"""The order of an epoch: a permutation from a formula, and a fair one."""

import math
from itertools import permutations

import pytest

from vdiff.data import index


def order(seed, epoch, size):
    return [index(seed, epoch, i, size) for i in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 10, 16, 17, 31, 100, 101, 1437, 1797, 10_007])
def test_every_epoch_visits_every_example_once(size):
    for seed, epoch in [(0, 0), (0, 1), (5, 0), (2**62, 10**6)]:
        assert sorted(order(seed, epoch, size)) == list(range(size))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = {tuple(order(seed, epoch, 1437)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_place_needs_no_other_place():
    """Nothing of the size of the data is stored or walked: the middle of an epoch of 10^15 costs as much as any."""
    found = {index(0, 3, i, 10**15) for i in range(10**14, 10**14 + 100)}
    assert len(found) == 100 and all(0 <= f < 10**15 for f in found)


def test_the_order_stays_the_same_from_version_to_version():
    """A run resumed under a newer version must go on in the order it began: these numbers may not change."""
    assert order(0, 0, 1437)[:8] == [263, 684, 553, 1352, 464, 913, 1053, 901]
    assert order(7, 3, 1437)[:4] == [800, 516, 252, 654]


@pytest.mark.parametrize("i, size", [(-1, 5), (5, 5), (0, 0)])
def test_a_place_outside_of_the_epoch_is_an_error(i, size):
    with pytest.raises(IndexError, match=f"place {i} is not in an epoch of {size}"):
        index(0, 0, i, size)


def excess(counts, expected):
    """How many standard deviations a chi-square statistic lies above its mean."""
    statistic = sum((c - expected) ** 2 / expected for c in counts)
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_all_orders_of_three_are_equally_likely():
    counts = dict.fromkeys(permutations(range(3)), 0)
    for epoch in range(6000):
        counts[tuple(order(0, epoch, 3))] += 1
    assert excess(counts.values(), 1000) < 5


@pytest.mark.parametrize("size", [10, 13])
def test_every_example_is_equally_likely_at_every_place(size):
    for place in range(size):
        counts = [0] * size
        for epoch in range(2000):
            counts[index(1, epoch, place, size)] += 1
        assert excess(counts, 2000 / size) < 5


def test_what_follows_an_example_is_equally_likely_to_be_any_other():
    size, counts = 11, {}
    for epoch in range(2200):
        visited = order(2, epoch, size)
        for pair in zip(visited, visited[1:], strict=False):
            counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == size * (size - 1)
    assert excess(counts.values(), 2200 * (size - 1) / len(counts)) < 5


def test_an_order_has_one_fixed_point_on_average():
    """As a random permutation has, whatever the size; the variance is one as well."""
    num_epochs, size = 400, 50
    fixed = sum(index(0, epoch, i, size) == i for epoch in range(num_epochs) for i in range(size))
    assert abs(fixed / num_epochs - 1) < 5 / math.sqrt(num_epochs)
