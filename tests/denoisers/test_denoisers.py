"""Denoisers: what they feed the network, and oracles that are exact."""

import math

import pytest
import torch
from oracles import SCHEDULES, one_gaussian, two_gaussians

from vdiff.denoisers import (
    EDMDenoiser,
    EpsilonDenoiser,
    GaussianDenoiser,
    PowerLawDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from vdiff.process import (
    Conditioning,
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    UndefinedParameterizationError,
    ZeroSNRSchedule,
)


class Echo(torch.nn.Module):
    """Remembers what it was told, says what it saw."""

    def forward(self, x, c_noise, cond=None):
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return x


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_is_the_preconditioning_of_the_paper(sigma):
    """D = c_skip x + c_out F(c_in x, c_noise), table 1 of arXiv:2206.00364."""
    sd = 0.5
    network = Echo()
    denoiser = EDMDenoiser(network, sigma_data=sd)
    x = torch.randn(3, 2, dtype=torch.float64) * sigma
    level = EDMSchedule().at_ratio(torch.full((3,), sigma, dtype=torch.float64))
    said = denoiser(x, level)
    total = sigma**2 + sd**2
    c_skip, c_out, c_in = sd**2 / total, sigma * sd / math.sqrt(total), 1 / math.sqrt(total)
    assert torch.allclose(network.x, c_in * x, rtol=1e-12)
    assert torch.allclose(network.c_noise, torch.full((3,), math.log(sigma) / 4, dtype=torch.float64))
    assert torch.allclose(said.x0, c_skip * x + c_out * (c_in * x), rtol=1e-10)


def test_the_input_of_edm_has_unit_variance_at_every_level():
    sd, network = 0.7, Echo()
    for schedule in SCHEDULES.values():
        for t in (0.1, 0.5, 0.9):
            level = schedule(torch.full((20000,), t, dtype=torch.float64))
            x0 = sd * torch.randn(20000, 1, dtype=torch.float64)
            EDMDenoiser(network, sd)(level.mix(x0, torch.randn_like(x0)), level)
            assert network.x.std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "told, want",
    [("log_sigma", math.log(1.0) / 4), ("sigma", 1.0), ("index", 499.0), ("time", 0.5), ("time_1000", 500.0)],
)
def test_the_network_is_told_the_level_as_named(told, want):
    network = Echo()
    VDenoiser(network, c_noise=told)(torch.zeros(2, 1), CosineSchedule()(torch.full((2,), 0.5)))
    assert network.c_noise.tolist() == pytest.approx([want] * 2, abs=1e-4)


@pytest.mark.parametrize("cls", [EpsilonDenoiser, VDenoiser, VelocityDenoiser, X0Denoiser])
def test_the_answer_is_in_the_language_of_the_class(cls):
    """A network that says the truth in its language is read as the truth."""
    schedule = FlowSchedule()
    level = schedule(torch.full((4,), 0.3, dtype=torch.float64))
    x0, noise = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    denoiser = cls(torch.nn.Identity())
    truth = denoiser.language.value(x0, noise, level)
    denoiser.network = type("Oracle", (torch.nn.Module,), {"forward": lambda self, x, c, cond: truth})()
    said = denoiser(level.mix(x0, noise), level)
    assert torch.allclose(said.x0, x0) and torch.allclose(said.noise, noise)


def test_levels_and_predictions_stay_float32_around_a_bfloat16_network():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2).bfloat16()

        def forward(self, x, c_noise, cond):
            assert x.dtype == torch.bfloat16 and c_noise.dtype == torch.float32
            assert cond["vector"].dtype == torch.bfloat16
            return self.layer(x)

    level = EDMSchedule().at_ratio(torch.tensor([0.01, 1.0]))
    said = EDMDenoiser(Half())(torch.randn(2, 2), level, Conditioning({"vector": torch.ones(2, 3)}))
    assert said.value.dtype == said.x_t.dtype == torch.float32


