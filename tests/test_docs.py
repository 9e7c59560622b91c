"""The documentation holds: every page can be followed from an empty folder, every link leads somewhere, it builds."""

import re
from pathlib import Path

import pages
import pytest
import torch

from vdiff.registry import isolated, load_config
from vdiff.registry.base import ROOMS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "api" not in page.parts)
HOWTOS = [page for page in PAGES if page.parent.name == "howto"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "architecture"], ids=lambda p: p.stem)
def test_a_page_can_be_followed_from_an_empty_folder(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if page.stem != "quickstart":  # the others begin where its first file is written
        (run_file,) = [text for _, file, text in pages.blocks(DOCS / "quickstart.md") if file == "digits.yaml"]
        Path("digits.yaml").write_text(run_file)
    with isolated():
        pages.follow(page)
    pages.forget(tmp_path)


def test_every_kind_that_people_write_has_a_howto():
    wanted = {"schedule", "solver", "guider", "loss", "embedder", "dataset", "network", "metric", "mixin"}
    assert wanted <= {page.stem for page in HOWTOS}


def test_every_room_has_a_page():
    assert {room.removeprefix("vdiff.") for room in ROOMS.values()} <= {page.stem for page in (DOCS / "api").glob("*")}


def test_the_yaml_of_the_configs_page_merges(tmp_path):
    text = next(text for language, _, text in pages.blocks(DOCS / "configs.md") if language == "yaml")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "digits.yaml").write_text("engine: {schedule: {type: edm, rho: 5}}\n")
    (tmp_path / "my_lab.py").write_text("")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", allow_imports=True)
    assert config["engine"]["schedule"].to_dict() == {"type": "flow"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    sphinx = pytest.importorskip("sphinx.cmd.build")
    # As text, which finds what html finds in a third of the time: most of that is a theme.
    assert sphinx.main(["-b", "text", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]) == 0
    assert (tmp_path / "api" / "samplers.txt").read_text().count("sampler") > 10
