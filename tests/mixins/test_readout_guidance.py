"""Steering by what is read: Bayes' rule where the answer is known, and nothing where it is off."""

import pytest
import torch
from torch import nn

from vdiff.denoisers import GaussianDenoiser, VDenoiser
from vdiff.mixins import ReadoutGuidance
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule, EDMSchedule
from vdiff.samplers import CFGGuider, HeunSampler

MEAN, STD, SEEN, ERROR = 0.3, 0.5, -0.4, 0.25


class Measured(ReadoutGuidance, name="measured_in_a_test"):
    """Data that were measured as SEEN, with a Gaussian error: exactly -log p(SEEN | x_t)."""

    def energy(self, features, prediction, head):
        level = prediction.level.like(prediction.x_t)
        spread = STD**2 * level.sigma**2 / ((level.alpha * STD) ** 2 + level.sigma**2)  # of x0, given x_t
        return ((prediction.x0 - SEEN) ** 2 / (2 * (ERROR**2 + spread))).flatten(1).sum(1)


class Quiet(ReadoutGuidance, name="quiet_in_a_test"):
    """Less of what the chosen modules say, as a trained head reads it."""

    def head(self):
        return nn.Linear(16, 1)

    def energy(self, features, prediction, head):
        (said,) = features.values()
        return head(said.flatten(2).mean(2)).flatten()


@pytest.mark.parametrize("schedule", [EDMSchedule(), CosineSchedule()], ids=["edm", "pure_noise"])
def test_a_gaussian_with_a_measurement_is_sampled_by_bayes_rule(schedule):
    oracle = GaussianDenoiser(MEAN, STD)
    Measured().attach(oracle)
    noise = torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = HeunSampler(80, coordinate="angle")(oracle, schedule, noise)
    precision = 1 / STD**2 + 1 / ERROR**2
    assert samples.mean().item() == pytest.approx((MEAN / STD**2 + SEEN / ERROR**2) / precision, abs=0.02)
    assert samples.std().item() == pytest.approx(precision**-0.5, rel=0.05)  # of 4000: 3 standard errors are 3 %


def network():
    torch.manual_seed(0)
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, norm_groups=4)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return VDenoiser(net).eval()


def ask(denoiser):
    torch.manual_seed(1)
    return denoiser(torch.randn(2, 1, 8, 8), CosineSchedule()(torch.tensor([0.3, 0.7])), Conditioning())


def test_what_is_read_off_a_layer_falls():
    denoiser = network()
    quiet = Quiet(features="*.middle_block.2", scale=1.0).attach(denoiser)
    plain, x0 = ask_off(denoiser, quiet), ask(denoiser).x0
    assert not torch.allclose(plain, x0)
    steeper = quiet.scaled(3.0)
    with steeper:
        assert torch.allclose(ask(denoiser).x0 - plain, 3 * (x0 - plain), rtol=1e-3, atol=1e-5)


def ask_off(denoiser, mixin):
    with mixin.disabled():
        return ask(denoiser).x0


def test_it_comes_off_bit_for_bit_and_back_from_a_file(tmp_path):
    denoiser = network()
    before, keys = ask(denoiser).value, list(denoiser.state_dict())
    quiet = Quiet(features="*.middle_block.2").attach(denoiser)
    moved = ask(denoiser).value
    quiet.save(tmp_path / "quiet.safetensors")
    quiet.detach()
    assert torch.equal(ask(denoiser).value, before) and list(denoiser.state_dict()) == keys
    assert not any(module._forward_hooks for module in denoiser.modules())
    again = Quiet(features="*.middle_block.2").attach(denoiser)
    again.load(tmp_path / "quiet.safetensors")
    assert torch.equal(ask(denoiser).value, moved)
    assert all(p.grad is None for p in denoiser.parameters())


def test_it_works_under_a_guider_and_says_what_an_energy_is():
    oracle, noise = GaussianDenoiser(MEAN, STD), torch.randn(3, 2)
    measured = Measured().attach(oracle)
    cond = Conditioning({"label": torch.zeros(3)}).with_null(Conditioning({"label": torch.zeros(3)}))
    walk = HeunSampler(4)
    guided = walk(oracle, EDMSchedule(), noise, cond, guider=CFGGuider(2.0))
    assert torch.allclose(guided, walk(oracle, EDMSchedule(), noise, cond), atol=1e-5)  # both branches alike

    measured.energy = lambda *_: torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"one number per row, \(3,\); it is \(3, 2\)"):
        walk(oracle, EDMSchedule(), noise)
