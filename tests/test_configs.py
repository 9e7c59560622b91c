"""Every file in configs/ is a run that builds, trains a step and samples."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from vdiff.data import Loader
from vdiff.denoisers import VDenoiser
from vdiff.engine import AutoencoderEngine
from vdiff.networks import sinusoidal
from vdiff.process import RowKeys
from vdiff.registry import ConfigError, build, load_config
from vdiff.training.groups import select
from vdiff.training.run import check_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FAMILIES = sorted((ROOT / "configs" / "families").glob("*.yaml"))


def own_data(file, folder):
    """Where a config wants one's own files: some to train on."""
    if file.stem != "image_folder":
        return []
    for i in range(4):
        Image.linear_gradient("L").rotate(90 * i).save(folder / f"{i}.png")
    return [f"data.train.folder={folder}", "engine.sampler.num_steps=2"]  # 25 of this size are long on a CPU


def test_there_are_configs():
    assert {"digits_edm", "digits_flow", "digits_v"} <= {c.stem for c in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_config_builds_on_the_meta_device(file):
    plans = check_run(load_config(file))
    with torch.device("meta"):
        engine = build(load_config(file)["engine"], "engine")
    assert all(p.is_meta for p in engine.parameters())
    assert plans["training"].make().num_steps >= 1


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_config_trains_and_samples(file, tmp_path):
    plans = check_run(load_config(file, overrides=own_data(file, tmp_path)))
    engine, data = plans["engine"].make(), plans["data"]["train"].make()
    batch, training = Loader(data, 4).batch(0), plans["training"].make()
    select(engine, training.train, training.optimizer, new=[name for name, _ in engine.named_parameters()]).set_modes()
    values = engine(batch)
    values.per_row.mean().backward()
    assert torch.isfinite(values.per_row).all()
    if isinstance(engine, AutoencoderEngine):
        pixels = data[0][engine.input_key][None]
        assert engine.reconstruct(pixels).shape == pixels.shape
        return
    out = engine.sample({e.reads: batch[e.reads][:2] for e in engine.conditioner.embedders}, num=2)
    assert out.shape == (2, *engine.sample_shape) and torch.isfinite(out).all()


@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_every_family_builds_in_full_size_on_the_meta_device(file):
    with torch.device("meta"):
        engine = build(load_config(file)["engine"], "engine")
    assert all(p.is_meta for p in engine.parameters())


SMALL_SVD = [
    "sample_shape=[3, 2, 16, 16]", "first_stage.channels=8", "first_stage.norm_groups=8",
    "first_stage.num_res_blocks=1", "first_stage.chunk=1", "sampler.num_steps=2",
    "conditioner.embedders.3.first_stage={type: autoencoder_kl, channels: 8, norm_groups: 8, num_res_blocks: 1}",
    "conditioner.embedders.0.arch={embed_dim: 16, width: 32, head_width: 16, layers: 1, patch_size: 8, image_size: 16}",
    "denoiser.network.channels=16", "denoiser.network.context_dim=16", "denoiser.network.norm_groups=8",
    "denoiser.network.channel_mult=[1, 2]", "denoiser.network.attention_factors=[1]", "denoiser.network.head_dim=8",
    "denoiser.network.num_res_blocks=1",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:OpenCLIPImageEmbedder")
def test_svd_samples_in_small_and_guides_pictures_alone():
    file = ROOT / "configs" / "families" / "svd.yaml"
    engine = build(load_config(file, overrides=[f"engine.{line}" for line in SMALL_SVD])["engine"], "engine").eval()
    torch.nn.init.normal_(engine.denoiser.network.out[2].weight)  # a new network says zero
    fields = {"image": torch.rand(2, 3, 16, 16), "fps": torch.tensor([7.0, 10.0])}
    out = engine.sample(fields, num=2)
    assert out.shape == (2, 3, 2, 16, 16) and torch.isfinite(out).all()
    cond = engine.conditioner(fields)
    told = torch.tensor([[6.0, 127.0, 0.02], [9.0, 127.0, 0.02]])  # fps less one, motion, noise, as released
    assert torch.equal(cond["vector"], sinusoidal(told, 256).flatten(1))
    assert torch.equal(cond["vector"], cond.null["vector"])  # guidance leaves numbers alone
    assert (cond.null["concat"] == 0).all() and (cond.null["cross_attention"] == 0).all()


UNET = [
    *(f"denoiser.network.{x}" for x in ("channels=16", "channel_mult=[1, 2]", "attention_factors=[1]")),
    *(f"denoiser.network.{x}" for x in ("norm_groups=8", "num_res_blocks=1", "context_dim=16")),
]  # fmt: skip
VAE = ["channels=8", "norm_groups=8", "num_res_blocks=1", "channel_mult=[1, 2]"]
CLIP = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2, projection_dim: 16}"
TEXT = "{embed_dim: 16, width: 16, heads: 2, layers: 2}"
EYE = "{embed_dim: 16, width: 32, head_width: 16, layers: 1, patch_size: 8, image_size: 16}"
T5 = "{d_model: 16, d_ff: 16, num_layers: 1, num_heads: 2, d_kv: 8, vocab_size: 99, feed_forward_proj: gated-gelu}"
WORDS, PICTURE = {"caption": ["a cat", "a dog"]}, torch.rand(2, 3, 16, 16) * 2 - 1
SIZES = {name: torch.full((2, 2), 16.0) for name in ("original_size", "crop_top_left", "target_size")}
# Family: how it is made small, and what it is told.
SMALL = {
    "sd15_inpainting": (
        [*UNET, "denoiser.network.num_heads=2", f"conditioner.embedders.0.arch={CLIP}", "sample_shape=[3, 16, 16]"],
        WORDS | {"mask": torch.ones(2, 1, 8, 8), "masked_image": PICTURE},
    ),
    "sdxl_base": (
        [
            *UNET, "denoiser.network.context_dim=32", "denoiser.network.transformer_depth=1",
            "denoiser.network.head_dim=8", "denoiser.network.vector_dim=1552", "sample_shape=[3, 16, 16]",
            f"conditioner.embedders.0.arch={CLIP}", f"conditioner.embedders.1.arch={TEXT}",
        ],
        WORDS | SIZES,
    ),
    "dynamicrafter_1024": (
        [
            *UNET, "denoiser.network.head_dim=8", "denoiser.network.image_tokens=4", "sample_shape=[3, 2, 16, 16]",
            f"conditioner.embedders.0.arch={TEXT}", f"conditioner.embedders.1.tower.arch={EYE}",
            "conditioner.embedders.1.resampler={in_dim: 32, out_dim: 16, num_queries: 8, dim: 16, depth: 1, "
            "num_heads: 2, head_dim: 8}",
        ],
        WORDS | {"image": PICTURE, "fps": torch.full((2,), 10.0)},
    ),
    "cogvideox_5b_i2v": (
        [
            f"conditioner.embedders.0.arch={T5}", "conditioner.embedders.0.length=6",
            *(f"denoiser.network.{x}" for x in ("width=32", "depth=1", "num_heads=2", "text_dim=16", "text_length=6")),
            "denoiser.network.trained_size=[8, 8]", "denoiser.network.learned_size=[2, 8, 8]",
            "first_stage.time_factor=2", "sample_shape=[3, 3, 16, 16]",
        ],
        {"caption": torch.tensor([[5, 6, 1], [7, 1, 0]]), "image": PICTURE},
    ),
    "cogvideox_1_5_5b_i2v": (  # three latents, and one in front to fill patches of two
        [
            f"conditioner.embedders.0.arch={T5}", "conditioner.embedders.0.length=6",
            *(f"denoiser.network.{x}" for x in ("width=32", "depth=1", "num_heads=2", "text_dim=16", "text_length=6")),
            "first_stage.time_factor=2", "sample_shape=[3, 5, 16, 16]",
        ],
        {"caption": torch.tensor([[5, 6, 1], [7, 1, 0]]), "image": PICTURE},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("family", SMALL)
def test_families_sample_in_small_and_guidance_moves_what_it_should(family):
    lines, fields = SMALL[family]
    lines = [*lines, *(f"first_stage.{line}" for line in VAE), "sampler.num_steps=2"]
    file = ROOT / "configs" / "families" / f"{family}.yaml"
    engine = build(load_config(file, overrides=[f"engine.{line}" for line in lines])["engine"], "engine").eval()
    for param in engine.denoiser.network.parameters():
        if not param.any():  # a new network says zero
            torch.nn.init.normal_(param, std=0.1)
    out = engine.sample(fields, num=2)
    assert out.shape == (2, *engine.sample_shape) and torch.isfinite(out).all()
    cond = engine.conditioner(fields)
    assert not torch.equal(cond["cross_attention"], cond.null["cross_attention"])
    if "concat" in cond:
        assert torch.equal(cond["concat"], cond.null["concat"])


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_dynamicrafter_loses_text_and_pictures_as_published():
    """One u a row: below 0.1 there is no text, from 0.05 to 0.15 no picture; latents there always are."""
    lines, fields = SMALL["dynamicrafter_1024"]
    lines = [*lines, *(f"first_stage.{line}" for line in VAE)]
    file = ROOT / "configs" / "families" / "dynamicrafter_1024.yaml"
    made = build(load_config(file, overrides=[f"engine.{line}" for line in lines])["engine"], "engine").conditioner
    rows = 2000
    text, tokens, fps, latents = made._kept(RowKeys(0, 0, tuple(range(rows)), tuple(range(rows)), rows))
    shares = [tokens & ~text, ~text & ~tokens, text & ~tokens, text & tokens, fps & latents]
    assert [share.double().mean().item() for share in shares] == pytest.approx([0.05, 0.05, 0.05, 0.85, 1], abs=0.015)


@pytest.mark.parametrize("family, frames, steps, scales", [("svd", 14, 25, (1.0, 2.5)), ("svd_xt", 25, 30, (1.5, 3.0))])
def test_svd_samples_as_released(family, frames, steps, scales):
    engine = load_config(ROOT / "configs" / "families" / f"{family}.yaml")["engine"]
    assert (engine["sample_shape"][1], engine["sampler"]["num_steps"]) == (frames, steps)
    assert (engine["guider"]["min_scale"], engine["guider"]["max_scale"]) == scales


@pytest.mark.parametrize("family, latents, of_nine", [("cogvideox_5b_i2v", 13, 3), ("cogvideox_1_5_5b_i2v", 22, 4)])
@pytest.mark.parametrize("fewer", [False, True])
def test_the_latents_of_a_picture_have_the_frames_of_the_videos(family, latents, of_nine, fewer):
    """(F - 1) / 4 + 1, and in 1.5 one in front, whatever F the config is overridden with."""
    lines = ["engine.sample_shape=[3, 9, 480, 720]"] if fewer else []
    with torch.device("meta"):
        engine = build(load_config(ROOT / "configs" / "families" / f"{family}.yaml", overrides=lines)["engine"])
    picture = engine.conditioner.embedders[1]
    assert picture._num_latents((1, 3, 480, 720), picture.frames) == (of_nine if fewer else latents)


def test_every_family_trains_on_samples_of_its_first_stage_as_it_was_trained():
    for file in sorted((ROOT / "configs" / "families").glob("*.yaml")):
        assert load_config(file)["engine"]["first_stage"]["trains_on"] == "sample", file.name


@pytest.mark.parametrize("family", ["cogvideox_1_5_5b", "cogvideox_1_5_5b_i2v"])
def test_cogvideox_1_5_samples_81_frames_from_22_latents(family):
    with torch.device("meta"):
        engine = build(load_config(ROOT / "configs" / "families" / f"{family}.yaml")["engine"], "engine")
    assert engine.sample_shape == (3, 81, 768, 1360)
    assert engine.first_stage.latent_shape(engine.sample_shape) == (16, 22, 96, 170)


def test_svd_is_told_and_read_as_published():
    """Of x0 + s noise: c_skip 1 / (s^2 + 1), c_out -s / sqrt(s^2 + 1), c_in 1 / sqrt(s^2 + 1), c_noise ln(s) / 4."""
    config = load_config(ROOT / "configs" / "families" / "svd.yaml")["engine"]
    seen = {}

    class Said(torch.nn.Module):
        def forward(self, x, c_noise, cond):
            seen.update(x=x, c_noise=c_noise)
            return torch.full_like(x, 0.7)

    schedule = build(config["schedule"], "schedule")
    denoiser = VDenoiser(Said(), config["denoiser"]["c_noise"])
    sigma, x = torch.tensor([0.02, 3.0, 700.0], dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    s, level = sigma[:, None], schedule.at_ratio(sigma)
    x0 = denoiser(x * level.alpha[:, None], level).x0
    torch.testing.assert_close(x0, x / (s**2 + 1) - 0.7 * s / (s**2 + 1).sqrt())
    torch.testing.assert_close(seen["x"], x / (s**2 + 1).sqrt())
    torch.testing.assert_close(seen["c_noise"], sigma.log() / 4)


def test_a_typo_four_levels_down_is_named_with_its_line(tmp_path):
    text = (ROOT / "configs" / "base" / "digits.yaml").read_text().replace("num_heads: 4", "num_head: 4")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "digits.yaml").write_text(text)
    (tmp_path / "run.yaml").write_text((ROOT / "configs" / "digits_edm.yaml").read_text())
    line = next(i for i, words in enumerate(text.splitlines(), 1) if "num_head:" in words)
    with pytest.raises(ConfigError) as error:
        check_run(load_config(tmp_path / "run.yaml"))
    assert f"digits.yaml:{line}: engine.denoiser.network.num_head: UNet takes no 'num_head'." in str(error.value)
    assert "Did you mean 'num_heads'?" in str(error.value)
