import builtins
import json
import os
import random
import shutil

import pytest
import torch

from vdiff.checkpoints import (
    DamagedCheckpointError,
    find_checkpoint,
    newest_valid,
    prune,
    read,
    read_run_weights,
    step_folder,
    steps,
    tidy,
    verify,
    write,
)


def files(value):
    return {"model": {"w": torch.full((40,), float(value))}, "ema": {"w": torch.full((40,), -float(value))}}


def test_reading_gives_what_was_written(tmp_path):
    folder = write(step_folder(tmp_path, 3), files(3), {"step": 3, "x": [1, 0.1]})
    assert folder.name == "step-00000003" and verify(folder) == []
    back, state = read(folder)
    assert torch.equal(back["model"]["w"], torch.full((40,), 3.0)) and state == {"step": 3, "x": [1, 0.1]}
    only, _ = read(folder, only=["ema"])
    assert set(only) == {"ema"}
    with pytest.raises(DamagedCheckpointError, match="has no optimizer. It has: model, ema"):
        read(folder, only=["optimizer"])


def test_every_flipped_bit_every_cut_and_every_zeroed_tail_is_noticed(tmp_path):
    folder = write(tmp_path / "step-1", files(1), {"step": 1})
    chance = random.Random(0)
    num_silent = 0
    for name in sorted(os.listdir(folder)):
        good = (folder / name).read_bytes()
        for fault in ("flip", "cut", "zero"):
            for _ in range(40 if fault == "flip" else 5):
                bad = bytearray(good)
                place = chance.randrange(len(bad))
                if fault == "flip":
                    bad[place] ^= 1 << chance.randrange(8)
                elif fault == "cut":
                    del bad[place:]
                else:
                    bad[place:] = bytes(len(bad) - place)
                if bad == good:
                    continue
                (folder / name).write_bytes(bad)
                num_silent += verify(folder) == []
        (folder / name).write_bytes(good)
    assert num_silent == 0 and verify(folder) == []


def test_a_missing_an_extra_and_a_mixed_file_are_named(tmp_path):
    folder = write(tmp_path / "step-1", files(1), {})
    other = write(tmp_path / "step-2", files(2), {})
    (folder / "more.safetensors").write_bytes(b"")
    assert verify(folder) == ["more.safetensors does not belong to it"]
    (folder / "more.safetensors").unlink()
    shutil.copy(other / "ema.safetensors", folder)
    assert verify(folder) == ["ema.safetensors has other bytes than were written (sha256 differs)"]
    (folder / "ema.safetensors").unlink()
    assert verify(folder) == ["ema.safetensors is missing"]
    assert verify(folder, only=["model"]) == []
    with pytest.raises(DamagedCheckpointError, match=r"step-1: a damaged checkpoint: ema\.safetensors is missing"):
        read(folder)


def test_a_format_of_the_future_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vdiff.checkpoints.store.FORMAT", 2)
    folder = write(tmp_path / "step-1", files(1), {})
    monkeypatch.undo()
    assert "update vdiff" in verify(folder)[0]


def test_the_newest_valid_one_is_found_and_the_damaged_are_named(tmp_path):
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    for step in (1, 2, 3):
        write(step_folder(tmp_path, step), files(step), {"step": step})
    (step_folder(tmp_path, 3) / "model.safetensors").write_bytes(b"short")
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-x").mkdir()
    folder, damaged = newest_valid(tmp_path)
    assert folder == step_folder(tmp_path, 2)
    assert [f.name for f, _ in damaged] == ["step-00000009", "step-00000003"]
    assert damaged[0][1] == "no manifest.json" and "5 bytes of" in damaged[1][1]


def test_pruning_keeps_the_newest_whole_ones_and_the_protected(tmp_path):
    for step in range(1, 7):
        write(step_folder(tmp_path, step), files(step), {})
    (step_folder(tmp_path, 6) / "model.safetensors").unlink()
    deleted = prune(tmp_path, 2, protect=[step_folder(tmp_path, 1)])
    assert {f.name[-1] for f in deleted} == {"2", "3"}
    assert set(steps(tmp_path)) == {1, 4, 5, 6}
    assert prune(tmp_path, None) == []


