"""``vdiff summary``: from a run file to figures, with nothing computed."""

from pathlib import Path

import pytest

from vdiff.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
LORA = ["engine.mixins.lora.type=lora", "engine.mixins.lora.on='*qkv'", "engine.mixins.lora.rank=2"]


def summary(capsys, *words):
    code = main(["summary", *map(str, words)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["digits_edm", "digits_dit"])
def test_every_module_of_a_run_file_is_counted(name, capsys):
    code, out, _ = summary(capsys, CONFIGS / f"{name}.yaml", "--batch-size", 4)
    assert code == 0 and "one training step of a batch of 4" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ") and line.split()}
    assert {"(all)", "conditioner", "denoiser", "network"} <= set(rows)
    numbers = {n: int(rows[n][2].replace(",", "")) for n in ("(all)", "conditioner", "denoiser")}
    assert numbers["(all)"] == numbers["conditioner"] + numbers["denoiser"]


def test_flops_follow_the_batch_and_overrides_are_heard(capsys):
    def flops(*words):
        out = summary(capsys, CONFIGS / "digits_dit.yaml", "--depth", 1, *words)[1]
        return float(out.splitlines()[-1].split()[1])  # in millions

    one, four = flops(), flops("--batch-size", 4)
    assert four == pytest.approx(4 * one, rel=0.01)  # three digits are printed
    assert flops("engine.denoiser.network.depth=2") < 0.6 * one


def test_mixins_of_the_engine_are_shown(capsys):
    out = summary(capsys, CONFIGS / "digits_edm.yaml", *LORA)[1]
    assert "mixins (sites)" in out
    assert any("middle_block" in line and "lora (1)" in line for line in out.splitlines())


def test_the_cpu_counts_the_same(capsys):
    found = [summary(capsys, CONFIGS / "digits_edm.yaml", "--depth", 1, "--device", d)[1] for d in ("meta", "cpu")]
    assert found[0].splitlines()[-1] == found[1].splitlines()[-1]


def test_without_data_the_engine_says_what_a_batch_is(tmp_path, capsys):
    file = tmp_path / "engine.yaml"
    text = """
engine:
  type: diffusion
  input_key: image
  sample_shape: [1, 8, 8]
  schedule: {type: flow}
  sigma_sampler: {type: uniform}
  denoiser: {type: velocity, network: {type: dit, in_channels: 1, out_channels: 1, width: 16, depth: 1, num_heads: 2}}
  loss: {type: mse}
  sampler: {type: euler, num_steps: 2}
"""
    file.write_text(text)
    assert summary(capsys, file)[0] == 0
    file.write_text(text.replace("  sample_shape: [1, 8, 8]\n", ""))
    code, _, err = summary(capsys, file)
    assert code == 2 and "nothing says what a batch is" in err


def test_a_typo_is_named(capsys):
    code, _, err = summary(capsys, CONFIGS / "digits_dit.yaml", "engine.denoiser.network.widht=3")
    assert code == 2 and "Did you mean 'width'" in err
    code, _, err = summary(capsys, "engine.loss.type=mse")
    assert code == 2 and "only overrides" in err
