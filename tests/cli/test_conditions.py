"""What the command line asks of an engine: prompts, negatives, any field, and errors that say what to ask."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vdiff.cli import main
from vdiff.cli.conditions import asked_fields, cycled, fields_of, numbers
from vdiff.conditioners import (
    ClassLabelEmbedder,
    Embedder,
    EmbedderConditioner,
    FieldEmbedder,
    ImageLatentsEmbedder,
    OpenCLIPImageEmbedder,
    ScalarFourierEmbedder,
)
from vdiff.data import Digits, Framing, JointDataset, MovingDigits, SobelMap, read_picture
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import AutoencoderKL, IdentityFirstStage

ROOT = Path(__file__).parents[2]
ASKED = {"field": None, "label": None, "prompt": None, "prompts": None, "image": None}
SMALL = [
    "engine.denoiser.network.channels=16",
    "engine.denoiser.network.norm_groups=8",
    "engine.sampler.num_steps=2",
    "training.num_steps=3",
    "training.batch_size=8",
    "training.checkpoint.every=3",
    "training.validation.every=3",
    "training.lr_schedule.warmup=1",
]

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    assert main(["train", str(ROOT / "configs" / "digits_text.yaml"), *SMALL, "--out", str(folder)]) == 0
    return folder


def samples(run, *words):
    from safetensors.torch import load_file

    file = run / "samples.safetensors"
    assert main(["sample", str(run), *words, "--out", str(file)]) == 0
    return load_file(file)["samples"]


def test_prompts_are_taken_in_turn(run, tmp_path):
    both = samples(run, "--num", "4", "--prompt", "a handwritten three", "--prompt", "the digit 7")
    three = samples(run, "--num", "4", "--prompt", "a handwritten three")
    assert torch.allclose(both[0::2], three[0::2], atol=1e-5) and not torch.allclose(both[1], three[1], atol=1e-3)
    (tmp_path / "prompts.txt").write_text("a handwritten three\n\nthe digit 7\n")
    assert torch.equal(samples(run, "--num", "4", "--prompts", str(tmp_path / "prompts.txt")), both)


def test_a_negative_prompt_is_moved_away_from(run):
    words = ["--num", "2", "--prompt", "a handwritten three", "--guidance", "3"]
    plain, empty, other = (samples(run, *words, *more) for more in ([], ["--negative", ""], ["--negative", "an 8"]))
    # The null of this run is the empty prompt. Samples of an untrained network reach 140 before they are clipped, where
    # a float32 has steps of 1.5e-5, and the two are embedded in batches of different sizes (6e-7 apart).
    assert torch.allclose(plain, empty, atol=2e-4)
    assert not torch.allclose(plain, other, atol=1e-3)


def test_prompts_make_a_picture(run):
    assert main(["sample", str(run), "--num", "2", "--prompt", "a handwritten three"]) == 0
    assert (run / "samples.png").is_file()


@pytest.mark.parametrize("options", [[], ["--prompts-of", "validation"]])
def test_a_text_run_is_evaluated_with_the_captions_of_its_data(run, options):
    assert main(["evaluate", str(run), "--num", "40", *options]) == 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["num_samples"] == 40 and 0 <= figures["classifier_accuracy"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "also told caption; say --prompt TEXT"),
        (["--label", "3"], "--label: this engine is not conditioned on classes"),
        (["--field", "fps=3"], "--field fps=3: this engine is told caption, and no 'fps'"),
        (["--prompt", "a", "--negative", ""], "add --guidance"),
        (["--prompts", "not/there.txt"], "there is no file not/there.txt"),
    ],
)
def test_what_is_missing_is_said(run, options, message, capsys):
    assert main(["sample", str(run), "--num", "1", *options]) == 2
    assert message in capsys.readouterr().err


def engine(*embedders, sample_shape=(1, 4, 6), pixel_range=(-1, 1), first_stage=None, gates=None):
    return SimpleNamespace(
        conditioner=EmbedderConditioner(embedders, gates=gates),
        guider=None,
        sample_shape=sample_shape,
        first_stage=first_stage or IdentityFirstStage(pixel_range=pixel_range),
    )


def asked(*embedders, **options):
    return asked_fields(engine(*embedders), SimpleNamespace(**ASKED | options))


class OrderEmbedder(Embedder):
    """What only Python can say."""

    def forward(self, value):
        return value


def test_any_field_is_served():
    both = ClassLabelEmbedder(10, 4), ScalarFourierEmbedder("fps")
    assert asked(*both, field=[("fps", "8"), ("fps", "2.5"), ("label", "3")]) == {"label": [3], "fps": [8.0, 2.5]}
    assert asked(*both, field=[("fps", "8")], label=[1, 2]) == {"label": [1, 2], "fps": [8.0]}
    assert asked(*both, field=[("fps", "8")])["label"] == list(range(10))  # nothing asked: all classes
    assert asked(ScalarFourierEmbedder("crop"), field=[("crop", "0,16")]) == {"crop": [[0.0, 16.0]]}
    usual = ScalarFourierEmbedder("bucket", default=127), ScalarFourierEmbedder("crop", default=[0, 0])
    assert asked(*usual, field=[("crop", "8,8")]) == {"bucket": [127], "crop": [[8.0, 8.0]]}
    assert asked(*usual) == {"bucket": [127], "crop": [[0, 0]]}
    with pytest.raises(ValueError, match="also told fps; say --field fps="):
        asked(*both)
    with pytest.raises(ValueError, match="also told fps, image; say --field fps=... and --image FILE"):
        asked(ScalarFourierEmbedder("fps"), ImageLatentsEmbedder())
    with pytest.raises(ValueError, match=r"told fps, order, and no word can say order.*sample\(\{'fps': ..., 'order'"):
        asked(ScalarFourierEmbedder("fps"), OrderEmbedder("order", "vector"))
    with pytest.raises(ValueError, match="--field fps=x: a number, or several"):
        asked(*both, field=[("fps", "x")])
    with pytest.raises(ValueError, match="told classes by label, other; say --field label="):
        asked(both[0], ClassLabelEmbedder(10, 4, reads="other"), label=[1])


def test_a_field_that_gates_read_is_served_and_is_0_if_not_said():
    """As the conditioner has it in a batch without the field; a number that no gate names opens none."""
    told = engine(
        ClassLabelEmbedder(10, 4), gates={"y": {"stream": [1, 2]}, "x": {"stream": 0}, "ink": {"style": "ink"}}
    )

    def fields(*said):
        return asked_fields(told, SimpleNamespace(**ASKED | {"label": [3], "field": list(said)}))

    assert fields() == {"label": [3], "stream": [0], "style": [0]}
    both = fields(("stream", "1"), ("stream", "5"), ("style", "ink"))
    assert both == {"label": [3], "stream": [1, 5], "style": ["ink"]}
    gates = told.conditioner(cycled(both, 2)).gates
    assert {name: gate.tolist() for name, gate in gates.items()} == {"y": [1, 0], "x": [0, 0], "ink": [1, 1]}
    assert set(numbers(told, both)) == {"labels", "stream"}
    with pytest.raises(ValueError, match="--field style=oil: a gate reads ink there, or a whole number for none"):
        fields(("style", "oil"))
    with pytest.raises(ValueError, match="--field fps=8: this engine is told label, stream, style, and no 'fps'"):
        fields(("fps", "8"))
    read = engine(ClassLabelEmbedder(3, 4, reads="stream"), gates={"y": {"stream": 1}})
    assert asked_fields(read, SimpleNamespace(**ASKED)) == {"stream": [0, 1, 2]}  # an embedder's, as ever


def test_rows_of_data_keep_the_streams_that_gates_read():
    """Otherwise samples of the first stream alone are held against data of all."""
    data = [JointDataset(Digits("test"), map=SobelMap())]
    for embedders in ([], [ClassLabelEmbedder(10, 4)]):
        fields, labels = fields_of(engine(*embedders, gates={"y": {"stream": 1}, "z": {"other": 1}}), data, 5)
        assert fields["stream"] == [0, 1, 0, 1, 0] and fields["other"] == [0] * 5
        assert (labels is None) == (not embedders)


def test_a_picture_is_the_centre_of_a_file_in_the_shape_and_the_values_of_samples(tmp_path):
    pixels = torch.linspace(0, 255, 4 * 6).round().to(torch.uint8).view(4, 6).numpy()
    wide = np.pad(pixels, ((0, 0), (5, 5)))
    Image.fromarray(pixels).save(tmp_path / "fits.png")
    Image.fromarray(np.stack([wide] * 3, -1)).save(tmp_path / "wide.png")
    files = [str(tmp_path / name) for name in ("fits.png", "wide.png")]
    told = asked(ImageLatentsEmbedder(), image=files)["image"]
    expected = torch.from_numpy(pixels)[None] / 127.5 - 1
    assert len(told) == 2 and all(torch.allclose(one, expected, atol=1e-6) for one in told)
    assert torch.equal(asked(ImageLatentsEmbedder(reads="start"), field=[("start", files[0])])["start"][0], told[0])
    assert torch.equal(asked(FieldEmbedder("hint", "concat"), image=files)["hint"][0], told[0])
    bytes_, colour = (
        asked_fields(engine(ImageLatentsEmbedder(), **has), SimpleNamespace(**ASKED | {"image": files}))["image"][0]
        for has in ({"pixel_range": (0, 255)}, {"sample_shape": (3, 5, 4, 6)})  # a video of five frames
    )
    assert torch.allclose(bytes_, torch.from_numpy(pixels)[None].float(), atol=1e-4)
    assert torch.equal(colour, told[0].expand(3, 4, 6))
    (tmp_path / "words.png").write_text("no picture")
    wrong = {"words.png": "--image: .*words.png: not a picture", "none.png": "no such file", "": "a folder, and not a"}
    for file, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            asked(ImageLatentsEmbedder(), image=[str(tmp_path / file)])
    with pytest.raises(ValueError, match="--image: this engine is not conditioned on pictures"):
        asked(ClassLabelEmbedder(10, 4), image=files)
    with pytest.raises(ValueError, match="--image: pictures are cut as samples are, and engine.sample_shape is None"):
        asked_fields(engine(ImageLatentsEmbedder(), sample_shape=None), SimpleNamespace(**ASKED | {"image": files}))


def test_of_several_pictures_each_is_said_by_its_name(tmp_path):
    two = ImageLatentsEmbedder(reads="first"), ImageLatentsEmbedder(reads="last")
    with pytest.raises(ValueError, match="told first, last; say --field first=FILE and --field last=FILE"):
        asked(*two)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "black.png")
    told = asked(*two, field=[(name, str(tmp_path / "black.png")) for name in ("first", "last")])
    assert all(torch.equal(told[name][0], -torch.ones(1, 4, 6)) for name in ("first", "last"))


def test_what_is_no_picture_in_the_shape_of_samples_is_said_in_python():
    """The mask of Stable Diffusion's inpainting lies on latents, SV4D is shown a video and all views of a moment."""
    mask, around = FieldEmbedder("mask", "concat", null="same"), ImageLatentsEmbedder(reads="masked_image")
    latent = AutoencoderKL(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    painting = engine(mask, around, sample_shape=(3, 8, 8), first_stage=latent)
    with pytest.raises(ValueError, match=r"told mask, masked_image, and no word can say mask\. Sample from Python"):
        asked_fields(painting, SimpleNamespace(**ASKED))
    tower = OpenCLIPImageEmbedder(
        {"embed_dim": 8, "width": 16, "head_width": 8, "layers": 1, "patch_size": 8, "image_size": 8},
        reads="cond_motion",
    )
    motion = ImageLatentsEmbedder(reads="cond_motion", frames=4, fill="each")
    with pytest.raises(ValueError, match="no word can say cond_motion, cond_view"):
        asked(motion, tower, ImageLatentsEmbedder(reads="cond_view", feeds="views"))
    with pytest.raises(ValueError, match="--image: this engine is not conditioned on pictures"):
        asked(motion, tower, image=["some.png"])


def test_a_video_begins_with_the_picture_that_the_command_line_names(tmp_path):
    run = tmp_path / "run"
    assert main(["train", str(ROOT / "configs" / "moving_digits_image.yaml"), *SMALL, "--out", str(run)]) == 0
    images = MovingDigits("test", size=14, image="first", travel=(2, 4))
    files = []
    for i in (0, 7):
        pixels = ((images[i]["image"][0] + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        files += ["--image", str(tmp_path / f"{i}.png")]
    drawn = samples(run, "--num", "4", *files)
    assert drawn.shape == (4, 1, 8, 14, 14)
    ours = DiffusionEngine.load(run)
    shown = torch.stack([read_picture(tmp_path / f"{i}.png", Framing(14, channels=1)) for i in (0, 7, 0, 7)])
    assert torch.equal(drawn, ours.sample({"image": shown}, seeds=0).clamp(-1, 1))
    assert not torch.allclose(drawn[0], ours.sample({"image": shown[1:2]}, seeds=0)[0].clamp(-1, 1), atol=1e-3)


def test_conditions_of_data_begin_again_where_they_end():
    data = [Digits("test")]
    fields, labels = fields_of(engine(ClassLabelEmbedder(10, 4)), data, 400)
    assert fields["label"] == labels.tolist() == [data[0][i % 360]["label"] for i in range(400)]
    usual = engine(ClassLabelEmbedder(10, 4), ScalarFourierEmbedder("bucket", default=127))
    assert fields_of(usual, data, 4)[0]["bucket"] == [127] * 4
    with pytest.raises(ValueError, match="told 'fps', which the data have not"):
        fields_of(engine(ScalarFourierEmbedder("fps")), data, 4)
