import math

import numpy as np
import pytest
import torch
from peers import peer

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    ExponentialDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    LeadingDiscretizer,
    LinspaceDiscretizer,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    UniformDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build

SD, FLOW, EDM = ScaledLinearSchedule(), FlowSchedule(), EDMSchedule()
IN_TIME = [TrailingDiscretizer(), LeadingDiscretizer(), LinspaceDiscretizer(), UniformDiscretizer()]
IN_RATIO = [KarrasDiscretizer(), ExponentialDiscretizer()]
named = {"ids": lambda value: type(value).__name__}


def rows(discretizer, num_steps, schedule=SD):
    """The table rows that a run visits, the data at the end left out."""
    levels = discretizer(schedule, num_steps)
    assert levels.t[-1] == 0
    places = levels.t[:-1] * schedule.num_rows
    assert (places - places.round()).abs().max() < 1e-9
    return (places.round() - 1).int().tolist()


# Truths of all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3, 25])
@pytest.mark.parametrize("schedule", [EDM, SD], **named)
@pytest.mark.parametrize("discretizer", IN_TIME + IN_RATIO, **named)
def test_a_run_of_n_steps_falls_through_n_plus_one_levels_to_data(discretizer, schedule, num_steps):
    levels = discretizer(schedule, num_steps)
    assert len(levels) == num_steps + 1 and levels.t.dtype == levels.sigma.dtype == torch.float64
    assert (levels.ratio.diff() < 0).all() and (levels.t.diff() < 0).all()
    assert (levels.t[-1].item(), levels.alpha[-1].item(), levels.sigma[-1].item()) == (0, 1, 0)
    assert levels.t.device.type == "cpu"


@pytest.mark.parametrize("num_steps", [1, 2, 25])
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FLOW, CosineSchedule()], **named)
@pytest.mark.parametrize("discretizer", [TrailingDiscretizer(), LinspaceDiscretizer(), UniformDiscretizer()], **named)
def test_a_run_in_time_may_start_at_pure_noise(discretizer, schedule, num_steps):
    levels = discretizer(schedule, num_steps)
    assert levels.alpha[0] == 0 and levels.ratio[0] == math.inf and levels.sigma[0] == 1
    assert (levels.t.diff() < 0).all() and len(levels) == num_steps + 1


@pytest.mark.parametrize("discretizer", IN_RATIO, **named)
def test_a_run_in_ratio_needs_an_end_at_pure_noise(discretizer):
    with pytest.raises(ValueError, match="ZeroSNRSchedule starts at pure noise.*Give sigma_max.*trailing"):
        discretizer(ZeroSNRSchedule(), 5)
    levels = type(discretizer)(sigma_max=20.0)(ZeroSNRSchedule(), 5)
    assert levels.ratio[0].item() == pytest.approx(20, rel=1e-12) and len(levels) == 6


@pytest.mark.parametrize("discretizer", [*IN_TIME, *IN_RATIO], **named)
@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_run_has_at_least_one_step(discretizer, num_steps):
    with pytest.raises(ValueError, match=f"{type(discretizer).__name__}: needs at least one step, got {num_steps}"):
        discretizer(SD, num_steps)


# In the ratio --------------------------------------------------------------------------------------


def test_karras_in_numbers():
    levels = KarrasDiscretizer(sigma_min=0.002, sigma_max=700.0)(EDMSchedule(sigma_max=700.0), 25)
    assert levels.ratio[:3].tolist() == pytest.approx([700, 545.729, 421.569], abs=5e-4)
    assert levels.ratio[-3:].tolist() == pytest.approx([0.0078825, 0.002, 0], abs=5e-8)


