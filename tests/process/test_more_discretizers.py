"""Discretizers beyond the first: their formulas, their peers, and what holds for all."""

import math

import numpy as np
import pytest
import torch
from peers import peer

from vdiff.process import (
    AYSDiscretizer,
    BetaIndexDiscretizer,
    BetaSigmaDiscretizer,
    CosineSchedule,
    DDIMUniformDiscretizer,
    EDMSchedule,
    ExponentialDiscretizer,
    FlowDiscretizer,
    FlowSchedule,
    LinearQuadraticDiscretizer,
    LinspaceDiscretizer,
    NormalDiscretizer,
    PolyexponentialDiscretizer,
    ScaledLinearSchedule,
    SGMUniformDiscretizer,
    SimpleDiscretizer,
    TrailingDiscretizer,
    VPDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.process.discretizers_in_ratio import beta_quantile
from vdiff.registry import build

SD, FLOW, EDM = ScaledLinearSchedule(), FlowSchedule(), EDMSchedule()
IN_RATIO = [PolyexponentialDiscretizer(2.0), AYSDiscretizer("sdxl"), BetaSigmaDiscretizer()]
IN_TIME = [
    NormalDiscretizer(),
    SGMUniformDiscretizer(),
    SimpleDiscretizer(),
    DDIMUniformDiscretizer(),
    BetaIndexDiscretizer(),
    LinearQuadraticDiscretizer(),
]
named = {"ids": lambda value: type(value).__name__}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("schedule", [EDM, SD], **named)
@pytest.mark.parametrize("discretizer", [*IN_TIME, *IN_RATIO], **named)
def test_a_run_of_n_steps_falls_through_n_plus_one_levels_to_data(discretizer, schedule, num_steps):
    levels = discretizer(schedule, num_steps)
    assert len(levels) == num_steps + 1 and levels.sigma.dtype == torch.float64
    assert (levels.ratio.diff() < 0).all()
    assert (levels.t[-1].item(), levels.alpha[-1].item(), levels.sigma[-1].item()) == (0, 1, 0)


@pytest.mark.parametrize("num_steps", [1, 2, 25])
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FLOW, FlowSchedule(3.0), CosineSchedule()], **named)
@pytest.mark.parametrize(
    "discretizer",
    [
        SGMUniformDiscretizer(),
        SimpleDiscretizer(),
        NormalDiscretizer(),
        LinearQuadraticDiscretizer(),
        FlowDiscretizer(3.0),
    ],
    **named,
)
def test_a_run_in_time_may_start_at_pure_noise(discretizer, schedule, num_steps):
    levels = discretizer(schedule, num_steps)
    assert levels.alpha[0] == 0 and levels.ratio[0] == math.inf and len(levels) == num_steps + 1


# In the ratio --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 7, 40])
def test_polyexponential_and_vp_are_those_of_k_diffusion(num_steps):
    sampling = peer("k_diffusion.sampling")
    for ours, theirs in (
        (PolyexponentialDiscretizer(1.7, 0.03, 14.6), sampling.get_sigmas_polyexponential(num_steps, 0.03, 14.6, 1.7)),
        (VPDiscretizer(), sampling.get_sigmas_vp(num_steps)),
        (VPDiscretizer(15.0, 0.2, 0.01), sampling.get_sigmas_vp(num_steps, 15.0, 0.2, 0.01)),
    ):
        got = ours(EDMSchedule(sigma_max=200.0), num_steps).ratio
        torch.testing.assert_close(got, theirs.double(), rtol=2e-6, atol=3e-6)  # theirs are float32, less 1


