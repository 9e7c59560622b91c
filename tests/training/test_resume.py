"""A run that is interrupted anywhere ends where the uninterrupted one ends."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from vdiff.checkpoints import read, steps
from vdiff.training import Checkpointing, Interrupted, RunLockedError, read_log


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An uninterrupted run of 12 steps with a checkpoint of each: its folder and fingerprint."""
    run = tmp_path_factory.mktemp("whole")
    engine, trainer = toy.engine(), toy.trainer()
    trainer.fit(engine, toy.Points(), run)
    return run, toy.fingerprint(engine, trainer)


def cut(whole, run, step):
    """A run folder as it was after ``step`` steps."""
    shutil.copytree(whole, run)
    for later, folder in steps(run / "checkpoints").items():
        if later > step:
            shutil.rmtree(folder)
    return run


def test_two_runs_are_equal_and_another_seed_is_not(toy, whole, tmp_path):
    engine, trainer = toy.engine(), toy.trainer()
    torch.manual_seed(99)  # global randomness has no say
    trainer.fit(engine, toy.Points(), tmp_path / "a")
    assert toy.fingerprint(engine, trainer) == whole[1]
    engine, trainer = toy.engine(), toy.trainer(seed=1)
    trainer.fit(engine, toy.Points(), tmp_path / "b")
    assert toy.fingerprint(engine, trainer) != whole[1]


@pytest.mark.parametrize("step", range(1, 13))
def test_resume_after_every_step_is_bitwise_exact(toy, whole, tmp_path, step):
    run = cut(whole[0], tmp_path / "run", step)
    engine, trainer = toy.engine(seed=step), toy.trainer()  # other initial weights must not matter
    torch.manual_seed(step)
    result = trainer.fit(engine, toy.Points(), run)
    assert result.step == 12 and toy.fingerprint(engine, trainer) == whole[1]
    log = [{k: v for k, v in e.items() if k != "time"} for e in read_log(run / "log.jsonl")]
    expected = [{k: v for k, v in e.items() if k != "time"} for e in read_log(whole[0] / "log.jsonl")]
    if step % 2 == 0:  # otherwise the mean of the first entry is over fewer steps
        assert log == expected
    assert [e["step"] for e in log] == [e["step"] for e in expected]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_resume_is_exact_under_autocast_with_its_loss_scale(toy, tmp_path, precision):
    """The loss is large enough for float16 to overflow in the first steps, so that the scale has come down."""

    def run(folder, num_steps):
        engine, trainer = toy.engine(size=30.0), toy.trainer(num_steps, precision=precision, lr_schedule=None)
        trainer.fit(engine, toy.Points(), tmp_path / folder)
        return toy.fingerprint(engine, trainer)

    whole = run("whole", 10)
    run("halves", 6)
    _, state = read(tmp_path / "halves" / "checkpoints" / "step-00000006")
    assert state["scaler"].get("scale", 0.0) < 2**14
    assert run("halves", 10) == whole


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"num_workers": 2}])
def test_workers_change_nothing_and_accumulated_runs_resume(toy, whole, tmp_path, options):
    engine, trainer = toy.engine(), toy.trainer(**options)
    trainer.fit(engine, toy.Points(), tmp_path / "a")
    assert (toy.fingerprint(engine, trainer) == whole[1]) == ("num_workers" in options)
    run = cut(tmp_path / "a", tmp_path / "b", 7)
    again, trainer_again = toy.engine(1), toy.trainer(**options)
    trainer_again.fit(again, toy.Points(), run)
    assert toy.fingerprint(again, trainer_again) == toy.fingerprint(engine, trainer)


def test_a_damaged_checkpoint_is_named_and_passed_over(toy, whole, tmp_path):
    run = cut(whole[0], tmp_path / "run", 9)
    file = run / "checkpoints" / "step-00000009" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    (run / "checkpoints" / ".step-00000010.new").mkdir()  # a write that was killed
    engine, trainer = toy.engine(1), toy.trainer()
    trainer.fit(engine, toy.Points(), run)
    assert toy.fingerprint(engine, trainer) == whole[1]
    report = (run / "report.txt").read_text()
    assert "Resumed after step 8 of 12." in report
    assert "Passed over a damaged checkpoint, step-00000009: optimizer.safetensors has other bytes" in report
    assert not (run / "checkpoints" / ".step-00000010.new").exists()


def test_a_finished_run_is_left_as_it_is(toy, whole, tmp_path):
    run = cut(whole[0], tmp_path / "run", 12)
    before = {f: f.stat().st_mtime_ns for f in (run / "checkpoints").rglob("*")}
    engine, trainer = toy.engine(1), toy.trainer()
    assert trainer.fit(engine, toy.Points(), run).step == 12
    assert toy.fingerprint(engine, trainer) == whole[1]
    assert before == {f: f.stat().st_mtime_ns for f in (run / "checkpoints").rglob("*")}


def test_another_seed_average_or_selection_is_refused(toy, whole, tmp_path):
    run = cut(whole[0], tmp_path / "run", 3)
    with pytest.raises(ValueError, match="written with seed 0, this run has 1"):
        toy.trainer(seed=1).fit(toy.engine(), toy.Points(), run)
    with pytest.raises(ValueError, match="the weights do not fit"):
        toy.trainer().fit(toy.engine(norm=False), toy.Points(), run)


def test_the_newest_are_kept(toy, tmp_path):
    toy.trainer(7, checkpoint=Checkpointing(every=2, keep=2)).fit(toy.engine(), toy.Points(), tmp_path)
    assert list(steps(tmp_path / "checkpoints")) == [7, 6]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_exits_with_75(toy, whole, tmp_path, signum):
    class Signalling(toy.Points, abstract=True):
        def __getitem__(self, index):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 8 * 6 + 3:  # in the middle of a batch; the report made one too
                os.kill(os.getpid(), signum)
            return super().__getitem__(index)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        trainer = toy.trainer(checkpoint=Checkpointing(every=100, keep=None))
        trainer.fit(toy.engine(), Signalling(), tmp_path)
    assert stop.value.code == 75 and list(steps(tmp_path / "checkpoints")) == [stop.value.step] == [6]
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    engine, trainer = toy.engine(1), toy.trainer()
    trainer.fit(engine, toy.Points(), tmp_path)
    assert toy.fingerprint(engine, trainer) == whole[1]


@pytest.mark.slow
def test_sigterm_to_the_whole_group_is_survived_with_workers(toy, tmp_path):
    words = [sys.executable, str(toy.__file__), str(tmp_path / "run"), "100000", "100000", "2"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    child.stdout.readline()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    with pytest.raises(RunLockedError, match=f"another process trains here .process {child.pid} on "):
        toy.trainer().fit(toy.engine(), toy.Points(), tmp_path / "run")
    os.killpg(child.pid, signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 75
    assert len(steps(tmp_path / "run" / "checkpoints")) == 1
