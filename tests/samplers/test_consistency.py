"""Few-step samplers: to data, or towards it, and back up."""

import math

import pytest
import torch
from oracles import SCHEDULES, noise, one_gaussian
from peers import peer
from walks import calls_and_kernels, is_one_graph

from vdiff.process import CosineSchedule, EDMSchedule, ExplicitDiscretizer, FlowSchedule, ScaledLinearSchedule
from vdiff.registry import build
from vdiff.samplers import ConsistencySampler, DDIMSampler, LCMSampler, Node, TCDSampler

SEEDS = list(range(64))
ALL = [ConsistencySampler, LCMSampler, TCDSampler]


def only_stage(sampler, schedule):
    (stage,) = sampler.plan(Node.of(sampler.levels(schedule)), schedule)
    return stage


@pytest.mark.parametrize("solver", ALL)
def test_all_frames_give_the_same_samples_with_the_same_fresh_noise(solver):
    """But for ``tcd``, which jumps in time, and time is the schedule's own."""
    levels = ExplicitDiscretizer(ratios=[20.0, 3.0, 0.4, 0.0])
    options = {"gamma": 0.0} if solver is TCDSampler else {}
    sampler = solver(3, discretizer=levels, **options)
    first, *others = (sampler(one_gaussian(), s, noise(), seeds=SEEDS) for s in SCHEDULES.values())
    assert all((other - first).abs().max() < 1e-12 for other in others)


@pytest.mark.parametrize("schedule", [EDMSchedule(), CosineSchedule(), FlowSchedule(), ScaledLinearSchedule()])
@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_level_that_is_reached_is_the_level_that_was_wanted(solver, schedule, num_steps):
    """Of x0 there is alpha and of noise sigma after every step, and the last one is what the network says."""
    sampler = solver(num_steps)
    nodes = Node.of(sampler.levels(schedule))
    for stage, now, then in zip(sampler.plan(nodes, schedule), nodes, nodes[1:], strict=False):
        keep, gain, fresh = (stage.update.get(name, 0.0) for name in ("x", "x0", "noise"))
        assert keep * now.alpha + gain == pytest.approx(then.alpha, abs=1e-12)
        spread = (keep * now.sigma) ** 2 + fresh**2
        data = (then.alpha * 0.002) ** 2 if solver is ConsistencySampler and then.sigma else 0.0
        assert spread == pytest.approx(then.sigma**2 - data, abs=1e-12 * max(1, then.sigma**2))
    steps = list(sampler.steps(one_gaussian(), schedule, noise(), seeds=SEEDS))
    assert len(steps) == num_steps and torch.equal(steps[-1].x, steps[-1].x0)


def test_consistency_sampling_is_algorithm_1():
    """x = f(x, T), then x0 + sqrt(tau^2 - eps^2) z."""
    sampler = ConsistencySampler(1, sigma_min=0.1, discretizer=ExplicitDiscretizer(ratios=[80.0, 0.8]))
    assert only_stage(sampler, EDMSchedule()).update == pytest.approx(
        {"x0": 1.0, "noise": math.sqrt(0.8**2 - 0.1**2)}, abs=1e-12
    )


def test_trajectory_consistency_lies_between_ddim_and_going_to_data():
    levels = ExplicitDiscretizer(times=[1.0, 0.6, 0.3, 0.0])
    run = lambda sampler: sampler(one_gaussian(), CosineSchedule(), noise(), seeds=SEEDS)  # noqa: E731
    assert (run(TCDSampler(3, 0.0, levels)) - run(DDIMSampler(3, discretizer=levels))).abs().max() < 1e-12
    assert (run(TCDSampler(3, 1.0, levels)) - run(LCMSampler(3, levels))).abs().max() < 1e-12


def test_a_step_of_tcd_is_that_of_diffusers(monkeypatch):
    """Between rows that gamma hits exactly: from 999 to 799 by way of row 399."""
    module = peer("diffusers.schedulers.scheduling_tcd")
    schedule = ScaledLinearSchedule()
    theirs = module.TCDScheduler(prediction_type="sample", clip_sample=False)
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.set_timesteps(timesteps=[999, 799, 199])
    fresh = noise(seed=1)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: fresh)
    x, says = noise(), noise(seed=2)
    want = theirs.step(says, 999, x, eta=0.5).prev_sample  # row floor(0.5 * 799) = 399, which is t = 0.4
    sampler = TCDSampler(1, 0.5, ExplicitDiscretizer(times=[1.0, 0.8]))
    update = only_stage(sampler, schedule).update
    assert (update["x"] * x + update["x0"] * says + update["noise"] * fresh - want).abs().max() < 1e-10


def test_a_step_of_lcm_is_that_of_diffusers(monkeypatch):
    """Without its boundary scalings, which belong to the denoiser."""
    module = peer("diffusers.schedulers.scheduling_lcm")
    schedule = ScaledLinearSchedule()
    theirs = module.LCMScheduler(prediction_type="sample", clip_sample=False, timestep_scaling=1e30)
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.set_timesteps(timesteps=[999, 499])
    fresh = noise(seed=1)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: fresh)
    x, says = noise(), noise(seed=2)
    want = theirs.step(says, 999, x).prev_sample
    update = only_stage(LCMSampler(1, ExplicitDiscretizer(times=[1.0, 0.5])), schedule).update
    assert (update["x0"] * says + update["noise"] * fresh - want).abs().max() < 1e-10


@pytest.mark.parametrize("solver", ALL)
def test_a_step_is_one_call_and_a_few_kernels(solver):
    calls, kernels = calls_and_kernels(solver(50), EDMSchedule())
    assert calls == 1 and kernels <= 3
    assert is_one_graph(solver(3))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        TCDSampler(gamma=1.5)
    with pytest.raises(ValueError, match="sigma_min must not be negative"):
        ConsistencySampler(sigma_min=-1.0)
    for name in ("consistency", "lcm", "tcd"):
        assert build({"type": name, "num_steps": 3}, "sampler").num_steps == 3
