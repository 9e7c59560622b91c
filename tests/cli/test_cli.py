"""The command line: instant help, errors without tracebacks, and the whole way from a config to figures."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vdiff.cli import main
from vdiff.cli.entry import parse
from vdiff.cli.sampling import resampled
from vdiff.engine import DiffusionEngine
from vdiff.process import EDMSchedule, ExplicitDiscretizer
from vdiff.samplers import EulerSampler

ROOT = Path(__file__).parents[2]

SMALL = [
    "engine.denoiser.network.channels=16",
    "engine.denoiser.network.norm_groups=8",
    "engine.sampler.num_steps=2",
    "training.num_steps=3",
    "training.batch_size=8",
    "training.checkpoint.every=2",
    "training.validation.every=3",
    "training.lr_schedule.warmup=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", str(ROOT / "configs" / "digits_edm.yaml"), *SMALL, "--out", str(folder)]) == 0
    return folder


def test_help_is_instant_and_imports_no_torch():
    code = "import sys, vdiff.cli.entry as m; m.parser().format_help(); assert 'torch' not in sys.modules"
    best = min(_time([sys.executable, "-c", code]) - _time([sys.executable, "-c", "pass"]) for _ in range(5))
    assert best < 0.3


def _time(command):
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return time.perf_counter() - began


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "list", "describe", "inspect", "summary", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage: vdiff" in capsys.readouterr().out


def test_a_run_leaves_everything_needed_to_repeat_it(run):
    assert {"config.yaml", "log.jsonl", "report.txt", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_sample_draws_a_picture(run, capsys):
    options = "--num 4 --label 3 --guidance 2 --solver euler --steps 2".split()
    assert main(["sample", str(run), *options, "--out", str(run / "grid.png")]) == 0
    assert Image.open(run / "grid.png").size[0] > 8
    assert "4 samples with the ema weights of step-00000003" in capsys.readouterr().out


def test_samples_do_not_depend_on_the_batch_size(run):
    from safetensors.torch import load_file

    files = [run / f"{i}.safetensors" for i in range(2)]
    for file, size in zip(files, (5, 2), strict=True):
        assert main(["sample", str(run), "--num", "5", "--batch-size", str(size), "--out", str(file)]) == 0
    a, b = (load_file(f)["samples"] for f in files)
    assert (a - b).abs().max() < 2e-4  # kernels round by batch size, and two steps from sigma 80 magnify it
    assert load_file(files[0])["labels"].tolist() == [0, 1, 2, 3, 4]


def test_evaluate_writes_figures(run, capsys):
    assert main(["evaluate", str(run), "--num", "80"]) == 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["num_samples"] == 80 and 0 <= figures["classifier_accuracy"] <= 1
    assert "accuracy" in capsys.readouterr().out


def test_the_same_command_continues_and_a_changed_one_is_refused(run, capsys):
    config = str(ROOT / "configs" / "digits_edm.yaml")
    assert main(["train", config, *SMALL, "--out", str(run)]) == 0
    assert main(["train", config, *SMALL, "engine.denoiser.sigma_data=0.5", "--out", str(run)]) == 2
    assert "engine.denoiser.sigma_data: 0.75 there, 0.5 now" in capsys.readouterr().err


def test_a_run_folder_is_a_run_to_continue(run, capsys, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for named in (copy, copy / "config.yaml"):
        assert main(["train", str(named), "training.num_steps=4"]) == 0
        assert f"{copy}: trained 4 steps" in capsys.readouterr().out


def test_inspect_reads_runs_and_files(run, capsys):
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 3: valid" in out and "denoiser: EDMDenoiser" in out
    assert main(["inspect", str(run / "checkpoints" / "step-00000003" / "ema.safetensors")]) == 0
    assert "float32" in capsys.readouterr().out


def test_describe_says_which_mixin_of_a_run_touches_which_module(run, capsys, tmp_path):
    mixins = "a: {type: lora, rank: 2, on: '*.qkv'}, b: {type: lora, rank: 3, on: '*middle_block.*.qkv'}"
    (tmp_path / "config.yaml").write_text(f"base: {run / 'config.yaml'}\nengine:\n  mixins: {{{mixins}}}\n")
    assert main(["describe", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(" a (LinearLoRAPart" in line or " a (LoRAPart" in line for line in lines) and len(lines) > 1
    (both,) = (line for line in lines if " -> b (" in line)
    assert both.startswith("denoiser.network.middle_block.1.")
    assert main(["describe", str(tmp_path / "config.yaml")]) == 0 and capsys.readouterr().out.splitlines() == lines
    assert main(["describe", str(run)]) == 0 and "nothing is attached" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(run, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "step-00000003" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    main(["inspect", str(copy)])
    assert "step 3: " in capsys.readouterr().out.replace("step 3: valid", "")
    assert main(["sample", str(copy), "--num", "1", "--out", str(tmp_path / "x.png")]) == 0
    assert "step-00000002" in capsys.readouterr().out
    assert main(["sample", str(copy), "--step", "3", "--num", "1"]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["describe", "sampler/hein"], "Did you mean 'heun'?"),
        (["describe", "samplr/heun"], "Did you mean 'sampler'?"),
        (["list", "nonsense"], "no kind is called"),
        (["sample", "no/such/run"], "no/such/run"),
        (["inspect", "no/such/file.safetensors"], "no/such/file.safetensors"),
        (["train", "no/such/config.yaml"], "cannot read this config"),
        (["train", "engine.x=1"], "no run file given"),
    ],
)
def test_a_users_error_is_one_line_and_no_traceback(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_more_steps_are_the_same_solver_and_another_solver_has_the_same_levels():
    config = ["engine.sampler={type: heun, churn: 8.0, num_steps: 18, init: vp, discretizer: {type: exponential}}"]
    sampler = DiffusionEngine.from_config(ROOT / "configs" / "digits_edm.yaml", config).sampler
    longer = resampled(sampler, None, 36)
    assert (type(longer), longer.num_steps, longer.churn, sampler.num_steps) == (type(sampler), 36, 8.0, 18)
    other = resampled(sampler, "dpmpp_2m", None)
    assert (other.num_steps, other.init, other.discretizer) == (18, "vp", sampler.discretizer)
    listed = EulerSampler(discretizer=ExplicitDiscretizer(ratios=[3.0, 1.0, 0.0]))
    assert resampled(listed, "heun", None).discretizer is listed.discretizer
    assert resampled(listed, None, 5).levels(EDMSchedule()).t.shape == (6,)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num", "0"], "at least 1"),
        (["--batch-size", "-4"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--step", "newest"], "last, best or the number of a step"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_loaded(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["sample", "some/run", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_class_that_is_not_there_is_refused(run, capsys):
    """On the host: on a GPU the wrong index would end the process."""
    assert main(["sample", str(run), "--num", "1", "--label", "10"]) == 2
    assert "--label 10: the classes of this engine are 0 to 9" in capsys.readouterr().err


def test_a_run_that_imports_is_read_with_leave(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with open(copy / "config.yaml", "a") as file:
        file.write("imports: [json]\n")
    sample = ["sample", str(copy), "--num", "1", "--out", str(tmp_path / "x.png")]
    for command in (
        sample,
        ["evaluate", str(copy), "--num", "80", "--metric", "frechet_distance"],
        ["inspect", str(copy)],
    ):
        assert main(command) == 2 and "--allow-imports" in capsys.readouterr().err
        assert main([*command, "--allow-imports"]) == 0


def test_a_loaded_engine_is_ready_to_use(run):
    """In eval mode: no dropout, no dropped conditions."""
    engine = DiffusionEngine.load(run)
    assert not any(module.training for module in engine.modules())


def test_an_unconditional_run_is_evaluated_without_classes(tmp_path, capsys):
    plain = ["conditioner.embedders=[]", "denoiser.network.num_classes=null", "denoiser.network.vector_dim=null"]
    config = str(ROOT / "configs" / "digits_edm.yaml")
    assert main(["train", config, *SMALL, *(f"engine.{word}" for word in plain), "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--num", "80", "--metric", "frechet_distance"]) == 0


def test_overrides_may_stand_after_the_options():
    arguments = parse(["train", "a.yaml", "x=1", "--out", "there", "y.z=2"])
    assert arguments.config == ["a.yaml", "x=1", "y.z=2"] and arguments.out == "there"
    for wrong in (["train", "a.yaml", "--ot", "x"], ["list", "sampler", "x=1"]):
        with pytest.raises(SystemExit) as stop:
            parse(wrong)
        assert stop.value.code == 2


def test_list_and_describe_know_every_entry(capsys):
    from vdiff.registry import entries, kinds

    assert main(["list"]) == 0
    for kind in kinds():
        assert main(["list", kind]) == 0
        for name in entries(kind):
            assert main(["describe", f"{kind}/{name}"]) == 0
    assert "no text" not in capsys.readouterr().out


def test_imports_need_leave(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("imports: [os]\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "--allow-imports" in capsys.readouterr().err


def test_doctor_says_what_is_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "sdpa" in out and "scikit-learn" in out


def test_guidance_turns_the_runs_own_guider_and_replaces_none():
    from types import SimpleNamespace

    from vdiff.cli.sampling import _guide
    from vdiff.samplers import CFGGuider, Guider, NoneGuider

    own = CFGGuider(1.0, batched=False)
    engine = SimpleNamespace(guider=own)
    _guide(engine, 3.0)
    assert engine.guider is own and own.scale == 3.0
    engine.guider = NoneGuider()
    _guide(engine, 2.0)
    assert isinstance(engine.guider, CFGGuider) and engine.guider.scale == 2.0

    class ScalelessGuider(Guider, abstract=True):
        def plan(self, nodes):
            return []

    engine.guider = ScalelessGuider()
    with pytest.raises(ValueError, match="ScalelessGuider, has no scale"):
        _guide(engine, 2.0)


def test_inspect_lists_the_keys_of_a_run_and_holds_them_against_a_config(run, capsys):
    config = str(run / "config.yaml")
    assert main(["inspect", str(run), "--keys", "--against", config]) == 0
    said = capsys.readouterr().out
    assert "denoiser.network.out.2.weight (1, " in said and "tensors loaded" in said
    assert main(["inspect", str(run), "--against", config, "--slot", "denoiser"]) == 1
    assert "they do not fit" in capsys.readouterr().out


def test_a_checkpoint_folder_is_answered_with_its_run(run):
    with pytest.raises(FileNotFoundError, match=r"is a checkpoint of the run .*step=3"):
        DiffusionEngine.load(run / "checkpoints" / "step-00000003")


def test_a_misspelt_section_and_type_name_their_line(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("engine: {type: diffusion}\ntrainning: {}\n")
    main(["train", str(file), "engine.schedule.type=cosin"])
    said = capsys.readouterr().err
    assert "a.yaml:2: trainning: a run file has the sections" in said and "Did you mean 'training'?" in said
    (line,) = [line for line in said.splitlines() if "cosin" in line]
    assert "Did you mean 'cosine'?" in line and "a.yaml" not in line  # the override is at fault, not the file
