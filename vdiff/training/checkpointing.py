"""Saving and restoring a run: everything that the next step depends on, and nothing that it does not.

Data order, noise and dropout are functions of (seed, step); so beside the weights there is the
optimizer's memory, the average, the loss scale and the step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.checkpoints import load_into, newest_valid, prune, read, step_folder, tidy, write
from vdiff.checkpoints.store import STATE
from vdiff.hooks import attached
from vdiff.training.ema import EMA
from vdiff.training.groups import Selection
from vdiff.training.optimizers import optimizer_memory, restore_optimizer


class Checkpointing:
    """When checkpoints are written and which are kept.

    Args:
        every: Steps between them; the last step is always saved, and so is a run that is told to stop.
        keep: How many of the newest are kept; None keeps all.
        best: Validation metric (such as ``validation/loss`` or ``validation/ema/loss``) whose smallest
            value is saved when met, and kept beside the newest.
        adapters: Whether each mixin is also saved alone, as ``adapters/NAME.safetensors`` of the run.
    """

    def __init__(
        self, every: int = 1000, keep: int | None = 3, best: str | None = None, adapters: bool = False
    ) -> None:
        if every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"checkpoint: every and keep must be at least 1, got {every} and {keep}.")
        self.every, self.keep, self.best, self.adapters = every, keep, best, adapters


@dataclass
class RunState:
    """What a checkpoint holds, live.

    Attributes:
        step: Steps taken.
        best: ``{"metric", "value", "step"}`` of the best validation so far, or None.
        validated: Step of the last validation.
        saved_step: Of the newest checkpoint written or read.
    """

    engine: nn.Module
    selection: Selection
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: EMA | None
    seed: int
    step: int = 0
    best: dict[str, Any] | None = None
    validated: int = 0
    saved_step: int | None = None

    def save(self, root: Path, settings: Checkpointing) -> Path:
        """Write the checkpoint of the present step and let go of old ones."""
        memory, numbers = optimizer_memory(self.optimizer, self.selection.names)
        files: dict[str, dict[str, Tensor]] = {
            "model": {n: v for n, v in self.engine.state_dict().items() if isinstance(v, Tensor)},
            "optimizer": memory,
        }
        if self.ema is not None:
            files["ema"] = self.ema.state_dict()
        state = {
            "step": self.step,
            "seed": self.seed,
            "best": self.best,
            "validated": self.validated,
            "optimizer": numbers,
            "scaler": self.scaler.state_dict(),
            "lr_schedule": self.lr_scheduler.state_dict(),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "new": None if self.selection.new is None else list(self.selection.new),
            "torch": str(torch.__version__),
        }
        folder = write(step_folder(root, self.step), files, state)
        self.saved_step = self.step
        kept = [folder] if self.best is None else [folder, step_folder(root, int(self.best["step"]))]
        prune(root, settings.keep, protect=kept)
        if settings.adapters:
            self._save_adapters(root.parent / "adapters")
        return folder

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it is of another engine, optimizer or seed.
        """
        files, state = read(folder)
        if state["seed"] != self.seed:
            raise ValueError(
                f"{folder}: written with seed {state['seed']}, this run has {self.seed}; take another run folder."
            )
        report = load_into(self.engine, files["model"], where=str(folder))
        if report.attachments:
            raise ValueError(
                f"{folder}: has no weights of the mixins attached now. Start a new run from it with `init:`."
            )
        restore_optimizer(self.optimizer, self.selection.names, files["optimizer"] | state["optimizer"])
        if self.ema is not None:
            if "ema" not in files:
                raise ValueError(
                    f"{folder}: holds no average, and this run keeps one. Start a new run from it with `init:`."
                )
            self.ema.load_state_dict(files["ema"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = int(state["step"])
        self.best, self.validated = state["best"], state["validated"]
        self.lr_scheduler.load_state_dict(state["lr_schedule"])
        for group, lr in zip(self.optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr

    def _save_adapters(self, folder: Path) -> None:
        for name, mixin in attached(self.engine).items():
            if mixin.state_dict():
                folder.mkdir(parents=True, exist_ok=True)
                mixin.save(folder / f"{name}.safetensors")


def latest(root: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest valid checkpoint, if there is one, and the damaged ones passed over; what killed writers left goes."""
    root.mkdir(parents=True, exist_ok=True)
    tidy(root)
    return newest_valid(root)


def recorded_new(folder: Path) -> list[str] | None:
    """What ``train: [{on: new}]`` meant in the run that wrote a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8")).get("new")
