"""Multistep solvers: ends, peers on the same levels, and what peers get wrong."""

import functools

import numpy as np
import pytest
import torch
from oracles import LogRatioDiscretizer, noise, one_gaussian, two_gaussians
from orders import START, STOP, exact
from peers import diffusers_walk, peer
from walks import calls_and_kernels, is_one_graph

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    TrailingDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import (
    ABSampler,
    DDIMSampler,
    DEISSampler,
    DPMpp2MSampler,
    DPMpp3MSampler,
    IPNDMSampler,
    LMSSampler,
    RES2MSampler,
    RES3MSampler,
    UniPCSampler,
)

unipc = functools.partial(UniPCSampler, lower_order_final=False)
trig = functools.partial(ABSampler, form="trig", coordinate="angle")
SOLVERS = {
    "ab": ABSampler,
    "ab_x0_log_4": functools.partial(ABSampler, form="x0", coordinate="log_sigma"),
    "ab_trig_3": functools.partial(trig, order=3),
    "ab_trig_2_corrected": functools.partial(trig, order=2, corrector=3),
    "ab_trig_3_corrected_by_3": functools.partial(trig, order=3, corrector=3),
    "ab_noise_3_corrected": functools.partial(ABSampler, order=3, corrector=4),
    "lms_2": functools.partial(LMSSampler, order=2),
    "lms_3": functools.partial(LMSSampler, order=3),
    "lms_4": LMSSampler,
    "dpmpp_2m_midpoint": DPMpp2MSampler,
    "dpmpp_2m_heun": functools.partial(DPMpp2MSampler, variant="heun"),
    "dpmpp_3m": DPMpp3MSampler,
    "dpmpp_3m_legacy": functools.partial(DPMpp3MSampler, variant="legacy"),
    "deis_2": functools.partial(DEISSampler, order=2),
    "deis_3": DEISSampler,
    "deis_4": functools.partial(DEISSampler, order=4),
    "unipc_1": functools.partial(unipc, order=1),
    "unipc_2_bh1": functools.partial(unipc, variant="bh1"),
    "unipc_2_bh2": unipc,
    "unipc_2_exact": functools.partial(unipc, variant="exact"),
    "unipc_3": functools.partial(unipc, order=3),
    "ipndm_2": functools.partial(IPNDMSampler, order=2),
    "ipndm_3": IPNDMSampler,
    "ipndm_4": functools.partial(IPNDMSampler, order=4),
    "res_2m": RES2MSampler,
    "res_3m": RES3MSampler,
}
every = pytest.mark.parametrize("name", SOLVERS)


def solver(name, **kwargs):
    return SOLVERS[name](**kwargs)


def over(name, ratios, **kwargs):
    return solver(name, num_steps=len(ratios) - 1, discretizer=ExplicitDiscretizer(ratios=ratios), **kwargs)


# Truths of all -------------------------------------------------------------------------------------


@every
def test_repeated_levels_change_nothing(name):
    """A level that was visited twice is in the history once. A corrector asks again about a better state."""
    once = over(name, [5.0, 2.0, 1.0, 0.5, 0.2, 0.0])(two_gaussians(), EDMSchedule(), noise(16, 1))
    twice = over(name, [5.0, 2.0, 2.0, 1.0, 0.5, 0.5, 0.2, 0.0])(two_gaussians(), EDMSchedule(), noise(16, 1))
    assert torch.isfinite(twice).all()
    if "corrected" not in name and "unipc" not in name:
        assert (once - twice).abs().max() < 1e-12


@every
@pytest.mark.parametrize("schedule", [ZeroSNRSchedule(), FlowSchedule(), CosineSchedule()])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_a_start_at_pure_noise_is_finite(name, schedule, num_steps):
    """Where x0 or the noise is interpolated, the first step is the exact answer to "what is the mean"."""
    oracle, start = one_gaussian(), noise(16)
    sampler = solver(name, num_steps=num_steps, discretizer=TrailingDiscretizer())
    levels = sampler.levels(schedule)
    assert levels.alpha[0] == 0
    steps = list(sampler.steps(oracle, schedule, start))
    assert all(torch.isfinite(s.x).all() for s in steps) and len(steps) == num_steps
    if "trig" not in name:
        want = levels.sigma[1] * start + levels.alpha[1] * oracle.mean
        assert (steps[0].x - want).abs().max() < 1e-12


@every
def test_a_walk_from_pure_noise_arrives(name):
    """Finer walks from pure noise end nearer to the exact flow."""
    oracle, schedule, start = one_gaussian(), FlowSchedule(), noise(16)
    want = oracle.flow(start, schedule(1.0), schedule(0.0))
    errors = [
        (solver(name, num_steps=n, discretizer=TrailingDiscretizer())(oracle, schedule, start) - want).abs().max()
        for n in (24, 96)
    ]
    assert errors[1] < errors[0] / 2 and errors[1] < 0.1


