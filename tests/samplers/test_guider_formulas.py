"""Guiders against the formulas of their papers, against numbers of released models, and against diffusers."""

import math

import pytest
import torch
from guided_walks import Told, conditions, guided, said, start, walk
from peers import peer

from vdiff.process import (
    Conditioning,
    EDMSchedule,
    FlowSchedule,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    VelocityParameterization,
    VParameterization,
    ZeroSNRSchedule,
)
from vdiff.samplers import (
    APGGuider,
    AutoguidanceGuider,
    CFGGuider,
    CFGPPGuider,
    CFGZeroStarGuider,
    DDIMSampler,
    DPMpp2MSampler,
    DynamicCFGGuider,
    DynamicThresholdGuider,
    EulerSampler,
    LinearGuider,
    MultiCFGGuider,
    Node,
    RescaleGuider,
    SpatiotemporalGuider,
    TrapezoidGuider,
    TriangleGuider,
    UniPCSampler,
    X0ScaleGuider,
)


def close(a, b, within=1e-12):
    return (a - b).abs().max() < within


def dot(a, b):
    return (a * b).flatten(1).sum(1)[:, None, None, None, None]


def ask(x, ratio, cond, schedule=None, denoiser=None):
    level = (schedule or EDMSchedule()).at_ratio(torch.full((len(x),), ratio, dtype=torch.float64))
    return (denoiser or Told())(x, level, cond)


# Formulas -----------------------------------------------------------------------------------------


def test_instruct_pix2pix_adds_the_text_to_the_image():
    cond = conditions()
    image = Conditioning({"image": cond["image"], "vector": cond.null["vector"]})
    got, both, null = said(MultiCFGGuider({"image": 1.5, "vector": 7.5}))
    one = ask(start(), 2.0, image).x0
    assert close(got.x0, null.x0 + 1.5 * (one - null.x0) + 7.5 * (both.x0 - one))


def test_composed_conditions_are_added_each_by_itself():
    cond = conditions()
    alone = [
        Conditioning({n: (cond if n == name else cond.null)[n] for n in ("vector", "image")})
        for name in ("image", "vector")
    ]
    got, _, null = said(MultiCFGGuider({"image": 1.5, "vector": 7.5}, how="apart"))
    image, text = (ask(start(), 2.0, c).x0 for c in alone)
    assert close(got.x0, null.x0 + 1.5 * (image - null.x0) + 7.5 * (text - null.x0))


def test_conditions_that_are_not_named_are_in_every_branch():
    cond = conditions()
    got, plain, _ = said(MultiCFGGuider({"vector": 3.0}))
    without = ask(start(), 2.0, Conditioning({"vector": cond.null["vector"], "image": cond["image"]})).x0
    assert close(got.x0, without + 3.0 * (plain.x0 - without))


def test_scales_of_conditions_may_differ_by_sample():
    whole = walk(MultiCFGGuider({"image": [1.0, 2.0, 1.5, 0.0], "vector": 3.0}))
    for i, scale in enumerate([1.0, 2.0, 1.5, 0.0]):
        assert close(walk(MultiCFGGuider({"image": scale, "vector": 3.0}))[i], whole[i], 1e-11)


def test_autoguidance_is_the_line_from_the_weak_model():
    weak = Told("epsilon", std=0.4)
    got, plain, null = said(AutoguidanceGuider(weak, 2.5))
    worse = ask(start(), 2.0, conditions(), denoiser=weak).x0
    assert close(got.x0, worse + 2.5 * (plain.x0 - worse))
    both, *_ = said(AutoguidanceGuider(weak, 2.5, CFGGuider(3.0)))
    assert close(both.x0, null.x0 + 3.0 * (plain.x0 - null.x0) + 1.5 * (plain.x0 - worse))


def test_a_dynamic_threshold_is_that_of_imagen():
    got, plain, null = said(DynamicThresholdGuider(0.9, guider=CFGGuider(8.0)), x=start() * 3)
    x0 = null.x0 + 8.0 * (plain.x0 - null.x0)
    s = torch.quantile(x0.abs().flatten(1), 0.9, dim=1).clamp(min=1)[:, None, None, None, None]
    assert s.max() > 1.2 and close(got.x0, x0.clamp(-s, s) / s)


def test_apg_projects_remembers_and_shortens():
    guider = APGGuider(3.0, eta=0.3, momentum=-0.5, norm_threshold=1.0)
    run, memory, before = guided(guider, [2.0, 1.0]), {}, 0.0
    for call, ratio in enumerate([2.0, 1.0]):
        c, u = (ask(start(), ratio, cond).x0 for cond in (conditions(), conditions().null))
        before = g = c - u - 0.5 * before
        g = g * (1.0 / dot(g, g).sqrt()).clamp(max=1.0)
        along = dot(g, c) / dot(c, c) * c
        assert close(run(start(), call, memory).x0, c + 2.0 * (g - along + 0.3 * along))


