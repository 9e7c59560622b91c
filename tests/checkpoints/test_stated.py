"""What a folder of diffusers' says of itself beside its weights: compared with what is filled, and never run."""

import inspect
import json
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peers import peer
from published import controlling

from vdiff.checkpoints import MismatchError, WeightFileError, WeightSource, check_published, load_published, recognise
from vdiff.checkpoints.architecture import Told
from vdiff.checkpoints.stated import (
    HEAD_LENGTHS,
    HEADS,
    SAME_LEVEL,
    SCALES,
    SCHEDULERS,
    Config,
    _alphas_cumprod,
    other_noise,
)
from vdiff.denoisers import EDMDenoiser, EpsilonDenoiser, VDenoiser, VelocityDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import AutoencoderKL
from vdiff.losses import MSELoss
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule, ScaledLinearSchedule, UniformIndexSigmaSampler, ZeroSNRSchedule
from vdiff.registry import build, load_config
from vdiff.samplers import DDIMSampler
from vdiff.training.init import InitEntry

FAMILIES = Path(__file__).parents[2] / "configs" / "families"
UNET = dict(
    in_channels=4, out_channels=4, channels=8, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(1, 2), norm_groups=4,
)  # fmt: skip
LATENT = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def engine(heads=None, language=EpsilonDenoiser, schedule=None, **scale):
    torch.manual_seed(0)
    heads = heads or {"num_heads": 2}
    stage = AutoencoderKL(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, **{"scale": 0.18215} | scale
    )
    schedule = schedule or ScaledLinearSchedule()
    return DiffusionEngine(
        "image", language(UNet(**UNET, **heads)), schedule, UniformIndexSigmaSampler(), MSELoss(), DDIMSampler(2),
        first_stage=stage,
    ).eval()  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Writes a small random pipeline of diffusers', with its configs."""
    diffusers = peer("diffusers")

    def save(heads=2, scheduler="PNDM", scale=0.18215, latents_mean=None, **options):
        torch.manual_seed(1)
        network = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=heads,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            norm_num_groups=4,
        )  # fmt: skip
        stage = diffusers.AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=scale,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latents_mean=latents_mean,
        )  # fmt: skip
        network.save_pretrained(tmp_path / "unet")
        stage.save_pretrained(tmp_path / "vae")
        getattr(diffusers, f"{scheduler}Scheduler")(**LATENT | options).save_pretrained(tmp_path / "scheduler")
        return network.eval()

    return save


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quiet(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments, **options)


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, ours", [(2, {"num_heads": 2}), ((2, 4), {"head_dim": 4})])
def test_what_agrees_says_the_same_and_is_silent(theirs, ours, save, tmp_path):
    """Levels are counted backwards on the way up."""
    network, made = save(theirs), engine(ours)
    report = quiet(load_published, made, tmp_path)
    assert not report.otherwise and "otherwise" not in str(report)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    with torch.no_grad():
        said = made.denoiser.network(x, torch.tensor([3.0, 500.0]), Conditioning({"cross_attention": context}))
        torch.testing.assert_close(said, network(x, torch.tensor([3, 500]), context).sample, rtol=0, atol=1e-5)


def test_weights_with_another_number_of_heads_are_refused_and_nothing_is_changed(save, tmp_path):
    save((2, 4))
    made = engine({"num_heads": 2})
    before = copied(made)
    for into, folder in (("", tmp_path), ("denoiser.network", tmp_path), ("denoiser.network", tmp_path / "unet")):
        for act in (load_published, check_published):
            with pytest.raises(MismatchError, match=r"nothing was changed") as error:
                act(made, folder, into)
            lines = str(error.value).splitlines()
            where = "config.json" if folder.name == "unet" else "unet/config.json"
            # Of the second level: one transformer down, one in the middle, two up, each with two attentions.
            assert lines[1].startswith(f"  8 with 2 heads, and 4 by {where}: denoiser.network.") and len(lines) == 3
            assert "opened by its own name says nothing of heads" in lines[2]
    with pytest.raises(MismatchError, match="8 with 2 heads, and 4 by config.json: input_blocks"):
        load_published(made.denoiser.network, tmp_path / "unet")
    assert unchanged(made, before)
    quiet(load_published, made, tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "denoiser.network")
    assert not unchanged(made, before)


