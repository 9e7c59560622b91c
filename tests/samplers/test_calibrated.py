"""The Gaussian-calibrated multistep: right for its family, exact on constants, and a plan like any other."""

import numpy as np
import pytest
import torch
from oracles import SCHEDULES, noise, one_gaussian, two_gaussians

from vdiff.denoisers import GaussianDenoiser
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import ABSampler, GaussianCalibratedSampler, GaussianPrior, IPNDMSampler
from vdiff.samplers.calibration import _Walk, calibrate

RATIOS = (80.0, 20.0, 6.0, 2.0, 0.7, 0.2, 0.05, 0.0)
EDM = EDMSchedule()


def family_error(sampler, variances):
    """Worst error at the end, from the exact marginal at the first level, in units of each mode's scale + 0.03."""
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()
    denoiser = GaussianDenoiser(std=scale.tolist())
    start = torch.hypot(scale, torch.tensor(80.0, dtype=torch.float64))[None]
    got = sampler(denoiser, EDM, start / 80.0)[0]
    return ((got - scale).abs() / (scale + 0.03)).max().item()


def test_the_derivatives_are_those_of_finite_differences():
    """Of the end of the walk, in the shares and the levels."""
    walk = _Walk(np.array(RATIOS), 3, GaussianPrior(), False, True, "quadrature")
    at = 0.1 * np.random.default_rng(0).standard_normal(walk.num_shares + walk.num_moves)
    slopes, step = walk.slopes(at), 1e-6
    for i in range(len(at)):
        aside = np.zeros_like(at)
        aside[i] = step
        finite = (walk.misses(at + aside) - walk.misses(at - aside)) / (2 * step)
        assert np.abs(finite - slopes[:, i]).max() < 1e-6 * max(1, np.abs(slopes).max())  # rounding / step


@pytest.mark.parametrize("num_steps, plain, tuned", [(6, 0.10, 0.02), (10, 0.01, 0.002)])
def test_it_is_right_for_its_own_family(num_steps, plain, tuned):
    """Five times closer, on variances between those it was made on, than the quadrature it starts from."""
    between = (10 ** np.linspace(-3.9, 1.1, 41)).tolist()
    levels = KarrasDiscretizer(sigma_min=0.01)
    assert family_error(ABSampler(num_steps, discretizer=levels), between) > plain
    sampler = GaussianCalibratedSampler(num_steps, pull=1e-6, node_pull=1e-5, discretizer=levels)
    assert family_error(sampler, between) < tuned


def test_a_prior_of_one_variance_is_met_exactly():
    """One condition and several weights: what is left is what the pull of 1e-12 costs."""
    sampler = GaussianCalibratedSampler(6, prior=GaussianPrior((0.25,)), pull=1e-12, discretizer=KarrasDiscretizer())
    assert family_error(sampler, [0.25]) < 1e-6


