"""Weights on disk: read from anywhere without running code, written whole or not at all."""

from vdiff.checkpoints.conversion import Converted
from vdiff.checkpoints.conversion import convert as convert_checkpoint
from vdiff.checkpoints.families import FAMILIES, Family, Layout
from vdiff.checkpoints.keymap import KeyMap, KeyMapError, Move, Rule
from vdiff.checkpoints.loading import LoadReport, MismatchError, load_into
from vdiff.checkpoints.parts import read_part, read_parts, translated
from vdiff.checkpoints.published import PublishedReport, check_published, load_published
from vdiff.checkpoints.recognition import Part, Recognised, UnknownFamilyError, is_by_others, recognise
from vdiff.checkpoints.runs import find_checkpoint, read_run_weights
from vdiff.checkpoints.sources import WeightSource, is_in_folders, open_weights
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
    "FAMILIES",
    "Converted",
    "DamagedCheckpointError",
    "Family",
    "KeyMap",
    "KeyMapError",
    "Layout",
    "LoadReport",
    "MismatchError",
    "Move",
    "Part",
    "PublishedReport",
    "Recognised",
    "Rule",
    "UnknownFamilyError",
    "UnsafeFileError",
    "WeightFileError",
    "WeightSource",
    "check_published",
    "convert_checkpoint",
    "find_checkpoint",
    "is_by_others",
    "is_in_folders",
    "load_into",
    "load_published",
    "newest_valid",
    "open_weights",
    "prune",
    "read",
    "read_header",
    "read_metadata",
    "read_part",
    "read_parts",
    "read_run_weights",
    "read_weights",
    "recognise",
    "save_weights",
    "step_folder",
    "steps",
    "tidy",
    "translated",
    "verify",
    "write",
]