def file_events(monkeypatch, kill_at, action):
    """Do ``action`` at the ``kill_at``-th file event; returns the list of events seen."""
    events = []

    def watch(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            events.append(name)
            if len(events) == kill_at:
                action()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir"):
        watch(os, name)
    watch(builtins, "open")
    return events


def killed_write(folder, kill_at):
    """In a child process: write and die at the given event, without any clean-up. Whether it died."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        file_events(patch, kill_at, lambda: os._exit(9))
        write(folder, files(7), {"step": 7})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("is_there_already", [False, True])
def test_death_at_any_file_event_leaves_the_earlier_ones_and_the_next_write_tidies(tmp_path, is_there_already):
    """Replacing a folder of the same step: whatever is found is whole, old or new."""
    kill_at = 0
    while True:
        kill_at += 1
        root = tmp_path / str(kill_at)
        write(step_folder(root, 5), files(5), {"step": 5})
        if is_there_already:
            write(step_folder(root, 7), files(6), {"step": 6})
        died = killed_write(step_folder(root, 7), kill_at)
        tidy(root)
        folder, damaged = newest_valid(root)
        assert damaged == []
        _, state = read(folder)
        assert state["step"] in ((6, 7) if is_there_already else (5, 7))
        assert set(os.listdir(root)) <= {"step-00000005", "step-00000007"}
        write(step_folder(root, 7), files(8), {"step": 8})
        assert read(step_folder(root, 7))[1] == {"step": 8}
        if not died:
            break
    assert kill_at > 10


def test_an_error_at_any_file_event_leaves_nothing_of_the_attempt(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    num_errors, kill_at, events = 0, 0, [""]
    while len(events) >= kill_at:
        kill_at += 1
        root = tmp_path / str(kill_at)
        write(step_folder(root, 5), files(5), {"step": 5})
        write(step_folder(root, 7), files(6), {"step": 6})
        with monkeypatch.context() as patch:
            events = file_events(patch, kill_at, full)
            try:
                write(step_folder(root, 7), files(7), {"step": 7})
            except OSError as error:
                num_errors += 1
                assert error.errno == 28 and "this checkpoint was not written" in str(error)
        tidy(root)
        assert newest_valid(root)[0] == step_folder(root, 7)
        assert read(step_folder(root, 7))[1]["step"] in (6, 7)
        assert set(os.listdir(root)) == {"step-00000005", "step-00000007"}
    assert num_errors >= 8


def test_an_interrupted_replacement_is_undone(tmp_path):
    write(tmp_path / "step-1", files(1), {"step": 1})
    os.rename(tmp_path / "step-1", tmp_path / ".step-1.old")
    (tmp_path / ".step-1.new").mkdir()
    tidy(tmp_path)
    assert os.listdir(tmp_path) == ["step-1"] and verify(tmp_path / "step-1") == []


def run_folder(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        model = {"w": torch.full((2,), float(step)), "frozen": torch.zeros(1), "half": torch.ones(2).half()}
        ema = {"w": torch.full((2,), -float(step)), "half": torch.full((2,), 0.5)}
        write(step_folder(root, step), {"model": model, "ema": ema}, {"step": step, "best": {"step": 2}})
    return tmp_path


def test_run_weights_are_averaged_where_an_average_was_kept(tmp_path):
    run = run_folder(tmp_path)
    weights, folder = read_run_weights(run)
    assert folder.name == "step-00000003" and weights["w"][0] == -3 and weights["frozen"] == 0
    assert weights["half"].dtype == torch.float16 and weights["half"][0] == 0.5
    assert read_run_weights(run, "raw", step="best")[0]["w"][0] == 2
    assert read_run_weights(folder, "raw")[0]["w"][0] == 3


def test_only_the_last_one_falls_back(tmp_path):
    run = run_folder(tmp_path)
    (step_folder(run / "checkpoints", 3) / "model.safetensors").unlink()
    assert find_checkpoint(run).name == "step-00000002"
    with pytest.raises(DamagedCheckpointError, match="missing"):
        find_checkpoint(run, step=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4. Steps: 1, 2, 3"):
        find_checkpoint(run, step=4)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        find_checkpoint(tmp_path / "other")
    for step in (1, 2):
        manifest = step_folder(run / "checkpoints", step) / "manifest.json"
        manifest.write_text(json.dumps({}))
    with pytest.raises(DamagedCheckpointError, match="every checkpoint is damaged"):
        find_checkpoint(run)


@pytest.mark.parametrize("step, weights", [("40", "raw"), ("lsat", "raw"), (True, "raw"), ("last", "emma")])
def test_a_step_or_kind_of_weights_that_does_not_exist_is_refused(tmp_path, step, weights):
    write(tmp_path / "checkpoints" / "step-00000040", {"model": {"a": torch.zeros(1)}}, {"step": 40})
    with pytest.raises(ValueError, match="'raw'|'best'"):
        read_run_weights(tmp_path, weights, step)
