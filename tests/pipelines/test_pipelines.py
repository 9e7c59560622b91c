"""Pixels to pixels: variations, inpainting, inversion, on an engine whose denoiser is exact."""

import pytest
import torch

from vdiff.denoisers import Denoiser, GaussianDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import IdentityFirstStage
from vdiff.losses import MSELoss
from vdiff.pipelines import edit_by_inversion, image_to_image, inpaint, invert, latent_mask
from vdiff.process import Conditioning, CosineSchedule, Prediction, UniformSigmaSampler, X0Parameterization, spread
from vdiff.registry import isolated
from vdiff.samplers import CFGGuider, DPMpp2MSDESampler, HeunSampler

with isolated():

    class ByLabel(Denoiser):
        """Images of class k are Gaussian around (k - 1) / 2."""

        language = X0Parameterization()

        def forward(self, x_t, level, cond=None):
            mean = 0.0 if cond is None or "label" not in cond else 0.5 * (cond["label"].to(x_t) - 1)
            mean = torch.as_tensor(mean, dtype=x_t.dtype).reshape(-1, 1, 1, 1)
            alpha, sigma = spread(level.alpha, x_t), spread(level.sigma, x_t)
            gain = alpha * 0.2**2 / (alpha**2 * 0.2**2 + sigma**2)
            return Prediction(self.language, mean + gain * (x_t - alpha * mean), x_t, level)


def engine(denoiser=None, **options):
    parts = {
        "input_key": "image",
        "denoiser": denoiser or GaussianDenoiser(0.1, 0.5),
        "schedule": CosineSchedule(),
        "sigma_sampler": UniformSigmaSampler(),
        "loss": MSELoss(),
        "sampler": HeunSampler(20),
        "first_stage": IdentityFirstStage(scale=2.0, shift=0.5, pixel_range=(0.0, 1.0)),
        "sample_shape": (1, 8, 8),
    }
    return DiffusionEngine(**(parts | options))


def pixels(rows=2):
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_little_strength_keeps_an_image_and_all_of_it_forgets_it():
    moved = [(image_to_image(engine(), pixels(), strength=s) - pixels()).abs().mean() for s in (0.02, 0.3, 1.0)]
    assert moved[0] < 0.05 and moved[0] < moved[1] < moved[2]
    from_black, from_white = (image_to_image(engine(), torch.full((2, 1, 8, 8), v), strength=1.0) for v in (0.0, 1.0))
    assert torch.equal(from_black, from_white)


def test_known_pixels_come_back_and_the_others_are_made():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    for sampler in (None, DPMpp2MSDESampler(10)):
        out = inpaint(engine(), pixels(), mask, sampler=sampler)
        assert torch.equal(out[..., :4], pixels()[..., :4]) and (out - pixels())[..., 4:].abs().mean() > 0.1
        loose = inpaint(engine(), pixels(), mask, sampler=sampler, paste=False)
        assert (loose - pixels())[..., :4].abs().max() < 1e-5  # without pasting too: the walk itself ends there


def test_a_cell_is_made_anew_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 5] = 1
    small = latent_mask(mask, torch.zeros(2, 4, 4, 4))
    assert small.sum() == 1 and small[0, 0, 1, 2] == 1
    video = latent_mask(mask[:, :, None].expand(1, 1, 5, 8, 8), torch.zeros(2, 4, 2, 4, 4))
    assert video.shape == (1, 1, 2, 4, 4) and video.sum() == 2
    with pytest.raises(ValueError, match="one channel and as many axes"):
        latent_mask(mask[0], torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        latent_mask(255 * mask, torch.zeros(2, 4, 4, 4))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_image_inverted_and_walked_down_again_is_the_image(strength):
    out = edit_by_inversion(engine(), pixels(), None, None, strength, sampler=HeunSampler(100))
    assert (out - pixels()).abs().max() < 0.01  # a hundred steps each way, of second order but for the ends


def test_the_noise_of_an_image_is_standard_where_the_model_is_right():
    own = engine()
    z = invert(own, own.sample(num=64, sampler=HeunSampler(100)), sampler=HeunSampler(100))
    assert abs(z.std() - 1) < 0.05
    assert (z - own.noise((1, 8, 8), range(64))).abs().max() < 0.1


def test_other_conditions_move_an_image_by_what_they_say():
    """From class 0 around -1/2 to class 2 around 1/2: every pixel keeps its place within its class."""
    own = engine(ByLabel(), first_stage=IdentityFirstStage())
    labels = lambda k: Conditioning({"label": torch.full((2,), k)})  # noqa: E731
    x = -0.5 + 0.2 * torch.randn(2, 1, 8, 8)
    out = edit_by_inversion(own, x, labels(0), labels(2), sampler=HeunSampler(100), guider=CFGGuider(1.0))
    assert (out - (x + 1.0)).abs().max() < 0.03


def test_training_and_modes_are_left_as_they_were():
    own = engine().train()
    image_to_image(own, pixels())
    invert(own, pixels())
    assert own.training and own.first_stage.training
