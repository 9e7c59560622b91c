"""Metrics, reports and pictures of samples."""

from vdiff.evaluation.base import Metric, Reference, Samples, evaluate
from vdiff.evaluation.classifier import ClassifierAccuracy
from vdiff.evaluation.costs import Costs, ModuleCost, count_costs
from vdiff.evaluation.distances import FrechetDistance, NearestDistance
from vdiff.evaluation.motion import Straightness, VideoClassifierAccuracy
from vdiff.evaluation.pictures import grid, save_picture, titled_rows
from vdiff.evaluation.plots import num_calls, plot_levels, plot_runs, plot_schedules, plot_solvers, solver_errors
from vdiff.evaluation.reconstruction import Reconstructions, latent_statistics, reconstruction_figures
from vdiff.evaluation.report import save_figures, table
from vdiff.evaluation.summary import summary_table
from vdiff.evaluation.videos import film, save_film, titled_film

__all__ = [
    "ClassifierAccuracy",
    "Costs",
    "FrechetDistance",
    "Metric",
    "ModuleCost",
    "NearestDistance",
    "Reconstructions",
    "Reference",
    "Samples",
    "Straightness",
    "VideoClassifierAccuracy",
    "count_costs",
    "evaluate",
    "film",
    "grid",
    "latent_statistics",
    "num_calls",
    "plot_levels",
    "plot_runs",
    "plot_schedules",
    "plot_solvers",
    "reconstruction_figures",
    "save_figures",
    "save_film",
    "save_picture",
    "solver_errors",
    "summary_table",
    "table",
    "titled_film",
    "titled_rows",
]
