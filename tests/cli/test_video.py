"""The command line on a run of videos: pictures that move, and figures about how they do."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vdiff.cli import main

ROOT = Path(__file__).parents[2]

SMALL = [
    "engine.denoiser.network.channels=16",
    "engine.denoiser.network.in_channels=4",
    "engine.denoiser.network.out_channels=4",
    "engine.first_stage.num_frames=4",
    "engine.sampler.num_steps=2",
    "training.num_steps=2",
    "training.batch_size=8",
    "training.validation.num_batches=1",
    "training.validation.num_pictures=3",
    "training.lr_schedule.warmup=1",
    "engine.sample_shape=[1, 4, 12, 12]",
    *(
        f"data.{part}.{words}"
        for part in ("train", "validation")
        for words in ("paths=1", "size=12", "num_frames=4", "travel=[0, 2]")
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "moving"
    assert main(["train", str(ROOT / "configs" / "moving_digits.yaml"), *SMALL, "--out", str(folder)]) == 0
    return folder


def frames(file):
    with Image.open(file) as gif:
        return gif.n_frames


def test_validation_pictures_of_a_video_run_move(run):
    (file,) = (run / "pictures").iterdir()
    assert file.name == "step-00000002.gif" and frames(file) == 4


def test_samples_are_a_gif_by_default_or_what_the_name_says(run, capsys):
    assert main(["sample", str(run), "--num", "2"]) == 0
    assert frames(run / "samples.gif") == 4
    assert f"{run / 'samples.gif'}: 2 samples" in capsys.readouterr().out
    for name in ("x.mp4", "y.safetensors"):
        assert main(["sample", str(run), "--num", "2", "--fps", "4", "--out", str(run / name)]) == 0
        assert (run / name).stat().st_size > 300


def test_a_name_that_cannot_be_written_is_refused_before_anything_is_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr("vdiff.cli.sampling.draw", lambda *_, **__: pytest.fail("it was drawn"))
    assert main(["sample", str(run), "--out", "x.png"]) == 2
    assert "samples of this run are videos; they are saved as .gif, .mp4, .safetensors" in capsys.readouterr().err


def test_a_run_of_videos_is_measured_by_what_measures_videos(run, capsys):
    assert main(["evaluate", str(run), "--num", "20"]) == 0
    out, figures = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    assert "straight" in out and "video classifier accuracy" in out
    assert figures["straight_real"] == 1 and figures["video_classifier_accuracy_real"] > 0.95
    assert "frechet_distance_ratio" in figures and "classifier_accuracy" not in figures
