"""Data sets, the order they are visited in, and batches by number."""

from vdiff.data.arrays import ArraysDataset
from vdiff.data.base import Dataset, Group, Row
from vdiff.data.captions import CaptionsDataset
from vdiff.data.collate import Batch, collate, noise_key
from vdiff.data.digits import Digits
from vdiff.data.dreambooth import DreamBoothDataset
from vdiff.data.folder import BrokenFileError, FolderDataset, TooManyBrokenError
from vdiff.data.framing import Framing, read_picture
from vdiff.data.image_folder import ImageFolder
from vdiff.data.joint import DerivedMap, JointDataset, SobelMap
from vdiff.data.loader import Loader
from vdiff.data.mixture import MixtureDataset
from vdiff.data.moving_digits import MovingDigits
from vdiff.data.order import index
from vdiff.data.pair_rows import PairRowsDataset
from vdiff.data.pairs import PairsDataset
from vdiff.data.ranges import check_range, check_values
from vdiff.data.video_file import FrameTable, frame_table, read_frames
from vdiff.data.video_folder import VideoFolder

__all__ = [
    "ArraysDataset",
    "Batch",
    "BrokenFileError",
    "CaptionsDataset",
    "Dataset",
    "DerivedMap",
    "Digits",
    "DreamBoothDataset",
    "FolderDataset",
    "FrameTable",
    "Framing",
    "Group",
    "ImageFolder",
    "JointDataset",
    "Loader",
    "MixtureDataset",
    "MovingDigits",
    "PairRowsDataset",
    "PairsDataset",
    "Row",
    "SobelMap",
    "TooManyBrokenError",
    "VideoFolder",
    "check_range",
    "check_values",
    "collate",
    "frame_table",
    "index",
    "noise_key",
    "read_frames",
    "read_picture",
]