@every
@pytest.mark.parametrize("num_steps", [1, 2])
def test_one_step_and_two_are_walks(name, num_steps):
    got = solver(name, num_steps=num_steps)(one_gaussian(), EDMSchedule(), noise(16))
    assert torch.isfinite(got).all()
    if num_steps == 1 and "trig" not in name:
        assert (got - DDIMSampler(1)(one_gaussian(), EDMSchedule(), noise(16))).abs().max() < 1e-12


@every
def test_a_step_is_one_call_and_a_few_kernels(name):
    """One per coefficient: the state, its answer, and what is remembered of both."""
    sampler = solver(name, num_steps=50)
    calls, kernels = calls_and_kernels(sampler, EDMSchedule())
    known = sampler.order + bool(sampler.corrector)
    assert calls == 1 and kernels <= (1 + known if not sampler.form.reads_state else 2 * known)


@pytest.mark.parametrize("name", ["ab", "ab_trig_2_corrected", "unipc_3", "dpmpp_3m"])
def test_a_walk_is_one_graph_and_another_schedule_is_no_recompile(name):
    assert is_one_graph(solver(name, num_steps=6))


# One family ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, twin",
    [
        ("lms_3", {"form": "epsilon", "coordinate": "sigma", "order": 3}, None),
        ("deis_3", {"form": "epsilon", "coordinate": "log_sigma", "order": 3}, None),
        ("dpmpp_2m_heun", {"form": "x0", "coordinate": "log_sigma", "order": 2}, "res_2m"),
        ("dpmpp_3m", {"form": "x0", "coordinate": "log_sigma", "order": 3}, "res_3m"),
        ("unipc_3", {"form": "x0", "coordinate": "log_sigma", "order": 3, "corrector": 4}, None),
    ],
)
def test_names_are_choices_of_form_and_coordinate(name, options, twin):
    levels = KarrasDiscretizer(sigma_min=0.05)
    want = solver(name, num_steps=9, discretizer=levels)(two_gaussians(), EDMSchedule(), noise(16, 1))
    general = ABSampler(9, discretizer=levels, **options)(two_gaussians(), EDMSchedule(), noise(16, 1))
    # UniPC's rules of two nodes, in its first steps, are not exact.
    assert (want - general).abs().max() < (0.05 if name == "unipc_3" else 1e-12)
    if twin:
        assert torch.equal(
            want, solver(twin, num_steps=9, discretizer=levels)(two_gaussians(), EDMSchedule(), noise(16, 1))
        )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ipndm_is_lms_on_levels_even_in_sigma(size):
    ratios = np.linspace(8.0, 0.0, 11).tolist()
    even = {"num_steps": 10, "discretizer": ExplicitDiscretizer(ratios=ratios), "order": size}
    a, b = (kind(**even)(two_gaussians(), EDMSchedule(), noise(16, 1)) for kind in (IPNDMSampler, LMSSampler))
    assert (a - b).abs().max() < 1e-12


def test_a_polynomial_through_the_noise_goes_on_into_data():
    """With noise that is linear in sigma, two nodes are exact down to data, where x0 solvers stop at order one."""
    from vdiff.denoisers import Denoiser
    from vdiff.process import Prediction, X0Parameterization

    class Linear(Denoiser, name="linear_noise_for_this_test"):
        language = X0Parameterization()

        def forward(self, x_t, level, cond=None):
            sigma = level.sigma[:, None]
            return Prediction(self.language, x_t - sigma * (1 + 2 * sigma), x_t, level)

    ratios = [2.0, 1.9999, 1.0, 0.3, 0.0]
    got = over("lms_2", ratios)(Linear(), EDMSchedule(), torch.zeros(1, 1, dtype=torch.float64))
    assert got.item() == pytest.approx(-(2.0 + 2.0**2), abs=2e-8)  # -(sigma + sigma^2), but for the first 1e-4


def test_lower_order_final_ends_as_it_began():
    """The last steps use no more answers than there are steps left."""
    sampler = DEISSampler(6, order=3, lower_order_final=True, discretizer=KarrasDiscretizer(denoise=False))
    from vdiff.samplers import Node

    stages = sampler.plan(Node.of(sampler.levels(EDMSchedule())), EDMSchedule())
    assert [sum(name.startswith("x0") for name in s.update) for s in stages] == [1, 2, 3, 3, 2, 1]


