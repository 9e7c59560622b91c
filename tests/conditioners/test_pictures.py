"""Pictures as conditions: latents with keyed noise, its level told, frames filled."""

import copy

import numpy
import pytest
import torch

from vdiff.conditioners import EmbedderConditioner, FieldEmbedder, ImageLatentsEmbedder, ScalarFourierEmbedder
from vdiff.denoisers import EpsilonDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import AutoencoderKL, IdentityFirstStage
from vdiff.losses import MSELoss
from vdiff.networks import UNet, sinusoidal
from vdiff.process import ScaledLinearSchedule, UniformIndexSigmaSampler
from vdiff.samplers import CFGGuider, DDIMSampler


def batch(rows=6, **more):
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": x, "noise_key": torch.arange(rows), "step": 0, **more}


def embedder(**options):
    return ImageLatentsEmbedder(IdentityFirstStage(), level_feeds="vector", **options)


def noise_of(made, given):
    cond = EmbedderConditioner([made]).train(made.training)(given)
    return cond["concat"] - given["image"], cond["vector"]


def test_training_noises_each_row_by_its_key_and_says_how_much():
    made = embedder().train()
    noise, level = noise_of(made, batch())
    for row in range(6):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
        assert torch.equal(noise_of(made, alone)[0][0], noise[row])
    sigma = made.read(batch(), True).sigma
    assert torch.equal(level, sinusoidal(sigma, 256))
    assert noise.flatten(1).std(1).div(sigma).sub(1).abs().max() < 0.3  # of 64 numbers
    assert not torch.equal(noise_of(made, batch() | {"step": 1})[0], noise)


def test_levels_are_log_normal():
    sigma = embedder(log_mean=-3.0, log_std=0.5).read(batch(3000), True).sigma.log()
    assert sigma.mean().item() == pytest.approx(-3, abs=0.04) and sigma.std().item() == pytest.approx(0.5, abs=0.03)


def test_sampling_takes_the_field_or_the_level_of_its_own():
    made = embedder(sigma=0.1).eval()
    given = {"image": batch()["image"]}
    noise, level = noise_of(made, given)
    assert torch.equal(level, sinusoidal(torch.full((6,), 0.1), 256))
    assert torch.allclose(noise, noise[:1].expand_as(noise), atol=1e-6)  # no row depends on its place in the batch
    told, _ = noise_of(made, given | {"cond_aug": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]})
    assert told[0].abs().max() == 0 and torch.allclose(told[5], 5 * noise[5], atol=1e-5)
    with pytest.raises(ValueError, match=r"one number per row, \(6,\)"):
        made.read({**given, "cond_aug": [0.1]})


def test_a_level_that_the_batch_says_holds_in_training_too():
    made = embedder().train()
    levels = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    noise, told = noise_of(made, batch(cond_aug=levels))
    assert torch.equal(told, sinusoidal(levels, 256)) and noise[0].abs().max() == 0
    drawn = made.read(batch(), True)
    own = torch.stack([n.std() for n in noise_of(made, batch())[0]]) / drawn.sigma  # the row's own noise, of one size
    assert torch.allclose(noise[1:].flatten(1).std(1) / levels[1:], own[1:], rtol=1e-3)


def test_noise_on_latents_and_none_at_all():
    given = batch()
    assert torch.equal(EmbedderConditioner([embedder(noised="nothing").train()])(given)["concat"], given["image"])
    on_latents, _ = noise_of(embedder(noised="latents").train(), given)
    assert torch.allclose(on_latents, noise_of(embedder().train(), given)[0], atol=1e-6)  # the identity is linear


def test_a_picture_fills_the_frames_of_a_video():
    given = {"image": batch()["image"]}
    for fill in ("repeat", "zero"):
        made = ImageLatentsEmbedder(IdentityFirstStage(), sigma=0.0, frames=4, fill=fill).eval()
        concat = EmbedderConditioner([made]).eval()(given)["concat"]
        assert concat.shape == (6, 1, 4, 8, 8) and torch.equal(concat[:, :, 0], given["image"])
        assert torch.equal(concat[:, :, 3], given["image"] if fill == "repeat" else torch.zeros(6, 1, 8, 8))


def test_the_null_has_no_picture_and_the_same_level():
    cond = EmbedderConditioner([embedder()]).eval()(batch())
    assert cond.null["concat"].abs().max() == 0 and torch.equal(cond.null["vector"], cond["vector"])


