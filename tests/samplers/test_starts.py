"""Where walks begin and end: from any level, from a sample, up from data, in parts."""

import math

import pytest
import torch
from every_sampler import is_deterministic, make, names
from oracles import LogRatioDiscretizer, noise, one_gaussian, two_gaussians

from vdiff.denoisers import Denoiser, GaussianDenoiser
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    EpsilonParameterization,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    PyramidDiscretizer,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    UndefinedParameterizationError,
    UniformDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.samplers import (
    CFGGuider,
    DDIMSampler,
    DPMpp2MSampler,
    DPMpp2MSDESampler,
    EulerAncestralSampler,
    HeunSampler,
    LMSSampler,
    UniPCSampler,
)

SCHEDULES = {"edm": EDMSchedule(), "cosine": CosineSchedule(), "flow": FlowSchedule(3.0), "zero_snr": ZeroSNRSchedule()}


def data(rows=64):
    return one_gaussian().draw((rows, 2))


# From a sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_a_walk_from_a_sample_begins_at_its_own_level_with_alpha_x0_and_sigma_noise(schedule):
    sampler, x0, z = DPMpp2MSampler(10), data(), noise()
    run = sampler.bind(one_gaussian(), schedule, z, strength=0.62)
    first = run.stages[0].node
    assert first.t == pytest.approx(0.62, abs=1e-12)
    assert (sampler.start(schedule, z, x0, 0.62) - (first.alpha * x0 + first.sigma * z)).abs().max() < 1e-12
    whole = sampler.levels(schedule).t.tolist()
    later = [t for t in whole if t < 0.62 - 1e-9]
    assert [s.node.t for s in run.stages] == pytest.approx([0.62, *later[:-1]], abs=1e-12)


def test_on_a_table_the_start_is_a_row_and_one_that_is_visited_anyway_is_not_doubled():
    levels = DDIMSampler(10).bind(one_gaussian(), ScaledLinearSchedule(), noise(), strength=0.6004).stages
    assert [round(s.node.t * 1000) for s in levels] == [600, 500, 400, 300, 200, 100]
    assert levels[0].node.t * 1000 == pytest.approx(600, abs=1e-9)


@pytest.mark.parametrize("name", names())
def test_a_part_of_a_walk_is_a_walk_with_an_empty_history(name):
    """The same as a walk whose levels are those alone."""
    schedule, oracle = FlowSchedule(), one_gaussian()
    whole = make(name, 4, discretizer=ExplicitDiscretizer(times=[1.0, 0.75, 0.5, 0.25, 0.0]), schedule=schedule)
    if name in ("restart", "auto"):
        pytest.skip("its restarts, or its solver, are chosen by the whole walk")
    part = make(name, 3, discretizer=ExplicitDiscretizer(times=[0.7, 0.5, 0.25, 0.0]))
    x0, z, seeds = data(8), noise(8), range(8)
    got = whole(oracle, schedule, z, seeds=seeds, x0=x0, strength=0.7)
    assert (got - part(oracle, schedule, z, seeds=seeds, x0=x0)).abs().max() < 1e-12


def test_strength_is_how_much_of_the_sample_is_made_anew():
    """Weak: the sample as it was; strong: nothing of it."""
    oracle, x0 = two_gaussians(), two_gaussians().draw(64, seed=3)
    sampler, z = HeunSampler(40), noise(64, 1)
    moved = {s: (sampler(oracle, CosineSchedule(), z, x0=x0, strength=s) - x0).abs().mean().item() for s in (0.05, 1.0)}
    assert moved[0.05] < 0.1 < 0.4 < moved[1.0]
    far = sampler(oracle, CosineSchedule(), z, x0=-x0, strength=1.0)
    assert (far - sampler(oracle, CosineSchedule(), z, x0=x0, strength=1.0)).abs().max() < 1e-12


def test_a_start_from_the_marginal_has_the_marginal_at_the_end():
    """Noise of the sample's own distribution at any level leads back to that distribution."""
    oracle = one_gaussian()
    x0, z = oracle.draw((20_000, 2), seed=1), noise(20_000)
    out = HeunSampler(200)(oracle, CosineSchedule(), z, x0=x0, strength=0.4)
    assert (out.std(0) / oracle.variance.sqrt() - 1).abs().max() < 0.02  # the spread of 20,000 is right to 0.5 %
    assert (out.mean(0) - oracle.mean).abs().max() < 0.02


# Up from data ------------------------------------------------------------------------------------

