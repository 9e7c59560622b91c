"""Solvers against exact flows: order, frames, ends, and peers on the same levels."""

import functools
import math

import pytest
import torch
from oracles import SCHEDULES, LogRatioDiscretizer, noise, one_gaussian, two_gaussians
from peers import peer

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    TrailingDiscretizer,
    UniformDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.samplers import (
    DDIMSampler,
    DPMpp2MSampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    Sampler,
    Stage,
    transfer,
)

ORDERS = [(DDIMSampler, 1), (EulerSampler, 1), (HeunSampler, 2), (DPMpp2MSampler, 2)]


@functools.cache
def exact(make, dim, name):
    """Where the flow ends; once for all solvers."""
    ends = LogRatioDiscretizer()(SCHEDULES[name], 1)
    return make().flow(noise(dim=dim) * ends.sigma[0], ends[0], ends[1])


def error(solver, name, make, num_steps, dim):
    """Largest distance between a sampler and the exact flow."""
    got = solver(num_steps=num_steps, discretizer=LogRatioDiscretizer())(make(), SCHEDULES[name], noise(dim=dim))
    return (got - exact(make, dim, name)).abs().max().item()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver, order", ORDERS)
@pytest.mark.parametrize("make, dim", [(one_gaussian, 2), (two_gaussians, 1)])
def test_halving_the_step_divides_the_error(make, dim, solver, order, name):
    coarse, fine = (error(solver, name, make, n, dim) for n in (128, 256))
    assert coarse / fine > 0.9 * 2**order
    assert fine < 0.05


@pytest.mark.parametrize("solver", [DDIMSampler, EulerSampler, HeunSampler, DPMpp2MSampler])
def test_all_frames_give_the_same_samples(solver):
    """Schedules are changes of variables: on the same ratios every solver makes the same sample."""
    levels = ExplicitDiscretizer(ratios=[20.0, 8.0, 3.0, 1.1, 0.4, 0.1, 0.0])
    walk = solver(num_steps=6, discretizer=levels)
    start = noise()
    first_ratio = 20.0
    results = []
    for schedule in SCHEDULES.values():
        # The start is sigma * noise in every frame; in the frame of EDM that is 20 * noise.
        sigma = schedule.at_ratio(first_ratio).sigma.item()
        alpha = schedule.at_ratio(first_ratio).alpha.item()
        assert sigma / alpha == pytest.approx(first_ratio)
        results.append(walk(one_gaussian(), schedule, start))
    for other in results[1:]:
        assert (other - results[0]).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DDIMSampler, EulerSampler, HeunSampler, DPMpp2MSampler])
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FlowSchedule(), CosineSchedule()])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_start_at_pure_noise_is_finite_and_right(solver, schedule, num_steps):
    """From pure noise the first step is the exact answer to "what is the mean": x' = sigma' noise + alpha' mean."""
    oracle = one_gaussian()
    sampler = solver(num_steps=num_steps, discretizer=TrailingDiscretizer())
    start = noise()
    steps = list(sampler.steps(oracle, schedule, start))
    assert all(torch.isfinite(s.x).all() for s in steps)
    levels = sampler.levels(schedule)
    assert levels.alpha[0] == 0
    want = levels.sigma[1] * start + levels.alpha[1] * oracle.mean
    assert (steps[0].x - want).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DDIMSampler, EulerSampler, HeunSampler, DPMpp2MSampler])
def test_a_zero_snr_walk_converges_to_the_exact_flow(solver):
    oracle, schedule = one_gaussian(), CosineSchedule()
    start, ends = noise(), schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
    want = oracle.flow(start, ends[0], ends[1])
    errors = []
    for n in (40, 160):
        got = solver(num_steps=n, discretizer=UniformDiscretizer())(oracle, schedule, start)
        errors.append((got - want).abs().max().item())
    assert errors[1] < errors[0] / 2 and errors[1] < 0.05


