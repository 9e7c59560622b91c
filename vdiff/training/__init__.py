"""Training: a lean loop on torch's own engines, averaged weights, exact resume."""

from vdiff.training.base import FitResult, Training
from vdiff.training.checkpointing import Checkpointing
from vdiff.training.ema import EMA
from vdiff.training.groups import Selection, TrainGroup, select
from vdiff.training.guard import NonFiniteError
from vdiff.training.init import InitEntry
from vdiff.training.loggers import JsonlLogger, Logger, Logging, ProgressLogger, TensorboardLogger, read_log
from vdiff.training.loop import RunLockedError, Trainer, choose_device
from vdiff.training.lr_schedules import (
    ConstantLRSchedule,
    CosineLRSchedule,
    InverseSqrtLRSchedule,
    LinearLRSchedule,
    LRSchedule,
)
from vdiff.training.optimizers import SGD, Adam, AdamW, Optimizer
from vdiff.training.report import start_report
from vdiff.training.run import train
from vdiff.training.stop import EXIT_CODE, Interrupted
from vdiff.training.validation import Validation

__all__ = [
    "EMA",
    "EXIT_CODE",
    "SGD",
    "Adam",
    "AdamW",
    "Checkpointing",
    "ConstantLRSchedule",
    "CosineLRSchedule",
    "FitResult",
    "InverseSqrtLRSchedule",
    "Interrupted",
    "JsonlLogger",
    "LRSchedule",
    "LinearLRSchedule",
    "Logger",
    "Logging",
    "NonFiniteError",
    "Optimizer",
    "ProgressLogger",
    "RunLockedError",
    "Selection",
    "TensorboardLogger",
    "TrainGroup",
    "Trainer",
    "Training",
    "Validation",
    "InitEntry",
    "choose_device",
    "read_log",
    "select",
    "start_report",
    "train",
]
