import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdiff.process import RowKeys, derive, forked, generator

WORD = st.integers() | st.text(st.sampled_from("ab\x1f:'intsr,1 "), max_size=6)
WORDS = st.lists(WORD, max_size=4)


def keys(values, position=None, global_size=None, seed=0, step=0):
    position = tuple(range(len(values))) if position is None else tuple(position)
    return RowKeys(seed, step, tuple(values), position, global_size or max(position) + 1)


# Words ---------------------------------------------------------------------------------------------


@given(WORDS, WORDS)
def test_different_words_give_different_seeds(one, other):
    assert (derive(*one) == derive(*other)) == (one == other)


@pytest.mark.parametrize(
    "one, other",
    [
        (("a", "b"), ("ab",)),
        (("a", "b"), ("b", "a")),
        (("a", "b"), ("a\x1fstr:b",)),
        (("a\x1f", "b"), ("a", "\x1fb")),
        ((1, 2), (12,)),
        ((1,), ("1",)),
        ((), ("",)),
        ((0,), (-0, 0)),
        ((2**64,), (0,)),
        ((-1,), (1,)),
    ],
)
def test_words_do_not_run_together(one, other):
    assert derive(*one) != derive(*other)


def test_a_seed_is_63_bits_and_the_same_in_every_process():
    words = "str:sample\x1fint:3\x1fstr:é".encode()  # no hash() in it, which differs from process to process
    assert derive("sample", 3, "é") == int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") // 2
    assert all(0 <= derive(i) < 2**63 for i in range(1000)) and max(derive(i) for i in range(1000)) > 2**62


def test_a_number_is_the_same_word_whatever_its_type():
    assert derive(3) == derive(np.int64(3)) == derive(torch.tensor(3)) == derive(np.uint8(3))
    for word in (3.0, None, b"a", (1,)):
        with pytest.raises(TypeError):
            derive(word)


