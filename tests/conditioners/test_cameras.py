"""What models of several cameras are told: angles by frame, a video behind every view, views that may not be there."""

import math

import pytest
import torch

from vdiff.conditioners import EmbedderConditioner, ImageLatentsEmbedder, OpenCLIPImageEmbedder, ScalarFourierEmbedder
from vdiff.first_stages import IdentityFirstStage
from vdiff.networks import sinusoidal

MOMENTS, VIEWS = 3, 4
TOWER = {"embed_dim": 16, "width": 32, "head_width": 16, "layers": 1, "patch_size": 8, "image_size": 16}


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def embedder(**options):
    return ImageLatentsEmbedder(IdentityFirstStage(), "cond_motion", log_mean=None, sigma=0.0, **options)


def alone(made, batch, training=False):
    return EmbedderConditioner([made]).train(training)(batch)


def test_an_angle_is_cosines_and_sines_at_256_frequencies():
    """cos(a w_k), k = 0 ... 255, then the sines, with w_k = 10000^(-k / 256): 512 numbers an angle."""
    angles = torch.tensor([[0.0, 1.4, math.pi], [2.0, 6.2, 0.01]])
    said = ScalarFourierEmbedder("polars_rad", width=512, frames=3)(angles)
    assert said.shape == (2, 3, 512)
    for row, frame in ((0, 1), (0, 2), (1, 0), (1, 2)):
        phases = [angles[row, frame].item() * 10000 ** (-k / 256) for k in range(256)]
        expected = torch.tensor([math.cos(p) for p in phases] + [math.sin(p) for p in phases])
        torch.testing.assert_close(said[row, frame], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("moves", [False, True])
def test_frames_are_all_views_of_the_first_moment_then_of_the_next(moves):
    angles = draw(2, MOMENTS, VIEWS) if moves else draw(2, VIEWS)
    said = ScalarFourierEmbedder("azimuth_rad", width=8, frames=MOMENTS * VIEWS)(angles)
    for row in range(2):
        frame = 0
        for moment in range(MOMENTS):
            for view in range(VIEWS):
                angle = angles[row, moment, view] if moves else angles[row, view]
                assert torch.equal(said[row, frame], sinusoidal(angle, 8))
                frame += 1


def test_the_vector_of_sv3d_is_its_level_in_every_frame_and_the_angles_of_that_frame():
    level = ImageLatentsEmbedder(IdentityFirstStage(), level_feeds="vector", sigma=1e-5)
    angles = [ScalarFourierEmbedder(name, 512, frames=5, null="same") for name in ("polars_rad", "azimuths_rad")]
    batch = {"image": draw(2, 3, 4, 4), "polars_rad": draw(2, 5), "azimuths_rad": draw(2, 5, seed=1)}
    cond = EmbedderConditioner([level, *angles]).eval()(batch)
    assert cond["vector"].shape == (2, 5, 1280)
    assert torch.equal(cond["vector"][..., :256], sinusoidal(torch.full((2, 5), 1e-5), 256))
    assert torch.equal(cond["vector"][..., 256:768], sinusoidal(batch["polars_rad"], 512))
    assert torch.equal(cond["vector"][..., 768:], sinusoidal(batch["azimuths_rad"], 512))
    assert torch.equal(cond.null["vector"], cond["vector"])


def test_every_view_sees_the_videos_frame_of_its_moment():
    video = draw(2, 3, MOMENTS, 4, 4)
    concat = alone(embedder(frames=MOMENTS * VIEWS, fill="each"), {"cond_motion": video})["concat"]
    for frame in range(MOMENTS * VIEWS):
        assert torch.equal(concat[:, :, frame], video[:, :, frame // VIEWS])


def test_each_moment_has_tokens_of_its_own():
    tower = OpenCLIPImageEmbedder(TOWER, reads="cond_motion", per_frame=True)
    tower.is_random = False
    video = draw(2, 3, MOMENTS, 16, 16)
    said = tower(video)
    assert said.shape == (2, MOMENTS, 1, 16)
    for moment in range(MOMENTS):
        torch.testing.assert_close(said[:, moment], tower(video[:, :, moment]), rtol=0, atol=1e-6)


def test_without_a_mean_training_noises_by_sigma_as_sampling_does():
    made = ImageLatentsEmbedder(IdentityFirstStage(), log_mean=None, sigma=0.1, level_feeds="vector")
    batch = {"image": draw(64, 3, 8, 8), "noise_key": torch.arange(64), "step": 0}
    cond = alone(made, batch, training=True)
    assert torch.equal(cond["vector"], sinusoidal(torch.full((64,), 0.1), 256))
    assert (cond["concat"] - batch["image"]).std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("level_null", ["same", "zero"])
def test_the_null_keeps_the_level_or_not(level_null):
    cond = alone(embedder(level_feeds="vector", level_null=level_null), {"cond_motion": draw(2, 3, 4, 4)})
    assert (cond.null["concat"] == 0).all()
    assert torch.equal(cond.null["vector"], cond["vector"] if level_null == "same" else torch.zeros(2, 256))


def test_rows_without_pictures_have_zero_latents_in_the_null_and_outside():
    made, pictures = embedder(feeds="views", given_field="has"), draw(3, 3, VIEWS, 4, 4)
    cond = alone(made, {"cond_motion": pictures, "has": [1, 0, 1]})
    assert torch.equal(cond["views"][[0, 2]], pictures[[0, 2]]) and (cond["views"][1] == 0).all()
    assert (cond.null["views"] == 0).all()
    assert torch.equal(alone(made, {"cond_motion": pictures})["views"], pictures)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"where V divides the 12 frames, .* its shape is \(1, 5\)"):
        ScalarFourierEmbedder("polar_rad", frames=12)(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"T \* V of them; its shape is \(1, 2, 4\)"):
        ScalarFourierEmbedder("polar_rad", frames=12)(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="5 latent frames came, and the video has 12. With fill: each it is a m"):
        alone(embedder(frames=12, fill="each"), {"cond_motion": draw(1, 3, 5, 4, 4)})
    with pytest.raises(ValueError, match=r"has holds one number per row, \(2,\); its shape is \(1,\)"):
        alone(embedder(given_field="has"), {"cond_motion": draw(2, 3, 4, 4), "has": [1]})
    angles = [ScalarFourierEmbedder("a", 8, frames=4), ScalarFourierEmbedder("b", 8, frames=6)]
    with pytest.raises(ValueError, match="feed 'vector' do not join"):
        EmbedderConditioner(angles)({"a": torch.zeros(1, 4), "b": torch.zeros(1, 6)})
