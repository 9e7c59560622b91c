"""The sampler that picks solver and levels: what it picks, that it changes smoothly, and that it beats its peers."""

import pytest
import torch
from oracles import noise, one_gaussian, two_gaussians
from peers import peer

from vdiff.denoisers import GaussianDenoiser
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    ExponentialDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    NoiseLevel,
    ScaledLinearSchedule,
    TrailingDiscretizer,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import ABSampler, AutoSampler, DEISSampler, GaussianCalibratedSampler, IPNDMSampler
from vdiff.samplers.auto import choose
from vdiff.samplers.auto_table import TABLE

EDM = EDMSchedule()


def test_at_a_budget_of_the_table_it_picks_that_row():
    for num_calls, row in TABLE.items():
        choice = choose(num_calls)
        assert (choice.solver, choice.options, choice.bend) == (row["solver"], row["options"], row["bend"])
        assert choice.sigma_min == pytest.approx(row["sigma_min"])
        kind = ABSampler if row["solver"] == "ab" else GaussianCalibratedSampler
        assert type(AutoSampler(num_calls).chosen()) is kind


def test_beyond_the_table_it_picks_its_ends():
    assert choose(1) == choose(min(TABLE)) and choose(500) == choose(max(TABLE))


def test_between_two_budgets_the_levels_lie_between_theirs_and_the_solver_is_the_nearest():
    for low, high in zip(sorted(TABLE)[:-1], sorted(TABLE)[1:], strict=True):
        for num_calls in range(low + 1, high):
            choice = choose(num_calls)
            for name in ("bend", "sigma_min"):
                ends = sorted((TABLE[low][name], TABLE[high][name]))
                assert ends[0] * (1 - 1e-12) <= getattr(choice, name) <= ends[1] * (1 + 1e-12)
            near = low if num_calls**2 < low * high else high  # the nearest by the ratio of calls
            assert (choice.solver, choice.options) == (TABLE[near]["solver"], TABLE[near]["options"])


@pytest.mark.parametrize("num_calls", [1, 2, 4, 5, 10, 13, 33])
@pytest.mark.parametrize(
    "schedule", [EDM, FlowSchedule(), FlowSchedule(3.0), CosineSchedule(), ZeroSNRSchedule(), ScaledLinearSchedule()]
)
def test_it_asks_once_a_step_from_the_schedules_own_first_level_to_data(schedule, num_calls):
    sampler = AutoSampler(num_calls)
    levels = sampler.levels(schedule)
    assert len(levels.t) == num_calls + 1
    assert levels.ratio[0] == schedule(1.0).ratio and levels.sigma[-1] == 0 and (levels.ratio.diff() < 0).all()
    if schedule.num_rows:
        assert levels.ratio[-2] >= schedule(1 / schedule.num_rows).ratio * (1 - 1e-9)
    steps = list(sampler.steps(two_gaussians(), schedule, noise(16, 1)))
    assert len(steps) == num_calls and torch.isfinite(steps[-1].x).all()


def test_two_walks_are_the_same_bit_for_bit():
    first, second = (AutoSampler(12)(two_gaussians(), EDM, noise(16, 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_levels_that_are_given_are_kept():
    given = ExplicitDiscretizer(ratios=[20.0, 5.0, 1.0, 0.2, 0.0])
    assert AutoSampler(4, discretizer=given).levels(EDM).ratio.tolist() == pytest.approx(given.values.tolist())
    for num_calls in (5, 20, 40):
        want = TrailingDiscretizer()(ScaledLinearSchedule(), num_calls).ratio
        assert torch.equal(
            AutoSampler(num_calls, discretizer=TrailingDiscretizer()).levels(ScaledLinearSchedule()).ratio, want
        )


def test_on_one_schedule_or_another_with_the_same_levels_the_samples_are_the_same():
    given = ExplicitDiscretizer(ratios=[20.0, 8.0, 3.0, 1.1, 0.4, 0.1, 0.0])
    first, *others = (
        AutoSampler(discretizer=given)(one_gaussian(), s, noise(16)) for s in (EDM, FlowSchedule(), CosineSchedule())
    )
    assert all((other - first).abs().max() < 1e-8 for other in others)  # rounding, amplified by the calibration


def test_a_config_names_it():
    assert isinstance(build({"type": "auto", "num_steps": 12}, "sampler"), AutoSampler)


def gauss(num_samples=64):
    """The anchor's Gaussian, its start and its exact end."""
    denoiser = GaussianDenoiser(torch.linspace(-1, 1, 32).tolist(), (10 ** torch.linspace(0, -2, 32)).tolist())
    start = denoiser.draw((num_samples, 32)) + 80 * noise(num_samples, 32)
    ends = EDM(torch.tensor([1.0, 0.0], dtype=torch.float64))
    first, last = (NoiseLevel(*(v[i] for v in vars(ends).values())) for i in (0, 1))
    return denoiser, start, denoiser.flow(start, first, last)


def rms(got, want):
    return ((got - want) ** 2).mean().sqrt().item()


def test_at_ten_calls_it_beats_its_peers_on_a_gaussian():
    """A corner of ``benchmarks/solver_anchor.py``. A Gaussian lies inside its family."""
    denoiser, start, want = gauss()
    sampling = peer("k_diffusion.sampling")

    def ask(x, sigma, **_):
        return denoiser(x, EDM.at_ratio(sigma.double())).x0

    errors = {}
    for levels in (KarrasDiscretizer(), ExponentialDiscretizer()):
        name, sigmas = type(levels).__name__, levels(EDM, 10).ratio
        errors["2m", name] = rms(sampling.sample_dpmpp_2m(ask, start, sigmas, disable=True), want)
        errors["lms", name] = rms(sampling.sample_lms(ask, start, sigmas, disable=True), want)
        for order in (2, 3, 4):  # vdiff's are these peers' own, see test_multistep.py
            errors["ipndm", order, name] = rms(
                IPNDMSampler(10, order, discretizer=levels)(denoiser, EDM, start / 80), want
            )
            errors["deis", order, name] = rms(
                DEISSampler(10, order, discretizer=levels)(denoiser, EDM, start / 80), want
            )
    own = rms(AutoSampler(10)(denoiser, EDM, start / 80), want)
    assert own < min(errors.values()), (own, errors)


@pytest.mark.parametrize("num_calls", [4, 6, 13, 26])
def test_between_the_budgets_of_the_table_it_beats_the_best_peer_of_few_calls(num_calls):
    denoiser, start, want = gauss()
    peers = (IPNDMSampler(num_calls, 3, discretizer=d()) for d in (KarrasDiscretizer, ExponentialDiscretizer))
    best = min(rms(sampler(denoiser, EDM, start / 80), want) for sampler in peers)
    assert rms(AutoSampler(num_calls)(denoiser, EDM, start / 80), want) < best
