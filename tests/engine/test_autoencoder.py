"""The autoencoder's engine, and a first stage inside a diffusion model."""

import json
import math

import pytest
import torch

from vdiff.data import Digits, Loader
from vdiff.denoisers import EDMDenoiser
from vdiff.engine import AutoencoderEngine, DiffusionEngine
from vdiff.engine.autoencoder import psnr
from vdiff.evaluation import latent_statistics, reconstruction_figures
from vdiff.first_stages import AutoencoderKL, IdentityFirstStage, Reconstruction, VQAutoencoder
from vdiff.losses import MSELoss
from vdiff.networks import UNet
from vdiff.process import EDMSchedule, LogNormalSigmaSampler
from vdiff.registry import ConfigError, build, load_config, save_config
from vdiff.samplers import HeunSampler
from vdiff.training import EMA, AdamW, Checkpointing, JsonlLogger, Logging, Trainer, Validation, train
from vdiff.training.groups import select

TINY = dict(in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2, norm_groups=4)


def engine(first_stage=None, **options):
    return AutoencoderEngine("image", first_stage or AutoencoderKL(**TINY), **options)


def diffusion(**options):
    network = UNet(
        2, 2, channels=8, channel_mult=(1,), num_res_blocks=1, attention_factors=(), num_heads=1, norm_groups=4
    )
    return DiffusionEngine(
        "image", EDMDenoiser(network), EDMSchedule(), LogNormalSigmaSampler(), MSELoss(), HeunSampler(2),
        first_stage=AutoencoderKL(**TINY, **options), sample_shape=(1, 8, 8),
    )  # fmt: skip


def trainer(num_steps, **options):
    defaults = dict(
        batch_size=8, optimizer=AdamW(lr=2e-3), ema=EMA(0.9), checkpoint=Checkpointing(every=2),
        validation=Validation(every=2, num_batches=1, num_pictures=3),
        logging=Logging(every=1, loggers=[JsonlLogger()]),
        device="cpu",
    )  # fmt: skip
    return Trainer(num_steps, **(defaults | options))


@pytest.fixture(scope="module")
def loader():
    return Loader(Digits("test"), 8, seed=3)


# --- the loss ------------------------------------------------------------------------------------


def test_psnr_is_that_of_its_definition():
    truth = torch.zeros(3, 1, 4, 4)
    images = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 9.0), torch.zeros(1, 4, 4)])
    # errors of 0.2 and, clipped to the range, of 1, in a range of 2; equal pictures are held at 100 dB
    want = [10 * math.log10(4 / 0.04), 10 * math.log10(4), 100.0]
    assert psnr(images, truth, (-1.0, 1.0)).tolist() == pytest.approx(want, rel=1e-5)


def test_the_loss_is_the_sum_it_says(loader):
    """Of two pictures: a constant error has no gradient, a step between two columns has one pair of neighbours."""
    flat, step = torch.full((1, 4, 4), 0.5), torch.zeros(1, 4, 4)
    step[..., 2:] = 1.0
    found = Reconstruction(torch.stack([flat, step]), torch.ones(2, 2, 2, 2), {"kl": torch.tensor([1.0, 2.0])})
    for name, of in (("l1", lambda d: d), ("l2", lambda d: d**2)):
        one = engine(reconstruction=name, gradient=3.0, penalties={"kl": 0.1})
        values = one.compare(found, torch.zeros(2, 1, 4, 4))
        # of 12 horizontal differences 4 are 1
        want = [of(0.5) + 0.1 * 1, 0.5 * of(1.0) + 3 * 4 / 12 + 0.1 * 2]
        assert values.per_row.tolist() == pytest.approx(want)
        assert values.metrics["latent_square"].tolist() == [1, 1]