def test_levels_that_a_network_cannot_be_told_are_refused():
    with pytest.raises(UndefinedParameterizationError, match="epsilon"):
        EpsilonDenoiser(Echo()).check(ZeroSNRSchedule()(1.0), "here")
    with pytest.raises(ValueError, match="here.*log_sigma.*c_noise: time"):
        EDMDenoiser(Echo()).check(ZeroSNRSchedule()(torch.tensor([0.5, 1.0])), "here")
    VDenoiser(Echo()).check(ZeroSNRSchedule()(1.0), "here")


# Oracles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gaussian_oracle_is_the_posterior_mean(name):
    """E[x0 | x_t] by numerical integration over x0."""
    oracle, schedule = GaussianDenoiser(0.3, 0.7), SCHEDULES[name]
    level = schedule(torch.tensor([0.4], dtype=torch.float64))
    x0 = torch.linspace(-8, 8, 200001, dtype=torch.float64)
    for x_t in (-1.0, 0.2, 2.0):
        likelihood = -0.5 * ((x_t - level.alpha * x0) / level.sigma) ** 2 - 0.5 * ((x0 - 0.3) / 0.7) ** 2
        weights = torch.softmax(likelihood, 0)
        want = (weights * x0).sum().item()
        got = oracle(torch.tensor([[x_t]], dtype=torch.float64), level).x0.item()
        assert got == pytest.approx(want, abs=1e-8)


def test_a_mixture_of_one_is_the_gaussian():
    from vdiff.denoisers import GaussianMixtureDenoiser

    one = one_gaussian()
    mixture = GaussianMixtureDenoiser(one.mean[None], one.variance[None].sqrt())
    level = CosineSchedule()(torch.full((5,), 0.6, dtype=torch.float64))
    x = torch.randn(5, 2, dtype=torch.float64)
    assert torch.allclose(mixture(x, level).x0, one(x, level).x0, rtol=1e-12)
    for start, stop in ((1.0, 0.1), (0.9, 0.0)):
        ends = CosineSchedule()(torch.tensor([start, stop], dtype=torch.float64))
        a, b = mixture.flow(x, ends[0], ends[1], num_steps=500), one.flow(x, ends[0], ends[1])
        assert (a - b).abs().max() < 1e-8


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_of_the_mixture_solves_its_equation(name):
    """dx/dt = d_alpha x0 + d_sigma noise along the flow, by central differences."""
    oracle, schedule = two_gaussians(), SCHEDULES[name]
    x = torch.randn(16, 1, dtype=torch.float64)
    start = schedule.at_ratio(3.0)
    middle, h = schedule.at_ratio(0.5), 1e-4
    ends = [schedule(middle.t + d) for d in (-h, 0.0, h)]
    low, here, high = (oracle.flow(x * start.sigma, start, end, num_steps=400) for end in ends)
    level = schedule(middle.t.expand(16))
    assert ((high - low) / (2 * h) - oracle(here, level).to("velocity")).abs().max() < 1e-4 * level.d_sigma[0]


def test_the_power_law_has_its_spectrum():
    data = PowerLawDenoiser(dim=16, seed=3).draw(40000)
    variances = torch.linalg.eigvalsh(torch.cov(data.T)).flip(0)
    assert data.var(0).mean().sqrt().item() == pytest.approx(0.5, abs=0.2)
    slope = torch.log(variances[1] / variances[9]) / torch.log(torch.tensor(10 / 2.0))
    assert slope.item() == pytest.approx(2.0, abs=0.8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conditions_are_handed_over_in_the_type_of_the_network(dtype):
    """A text tower in half precision before a float32 network."""

    class Sum(torch.nn.Linear):
        def forward(self, x, c_noise, cond):
            return super().forward(x + cond["vector"])

    level = EDMSchedule().at_ratio(torch.tensor([0.01, 1.0]))
    said = EDMDenoiser(Sum(2, 2))(torch.randn(2, 2), level, Conditioning({"vector": torch.ones(2, 2, dtype=dtype)}))
    assert said.value.dtype == torch.float32