DETERMINISTIC = [n for n in names() if n != "restart" and is_deterministic(make(n), FlowSchedule())]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_up_and_down_again_is_where_it_began(name, schedule):
    """With every deterministic solver, and the closer the more steps."""
    oracle, x0 = one_gaussian(), data()
    errors = []
    for n in (25, 100):
        sampler = make(name, n * (3 if name == "dpm_fast" else 1))
        up = sampler.invert(oracle, schedule, x0)
        errors.append((sampler(oracle, schedule, up) - x0).abs().max().item())
    assert errors[1] < 0.15, errors
    if name_of(schedule) != "zero_snr":  # there the walk down begins with two long steps of first order, however many
        assert errors[1] < 0.5 * errors[0] + 1e-3, errors  # where the last level before data stays put, so does some


def name_of(schedule):
    return next(name for name, own in SCHEDULES.items() if own is schedule)


@pytest.mark.parametrize("solver, order", [(DDIMSampler, 1), (HeunSampler, 2), (DPMpp2MSampler, 2), (UniPCSampler, 2)])
def test_the_round_trip_is_of_the_order_of_the_solver(solver, order):
    """Between levels that no end falls short of."""
    oracle, x0 = two_gaussians(), two_gaussians().draw(32)
    errors = []
    for n in (60, 120):
        sampler = solver(n, discretizer=LogRatioDiscretizer(5.0, 0.1))
        up = sampler.invert(oracle, EDMSchedule(), x0)
        errors.append((sampler(oracle, EDMSchedule(), up) - x0).pow(2).mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) > order - 0.15, errors


def test_the_way_up_follows_the_flow():
    """To the noise that the exact flow of Gaussian data comes from."""
    oracle, x0 = one_gaussian(), data()
    levels = CosineSchedule()(torch.tensor([1.0, 0.0], dtype=torch.float64))
    want = (x0 - oracle.mean) / oracle.variance.sqrt()
    assert (oracle.flow(want, *levels) - x0).abs().max() < 1e-12
    sampler = HeunSampler(400, discretizer=UniformDiscretizer())
    # The last step into pure noise is of first order, and the first one off data; both are 1 / 400 long.
    assert (sampler.invert(oracle, CosineSchedule(), x0) - want).abs().max() < 0.02


def test_the_first_step_off_data_undoes_the_last_one_into_it():
    """To fourth order in the level before data: a tenth of the level, a ten-thousandth of the error."""
    oracle, x0 = one_gaussian(), data()
    errors = []
    for low in (0.02, 0.002):
        sampler = DDIMSampler(2, discretizer=ExplicitDiscretizer(ratios=[low * 1.0000001, low, 0.0]))
        errors.append((sampler(oracle, EDMSchedule(), sampler.invert(oracle, EDMSchedule(), x0)) - x0).abs().max())
    assert errors[0] < 5e-3 and 3e3 < errors[0] / errors[1] < 3e4


def test_an_edit_under_other_conditions_begins_halfway_up():
    oracle, x0 = two_gaussians(), two_gaussians().draw(16)
    sampler = HeunSampler(60)
    up = sampler.invert(oracle, CosineSchedule(), x0, strength=0.5)
    back = sampler(oracle, CosineSchedule(), up, x0=x0, strength=0.5)
    assert (back - x0).abs().max() < 5e-3  # two ways of 30 steps of second order


def test_frames_are_walked_up_each_on_its_own():
    oracle, x0 = GaussianDenoiser(0.2, 0.6), torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    together = DPMpp2MSampler(24, discretizer=PyramidDiscretizer(3, 2))
    alone = DPMpp2MSampler(20, discretizer=TrailingDiscretizer())
    up = together.invert(oracle, FlowSchedule(), x0)
    assert (up - alone.invert(oracle, FlowSchedule(), x0)).abs().max() < 1e-10


def test_walks_that_cannot_be_taken_back_are_refused():
    for name in ("euler_ancestral", "dpmpp_2m_sde", "lcm"):
        with pytest.raises(ValueError, match="draws fresh noise, so its walk cannot be inverted"):
            make(name, 3).invert(one_gaussian(), FlowSchedule(), data())
    with pytest.raises(ValueError, match="two steps at least"):
        DDIMSampler(1).invert(one_gaussian(), FlowSchedule(), data())


# In parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_a_walk_that_is_stopped_goes_on_as_if_it_had_not_been(name):
    """Bitwise, with the history and the draws of fresh noise."""
    schedule, oracle, z, seeds = EDMSchedule(), one_gaussian(), noise(8), range(8)
    sampler = make(name, 6, schedule=schedule)
    steps = list(sampler.steps(oracle, schedule, z, seeds=seeds))
    for stopped in steps[:-1]:
        *_, last = sampler.steps(oracle, schedule, z, seeds=seeds, after=stopped)
        assert torch.equal(last.x, steps[-1].x) and last.index == steps[-1].index


