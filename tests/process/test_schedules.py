import math

import numpy as np
import pytest
import torch
from every_schedule import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import peer

from vdiff.process import (
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    NoiseLevel,
    ScaledLinearSchedule,
    TabulatedSchedule,
    ZeroSNRSchedule,
)
from vdiff.registry import build

VARIANCE_PRESERVING = [n for n in SCHEDULES if not n.startswith(("edm", "flow"))]
ENDS_IN_NOISE = [
    "flow",
    "flow_shift_3",
    "flow_shift_half",
    "cosine",
    "zero_snr",
    "cogvideox_2b",
    "zero_snr_shift_after",
]
TABLES = ["linear", "scaled_linear", "zero_snr", "cogvideox_2b", "zero_snr_shift_after"]

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def some(names):
    return pytest.mark.parametrize("schedule", [SCHEDULES[n] for n in names], ids=names)


def between_rows(schedule, num=200):
    """Times in (0, 1), away from the rows of a table, where the derivative jumps."""
    t = torch.linspace(0.003, 0.997, num, dtype=torch.float64)
    rows = schedule.num_rows
    return t if rows is None else (torch.floor(t * rows) + 0.37) / rows


# Truths of every schedule --------------------------------------------------------------------------


@every
def test_time_0_is_data_exactly(schedule):
    level = schedule(0.0)
    assert level.alpha.item() == 1 and level.sigma.item() == 0 and level.ratio.item() == 0


@some(ENDS_IN_NOISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_1_is_pure_noise_exactly(schedule, dtype):
    level = schedule(torch.ones(2, dtype=dtype))
    assert level.alpha.tolist() == [0, 0] and level.sigma.tolist() == [1, 1] and level.ratio.tolist() == [math.inf] * 2
    assert level.snr.tolist() == [0, 0] and level.log_snr.tolist() == [-math.inf] * 2


@every
def test_signal_to_noise_falls(schedule):
    level = schedule(torch.linspace(0, 1, 997, dtype=torch.float64))
    assert (level.log_snr.diff()[1:] < 0).all() and (level.ratio.diff() > 0).all()
    assert (level.alpha.diff() <= 0).all() and (level.sigma.diff() > 0).all()
    assert (level.alpha >= 0).all()


@every
def test_derivatives_are_those_of_alpha_and_sigma(schedule):
    t = between_rows(schedule)
    step = 1e-6
    if schedule.num_rows is None:
        t = t.requires_grad_()
        level = schedule(t)
        d_alpha, d_sigma = (
            torch.autograd.grad((v + 0 * t).sum(), t, retain_graph=True)[0] for v in (level.alpha, level.sigma)
        )
        tolerance = 1e-9
    else:
        ahead, behind, level = schedule(t + step), schedule(t - step), schedule(t)
        d_alpha = (ahead.alpha - behind.alpha) / (2 * step)
        d_sigma = (ahead.sigma - behind.sigma) / (2 * step)
        tolerance = 1e-5
    torch.testing.assert_close(level.d_alpha, d_alpha, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(level.d_sigma, d_sigma, atol=tolerance, rtol=tolerance)


@some([n for n in SCHEDULES if "edm" not in n and n != "one_row"])
def test_derivatives_at_both_ends_are_one_sided(schedule):
    step, ends = 1e-8, torch.tensor([0.0, 1.0], dtype=torch.float64)
    inside = schedule(torch.tensor([step, 1 - step], dtype=torch.float64))
    level = schedule(ends)
    for value, slope in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        change = (getattr(inside, value) - getattr(level, value)) / torch.tensor([step, -step])
        torch.testing.assert_close(getattr(level, slope), change, atol=1e-4, rtol=1e-4)


@some(VARIANCE_PRESERVING)
def test_variance_is_preserved(schedule):
    level = schedule(between_rows(schedule))
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(level.t), atol=1e-14, rtol=0)
    torch.testing.assert_close(level.alpha * level.d_alpha, -level.sigma * level.d_sigma, atol=1e-12, rtol=1e-12)


@some(["flow", "flow_shift_3", "flow_shift_half"])
def test_flow_is_a_straight_line(schedule):
    level = schedule(between_rows(schedule))
    torch.testing.assert_close(level.alpha + level.sigma, torch.ones_like(level.t), atol=1e-15, rtol=1e-15)


def test_a_flow_shift_multiplies_the_ratio():
    t = between_rows(FlowSchedule())
    torch.testing.assert_close(FlowSchedule(3.0)(t).ratio, 3 * FlowSchedule()(t).ratio)
    torch.testing.assert_close(FlowSchedule()(t).sigma, t)


def test_edm_explodes_as_declared():
    level = EDMSchedule(sigma_max=80, rho=7)(torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert level.alpha.tolist() == [1, 1] and level.sigma.tolist() == [80 / 2**7, 80]


# The inverse ---------------------------------------------------------------------------------------


@every
def test_the_inverse_gives_the_time_back(schedule):
    t = torch.cat([torch.zeros(1, dtype=torch.float64), between_rows(schedule), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(schedule.at_ratio(schedule(t).ratio).t, t, atol=1e-12, rtol=1e-9)


@every
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-7), (torch.float64, 1e-11)])
def test_the_inverse_gives_the_ratio_back(schedule, dtype, tolerance):
    top = min(schedule(1.0).ratio.item(), 1e4)
    ratio = torch.logspace(-4, math.log10(top) - 1e-9, 101, dtype=torch.float64).to(dtype)
    level = schedule.at_ratio(ratio)
    assert level.t.dtype == level.alpha.dtype == level.d_sigma.dtype == dtype
    torch.testing.assert_close(level.ratio, ratio, atol=0, rtol=tolerance)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_0_is_data(schedule, dtype):
    level = schedule.at_ratio(torch.zeros((), dtype=dtype))
    assert (level.t.item(), level.alpha.item(), level.sigma.item()) == (0, 1, 0)


@some(ENDS_IN_NOISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_ratio_is_pure_noise(schedule, dtype):
    level = schedule.at_ratio(torch.full((2,), math.inf, dtype=dtype))
    assert level.t.tolist() == [1, 1] and level.alpha.tolist() == [0, 0] and level.sigma.tolist() == [1, 1]


@some(["linear", "scaled_linear", "one_row"])
def test_beyond_the_last_row_of_a_table_is_the_last_row(schedule):
    last = schedule(1.0)
    for ratio in (last.ratio.item() * 2, math.inf):
        level = schedule.at_ratio(ratio)
        assert (level.t.item(), level.alpha.item(), level.sigma.item()) == (1, last.alpha.item(), last.sigma.item())


@some(TABLES)
def test_the_inverse_finds_the_rows_of_a_table(schedule):
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.at_ratio(schedule(t).ratio).t, t, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=50)
@given(t=st.floats(1e-3, 1.0), shift=st.floats(0.1, 10.0))
def test_any_flow_comes_back(t, shift):
    schedule = FlowSchedule(shift)
    assert math.isclose(schedule.at_ratio(schedule(t).ratio).t.item(), t, rel_tol=1e-12)


# Precision and shape -------------------------------------------------------------------------------


@every
def test_numbers_are_float64_and_tensors_keep_their_dtype_and_shape(schedule):
    assert schedule(0.5).alpha.dtype == schedule(1).sigma.dtype == schedule.at_ratio(1).t.dtype == torch.float64
    level = schedule(torch.full((2, 3), 0.5))
    assert all(getattr(level, n).shape == (2, 3) for n in ("t", "alpha", "sigma", "d_alpha", "d_sigma"))
    assert all(getattr(level, n).dtype == torch.float32 for n in ("t", "alpha", "sigma", "d_alpha", "d_sigma"))


@every
def test_values_are_computed_in_float64_and_cast_last(schedule):
    t = between_rows(schedule).float()
    exact, level = schedule(t.double()), schedule(t)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(level, name), getattr(exact, name).float(), atol=0, rtol=0)