@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule()], ids=lambda s: type(s).__name__)
def test_cfg_zero_star_fits_the_null_to_the_velocity(schedule):
    run = guided(CFGZeroStarGuider(3.0, num_zero=0), [2.0], Told("v"), schedule=schedule)
    c, u = (ask(start(), 2.0, cond, schedule).to("velocity") for cond in (conditions(), conditions().null))
    u = dot(c, u) / dot(u, u) * u
    assert close(run(start(), 0).to("velocity"), u + 3.0 * (c - u), 1e-7)  # the 1e-8 in the denominator


# CFG++ --------------------------------------------------------------------------------------------


def test_cfg_pp_is_the_published_euler_step():
    """x' = D + sigma' (x - u) / sigma with D = u + lambda (c - u)."""
    sampler = EulerSampler(6)
    x = sampler.start(EDMSchedule(), start())
    sigmas = sampler.levels(EDMSchedule()).sigma
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        c, u = (ask(x, now.item(), cond).x0 for cond in (conditions(), conditions().null))
        x = u + 0.6 * (c - u) + then * (x - u) / now
    assert close(walk(CFGPPGuider(0.6), sampler=sampler), x)


@pytest.mark.parametrize("language", ["v", "x0"])
def test_cfg_pp_is_the_published_ddim_step_from_pure_noise_too(language):
    """x' = alpha' D + sigma' eps(u), the paper's algorithm 2."""
    schedule = ZeroSNRSchedule()
    sampler = DDIMSampler(6, discretizer=TrailingDiscretizer())
    levels = sampler.levels(schedule)
    x = sampler.start(schedule, start())
    for i in range(6):
        now, then = levels[i : i + 1], levels[i + 1]
        c, u = (Told()(x, now[[0] * 4], cond).x0 for cond in (conditions(), conditions().null))
        x = then.alpha * (u + 0.6 * (c - u)) + then.sigma * (x - now.alpha * u) / now.sigma
    assert close(walk(CFGPPGuider(0.6), Told(language), sampler, schedule), x, 1e-11)


@pytest.mark.parametrize("solver", [DDIMSampler, DPMpp2MSampler, UniPCSampler])
def test_every_solver_reads_the_noise_of_the_null(solver):
    """The first step of all of these is of first order, so it is the published one."""
    sampler = solver(6)
    x = sampler.start(EDMSchedule(), start())
    now, then = sampler.levels(EDMSchedule()).sigma[:2]
    c, u = (ask(x, now.item(), cond).x0 for cond in (conditions(), conditions().null))
    want = u + 0.6 * (c - u) + then * (x - u) / now
    step = next(sampler.steps(Told(), EDMSchedule(), start(), conditions(), guider=CFGPPGuider(0.6)))
    assert close(step.x, want) and close(step.x0, u + 0.6 * (c - u))


# Scales of released models -------------------------------------------------------------------------


def test_frames_get_the_scales_of_the_released_guiders():
    line = torch.linspace(1.0, 2.5, 14, dtype=torch.float64)
    assert LinearGuider(2.5).scales(14) == pytest.approx(line.tolist())
    assert TriangleGuider(2.5).scales(5) == pytest.approx([1.0, 1.75, 2.5, 1.75, 1.0])
    two = TriangleGuider(2.0, period=[1.0, 0.5], fusing="mean")
    assert two.profile(9) == pytest.approx([0, 0.375, 0.75, 0.625, 0.5, 0.625, 0.75, 0.375, 0])
    assert TriangleGuider(2.0, period=1).scales(3) == [1.0, 2.0, 1.0]  # a whole number stops the released class
    assert SpatiotemporalGuider(2.0, 1.0, num_views=3).scales(6) == pytest.approx([1, 1.5, 1, 1.5, 2, 1.5])
    assert LinearGuider(2.5).scales(1) == [1.0]


def test_the_plateau_of_the_trapezoid_is_the_largest_scale():
    """The released class says 1 there: [1, 3, 1, 1, 1, 1, 3, 1] for eight frames."""
    assert TrapezoidGuider(3.0, edge=0.25).scales(8) == [1, 3, 3, 3, 3, 3, 3, 1]


def test_dynamic_cfg_rises_to_the_end_of_the_walk():
    nodes = Node.of(TrailingDiscretizer()(ZeroSNRSchedule(shift=3.0), 50))[:-1]
    scales = DynamicCFGGuider(6.0).scales(nodes)
    assert scales == sorted(scales) and scales[0] == 1.0
    assert [scales[k] for k in (30, 40)] == pytest.approx([1.09, 2.45], abs=5e-3)  # 7 would be at k = 50