def test_coarser_scales_see_coarser_edges():
    """A checkerboard's error has edges at the finest scale only."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    found = Reconstruction(board[None, None], torch.zeros(1, 2), {})
    losses = [
        engine(gradient=1.0, gradient_scales=n).compare(found, torch.zeros(1, 1, 8, 8)).metrics["gradient"].item()
        for n in (1, 2)
    ]
    assert losses == [4.0, 2.0]
    with pytest.raises(ValueError, match="take fewer scales"):
        engine(gradient_scales=4).compare(found, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("first_stage", [AutoencoderKL(**TINY), VQAutoencoder(16, **TINY)], ids=["kl", "vq"])
def test_the_gradient_reaches_every_parameter(first_stage, loader):
    one = engine(first_stage).train()
    values = one(loader.batch(0))
    assert values.per_row.shape == (8,) and {"psnr", "latent_mean", *first_stage.penalties} <= set(values.metrics)
    values.per_row.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in one.named_parameters() if "attn_1.k.bias" not in name)


def test_training_draws_by_the_keys_and_eval_does_not_draw(loader):
    one, batch = engine().train(), loader.batch(0)
    assert torch.equal(one(batch).per_row, one(batch).per_row)
    assert not torch.equal(one(batch).per_row, one(batch | {"step": 1}).per_row)
    one.eval()
    assert torch.equal(one(batch).per_row, one(batch | {"step": 1}).per_row)


def test_a_video_trains_like_its_frames():
    one = engine().eval()
    video = torch.rand(2, 1, 3, 8, 8) * 2 - 1
    frames = video.transpose(1, 2).flatten(0, 1)
    a = one({"image": video})
    b = one({"image": frames})
    assert torch.allclose(a.per_row, b.per_row.view(2, 3).mean(1), atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(first_stage=IdentityFirstStage()), "IdentityFirstStage has nothing to train"),
        (dict(penalties={"kll": 1.0}), "no penalty 'kll'. Did you mean 'kl'"),
        (dict(reconstruction="huber"), "'l1' or 'l2'"),
        (dict(gradient=-1.0), "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        engine(**options)


# --- a run of its own ----------------------------------------------------------------------------


def test_it_trains_in_the_same_loop_and_is_kept_like_any_run(tmp_path, loader):
    """And a run told to stop half way ends with the same weights."""
    data = {"train": Digits("train"), "validation": Digits("test")}
    torch.manual_seed(5)
    whole = engine()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    result = trainer(4).fit(whole, data, tmp_path / "whole")
    assert {"validation/psnr", "validation/ema/psnr", "train/kl"} <= set(result.figures)
    assert [f.name for f in sorted((tmp_path / "whole" / "pictures").iterdir())] == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    for num_steps in (2, 4):
        half = engine()
        half.load_state_dict(start)
        trainer(num_steps).fit(half, data, tmp_path / "halves")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in half.state_dict().items())


def test_a_few_steps_bring_reconstructions_nearer(loader):
    torch.manual_seed(0)
    one, optimizer = engine().train(), None
    optimizer = torch.optim.AdamW(one.parameters(), lr=5e-3)
    before = reconstruction_figures(one, Digits("test")).figures
    for step in range(40):
        optimizer.zero_grad()
        one(loader.batch(step)).per_row.mean().backward()
        optimizer.step()
    after = reconstruction_figures(one, Digits("test"))
    assert after.figures["psnr"] > before["psnr"] + 3 and after.figures["l1"] < before["l1"]
    assert after.figures["psnr_worst"] < after.figures["psnr"] and after.inputs.shape == after.reconstructions.shape


def test_the_measured_scale_and_shift_give_unit_variance():
    one, data = engine(), Digits("test")
    found = latent_statistics(one, data, batch_size=100)
    moved = AutoencoderKL(**TINY, scale=1 / found["latent_std"], shift=found["latent_mean"])
    moved.load_state_dict(one.first_stage.state_dict())
    with torch.no_grad():
        z = moved.encode(data.images)
    assert z.mean().item() == pytest.approx(0, abs=1e-4) and z.std().item() == pytest.approx(1, abs=1e-3)
    # and says the same of the code, whatever the scale
    assert latent_statistics(engine(moved), data) == pytest.approx(found, rel=1e-4)


def test_compiling_it_compiles_both_halves(loader):
    one, batch = engine().eval(), loader.batch(0)
    plain = one(batch).per_row
    one.compile(backend="eager", fullgraph=True)
    assert torch.equal(one(batch).per_row, plain)
    assert one.first_stage.encoder._compiled_call_impl and one.first_stage.decoder._compiled_call_impl


# --- inside a diffusion model --------------------------------------------------------------------


def test_a_diffusion_model_leaves_its_first_stage_as_it_is(tmp_path):
    """Neither gradient nor decay nor average touches it; the checkpoint has it, so that a run needs no other."""
    one = diffusion(scale=2.0)
    before = {name: value.clone() for name, value in one.first_stage.state_dict().items()}
    data = {"train": Digits("train"), "validation": Digits("test")}
    loop = trainer(3, optimizer=AdamW(lr=1e-2, weight_decay=0.5))
    loop.fit(one, data, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in one.first_stage.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in one.first_stage.parameters())
    assert not one.first_stage.training
    assert not any(name.startswith("first_stage.") for name in loop.ema.state_dict())
    from vdiff.checkpoints import find_checkpoint, read

    files, _ = read(find_checkpoint(tmp_path))
    assert {f"first_stage.{name}" for name in before} <= set(files["model"])
    assert not any("first_stage." in name for name in (*files["ema"], *files["optimizer"]))


def test_a_first_stage_trains_if_it_is_named():
    from vdiff.training import TrainGroup

    one = diffusion()
    chosen = select(one, [TrainGroup("first_stage.decoder"), TrainGroup("denoiser")], AdamW())
    assert any(name.startswith("first_stage.decoder.") for name in chosen.trained)
    assert not any(name.startswith("first_stage.encoder.") for name in chosen.trained)


def test_latents_are_sampled_in_their_own_shape():
    one = diffusion()
    assert one.sample(num=2, decode=False).shape == (2, 2, 4, 4) and one.sample(num=2).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="the height 9 is no multiple of 2"):
        one.sample(num=1, shape=(1, 9, 8))


# --- one config for both -------------------------------------------------------------------------

FIRST_STAGE = {"type": "autoencoder_kl", **TINY, "channel_mult": [1, 2]}
SHORT = {"num_steps": 2, "batch_size": 8, "ema": {"decay": 0.5}, "device": "cpu"}
SHORT |= {"logging": {"loggers": ["jsonl"]}, "validation": {"num_batches": 1, "num_pictures": 2}}


@pytest.fixture
def configs(tmp_path):
    """An autoencoder's run file and that of a latent model which starts from it."""
    data = {name: {"type": "digits", "split": split} for name, split in (("train", "train"), ("validation", "test"))}
    first = {"engine": {"type": "autoencoder", "input_key": "image", "first_stage": FIRST_STAGE}}
    network = dict(type="unet", in_channels=2, out_channels=2, channels=8, channel_mult=[1], num_res_blocks=1)
    network |= dict(attention_factors=[], num_heads=1, norm_groups=4)
    second = {
        "type": "diffusion", "input_key": "image", "first_stage": FIRST_STAGE, "schedule": "edm",
        "sigma_sampler": "log_normal", "denoiser": {"type": "edm", "network": network}, "loss": "mse",
        "sampler": {"type": "heun", "num_steps": 2}, "sample_shape": [1, 8, 8],
    }  # fmt: skip
    init = [{"file": "runs/first", "into": "first_stage", "config": "first.yaml"}]
    save_config(first | {"data": data, "training": SHORT}, tmp_path / "first.yaml")
    save_config({"engine": second, "data": data, "training": SHORT | {"init": init}}, tmp_path / "second.yaml")
    return tmp_path