def test_polyexponential_with_power_one_is_exponential():
    a, b = (kind(EDM, 9).ratio for kind in (PolyexponentialDiscretizer(), ExponentialDiscretizer()))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_ays_is_its_table_in_ten_steps_and_log_linear_between_in_others():
    theirs = peer("diffusers.schedulers").AysSchedules
    for name, key in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        got = AYSDiscretizer(name)(EDMSchedule(sigma_max=700.0), 10).ratio
        torch.testing.assert_close(got, torch.tensor(theirs[key + "Sigmas"]).double(), rtol=1e-6, atol=0)
        finer = AYSDiscretizer(name)(EDMSchedule(sigma_max=700.0), 19).ratio
        torch.testing.assert_close(finer[:-1:2], got[:-1], rtol=1e-10, atol=0)
        torch.testing.assert_close(finer[1:-1:2], (got[:-2] * got[1:-1]).sqrt(), rtol=1e-10, atol=0)
    assert AYSDiscretizer([3.0, 1.0])(EDM, 3).ratio.tolist() == pytest.approx([3, 3**0.5, 1, 0], rel=1e-12)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0], [1.0, 0.0], [[2.0, 1.0]]])
def test_a_table_falls_and_stays_above_data(wrong):
    with pytest.raises((ValueError, TypeError)):
        AYSDiscretizer(wrong)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (2.0, 3.0), (0.5, 1.5), (1.0, 1.0)])
def test_quantiles_of_the_beta_distribution(a, b):
    share = torch.linspace(0, 1, 41, dtype=torch.float64)
    want = pytest.importorskip("scipy.stats").beta.ppf(share.numpy(), a, b)
    assert np.abs(beta_quantile(share, a, b).numpy() - want).max() < 1e-12


def test_beta_on_sigma_is_that_of_diffusers():
    theirs = peer("diffusers").EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    sigmas = torch.tensor([14.6, 0.03])
    want = theirs._convert_to_beta(sigmas, 12)
    got = BetaSigmaDiscretizer(sigma_min=sigmas[1].item(), sigma_max=sigmas[0].item())(EDM, 12).ratio
    assert np.abs(got[:-1].numpy() - want).max() < 1e-6


def test_beta_on_the_index_is_crowded_at_both_ends_and_another_one():
    levels = BetaIndexDiscretizer()(SD, 20)
    steps = -levels.t[:-1].diff()
    assert levels.t[0] == 1 and steps[0] < steps[9] / 3 and steps[-1] < steps[9]
    assert (levels.t * 1000 - (levels.t * 1000).round()).abs().max() < 1e-9
    assert (levels.ratio - BetaSigmaDiscretizer()(SD, 20).ratio).abs().max() > 1


def test_levels_above_the_schedule_are_refused():
    """Clamped in silence, several steps would do nothing."""
    for discretizer, schedule in ((VPDiscretizer(), SD), (AYSDiscretizer("svd"), SD), (AYSDiscretizer("svd"), EDM)):
        with pytest.raises(ValueError, match="more noise than .* reaches"):
            discretizer(schedule, 10)


# In time -------------------------------------------------------------------------------------------


def places(discretizer, num_steps, schedule=SD):
    return (discretizer(schedule, num_steps).t[:-1] * schedule.num_rows - 1).tolist()


def test_the_names_of_the_interfaces_in_numbers():
    assert places(NormalDiscretizer(), 4) == pytest.approx([999, 666, 333, 0])
    assert places(SGMUniformDiscretizer(), 4) == pytest.approx([999, 749.25, 499.5, 249.75])
    assert places(SimpleDiscretizer(), 3) == pytest.approx([999, 666, 333])
    assert places(SimpleDiscretizer(), 7) == pytest.approx([999 - int(k * 1000 / 7) for k in range(7)])
    assert places(DDIMUniformDiscretizer(), 20) == pytest.approx(list(range(951, 0, -50)))
    assert len(places(DDIMUniformDiscretizer(), 30)) == 30
    assert places(DDIMUniformDiscretizer(), 1000)[0] == pytest.approx(999)


def test_normal_is_linspace_without_rounding():
    a, b = (torch.tensor(places(kind, 37)) for kind in (NormalDiscretizer(), LinspaceDiscretizer()))
    assert (a - b).abs().max() <= 0.5 + 1e-9 and (a - b).abs().max() > 0.1