@pytest.mark.parametrize("solver", [DDIMSampler, EulerSampler, EulerAncestralSampler, HeunSampler, DPMpp2MSampler])
def test_repeated_levels_change_nothing(solver):
    kwargs = {"eta": 0.0} if solver is EulerAncestralSampler else {}
    plain = solver(num_steps=3, discretizer=ExplicitDiscretizer(ratios=[5.0, 1.0, 0.2, 0.0]), **kwargs)
    twice = solver(num_steps=4, discretizer=ExplicitDiscretizer(ratios=[5.0, 1.0, 1.0, 0.2, 0.0]), **kwargs)
    a, b = (s(one_gaussian(), EDMSchedule(), noise()) for s in (plain, twice))
    assert torch.isfinite(b).all()
    if solver is not DPMpp2MSampler:  # whose history is one of levels that coincide: first order after them
        assert (a - b).abs().max() < 1e-12


def test_the_last_step_into_data_is_what_the_network_says():
    steps = list(DPMpp2MSampler(num_steps=5).steps(one_gaussian(), EDMSchedule(), noise()))
    assert torch.equal(steps[-1].x, steps[-1].x0)


# Peers --------------------------------------------------------------------------------------------


def wrapped(oracle):
    """The oracle as k-diffusion calls it: x and sigma of the variance-exploding frame."""
    schedule = EDMSchedule()
    return lambda x, sigma, **_: oracle(x, schedule.at_ratio(sigma)).x0


@pytest.mark.parametrize(
    "solver, function, options",
    [
        (EulerSampler(num_steps=12), "sample_euler", {}),
        (DDIMSampler(num_steps=12), "sample_euler", {}),
        (HeunSampler(num_steps=12), "sample_heun", {}),
        (DPMpp2MSampler(num_steps=12), "sample_dpmpp_2m", {}),
        (EulerAncestralSampler(num_steps=12, eta=0.0), "sample_euler_ancestral", {"eta": 0.0}),
    ],
)
def test_agrees_with_k_diffusion_on_the_same_levels(solver, function, options):
    sampling = peer("k_diffusion.sampling")
    oracle, schedule, start = one_gaussian(), EDMSchedule(), noise()
    sigmas = KarrasDiscretizer()(schedule, 12).ratio
    want = getattr(sampling, function)(wrapped(oracle), start * sigmas[0], sigmas, disable=True, **options)
    assert (solver(oracle, schedule, start) - want).abs().max() < 1e-10


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_noise_agrees_with_k_diffusion(eta):
    """With the same fresh noise, by number, the walks agree."""
    sampling = peer("k_diffusion.sampling")
    oracle, schedule, start = one_gaussian(), EDMSchedule(), noise()
    sampler = EulerAncestralSampler(num_steps=8, eta=eta)
    draw = sampler.noise_source.bind(list(range(64)), start)
    numbers = iter(range(1, 99, 2))
    sigmas = KarrasDiscretizer()(schedule, 8).ratio
    want = sampling.sample_euler_ancestral(
        wrapped(oracle), start * sigmas[0], sigmas, eta=eta, disable=True, noise_sampler=lambda *_: draw(next(numbers))
    )
    got = sampler(oracle, schedule, start, seeds=list(range(64)))
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_noise_is_that_of_the_paper(eta):
    """sigma_t of arXiv:2010.02502, eq. 16, in the variance-preserving frame of the paper."""
    schedule = CosineSchedule()
    now, then = schedule(0.7), schedule(0.5)
    abar, abar_next = now.alpha.item() ** 2, then.alpha.item() ** 2
    want = eta * math.sqrt((1 - abar_next) / (1 - abar)) * math.sqrt(1 - abar / abar_next)
    sampler = DDIMSampler(num_steps=1, eta=eta, discretizer=ExplicitDiscretizer(times=[0.7, 0.5]))
    from vdiff.samplers import Node

    (stage,) = sampler.plan(Node.of(sampler.levels(schedule)), schedule)
    assert stage.update.get("noise", 0.0) == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_agrees_with_diffusers_ddim_on_a_table(prediction_type):
    diffusers = peer("diffusers")
    from vdiff.process import ScaledLinearSchedule

    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
    )
    theirs.set_timesteps(10)
    oracle, schedule = one_gaussian(), ScaledLinearSchedule()
    sampler = DDIMSampler(num_steps=10)
    assert [round(t.item() * 1000) - 1 for t in sampler.levels(schedule).t[:-1]] == theirs.timesteps.tolist()
    x = (noise() * sampler.levels(schedule).sigma[0]).float()
    got = sampler(oracle, schedule, noise().float())
    for t in theirs.timesteps:
        level = schedule(torch.full((64,), (t.item() + 1) / 1000, dtype=torch.float64)).to(torch.float32)
        said = oracle(x, level).to("epsilon" if prediction_type == "epsilon" else "v")
        x = theirs.step(said, t, x).prev_sample
    assert (got - x).abs().max() < 2e-5  # the peer works in float32


