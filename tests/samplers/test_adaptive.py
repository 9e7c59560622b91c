"""Adaptive samplers: tableaux, tolerance, rows that do not know each other, peers, guiders and errors."""

import functools
import itertools
import math

import pytest
import torch
from oracles import noise, one_gaussian, two_gaussians
from peers import peer

from vdiff.denoisers import Denoiser, GaussianDenoiser
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    LinearSchedule,
    Prediction,
    X0Parameterization,
    ZeroSNRSchedule,
)
from vdiff.registry import build, isolated
from vdiff.samplers import Dopri5Sampler, DPMAdaptiveSampler, Tsit5Sampler
from vdiff.samplers.adaptive import DOPRI5, TSIT5, Controller, integrate

RUNGE_KUTTA = {"dopri5": Dopri5Sampler, "tsit5": Tsit5Sampler}
ALL = {**RUNGE_KUTTA, "dpm_adaptive": DPMAdaptiveSampler}
PAIRS = {"dopri5": DOPRI5, "tsit5": TSIT5}


def last_of(sampler, oracle, schedule, start, **options):
    *_, last = sampler.steps(oracle, schedule, start, **options)
    return last


# Tableaux ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_the_weights_integrate_polynomials_to_the_order(name):
    """Of degree 4 with the result, of degree 3 with the one inside; and the result is the last look."""
    pair = PAIRS[name]
    for power in range(5):
        terms = [w * c**power for w, c in zip(pair.high, pair.nodes, strict=True)]
        assert math.fsum(terms) == pytest.approx(1 / (power + 1), abs=1e-13)
        inside = math.fsum(w * c**power for w, c in zip(pair.low, pair.nodes, strict=True))
        assert (inside == pytest.approx(1 / (power + 1), abs=1e-10)) is (power < 4)
    assert tuple(pair.high[:-1]) == tuple(pair.rows[-1]) and pair.nodes[-1] == pytest.approx(1)


@pytest.mark.parametrize("name", PAIRS)
def test_steps_of_one_size_are_of_fifth_order(name):
    """On a curved field, with tolerances that accept everything."""

    def error(num_steps):
        controller = Controller(5, 1.0 / num_steps, safety=1.0)
        controller.exponents = (0.0, 0.0, 0.0)  # a growth of 1
        field = lambda u, y: (torch.cos(3 * y[0]) * (1 + u[:, None]),)  # noqa: E731
        start = (torch.tensor([[0.2], [1.5]], dtype=torch.float64),)
        *_, last = integrate(field, start, 0.0, 1.0, PAIRS[name], controller, 1e9, 1e9, 999, "here")
        return last.state[0]

    exact = error(800)
    coarse, fine = ((error(n) - exact).abs().max() for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize("name", PAIRS)
def test_a_tight_solution_is_that_of_torchdiffeq(name):
    oracle, schedule = two_gaussians(), FlowSchedule()
    start = noise(8, 1)
    levels = ExplicitDiscretizer(times=[1.0, 0.05])
    got = last_of(RUNGE_KUTTA[name](1e-10, 1e-10, discretizer=levels), oracle, schedule, start).x

    def velocity(t, x):
        level = schedule(t.expand(len(x)))
        return (x - oracle(x, level).x0) / t

    times = torch.tensor([1.0, 0.05], dtype=torch.float64)
    want = peer("torchdiffeq").odeint(velocity, start, times, rtol=1e-10, atol=1e-10, method="dopri5")[-1]
    assert (got - want).abs().max() < 1e-8


# What the tolerance buys ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule(), CosineSchedule(), ZeroSNRSchedule()])
def test_the_error_falls_with_the_tolerance(schedule):
    """Down to the last level before data; two humps bend the flow, which multiplies the errors of its start."""
    oracle, start = two_gaussians(), noise(16, 1)
    levels = Dopri5Sampler().levels(schedule)
    want = oracle.flow(start * levels.sigma[0], levels[0], levels[1], num_steps=500)
    before_data = ExplicitDiscretizer(times=levels.t[:2].tolist())
    for solver in RUNGE_KUTTA.values():
        errors = [
            (last_of(solver(tolerance, tolerance, discretizer=before_data), oracle, schedule, start).x - want)
            .abs()
            .max()
            for tolerance in (1e-3, 1e-6)
        ]
        assert errors[0] < 0.02 and errors[1] < 2e-5


def test_the_angle_needs_the_fewest_calls():
    """For the same error; the reference measures 0.55 to 0.65 of those in log sigma."""
    calls = {
        coordinate: last_of(
            Dopri5Sampler(1e-4, 1e-4, coordinate=coordinate), two_gaussians(), EDMSchedule(), noise(32, 1)
        ).num_calls
        for coordinate in ("angle", "log_sigma", "sigma")
    }
    assert calls["angle"] < 0.65 * calls["log_sigma"] and calls["angle"] < 0.65 * calls["sigma"]


def test_gaussian_data_of_that_spread_is_a_straight_line_in_the_angle():
    """So the steps grow as fast as the controller lets them."""
    last = last_of(Tsit5Sampler(), GaussianDenoiser(0.0, 0.5), FlowSchedule(), noise(4))
    assert last.num_calls < 40 and int(last.rejected.sum()) == 0


@pytest.mark.parametrize("name", ALL)
def test_the_walk_ends_in_what_the_network_says_at_no_further_call(name):
    asked = []

    with isolated():

        class Counting(Denoiser, name="counting_for_this_test"):
            language = X0Parameterization()

            def forward(self, x_t, level, cond=None):
                asked.append(x_t)
                return Prediction(self.language, one_gaussian()(x_t, level).x0, x_t, level)

        last = last_of(ALL[name](), Counting(), EDMSchedule(), noise(4))
    assert last.num_calls == len(asked)
    assert torch.equal(last.x, last.x0)


@pytest.mark.parametrize("name", RUNGE_KUTTA)
@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule(), ZeroSNRSchedule(), LinearSchedule()])
def test_every_start_and_every_end_is_finite(name, schedule):
    got = RUNGE_KUTTA[name](1e-3, 1e-3)(one_gaussian(), schedule, noise(4).float())
    assert torch.isfinite(got).all() and got.dtype == torch.float32


# Rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_row_does_not_depend_on_the_batch_around_it(name):
    """Bitwise: its steps, its rejections and its end are its own."""
    start = noise(6, 1) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0, 1.0], dtype=torch.float64)[:, None]
    together = last_of(ALL[name](), two_gaussians(), EDMSchedule(), start)
    for row in range(6):
        alone = last_of(ALL[name](), two_gaussians(), EDMSchedule(), start[row : row + 1])
        assert torch.equal(alone.x[0], together.x[row]) and alone.rejected[0] == together.rejected[row]


def test_rows_are_at_levels_of_their_own():
    steps = list(Tsit5Sampler().steps(two_gaussians(), EDMSchedule(), noise(6, 1)))
    assert any(len(set(step.level.ratio.tolist())) > 1 for step in steps)
    assert all(a.num_calls < b.num_calls for a, b in itertools.pairwise(steps))


# k-diffusion ---------------------------------------------------------------------------------------


@pytest.fixture
def in_float64():
    """k-diffusion makes its levels in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("order, rtol", [(2, 0.05), (3, 0.05), (3, 0.005)])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_dpm_adaptive_of_one_sample_agrees_with_k_diffusion(order, rtol, row, in_float64):
    """Attempt by attempt. In a batch theirs is another: its rows share their steps."""
    oracle, schedule, start = two_gaussians(), EDMSchedule(), noise(4, 1)[row : row + 1]
    model = lambda x, sigma, **_: oracle(x, schedule.at_ratio(sigma)).x0  # noqa: E731
    theirs = peer("k_diffusion.sampling").sample_dpm_adaptive
    want, info = theirs(model, start * 80.0, 0.002, 80.0, order=order, rtol=rtol, disable=True, return_info=True)
    sampler = DPMAdaptiveSampler(order, rtol, discretizer=ExplicitDiscretizer(ratios=[80.0, 0.002]))
    last = last_of(sampler, oracle, schedule, start)
    assert (last.x - want).abs().max() < 1e-9  # differences of exponentials over the step, to rounding
    assert last.index + 1 == info["steps"] and last.rejected.item() == info["n_reject"]
    assert last.num_calls <= info["nfe"]  # a rejected step is not asked again where it began


def test_a_sample_of_k_diffusion_depends_on_its_batch(in_float64):
    oracle, schedule, start = two_gaussians(), EDMSchedule(), noise(4, 1)
    model = lambda x, sigma, **_: oracle(x, schedule.at_ratio(sigma)).x0  # noqa: E731
    theirs = functools.partial(peer("k_diffusion.sampling").sample_dpm_adaptive, model, disable=True)
    together, alone = (theirs(x * 80.0, 0.002, 80.0) for x in (start, start[:1]))
    assert (together[0] - alone[0]).abs().max() > 1e-5


# Guiders, edits, starts ----------------------------------------------------------------------------


def test_a_walk_under_a_guider_is_that_of_the_guided_denoiser():
    from vdiff.samplers import CFGGuider

    with isolated():

        class Shifted(Denoiser, name="shifted_for_this_test"):
            """The condition moves x0."""

            language = X0Parameterization()

            def __init__(self, by=None):
                super().__init__()
                self.by = by

            def forward(self, x_t, level, cond=None):
                moved = self.by if self.by is not None else cond.tensors["shift"]
                return Prediction(self.language, one_gaussian()(x_t, level).x0 + moved, x_t, level)

        from vdiff.process import Conditioning

        shifts = (Conditioning({"shift": torch.full((4, 1), by, dtype=torch.float64)}) for by in (1.0, 0.0))
        cond = next(shifts).with_null(next(shifts))
        got = Tsit5Sampler()(Shifted(), FlowSchedule(), noise(4), cond, guider=CFGGuider(3.0))
        want = Tsit5Sampler()(Shifted(by=3.0), FlowSchedule(), noise(4))
    assert (got - want).abs().max() < 1e-10


def test_an_edit_sees_every_answer():
    from vdiff.samplers.edits import Clamp

    got = Tsit5Sampler()(GaussianDenoiser(0.0, 3.0), FlowSchedule(), noise(4), edit=Clamp(-0.1, 0.1))
    assert got.abs().max() <= 0.1 + 1e-9


def test_a_walk_may_begin_at_any_level():
    oracle, x0 = two_gaussians(), torch.full((8, 1), 0.5, dtype=torch.float64)
    got = Tsit5Sampler()(oracle, FlowSchedule(), noise(8, 1), x0=x0, strength=0.1)
    assert (got - x0).abs().max() < 0.4


# Errors --------------------------------------------------------------------------------------------


def test_a_walk_that_does_not_arrive_says_where_it_is():
    with pytest.raises(RuntimeError, match=r"4 of 4 rows are not there after max_steps = 3 attempts and 19 network"):
        Tsit5Sampler(1e-9, 1e-9, max_steps=3)(two_gaussians(), EDMSchedule(), noise(4, 1))


def test_a_denoiser_that_says_nothing_finite_is_named_with_its_row():
    with isolated():

        class Broken(Denoiser, name="broken_for_this_test"):
            language = X0Parameterization()

            def forward(self, x_t, level, cond=None):
                x0 = x_t.clone()
                x0[2] = math.nan
                return Prediction(self.language, x0, x_t, level)

        with pytest.raises(RuntimeError, match="the slope of row 2 is not finite near 1.5"):
            Tsit5Sampler()(Broken(), FlowSchedule(), noise(4))


def test_coordinates_that_do_not_reach_pure_noise_say_so():
    for make in (functools.partial(Dopri5Sampler, coordinate="log_sigma"), DPMAdaptiveSampler):
        with pytest.raises(ValueError, match="starts at pure noise, where its coordinate is infinite"):
            make()(one_gaussian(), FlowSchedule(), noise(4))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="order must be 2 or 3, got 4"):
        DPMAdaptiveSampler(4)
    with pytest.raises(ValueError, match="needs rtol >= 0 and atol > 0"):
        Tsit5Sampler(atol=0.0)
    with pytest.raises(TypeError, match="it has no plan"):
        Tsit5Sampler().bind()
    for name in ALL:
        assert build({"type": name, "rtol": 1e-3}, "sampler").rtol == 1e-3