def test_a_run_trains_first_what_it_starts_from(configs):
    runs = configs / "runs"
    train(load_config(configs / "second.yaml"), runs / "second")
    first, second = AutoencoderEngine.load(runs / "first"), DiffusionEngine.load(runs / "second")
    want = first.first_stage.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in second.first_stage.state_dict().items())
    assert "into first_stage" in (runs / "second" / "report.txt").read_text()
    # a run needs what it started from no longer, and a finished one is taken as it is
    log = (runs / "first" / "log.jsonl").read_text()
    train(load_config(configs / "second.yaml"), runs / "third")
    assert [json.loads(line)["step"] for line in log.splitlines() if "train/loss" in line] == [2]
    assert (runs / "first" / "log.jsonl").read_text() == log
    (runs / "first").rename(runs / "elsewhere")
    train(load_config(runs / "second" / "config.yaml", interpolate=False), runs / "second")
    assert not (runs / "first").exists()


def test_a_run_from_another_autoencoder_is_refused(configs):
    train(load_config(configs / "first.yaml", overrides=["engine.gradient=2.0"]), configs / "runs" / "first")
    with pytest.raises(ConfigError, match="engine.gradient: 2.0 there"):
        train(load_config(configs / "second.yaml"), configs / "runs" / "second")


def test_the_command_line_evaluates_reconstructions_and_draws_no_samples(configs, capsys):
    from vdiff.cli import main

    run = configs / "runs" / "first"
    train(load_config(configs / "first.yaml"), run)
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    figures = json.loads((run / "evaluation.json").read_text())
    assert f"scale: {1 / figures['latent_std']:.4g}" in said and figures["psnr"] > 0
    assert (run / "reconstructions.png").is_file()
    assert main(["sample", str(run)]) == 2 and "draws no samples" in capsys.readouterr().err


def test_the_engine_is_built_from_a_config():
    one = build({"type": "autoencoder", "input_key": "image", "first_stage": {"type": "vq", "num_words": 8}}, "engine")
    assert isinstance(one.first_stage, VQAutoencoder) and one.penalties == {"codebook": 1.0, "commitment": 0.25}
