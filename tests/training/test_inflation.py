"""A run that starts from an image network's run and trains what is new."""

import shutil

import pytest
import torch
from torch import nn

from vdiff.checkpoints import UnknownFamilyError, convert_checkpoint, open_weights, read, read_run_weights, save_weights
from vdiff.engine import DiffusionEngine
from vdiff.hooks import attached
from vdiff.mixins import LoRA
from vdiff.registry import ConfigError, load_config
from vdiff.training import AdamW, InitEntry, TrainGroup, read_log, select, train
from vdiff.training.init import initialize

NETWORK = (
    "in_channels: 1, out_channels: 1, channels: 8, channel_mult: [1], num_res_blocks: 1, norm_groups: 4, "
    "attention_factors: [1], num_heads: 2, context_dim: 8, linear_projection: true"
)
IMAGES = """
engine:
  type: diffusion
  input_key: image
  sample_shape: [1, 8, 8]
  conditioner:
    type: embedders
    embedders: [{type: class_label, reads: label, feeds: cross_attention, num_classes: 10, width: 8, drop: 0.1}]
  schedule: {type: edm}
  sigma_sampler: {type: log_normal}
  denoiser: {type: edm, network: {type: unet, %s}}
  loss: {type: mse}
  sampler: {type: heun, num_steps: 2}
data:
  train: {type: digits, split: train}
training:
  num_steps: 2
  batch_size: 4
  ema: {decay: 0.5}
  device: cpu
  logging: {every: 1, loggers: [jsonl]}
"""
VIDEOS = """
base: images.yaml
engine:
  input_key: video
  sample_shape: [1, 2, 10, 10]
  denoiser: {network: {type: video_unet, dropout: 0.1, %s}}
data:
  train: {type: moving_digits, num_frames: 2, size: 10, travel: [0, 0], paths: 1}
training:
  num_steps: 4
  optimizer: {type: adamw, lr: 1e-2}
  checkpoint: {every: 2}
  init: [{file: images, config: images.yaml, inflate: true}]
  train: [{on: new, lr: 2e-2}]
"""


def config(folder, *overrides):
    (folder / "images.yaml").write_text(IMAGES % NETWORK)
    (folder / "videos.yaml").write_text(VIDEOS % NETWORK)
    return load_config(folder / "videos.yaml", overrides=overrides)


def is_over_time(name):
    return ".time_" in name and "time_embed" not in name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run on images and, made of it, one on videos that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder), folder / "videos")
    return folder


def test_image_layers_stay_bit_for_bit_and_only_what_is_new_is_in_the_optimizer(whole):
    images, _ = read_run_weights(whole / "images")
    for weights in ("raw", "ema"):
        videos, folder = read_run_weights(whole / "videos", weights)
        new = {name for name in videos if is_over_time(name)}
        assert images.keys() == videos.keys() - new and len(new) > 50
        assert all(torch.equal(images[name], videos[name]) for name in images)
    files, state = read(folder)
    assert {name.rpartition("/")[0] for name in files["optimizer"]} == new == set(state["new"])
    assert state["lr"] == [2e-2, 2e-2]
    engine = DiffusionEngine.from_config(config(whole))
    begun = engine.state_dict()
    moved = [name for name in new if not torch.equal(begun[name], videos[name])]
    assert any("mix_factor" in name for name in moved) and len(moved) > 50


def test_the_report_says_what_is_new_and_what_is_frozen(whole):
    lines = (whole / "videos" / "report.txt").read_text().splitlines()
    (said,) = (line for line in lines if line.startswith("Initialised: "))
    num = sum(value.numel() for name, value in read_run_weights(whole / "videos")[0].items() if is_over_time(name))
    tensors = 5 * (10 + 1) + 4 * (26 + 1 + 4)  # of residual blocks and of transformers: stack, mixer, positions
    assert said.startswith("Initialised: images: init: ")
    assert f"; new: {tensors} tensors, {num:,} parameters: *.time_stack.* (154), *.time_mixer.* (9), " in said
    (row,) = (line.split() for line in lines if line.startswith(" new "))
    assert row == ["new", f"{tensors}", f"{num:,}", "0.02", "0.01"]


