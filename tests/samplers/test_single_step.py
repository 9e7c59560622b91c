"""Solvers that look into the middle of a step: ends, peers on the same levels."""

import functools
import math

import pytest
import torch
from oracles import SCHEDULES, noise, one_gaussian, two_gaussians
from peers import peer
from walks import calls_and_kernels, is_one_graph

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    UniformDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPM2AncestralSampler,
    DPM2Sampler,
    DPMpp2SAncestralSampler,
    DPMpp2SSampler,
    EulerAncestralFlowSampler,
    EulerSampler,
    HeunSampler,
    Node,
)

SOLVERS = {
    "dpm_2": DPM2Sampler,
    "dpm_2_ancestral": functools.partial(DPM2AncestralSampler, eta=0.0),
    "dpmpp_2s": DPMpp2SSampler,
    "dpmpp_2s_ancestral": functools.partial(DPMpp2SAncestralSampler, eta=0.0),
    "heun_sigma": HeunSampler,
    "heun_flow": functools.partial(HeunSampler, coordinate="flow"),
    "heun_angle": functools.partial(HeunSampler, coordinate="angle"),
}
STOCHASTIC = {
    "dpm_2_ancestral": DPM2AncestralSampler,
    "dpmpp_2s_ancestral": DPMpp2SAncestralSampler,
    "euler_ancestral_flow": EulerAncestralFlowSampler,
    "ddpm": DDPMSampler,
    "ddpm_large": functools.partial(DDPMSampler, v_posterior=1.0),
}
every = pytest.mark.parametrize("name", SOLVERS)
SEEDS = list(range(16))


@every
def test_repeated_levels_change_nothing(name):
    once, twice = (
        SOLVERS[name](num_steps=len(r) - 1, discretizer=ExplicitDiscretizer(ratios=r))(
            one_gaussian(), EDMSchedule(), noise(16)
        )
        for r in ([5.0, 1.0, 0.2, 0.0], [5.0, 1.0, 1.0, 0.2, 0.0])
    )
    assert (once - twice).abs().max() < 1e-12


@pytest.mark.parametrize("name", [*SOLVERS, *STOCHASTIC])
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FlowSchedule(), CosineSchedule(), EDMSchedule()])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_every_start_and_every_end_is_finite(name, schedule, num_steps):
    sampler = {**SOLVERS, **STOCHASTIC}[name](num_steps=num_steps)
    steps = list(sampler.steps(one_gaussian(), schedule, noise(16), seeds=SEEDS))
    assert len(steps) == num_steps and all(torch.isfinite(s.x).all() for s in steps)
    if name != "heun_angle":
        assert (steps[-1].x - steps[-1].x0).abs().max() < 1e-12


def test_a_step_from_pure_noise_is_of_second_order_where_the_coordinate_is_finite_there():
    """Heun in the flow's time or in the angle takes its second look from pure noise as well."""
    oracle, schedule, start = two_gaussians(), CosineSchedule(), noise(16, 1)
    want = oracle.flow(start, schedule(1.0), schedule(0.2))
    for name, least in (("heun_sigma", 0), ("heun_flow", 1.8), ("heun_angle", 1.8)):
        errors = [
            (SOLVERS[name](num_steps=n, discretizer=UniformDiscretizer(1.0, 0.2))(oracle, schedule, start) - want)
            .pow(2)
            .mean()
            .sqrt()
            for n in (32, 64)
        ]
        assert math.log2(errors[0] / errors[1]) > least


