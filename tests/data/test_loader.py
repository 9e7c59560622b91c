"""The loader: a batch is a function of the step, whoever prepares it and however it is shared."""

import itertools

import pytest
import torch

from vdiff.data import Dataset, Digits, Loader
from vdiff.process import RowKeys, generator
from vdiff.registry import Registered, build, isolated


class Numbers(Dataset, abstract=True):
    """Example i says i, and what its visit drew."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"number": index, "draw": 0.0}

    def visit(self, index, key):
        return {"number": index, "draw": torch.rand((), generator=generator(key))}


class Pairs(Numbers, abstract=True):
    def visit(self, index, key):
        return [{"number": index, "wins": True}, {"number": index, "wins": False}]


def same(one, other):
    assert one.keys() == other.keys()
    for field, value in one.items():
        assert torch.equal(value, other[field]) if isinstance(value, torch.Tensor) else value == other[field], field


@pytest.mark.parametrize("size, batch_size", [(12, 4), (10, 4), (3, 7), (1, 2), (1437, 128)])
def test_every_example_comes_once_an_epoch_and_no_tail_is_dropped(size, batch_size):
    loader = Loader(Numbers(size), batch_size)
    num_steps = -(-3 * size // batch_size)
    seen = torch.cat([loader.batch(step)["number"] for step in range(num_steps)]).tolist()
    epochs = [seen[e * size : (e + 1) * size] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 10 or epochs[0] != epochs[1]


def test_without_shuffling_examples_come_by_number():
    loader = Loader(Numbers(5), 4, shuffle=False)
    assert [loader.batch(step)["number"].tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


def test_noise_keys_count_what_was_consumed_and_never_return():
    loader = Loader(Numbers(5), 4)
    keys = torch.cat([loader.batch(step)["noise_key"] for step in range(10)])
    assert keys.tolist() == list(range(40))
    assert loader.batch(7)["step"] == 7 and loader.epoch_at(7) == 5.6


def test_a_batch_does_not_depend_on_the_batches_before():
    loader = Loader(Numbers(50), 8, seed=1)
    history = list(loader.batches(0, 9))
    resumed = Loader(Numbers(50), 8, seed=1)
    for expected, found in zip(history[4:], resumed.batches(4, 9), strict=True):
        same(expected[0], found[0])


def test_the_seed_changes_the_order_and_is_handed_on():
    one, other = (Loader(Numbers(50), 50, seed=seed).batch(0) for seed in (0, 1))
    assert one["number"].tolist() != other["number"].tolist()
    assert (one["seed"], other["seed"]) == (0, 1)


@pytest.mark.parametrize("accumulate, world_size", [(1, 1), (3, 1), (1, 4), (2, 2), (3, 4)])
@pytest.mark.parametrize("dataset", [Numbers(31), Pairs(31)])
def test_ranks_and_accumulation_share_one_and_the_same_batch(dataset, accumulate, world_size):
    whole = Loader(dataset, 24).batch(5)
    parts = [
        Loader(dataset, 24, accumulate=accumulate, rank=rank, world_size=world_size).batch(5, micro)
        for micro in range(accumulate)
        for rank in range(world_size)
    ]
    for field in ("number", "noise_key", "position", "index"):
        assert torch.equal(torch.cat([part[field] for part in parts]), whole[field]), field
    assert {part["global_size"] for part in parts} == {24}
    strata = torch.cat([RowKeys.of(part).stratum("level") for part in parts])
    assert torch.equal(strata.unique(), torch.arange(24))


def test_a_pair_is_one_example_and_two_rows():
    batch = Loader(Pairs(9), 4).batch(0)
    assert batch["wins"].tolist() == [True, False] * 4
    assert batch["noise_key"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch["number"][::2].tolist() == batch["number"][1::2].tolist()


def test_a_random_visit_is_new_each_epoch_and_the_same_when_repeated():
    loader = Loader(Numbers(6), 6, shuffle=False)
    assert torch.equal(loader.batch(1)["draw"], loader.batch(1)["draw"])
    assert torch.cat([loader.batch(step)["draw"] for step in range(4)]).unique().numel() == 24


@pytest.mark.parametrize("make", [lambda: Numbers(31), lambda: Digits("test")], ids=["numbers", "digits"])
def test_workers_change_nothing(make):
    alone = Loader(make(), 12, accumulate=2)
    helped = Loader(make(), 12, accumulate=2, num_workers=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps = 0
    for expected, found in zip(alone.batches(3, 10), helped.batches(3, 10), strict=True):
        assert len(expected) == len(found) == 2
        for one, other in zip(expected, found, strict=True):
            same(one, other)
        steps += 1
    assert steps == 7
    assert torch.equal(torch.get_rng_state(), before)  # torch's loader would have drawn from it


def test_batches_are_endless_by_default():
    batches = Loader(Numbers(3), 2).batches(100)
    assert [micros[0]["step"] for micros in itertools.islice(batches, 3)] == [100, 101, 102]


@pytest.mark.parametrize("accumulate, world_size", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_validation_pass_sees_every_example_once_by_number(accumulate, world_size):
    loaders = [Loader(Numbers(20), 12, accumulate=accumulate, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [batch for loader in loaders for batch in loader.epoch()]
    numbers = torch.cat([batch["number"] for batch in batches])
    assert sorted(numbers.tolist()) == list(range(20))
    assert torch.equal(torch.cat([batch["noise_key"] for batch in batches]), numbers)
    assert all(batch["step"] == 0 and int(batch["position"].max()) < batch["global_size"] for batch in batches)
    assert {len(batch["number"]) for batch in batches} <= set(range(1, 12 // (accumulate * world_size) + 1))


def test_two_validation_passes_meet_the_same_noise():
    loader = Loader(Digits("test"), 100)
    for one, other in zip(loader.epoch(), loader.epoch(), strict=True):
        assert torch.equal(RowKeys.of(one).normal("noise", (4,)), RowKeys.of(other).normal("noise", (4,)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "rank": 1}, "rank 1 below world_size"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers -1"),
        ({"batch_size": 10, "accumulate": 2, "world_size": 2}, "10 does not divide .* multiple of 4"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(5), **arguments)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="Numbers has no examples"):
        Loader(Numbers(0), 1)


@pytest.mark.parametrize("step, micro", [(-1, 0), (0, 2), (0, -1)])
def test_a_micro_batch_that_does_not_exist_is_an_error(step, micro):
    with pytest.raises(IndexError, match=f"no micro-batch {micro} of step {step}"):
        Loader(Numbers(5), 4, accumulate=2).batch(step, micro)


def test_a_fault_in_a_worker_keeps_its_message():
    class Broken(Numbers, abstract=True):
        def visit(self, index, key):
            return {"number": None}

    with pytest.raises(ValueError, match="'number' of example [0-9]+ is None"):
        next(Loader(Broken(5), 2, num_workers=1).batches())


def test_a_loader_is_built_from_a_mapping():
    with isolated():

        class Run(Registered, kind="made_up_run"):
            pass

        class Short(Run):
            def __init__(self, data: Loader) -> None:
                self.data = data

        tree = {"type": "short", "data": {"dataset": {"type": "digits", "split": "test"}, "batch_size": 4}}
        loader = build(tree, "made_up_run").data
    assert len(loader.dataset) == 360 and loader.batch(0)["image"].shape == (4, 1, 8, 8)


def test_a_data_set_of_torch_is_answered_with_what_to_derive_from():
    class Foreign(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": torch.zeros(1)}

    with pytest.raises(TypeError, match="no vdiff.data.Dataset. Derive from that"):
        Loader(Foreign(), 2)
