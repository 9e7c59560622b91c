"""Truths of every registered solver: its order of convergence, and that schedules are changes of variables to it."""

import functools

import pytest
import torch
from oracles import SCHEDULES, noise, one_gaussian
from orders import PROBLEMS, order

from vdiff.process import EDMSchedule, ExplicitDiscretizer, FlowSchedule
from vdiff.registry import entries
from vdiff.samplers import (
    ABSampler,
    AdaptiveSampler,
    ConsistencySampler,
    DDIMSampler,
    DDPMSampler,
    DEISSampler,
    DPM2AncestralSampler,
    DPM2Sampler,
    DPMAdaptiveSampler,
    DPMFastSampler,
    DPMpp2MSampler,
    DPMpp2MSDESampler,
    DPMpp2SAncestralSampler,
    DPMpp2SSampler,
    DPMpp3MSampler,
    DPMpp3MSDESampler,
    DPMppSDESampler,
    ERSDESampler,
    EulerAncestralFlowSampler,
    EulerAncestralSampler,
    EulerSampler,
    GradientEstimationSampler,
    HeunSampler,
    IPNDMSampler,
    LCMSampler,
    LMSSampler,
    RES2MSampler,
    RES2SSampler,
    RES3MSampler,
    RES3SSampler,
    RestartInterval,
    RestartSampler,
    SASampler,
    SEEDSSampler,
    TCDSampler,
    UniPCSampler,
)

part = functools.partial
unipc = part(UniPCSampler, lower_order_final=False)