def test_orders_and_correctors_out_of_range_are_refused():
    with pytest.raises(ValueError, match="LMSSampler: order must lie in 1 ... 4, got 5"):
        LMSSampler(order=5)
    with pytest.raises(ValueError, match="UniPCSampler: order must lie in 1 ... 3, got 0"):
        UniPCSampler(order=0)
    with pytest.raises(ValueError, match="a corrector has 2 to 3 nodes.*got 4"):
        ABSampler(order=2, corrector=4)


def test_solvers_are_built_by_name():
    for name in ("ab", "lms", "dpmpp_2m", "dpmpp_3m", "deis", "unipc", "res_2m", "res_3m", "ipndm"):
        assert build({"type": name, "num_steps": 4}, "sampler").num_steps == 4
    built = build({"type": "unipc", "order": 3, "variant": "bh1", "discretizer": {"type": "exponential"}}, "sampler")
    assert (built.order, built.corrector, built.variant) == (3, 4, "bh1")


# k-diffusion ---------------------------------------------------------------------------------------


def by_k_diffusion(function, ratios, start, **options):
    oracle, schedule = two_gaussians(), EDMSchedule()
    model = lambda x, sigma, **_: oracle(x, schedule.at_ratio(sigma)).x0  # noqa: E731
    return getattr(peer("k_diffusion.sampling"), function)(model, start * ratios[0], ratios, disable=True, **options)


