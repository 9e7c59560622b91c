"""Every file in configs/ is a run that builds, trains a step and samples."""

from pathlib import Path

import pytest
import torch

from vdiff.data import Loader
from vdiff.registry import ConfigError, build, load_config
from vdiff.training.run import check_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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
def test_every_config_trains_and_samples(file):
    plans = check_run(load_config(file))
    engine, data = plans["engine"].make(), plans["data"]["train"].make()
    values = engine(Loader(data, 4).batch(0))
    values.per_row.mean().backward()
    assert torch.isfinite(values.per_row).all()
    out = engine.sample({"label": [0, 1]})
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
