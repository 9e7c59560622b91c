"""``import vdiff`` is light. Each question is asked in a process of its own."""

import json
import subprocess
import sys

import pytest

FOREIGN = ["torchvision", "open_clip", "xformers", "sklearn", "transformers", "lightning", "matplotlib"]
FOREIGN += ["pytorch_lightning", "rich", "av", "tensorboard", "diffusers"]


def ask(code, tmp_path):
    """What ``code`` prints, as JSON. Not run from the source tree, so that nothing is picked up by chance."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules_after(statement, tmp_path):
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    return {module.partition(".")[0] for module in ask(code, tmp_path)}


def test_import_vdiff_imports_nothing_heavy(tmp_path):
    assert not modules_after("import vdiff", tmp_path) & {*FOREIGN, "torch", "numpy", "omegaconf", "yaml"}


def test_names_of_config_files_are_at_hand_without_their_parser(tmp_path):
    statement = "from vdiff.registry import Config, load_config, save_config\nload_config"
    assert not modules_after(statement, tmp_path) & {"torch", "omegaconf", "yaml"}


@pytest.mark.parametrize("room", ["process"])
def test_a_room_imports_no_optional_package(room, tmp_path):
    assert not modules_after(f"import vdiff.{room}", tmp_path) & {*FOREIGN, "omegaconf", "yaml"}


def test_import_vdiff_costs_less_than_a_third_of_a_second_beyond_torch(tmp_path):
    """The least of a few runs: what the import itself costs, not what else the machine was doing."""
    code = "import torch, time\nt = time.process_time()\nimport vdiff\nprint(time.process_time() - t)"
    assert min(ask(code, tmp_path) for _ in range(3)) < 0.3
