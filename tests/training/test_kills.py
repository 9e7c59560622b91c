"""SIGKILL at any moment of the demo, and the same command again: the same weights, bit for bit."""

import json
import random
import shutil
import signal
import time

import pytest
from children import start, train_demo

SHORT = [
    "engine.denoiser.network.channels=16",
    "engine.denoiser.network.norm_groups=8",
    "engine.sampler.num_steps=2",
    "training.num_steps=60",
    "training.batch_size=16",
    "training.checkpoint.every=4",
    "training.validation.every=30",
    "training.lr_schedule.warmup=5",
]


def digests(run):
    """What the run ended with: the checksums of weights, average and optimizer memory, and the state."""
    folder = max((run / "checkpoints").iterdir())
    assert folder.name == "step-00000060"
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in manifest.items()}


@pytest.mark.timeout(
    900
)  # a score of processes, each of which imports torch; on a busy machine that alone takes minutes
@pytest.mark.long
def test_ten_sigkills_at_random_moments_of_the_demo_change_nothing(tmp_path):
    start(print).join()  # the server imports torch, which is no part of a run
    began = time.monotonic()
    child = start(train_demo, tmp_path / "whole", *SHORT)
    child.join()
    duration = time.monotonic() - began
    assert child.exitcode == 0
    run, chance, num_kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(60):
        child = start(train_demo, run, *SHORT)
        if num_kills < 10:
            child.join(chance.uniform(0, 0.4 * duration))
            child.kill()
        child.join()
        num_kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0 and num_kills < 10:  # it was quicker than the kill; its run begins anew
            shutil.rmtree(run)
        elif child.exitcode == 0:
            break
    assert child.exitcode == 0 and num_kills == 10
    assert digests(run) == digests(tmp_path / "whole")


def test_a_sigkill_in_the_middle_of_a_checkpoint_write_changes_nothing(tmp_path):
    """Killed while the temporary folder of a checkpoint is there, three times."""
    child = start(train_demo, tmp_path / "whole", *SHORT)
    child.join()
    run, num_kills = tmp_path / "killed", 0
    while num_kills < 3:
        child = start(train_demo, run, *SHORT, "training.checkpoint.every=1")
        seen = set(run.glob("checkpoints/.step-*"))
        while child.is_alive():
            if set(run.glob("checkpoints/.step-*")) - seen:
                child.kill()
                break
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended before a write was seen"
        num_kills += bool(set(run.glob("checkpoints/.step-*")))
    child = start(train_demo, run, *SHORT)
    child.join()
    assert child.exitcode == 0
    assert digests(run) == digests(tmp_path / "whole")
