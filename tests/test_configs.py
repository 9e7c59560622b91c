"""Every file in configs/ is a run that builds, trains a step and samples."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from vdiff.data import Loader
from vdiff.engine import AutoencoderEngine
from vdiff.registry import ConfigError, build, load_config
from vdiff.training.run import check_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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
    batch = Loader(data, 4).batch(0)
    values = engine(batch)
    values.per_row.mean().backward()
    assert torch.isfinite(values.per_row).all()
    if isinstance(engine, AutoencoderEngine):
        pixels = data[0][engine.input_key][None]
        assert engine.reconstruct(pixels).shape == pixels.shape
        return
    out = engine.sample({e.reads: batch[e.reads][:2] for e in engine.conditioner.embedders}, num=2)
    assert out.shape == (2, *engine.sample_shape) and torch.isfinite(out).all()


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
