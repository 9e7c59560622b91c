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
    with pytest.raises(ValueError, match="eta in"):
        SPOLoss(eta=0.0)