def test_the_vector_of_sdxl_is_its_sizes_behind_the_pooled_text():
    """original_size, crop, target_size: six numbers of 256 waves each, behind 1280; 2816 in all."""
    sizes = [ScalarFourierEmbedder(f, width=256) for f in ("original_size", "crop", "target_size")]
    made = EmbedderConditioner([FieldEmbedder("pooled", "vector"), *sizes]).eval()
    fields = {
        "pooled": torch.randn(2, 1280, generator=torch.Generator().manual_seed(3)),
        "original_size": torch.tensor([[1024, 768], [512, 512]]),
        "crop": torch.tensor([[0, 0], [16, 8]]),
        "target_size": torch.tensor([[1024, 1024], [1024, 1024]]),
    }
    vector = made(fields)["vector"]
    assert vector.shape == (2, 2816)
    numbers = torch.cat([fields[f] for f in ("original_size", "crop", "target_size")], 1).float()
    waves = sinusoidal(numbers, 256).flatten(1)
    assert torch.equal(vector, torch.cat([fields["pooled"], waves], 1))


def test_numbers_are_told_with_an_offset_and_by_default():
    made = EmbedderConditioner(
        [
            ScalarFourierEmbedder("fps", width=8, offset=-1.0, scale=2.0),
            ScalarFourierEmbedder("bucket", width=8, default=127),
            ScalarFourierEmbedder("crop", width=8, default=[3, 4]),
            FieldEmbedder("stride", offset=0.5, default=10),
        ]
    ).eval()
    cond = made({"fps": torch.tensor([8, 24])})
    numbers = torch.tensor([[14.0, 127.0, 3.0, 4.0], [46.0, 127.0, 3.0, 4.0]])
    assert torch.equal(cond["vector"], sinusoidal(numbers, 8).flatten(1)) and cond["stride"].tolist() == [10.5, 10.5]
    told = made({"fps": [8.0, 24.0], "bucket": [1, 2], "crop": [[5, 6], [7, 8]], "stride": [4.0, 5.0]})
    numbers = torch.tensor([[14.0, 1.0, 5.0, 6.0], [46.0, 2.0, 7.0, 8.0]])
    assert torch.equal(told["vector"], sinusoidal(numbers, 8).flatten(1)) and told["stride"].tolist() == [4.5, 5.5]
    assert FieldEmbedder("stride")(torch.tensor([4])).dtype == torch.int64


def test_a_default_has_as_many_rows_as_the_batch_says_and_no_others():
    made = EmbedderConditioner([ScalarFourierEmbedder("bucket", width=8, default=127)])
    assert made.eval()({"noise_key": torch.arange(3), "step": 7, "seed": 1})["vector"].shape == (3, 8)
    assert made.eval()({"caption": ["a", "b"], "step": 7})["vector"].shape == (2, 8)
    with pytest.raises(ValueError, match="'bucket' has a default .* not clear: no other field tells. Give it"):
        made({"step": 7})
    with pytest.raises(ValueError, match="not clear: caption 2, fps 3. Give it"):
        made({"caption": ["a", "b"], "fps": torch.ones(3)})


def test_waves_are_those_of_diffusers():
    from peers import peer

    timesteps = peer("diffusers.models.embeddings").Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    numbers = torch.tensor([0.0, 7.0, 127.0, 1023.0])
    theirs = timesteps(numbers)
    # The frequencies are rounded in another order, and 1023 magnifies it.
    assert torch.allclose(ScalarFourierEmbedder("fps", width=256)(numbers), theirs, atol=2e-4)


def test_a_field_goes_through_as_it_is():
    made = EmbedderConditioner([FieldEmbedder("fps", absent=-1.0)]).eval()
    cond = made({"fps": torch.tensor([8.0, 24.0])})
    assert cond["fps"].tolist() == [8, 24] and cond.null["fps"].tolist() == [-1, -1]


def test_the_null_may_be_the_same_and_latents_may_be_scaled():
    given = {"image": batch()["image"]}
    cond = EmbedderConditioner([embedder(noised="nothing", null="same", scale=2.0)]).eval()(given)
    assert torch.equal(cond["concat"], 2 * given["image"]) and torch.equal(cond.null["concat"], cond["concat"])


def test_without_a_first_stage_of_its_own_it_goes_through_the_engines():
    """Which holds it once, in memory and in the file; a copy has its own."""
    made = ImageLatentsEmbedder(noised="nothing")
    with pytest.raises(ValueError, match="no first stage; give one, or put the embedder into an engine"):
        made.encode(batch()["image"])
    stage = AutoencoderKL(in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, scale=3.0)
    engine = DiffusionEngine(
        "image",
        EpsilonDenoiser(torch.nn.Identity()),
        ScaledLinearSchedule(),
        UniformIndexSigmaSampler(),
        MSELoss(),
        DDIMSampler(),
        EmbedderConditioner([made]),
        stage,
    )
    pixels = batch()["image"]
    assert torch.equal(made.encode(pixels), stage.encode(pixels))
    assert not made.state_dict() and len(engine.state_dict()) == len(stage.state_dict())
    other = copy.deepcopy(engine)
    torch.nn.init.zeros_(other.first_stage.quant_conv.weight)
    copied = other.conditioner.embedders[0]
    assert torch.equal(copied.encode(pixels), other.first_stage.encode(pixels))
    assert not torch.equal(copied.encode(pixels), made.encode(pixels))
    engine.first_stage = IdentityFirstStage()  # and goes through another once the engine does
    assert torch.equal(made.encode(pixels), pixels)
    engine.conditioner = EmbedderConditioner([later := ImageLatentsEmbedder(noised="nothing")])
    assert torch.equal(later.encode(pixels), pixels)