def test_heads_are_said_beside_what_else_does_not_fit(save, tmp_path):
    save(4)
    made = engine()
    made.denoiser.network.out[2] = torch.nn.Conv2d(8, 5, 3, padding=1)
    with pytest.raises(MismatchError) as error:
        load_published(made, tmp_path)
    assert "of another shape or type" in str(error.value) and "with 2 heads, and 4 by" in str(error.value)


def test_heads_of_attentions_that_are_left_alone_are_not_compared(save, tmp_path):
    save((2, 4))
    made = engine()
    ignore = ["*.input_blocks.3.1.*", "*.middle_block.1.*", "*.output_blocks.[01].1.*"]
    assert quiet(load_published, made, tmp_path, ignore=ignore).ignored


def test_a_network_without_a_context_says_how_long_a_head_is(tmp_path):
    diffusers = peer("diffusers")
    theirs = diffusers.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, out_channels=4, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    plain = UNET | {"context_dim": None, "attention_factors": (2,)}
    quiet(load_published, UNet(**plain, head_dim=4), tmp_path, given={"head_dim": 4})
    with pytest.raises(MismatchError, match=r"with 2 heads, and 4 by config\.json"):
        load_published(UNet(**plain, head_dim=8), tmp_path, given={"head_dim": 8})
    edit(tmp_path / "config.json", _class_name="UNet2DConditionModel")  # which says heads of transformers
    quiet(load_published, UNet(**plain, head_dim=8), tmp_path, given={"head_dim": 8})


def test_heads_of_a_controlnet(tmp_path):
    diffusers = peer("diffusers")
    diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2, norm_num_groups=4, conditioning_channels=1,
        conditioning_embedding_out_channels=(16, 32, 96, 256),
    ).save_pretrained(tmp_path)  # fmt: skip
    control = [controlling(UNet(**UNET, **heads)) for heads in ({"head_dim": 4}, {"num_heads": 2})]
    quiet(load_published, control[0], tmp_path)
    with pytest.raises(MismatchError, match=r"4 with 2 heads, and 4 by config\.json"):
        load_published(control[1], tmp_path)


# --- language, noise and scale -------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, options, message",
    [
        ({"prediction_type": "v_prediction"}, {}, "prediction_type is v_prediction, and the denoiser speaks epsilon"),
        ({}, {"language": VDenoiser}, r"prediction_type is epsilon, and the denoiser speaks v; .* type: epsilon"),
        ({"beta_end": 0.02}, {}, r"not those of the schedule, ScaledLinearSchedule: at row \d+ .* beta_end 0\.02"),
        ({"beta_schedule": "linear"}, {}, r"beta_schedule linear, beta_start 0\.00085, beta_end 0\.012"),
        ({"num_train_timesteps": 500}, {}, r"noise levels are 500, and those of the schedule.* are 1000"),
        ({"scale": 0.13025}, {}, r"vae/config\.json: scaling_factor is 0\.13025, and the scale of first_stage is 0"),
        ({"latents_mean": [0.0] * 4}, {}, "latents_mean and latents_std are of each channel, and first_stage has one"),
        ({}, {"shift": 0.1}, r"shift_factor is 0, and the shift of first_stage is 0\.1"),
    ],
)  # fmt: skip
def test_another_language_noise_or_scale_is_warned_of_and_loaded(said, options, message, save, tmp_path):
    save(**said)
    made, before = engine(**options), copied(engine(**options))
    for act in (check_published, load_published):
        assert unchanged(made, before)
        with pytest.warns(UserWarning, match=message) as caught:
            report = act(made, tmp_path)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert len(report.otherwise) == 1 and f"otherwise: {report.otherwise[0]}" in str(report)
    assert not unchanged(made, before)


def test_all_that_differs_is_one_warning(save, tmp_path):
    save(scheduler="DDIM", prediction_type="v_prediction", rescale_betas_zero_snr=True, scale=0.5)
    with pytest.warns(UserWarning) as caught:
        report = load_published(engine(), tmp_path)
    assert len(caught) == 1 and len(report.otherwise) == 3
    assert all(line in str(caught[0].message) for line in report.otherwise)
    assert "at row 999 sigma / alpha is inf there and 14.61 here" in str(report)


