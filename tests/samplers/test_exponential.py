"""Exponential Runge-Kutta, its stochastic kin, the extended SDE and restarts: identities, ends, spread and peers."""

import functools
import math

import pytest
import torch
from oracles import noise, one_gaussian, two_gaussians
from peers import peer
from spreads import spread_error
from walks import calls_and_kernels, is_one_graph

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    ExponentialDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import (
    DDIMSampler,
    DPMFastSampler,
    DPMpp2MSampler,
    DPMppSDESampler,
    ERSDESampler,
    EulerAncestralSampler,
    EulerSampler,
    GradientEstimationSampler,
    IPNDMSampler,
    LCMSampler,
    Node,
    RES2SSampler,
    RES3SSampler,
    RestartInterval,
    RestartSampler,
    SEEDSSampler,
)
from vdiff.samplers.er_sde import ExtendedForm
from vdiff.samplers.quadrature import X0Form

part = functools.partial
SOLVERS = {
    "res_2s": RES2SSampler,
    "res_3s": RES3SSampler,
    "seeds_1": part(SEEDSSampler, stages=1),
    "seeds_2": part(SEEDSSampler, stages=2),
    "seeds_3": SEEDSSampler,
    "er_sde_1": part(ERSDESampler, order=1),
    "er_sde_2": part(ERSDESampler, order=2),
    "er_sde_3": ERSDESampler,
    "gradient_estimation": GradientEstimationSampler,
}
SEEDS = list(range(16))


def same(a, b, oracle=None, schedule=None, dim=1):
    x, y = (s(oracle or two_gaussians(), schedule or EDMSchedule(), noise(16, dim), seeds=SEEDS) for s in (a, b))
    return (x - y).abs().max() < 1e-12


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FlowSchedule(), CosineSchedule(), EDMSchedule()])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_every_start_and_every_end_is_finite(name, schedule, num_steps):
    steps = list(SOLVERS[name](num_steps=num_steps).steps(one_gaussian(), schedule, noise(16), seeds=SEEDS))
    assert len(steps) == num_steps and all(torch.isfinite(s.x).all() for s in steps)
    if name != "gradient_estimation":
        assert (steps[-1].x - steps[-1].x0).abs().max() < 1e-12


@pytest.mark.parametrize("name", [*SOLVERS, "dpm_fast"])
def test_repeated_levels_are_walked_over(name):
    make = {**SOLVERS, "dpm_fast": DPMFastSampler}[name]
    levels = ExplicitDiscretizer(ratios=[5.0, 1.0, 1.0, 0.2, 0.0])
    got = make(num_steps=4, discretizer=levels)(one_gaussian(), EDMSchedule(), noise(16), seeds=SEEDS)
    assert torch.isfinite(got).all()


def test_seeds_of_one_stage_is_euler_ancestral_and_of_two_is_dpmpp_sde():
    """Where the fresh noise is that of the reverse SDE, with one draw a step and with two of one path."""
    assert same(SEEDSSampler(8, stages=1), EulerAncestralSampler(8))
    ours, theirs = (
        s(two_gaussians(), EDMSchedule(), noise(16, 1), seeds=SEEDS)
        for s in (SEEDSSampler(8, stages=2), DPMppSDESampler(8))
    )
    assert (ours - theirs).abs().max() < 1e-10


def test_res_3s_at_thirds_is_seeds_without_noise():
    assert same(RES3SSampler(6, 1 / 3, 2 / 3), SEEDSSampler(6, eta=0.0))


def test_a_row_of_weights_is_exact_for_x0_that_does_not_change():
    """So every stage sums to the step of first order."""
    sampler = RES3SSampler(1, discretizer=ExplicitDiscretizer(ratios=[3.0, 0.5]))
    from vdiff.denoisers import GaussianDenoiser

    got = sampler(GaussianDenoiser(0.4, 1e-12), FlowSchedule(), noise(16))
    want = DDIMSampler(1, discretizer=ExplicitDiscretizer(ratios=[3.0, 0.5]))
    assert (got - want(GaussianDenoiser(0.4, 1e-12), FlowSchedule(), noise(16))).abs().max() < 1e-12


@pytest.mark.parametrize(
    "name, most",
    [("seeds_2", 0.10), ("seeds_3", 0.01), ("er_sde_1", 1.5), ("er_sde_2", 0.025), ("er_sde_3", 0.001)],
)
def test_the_spread_of_the_samples_is_right(name, most):
    """At 200 steps, in percent; the best of all is er_sde, which adds the least noise where it does harm."""
    assert abs(spread_error(SOLVERS[name], 200)) <= most


