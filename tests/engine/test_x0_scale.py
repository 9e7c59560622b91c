"""An engine that scales x0 trains and samples by the same scale."""

import pytest
import torch
from torch import nn

from vdiff.denoisers import EpsilonDenoiser, VDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.losses import MSELoss
from vdiff.process import ScaledLinearSchedule, UniformIndexSigmaSampler, X0Scale, ZeroSNRSchedule
from vdiff.samplers import DDIMSampler, NoneGuider, X0ScaleGuider

POINT, SCALE = 0.8, X0Scale(0.5)


class KnowsThePoint(nn.Module):
    """What a network says that has learned scaled data, all of which are one point."""

    def __init__(self, schedule, language):
        super().__init__()
        self.schedule, self.language = schedule, language

    def forward(self, x, c_noise, cond=None):
        level = self.schedule((c_noise.double() + 1) / self.schedule.num_rows).like(x)
        x0 = (POINT * SCALE.at(level.t)).expand_as(x)
        noise = (x - level.alpha * x0) / level.sigma
        return self.language.value(x0, noise, level).to(x.dtype)


def engine(denoiser, schedule, **options):
    return DiffusionEngine(
        "image", denoiser(KnowsThePoint(schedule, denoiser.language)), schedule, UniformIndexSigmaSampler(), MSELoss(),
        DDIMSampler(7), sample_shape=(1, 2, 2), **options,
    )  # fmt: skip


KINDS = [(EpsilonDenoiser, ScaledLinearSchedule()), (VDenoiser, ZeroSNRSchedule())]


@pytest.mark.parametrize("denoiser, schedule", KINDS, ids=["epsilon", "v"])
def test_what_is_right_in_training_is_right_in_sampling(denoiser, schedule):
    """A network that knows the scaled data has no loss, and its samples are the data, not scaled."""
    scaled = engine(denoiser, schedule, x0_scale=SCALE)
    batch = {"image": torch.full((16, 1, 2, 2), POINT), "noise_key": torch.arange(16), "seed": 0, "step": 3}
    assert scaled.training_step(batch).per_row.max() < 1e-6
    plain = engine(denoiser, schedule)
    assert plain.training_step(batch).per_row.max() > 1e-3
    # The last of the steps stands at a row where s is not 1 yet, and ends at data, where it is.
    assert (scaled.sample(num=3) - POINT).abs().max() < 1e-4
    assert (plain.sample(num=3) - POINT).abs().max() > 1e-2


def test_the_guider_by_hand_is_the_same():
    given = KINDS[0]
    by_itself, by_hand = engine(*given, x0_scale=SCALE), engine(*given, guider=X0ScaleGuider(last=0.5))
    samples = by_itself.sample(num=2)
    assert torch.equal(samples, by_hand.sample(num=2))
    assert torch.equal(samples, by_itself.sample(num=2, guider=X0ScaleGuider(last=0.5)))  # not twice
    assert torch.equal(samples, by_itself.sample(num=2, guider=NoneGuider()))


def test_a_walk_that_begins_at_a_picture_begins_at_its_scaled_self():
    scaled = engine(*KINDS[0], x0_scale=SCALE)
    x0 = torch.full((2, 1, 2, 2), POINT)
    seen = []
    scaled.denoiser.register_forward_hook(lambda _, args, out: seen.append((args[0], args[1])))
    scaled.sample(x0=x0, strength=0.3)
    x_t, level = seen[0]
    noise = scaled.noise((1, 2, 2), [0, 1])
    assert (x_t - level.mix(SCALE(x0, level), noise)).abs().max() < 1e-4
    assert (x_t - level.mix(x0, noise)).abs().max() > 0.1