def test_a_warning_that_is_made_an_error_leaves_everything_as_it_was(save, tmp_path):
    save(prediction_type="v_prediction")
    made = engine()
    before = copied(made)
    with pytest.raises(UserWarning):
        quiet(load_published, made, tmp_path)
    assert unchanged(made, before)


def test_weights_to_start_from_are_compared_alike(save, tmp_path):
    save(2, prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="the denoiser speaks epsilon"):
        assert "otherwise: scheduler/" in InitEntry(tmp_path).load(engine()).line
    save((2, 4))
    with pytest.raises(MismatchError, match="8 with 2 heads, and 4 by"):
        InitEntry(tmp_path / "unet", "denoiser.network").load(engine())


def test_a_network_alone_is_not_compared_with_a_scheduler_and_a_first_stage_is_with_its_own_file(save, tmp_path):
    save(prediction_type="v_prediction", scale=0.5)
    made = engine()
    quiet(load_published, made, tmp_path, "denoiser.network")
    quiet(load_published, made.denoiser.network, tmp_path / "unet")
    for module, folder, into, name in (
        (made, tmp_path, "first_stage", "first_stage"),
        (made, tmp_path / "vae", "first_stage", "first_stage"),
        (made.first_stage, tmp_path / "vae", "", "AutoencoderKL"),
    ):
        with pytest.warns(UserWarning, match=f"scaling_factor is 0.5, and the scale of {name} is"):
            load_published(module, folder, into)


def test_what_is_not_there_or_not_known_says_nothing(save, tmp_path):
    save(4, prediction_type="v_prediction", scale=0.5)
    made = engine()
    files = [tmp_path / name for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")]
    kept = [file.read_text() for file in files]
    for file in files:
        edit(file, _class_name="Mine")
    quiet(load_published, made, tmp_path)
    for file, text in zip(files, kept, strict=True):
        file.write_text(text)
    edit(files[0], attention_head_dim=[2, "four", True], num_attention_heads=None)
    edit(files[1], scaling_factor=None, shift_factor=float("nan"))
    edit(files[2], prediction_type="mine", beta_start=[1], num_train_timesteps=1000)
    quiet(load_published, made, tmp_path)
    edit(files[0], attention_head_dim=10**400)
    edit(files[1], scaling_factor=10**400)
    edit(files[2], beta_start=0.00085, beta_schedule="theirs", num_train_timesteps=None)
    edit(files[0], attention_head_dim=None)
    quiet(load_published, made, tmp_path)
    for file in files:
        file.unlink()
    quiet(load_published, made, tmp_path)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, b"\xff"])
def test_what_is_no_config_is_an_error_that_names_the_file(file, text, save, tmp_path):
    save()
    made = engine()
    before = copied(made)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightFileError, match=f"{file}: .*take it away"):
        load_published(made, tmp_path)
    assert unchanged(made, before)


@pytest.mark.parametrize(
    "kind, said, language, is_other",
    [
        ("FlowMatchEulerDiscreteScheduler", {}, VelocityDenoiser, False),
        ("FlowMatchEulerDiscreteScheduler", {}, EpsilonDenoiser, True),
        ("EDMEulerScheduler", {}, EDMDenoiser, False),
        ("EDMEulerScheduler", {}, EpsilonDenoiser, True),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, VDenoiser, False),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
         VelocityDenoiser, False),
        ("PNDMScheduler", {}, EDMDenoiser, True),
    ],
)  # fmt: skip
def test_languages_beside_the_ones_of_latent_diffusion(kind, said, language, is_other):
    made = SimpleNamespace(denoiser=language(torch.nn.Identity()), schedule=CosineSchedule())
    found = list(other_noise(Config("here", kind, {"_class_name": kind, **said}), made))
    assert len(found) == is_other


# --- diffusers' own words ------------------------------------------------------------------------