@pytest.mark.parametrize("num_steps", [4, 20, 64])
def test_linear_quadratic_is_that_of_mochi(num_steps):
    mochi = peer("diffusers.pipelines.mochi.pipeline_mochi")
    got = LinearQuadraticDiscretizer()(FLOW, num_steps).t[:-1]
    assert np.abs(got.numpy() - mochi.linear_quadratic_schedule(num_steps, 0.025)).max() < 1e-12


def test_linear_quadratic_bends_without_a_corner_and_ends_in_data():
    t = LinearQuadraticDiscretizer(0.1, linear_steps=500)(FLOW, 1000).t
    steps = -t.diff()
    assert steps[:500].std() < 1e-12 and steps.diff().abs().max() < 1e-5 and t[-1] == 0
    with pytest.raises(ValueError, match="linear_steps must lie in 1 ... 3 for 4 steps, got 4"):
        LinearQuadraticDiscretizer(linear_steps=4)(FLOW, 4)


# Flow ----------------------------------------------------------------------------------------------


def test_a_shift_multiplies_the_ratio():
    plain, shifted = (FlowDiscretizer(s)(FLOW, 8).ratio for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain)
    assert torch.allclose(FlowDiscretizer()(FLOW, 8).t, TrailingDiscretizer()(FLOW, 8).t, rtol=0, atol=1e-14)


def test_a_schedule_with_a_shift_is_not_shifted_twice():
    """diffusers applies the shift again to ends that already have it."""
    plain, trained = (FlowDiscretizer(3.0)(s, 8) for s in (FlowSchedule(), FlowSchedule(shift=3.0)))
    torch.testing.assert_close(plain.ratio, trained.ratio, rtol=1e-12, atol=0)
    assert torch.allclose(trained.t, TrailingDiscretizer()(FLOW, 8).t, atol=1e-12)


@pytest.mark.parametrize("tokens", [256, 1000, 4096])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("num_steps", [2, 9])
def test_shift_by_size_and_stretch_are_those_of_diffusers(num_steps, terminal, tokens):
    flux = peer("diffusers.pipelines.flux.pipeline_flux")
    theirs = peer("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=flux.calculate_shift(tokens))
    got = FlowDiscretizer(tokens=tokens, terminal=terminal)(FLOW, num_steps).sigma
    torch.testing.assert_close(got, theirs.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_one_step_is_not_stretched_where_that_of_diffusers_is_not_a_number():
    theirs = peer("diffusers").FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    theirs.set_timesteps(sigmas=np.array([1.0]))
    assert theirs.sigmas[0].isnan()
    assert FlowDiscretizer(terminal=0.1)(FLOW, 1).sigma.tolist() == [1, 0]


def test_flow_levels_need_pure_noise():
    for schedule in (EDM, SD):
        with pytest.raises(ValueError, match=f"begins at pure noise, which {type(schedule).__name__} never reaches"):
            FlowDiscretizer()(schedule, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FlowDiscretizer(-1.0), "shift must be positive"),
        (lambda: FlowDiscretizer(terminal=1.0), r"terminal must lie in \(0, 1\)"),
        (lambda: LinearQuadraticDiscretizer(0.0), r"threshold must lie in \(0, 1\)"),
        (lambda: PolyexponentialDiscretizer(0.0), "rho must be positive"),
        (lambda: VPDiscretizer(last=0.0), "0 < last <= 1"),
        (lambda: BetaSigmaDiscretizer(a=0.0)(EDM, 3), "needs a > 0 and b > 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_discretizers_are_built_by_name():
    in_ratio, in_time = "polyexponential ays beta_sigma", "beta_index sgm_uniform simple normal ddim_uniform"
    for name in f"{in_ratio} {in_time} linear_quadratic".split():
        assert len(build({"type": name}, "discretizer")(SD, 5)) == 6
    assert isinstance(build({"type": "vp"}, "discretizer"), VPDiscretizer)
    assert isinstance(build({"type": "flow", "tokens": 1024}, "discretizer"), FlowDiscretizer)
    assert build({"type": "ays", "table": [3.0, 1.0]}, "discretizer").ratios.tolist() == [3, 1]
