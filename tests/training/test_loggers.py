import json
import math

import pytest

from vdiff.registry import build
from vdiff.training import Logger, Logging, read_log


def test_lines_after_the_resumed_step_and_a_torn_last_one_are_dropped(tmp_path):
    file = tmp_path / "log.jsonl"
    logger = build("jsonl", "logger")
    logger.open(tmp_path, 0, 100)
    for step in (10, 20, 30):
        logger.log(step, {"train/loss": step / 3})
    logger.close()
    with open(file, "a") as out:
        out.write('{"step": 40, "train/lo')
    assert [e["step"] for e in read_log(file)] == [10, 20, 30]
    logger.open(tmp_path, 20, 100)
    logger.log(30, {"train/loss": 7.0})
    assert [(e["step"], e["train/loss"]) for e in read_log(file)] == [(10, 10 / 3), (20, 20 / 3), (30, 7.0)]
    logger.close()
    assert read_log(tmp_path / "nowhere.jsonl") == []


def test_every_line_is_strict_json(tmp_path):
    logger = build("jsonl", "logger")
    logger.open(tmp_path, 0, 100)
    logger.log(1, {"a": math.nan, "b": math.inf, "c": 0.1})

    def refuse(word):
        raise AssertionError(word)

    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert (entry["a"], entry["b"], entry["c"]) == (None, None, 0.1)
    logger.close()


def test_the_file_is_always_written_and_once():
    assert [type(x).__name__ for x in Logging().loggers] == ["JsonlLogger", "ProgressLogger"]
    assert [type(x).__name__ for x in Logging(loggers=[build("jsonl", "logger")]).loggers] == ["JsonlLogger"]


def test_plain_lines_say_loss_rate_and_time_left(tmp_path, capsys):
    logger = build({"type": "progress", "seconds": 0.0}, "logger")
    logger.open(tmp_path, 0, 100)
    logger.log(50, {"train/loss": 0.25, "train/lr": 1e-3})
    logger.log(100, {"validation/loss": 0.5, "validation/psnr": 3.0})
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 50 of 100: loss 0.2500, lr 1.00e-03, 0:00 left"
    assert lines[1] == "step 100: validation/loss 0.5"


def test_a_bar_is_drawn_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    logger = build("progress", "logger")
    logger.open(tmp_path, 10, 100)
    logger.log(50, {"train/loss": 0.25, "train/lr": 1e-3})
    logger.message("[brackets] are no markup")
    logger.close()
    text = capsys.readouterr().out
    assert "50/100" in text and "loss 0.2500" in text and "[brackets] are no markup" in text


def test_tensorboard_holds_the_figures_and_forgets_later_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = build("tensorboard", "logger")
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 7.0})):
        logger.open(tmp_path, start, 10)
        for step, value in values.items():
            logger.log(step, {"train/loss": value})
        logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_a_logger_of_ones_own_hears_everything(toy, tmp_path):
    heard = []

    class Ear(Logger, abstract=True):
        def open(self, run, step, num_steps):
            heard.append(("open", step, num_steps))

        def log(self, step, figures):
            heard.append((step, sorted(figures)))

        def close(self):
            heard.append("close")

    toy.trainer(4, logging=Logging(every=2, loggers=[Ear()])).fit(toy.engine(), toy.Points(), tmp_path)
    names = ["train/epoch", "train/first", "train/grad_norm", "train/loss", "train/lr"]
    assert heard == [("open", 0, 4), (2, names), (4, names), "close"]
