"""Finding weights in a run folder: which checkpoint, raw or averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from torch import Tensor

from vdiff.checkpoints.store import (
    MANIFEST,
    STATE,
    DamagedCheckpointError,
    newest_valid,
    read,
    step_folder,
    steps,
    verify,
)

CHECKPOINTS = "checkpoints"


def find_checkpoint(run: str | Path, step: int | Literal["last", "best"] = "last") -> Path:
    """The checkpoint folder of a run, or ``run`` itself if it is one.

    ``"last"`` passes over damaged ones; a step asked for by number, or the best, is never replaced by another.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpointError: the one asked for is damaged, or all are.
    """
    if step not in ("last", "best") and (not isinstance(step, int) or isinstance(step, bool)):
        raise ValueError(f"{run}: step is 'last', 'best' or a whole number, got {step!r}.")
    run = Path(run)
    if (run / MANIFEST).is_file():
        return run
    root = run / CHECKPOINTS
    known = steps(root)
    if not known:
        raise FileNotFoundError(f"{run}: no checkpoint here; expected {root}/step-*. Train it: vdiff train ...")
    newest, damaged = newest_valid(root)
    if step == "best" and newest is not None:
        best = json.loads((newest / STATE).read_text(encoding="utf-8")).get("best")
        if best is None:
            raise FileNotFoundError(
                f"{run}: this run kept no best checkpoint; set training.checkpoint.best to a metric."
            )
        step = int(best["step"])
    if isinstance(step, int):
        if step not in known:
            raise FileNotFoundError(
                f"{run}: no checkpoint of step {step}. Steps: {', '.join(map(str, sorted(known)))}."
            )
        folder = step_folder(root, step)
        if problems := verify(folder):
            raise DamagedCheckpointError(f"{folder}: a damaged checkpoint: {'; '.join(problems)}.")
        return folder
    if newest is None:
        reasons = "\n".join(f"  {folder.name}: {why}" for folder, why in damaged)
        raise DamagedCheckpointError(f"{run}: every checkpoint is damaged:\n{reasons}")
    return newest


def read_run_weights(
    run: str | Path, weights: Literal["ema", "raw"] = "ema", step: int | Literal["last", "best"] = "last"
) -> tuple[dict[str, Tensor], Path]:
    """The engine's weights of a run or of one checkpoint folder, and the folder they came from.

    ``"ema"``: averaged where an average was kept, as trained elsewhere (frozen parts, buffers).

    Raises:
        FileNotFoundError: no checkpoint, or the run kept no average.
        DamagedCheckpointError: see :func:`find_checkpoint`.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"{run}: weights are 'ema' or 'raw', got {weights!r}.")
    folder = find_checkpoint(run, step)
    if weights == "ema" and not (folder / "ema.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: this run kept no averaged weights; read them with weights='raw'.")
    files, _ = read(folder, only=["model", "ema"] if weights == "ema" else ["model"])
    model = files["model"]
    for name, value in files.get("ema", {}).items():
        model[name] = value.to(model[name].dtype)
    return model, folder
