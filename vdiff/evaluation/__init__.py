"""Metrics, reports and pictures of samples."""

from vdiff.evaluation.base import Metric, Reference, Samples, evaluate
from vdiff.evaluation.classifier import ClassifierAccuracy
from vdiff.evaluation.distances import FrechetDistance, NearestDistance
from vdiff.evaluation.pictures import grid, save_picture, titled_rows
from vdiff.evaluation.report import save_figures, table

__all__ = [
    "ClassifierAccuracy",
    "FrechetDistance",
    "Metric",
    "NearestDistance",
    "Reference",
    "Samples",
    "evaluate",
    "grid",
    "save_figures",
    "save_picture",
    "table",
    "titled_rows",
]