@pytest.mark.parametrize(
    "name, function, options",
    [
        ("lms_4", "sample_lms", {}),
        ("lms_3", "sample_lms", {"order": 3}),
        ("lms_2", "sample_lms", {"order": 2}),
        ("dpmpp_2m_midpoint", "sample_dpmpp_2m", {}),
        ("dpmpp_2m_midpoint", "sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "midpoint"}),
        ("dpmpp_2m_heun", "sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
        ("res_2m", "sample_dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
        ("dpmpp_3m_legacy", "sample_dpmpp_3m_sde", {"eta": 0.0}),
    ],
)
@pytest.mark.parametrize("num_steps", [2, 3, 15])
def test_agrees_with_k_diffusion_on_the_same_levels(name, function, options, num_steps):
    sampler, start = solver(name, num_steps=num_steps, discretizer=KarrasDiscretizer()), noise(16, 1)
    if "sde" in function:
        options = {**options, "noise_sampler": lambda *_: 0.0}
    want = by_k_diffusion(function, sampler.levels(EDMSchedule()).ratio, start, **options)
    assert (sampler(two_gaussians(), EDMSchedule(), start) - want).abs().max() < 1e-10


def test_one_step_is_a_walk_where_k_diffusion_fails():
    ratios = EDMSchedule().at_ratio(torch.tensor([80.0, 0.0]).double()).ratio
    for function in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        with pytest.raises(UnboundLocalError):
            by_k_diffusion(function, ratios, noise(16, 1), eta=0.0, noise_sampler=lambda *_: 0.0)
    assert torch.isfinite(DPMpp3MSampler(1)(two_gaussians(), EDMSchedule(), noise(16, 1))).all()


def test_the_third_order_of_k_diffusion_and_diffusers_is_second_order(monkeypatch):
    """Half the weight on the second difference; the exact weight gives the order that the name promises."""

    def slope(walk):
        errors = [walk(LogRatioDiscretizer(START, STOP)(EDMSchedule(), n).ratio) - want for n in (48, 96)]
        return (errors[0].pow(2).mean() / errors[1].pow(2).mean()).log2().item() / 2

    oracle, start, want = two_gaussians(), noise(16, 1), exact("two_gaussians")
    no_noise = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}
    assert slope(lambda r: by_k_diffusion("sample_dpmpp_3m_sde", r, start, **no_noise)) < 2.3
    assert slope(lambda r: by_diffusers(monkeypatch, "dpmsolver_multistep", r, start, solver_order=3)) < 2.3
    assert slope(lambda r: over("dpmpp_3m", r.tolist())(oracle, EDMSchedule(), start)) > 2.7


# diffusers -----------------------------------------------------------------------------------------


def by_diffusers(monkeypatch, scheduler, ratios, start, **options):
    """The end of a walk of diffusers, divided by alpha."""
    oracle, frame = two_gaussians(), CosineSchedule()
    first, last = frame.at_ratio(ratios[0]), frame.at_ratio(ratios[-1])
    says = lambda x, ratio: oracle(x, frame.at_ratio(ratio.expand(len(x)))).x0  # noqa: E731
    return diffusers_walk(monkeypatch, scheduler, ratios, says, start * first.sigma, **options) / last.alpha


LOWERED = {"lower_order_final": True}
DPM = {"algorithm_type": "dpmsolver++", "lower_order_final": False}
DPM_3 = {"algorithm_type": "dpmsolver++", "solver_order": 3, "solver_type": "heun", **LOWERED}


@pytest.mark.parametrize(
    "name, denoise, scheduler, options, ours",
    [
        ("dpmpp_2m_midpoint", True, "dpmsolver_multistep", DPM, {}),
        ("dpmpp_2m_midpoint", False, "dpmsolver_multistep", DPM, {}),
        ("dpmpp_2m_heun", True, "dpmsolver_multistep", {**DPM, "solver_type": "heun"}, {}),
        ("dpmpp_2m_heun", False, "dpmsolver_multistep", {**DPM, "solver_type": "heun"}, {}),
        ("dpmpp_3m_legacy", True, "dpmsolver_multistep", DPM_3, LOWERED),
        ("dpmpp_3m_legacy", False, "dpmsolver_multistep", DPM_3, LOWERED),
        ("unipc_1", True, "unipc_multistep", {"solver_order": 1}, LOWERED),
        ("unipc_1", False, "unipc_multistep", {"solver_order": 1}, LOWERED),
        ("unipc_2_bh2", True, "unipc_multistep", {"solver_order": 2}, LOWERED),
        ("unipc_2_bh2", False, "unipc_multistep", {"solver_order": 2}, LOWERED),
        ("unipc_3", True, "unipc_multistep", {"solver_order": 3}, LOWERED),
        ("unipc_3", False, "unipc_multistep", {"solver_order": 3}, LOWERED),
        ("unipc_2_bh1", False, "unipc_multistep", {"solver_order": 2, "solver_type": "bh1"}, LOWERED),
        ("deis_2", False, "deis_multistep", {"solver_order": 2, "lower_order_final": False}, {}),
        ("deis_3", False, "deis_multistep", {"solver_order": 3, "lower_order_final": False}, {}),
    ],
)
@pytest.mark.parametrize("num_steps", [4, 12])
def test_agrees_with_diffusers_on_the_same_levels(monkeypatch, num_steps, name, denoise, scheduler, options, ours):
    levels = KarrasDiscretizer(sigma_min=0.05, sigma_max=14.0, denoise=denoise)
    if "dpmpp" in name:
        options = {**options, "final_sigmas_type": "zero" if denoise else "sigma_min"}
    sampler, start = solver(name, num_steps=num_steps, discretizer=levels, **ours), noise(16, 1)
    want = by_diffusers(monkeypatch, scheduler, sampler.levels(EDMSchedule()).ratio, start, **options)
    assert (sampler(two_gaussians(), EDMSchedule(), start) - want).abs().max() < 1e-10


def test_bh1_goes_into_data_where_that_of_diffusers_is_not_finite(monkeypatch):
    levels = KarrasDiscretizer(sigma_min=0.05, sigma_max=14.0)
    ratios = levels(EDMSchedule(), 6).ratio
    theirs = by_diffusers(monkeypatch, "unipc_multistep", ratios, noise(16, 1), solver_order=2, solver_type="bh1")
    ours = solver("unipc_2_bh1", num_steps=6, discretizer=levels)(two_gaussians(), EDMSchedule(), noise(16, 1))
    assert not torch.isfinite(theirs).all() and torch.isfinite(ours).all()


def test_deis_spends_its_last_call_where_that_of_diffusers_moves_nothing():
    """Its Karras levels end [..., s, s]: the last call changes nothing. Ours ends in data."""
    theirs = peer("diffusers").DEISMultistepScheduler(use_karras_sigmas=True)
    theirs.set_timesteps(8)
    assert theirs.sigmas[-1] == theirs.sigmas[-2] > 0
    steps = list(DEISSampler(8, discretizer=KarrasDiscretizer()).steps(one_gaussian(), EDMSchedule(), noise(16)))
    assert (steps[-1].x - steps[-2].x).abs().max() > 1e-6


def test_levels_between_the_rows_are_told_as_they_are_where_diffusers_rounds_them():
    """Its Karras levels go to the network as whole timesteps: some twice, some 0.15 off in the logarithm of sigma."""
    from vdiff.process import ScaledLinearSchedule

    theirs = peer("diffusers").DPMSolverMultistepScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
    theirs.set_timesteps(80)
    assert len(set(theirs.timesteps.tolist())) < 80
    table = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    assert (table[theirs.timesteps].log() - theirs.sigmas[:-1].log()).abs().max() > 0.15
    schedule = ScaledLinearSchedule()
    levels = KarrasDiscretizer()(schedule, 80)
    assert len(set(levels.t.tolist())) == 81
    told = schedule(levels.t[:-1]).ratio  # what the network is told, by its time
    assert (told.log() - levels.ratio[:-1].log()).abs().max() < 1e-12
