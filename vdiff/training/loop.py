"""The training loop.

Everything a step depends on is the weights, the optimizer's memory and the number of the step; data
order, levels, noise and dropout are functions of (seed, step). So a run that is killed and started
again ends with the same weights, bit for bit, on the same kind of machine.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.data import Dataset, Loader
from vdiff.hooks import attached
from vdiff.mixins import Companion
from vdiff.process import forked, upload
from vdiff.training.base import FitResult, Training
from vdiff.training.checkpointing import Checkpointing, RunState, latest, recorded_new
from vdiff.training.ema import EMA, lend
from vdiff.training.figures import Means
from vdiff.training.groups import TrainGroup, check_words, select
from vdiff.training.guard import BadStep, FiniteGuard, NonFiniteError
from vdiff.training.init import InitEntry, Initialised, initialize
from vdiff.training.loggers import Logging
from vdiff.training.lr_schedules import ConstantLRSchedule, LRSchedule
from vdiff.training.optimizers import AdamW, Optimizer
from vdiff.training.report import start_report
from vdiff.training.stop import Interrupted, StopRequest, stop_requests
from vdiff.training.validation import Validation

ON_HOST = ("noise_key", "position", "index")  # keys of randomness are read on the host


class RunLockedError(RuntimeError):
    """Another process trains in this run folder."""


class Trainer(Training, name="loop"):
    """Trains an engine with torch's own optimizers, one process, one device.

    Args:
        num_steps: Optimizer steps of the whole run.
        batch_size: Examples per step, accumulated ones included.
        accumulate: Micro-batches per step; must divide ``batch_size``.
        seed: Of the initial weights, the order of the data, levels, noise and dropout.
        optimizer, lr_schedule: By default AdamW at a constant rate.
        train: What is trained, first match wins, the rest is frozen; by default everything that is
            not frozen by its own module.
        init: Weights to start from, loaded in order; not used when resuming.
        ema: Keeps an average of what is trained; None keeps none.
        precision: Of the forward pass under autocast. Parameters and optimizer stay as they are.
        clip: Largest norm of the gradient of all parameters together; None does not clip.
        checkpoint, validation, logging: When and how; None means defaults, no validation set no validation.
        num_workers: Processes that prepare data; never changes a batch.
        device: ``auto`` takes CUDA, then MPS, then the CPU.
        compile: Compile the engine's network.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        batch_size: int = 32,
        accumulate: int = 1,
        seed: int = 0,
        optimizer: Optimizer | None = None,
        lr_schedule: LRSchedule | None = None,
        train: list[TrainGroup] | None = None,
        init: list[InitEntry] | None = None,
        ema: EMA | None = None,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        clip: float | None = None,
        checkpoint: Checkpointing | None = None,
        validation: Validation | None = None,
        logging: Logging | None = None,
        num_workers: int = 0,
        device: str = "auto",
        compile: bool = False,
    ) -> None:
        for name, value in (("num_steps", num_steps), ("batch_size", batch_size), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"Trainer: {name} must be at least 1, got {value}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"Trainer: clip must be positive, got {clip}.")
        self.num_steps, self.batch_size, self.accumulate, self.seed = num_steps, batch_size, accumulate, seed
        self.optimizer = AdamW() if optimizer is None else optimizer
        self.lr_schedule = ConstantLRSchedule() if lr_schedule is None else lr_schedule
        self.train, self.init, self.ema = train, init or [], ema
        self.precision, self.clip, self.num_workers, self.compile = precision, clip, num_workers, compile
        self.checkpoint = Checkpointing() if checkpoint is None else checkpoint
        self.validation = Validation() if validation is None else validation
        self.logging = Logging() if logging is None else logging
        self.device = choose_device(device)

    # The run -------------------------------------------------------------------------------------

    def fit(self, engine: nn.Module, data: Dataset | Mapping[str, Any], run: str | Path) -> FitResult:
        """Train in a run folder, from its newest valid checkpoint if it has one.

        Raises:
            NonFiniteError: a loss or gradient is not finite; names step and examples.
            RunLockedError: another process trains here.
            Interrupted: SIGTERM or SIGINT came; the run was saved, and the exit code is 75.
        """
        run = Path(run)
        run.mkdir(parents=True, exist_ok=True)
        datasets = dict(data) if isinstance(data, Mapping) else {"train": data}
        loader = Loader(datasets["train"], self.batch_size, self.seed, self.accumulate, self.num_workers)
        with locked(run), stop_requests() as stop, lend(self.ema, engine):
            state, notes = self.prepare(engine, run)
            report = start_report(engine, state.selection, datasets, loader.batch(0), notes)
            (run / "report.txt").write_text(report, encoding="utf-8")
            try:
                for logger in self.logging.loggers:
                    logger.open(run, state.step, self.num_steps)
                    logger.message(report)
                figures = self.steps(state, loader, datasets.get("validation"), run, stop)
            finally:
                for logger in self.logging.loggers:
                    logger.close()
        return FitResult(state.step, run / "checkpoints" / f"step-{state.step:08d}", figures)

    def prepare(self, engine: nn.Module, run: Path) -> tuple[RunState, list[str]]:
        """Choose, place and restore; the notes say what was loaded from where."""
        check_words(engine, self.train)
        engine.to(self.device)
        folder, passed_over = latest(run / "checkpoints")
        companions = [m for m in attached(engine).values() if isinstance(m, Companion)]
        copied = any(companion.source == "copy" for companion in companions)
        begun = initialize(engine, self.init) if copied or folder is None else Initialised((), None)
        for companion in companions:
            companion.begin()  # a copy of the weights that the run starts from, also where it goes on from later ones
        new = begun.new if folder is None else recorded_new(folder)
        selection = select(engine, self.train, self.optimizer, new)
        optimizer = self.optimizer(selection.groups)
        scheduler = self.lr_schedule(optimizer, self.num_steps)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        state = RunState(engine, selection, optimizer, scheduler, scaler, self.ema, self.seed)
        if self.ema is not None:
            self.ema.start(selection.trained)
        if folder is None:
            notes = [f"Initialised: {line}" for line in begun.lines]
        else:
            state.restore(folder)
            notes = [f"Resumed after step {state.step} of {self.num_steps}."]
        notes += [f"Passed over a damaged checkpoint, {bad.name}: {why}" for bad, why in passed_over]
        if self.compile:
            engine.compile()
        return state, notes

    def steps(
        self, state: RunState, loader: Loader, validation_set: Dataset | None, run: Path, stop: StopRequest
    ) -> dict[str, float]:
        """All steps that are left. Returns the last value of each figure."""
        guard = FiniteGuard(is_immediate=self.device.type == "cpu" or not _can_skip(state.optimizer))
        held_out = None if validation_set is None else self.validation.loader(validation_set, self.batch_size)
        means = Means()
        latest: dict[str, float] = {}
        try:
            if self.is_due(state, self.validation.every) and held_out is not None and state.validated != state.step:
                latest |= self.validate(state, held_out, run)  # a stop request came before it
                if _is_best_now(state):
                    state.save(run / "checkpoints", self.checkpoint)
            for micros in self.batches(loader, state, stop):
                state.selection.set_modes()
                with forked(self.seed, "step", state.step, loader.rank):
                    means.add(self.step(state, micros, guard))
                state.step += 1
                if self.is_due(state, self.logging.every):
                    guard.look()
                    latest |= self.log(state.step, self.train_figures(state, means, loader))
                if self.is_due(state, self.validation.every) and held_out is not None and not stop:
                    guard.look()
                    latest |= self.validate(state, held_out, run)
                if self.is_due(state, self.checkpoint.every) or _is_best_now(state):
                    guard.look()
                    state.save(run / "checkpoints", self.checkpoint)
            guard.look()
        except BadStep as bad:
            raise NonFiniteError(_name_examples(bad, loader, run, state.saved_step)) from None
        if state.saved_step != state.step:
            state.save(run / "checkpoints", self.checkpoint)
        if state.step < self.num_steps:
            raise Interrupted(state.step)
        return latest

    def is_due(self, state: RunState, every: int) -> bool:
        """What happens every so many steps happens after the last one too."""
        return state.step > 0 and (state.step % every == 0 or state.step == self.num_steps)

    def train_figures(self, state: RunState, means: Means, loader: Loader) -> dict[str, float]:
        figures = {f"train/{name}": value for name, value in means.read().items()}
        lr = state.optimizer.param_groups[0]["lr"]
        return {**figures, "train/lr": lr, "train/epoch": loader.epoch_at(state.step)}

    # One step ------------------------------------------------------------------------------------

    def step(self, state: RunState, micros: list[dict[str, Any]], guard: FiniteGuard) -> dict[str, Tensor]:
        """Gradients of the mean over all rows, then one step of the optimizer; nothing here waits for the device."""
        params = list(state.selection.trained.values())
        state.optimizer.zero_grad(set_to_none=True)
        losses, metrics = [], []
        for micro in micros:
            with self.autocast():
                values = state.engine(self.move(micro))
            state.scaler.scale(values.per_row.mean() / len(micros)).backward()
            losses.append(values.per_row.detach())
            metrics.append(values.metrics)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        per_row = torch.cat(losses)
        bad = guard.check(state.step, per_row, None if state.scaler.is_enabled() else norm)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self.clip, norm)
        if bad is not None and not state.scaler.is_enabled():  # fused kernels leave the weights alone where it is 1
            state.optimizer.grad_scale, state.optimizer.found_inf = None, bad  # type: ignore[attr-defined]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.update(state.selection.trained, state.step + 1)
        joined = {name: torch.cat([m[name] for m in metrics if name in m]) for name in metrics[0]}
        return {"loss": per_row, "grad_norm": norm, **joined}

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    def move(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the device, except for the keys of its randomness."""
        return {
            k: upload(v, self.device) if isinstance(v, Tensor) and k not in ON_HOST else v for k, v in batch.items()
        }

    # Around it -----------------------------------------------------------------------------------

    def batches(self, loader: Loader, state: RunState, stop: StopRequest) -> Iterator[list[dict[str, Any]]]:
        """Batches of the steps that are left; ends early where a signal took the workers away."""
        ready = loader.batches(state.step, self.num_steps)
        while state.step < self.num_steps and not stop:
            try:
                yield next(ready)
            except RuntimeError:
                if not stop:
                    raise
                return  # a signal to the whole group reaches workers first; what is trained so far is saved

    def validate(self, state: RunState, loader: Loader, run: Path) -> dict[str, float]:
        how = (state.engine, loader, self.move, state.ema, self.autocast)
        figures, image = self.validation.figures(*how), self.validation.picture(*how)
        if image is not None:
            from vdiff.evaluation import save_film, save_picture

            if isinstance(image, list):
                save_film(image, run / "pictures" / f"step-{state.step:08d}.gif")
                image = image[-1]  # what a logger shows of a video
            else:
                save_picture(image, run / "pictures" / f"step-{state.step:08d}.png")
            for logger in self.logging.loggers:
                logger.picture(state.step, "validation", image)
        if (metric := self.checkpoint.best) is not None:
            if metric not in figures:
                raise ValueError(f"checkpoint.best: no metric is called {metric!r}. There are: {', '.join(figures)}.")
            value = figures[metric]
            if math.isfinite(value) and (state.best is None or value < state.best["value"]):
                state.best = {"metric": metric, "value": value, "step": state.step}
        state.validated = state.step
        return self.log(state.step, figures)

    def log(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        for logger in self.logging.loggers:
            logger.log(step, figures)
        return figures


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, then MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One trainer per run folder; the lock goes with the process, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = run / ".owner"
        who = owner.read_text() if owner.exists() else "unknown"
        raise RunLockedError(
            f"{run}: another process trains here ({who}). Wait for it, or choose another folder."
        ) from None
    try:
        (run / ".owner").write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Fused kernels read ``found_inf`` on the device."""
    return bool(optimizer.defaults.get("fused"))


def _is_best_now(state: RunState) -> bool:
    return state.best is not None and state.best["step"] == state.step


def _name_examples(bad: BadStep, loader: Loader, run: Path, saved: int | None) -> str:
    """Batches are functions of the step, so the bad one is made again to name its examples."""
    micros = [loader.batch(bad.step, micro) for micro in range(loader.accumulate)]
    indices = [int(i) for micro in micros for i in micro["index"]]
    rows = [indices[row] for row in bad.rows]
    what, chosen = ("loss", rows) if rows else ("gradient", indices)
    shown = ", ".join(map(str, chosen[:16])) + (f" and {len(chosen) - 16} more" if len(chosen) > 16 else "")
    kept = f"The last checkpoint is step {saved}." if saved is not None else "There is no checkpoint yet."
    return (
        f"{run}: the {what} is not finite in step {bad.step} (counted from 0), examples {shown} of the training set. "
        f"The optimizer did not take this step. {kept} Look at these examples, lower the learning rate, or set clip."
    )
