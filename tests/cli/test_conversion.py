"""``vdiff convert`` and ``vdiff inspect`` on whole checkpoints, and on an adapter in a run."""

import json
from pathlib import Path

import pytest
import torch
from published import FAMILY, MODELS, same, weights

from vdiff.checkpoints import read_weights, save_weights
from vdiff.cli import main
from vdiff.cli.entry import parse
from vdiff.engine import DiffusionEngine
from vdiff.hooks import attached
from vdiff.mixins import load_mixin

ROOT = Path(__file__).parents[2]
LDM, STAGE = "model.diffusion_model.", "first_stage_model."
RUN = """
base: {config}
engine:
  denoiser: {{network: {{channels: 16, norm_groups: 8}}}}
  mixins:
    lora: {{type: lora, rank: 2, on: ["*.qkv"]}}
    other: {{type: lora, rank: 3, on: ["*.proj_out"]}}
training: {{num_steps: 1, batch_size: 4, checkpoint: {{every: 1}}, validation: null, lr_schedule: {{warmup: 0}}}}
"""


def run(*words):
    return main([str(word) for word in words])


def given(name):
    return [word for pair in MODELS[name][1].items() for word in ("--given", "=".join(map(str, pair)))]


@pytest.mark.parametrize(
    "network, stage, original",
    [
        ("unet", "autoencoder_kl", "sgm"),
        ("video_unet", "temporal_decoder", "sgm"),
        ("lvdm_unet", "autoencoder_kl", "lvdm"),
        ("cogvideox", "autoencoder_kl_cogvideox", "sat"),
    ],
)
def test_a_checkpoint_goes_through_every_layout_and_comes_back_bit_for_bit(
    network, stage, original, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    whole = weights(network, original, LDM) | weights(stage, original, STAGE)
    torch.save({"state_dict": whole | {"betas": torch.zeros(9)}}, "original.ckpt")
    extra = given(network)
    assert run("convert", "original.ckpt", "ours.safetensors", *extra) == 0
    said = capsys.readouterr().out
    assert f"{network}: {original} to vdiff" in said and "left out: 1 tensors, tables of a schedule" in said
    assert run("convert", "ours.safetensors", "theirs", "--to", "diffusers", "--shard-size", "50KB", *extra) == 0
    folders = {FAMILY[name].prefix("diffusers")[:-1] for name in (network, stage)}
    assert {path.name for path in Path("theirs").iterdir()} == folders
    assert run("convert", "theirs", "again.safetensors", *extra) == 0
    assert same(read_weights("again.safetensors"), read_weights("ours.safetensors"))
    assert run("convert", "again.safetensors", "back.safetensors", "--to", original, *extra) == 0
    assert same(read_weights("back.safetensors"), whole)


def test_inspect_says_family_parameters_types_and_unknown_keys(tmp_path, capsys):
    half = {name: value.half() for name, value in weights("unet", "sgm", LDM).items()}
    file = tmp_path / "a.safetensors"
    save_weights(file, half | weights("autoencoder_kl", "sgm", STAGE) | {"cond_stage_model.x": torch.zeros(1)})
    assert run("inspect", file) == 0
    said = capsys.readouterr().out
    parameters = sum(value.numel() for value in half.values())
    assert "family: unet, in the layout sgm" in said
    assert f"unet at {LDM}*: {len(half)} tensors, {parameters:,} parameters, float16" in said
    assert f"autoencoder_kl at {STAGE}*" in said and "float32" in said
    assert "unknown keys: cond_stage_model.* (1, text tower)" in said
    assert run("convert", file, tmp_path / "b", "--to", "diffusers", "--part", "unet") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "b") == 0
    assert "family: unet, in the layout diffusers" in capsys.readouterr().out
    assert run("inspect", tmp_path / "b" / "unet") == 0
    assert "family: unet, in the layout diffusers" in capsys.readouterr().out
    assert run("convert", tmp_path / "b" / "unet", tmp_path / "c.safetensors") == 0
    assert same(read_weights(tmp_path / "c.safetensors"), {n.removeprefix(LDM): v for n, v in half.items()})
    (tmp_path / "d").mkdir()
    assert run("inspect", tmp_path / "d") == 2 and "There is: nothing" in capsys.readouterr().err
    save_weights(file, {"head.weight": torch.zeros(1)})
    assert run("inspect", file) == 0 and "family: none" in capsys.readouterr().out


class Trap:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


def bad_files(folder):
    """Name, file and what is said."""
    unet = weights("unet", "sgm", LDM)
    whole, cut = folder / "whole.safetensors", folder / "cut.safetensors"
    save_weights(whole, unet)
    cut.write_bytes(whole.read_bytes()[:-9])
    yield cut, "cut short"
    torch.save({"state_dict": unet, "x": Trap(folder / "sprung")}, folder / "code.ckpt")
    yield folder / "code.ckpt", "would run its code"
    for name, change, text in (
        ("other", {}, "of no family"),
        ("shapes", unet | {f"{LDM}time_embed.0.bias": torch.zeros(3)}, "wrong shapes"),
        ("nan", unet | {f"{LDM}out.2.bias": torch.full((4,), float("nan"))}, "not finite"),
        ("extra", unet | {"odd.weight": torch.zeros(1)}, "have no table: odd.weight"),
    ):
        save_weights(folder / f"{name}.safetensors", change or {"bert.weight": torch.zeros(1)})
        yield folder / f"{name}.safetensors", text
    yield folder / "absent.safetensors", "no such weight file"