@pytest.mark.parametrize("schedule", [EDM, FLOW, CosineSchedule(), ZeroSNRSchedule()], **named)
@pytest.mark.parametrize("num_steps", [2, 7, 40])
def test_karras_and_exponential_are_those_of_k_diffusion(num_steps, schedule):
    sampling = peer("k_diffusion.sampling")
    low, high = 0.03, 14.6
    for ours, theirs in (
        (KarrasDiscretizer(7.0, low, high), sampling.get_sigmas_karras(num_steps, low, high)),
        (KarrasDiscretizer(3.0, low, high), sampling.get_sigmas_karras(num_steps, low, high, rho=3.0)),
        (ExponentialDiscretizer(low, high), sampling.get_sigmas_exponential(num_steps, low, high)),
    ):
        torch.testing.assert_close(ours(schedule, num_steps).ratio, theirs.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("discretizer", IN_RATIO, **named)
def test_the_ends_are_the_schedules_own_and_exact(discretizer):
    levels = discretizer(SD, 10)
    assert levels.ratio[0].item() == pytest.approx(14.614641, abs=5e-7) and levels.t[0] == 1
    assert levels.ratio[-2].item() == pytest.approx(0.029167, abs=5e-7)
    levels = discretizer(EDM, 10)
    assert levels.sigma[0].item() == pytest.approx(80, rel=1e-14)
    assert levels.sigma[-2].item() == pytest.approx(0.002, rel=1e-13)


@pytest.mark.parametrize("cls", [KarrasDiscretizer, ExponentialDiscretizer])
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_a_run_may_stop_before_data(cls, num_steps):
    levels = cls(sigma_min=0.1, sigma_max=10.0, denoise=False)(EDM, num_steps)
    assert len(levels) == num_steps + 1 and (levels.ratio.diff() < 0).all()
    assert levels.ratio[[0, -1]].tolist() == pytest.approx([10, 0.1], rel=1e-13)


@pytest.mark.parametrize("cls", [KarrasDiscretizer, ExponentialDiscretizer])
@pytest.mark.parametrize("ends", [(0.0, 10.0), (10.0, 10.0), (20.0, 10.0), (-1.0, 10.0)])
def test_ends_must_fall(cls, ends):
    with pytest.raises(ValueError, match="needs 0 < sigma_min < sigma_max"):
        cls(sigma_min=ends[0], sigma_max=ends[1])(EDM, 5)


@pytest.mark.parametrize("cls", [KarrasDiscretizer, ExponentialDiscretizer])
def test_a_table_has_no_more_noise_than_its_last_row(cls):
    with pytest.raises(
        ValueError, match="sigma_max = 80 is more noise than the last row of ScaledLinearSchedule, 14.6146"
    ):
        cls(sigma_min=0.002, sigma_max=80.0)(SD, 5)
    assert cls(sigma_max=SD(1.0).ratio.item())(SD, 5).t[0] == 1


def test_exponential_steps_are_even_in_log_snr():
    steps = ExponentialDiscretizer(0.01, 10.0, denoise=False)(FLOW, 12).log_snr.diff()
    torch.testing.assert_close(steps, steps.mean().expand(12))


def test_karras_with_rho_1_is_even_in_sigma():
    steps = KarrasDiscretizer(1.0, 0.5, 10.0, denoise=False)(EDM, 12).ratio.diff()
    torch.testing.assert_close(steps, steps.mean().expand(12))


# In time -------------------------------------------------------------------------------------------


def test_rows_in_numbers():
    assert rows(TrailingDiscretizer(), 50) == list(range(999, 18, -20))  # 999, 979 ... 39, 19
    trailing = rows(TrailingDiscretizer(), 30)
    assert trailing[:2] == [999, 966] and trailing[-3:] == [99, 66, 32]
    assert rows(LeadingDiscretizer(offset=1), 50) == list(range(981, 0, -20))  # 981, 961 ... 21, 1
    assert rows(LeadingDiscretizer(), 50) == list(range(980, -1, -20))
    assert rows(LinspaceDiscretizer(), 4) == [999, 666, 333, 0]


@pytest.mark.parametrize("discretizer", [TrailingDiscretizer(), LeadingDiscretizer(), LinspaceDiscretizer()], **named)
def test_as_many_steps_as_rows_visit_every_row(discretizer):
    assert rows(discretizer, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("discretizer", [TrailingDiscretizer(), LinspaceDiscretizer()], **named)
def test_no_row_is_visited_twice(discretizer):
    for num_steps in [*range(1, 60), 333, 499, 500, 501, 666, 667, 749, 750, 751, 997, 998, 999]:
        visited = rows(discretizer, num_steps)
        assert visited[0] == 999 and visited[-1] >= 0 and (np.diff(visited) < 0).all()


@pytest.mark.parametrize(
    "spacing, discretizer, offset",
    [
        ("trailing", TrailingDiscretizer(), 0),
        ("leading", LeadingDiscretizer(), 0),
        ("leading", LeadingDiscretizer(offset=1), 1),
        ("linspace", LinspaceDiscretizer(), 0),
    ],
)
def test_rows_are_those_of_diffusers(spacing, discretizer, offset):
    theirs = peer("diffusers").DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for num_steps in (2, 3, 7, 18, 25, 30, 50, 64, 100, 333, 999):
        theirs.set_timesteps(num_steps)
        assert rows(discretizer, num_steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("discretizer", [TrailingDiscretizer(), LeadingDiscretizer(), LinspaceDiscretizer()], **named)
def test_more_steps_than_rows_are_refused(discretizer):
    with pytest.raises(ValueError, match=f"{type(discretizer).__name__}: 11 steps on a table of 10 rows"):
        discretizer(ScaledLinearSchedule(num_rows=10), 11)


def test_an_offset_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="LeadingDiscretizer: 1000 steps run from t = 1.001"):
        LeadingDiscretizer(offset=1)(SD, 1000)
    with pytest.raises(ValueError, match="to 0; they must begin at 1 at most, and end above 0"):
        LeadingDiscretizer(offset=-1)(SD, 50)


def test_on_a_continuous_schedule_nothing_is_rounded():
    assert TrailingDiscretizer()(FLOW, 4).t.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert LeadingDiscretizer()(FLOW, 4).t.tolist() == [0.875, 0.625, 0.375, 0.125, 0]
    assert LinspaceDiscretizer(end=0.25)(FLOW, 4).t.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert UniformDiscretizer(0.9, 0.1)(FLOW, 4).t.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])