def test_a_pyramid_goes_on_too():
    sampler, z = DPMpp2MSampler(7, discretizer=PyramidDiscretizer(5, 1)), torch.randn(2, 1, 5, 2, 2)
    steps = list(sampler.steps(GaussianDenoiser(0.2, 0.6), FlowSchedule(), z))
    for stopped in steps[:-1]:
        *_, last = sampler.steps(GaussianDenoiser(0.2, 0.6), FlowSchedule(), z, after=stopped)
        assert torch.equal(last.x, steps[-1].x)


# Short walks and repeated levels ------------------------------------------------------------------

SHORT = {
    "one": [80.0, 0.0],
    "two": [80.0, 1.0, 0.0],
    "not to data": [80.0, 5.0, 1.0],
    "repeated": [80.0, 5.0, 5.0, 1.0, 1.0, 0.0, 0.0],
    "from pure noise": [math.inf, math.inf, 5.0, 1.0, 0.0],
}


@pytest.mark.parametrize("ratios", SHORT.values(), ids=list(SHORT))
@pytest.mark.parametrize("name", names())
def test_short_walks_and_repeated_levels_are_finite(name, ratios):
    schedule = CosineSchedule() if math.isinf(ratios[0]) else EDMSchedule()
    try:
        sampler = make(name, len(ratios) - 1, discretizer=ExplicitDiscretizer(ratios), schedule=schedule)
        out = sampler(one_gaussian(), schedule, noise(4), seeds=range(4))
    except ValueError as error:
        assert name == "restart" and ("no level" in str(error) or "RestartInterval" in str(error))
    else:
        assert torch.isfinite(out).all()


def test_the_start_from_zero_snr_is_the_noise_itself():
    for init in ("sigma", "vp", 0.5):
        assert torch.equal(DDIMSampler(4, init=init).start(ZeroSNRSchedule(), noise()), noise())


def test_a_walk_may_end_before_data():
    sampler = DPMpp2MSampler(80, discretizer=KarrasDiscretizer(denoise=False))
    out = sampler(one_gaussian(), EDMSchedule(), noise())
    levels = sampler.levels(EDMSchedule())
    assert levels.ratio[-1].item() == pytest.approx(0.002)
    assert (
        out - one_gaussian().flow(80 * noise(), levels[0], levels[-1])
    ).abs().max() < 0.02  # of second order but for its start


# What cannot be ----------------------------------------------------------------------------------


def test_impossible_starts_are_errors():
    oracle, sampler = one_gaussian(), DDIMSampler(5)
    walk = lambda z, **options: sampler(oracle, EDMSchedule(), z, **options)  # noqa: E731
    bad = noise()
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="DDIMSampler: the noise .* not finite"):
        walk(bad)
    with pytest.raises(ValueError, match="DDIMSampler: the x0 .* not finite"):
        walk(noise(), x0=bad / 0)
    with pytest.raises(ValueError, match=r"x0 of shape \(3, 2\) and noise of shape \(64, 2\)"):
        walk(noise(), x0=data(3))
    for strength in (0.0, 1.2, -1.0, math.nan):
        with pytest.raises(ValueError, match="strength"):
            walk(noise(), x0=data(), strength=strength)
    with pytest.raises(ValueError, match="nothing is left of a walk"):
        early = KarrasDiscretizer(denoise=False, sigma_min=1.0)
        DDIMSampler(5, discretizer=early)(oracle, EDMSchedule(), noise(), strength=0.2)
    with pytest.raises(ValueError, match="needs two or more values"):
        ExplicitDiscretizer(times=[])
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        DDIMSampler(0)


def test_noise_at_pure_noise_is_not_epsilon_but_below_it_is():
    class Epsilon(Denoiser, name="epsilon_for_these_starts"):
        language = EpsilonParameterization()

        def forward(self, x_t, level, cond=None):
            return one_gaussian()(x_t, level)

    with pytest.raises(UndefinedParameterizationError, match="DDIMSampler.*t = 1"):
        DDIMSampler(5)(Epsilon(), ZeroSNRSchedule(), noise())
    out = DDIMSampler(5)(Epsilon(), ZeroSNRSchedule(), noise(), x0=data(), strength=0.5)
    assert torch.isfinite(out).all()


def test_stochastic_samplers_and_guiders_begin_anywhere_too():
    for solver in (EulerAncestralSampler, DPMpp2MSDESampler, LMSSampler):
        options = {"x0": data(8), "strength": 0.5, "seeds": range(8), "guider": CFGGuider(1.0)}
        assert torch.isfinite(solver(6)(one_gaussian(), CosineSchedule(), noise(8), **options)).all()