def told(*embedders, **options):
    """An engine of pictures, told pictures that lie behind the noisy sample."""
    network = UNet(1 + len(embedders), 1, channels=8, channel_mult=(1,), num_res_blocks=1, attention_factors=(),
                   norm_groups=4, num_heads=1)  # fmt: skip
    return DiffusionEngine(
        "image", EpsilonDenoiser(network), ScaledLinearSchedule(), UniformIndexSigmaSampler(), MSELoss(),
        DDIMSampler(2), EmbedderConditioner(embedders), guider=CFGGuider(2.0), sample_shape=(1, 8, 8), **options,
    )  # fmt: skip


PICTURE = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
NAN = torch.where(PICTURE > 0.99, torch.nan, PICTURE)


@pytest.mark.parametrize("made", [ImageLatentsEmbedder(), FieldEmbedder("image", "concat")])
@pytest.mark.parametrize("wrong", [((PICTURE + 1) * 127.5).to(torch.uint8), (PICTURE + 1) * 127.5, NAN])
def test_bytes_and_broken_values_are_no_picture_from_python(made, wrong):
    with pytest.raises(ValueError, match=r"Embedder: 'image' takes floating pixels in \[-1, 1\]; got .* x / 127.5 - 1"):
        told(made).sample({"image": wrong})
    with pytest.raises(ValueError, match="'image' takes floating pixels"):
        told(made).sample({"image": PICTURE}, negative={"image": wrong})


def test_what_lies_in_a_picture_of_python_is_looked_at_no_closer():
    """Masks of whole numbers, pictures that overshoot, and bytes where pixels are bytes; and what no row has."""
    for mask in ((PICTURE > 0), (PICTURE > 0).long(), [[[[0.0] * 8] * 8]] * 2):
        assert told(FieldEmbedder("mask", "concat")).sample({"mask": mask}).isfinite().all()
    assert told(ImageLatentsEmbedder()).sample({"image": 1.5 * PICTURE}).isfinite().all()
    in_bytes = told(ImageLatentsEmbedder(), first_stage=IdentityFirstStage(1 / 127.5, 127.5, (0, 255)))
    assert in_bytes.sample({"image": (PICTURE + 1) * 127.5}).isfinite().all()
    absent = ImageLatentsEmbedder(given_field="is_given")
    assert told(absent).sample({"image": NAN, "is_given": [1, 0]}).isfinite().all()


def test_training_looks_at_no_pixel(monkeypatch):
    """Data sets have said their range, and a look would wait for the device."""
    engine = told(ImageLatentsEmbedder()).train()
    monkeypatch.setattr(IdentityFirstStage, "check_pixels", lambda *_: pytest.fail("it looked"))
    engine.training_step(batch(2, seed=0))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (PICTURE.numpy(), r"'image' holds pictures \(B, c, h, w\) as a tensor, and a ndarray came.*from_numpy"),
        (list(PICTURE), r"'image' holds pictures .* and a list came.*torch.stack"),
        (PICTURE[0], r"'image' holds pictures .*; its shape is \(1, 8, 8\)"),
        (PICTURE[..., :6], r"'concat', fed by 'image', is \(2, 1, 8, 6\), and lies behind .* \(B, 1, 8, 8\)"),
        (PICTURE[:, :, None], r"'concat', fed by 'image', is \(2, 1, 1, 8, 8\)"),
    ],
)
def test_a_picture_of_another_type_or_shape_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        told(ImageLatentsEmbedder()).sample({"image": wrong})


def test_a_picture_of_another_size_is_refused_in_training_too():
    with pytest.raises(ValueError, match=r"UNet: 'concat' is \(2, 1, 8, 6\) and lies behind x, \(2, 1, 8, 8\)"):
        told(FieldEmbedder("hint", "concat"))(batch(2, seed=0) | {"hint": PICTURE[..., :6]})


def test_a_field_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"'concat', fed by 'hint', is \(2, 1, 8, 6\)"):
        told(FieldEmbedder("hint", "concat")).sample({"hint": PICTURE[..., :6]})
    hint = numpy.zeros((2, 1, 8, 8), numpy.float32)
    assert told(FieldEmbedder("hint", "concat")).sample({"hint": hint}).shape == (2, 1, 8, 8)


def test_samples_without_their_picture_say_which_field_is_missing():
    with pytest.raises(ValueError, match=r"told image. Say it: sample\(\{'image': ...\}\)"):
        told(ImageLatentsEmbedder()).sample(num=2)
    two = told(ImageLatentsEmbedder(), FieldEmbedder("fps", default=8))
    with pytest.raises(ValueError, match="told image. Say it"):
        two.sample()
