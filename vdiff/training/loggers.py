"""Where figures go: a JSON line per entry, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from vdiff.registry import Registered

Figures = Mapping[str, float]


class Logger(Registered, kind="logger"):
    """Receives what the trainer has to say. All but :meth:`log` may be left as they are."""

    def open(self, run: Path, step: int, num_steps: int) -> None:
        """A run begins, or continues after ``step`` steps; what was said of later steps is void."""

    @abstractmethod
    def log(self, step: int, figures: Figures) -> None:
        """Figures after ``step`` steps, on the host."""

    def picture(self, step: int, name: str, image: Any) -> None:
        """A PIL image."""

    def message(self, text: str) -> None:
        """A line for the person who watches."""

    def close(self) -> None:
        """The run ends, for whatever reason."""


class Logging:
    """How often figures are written, and where to besides ``log.jsonl``.

    Args:
        every: Steps between entries; figures are means over these steps.
        loggers: By default a progress bar.
    """

    def __init__(self, every: int = 50, loggers: list[Logger] | None = None) -> None:
        if every < 1:
            raise ValueError(f"logging: every is a number of steps, at least 1; got {every}.")
        self.every = every
        self.loggers: list[Logger] = [ProgressLogger()] if loggers is None else list(loggers)
        if not any(isinstance(logger, JsonlLogger) for logger in self.loggers):
            self.loggers.insert(0, JsonlLogger())


class JsonlLogger(Logger, name="jsonl"):
    """``log.jsonl`` in the run folder: ``{"step": 50, "time": ..., "train/loss": ...}`` per line.

    Each line is handed to the system at once. On resuming, entries after the resumed step and a
    last line torn by a crash are dropped. Figures that are not finite are written as null.
    """

    def __init__(self) -> None:
        self._out: IO[str] | None = None

    def open(self, run: Path, step: int, num_steps: int) -> None:
        file = run / "log.jsonl"
        kept = [json.dumps(entry) + "\n" for entry in read_log(file) if entry["step"] <= step]
        temporary = file.with_name(f".{file.name}.new")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, file)
        self._out = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def log(self, step: int, figures: Figures) -> None:
        if self._out is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self._out.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """The entries of a ``log.jsonl``; a torn line is left out."""
    entries = []
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


class TensorboardLogger(Logger, name="tensorboard"):
    """Figures and pictures in ``tensorboard/`` of the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, run: Path, step: int, num_steps: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "logger/tensorboard needs the package tensorboard: pip install tensorboard, "
                "or leave it out of training.logging.loggers."
            ) from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Any) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressLogger(Logger, name="progress"):
    """A bar with loss, learning rate and the time that is left; plain lines where nobody watches a terminal.

    Args:
        seconds: Least time between two plain lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._bar: Any = None
        self._task: Any = None
        self._num_steps = self._first_step = 0
        self._began = self._last_line = 0.0

    def open(self, run: Path, step: int, num_steps: int) -> None:
        self._num_steps, self._first_step, self._began, self._last_line = num_steps, step, time.monotonic(), 0.0
        if not sys.stdout.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=step, figures="")
        self._bar.start()

    def log(self, step: int, figures: Figures) -> None:
        if "train/loss" not in figures:
            self.message(
                f"step {step}: " + ", ".join(f"{n} {v:.4g}" for n, v in figures.items() if n.endswith("/loss"))
            )
            return
        text = f"loss {figures['train/loss']:.4f}, lr {figures.get('train/lr', math.nan):.2e}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif (now := time.monotonic()) - self._last_line >= self.seconds or step >= self._num_steps:
            self._last_line = now
            rate = (now - self._began) / max(1, step - self._first_step)
            self.message(f"step {step} of {self._num_steps}: {text}, {_clock(rate * (self._num_steps - step))} left")

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