# What the probability flow is solved to: the solver, its order, and steps enough to be near the limit.
ORDERS = {
    "euler": (EulerSampler, 1, 32),
    "ddim": (DDIMSampler, 1, 32),
    "euler_ancestral": (part(EulerAncestralSampler, eta=0.0), 1, 32),
    "euler_ancestral_flow": (part(EulerAncestralFlowSampler, eta=0.0), 1, 32),
    "gradient_estimation": (GradientEstimationSampler, 1, 64),
    "heun": (HeunSampler, 2, 64),
    "heun/flow": (part(HeunSampler, coordinate="flow"), 2, 64),
    "heun/angle": (part(HeunSampler, coordinate="angle"), 2, 64),
    "dpm_2": (DPM2Sampler, 2, 64),
    "dpm_2_ancestral": (part(DPM2AncestralSampler, eta=0.0), 2, 64),
    "dpmpp_2s": (DPMpp2SSampler, 2, 64),
    "dpmpp_2s_ancestral": (part(DPMpp2SAncestralSampler, eta=0.0), 2, 64),
    "dpmpp_sde": (part(DPMppSDESampler, eta=0.0), 2, 64),
    "res_2s": (RES2SSampler, 2, 32),
    "res_2s/c_2=0.7": (part(RES2SSampler, c_2=0.7), 2, 32),
    "res_3s": (RES3SSampler, 3, 64),
    "res_3s/dpm_solver_3": (part(RES3SSampler, c_2=1 / 3, c_3=2 / 3), 3, 64),
    "seeds/1": (part(SEEDSSampler, stages=1, eta=0.0), 1, 32),
    "seeds/2": (part(SEEDSSampler, stages=2, eta=0.0), 2, 32),
    "seeds": (part(SEEDSSampler, eta=0.0), 3, 64),
    "dpm_fast": (DPMFastSampler, 3, 64),
    "dpmpp_2m": (DPMpp2MSampler, 2, 48),
    "dpmpp_2m/heun": (part(DPMpp2MSampler, variant="heun"), 2, 48),
    "dpmpp_2m_sde": (part(DPMpp2MSDESampler, eta=0.0), 2, 48),
    "dpmpp_3m": (DPMpp3MSampler, 3, 80),
    "dpmpp_3m/legacy": (part(DPMpp3MSampler, variant="legacy"), 2, 48),
    "dpmpp_3m_sde": (part(DPMpp3MSDESampler, eta=0.0), 3, 80),
    "res_2m": (RES2MSampler, 2, 48),
    "res_3m": (RES3MSampler, 3, 80),
    "lms/2": (part(LMSSampler, order=2), 2, 48),
    "lms/3": (part(LMSSampler, order=3), 3, 80),
    "lms": (LMSSampler, 4, 112),
    "deis/2": (part(DEISSampler, order=2), 2, 48),
    "deis": (DEISSampler, 3, 80),
    "deis/4": (part(DEISSampler, order=4), 4, 192),
    "unipc/1": (part(unipc, order=1), 2, 48),
    "unipc": (unipc, 3, 80),
    "unipc/bh1": (part(unipc, variant="bh1"), 3, 80),
    "unipc/exact": (part(unipc, variant="exact"), 3, 80),
    "unipc/3": (part(unipc, order=3), 4, 112),
    "ipndm/2": (part(IPNDMSampler, order=2), 2, 48),
    "ipndm": (IPNDMSampler, 2, 48),
    "ipndm/4": (part(IPNDMSampler, order=4), 2, 48),
    "ab": (ABSampler, 4, 256),
    "ab/x0": (part(ABSampler, form="x0", coordinate="log_sigma"), 4, 112),
    "ab/trig": (part(ABSampler, form="trig", coordinate="angle", order=3), 3, 80),
    "ab/trig/corrected": (part(ABSampler, form="trig", coordinate="angle", order=2, corrector=3), 3, 80),
    "ab/trig/corrected by 3": (part(ABSampler, form="trig", coordinate="angle", order=3, corrector=3), 3, 80),
    "ab/corrected": (part(ABSampler, order=3, corrector=4), 4, 112),
    "er_sde/1": (part(ERSDESampler, order=1, scaler="ode"), 1, 64),
    "er_sde/2": (part(ERSDESampler, order=2, scaler="ode"), 2, 48),
    "er_sde": (part(ERSDESampler, scaler="ode"), 3, 48),
    "sa/2": (part(SASampler, corrector=0, tau=0.0), 2, 48),
    "sa": (part(SASampler, order=2, corrector=3, tau=0.0), 3, 80),
}
# Solvers whose order is that of their spread (tests/samplers/test_sde.py), of another (restart), that of the tolerance
# (tests/samplers/test_adaptive.py), or none.
WITHOUT = {"ddpm", "consistency", "lcm", "tcd", "restart", "dopri5", "tsit5", "dpm_adaptive"}
# Solvers that other files bring, which own the test of their order.
ELSEWHERE = {"auto", "gaussian_calibrated"}
SINGLE = {"euler", "ddim", "heun", "dpm_", "dpmpp_2s", "dpmpp_sde", "res_2s", "res_3s", "seeds"}

STOCHASTIC = {
    "ddim eta": part(DDIMSampler, eta=0.5),
    "euler_ancestral": EulerAncestralSampler,
    "euler_ancestral_flow": EulerAncestralFlowSampler,
    "ddpm": DDPMSampler,
    "euler churn": part(EulerSampler, churn=2.0),
    "heun churn": part(HeunSampler, churn=2.0),
    "dpm_2_ancestral": DPM2AncestralSampler,
    "dpmpp_2s_ancestral": DPMpp2SAncestralSampler,
    "dpmpp_sde": DPMppSDESampler,
    "dpmpp_2m_sde": DPMpp2MSDESampler,
    "dpmpp_3m_sde": DPMpp3MSDESampler,
    "sa": SASampler,
    "er_sde": ERSDESampler,
    "er_sde as sde": part(ERSDESampler, scaler="sde"),
    "seeds 2": part(SEEDSSampler, stages=2),
    "seeds": SEEDSSampler,
    "dpm_fast eta": part(DPMFastSampler, eta=0.5),
    "consistency": ConsistencySampler,
    "lcm": LCMSampler,
    "tcd": part(TCDSampler, gamma=0.0),  # with any other gamma it jumps in the schedule's own time
}


