"""Run files: from YAML to a folder that can be continued, moved and sampled."""

import shutil

import pytest
import torch
import yaml

from vdiff.checkpoints import read_run_weights, save_weights, steps
from vdiff.engine import DiffusionEngine
from vdiff.registry import ConfigError, load_config
from vdiff.training import read_log, train

TINY = """
engine:
  type: diffusion
  input_key: image
  sample_shape: [1, 8, 8]
  conditioner:
    type: embedders
    embedders: [{type: class_label, reads: label, feeds: vector, num_classes: 10, width: 8, drop: 0.1}]
  schedule: {type: edm}
  sigma_sampler: {type: log_normal}
  denoiser:
    type: edm
    network:
      {type: unet, in_channels: 1, out_channels: 1, channels: 8, channel_mult: [1], num_res_blocks: 1, norm_groups: 4,
       attention_factors: [1], num_heads: 2, num_classes: sequential, vector_dim: 8, dropout: 0.1}
  loss: {type: mse}
  sampler: {type: heun, num_steps: 2}
data:
  train: {type: digits, split: train}
  validation: {type: digits, split: test}
training:
  num_steps: 4
  batch_size: 8
  ema: {decay: 0.9}
  device: cpu
  checkpoint: {every: 2}
  validation: {num_batches: 1, num_pictures: 3}
  logging: {every: 2, loggers: []}
"""


def config(tmp_path, *overrides, text=TINY):
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml", overrides=overrides)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_file_becomes_a_folder_with_everything_in_it(tmp_path):
    out = tmp_path / "out"
    result = train(config(tmp_path), out)
    assert result.step == 4 and {"train/loss", "validation/loss", "validation/ema/loss"} <= set(result.figures)
    assert {f.name for f in out.iterdir() if not f.name.startswith(".")} == {
        "config.yaml", "log.jsonl", "report.txt", "pictures", "checkpoints"
    }  # fmt: skip
    assert [f.name for f in (out / "pictures").iterdir()] == ["step-00000004.png"]
    assert {f.name for f in result.checkpoint.iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
    }  # fmt: skip
    engine = DiffusionEngine.load(out)
    assert engine.sample({"label": torch.tensor([3])}).shape == (1, 1, 8, 8)


def test_interrupted_and_continued_is_bitwise_the_same_whatever_the_global_seed(tmp_path):
    for name, parts in (("whole", [4]), ("halves", [2, 4])):
        for num_steps in parts:
            torch.manual_seed(num_steps)
            train(config(tmp_path, f"training.num_steps={num_steps}"), tmp_path / name)
    for weights in ("raw", "ema"):
        assert same(read_run_weights(tmp_path / "whole", weights)[0], read_run_weights(tmp_path / "halves", weights)[0])
    assert [e["step"] for e in read_log(tmp_path / "halves" / "log.jsonl")] == [2, 2, 4, 4]
    train(config(tmp_path, "training.seed=1"), tmp_path / "other")
    assert not same(read_run_weights(tmp_path / "whole")[0], read_run_weights(tmp_path / "other")[0])


def test_continuing_with_another_config_is_refused_by_key_unless_it_only_watches(tmp_path):
    out = tmp_path / "out"
    train(config(tmp_path, "training.num_steps=2"), out)
    with pytest.raises(ConfigError) as error:
        train(config(tmp_path, "training.batch_size=16", "engine.sampler.num_steps=9", "training.clip=1.0"), out)
    text = str(error.value)
    assert "training.batch_size: 8 there, 16 now" in text and "training.clip: not given there, 1.0 now" in text
    assert "engine.sampler.num_steps: 2 there, 9 now" in text and "training.num_steps" not in text
    train(config(tmp_path, "training.num_steps=3", "training.logging.every=1", "training.checkpoint.keep=1"), out)
    assert list(steps(out / "checkpoints")) == [3]
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["num_steps"] == 3
    shutil.rmtree(out / "checkpoints")  # nothing under way, so nothing to contradict
    train(config(tmp_path, "training.num_steps=2", "training.batch_size=16"), out)