def test_heun_in_another_coordinate_is_another_solver():
    samples = [SOLVERS[n](num_steps=6)(two_gaussians(), EDMSchedule(), noise(16, 1)) for n in SOLVERS if "heun" in n]
    assert min((samples[i] - samples[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_heun_in_the_flows_time_is_that_of_a_flow():
    """The textbook's, written in the velocity."""
    oracle, schedule, start = two_gaussians(), FlowSchedule(), noise(16, 1)
    levels = UniformDiscretizer(0.95, 0.05)
    x = start * 0.95
    times = levels(schedule, 6).t
    says = lambda x, t: oracle(x, schedule(t.expand(16))).to("velocity")  # noqa: E731
    for now, then in zip(times[:-1], times[1:], strict=True):
        first = says(x, now)
        x = x + (then - now) / 2 * (first + says(x + (then - now) * first, then))
    got = HeunSampler(6, coordinate="flow", discretizer=levels)(oracle, schedule, start)
    assert (got - x).abs().max() < 1e-12


def test_heun_in_the_angle_is_exact_for_gaussian_data_of_that_spread():
    from vdiff.denoisers import GaussianDenoiser

    oracle, schedule, start = GaussianDenoiser(0.0, 0.5), FlowSchedule(), noise(16)
    got = HeunSampler(1, coordinate="angle", sigma_data=0.5, discretizer=UniformDiscretizer(1.0, 0.0))
    want = oracle.flow(start, schedule(1.0), schedule(0.0))
    assert (got(oracle, schedule, start) - want).abs().max() < 1e-12


@pytest.mark.parametrize("name, most", [("dpm_2", 6), ("dpmpp_2s", 5), ("heun_flow", 6)])
def test_a_step_is_two_calls_and_a_few_kernels(name, most):
    calls, kernels = calls_and_kernels(SOLVERS[name](num_steps=50), EDMSchedule())
    assert calls == 99 / 50 and kernels <= most


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "ddpm"])
def test_a_walk_is_one_graph_and_another_schedule_is_no_recompile(name):
    assert is_one_graph(STOCHASTIC[name](num_steps=5))


def test_samplers_are_built_by_name():
    for name in ("dpm_2", "dpm_2_a", "dpmpp_2s", "dpmpp_2s_a", "euler_ancestral_flow", "ddpm", "heun"):
        assert build({"type": name, "num_steps": 4}, "sampler").num_steps == 4
    assert isinstance(build({"type": "heun", "coordinate": "angle"}, "sampler"), HeunSampler)


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_a_variance_is_between_the_two_of_the_paper(wrong):
    with pytest.raises(ValueError, match=r"DDPMSampler: v_posterior must lie in \[0, 1\]"):
        DDPMSampler(v_posterior=wrong)


# Peers ---------------------------------------------------------------------------------------------


def wrapped(oracle):
    return lambda x, sigma, **_: oracle(x, EDMSchedule().at_ratio(sigma)).x0


@pytest.mark.parametrize(
    "sampler, function, eta",
    [
        (DPM2Sampler(9), "sample_dpm_2", None),
        (DPMpp2SSampler(9), "sample_dpmpp_2s_ancestral", 0.0),
        (DPM2AncestralSampler(9), "sample_dpm_2_ancestral", 1.0),
        (DPM2AncestralSampler(9, eta=0.4), "sample_dpm_2_ancestral", 0.4),
        (DPMpp2SAncestralSampler(9), "sample_dpmpp_2s_ancestral", 1.0),
        (DPMpp2SAncestralSampler(9, eta=0.4), "sample_dpmpp_2s_ancestral", 0.4),
    ],
)
def test_agrees_with_k_diffusion_on_the_same_levels_and_noise(sampler, function, eta):
    oracle, schedule, start = one_gaussian(), EDMSchedule(), noise(16)
    ratios = sampler.levels(schedule).ratio
    stages = list(sampler.plan(Node.of(sampler.levels(schedule)), schedule))
    draw = sampler.noise_source.bind(SEEDS, start)
    numbers = iter([2 * i + 1 for i, s in enumerate(stages) if "noise" in s.update])
    options = {} if eta is None else {"eta": eta, "noise_sampler": lambda *_: draw(next(numbers)) if eta else 0.0}
    theirs = getattr(peer("k_diffusion.sampling"), function)
    want = theirs(wrapped(oracle), start * ratios[0], ratios, disable=True, **options)
    assert (sampler(oracle, schedule, start, seeds=SEEDS) - want).abs().max() < 1e-10


def test_without_posterior_variance_beyond_the_papers_ddpm_is_ddim_with_eta_one():
    for schedule in SCHEDULES.values():
        levels = TrailingDiscretizer() if schedule is not SCHEDULES["edm"] else KarrasDiscretizer()
        a, b = (
            kind(7, discretizer=levels, **options)(one_gaussian(), schedule, noise(16), seeds=SEEDS)
            for kind, options in ((DDPMSampler, {}), (DDIMSampler, {"eta": 1.0}))
        )
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("v_posterior, variance", [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_variances_of_ddpm_are_those_of_diffusers(monkeypatch, v_posterior, variance):
    """On all rows of a table, down to the last, with the same fresh noise."""
    diffusers = peer("diffusers")
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=20,
        beta_start=0.01,
        beta_end=0.3,
        beta_schedule="scaled_linear",
        variance_type=variance,
        prediction_type="sample",
        clip_sample=False,
    )
    schedule = ScaledLinearSchedule(0.01, 0.3, 20)
    theirs.betas, theirs.alphas_cumprod = 1 - schedule.alphas_cumprod, schedule.alphas_cumprod
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(20)
    sampler, oracle, start = DDPMSampler(20, v_posterior), one_gaussian(), noise(16)
    draw = sampler.noise_source.bind(SEEDS, start)
    numbers = iter(range(1, 99, 2))
    module = peer("diffusers.schedulers.scheduling_ddpm")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draw(next(numbers)))
    x = start * sampler.levels(schedule).sigma[0]
    for t in theirs.timesteps:
        level = schedule(torch.full((16,), (t.item() + 1) / 20, dtype=torch.float64))
        x = theirs.step(oracle(x, level).x0, t, x).prev_sample
    assert (sampler(oracle, schedule, start, seeds=SEEDS) - x).abs().max() < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_ancestral_of_a_flow_is_that_formula_in_the_flows_own_letters(eta):
    """x down to sigma_down = t' (1 + (t' / t - 1) eta), then scaled to the new alpha with noise for the rest."""
    schedule, now, then = FlowSchedule(), 0.8, 0.6
    down = then * (1 + (then / now - 1) * eta)
    scale = (1 - then) / (1 - down)
    sampler = EulerAncestralFlowSampler(1, eta, discretizer=ExplicitDiscretizer(times=[now, then]))
    (stage,) = sampler.plan(Node.of(sampler.levels(schedule)), schedule)
    x, x0 = 1.3, 0.4
    want = scale * (x + (down - now) * (x - x0) / now)
    assert stage.update["x"] * x + stage.update["x0"] * x0 == pytest.approx(want, abs=1e-14)
    fresh = math.sqrt(max(0.0, then**2 - (scale * down) ** 2))
    assert stage.update.get("noise", 0.0) == pytest.approx(fresh, abs=1e-7)


def test_churn_belongs_to_dpm_2_too():
    oracle, start = one_gaussian(), noise(16)
    quiet, loud = (DPM2Sampler(8, churn=c)(oracle, EDMSchedule(), start, seeds=SEEDS) for c in (0.0, 4.0))
    assert (quiet - loud).abs().max() > 1e-2
    assert (
        EulerSampler(1)(oracle, EDMSchedule(), start) - DPM2Sampler(1)(oracle, EDMSchedule(), start)
    ).abs().max() == 0