def test_a_generator_is_new_each_time_and_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    one, two = (torch.randn(5, generator=generator("x", 1)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, torch.randn(5, generator=generator("x", 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_forked_randomness_is_keyed_and_put_back():
    before, drop, x = torch.get_rng_state(), nn.Dropout(), torch.ones(64)
    with forked("dropout", 3):
        one = drop(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    with forked("dropout", 3):
        assert torch.equal(drop(x), one)
    with forked("dropout", 4):
        assert not torch.equal(drop(x), one)


def test_forked_randomness_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), forked(1):
        torch.randn(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


# Draws of a batch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [lambda k: k.normal("noise", (3, 2)), lambda k: k.uniform("level")], ids=["normal", "uniform"]
)
class TestDraws:
    def test_a_row_gets_the_same_numbers_in_any_batch_at_any_place(self, draw):
        whole = draw(keys([5, 6, 7, 8]))
        assert torch.equal(draw(keys([8, 6, 7, 5])), whole[[3, 1, 2, 0]])
        assert torch.equal(draw(keys([7])), whole[[2]])
        assert torch.equal(draw(keys([1, 2, 3, 7])), torch.cat([draw(keys([1, 2, 3])), whole[[2]]]))

    def test_the_order_of_draws_does_not_matter(self, draw):
        rows = keys([1, 2])
        first = draw(rows)
        rows.normal("something else", (5,))
        rows.uniform("something else")
        assert torch.equal(draw(rows), first)

    def test_rows_of_a_pair_share_and_others_do_not(self, draw):
        drawn = draw(keys([1, 1, 2, 2], position=[0, 0, 1, 1]))
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
        assert not torch.equal(drawn[0], drawn[2])

    def test_seed_step_and_key_all_count(self, draw):
        drawn = [draw(keys([k], seed=s, step=t)) for k, s, t in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
        assert len({tuple(d.flatten().tolist()) for d in drawn}) == 4

    def test_global_randomness_is_neither_read_nor_moved(self, draw):
        first, before = draw(keys([1, 2])), torch.get_rng_state()
        torch.manual_seed(99)
        assert torch.equal(draw(keys([1, 2])), first)
        torch.set_rng_state(before)


def test_purposes_do_not_share_numbers():
    rows = keys([1, 2])
    assert not torch.equal(rows.normal("noise", (3,)), rows.normal("churn", (3,)))
    assert not torch.equal(rows.uniform("level"), rows.uniform("drop"))


def test_normal_numbers_are_normal_and_uniform_numbers_uniform():
    noise = keys(range(200)).normal("noise", (50,))
    assert noise.shape == (200, 50) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs(torch.corrcoef(noise)[0, 1:].mean()) < 0.05  # rows know nothing of each other
    num = 20_000
    u = keys(range(num)).uniform("level")
    assert u.shape == (num,) and u.dtype == torch.float64 and 0 < u.min() and u.max() < 1
    assert (u != u.float().double()).all()  # all of float64's digits
    # Kolmogorov-Smirnov; a right generator fails one such draw in a million.
    distance = (u.sort().values - (torch.arange(num) + 0.5) / num).abs().max()
    assert distance < 2.7 / num**0.5


@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_uniform_numbers_never_touch_the_ends(monkeypatch, extreme):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.tensor(extreme, dtype=dtype))
    assert 0 < keys([1]).uniform("level").item() < 1


# Strata --------------------------------------------------------------------------------------------


def test_strata_cover_the_global_batch_exactly_once_however_it_is_split():
    whole = keys(range(100, 124), global_size=24).stratum("s")
    assert sorted(whole.tolist()) == list(range(24))
    for parts in ([8, 8, 8], [24], [1] * 24, [5, 19]):
        pieces, start = [], 0
        for size in parts:
            rows = range(start, start + size)
            pieces.append(keys([100 + i for i in rows], position=rows, global_size=24).stratum("s"))
            start += size
        assert torch.equal(torch.cat(pieces), whole)


def test_strata_change_with_step_seed_and_purpose():
    same = [
        keys(range(16), step=t, seed=s).stratum(p) for t, s, p in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    ]
    assert len({tuple(s.tolist()) for s in same}) == 4


def test_rows_of_a_pair_share_their_stratum():
    strata = keys([7, 7, 9, 9, 4, 4], position=[0, 0, 1, 1, 2, 2]).stratum("s")
    assert torch.equal(strata[0::2], strata[1::2]) and sorted(strata[0::2].tolist()) == [0, 1, 2]


def test_streams_of_a_joint_sample_have_strata_of_their_own():
    """Were the stratum of a group one for all its keys, joint streams would always be equally noisy."""
    num = 512
    group = [k for i in range(num) for k in (i, i, num + i, num + i)]  # two streams, each a pair
    strata = keys(group, position=[i for i in range(num) for _ in range(4)]).stratum("s").reshape(num, 4)
    assert torch.equal(strata[:, 0], strata[:, 1]) and torch.equal(strata[:, 2], strata[:, 3])
    for stream in (0, 2):
        assert sorted(strata[:, stream].tolist()) == list(range(num))
    assert abs(torch.corrcoef(strata[:, [0, 2]].T.double())[0, 1]) < 0.15


# What a batch carries ------------------------------------------------------------------------------


def test_keys_come_from_the_batch():
    batch = {
        "noise_key": torch.tensor([3, 3, 4, 4]),
        "position": torch.tensor([5, 5, 6, 6]),
        "global_size": 8,
        "seed": 1,
        "step": torch.tensor(2),
    }
    assert vars(RowKeys.of(batch)) == vars(RowKeys(1, 2, (3, 3, 4, 4), (5, 5, 6, 6), 8))


def test_without_positions_each_key_is_a_group():
    rows = RowKeys.of({"noise_key": [9, 9, 2, 7], "step": 0})
    assert rows.position == (0, 0, 1, 2) and rows.global_size == 3 and (rows.seed, rows.step) == (0, 0)


def test_a_batch_without_keys_says_what_to_do():
    with pytest.raises(KeyError, match=r"no 'noise_key'.*torch\.arange\(B\).*It has: image, label"):
        RowKeys.of({"image": 1, "label": 2})


def test_keys_and_positions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 keys and 1 positions"):
        RowKeys(0, 0, (1, 2), (0,), 4)
    with pytest.raises(ValueError, match="positions 3 to 4 in a global batch of 4 groups"):
        RowKeys.of({"noise_key": [1, 2], "step": 0, "position": [3, 4], "global_size": 4})
    with pytest.raises(ValueError, match="positions -1 to 0"):
        RowKeys(0, 0, (1, 2), (-1, 0), 4)


def test_a_batch_without_its_step_is_refused_because_every_step_would_draw_the_same():
    with pytest.raises(KeyError, match="no 'step'.*every step sees the same noise"):
        RowKeys.of({"noise_key": [1, 2]})