def test_what_a_config_leaves_out_is_as_the_class_has_it():
    diffusers = peer("diffusers")
    for table in (HEADS, HEAD_LENGTHS, SCALES, SCHEDULERS):
        for name, defaults in table.items():
            theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
            assert {key: theirs[key].default for key in defaults} == dict(defaults), name


@pytest.mark.parametrize(
    "kind, options",
    [
        ("DDIM", LATENT), ("DDIM", LATENT | {"rescale_betas_zero_snr": True}), ("DDPM", {}),
        ("DDPM", {"beta_schedule": "squaredcos_cap_v2"}), ("EulerDiscrete", {"trained_betas": [0.1, 0.2, 0.3]}),
        ("LCM", {}), ("HeunDiscrete", {}), ("PNDM", {"rescale_betas_zero_snr": True}),
        ("CogVideoXDDIM", {}), ("CogVideoXDPM", {"rescale_betas_zero_snr": True}),
        ("CogVideoXDDIM", {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}),
    ],
)  # fmt: skip
def test_noise_levels_are_those_of_the_scheduler(kind, options):
    """A tenth of what counts as a difference, which float32 is good for."""
    kind = f"{kind}Scheduler"
    theirs = getattr(peer("diffusers"), kind).from_config(options)  # as from a file, with keys that its class ignores
    values = {**SCHEDULERS[kind], **options, "_class_name": kind}
    values["num_train_timesteps"] = len(theirs.alphas_cumprod)
    ours, theirs = _alphas_cumprod(values), theirs.alphas_cumprod.double()
    for a, b in ((ours, theirs), (1 - ours, 1 - theirs)):
        assert (a.sqrt() - b.sqrt()).abs().max() < SAME_LEVEL / 10


# --- the families, as published ------------------------------------------------------------------

SD = dict(_class_name="UNet2DConditionModel")
KL = dict(_class_name="AutoencoderKL")
EULER = dict(_class_name="EulerDiscreteScheduler", **LATENT, num_train_timesteps=1000, trained_betas=None)
SVD = {
    "unet": dict(_class_name="UNetSpatioTemporalConditionModel", num_attention_heads=[5, 10, 20, 20]),
    "vae": dict(_class_name="AutoencoderKLTemporalDecoder", scaling_factor=0.18215, force_upcast=True),
    "scheduler": EULER | dict(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
        use_karras_sigmas=True,
    ),
}  # fmt: skip
PNDM = dict(_class_name="PNDMScheduler", **LATENT, num_train_timesteps=1000, trained_betas=None, steps_offset=1)
STABLE_1 = {"unet": SD | dict(attention_head_dim=8), "vae": KL, "scheduler": PNDM}
STABLE_2 = {
    "unet": SD | dict(attention_head_dim=[5, 10, 20, 20], num_attention_heads=None),
    "vae": KL | dict(scaling_factor=0.18215),
}
SDXL = {
    "vae": KL | dict(scaling_factor=0.13025, force_upcast=True),
    "scheduler": EULER | {"prediction_type": "epsilon"},
}
COG = dict(
    _class_name="CogVideoXDDIMScheduler", **LATENT, num_train_timesteps=1000, prediction_type="v_prediction",
    rescale_betas_zero_snr=True, set_alpha_to_one=True, timestep_spacing="trailing",
)  # fmt: skip


def cogvideox(heads, scale, shift, **more):
    transformer = dict(_class_name="CogVideoXTransformer3DModel", num_attention_heads=heads, attention_head_dim=64)
    vae = dict(_class_name="AutoencoderKLCogVideoX", scaling_factor=scale, **more)
    return {"transformer": transformer, "vae": vae, "scheduler": COG | {"snr_shift_scale": shift}}