@pytest.mark.parametrize("to", ["vdiff", "diffusers"])
def test_a_bad_file_is_one_clear_error_and_leaves_nothing(to, tmp_path, capsys):
    files = list(bad_files(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for file, text in files:
        out = tmp_path / ("out.safetensors" if to == "vdiff" else "out")
        assert run("convert", file, out, "--to", to) == 2
        error = capsys.readouterr().err
        assert text in error and file.name in error and "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before


def test_another_familys_layout_is_refused(tmp_path, capsys):
    save_weights(tmp_path / "a.safetensors", weights("unet", "sgm", LDM))
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "sat") == 2
    assert "unet is not written in the layout 'sat'" in capsys.readouterr().err


@pytest.mark.parametrize("size, number", [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("7", 7)])
def test_sizes_are_read(size, number):
    assert parse(["convert", "a", "b", "--shard-size", size]).shard_size == number


@pytest.mark.parametrize("size", ["", "GB", "1.5GB", "0", "5TB"])
def test_what_is_no_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        parse(["convert", "a", "b", "--shard-size", size])
    assert "a size, such as 5GB" in capsys.readouterr().err


def test_a_mixin_of_a_run_is_converted_by_its_name(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(config=ROOT / "configs" / "digits_edm.yaml"))
    folder, out = tmp_path / "run", tmp_path / "lora.safetensors"
    assert run("train", config, "--out", folder) == 0
    assert run("convert", folder, out) == 2
    assert "which mixin? --mixin NAME" in capsys.readouterr().err and not out.exists()
    assert run("convert", folder, out, "--mixin", "othr") == 2
    assert "Did you mean 'other'?" in capsys.readouterr().err
    assert run("convert", folder, out, "--mixin", "other", "--weights", "raw") == 0
    assert "LoRA 'other'" in capsys.readouterr().out
    lora = attached(DiffusionEngine.load(folder, weights="raw"))["other"]
    assert same(load_mixin(out).state_dict(), lora.state_dict())
    assert run("convert", folder, tmp_path / "peft", "--mixin", "other", "--to", "peft") == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    for path, form, host in ((out, "vdiff", "UNet"), (tmp_path / "peft", "peft", "network")):
        assert run("inspect", path) == 0
        said = f"adapter, as {form} has it: lora, rank 3, alpha 3, on {len(lora.sites)} modules of a {host}"
        assert said in capsys.readouterr().out.splitlines()


def test_a_published_file_is_held_against_a_config(tmp_path, monkeypatch, capsys):
    """And says which part goes where, without reading a weight."""
    monkeypatch.chdir(tmp_path)
    small = "{channels: 8, channel_mult: [1, 2], num_res_blocks: 1, norm_groups: 4"
    Path("small.yaml").write_text(
        f"base: {ROOT / 'configs/families/sd21_base.yaml'}\n"
        f"engine:\n  first_stage: {small}}}\n"
        f"  denoiser: {{network: {small}, context_dim: 12, attention_factors: [2], head_dim: 8,"
        " linear_projection: false, num_classes: sequential, vector_dim: 6}}\n"
        "  conditioner: {embedders: [{type: open_clip_text, arch: {embed_dim: 24, width: 16, heads: 2, layers: 2,"
        " context_length: 16, vocab_size: 100}}]}\n"
    )
    parts = {LDM: "unet", STAGE: "autoencoder_kl", "cond_stage_model.": "open_clip_text"}
    save_weights("sd.safetensors", {n: v for at, name in parts.items() for n, v in weights(name, "ldm", at).items()})
    assert run("inspect", "sd.safetensors", "--against", "small.yaml") == 0
    said = capsys.readouterr().out
    assert "cond_stage_model.* -> conditioner.embedders.0: open_clip_text (ldm), 30 tensors" in said
    assert "first_stage_model.* -> first_stage: autoencoder_kl (ldm)" in said
    save_weights("half.safetensors", weights("unet", "ldm", LDM))
    assert run("inspect", "half.safetensors", "--against", "small.yaml") == 1
    assert "missing in the file" in capsys.readouterr().out
    assert run("inspect", "half.safetensors", "--against", "small.yaml", "--slot", "denoiser.network") == 0
    assert run("convert", "sd.safetensors", "sd", "--to", "diffusers") == 0
    capsys.readouterr()
    for heads, code in ((2, 0), (4, 1)):  # which a folder says and weights do not
        said = {"_class_name": "UNet2DConditionModel", "attention_head_dim": heads}
        Path("sd/unet/config.json").write_text(json.dumps(said))
        assert run("inspect", "sd", "--against", "small.yaml") == code
        assert ("with 2 heads, and 4 by unet/config.json" in capsys.readouterr().out) == bool(code)
    torn = weights("open_clip_text", "diffusers")
    torn.pop([name for name in torn if name.endswith("q_proj.weight")][-1])
    save_weights("torn.safetensors", torn)
    digits = str(ROOT / "configs/digits_edm.yaml")
    for file, config, slot, message in (
        ("torn.safetensors", "small.yaml", "conditioner.embedders.0", "q_proj.weight"),
        ("half.safetensors", digits, "conditioner", "the names are of no family that is known"),
    ):
        assert run("inspect", file, "--against", config, "--slot", slot) == 1
        said = capsys.readouterr()
        assert message in said.out.splitlines()[-1] and not said.err
