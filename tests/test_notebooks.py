"""The notebooks run from top to bottom, with a fresh kernel."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_they_are_found():
    assert {n.stem for n in NOTEBOOKS} >= {"train_and_sample", "solvers", "mixins"}


@pytest.mark.parametrize(
    "file",
    [pytest.param(n, marks=[] if n.stem == "mixins" else [pytest.mark.slow], id=n.stem) for n in NOTEBOOKS],
)
@pytest.mark.long
def test_it_runs_and_shows_pictures(file, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(file, as_version=4)
    client.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output for cell in book.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert shown


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda n: n.stem)
def test_it_is_kept_without_outputs(file):
    assert not [cell for cell in nbformat.read(file, as_version=4).cells if cell.get("outputs")]
