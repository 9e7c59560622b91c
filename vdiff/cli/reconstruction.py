"""``vdiff evaluate`` for the run of an autoencoder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from vdiff.data import Dataset
from vdiff.engine import AutoencoderEngine
from vdiff.evaluation import latent_statistics, reconstruction_figures, save_figures, save_picture, table, titled_rows


def evaluate_autoencoder(engine: AutoencoderEngine, data: Mapping[str, Dataset], arguments: argparse.Namespace) -> int:
    """PSNR of the validation split, mean and spread of the training split's latents, and a picture."""
    run = Path(arguments.folder)
    test = reconstruction_figures(engine, data["validation"], arguments.batch_size)
    statistics = latent_statistics(engine, data["train"], arguments.batch_size)
    figures = {**test.figures, **statistics}
    out = Path(arguments.out or run / "evaluation.json")
    save_figures(figures, out)
    print(f"{run}: {len(data['validation'])} reconstructions with the {engine.weights}")
    print(table(figures))
    scale, shift = 1 / statistics["latent_std"], statistics["latent_mean"]
    print(f"for unit variance in a latent model: first_stage: {{scale: {scale:.4g}, shift: {shift:.4g}}}")
    if test.inputs.ndim == 4 and test.inputs.shape[1] in (1, 3):
        rows = {"inputs": test.inputs[:12], "reconstructions": test.reconstructions[:12]}
        save_picture(titled_rows(rows, *engine.first_stage.pixel_range), out.with_name("reconstructions.png"))
        print(f"picture in {out.with_name('reconstructions.png')}")
    print(f"figures in {out}")
    return 0
