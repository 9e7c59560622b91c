"""Consistency distances are those of the papers, on predictions written down by hand."""

import math

import pytest
import torch

from vdiff.losses import ConsistencyLoss, MSELoss
from vdiff.process import CosineSchedule, FlowSchedule, Prediction, ZeroSNRSchedule, parameterization
from vdiff.registry import build


def problem(language="v"):
    """Four rows of a prediction and its target a step below, and their difference in x0."""
    draw = torch.Generator().manual_seed(0)
    x_t, x_s, value, other = (torch.randn(4, 1, 3, 3, generator=draw, dtype=torch.float64) for _ in range(4))
    t = torch.linspace(0.3, 0.9, 4, dtype=torch.float64)
    level = CosineSchedule()(t).paired(CosineSchedule()(t - 0.1))
    target = Prediction(parameterization(language), other, x_s, level.lower)
    prediction = Prediction(parameterization(language), value.requires_grad_(), x_t, level, target=target)
    return prediction, level, prediction.x0 - target.x0


def loss_of(loss, prediction, level):
    empty = torch.full_like(prediction.x_t, torch.nan)  # the data itself is not looked at
    return loss(prediction, empty, empty, level, {})


def test_it_is_the_pseudo_huber_distance_of_improved_consistency_training():
    """sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(n), arXiv:2310.14189, here over sqrt(n)."""
    prediction, level, d = problem()
    n, norm = d[0].numel(), d.flatten(1).norm(dim=1)
    c = 0.00054 * math.sqrt(n)
    got = loss_of(ConsistencyLoss(), prediction, level).per_row
    torch.testing.assert_close(got, (((norm**2 + c**2).sqrt() - c) / math.sqrt(n)).detach().float(), check_dtype=True)


@pytest.mark.parametrize("like, factor", [("distance", 1.0), ("square", 2 * 0.001)])
def test_it_is_the_huber_loss_of_latent_consistency_models(like, factor):
    """mean(sqrt(d^2 + c^2) - c) with c = 0.001, as the script of arXiv:2310.04378 has it."""
    prediction, level, d = problem()
    want = factor * ((d**2 + 0.001**2).sqrt() - 0.001).flatten(1).mean(1)
    error = {"type": "huber", "delta": 0.001, "like": like, "parameterization": "x0"}
    loss = build({"type": "consistency", "huber": None, "error": error}, "loss")
    torch.testing.assert_close(loss_of(loss, prediction, level).per_row, want.detach().float())


def test_in_the_networks_language_it_weighs_as_the_network_was_trained():
    """An error of v is one of x0 over sigma."""
    prediction, level, d = problem()
    want = ((d / level.like(d).sigma) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(
        loss_of(ConsistencyLoss(MSELoss(), huber=None), prediction, level).per_row, want.detach().float()
    )


def test_a_shorter_step_counts_more_where_it_is_asked_for():
    prediction, level, _ = problem()
    plain, weighed = (loss_of(ConsistencyLoss(per_step=on), prediction, level).per_row for on in (False, True))
    torch.testing.assert_close(weighed, plain / (level.ratio - level.lower.ratio).float())


def test_a_step_of_no_length_counts_nothing_where_student_and_target_agree():
    prediction, level, _ = problem("x0")
    level = level.paired(level)
    same = prediction.with_(target=prediction.with_(value=prediction.value.detach(), level=level.lower))
    assert not loss_of(ConsistencyLoss(per_step=True), same, level).per_row.any()


def test_a_step_that_has_no_length_is_refused_where_it_is_to_count():
    """Its pair would never count; a plain loss takes it."""
    t = torch.tensor([1.0, 0.5])
    for schedule in (FlowSchedule(), ZeroSNRSchedule()):
        level, x = schedule(t).paired(schedule(t - 0.1)), torch.ones(2, 1, 3, 3)
        prediction = Prediction(parameterization("x0"), x, x, level)
        prediction = prediction.with_(target=prediction.with_(value=x / 2, level=level.lower))
        assert loss_of(ConsistencyLoss(), prediction, level).per_row.all()
        with pytest.raises(ValueError, match="one from pure noise is infinite.*uniform, start: 0.99"):
            loss_of(ConsistencyLoss(per_step=True), prediction, level)


def test_levels_by_frame_have_no_step_of_a_row():
    t, x = torch.full((2, 5), 0.5), torch.ones(2, 1, 5, 3, 3)
    level = FlowSchedule()(t).paired(FlowSchedule()(t - 0.1))
    prediction = Prediction(parameterization("x0"), x, x, level)
    prediction = prediction.with_(target=prediction.with_(level=level.lower))
    with pytest.raises(ValueError, match=r"levels are by frame, \(2, 5\)"):
        loss_of(ConsistencyLoss(per_step=True), prediction, level)


def test_where_student_and_target_agree_it_is_zero_and_so_is_its_gradient():
    prediction, level, _ = problem("x0")
    same = prediction.target.with_(value=prediction.value.detach().clone())
    for huber in (0.00054, 0.0, None):
        values = loss_of(ConsistencyLoss(huber=huber), prediction.with_(target=same), level)
        assert not values.per_row.any() and torch.equal(values.metrics["consistency/error"], torch.zeros(4))
        assert not any(value.requires_grad for value in values.metrics.values())
        (grad,) = torch.autograd.grad(values.per_row.sum(), prediction.value)
        assert not grad.any()


def test_without_a_target_what_to_add_is_named():
    prediction, level, _ = problem()
    with pytest.raises(ValueError, match="no target to agree with.*type: teacher.*type: grid"):
        loss_of(ConsistencyLoss(), prediction.with_(target=None), level)
