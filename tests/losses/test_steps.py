"""Step-aware preference: the likelihood is that of the step that a stochastic sampler takes."""

import math

import pytest
import torch
import torch.nn.functional as F

from vdiff.losses import SPOLoss
from vdiff.process import CosineSchedule, Prediction, parameterization


def problem(rows=4, same=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    schedule = CosineSchedule()
    t = torch.full((rows,), 0.6, dtype=torch.float64)
    level, then = schedule(t), schedule(t - 0.1)
    x_t, said, theirs, drawn = (torch.randn(rows, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(4))
    x_t = x_t[0::2].repeat_interleave(2, 0)
    said = said[0::2].repeat_interleave(2, 0).requires_grad_()
    v = parameterization("v")
    reference = Prediction(v, said.detach() if same else theirs[0::2].repeat_interleave(2, 0), x_t, level)
    batch = {"next": drawn, "next_alpha": then.alpha, "next_sigma": then.sigma}
    return Prediction(v, said, x_t, level, reference), batch


def ddim(prediction, batch, eta):
    """Mean and variance of the next state in the letters of arXiv:2010.02502, eq. 12 and 16."""
    now, then = prediction.level.alpha[0] ** 2, batch["next_alpha"][0] ** 2
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    return then.sqrt() * prediction.x0 + (1 - then - variance).sqrt() * prediction.noise, variance


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_likelihood_is_that_of_a_ddim_step(eta):
    prediction, batch = problem()
    mean, variance = ddim(prediction, batch, eta)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    want = normal.log_prob(batch["next"]).mean((1, 2, 3)) + 0.5 * math.log(2 * math.pi * variance)
    torch.testing.assert_close(SPOLoss(eta=eta).log_likelihood(prediction, batch), want)


@pytest.mark.parametrize("clip", [0.1, None])
def test_loss_and_gradient_are_those_written_by_hand(clip):
    prediction, batch = problem()
    values = SPOLoss(2.0, clip)(prediction, prediction.x_t, prediction.x_t, prediction.level, batch)
    ours, theirs = (
        -((batch["next"] - mean) ** 2).mean((1, 2, 3)) / (2 * variance)
        for mean, variance in (ddim(p, batch, 1.0) for p in (prediction, prediction.reference))
    )
    ratio = ours - theirs if clip is None else (ours - theirs).clamp(math.log(0.9), math.log(1.1))
    want = -F.logsigmoid(2.0 * (ratio[0::2] - ratio[1::2]))
    torch.testing.assert_close(values.per_row[::2], want.float())
    if clip is None:
        (got,) = torch.autograd.grad(values.per_row.mean(), prediction.value)
        (hand,) = torch.autograd.grad(want.mean(), prediction.value)
        torch.testing.assert_close(got, hand, rtol=1e-5, atol=1e-10)  # the loss is float32


def test_figures_are_the_ratios_and_how_often_the_better_one_is_likelier():
    prediction, batch = problem(rows=8)
    loss = SPOLoss(2.0, clip=None)
    figures = loss(prediction, prediction.x_t, prediction.x_t, prediction.level, batch).metrics
    ratio = loss.log_likelihood(prediction, batch) - loss.log_likelihood(prediction.reference, batch)
    win, lose = ratio.detach().float().unflatten(0, (-1, 2)).unbind(1)
    for name, want in (("win_ratio", win), ("lose_ratio", lose)):
        value = figures[f"preference/{name}"]
        torch.testing.assert_close(value[~value.isnan()], want)
    torch.testing.assert_close(figures["preference/margin"][::2], win - lose)
    accuracy = figures["preference/accuracy"]
    assert torch.equal(accuracy[::2], (win > lose).float()) and torch.equal(accuracy[::2], accuracy[1::2])
    assert 0 < accuracy.mean() < 1 and not any(value.requires_grad for value in figures.values())


def test_the_loss_does_not_pull_at_the_reference():
    prediction, batch = problem()
    moving = prediction.reference.value.clone().requires_grad_()
    prediction = prediction.with_(reference=prediction.reference.with_(value=moving))
    SPOLoss(clip=None)(prediction, prediction.x_t, prediction.x_t, prediction.level, batch).per_row.sum().backward()
    assert prediction.value.grad.any() and moving.grad is None


def test_where_policy_and_reference_agree_it_is_the_logarithm_of_two():
    prediction, batch = problem(same=True)
    values = SPOLoss()(prediction, prediction.x_t, prediction.x_t, prediction.level, batch)
    assert torch.equal(values.per_row, torch.full((4,), math.log(2)))
    values.per_row.sum().backward()
    assert prediction.value.grad.abs().max() > 0


def test_missing_states_are_named():
    prediction, batch = problem()
    del batch["next_sigma"]
    with pytest.raises(KeyError, match="no field 'next_sigma'"):
        SPOLoss()(prediction, prediction.x_t, prediction.x_t, prediction.level, batch)


def test_what_is_no_pair_is_refused():
    prediction, batch = problem()
    with pytest.raises(ValueError, match="rows 2 and 3 should be a pair"):
        batch["noise_key"] = torch.tensor([1, 1, 2, 3])
        SPOLoss()(prediction, prediction.x_t, prediction.x_t, prediction.level, batch)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"eta": 0.0}, {"eta": 1.5}, {"clip": 0.0}, {"clip": 1.0}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"eta in \(0, 1\] and clip in \(0, 1\) or None"):
        SPOLoss(**wrong)
