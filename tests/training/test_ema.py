from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vdiff.training import EMA


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def walk(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def test_it_is_the_average_of_torch():
    model = net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first update copies
    ours = EMA(decay=0.9, warmup=False)
    ours.start(dict(model.named_parameters()))
    for step in range(1, 20):
        walk(model, step)
        theirs.update_parameters(model)
        ours.update(dict(model.named_parameters()), step)
    for name, value in theirs.module.named_parameters():
        assert torch.equal(ours.state_dict()[name], value)


def test_it_is_the_written_out_sum():
    p, ema, expected = nn.Parameter(torch.zeros(1)), EMA(decay=0.8, warmup=False), 0.0
    ema.start({"p": p})
    for step in range(1, 30):
        p.data.fill_(step)
        ema.update({"p": p}, step)
        expected = 0.8 * expected + 0.2 * step
    assert ema.state_dict()["p"].item() == pytest.approx(expected, rel=1e-6)


def test_after_a_half_life_the_past_counts_half():
    for every in (1, 4):
        p, ema = nn.Parameter(torch.ones(1)), EMA(half_life=32, warmup=False, every=every)
        ema.start({"p": p})
        p.data.zero_()
        for step in range(1, 33):
            ema.update({"p": p}, step)
        assert ema.state_dict()["p"].item() == pytest.approx(0.5, rel=1e-5)


def test_warmup_forgets_the_start_sooner():
    ema = EMA(decay=0.999)
    assert ema.decay_at(1) == 2 / 11 and ema.decay_at(10**6) == 0.999
    assert all(ema.decay_at(n) <= ema.decay_at(n + 1) for n in range(1, 2000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_exactly_and_restores_bit_for_bit(dtype):
    model = net().to(dtype)
    ema = EMA(decay=0.5)
    ema.start(dict(model.named_parameters()))
    for step in range(1, 4):
        walk(model, step)
        ema.update(dict(model.named_parameters()), step)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    average = {n: v.clone() for n, v in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.applied(model):
        for name, p in model.named_parameters():
            assert torch.equal(p, average[name].to(dtype)) and not torch.equal(p, before[name])
        raise KeyError  # an error inside changes nothing of that
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]  # compiled code keeps its addresses
    assert all(torch.equal(v, average[n]) for n, v in ema.state_dict().items())
    assert all(v.dtype == torch.float32 for v in average.values())


def averaged(model):
    """An average that is not the model's weights."""
    ema = EMA(decay=0.5)
    ema.start(dict(model.named_parameters()))
    walk(model, 0)
    return ema


def test_under_autocast_each_is_asked_with_its_own_weights():
    """Autocast keeps casts of weights until it is left; those of others are no use to either."""
    model, x = nn.Linear(3, 5), torch.randn(4, 3)
    ema = averaged(model)

    def asked(*names):
        answers = []
        with torch.autocast("cpu", torch.bfloat16):
            for name in names:
                with ema.applied(model) if name == "average" else nullcontext():
                    answers.append(model(x))
        return answers

    (own,), (average,) = asked("own"), asked("average")
    assert not torch.equal(own, average)
    for got, want in zip(asked("own", "average", "own"), (own, average, own), strict=True):
        assert torch.equal(got, want)


def test_a_gradient_does_not_know_of_an_average_that_was_asked_between():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    ema, grads = averaged(model), []
    for is_asked in (False, True):
        model.zero_grad()
        loss = model(x).square().sum()
        if is_asked:
            with ema.applied(model), torch.no_grad():
                model(x)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_small_changes_are_not_lost_in_half_precision():
    p, ema = nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), EMA(decay=0.999, warmup=False)
    ema.start({"p": p})
    p.data.fill_(2)
    for step in range(1, 700):
        ema.update({"p": p}, step)
    assert ema.state_dict()["p"].item() == pytest.approx(2 - 0.999**699, rel=1e-4)


def test_nonsense_is_refused():
    for options in ({"decay": 1.0}, {"decay": 0.9, "half_life": 3.0}, {"half_life": 0.0}, {"every": 0}):
        with pytest.raises(ValueError, match="EMA"):
            EMA(**options)
    ema = EMA()
    ema.start({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="averages other parameters; 2 differ: a, b"):
        ema.load_state_dict({"b": torch.ones(1)})