@some(TABLES)
def test_a_float32_time_of_a_row_is_the_row(schedule):
    """Near the end of a zero-SNR table a rounded time alone would cost alpha its fourth digit."""
    rows = torch.arange(1, 1001)
    exact, level = schedule(rows.double() / 1000), schedule(rows.float() / 1000)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(level, name), getattr(exact, name).float(), atol=0, rtol=0)
    torch.testing.assert_close(
        schedule(1 - torch.arange(1000) / 1000).alpha, exact.alpha.flip(0).float(), atol=0, rtol=0
    )
    assert torch.equal(level.t, rows.float() / 1000)


# Golden numbers and peers --------------------------------------------------------------------------


def row(schedule, index):
    return schedule((index + 1) / schedule.num_rows)


def test_stable_diffusion_in_numbers():
    schedule = ScaledLinearSchedule()
    assert row(schedule, 999).alpha.item() ** 2 == pytest.approx(0.004660099, abs=5e-10)
    assert row(schedule, 499).alpha.item() ** 2 == pytest.approx(0.277669650, abs=5e-10)
    assert row(schedule, 0).alpha.item() ** 2 == pytest.approx(0.999150000, abs=5e-10)
    assert row(schedule, 0).ratio.item() == pytest.approx(0.029167, abs=5e-7)
    assert row(schedule, 999).ratio.item() == pytest.approx(14.614641, abs=5e-7)


def test_latent_diffusion_in_numbers():
    schedule = ScaledLinearSchedule(0.0015, 0.0195)
    assert row(schedule, 999).alpha.item() ** 2 == pytest.approx(0.000142304, abs=5e-10)
    assert row(schedule, 999).ratio.item() == pytest.approx(83.822494, abs=5e-7)


def test_zero_snr_in_numbers():
    schedule = ZeroSNRSchedule()
    assert row(schedule, 0).alpha.item() ** 2 == pytest.approx(0.99915, abs=1e-12)  # the first row is kept
    assert row(schedule, 499).alpha.item() ** 2 == pytest.approx(0.242359167, abs=5e-10)
    assert row(schedule, 998).alpha.item() ** 2 == pytest.approx(1.967888e-7, rel=5e-7)
    assert row(schedule, 999).alpha.item() == 0