def test_churn_agrees_with_k_diffusion():
    sampling = peer("k_diffusion.sampling")
    oracle, schedule, start = one_gaussian(), EDMSchedule(), noise()
    sampler = HeunSampler(num_steps=10, churn=4.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003)
    sigmas = KarrasDiscretizer()(schedule, 10).ratio
    used = [2 * i for i, s in enumerate(sampler.plan(*_plan_args(sampler, schedule))) if "noise" in s.ask]
    assert len(used) == int(((sigmas[:-1] >= 0.05) & (sigmas[:-1] <= 50.0)).sum())
    draw = sampler.noise_source.bind(list(range(64)), start)
    churned = iter(draw(number) for number in used)
    inside = {s.item() for s in sigmas[:-1] if 0.05 <= s <= 50.0}
    at = iter(sigmas[:-1].tolist())
    real = torch.randn_like
    try:
        sampling.torch.randn_like = lambda x: next(churned) if next(at) in inside else torch.zeros_like(x)
        want = sampling.sample_heun(
            wrapped(oracle),
            start * sigmas[0],
            sigmas,
            disable=True,
            s_churn=4.0,
            s_tmin=0.05,
            s_tmax=50.0,
            s_noise=1.003,
        )
    finally:
        sampling.torch.randn_like = real
    got = sampler(oracle, schedule, start, seeds=list(range(64)))
    assert (got - want).abs().max() < 1e-10


def test_churn_counts_the_steps_of_a_list_of_levels():
    levels = KarrasDiscretizer()(EDMSchedule(), 6).ratio.tolist()
    listed, counted = HeunSampler(churn=2.0, discretizer=ExplicitDiscretizer(ratios=levels)), HeunSampler(6, churn=2.0)
    assert listed.num_steps == 6
    a, b = (s(one_gaussian(), EDMSchedule(), noise(), seeds=range(64)) for s in (listed, counted))
    assert (a - b).abs().max() < 1e-10


def _plan_args(sampler, schedule):
    from vdiff.samplers import Node

    return Node.of(sampler.levels(schedule)), schedule


# A newcomer's solver ------------------------------------------------------------------------------


def test_a_solver_is_a_few_lines():
    """Midpoint in log sigma, written as a newcomer would; second order measured."""
    from vdiff.registry import isolated

    with isolated():

        class Midpoint(Sampler):
            def plan(self, nodes, schedule):
                from vdiff.samplers import Node

                for now, then in zip(nodes, nodes[1:], strict=False):
                    (mid,) = Node.of(schedule.at_ratio(math.sqrt(now.ratio * then.ratio)))
                    keep, gain = transfer(now, mid)
                    yield Stage(now, {"x": keep, "x0": gain}, store={"start": "x"}, ends_step=False)
                    keep, gain = transfer(now, then)
                    yield Stage(mid, {"start": keep, "x0": gain})

        errors = [error(Midpoint, "edm", two_gaussians, n, 1) for n in (128, 256)]
    assert errors[0] / errors[1] > 0.9 * 4
