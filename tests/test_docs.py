"""Every Python snippet of the docs runs, in order; every link leads somewhere; every YAML is YAML."""

import re
from pathlib import Path

import pytest
import torch

from vdiff.registry import isolated, load_config

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [p for p in DOCS if p.stem != "architecture"], ids=lambda p: p.stem)
def test_the_snippets_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    torch.manual_seed(0)
    with isolated():
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)):
            exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)
    if page.stem == "extending":
        assert names["values"].per_row.shape == (16,) and names["samples"].shape == (4, 1, 8, 8)
        check_the_schedule(names["SquareSchedule"]())


def check_the_schedule(schedule):
    """The page teaches a schedule whose derivatives and inverse are right."""
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    level = schedule(t)
    for value, slope in ((level.alpha, level.d_alpha), (level.sigma, level.d_sigma)):
        assert torch.allclose(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], slope)
    assert torch.allclose(schedule.at_ratio(level.ratio.detach()).t, t.detach())


def test_the_yaml_of_the_docs_loads(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS[0].parent / "configs.md").read_text(), re.M | re.S)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "digits.yaml").write_text("engine: {schedule: {type: edm, rho: 5}}\n")
    (tmp_path / "my_lab.py").write_text("")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", allow_imports=True)
    assert config["engine"]["schedule"].to_dict() == {"type": "flow"}


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
