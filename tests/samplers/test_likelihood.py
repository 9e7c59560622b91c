"""Likelihoods against densities that are known."""

import math

import pytest
import torch
from oracles import SCHEDULES, one_gaussian
from orders import three_gaussians

from vdiff.denoisers import GaussianDenoiser
from vdiff.process import FlowSchedule, LinearSchedule
from vdiff.samplers import log_likelihood

SIGMA_MIN = 0.002


def log_density(oracle, x, sigma=SIGMA_MIN):
    """Of a mixture with noise of that spread added, ``(B,)``."""
    variances = oracle.variances + sigma**2
    off = (x[:, None] - oracle.means) ** 2 / variances
    return torch.logsumexp(oracle.log_weights - 0.5 * (off + variances.log() + math.log(2 * math.pi)).sum(-1), 1)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "flow_shift_3"])
def test_the_density_of_a_gaussian_is_its_own(schedule):
    oracle = one_gaussian()
    x = oracle.draw((4, 2))
    variance = oracle.variance + SIGMA_MIN**2
    want = -0.5 * ((x - oracle.mean) ** 2 / variance + variance.log() + math.log(2 * math.pi)).sum(1)
    for tolerance, most in ((1e-4, 1e-4), (1e-7, 2e-7)):
        found = log_likelihood(oracle, SCHEDULES[schedule], x, trace="exact", rtol=tolerance, atol=tolerance)
        assert (found.nats - want).abs().max() < most
    assert (found.bits_per_dim + found.nats / (2 * math.log(2))).abs().max() < 1e-12


def test_the_density_of_a_mixture_is_its_own():
    oracle = three_gaussians()
    x = oracle.draw(6)
    found = log_likelihood(oracle, FlowSchedule(), x, trace="exact", rtol=1e-6, atol=1e-6)
    assert (found.nats - log_density(oracle, x)).abs().max() < 1e-5


def test_a_walk_that_stops_short_of_pure_noise_takes_the_state_for_gaussian_there():
    """On EDM's schedule, exact for data of mean 0 and that spread."""
    oracle = GaussianDenoiser(0.0, 0.5)
    x = oracle.draw((4, 2))
    variance = 0.5**2 + SIGMA_MIN**2
    want = -0.5 * (x**2 / variance + math.log(2 * math.pi * variance)).sum(1)
    found = log_likelihood(oracle, SCHEDULES["edm"], x, trace="exact", sigma_data=0.5)
    assert (found.nats - want).abs().max() < 1e-6


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_probes_estimate_the_trace_without_bias(trace):
    oracle = three_gaussians()
    x = oracle.draw(1)
    found = log_likelihood(oracle, FlowSchedule(), x.expand(400, 2), seeds=range(400), trace=trace)
    standard_error = found.nats.std() / 20
    assert (found.nats.mean() - log_density(oracle, x)[0]).abs() < 3 * standard_error < 0.4


def test_rademacher_probes_are_exact_where_the_slope_has_no_cross_terms():
    oracle = one_gaussian()
    x = oracle.draw((4, 2))
    a, b = (log_likelihood(oracle, FlowSchedule(), x, **how) for how in ({"trace": "exact"}, {"seeds": range(4)}))
    assert (a.nats - b.nats).abs().max() < 1e-10


def test_more_probes_vary_less():
    oracle = three_gaussians()
    x = oracle.draw(1).expand(100, 2)
    one, many = (log_likelihood(oracle, FlowSchedule(), x, seeds=range(100), num_probes=n).nats.std() for n in (1, 16))
    assert many < one / 2.5  # 4 in the limit


def test_a_row_does_not_depend_on_the_batch_around_it():
    oracle = three_gaussians()
    x = oracle.draw(5)
    together = log_likelihood(oracle, FlowSchedule(), x, seeds=[7, 8, 9, 10, 11])
    alone = log_likelihood(oracle, FlowSchedule(), x[3:4], seeds=[10])
    assert torch.equal(together.nats[3], alone.nats[0]) and torch.equal(together.latent[3], alone.latent[0])


def test_the_latent_of_data_is_standard_gaussian():
    oracle = three_gaussians()
    latent = log_likelihood(oracle, FlowSchedule(), oracle.draw(500), seeds=range(500), rtol=1e-3, atol=1e-3).latent
    assert latent.mean(0).abs().max() < 0.15 and (latent.std(0) - 1).abs().max() < 0.15  # 3 standard errors


def test_on_a_table_the_data_is_put_at_its_first_row():
    oracle, schedule = one_gaussian(), LinearSchedule()
    first = schedule(1 / schedule.num_rows).ratio.item()
    a, b = (log_likelihood(oracle, schedule, oracle.draw((2, 2)), trace="exact", sigma_min=s) for s in (1e-4, first))
    assert torch.equal(a.nats, b.nats)


def test_probes_need_seeds():
    with pytest.raises(ValueError, match="give one seed per row"):
        log_likelihood(one_gaussian(), FlowSchedule(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="num_probes must be at least 1"):
        log_likelihood(one_gaussian(), FlowSchedule(), torch.zeros(2, 2), seeds=[0, 1], num_probes=0)