def test_cogvideox_2b_in_numbers():
    schedule = ZeroSNRSchedule(shift=3.0)
    assert row(schedule, 0).alpha.item() == pytest.approx(0.998726353, abs=5e-10)
    assert row(schedule, 499).alpha.item() == pytest.approx(0.309789544, abs=5e-10)
    assert row(schedule, 998).alpha.item() == pytest.approx(2.496155e-4, rel=5e-7)


def test_a_shift_after_the_rescaling_multiplies_the_ratio():
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    plain, after = ZeroSNRSchedule()(t), ZeroSNRSchedule(shift=3.0, shift_order="after")(t)
    torch.testing.assert_close(after.snr, plain.snr / 3)


@pytest.mark.parametrize(
    "schedule, options",
    [
        (ScaledLinearSchedule(), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
        (LinearSchedule(), dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
        (
            LinearSchedule(0.001, 0.03, 77),
            dict(beta_schedule="linear", beta_start=0.001, beta_end=0.03, num_train_timesteps=77),
        ),
        (
            ZeroSNRSchedule(),
            dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
        ),
    ],
)
def test_tables_are_those_of_diffusers(schedule, options):
    theirs = peer("diffusers").DDPMScheduler(**options).alphas_cumprod.double()  # computed in float32
    level = schedule(torch.arange(1, len(theirs) + 1, dtype=torch.float64) / len(theirs))
    torch.testing.assert_close(level.alpha**2, theirs, atol=2e-7, rtol=1e-4)


def test_cogvideox_table_is_that_of_diffusers():
    theirs = peer("diffusers").CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", snr_shift_scale=3.0, rescale_betas_zero_snr=True
    )
    level = ZeroSNRSchedule(shift=3.0)(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(level.alpha**2, theirs.alphas_cumprod.double(), atol=2e-7, rtol=1e-4)


def test_a_table_stands_at_index_plus_one_over_n():
    betas = np.linspace(0.01, 0.3, 10)
    schedule = TabulatedSchedule(betas=betas.tolist())
    alphas_cumprod = np.cumprod(1 - betas)
    np.testing.assert_allclose(schedule((torch.arange(10).double() + 1) / 10).alpha ** 2, alphas_cumprod, rtol=1e-14)
    again = TabulatedSchedule(alphas_cumprod=alphas_cumprod.tolist())
    np.testing.assert_allclose(again(0.33).alpha, schedule(0.33).alpha, rtol=1e-14)
    assert schedule.num_rows == 10 and FlowSchedule().num_rows is None


def test_between_rows_the_angle_is_linear():
    level = TabulatedSchedule(alphas_cumprod=[0.75, 0.25])(0.75)  # angles 30 and 60 degrees
    assert level.alpha.item() == pytest.approx(math.sqrt(0.5)) == pytest.approx(level.sigma.item())


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: TabulatedSchedule(), "give betas or alphas_cumprod"),
        (lambda: TabulatedSchedule([0.1], [0.9]), "give betas or alphas_cumprod"),
        (lambda: TabulatedSchedule(betas=[]), "must fall"),
        (lambda: TabulatedSchedule(betas=[0.1, 0.0]), "must fall"),
        (lambda: TabulatedSchedule(betas=[0.1, -0.1]), "must fall"),
        (lambda: TabulatedSchedule(betas=[0.1, 1.2]), "must fall"),
        (lambda: TabulatedSchedule(betas=[1.0, 0.5]), "must fall"),
        (lambda: TabulatedSchedule(betas=[0.1, math.nan]), "must fall"),
        (lambda: TabulatedSchedule(alphas_cumprod=[1.0, 0.5]), "must fall"),
        (lambda: TabulatedSchedule(alphas_cumprod=[0.5, 0.6]), "must fall"),
        (lambda: TabulatedSchedule(alphas_cumprod=[0.5, -0.1]), "must fall"),
        (lambda: TabulatedSchedule(alphas_cumprod=[[0.5, 0.1]]), "must fall"),
        (lambda: ZeroSNRSchedule(num_rows=1), "must fall"),
        (lambda: ZeroSNRSchedule(shift=0.0), "shift must be positive, got 0.0"),
        (lambda: FlowSchedule(shift=-1.0), "shift must be positive, got -1.0"),
        (lambda: EDMSchedule(sigma_max=0.0), "sigma_max > 0"),
        (lambda: EDMSchedule(rho=0.5), "rho >= 1"),
    ],
)
def test_impossible_schedules_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_schedules_are_built_by_name():
    node = {"type": "zero_snr", "shift": 3, "shift_order": "after", "num_rows": 10}
    assert build(node, "schedule")(1.0).alpha.item() == 0
    assert isinstance(build({"type": "tabulated", "betas": [0.1, 0.2]}, "schedule")(0.5), NoiseLevel)


def test_steps_of_a_table_are_no_times():
    with pytest.raises(ValueError, match="time runs from 0, data, to 1, noise; got 500 to 500"):
        FlowSchedule()(500.0)
    with pytest.raises(ValueError, match="to 999"):
        ScaledLinearSchedule()(torch.arange(1000.0))
