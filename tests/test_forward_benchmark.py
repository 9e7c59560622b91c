"""The benchmark of forward passes at sizes for a test, so that its only run on a GPU does not break."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peers import peer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def cells(path):
    """Of the table in a page, after its header."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize(
    "has_diffusers, only",
    [(True, "2b"), (False, "2b"), pytest.param(True, "SDXL", marks=pytest.mark.slow)],
)
def test_every_row_of_the_full_sizes_is_filled(has_diffusers, only, tmp_path, monkeypatch):
    import full_size

    if has_diffusers:
        peer("diffusers")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    full_size.report("cpu", [only], repeats=2, tiny=True, backend="eager", out=tmp_path / "page.md")
    rows = cells(tmp_path / "page.md")
    assert [row[1] for row in rows] == [mode for mode in ("eager", "compiled") for _ in range(len(rows) // 2)]
    for _, _, ours, theirs, ratio, host, _, _, _, attention, apart, first in rows:
        assert all(float(cell) >= 0 for cell in (ours, host, first)) and attention == "flash"
        assert [bool(cell) for cell in (theirs, ratio, apart)] == [has_diffusers] * 3
        assert not has_diffusers or float(apart) < 0.05  # bfloat16


def test_a_row_that_fails_says_why_and_the_next_is_measured(tmp_path, monkeypatch):
    import full_size

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(full_size.TWINS["cogvideox, 2b"]["tiny"], "ours", lambda: torch.zeros(1).reshape(2))
    full_size.report("cpu", ["cogvideox"], repeats=1, tiny=True, backend="eager", out=tmp_path / "page.md")
    rows = cells(tmp_path / "page.md")
    assert rows[0][2].startswith("RuntimeError: shape '[2]' is invalid") and float(rows[1][2]) > 0


@pytest.mark.parametrize("name", ["unet, no context", "dit", "video_unet, SVD", "autoencoder_kl_cogvideox, decode"])
def test_twins_say_the_same_and_ours_asks_no_more_of_the_dispatcher(name):
    """What noise cannot touch: kernels of a forward, and of a forward and backward."""
    diffusers = peer("diffusers")
    import forward
    from racing import counted

    calls = forward.contenders(forward.TWINS[name]["tiny"], diffusers)
    for way in forward.WAYS:
        ours, theirs = (counted(forward.as_(way, call, torch.no_grad)) for call in calls.values())
        assert ours.kernels <= theirs.kernels and ours.reads == 0
    assert "vdiff" in sys.modules