PUBLISHED = {
    "sd15": STABLE_1,
    "sd15_inpainting": STABLE_1,
    "sd21_base": STABLE_2 | {"scheduler": PNDM | {"prediction_type": "epsilon"}},
    "sd21": STABLE_2 | {"scheduler": PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}},
    "sdxl_base": SDXL | {"unet": SD | dict(attention_head_dim=[5, 10, 20])},
    "sdxl_refiner": SDXL | {"unet": SD | dict(attention_head_dim=[6, 12, 24, 24])},
    "svd": SVD,
    "svd_xt": SVD,
    "cogvideox_2b": cogvideox(30, 1.15258426, 3.0),
    "cogvideox_5b": cogvideox(48, 0.7, 1.0),
    "cogvideox_5b_i2v": cogvideox(48, 0.7, 1.0),
    "cogvideox_1_5_5b": cogvideox(48, 0.7, 1.0, invert_scale_latents=True),
    "cogvideox_1_5_5b_i2v": cogvideox(48, 0.7, 1.0, invert_scale_latents=True),
}


def family(name, *lines):
    with torch.device("meta"):
        return build(load_config(FAMILIES / f"{name}.yaml", overrides=list(lines))["engine"], "engine")


def as_diffusers(made, folder, configs):
    """An engine's names and shapes as a pipeline of diffusers' has them, with these configs and no weights."""
    for name, values in configs.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(values))
    state, header, order = made.state_dict(), {}, Counter()
    for part in recognise(state, "", {}).parts:
        tensors = {name: state[full] for name, full in part.names.items()}
        theirs = part.family.layout("diffusers").table(Told(tensors))(tensors)
        if part.slot == "condition_stage":  # one autoencoder there, with this one's convolution
            header |= {f"vae/{n}": v for n, v in theirs.items() if n.startswith("quant_conv.")}
        else:
            place = part.family.prefix("diffusers", part.slot, order=order[part.slot])
            header |= {place + name: value for name, value in theirs.items()}
            order[part.slot] += 1
    return WeightSource(folder, {}, header)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_is_what_its_published_folder_says(name, tmp_path):
    made = family(name)
    assert not quiet(check_published, made, as_diffusers(made, tmp_path, PUBLISHED[name])).otherwise


def test_a_family_for_another_is_seen(tmp_path):
    """Stable Diffusion 2.1 for pictures of 768 into the engine of 512, and with the heads of Stable Diffusion 1."""
    base = family("sd21_base")
    source = as_diffusers(base, tmp_path, PUBLISHED["sd21"])
    with pytest.warns(UserWarning, match="v_prediction, and the denoiser speaks epsilon; that is type: v"):
        check_published(base, source)
    eight = ["engine.denoiser.network.num_heads=8", "engine.denoiser.network.head_dim=null"]
    with pytest.raises(MismatchError, match="10 with 8 heads, and 5 by unet/config.json"):
        check_published(family("sd21_base", *eight), source)


@pytest.mark.parametrize(
    "name, folder, said, message",
    [
        ("sdxl_base", "unet", {"attention_head_dim": 10}, "with 20 heads, and 10 by unet/config.json"),
        ("svd", "unet", {"num_attention_heads": [5, 10, 10, 20]}, "with 20 heads, and 10 by unet/config.json"),
        ("cogvideox_2b", "transformer", {"num_attention_heads": 48}, "30 with 30 heads, and 48 by transformer/"),
    ],
)
def test_other_heads_of_a_published_network_are_seen(name, folder, said, message, tmp_path):
    made = family(name)
    configs = PUBLISHED[name] | {folder: PUBLISHED[name][folder] | said}
    with pytest.raises(MismatchError, match=message):
        check_published(made, as_diffusers(made, tmp_path, configs))


def test_cogvideox_5b_into_the_schedule_of_2b_is_seen():
    made = engine(language=VDenoiser, schedule=ZeroSNRSchedule(shift=3.0))
    (said,) = other_noise(Config("here", COG["_class_name"], COG | {"snr_shift_scale": 1.0}), made)
    assert "snr_shift_scale 1.0" in said
    assert not list(other_noise(Config("here", COG["_class_name"], COG | {"snr_shift_scale": 3.0}), made))


def test_levels_that_no_table_holds_are_not_compared_with_one():
    """Stable Video Diffusion's scheduler has betas that it does not go by."""
    made = engine(language=VDenoiser, schedule=ZeroSNRSchedule())
    said = SVD["scheduler"]
    assert not list(other_noise(Config("here", said["_class_name"], said), made))
    assert list(other_noise(Config("here", said["_class_name"], said | {"timestep_type": "discrete"}), made))
