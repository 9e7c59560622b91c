"""Every snippet of the README runs, in order, as a reader would type it in an empty folder."""

import re
from pathlib import Path

import pytest
import torch

from vdiff.cli.entry import parse
from vdiff.registry import ConfigError, isolated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_and_yaml_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = snippets("yaml")
    Path("tour.yaml").write_text(config)
    names = {"__name__": "readme"}
    torch.manual_seed(0)
    with isolated():
        for number, code in enumerate(snippets("python")):
            exec(compile(code, f"README.md, snippet {number}", "exec"), names)
        assert (names["samples"].shape, names["engine"].sampler.num_steps) == ((4, 1, 8, 8), 10)
        assert names["loss"].item() == pytest.approx(0.693147, abs=1e-5)
        order_check(names)
        typo_check(config, names)


def order_check(names):
    """The tour's solver is of second order, as its text says."""
    oracle, schedule, noise = names["oracle"], names["schedule"], names["noise"]
    errors = [
        (names["MidpointSampler"](num_steps=n)(oracle, schedule, noise) - names["exact"]).abs().max() for n in (50, 100)
    ]
    assert errors[0] / errors[1] > 3.5


def typo_check(config, names):
    """The error that the README shows is the error one gets."""
    Path("tour.yaml").write_text(config.replace("channels: 32,", "chanels: 32,"))
    (shown,) = (s for s in snippets("text") if "Did you mean" in s)
    with pytest.raises(ConfigError) as error:
        names["DiffusionEngine"].from_config("tour.yaml")
    assert shown.strip() in str(error.value)


def test_the_commands_are_commands():
    lines = [line for block in snippets("bash") for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if "vdiff " in part]
    parsed = [parse(c.split("vdiff ", 1)[1].split()) for c in commands if not c.startswith("make")]
    assert {"train", "sample", "evaluate", "list", "describe", "inspect", "doctor"} <= {p.command for p in parsed}
    targets = re.findall(r"^make (\w+)", README, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