def test_files_in_the_config_stay_right_when_the_folder_moves(tmp_path):
    source = DiffusionEngine.from_config(config(tmp_path))
    save_weights(tmp_path / "inputs" / "start.safetensors", source.state_dict())
    text = TINY + "  init: [{file: inputs/start.safetensors}]\n  optimizer: {type: sgd, lr: 0.0}\n"
    train(config(tmp_path, "training.num_steps=1", text=text), tmp_path / "runs" / "a")
    saved = yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text())
    assert saved["training"]["init"][0]["file"] == "../../inputs/start.safetensors"
    assert same(read_run_weights(tmp_path / "runs" / "a")[0], dict(source.state_dict()))
    again = load_config(tmp_path / "runs" / "a" / "config.yaml")
    train(again, tmp_path / "runs" / "b")
    assert same(read_run_weights(tmp_path / "runs" / "b")[0], dict(source.state_dict()))


def test_only_an_adapter_is_trained_and_saved_alone(tmp_path):
    out = tmp_path / "out"
    options = [
        "engine.mixins.small={type: lora, on: '*.qkv', rank: 2}",
        "training.train=[{on: mixins.small}]",
        "training.checkpoint.adapters=true",
    ]
    train(config(tmp_path, *options), out)
    engine, start = DiffusionEngine.load(out), read_run_weights(out)[0]
    assert (out / "adapters" / "small.safetensors").is_file()
    from vdiff.mixins import load_mixin

    mixin = load_mixin(out / "adapters" / "small.safetensors")
    raw = DiffusionEngine.load(out, weights="raw").mixins["small"].state_dict()
    assert same(mixin.state_dict(), dict(raw)) and len(raw) < len(start)
    assert set(engine.mixins) == {"small"}


def test_every_fault_of_the_file_is_named_at_once(tmp_path):
    faulty = TINY.replace("channels: 8,", "chanels: 8,").replace("batch_size", "batchsize")
    faulty = faulty.replace("split: test", "split: tset") + "extra: 1\n"
    with pytest.raises(ConfigError) as error:
        train(config(tmp_path, text=faulty), tmp_path / "out")
    text = str(error.value)
    assert "Did you mean 'channels'" in text and "Did you mean 'batch_size'" in text
    assert "extra: a run file has the sections" in text and "data.validation" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="names no data"):
        train({"engine": {"type": "diffusion"}}, tmp_path / "out")


def test_null_takes_away_what_a_base_names(tmp_path):
    config(
        tmp_path, text=TINY.replace("  loss:", "  mixins: {a: {type: lora, on: '*.qkv'}, b: {type: freeu}}\n  loss:")
    )
    (tmp_path / "other.yaml").write_text(
        "base: run.yaml\nengine: {mixins: {a: null}}\ndata: {validation: null}\ntraining: {num_steps: 1}"
    )
    result = train(load_config(tmp_path / "other.yaml"), tmp_path / "out")
    assert result.step == 1 and "validation/loss" not in result.figures
    assert set(DiffusionEngine.load(tmp_path / "out").mixins) == {"b"}
    with pytest.raises(ConfigError, match="names no data"):
        train(config(tmp_path, "data={train: null, validation: null}"), tmp_path / "no")


@pytest.mark.parametrize(
    "entry, line, message",
    [
        ("batch_size: 0", "training:", "training: Trainer: batch_size must be at least 1, got 0"),
        ("accumulate: 0", "training:", "training: Trainer: accumulate must be at least 1, got 0"),
        ("init: [{file: none.safetensors}]", "init:", "training.init.0.file: there is no file or folder .*none.saf"),
    ],
)
def test_numbers_and_files_that_cannot_be_are_named_by_line_before_anything_is_built(tmp_path, entry, line, message):
    text = TINY.replace("batch_size: 8", entry)
    number = next(i for i, one in enumerate(text.split("\n"), 1) if one.strip().startswith(line))
    with pytest.raises(ConfigError, match=f"run.yaml:{number}: {message}"):
        train(config(tmp_path, text=text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_where_what_it_began_with_is_gone(tmp_path):
    train(config(tmp_path), tmp_path / "first")
    save_weights(tmp_path / "start.safetensors", read_run_weights(tmp_path / "first", "raw")[0])
    begun = TINY + f"  init: [{{file: {tmp_path / 'start.safetensors'}}}]\n"
    train(config(tmp_path, "training.num_steps=2", text=begun), tmp_path / "out")
    (tmp_path / "start.safetensors").unlink()
    assert train(config(tmp_path, text=begun), tmp_path / "out").step == 4


def test_a_data_section_may_be_one_set(tmp_path):
    tree = config(tmp_path, "training.num_steps=1").to_dict()
    tree["data"] = tree["data"]["train"]
    result = train(tree, tmp_path / "out")
    assert result.step == 1 and "validation/loss" not in result.figures