def test_a_prior_of_the_data_is_closer_than_the_broad_one():
    own = np.random.default_rng(0).uniform(0.05, 0.5, 400)
    errors = [
        family_error(
            GaussianCalibratedSampler(6, prior=prior, pull=1e-6, discretizer=KarrasDiscretizer()), [0.06, 0.2, 0.4]
        )
        for prior in (None, GaussianPrior.of_spectrum(own))
    ]
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("toward", ["quadrature", "even"])
def test_shares_sum_to_one_and_data_at_one_point_is_exact(toward):
    found = calibrate(RATIOS, 4, toward=toward, node_pull=1e-4)
    assert all(sum(row) == pytest.approx(1, abs=1e-12) for row in found.shares)
    point = GaussianDenoiser(mean=[0.7, -1.3], std=0.0)
    for schedule in (EDM, FlowSchedule(), CosineSchedule()):
        levels = TrailingDiscretizer() if schedule is not EDM else None
        x = GaussianCalibratedSampler(7, toward=toward, discretizer=levels)(point, schedule, noise(8))
        assert (x - torch.tensor([0.7, -1.3], dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize(
    "toward, like", [("quadrature", ABSampler), ("even", lambda *a, **k: IPNDMSampler(*a, order=4, **k))]
)
def test_pulled_hard_it_is_the_rule_it_is_pulled_towards(toward, like):
    levels = ExplicitDiscretizer(ratios=RATIOS)
    want = like(7, discretizer=levels)(two_gaussians(), EDM, noise(16, 1))
    got = GaussianCalibratedSampler(7, pull=1e12, toward=toward, discretizer=levels)(two_gaussians(), EDM, noise(16, 1))
    assert (got - want).abs().max() < 1e-8


def test_all_frames_give_the_same_samples():
    sampler = GaussianCalibratedSampler(discretizer=ExplicitDiscretizer(ratios=[20.0, 8.0, 3.0, 1.1, 0.4, 0.1, 0.0]))
    first, *others = (sampler(one_gaussian(), schedule, noise(16)) for schedule in SCHEDULES.values())
    # The ratios come back from each frame with their own rounding, which the normal equations amplify.
    assert all((other - first).abs().max() < 1e-8 for other in others)


def test_two_runs_give_the_same_plan():
    calibrate.cache_clear()
    first = calibrate(RATIOS, node_pull=1e-4)
    calibrate.cache_clear()
    assert calibrate(RATIOS, node_pull=1e-4) == first


@pytest.mark.parametrize("num_steps", [1, 2, 3, 12])
@pytest.mark.parametrize("schedule", [EDM, FlowSchedule(), ZeroSNRSchedule(), ScaledLinearSchedule()])
@pytest.mark.parametrize("node_pull", [None, 1e-4])
def test_it_runs_under_every_schedule(node_pull, schedule, num_steps):
    x = GaussianCalibratedSampler(num_steps, node_pull=node_pull)(two_gaussians(), schedule, noise(16, 1))
    assert torch.isfinite(x).all() and x.abs().max() < 5


def test_levels_that_move_keep_their_ends_and_stay_on_the_table():
    schedule = ScaledLinearSchedule()
    for num_steps in (4, 8, 15):
        still = GaussianCalibratedSampler(num_steps).levels(schedule).ratio
        moved = GaussianCalibratedSampler(num_steps, node_pull=1e-5).levels(schedule).ratio
        assert (moved[0], moved[-1]) == (still[0], still[-1]) and (moved.diff() < 0).all()
        assert moved[-2] >= schedule(1e-3).ratio * (1 - 1e-9)
        assert not torch.allclose(moved, still)


def test_a_level_visited_twice_changes_nothing():
    once, twice = (5.0, 2.0, 1.0, 0.5, 0.0), (5.0, 2.0, 2.0, 1.0, 0.5, 0.0)
    a, b = (
        GaussianCalibratedSampler(discretizer=ExplicitDiscretizer(ratios=r))(two_gaussians(), EDM, noise(16, 1))
        for r in (once, twice)
    )
    assert (a - b).abs().max() < 1e-12


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="pulls must be positive"):
        GaussianCalibratedSampler(pull=0.0)
    with pytest.raises(ValueError, match="variances must be positive"):
        GaussianPrior((1.0, 0.0))
    with pytest.raises(ValueError, match="one weight >= 0 per variance"):
        GaussianPrior((1.0,), (1.0, 2.0))
    with pytest.raises(ValueError, match="no variance is positive"):
        GaussianPrior.of_spectrum([0.0])
    with pytest.raises(ValueError, match="finite ratios that fall"):
        calibrate((1.0, 2.0, 0.0))


def test_a_config_builds_it_with_a_prior():
    built = build({"type": "gaussian_calibrated", "num_steps": 8, "prior": {"variances": [0.1, 1.0]}}, "sampler")
    assert isinstance(built, GaussianCalibratedSampler) and built.prior == GaussianPrior((0.1, 1.0))