def test_legacy_dynamic_cfg_is_what_released_pipelines_do():
    """The first ten scales of the released code at 50 steps, run there: pseudo-random."""
    nodes = Node.of(TrailingDiscretizer()(ZeroSNRSchedule(shift=3.0), 50))[:-1]
    scales = DynamicCFGGuider(6.0, legacy_cogvideox=True).scales(nodes)
    assert scales[:10] == pytest.approx([2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04, 4.17, 1.62, 6.98], abs=6e-3)
    by_hand = [1 + 6.0 * (1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2 for t in range(999, 0, -20)]
    assert scales == by_hand


def test_a_scaled_x0_is_videocrafters_step():
    """x' = a' (s' / s) x0 + sigma' eps, with s of the table from 1 to 0.7 in 400 rows."""
    table = torch.cat([torch.linspace(1, 0.7, 400, dtype=torch.float64), torch.full((600,), 0.7, dtype=torch.float64)])
    schedule = ScaledLinearSchedule()
    sampler = DDIMSampler(8, discretizer=TrailingDiscretizer())
    levels = sampler.levels(schedule)
    x = sampler.start(schedule, start())
    for i in range(8):
        now, then = levels[i : i + 1], levels[i + 1]
        rows = [round(level.t.item() * 1000) - 1 for level in (now, then)]
        x0 = Told()(x, now[[0] * 4], conditions()).x0
        eps = (x - now.alpha * x0) / now.sigma
        share = (table[rows[1]] if rows[1] >= 0 else 1.0) / table[rows[0]]
        x = then.alpha * share * x0 + then.sigma * eps
    assert close(walk(X0ScaleGuider(), Told("v"), sampler, schedule), x, 1e-11)
    s = X0ScaleGuider().s
    assert [s(1 / 1000), s(400 / 1000), s(1.0)] == pytest.approx([1.0, 0.7, 0.7])


# diffusers ----------------------------------------------------------------------------------------


def theirs(kind, c, u, *calls, **options):
    """What a guider of diffusers makes of two predictions, at the last of several calls."""
    guider = getattr(peer("diffusers.guiders"), kind)(**options)
    for step, (cond, null) in enumerate([*calls, (c, u)]):
        guider.set_state(step, 10, torch.tensor(0))
        guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
        out = guider.forward(cond, null)
    return out.pred


def pair(ratio=2.0, schedule=None, language="v"):
    """Conditional and unconditional predictions as a network says them."""
    return [ask(start(), ratio, c, schedule, Told(language)).value for c in (conditions(), conditions().null)]


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_guidance_and_rescale_are_those_of_diffusers(phi):
    """They rescale what the network says, which is a language here."""
    want = theirs("ClassifierFreeGuidance", *pair(), guidance_scale=4.0, guidance_rescale=phi)
    guider = RescaleGuider(phi, CFGGuider(4.0), language=VParameterization())
    got = guided(guider, [2.0], Told("v"))(start(), 0)
    assert close(got.to("v"), want)


def test_apg_is_that_of_diffusers_in_the_papers_form():
    """``use_original_formulation`` with w - 1; their default adds w times the projected g to the null."""
    options = dict(eta=0.3, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=1.0)
    calls = [pair(r, language="x0") for r in (2.0, 1.0)]
    want = theirs(
        "AdaptiveProjectedGuidance", *calls[1], calls[0], guidance_scale=2.0, use_original_formulation=True, **options
    )
    run = guided(APGGuider(3.0, 0.3, -0.5, 1.0), [2.0, 1.0])
    memory = {}
    run(start(), 0, memory)
    assert close(run(start(), 1, memory).x0, want)


def test_cfg_zero_star_is_that_of_diffusers_where_the_network_says_velocity():
    """They act on what the network says, so on other networks they do something else."""
    schedule = FlowSchedule()
    c, u = pair(2.0, schedule, "velocity")
    want = theirs("ClassifierFreeZeroStarGuidance", c, u, guidance_scale=3.0, zero_init_steps=0)
    for language in ("velocity", "x0"):
        got = guided(CFGZeroStarGuider(3.0, 0), [2.0], Told(language), schedule=schedule)(start(), 0)
        assert close(got.to(VelocityParameterization()), want, 1e-6)  # their inner products are in float32
    zero = theirs("ClassifierFreeZeroStarGuidance", c, u, guidance_scale=3.0, zero_init_steps=1)
    got = guided(CFGZeroStarGuider(3.0, 1), [2.0], Told("velocity"), schedule=schedule)(start(), 0)
    assert not zero.any() and not got.value.any()


def test_autoguidance_is_that_of_diffusers():
    weak = Told(std=0.4)
    c, worse = (ask(start(), 2.0, conditions(), denoiser=d).value for d in (Told(), weak))
    made = dict(auto_guidance_layers=[0], dropout=0.1)  # how they make their weak model, by dropout in these layers
    want = theirs("AutoGuidance", c, worse, guidance_scale=2.5, **made)
    assert close(said(AutoguidanceGuider(weak, 2.5))[0].x0, want)