def test_a_continuous_schedule_may_be_visited_as_if_it_were_a_table():
    assert (TrailingDiscretizer(num_rows=1000)(FLOW, 30).t * 1000).round().int().tolist()[:3] == [1000, 967, 933]


def test_uniform_does_not_round_to_a_table():
    assert UniformDiscretizer()(SD, 3).t.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.1, 0.5), (1.1, 0.0), (1.0, -0.1)])
def test_uniform_needs_a_falling_stretch_of_time(ends):
    with pytest.raises(ValueError, match="needs 1 >= start > stop >= 0"):
        UniformDiscretizer(*ends)


# Explicit ------------------------------------------------------------------------------------------


def test_explicit_levels_are_just_these():
    assert ExplicitDiscretizer(times=[1.0, 0.3, 0.0])(FLOW, 2).t.tolist() == [1, 0.3, 0]
    levels = ExplicitDiscretizer(ratios=[10.0, 1.0, 0.5])(FLOW, 2)
    assert levels.ratio.tolist() == pytest.approx([10, 1, 0.5], rel=1e-12)
    assert ExplicitDiscretizer(ratios=[math.inf, 1.0])(FLOW, 1).alpha.tolist() == pytest.approx([0, 0.5])
    assert ExplicitDiscretizer(times=[1.0, 0.5, 0.5, 0.0]).num_steps == 3  # a repeated level is a step of nothing


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ratios": [1.0, 0.0], "times": [1.0, 0.0]},
        {"times": [1.0]},
        {"times": []},
        {"times": [0.5, 0.6]},
        {"times": [1.5, 0.5]},
        {"times": [1.0, -0.5]},
        {"ratios": [1.0, math.nan]},
        {"ratios": [[1.0, 0.5]]},
    ],
)
def test_explicit_levels_must_fall(given):
    with pytest.raises(ValueError, match="ExplicitDiscretizer: (give ratios or times|needs two or more)"):
        ExplicitDiscretizer(**given)


def test_explicit_levels_fix_the_number_of_steps():
    with pytest.raises(ValueError, match="lists 2 steps, the sampler wants 3"):
        ExplicitDiscretizer(times=[1.0, 0.3, 0.0])(FLOW, 3)


def test_a_discretizer_of_ones_own_may_not_rise():
    class Rising(UniformDiscretizer, abstract=True):
        def levels(self, schedule, num_steps):
            return schedule(torch.tensor([0.5, 0.7, 0.0]).double())

    with pytest.raises(ValueError, match="Rising: sigma / alpha must never rise"):
        Rising()(FLOW, 2)


def test_discretizers_are_built_by_name():
    built = build({"type": "karras", "sigma_max": 80, "sigma_min": 2e-3}, "discretizer")
    assert torch.equal(built(EDM, 9).ratio, KarrasDiscretizer()(EDM, 9).ratio)