def names():
    """Registered samplers of the library, without aliases and the tests' own."""
    kinds = {name: entry.target for name, entry in entries("sampler").items()}
    return {name for name, kind in kinds.items() if kind.__module__.startswith("vdiff.")}


def test_every_registered_solver_has_a_declared_order():
    listed = {name.partition("/")[0] for name in ORDERS} | WITHOUT | ELSEWHERE
    assert names() - listed == set(), "list the new solver in ORDERS (or say in WITHOUT why it has none)"


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ORDERS)
def test_the_measured_order_is_the_declared_one(name, problem):
    """On two curved problems; multistep solvers from an accurate history."""
    make, declared, num_steps = ORDERS[name]
    has_history = not name.startswith(tuple(SINGLE))
    measured = order(make, EDMSchedule(), problem, num_steps, has_history)
    assert measured == pytest.approx(declared, abs=0.15)


RATIOS = [20.0, 8.0, 3.0, 1.1, 0.4, 0.1, 0.0]


@pytest.mark.parametrize("name", [*ORDERS, *(f"with noise: {name}" for name in STOCHASTIC)])
def test_all_frames_give_the_same_samples(name):
    """Schedules are changes of variables: on the same ratios, from the same noise, every solver ends the same."""
    make = STOCHASTIC[name[len("with noise: ") :]] if name.startswith("with noise") else ORDERS[name][0]
    sampler = make(num_steps=6, discretizer=ExplicitDiscretizer(ratios=RATIOS))
    first, *others = (sampler(one_gaussian(), s, noise(16), seeds=range(16)) for s in SCHEDULES.values())
    assert torch.isfinite(first).all()
    assert all((other - first).abs().max() < 1e-12 for other in others)


def test_all_frames_give_the_same_samples_with_restarts():
    inner = HeunSampler(6, discretizer=ExplicitDiscretizer(ratios=RATIOS))
    sampler = RestartSampler(inner, [RestartInterval(0.4, 2.0, repeats=2)])
    first, *others = (sampler(one_gaussian(), s, noise(16), seeds=range(16)) for s in SCHEDULES.values())
    assert all((other - first).abs().max() < 1e-12 for other in others)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_all_frames_take_the_same_adaptive_steps(schedule):
    """To the rounding of the levels, which the differences of the embedded pair magnify."""
    levels = ExplicitDiscretizer(ratios=[20.0, 0.1, 0.0])
    for make in (part(DPMAdaptiveSampler, rtol=1e-3), *(entries("sampler")[n].target for n in ("dopri5", "tsit5"))):
        sampler = make(discretizer=levels)
        assert isinstance(sampler, AdaptiveSampler)
        a, b = (sampler(one_gaussian(), s, noise(4)) for s in (SCHEDULES["edm"], SCHEDULES[schedule]))
        assert (a - b).abs().max() < 1e-9


def test_tcd_depends_on_the_schedule_by_its_jumps_in_time():
    """The exception: gamma is a share of the schedule's own time."""
    sampler = TCDSampler(6, 0.5, ExplicitDiscretizer(ratios=RATIOS))
    a, b = (sampler(one_gaussian(), s, noise(16), seeds=range(16)) for s in (SCHEDULES["cosine"], FlowSchedule()))
    assert (a - b).abs().max() > 1e-3


def test_ddpms_larger_variance_is_that_of_the_schedules_own_frame():
    """The other exception: how much noise the forward process adds between two levels is a matter of its scale."""
    sampler = DDPMSampler(6, 1.0, ExplicitDiscretizer(ratios=RATIOS))
    a, b = (sampler(one_gaussian(), s, noise(16), seeds=range(16)) for s in (SCHEDULES["cosine"], FlowSchedule()))
    assert (a - b).abs().max() > 1e-3
