"""A consistency function is the identity where data begins, and the plain prediction far above."""

import pytest
import torch
from peers import peer

from vdiff.process import (
    CosineSchedule,
    EDMBoundary,
    EDMParameterization,
    EDMSchedule,
    FlowSchedule,
    LCMBoundary,
    NoiseLevel,
    ScaledLinearSchedule,
    ZeroSNRSchedule,
)
from vdiff.registry import build

SCHEDULES = [EDMSchedule(), CosineSchedule(), FlowSchedule(), ScaledLinearSchedule()]


def at(schedule, *ratios):
    return schedule.at_ratio(torch.tensor(ratios, dtype=torch.float64))


def test_with_an_edm_network_it_is_equation_5_of_consistency_models():
    """c_skip = sd^2 / ((s - e)^2 + sd^2) of x, and c_out = sd (s - e) / sqrt(sd^2 + s^2) of what the network says."""
    level, x, said = at(EDMSchedule(), 0.002, 0.01, 0.7, 80.0), *torch.randn(2, 4, dtype=torch.float64)
    s, e, sd = level.sigma, 0.002, 0.75
    want = sd**2 / ((s - e) ** 2 + sd**2) * x + sd * (s - e) / (sd**2 + s**2).sqrt() * said
    p, q = EDMParameterization(sd).reading(level)
    c_skip, c_out = EDMBoundary(e, sd)(level)
    torch.testing.assert_close(c_skip * x + c_out * (p * x + q * said), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_identity_where_data_begins_and_the_prediction_far_above(schedule):
    low = 0.05 if schedule.num_rows else 0.002
    level = at(schedule, low, 10.0)
    c_skip, c_out = EDMBoundary(low)(level)
    assert c_skip[0] * level.alpha[0] == pytest.approx(1, abs=1e-9) and c_out[0].abs() < 1e-9
    assert c_skip[1].abs() < 1e-3 and c_out[1] == pytest.approx(1, abs=0.01)


def test_it_means_the_same_in_every_frame():
    """Of x_t / alpha, which is one point whatever the schedule."""
    levels = [at(schedule, 0.3, 2.0) for schedule in SCHEDULES]
    found = [(level.alpha * c_skip, c_out) for level in levels for c_skip, c_out in [EDMBoundary()(level)]]
    for c_skip, c_out in found[1:]:
        torch.testing.assert_close(c_skip, found[0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c_out, found[0][1], rtol=1e-9, atol=1e-9)


def test_pure_noise_is_finite():
    for schedule in (ZeroSNRSchedule(), FlowSchedule(), CosineSchedule()):
        level = schedule(torch.ones(1, dtype=torch.float64))
        for boundary in (EDMBoundary(), LCMBoundary()):
            c_skip, c_out = boundary(level)
            assert c_skip.abs() < 1e-6 and c_out == pytest.approx(1, abs=1e-6)


def test_latent_consistency_models_have_that_of_diffusers():
    scheduler = peer("diffusers.schedulers.scheduling_lcm").LCMScheduler()
    rows = torch.tensor([0, 1, 5, 259, 999])
    level = ScaledLinearSchedule()((rows.double() + 1) / 1000)
    want = scheduler.get_scalings_for_boundary_condition_discrete(rows.double())
    for ours, theirs in zip(LCMBoundary()(level), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    c_skip, c_out = LCMBoundary()(level[0])
    assert c_skip == pytest.approx(1, abs=1e-9) and c_out == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_level_that_counts_as_data_it_stays_the_identity(schedule, dtype):
    """Down to data itself, where sigma is 0."""
    low = 0.05
    ratios = torch.tensor([low, low / 2, 0.0], dtype=torch.float64)
    level = NoiseLevel(ratios, *(1 + ratios**2).rsqrt() * torch.stack([ratios**0, ratios]), ratios, ratios).to(dtype)
    for smallest in (low, 0.06):
        c_skip, c_out = EDMBoundary(smallest)(level)
        torch.testing.assert_close(c_skip * level.alpha, torch.ones(3, dtype=dtype), rtol=1e-6, atol=1e-6)
        assert c_out.abs().max() < 1e-6
    c_skip, c_out = LCMBoundary()(schedule(torch.tensor([1e-3, 4e-4, 0.0], dtype=dtype)))
    torch.testing.assert_close(c_skip, torch.ones(3, dtype=dtype), rtol=1e-6, atol=1e-6)
    assert (c_out >= 0).all() and c_out.max() < 1e-6


def test_boundaries_are_a_kind_and_check_their_arguments():
    assert build({"type": "edm", "sigma_data": 0.75}, "boundary").sigma_data == 0.75
    assert build({"type": "lcm", "scaling": 1.0}, "boundary").scaling == 1.0
    with pytest.raises(ValueError, match="sigma_min of at least 0"):
        EDMBoundary(sigma_min=-1.0)
    with pytest.raises(ValueError, match="all are above 0"):
        LCMBoundary(scaling=0.0)
