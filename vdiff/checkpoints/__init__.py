"""Weights on disk: read from anywhere without running code, written whole or not at all."""

from vdiff.checkpoints.loading import LoadReport, MismatchError, load_into
from vdiff.checkpoints.runs import find_checkpoint, read_run_weights
from vdiff.checkpoints.store import (
    DamagedCheckpointError,
    newest_valid,
    prune,
    read,
    step_folder,
    steps,
    tidy,
    verify,
    write,
)
from vdiff.checkpoints.weights import (
    UnsafeFileError,
    WeightFileError,
    read_header,
    read_metadata,
    read_weights,
    save_weights,
)

__all__ = [
    "DamagedCheckpointError",
    "LoadReport",
    "MismatchError",
    "UnsafeFileError",
    "WeightFileError",
    "find_checkpoint",
    "load_into",
    "newest_valid",
    "prune",
    "read",
    "read_header",
    "read_metadata",
    "read_run_weights",
    "read_weights",
    "save_weights",
    "step_folder",
    "steps",
    "tidy",
    "verify",
    "write",
]
