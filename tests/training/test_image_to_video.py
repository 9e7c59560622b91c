"""Image-to-video networks trained on a folder of videos, by the run files that the documentation shows."""

from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from peers import peer, save_tokenizer
from PIL import Image

from vdiff.data import Loader
from vdiff.evaluation import save_film
from vdiff.registry import build, load_config
from vdiff.training import read_log, train

ROOT = Path(__file__).parents[2]
STAGE = "{type: autoencoder_kl, channels: 8, norm_groups: 8, num_res_blocks: 1}"
EYE = "{embed_dim: 16, width: 32, head_width: 16, layers: 1, patch_size: 8, image_size: 16}"
T5 = "{d_model: 16, d_ff: 16, num_layers: 1, num_heads: 2, d_kv: 8, vocab_size: 99, feed_forward_proj: gated-gelu}"
RUN = ["training.init=[]", "training.num_steps=2", "training.batch_size=2", "training.accumulate=1"]
RUN += ["training.precision=float32", "training.logging={every: 1, loggers: [jsonl]}"]
SMALL = {
    "svd": [
        "first_stage.channels=8", "first_stage.norm_groups=8", "first_stage.num_res_blocks=1", "first_stage.chunk=1",
        f"conditioner.embedders.0.arch={EYE}", f"conditioner.embedders.3.first_stage={STAGE}",
        *(f"denoiser.network.{x}" for x in ("channels=16", "context_dim=16", "norm_groups=8", "channel_mult=[1, 2]")),
        *(f"denoiser.network.{x}" for x in ("attention_factors=[1]", "head_dim=8", "num_res_blocks=1")),
    ],
    "cogvideox": [
        "first_stage.channels=8", "first_stage.norm_groups=8", "first_stage.num_res_blocks=1",
        "first_stage.channel_mult=[1, 2]", "first_stage.time_factor=2",
        f"conditioner.embedders.0.arch={T5}", "conditioner.embedders.0.length=6", "mixins.lora.rank=2",
        *(f"denoiser.network.{x}" for x in ("width=32", "depth=1", "num_heads=2", "text_dim=16", "text_length=6")),
        "denoiser.network.trained_size=[8, 8]", "denoiser.network.learned_size=[2, 8, 8]",
    ],
}  # fmt: skip
FRAMES = 3

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture
def folder(tmp_path):
    """Clips of moving noise with a text beside each, and a tokenizer of a few words."""
    peer("av")
    (tmp_path / "clips").mkdir()
    for i in range(2):
        still = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        frames = [Image.fromarray(np.roll(still, t, 1)) for t in range(6)]
        save_film(frames, tmp_path / "clips" / f"{i}.mp4", 8)
        (tmp_path / "clips" / f"{i}.txt").write_text("a cat walks")
    save_tokenizer(tmp_path / "CogVideoX-5b-I2V" / "tokenizer", ["a", "cat", "walks"])
    return tmp_path


def config(family, folder):
    """The run file of the page, in small."""
    (text,) = [t for _, file, t in pages.blocks(ROOT / "docs" / "conditioning.md") if file == f"{family}_clips.yaml"]
    (folder / "run.yaml").write_text(text.replace("base: configs", f"base: {ROOT / 'configs'}"))
    lines = [*SMALL[family], f"sample_shape=[3, {FRAMES}, 16, 16]"]
    data = [f"data.train.num_frames={FRAMES}", "data.train.size=16"]
    return load_config(folder / "run.yaml", overrides=[*(f"engine.{line}" for line in lines), *data, *RUN])


@pytest.mark.parametrize("family", SMALL)
def test_the_pages_run_trains_two_steps(family, folder):
    run = config(family, folder)
    train(run, folder / "out")
    losses = [row["train/loss"] for row in read_log(folder / "out" / "log.jsonl") if "train/loss" in row]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    batch = Loader(build(run["data"]["train"], "dataset"), 2).batch(0)
    cond = build(run["engine"], "engine").eval().conditioner(batch)
    assert torch.equal(batch["image"], batch["video"][:, :, 0])
    if family == "svd":
        assert cond["concat"].shape == (2, 4, 2, 2) and cond["vector"].shape == (2, 768)
    else:
        assert cond["concat"].shape == (2, 16, 2, 8, 8) and (cond["concat"][:, :, 1] == 0).all()