@pytest.mark.parametrize("name, declared", [("seeds_1", 1), ("seeds_2", 2), ("er_sde_1", 1), ("er_sde_2", 2)])
def test_the_spread_is_right_to_the_declared_order(name, declared):
    coarse, fine = (spread_error(SOLVERS[name], n) for n in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(declared, abs=0.15)


@pytest.mark.parametrize("name, calls, most", [("res_2s", 1.98, 6), ("res_3s", 2.96, 10), ("er_sde_3", 1, 5)])
def test_a_step_is_a_few_kernels(name, calls, most):
    assert calls_and_kernels(SOLVERS[name](num_steps=50), EDMSchedule()) <= (calls, most)


@pytest.mark.parametrize("name", ["res_3s", "seeds_3", "er_sde_3"])
def test_a_walk_is_one_graph_and_another_schedule_is_no_recompile(name):
    assert is_one_graph(SOLVERS[name](num_steps=4))


# The extended SDE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler, eta", [("ode", 0.0), ("sde", 1.0)])
def test_the_extended_sde_holds_the_flow_and_the_reverse_sde(scaler, eta):
    nodes = Node.of(CosineSchedule().at_ratio(torch.tensor([3.0, 0.7]).double()))
    ours, want = ExtendedForm(scaler), X0Form(eta)
    for name in ("keep", "total", "fresh"):
        assert getattr(ours, name)(*nodes) == pytest.approx(getattr(want, name)(*nodes), abs=1e-14)
    moment = [form.integral(lambda r: r[None] ** 2, *nodes)[0] for form in (ours, want)]
    assert moment[0] == pytest.approx(moment[1], rel=1e-13)


def test_the_measure_of_the_extended_sde_sums_to_its_total():
    nodes = Node.of(FlowSchedule().at_ratio(torch.tensor([9.0, 0.3]).double()))
    form = ExtendedForm()
    assert form.integral(lambda r: r[None] ** 0, *nodes)[0] == pytest.approx(form.total(*nodes), rel=1e-13)


def test_a_step_of_er_sde_is_that_of_the_paper():
    """With phi = s (e^(s^0.3) + 10), in sigma: x phi'/phi + (1 - phi'/phi) x0, variance t^2 - s^2 (phi'/phi)^2."""
    s, t = 2.0, 0.6
    phi = lambda r: r * (math.exp(r**0.3) + 10)  # noqa: E731
    sampler = ERSDESampler(1, order=1, discretizer=ExplicitDiscretizer(ratios=[s, t]))
    (stage,) = sampler.plan(Node.of(sampler.levels(EDMSchedule())), EDMSchedule())
    share = phi(t) / phi(s)
    assert stage.update == pytest.approx({"x": share, "x0": 1 - share, "noise": math.sqrt(t**2 - (s * share) ** 2)})


# dpm_fast ------------------------------------------------------------------------------------------


@pytest.fixture
def in_float64():
    """k-diffusion makes its levels in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_calls", [5, 6, 7, 12, 20])
def test_dpm_fast_agrees_with_k_diffusion_call_by_call(num_calls, in_float64):
    oracle, schedule, start, calls = two_gaussians(), EDMSchedule(), noise(16, 1), []

    def model(x, sigma, **_):
        calls.append(sigma)
        return oracle(x, schedule.at_ratio(sigma)).x0

    want = peer("k_diffusion.sampling").sample_dpm_fast(model, start * 80.0, 0.002, 80.0, num_calls, disable=True)
    levels = ExponentialDiscretizer(sigma_min=0.002, sigma_max=80.0, denoise=False)
    sampler = DPMFastSampler(num_calls, discretizer=levels)
    assert (sampler(oracle, schedule, start) - want).abs().max() < 1e-10
    assert len(calls) == num_calls == len(list(sampler.plan(Node.of(sampler.levels(schedule)), schedule)))


def test_dpm_fast_goes_into_data_within_its_budget():
    for num_calls in range(3, 20):
        sampler = DPMFastSampler(num_calls)
        stages = list(sampler.plan(Node.of(sampler.levels(EDMSchedule())), EDMSchedule()))
        assert num_calls - 1 <= len(stages) <= num_calls and Node.of(sampler.levels(EDMSchedule()))[-1].sigma == 0


def test_dpm_fast_with_fresh_noise_agrees_with_k_diffusion(in_float64):
    """Up to its last step, in which theirs adds none: there it steps to the end itself."""
    oracle, schedule, start, states = two_gaussians(), EDMSchedule(), noise(16, 1), []
    sampler = DPMFastSampler(10, 0.6, ExponentialDiscretizer(sigma_min=0.002, sigma_max=80.0, denoise=False))
    stages = list(sampler.plan(Node.of(sampler.levels(schedule)), schedule))
    draw = sampler.noise_source.bind(SEEDS, start)
    numbers = iter([2 * i + 1 for i, stage in enumerate(stages) if "noise" in stage.update])
    model = lambda x, sigma, **_: oracle(x, schedule.at_ratio(sigma)).x0  # noqa: E731
    options = {"eta": 0.6, "noise_sampler": lambda *_: draw(next(numbers)), "disable": True}
    theirs = peer("k_diffusion.sampling").sample_dpm_fast
    theirs(model, start * 80.0, 0.002, 80.0, 10, callback=lambda info: states.append(info["x"]), **options)
    ours = [step.x for step in sampler.steps(oracle, schedule, start, seeds=SEEDS)]
    assert len(states) == len(ours) == 4
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(ours[:-1], states[1:], strict=True))


# gradient estimation, trigflow ---------------------------------------------------------------------


def test_gradient_estimation_lies_on_the_line_from_ddim_over_ipndm():
    assert same(GradientEstimationSampler(7, gamma=1.0), DDIMSampler(7))
    assert same(GradientEstimationSampler(7, gamma=1.5), IPNDMSampler(7, order=2))


def test_trigflow_is_the_sampler_of_scm_in_the_angle():
    """x0 = cos x - sin s F, then cos' x0 + sin' s z, whatever the network's F."""
    std, angles = 0.5, [1.4, 0.9]
    levels = ExplicitDiscretizer(ratios=[std * math.tan(a) for a in angles])
    sampler = build({"type": "trigflow", "num_steps": 1}, "sampler")
    sampler = type(sampler)(1, discretizer=levels)
    assert isinstance(sampler, LCMSampler)
    (stage,) = sampler.plan(Node.of(sampler.levels(EDMSchedule())), EDMSchedule())
    x, said, fresh = 0.7, -0.3, 1.1  # the angle's own frame: x = cos x0 + sin std z
    x0 = math.cos(angles[0]) * x - math.sin(angles[0]) * std * said
    want = math.cos(angles[1]) * x0 + math.sin(angles[1]) * std * fresh
    got = stage.update["x0"] * x0 + stage.update["noise"] * fresh
    assert got * math.cos(angles[1]) == pytest.approx(want, abs=1e-14)


# Restart -------------------------------------------------------------------------------------------


def restarted(sampler, *intervals):
    return RestartSampler(sampler, [RestartInterval(*interval) for interval in intervals])


def test_a_walk_without_restarts_is_the_samplers_own():
    assert same(restarted(DPMpp2MSampler(7)), DPMpp2MSampler(7))


def test_a_restart_goes_back_up_to_its_level_and_down_again():
    """The noise of 2.0 in every state that is asked there, and the walk ends where it would have."""
    inner = EulerSampler(4, discretizer=ExplicitDiscretizer(ratios=[9.0, 3.0, 0.5, 0.1, 0.0]))
    sampler = restarted(inner, (0.5, 2.0, 2, 3))
    schedule = FlowSchedule()
    levels = Node.of(sampler.levels(schedule))
    stages = list(sampler.plan(levels, schedule))
    assert len(stages) == len(levels) - 1 == 4 + 2 * 3
    asked = [stage.node.ratio for stage in stages]
    down = KarrasDiscretizer(sigma_min=0.5, sigma_max=2.0, denoise=False)(schedule, 3).ratio.tolist()[:-1]
    assert asked == pytest.approx([9.0, 3.0, *down, *down, 0.5, 0.1], rel=1e-12)
    low, high = levels[2], stages[2].node
    assert stages[2].ask["x"] * low.alpha == pytest.approx(high.alpha)
    assert (stages[2].ask["x"] * low.sigma) ** 2 + stages[2].ask["noise"] ** 2 == pytest.approx(high.sigma**2)


def test_restarts_bring_the_spread_of_few_steps_nearer_to_the_truth():
    """What they are for: of what an Euler walk of 10 steps lacks, more than a third comes back."""
    plain = spread_error(EulerSampler, 10)
    with_them = spread_error(lambda **options: restarted(EulerSampler(**options), (0.3, 1.0, 4, 6)), 10)
    assert plain < -10 and abs(with_them) < abs(plain) * 2 / 3


def test_restarts_go_with_solvers_of_all_kinds():
    for name in ("dpmpp_2m", "ab", "dpmpp_sde", "res_3s", "heun", "unipc"):
        sampler = build(
            {"type": "restart", "sampler": {"type": name, "num_steps": 8}, "intervals": [{"low": 0.1, "high": 0.8}]},
            "sampler",
        )
        assert torch.isfinite(sampler(two_gaussians(), EDMSchedule(), noise(16, 1), seeds=SEEDS)).all()


def test_restarts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="0 < low < high"):
        RestartInterval(2.0, 1.0)
    with pytest.raises(ValueError, match="do not overlap"):
        restarted(EulerSampler(9), (0.1, 1.0), (0.5, 2.0))
    with pytest.raises(ValueError, match="no level of this walk is near"):
        restarted(EulerSampler(2), (0.5, 1.0))(two_gaussians(), EDMSchedule(), noise(16, 1), seeds=SEEDS)


def test_nodes_and_stages_out_of_range_are_refused():
    for make, message in (
        (lambda: RES2SSampler(c_2=0.0), "c_2 must lie in"),
        (lambda: RES3SSampler(c_2=2 / 3), "c_2 is not 2/3"),
        (lambda: SEEDSSampler(stages=4), "stages must be 1, 2 or 3, got 4"),
        (lambda: ERSDESampler(order=4), "order must lie in 1 ... 3, got 4"),
        (lambda: DPMFastSampler(eta=-1.0), "eta must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