def test_a_video_is_at_first_so_many_images_to_the_whole_engine(whole):
    """Over two frames, at the same noise: a frame is to the inflated network what an image is."""
    videos = DiffusionEngine.from_config(config(whole)).eval()
    images = DiffusionEngine.load(whole / "images").eval()
    initialize(videos, [InitEntry(whole / "images", inflate=True)])
    x = torch.randn(3, 1, 2, 10, 10, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([3, 1, 7])
    with torch.no_grad():
        level = videos.schedule.at_ratio(torch.tensor([0.2, 1.0, 5.0]))
        said = videos.denoiser(x, level, videos.conditioner({"label": label})).x0
        for frame in range(2):
            alone = images.denoiser(x[:, :, frame], level, images.conditioner({"label": label})).x0
            assert (said[:, :, frame] - alone).abs().max() < 2e-6


def test_a_run_that_goes_on_trains_the_same_and_needs_no_file_it_started_from(whole, tmp_path):
    """The meaning of ``new`` is recorded with the checkpoint; both halves end, bit for bit, where the whole ends."""
    train(config(tmp_path, "training.num_steps=2"), tmp_path / "videos")
    shutil.rmtree(tmp_path / "images")
    torch.manual_seed(5)  # global randomness has no say
    train(config(tmp_path), tmp_path / "videos")
    assert not (tmp_path / "images").exists()
    for name in ("model", "ema", "optimizer"):
        one, other = (
            read(folder / "videos" / "checkpoints" / "step-00000004")[0][name] for folder in (whole, tmp_path)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [[e["train/loss"] for e in read_log(f / "videos" / "log.jsonl")] for f in (whole, tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with pytest.raises(ConfigError, match="training.train"):
        train(config(tmp_path, "training.train=null", "training.num_steps=5"), tmp_path / "videos")


def test_a_file_of_the_network_alone_leaves_the_conditioner_new(whole, tmp_path):
    """As Stable Diffusion's original checkpoint into the network of videos: its other parts are left out."""
    images, begin = read_run_weights(whole / "images")[0], "denoiser.network."
    published = {f"model.diffusion_model.{n.removeprefix(begin)}": v for n, v in images.items() if n.startswith(begin)}
    save_weights(tmp_path / "sd.safetensors", published | {"first_stage_model.quant_conv.weight": torch.ones(1)})
    convert_checkpoint(open_weights(tmp_path / "sd.safetensors"), tmp_path / "diffusers", "diffusers", parts=["unet"])
    for file in ("sd.safetensors", "diffusers"):
        engine = DiffusionEngine.from_config(config(whole))
        new = initialize(engine, [InitEntry(tmp_path / file, into="denoiser.network", inflate=True)]).new
        assert {name for name in new if not is_over_time(name)} == {"conditioner.embedders.0.table.weight"}
        assert torch.equal(engine.denoiser.network.out[2].weight, images["denoiser.network.out.2.weight"])
    with pytest.raises(UnknownFamilyError, match="looked for first_stage.; it holds denoiser.network.* .unet, sgm"):
        initialize(engine, [InitEntry(tmp_path / "sd.safetensors", into="first_stage", inflate=True)])


def test_a_first_entry_may_have_its_own_part_of_the_rest(whole):
    """First match wins, as ever: here the whole network learns, but what is old a hundred times slower."""
    engine = DiffusionEngine.from_config(config(whole))
    new = initialize(engine, [InitEntry(whole / "images", inflate=True)]).new
    entries = [TrainGroup("new"), TrainGroup("denoiser", lr=1e-5)]
    selection = select(engine, entries, AdamW(lr=1e-3), new)
    assert [(row.name, row.num_tensors) for row in selection.rows][0] == ("new", len(new))
    assert {name for name in selection.trained if not is_over_time(name)} == {
        name for name, _ in engine.denoiser.named_parameters(prefix="denoiser") if not is_over_time(name)
    }


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.tower = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


def saved(folder, **tensors):
    save_weights(folder / "some.safetensors", {name.replace("_", "."): value for name, value in tensors.items()})
    return folder / "some.safetensors"


def test_new_is_what_no_entry_fills_and_no_module_freezes_with_mixins_among_it(tmp_path):
    """Ignored names are not filled; a tower that is frozen and reads a file of its own is not new."""
    host = Host()
    LoRA(rank=1, on="body", name="small").attach(host)
    file = saved(tmp_path, weight=torch.ones(2, 2), bias=torch.ones(2))
    body = InitEntry(file, into="body", ignore=["bias"])
    new = initialize(host, [body]).new
    mixin = {name for name, _ in host.named_parameters() if "small" in name}
    assert set(new) == {"body.bias", "head.weight", "head.bias"} | mixin and len(mixin) == 2
    assert set(initialize(host, [body, InitEntry(file, into="head")]).new) == {"body.bias"} | mixin
    attached(host)["small"].save(tmp_path / "small.safetensors")
    entries = [body, InitEntry(tmp_path / "small.safetensors", only_adapter="small")]
    assert set(initialize(host, entries).new) == {"body.bias", "head.weight", "head.bias"}


def test_new_without_a_start_or_with_nothing_left_is_an_error(tmp_path):
    host = nn.ModuleDict({"body": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="train: 'new' means what no entry of `init:` fills, and this run has no"):
        select(host, [TrainGroup("new")], AdamW(), initialize(host, []).new)
    file = saved(tmp_path, weight=torch.ones(2, 2), bias=torch.ones(2))
    with pytest.raises(ValueError, match="and the entries of `init:` fill it all"):
        select(host, [TrainGroup("new")], AdamW(), initialize(host, [InitEntry(file, into="body")]).new)
    with pytest.raises(ValueError, match="leave out into, prefix, inside, inflate"):
        InitEntry(file, only_adapter="small", inflate=True)


def test_lightning_trains_the_same(whole):
    lightning = pytest.importorskip("vdiff.training.lightning", exc_type=ImportError)
    module, _, _ = lightning.from_run_file(config(whole))
    assert set(module.selection.trained) == {n for n, _ in module.engine.named_parameters() if is_over_time(n)}
