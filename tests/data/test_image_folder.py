"""A folder of pictures: the right pixels with the right words, and broken files that are left out and not hidden."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vdiff.data import ImageFolder, Loader, TooManyBrokenError
from vdiff.data.framing import Framing, upright
from vdiff.data.listing import list_table
from vdiff.registry import build, load_config

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(file, color=RED, size=(8, 8), mode="RGB", **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(file, **options)
    return file


def hundred(folder, broken=()):
    """Pictures of which some are cut short: their headers are good, their pixels are missing."""
    random = np.random.default_rng(0)
    for i in range(100):
        file = folder / f"{i:03d}.png"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
        if i in broken:
            file.write_bytes(file.read_bytes()[:200])
    return folder


def test_subfolders_are_classes_and_captions(tmp_path):
    for name in ("red/a.png", "red/deep/b.jpg", "dark_blue/c.webp"):
        plain(tmp_path / name, BLUE if "blue" in name else RED, quality=100)
    data = ImageFolder(tmp_path, size=4)
    assert data.classes == ["dark_blue", "red"] and len(data) == 3
    rows = [data[i] for i in range(3)]
    assert [r["label"] for r in rows] == [0, 1, 1]
    assert [r["caption"] for r in rows] == ["dark blue", "red", "red"]
    assert [r["file"] for r in rows] == ["dark_blue/c.webp", "red/a.png", "red/deep/b.jpg"]
    assert rows[1]["image"].shape == (3, 4, 4) and rows[1]["image"].dtype == torch.float32
    assert rows[1]["image"][:, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    "name, text",
    [
        ("t.csv", "file_name,caption,label,score\na.png,7,red,1\nb.png,a b,blue,2.5\n"),
        (
            "t.jsonl",
            '{"file": "a.png", "caption": "7", "label": "red", "score": 1}\n\n'
            '{"file": "b.png", "caption": "a b", "label": "blue", "score": 2.5}',
        ),
        (
            "t.json",
            json.dumps(
                {
                    "a.png": {"caption": "7", "label": "red", "score": 1},
                    "b.png": {"caption": "a b", "label": "blue", "score": 2.5},
                }
            ),
        ),
    ],
)
def test_tables_say_the_same_in_every_format(tmp_path, name, text):
    for file in ("a.png", "b.png"):
        plain(tmp_path / file)
    (tmp_path / name).write_text(text)
    data = ImageFolder(tmp_path, size=8, annotations=tmp_path / name)
    batch = Loader(data, 2, shuffle=False).batch(0)
    assert batch["caption"] == ["7", "a b"] and batch["label"].tolist() == [1, 0] and data.classes == ["blue", "red"]
    assert batch["score"].tolist() == [1, 2.5]
    assert batch["original_size"].tolist() == [[8, 8], [8, 8]]


def test_captions_may_lie_beside_the_pictures(tmp_path):
    plain(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red square\n")
    assert ImageFolder(tmp_path, size=8, texts=True)[0]["caption"] == "a red square"
    plain(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match="b.png has no text beside it"):
        ImageFolder(tmp_path, size=8, texts=True)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.csv", "caption\nred\n", "no column says which file; it has caption"),
        ("t.jsonl", '{"file": "a.png", "caption": "x"}\n{"file": "b.png"}', "entry 2 has no 'caption'"),
        ("t.json", "[1, 2]", "something else than objects"),
        ("t.json", "{", "t.json cannot be read"),
        ("t.txt", "", "ends in '.txt'; known are .csv, .json and .jsonl"),
        ("t.csv", "file\n", "names no files"),
    ],
)
def test_a_table_that_does_not_say_what_it_must_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list_table(tmp_path, tmp_path / name)


def test_a_folder_that_is_sorted_by_half_is_an_error(tmp_path):
    plain(tmp_path / "red" / "a.png")
    plain(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"files in subfolders \(red, ...\) and beside them \(b.png\)"):
        ImageFolder(tmp_path, size=8)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ImageFolder(tmp_path / "none", size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no files that end in .png"):
        ImageFolder(tmp_path / "empty", size=8)


def test_the_cut_is_the_largest_of_the_right_shape_in_the_centre():
    cut = Framing((4, 8)).cut((100, 30))  # a picture 100 wide, 30 high
    assert cut.box == (20, 0, 80, 30) and not cut.is_flipped
    assert Framing(8).cut((10, 30)).box == (0, 10, 10, 20)


def test_a_random_cut_lies_inside_and_is_spread_over_all_places():
    framing, random = Framing(8, crop="random", flip=0.25), np.random.default_rng(0)
    cuts = [framing.cut((30, 10), random) for _ in range(2000)]
    left = np.array([c.box[0] for c in cuts])
    assert left.min() >= 0 and left.max() <= 20 and abs(left.mean() - 10) < 5 * 20 / np.sqrt(12 * 2000)
    flips = sum(c.is_flipped for c in cuts)
    assert abs(flips - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)
    assert {c.box[1::2] for c in cuts} == {(0.0, 10.0)}


def test_making_smaller_averages_instead_of_skipping_pixels():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = Framing(8, channels=1)(stripes, Framing(8).cut(stripes.size))
    assert small.abs().max() < 0.1  # all grey; every eighth pixel would be all black


def test_a_visit_is_a_function_of_its_key(tmp_path):
    folder = hundred(tmp_path)
    data = ImageFolder(folder, size=8, crop="random", flip=0.5)
    wide = Framing(8, crop="random")
    assert wide.crop == "random"
    assert torch.equal(data.visit(3, 99)["image"], data.visit(3, 99)["image"])
    assert len({data.visit(3, key)["image"].numpy().tobytes() for key in range(8)}) == 2  # square: only the flip
    assert torch.equal(data[3]["image"], data[3]["image"])
    one, other = (Loader(ImageFolder(folder, size=8, flip=0.5), 10, seed=1, num_workers=n) for n in (0, 1))
    assert torch.equal(next(one.batches(4))[0]["image"], next(other.batches(4))[0]["image"])


def test_a_picture_that_lies_on_its_side_is_turned_as_its_exif_says(tmp_path):
    values = np.zeros((4, 8, 3), np.uint8)
    values[:, :4] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    row = ImageFolder(tmp_path, size=(8, 4))[0]
    assert row["original_size"] == (8, 4)
    assert (row["image"][:, :3] > 0.9).all() and (row["image"][:, 5:] < -0.9).all()  # now above


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (0, 255, 0)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (7, 255)), (7, 7, 7)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 257 * 7), (7, 7, 7)),
        (Image.new("P", (2, 2), 0), (0, 0, 0)),
    ],
)
def test_pictures_of_all_modes_look_as_they_should(image, expected):
    assert upright(image, background=(0, 255, 0)).convert("RGB").getpixel((1, 1)) == expected


def test_colour_and_grey_are_converted(tmp_path):
    plain(tmp_path / "a.png", 255, mode="L")
    assert ImageFolder(tmp_path, size=8)[0]["image"].shape == (3, 8, 8)
    plain(tmp_path / "a.png", RED)
    grey = ImageFolder(tmp_path, size=8, channels=1)[0]["image"]
    assert grey.shape == (1, 8, 8) and grey[0, 0, 0] == pytest.approx(2 * 0.299 - 1, abs=0.01)  # Rec. 601 luma


BROKEN = (3, 30, 50, 70, 99)
TRAINED = """
engine:
  type: diffusion
  input_key: image
  sample_shape: [3, 8, 8]
  schedule: {type: flow}
  sigma_sampler: {type: uniform}
  denoiser:
    type: velocity
    network: {type: unet, in_channels: 3, out_channels: 3, channels: 8, channel_mult: [1], num_res_blocks: 1,
              attention_factors: [], num_heads: 1, norm_groups: 4}
  loss: {type: mse}
  sampler: {type: euler, num_steps: 2}
data: {train: {type: image_folder, folder: pictures, size: 8, flip: 0.5}}
training: {num_steps: 20, batch_size: 10, logging: {every: 10}}
"""


@pytest.mark.filterwarnings("ignore:ImageFolder")
def test_a_folder_of_which_five_in_a_hundred_are_broken_trains_and_names_them(tmp_path):
    from vdiff.training.run import train

    (tmp_path / "pictures").mkdir()
    hundred(tmp_path / "pictures", BROKEN)
    (tmp_path / "pictures" / "030.png").write_bytes(b"")  # this one is seen when the folder is opened
    (tmp_path / "run.yaml").write_text(TRAINED)
    config = load_config(tmp_path / "run.yaml")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(config, tmp_path / "run").step == 20
    words = " ".join(str(w.message) for w in caught)
    assert all(f"{i:03d}.png (" in words for i in BROKEN)
    assert "data.train left out: 030.png (not a picture)" in (tmp_path / "run" / "report.txt").read_text()
    data = build(config["data"]["train"], "dataset")
    assert (data.num_kept, data.num_dropped, list(data.dropped)) == (99, 1, ["030.png"])


@pytest.mark.filterwarnings("ignore:ImageFolder")
def test_one_more_broken_file_than_allowed_stops_and_names_them(tmp_path):
    hundred(tmp_path, (*BROKEN, 98))
    data = ImageFolder(tmp_path, size=8)
    with pytest.raises(TooManyBrokenError, match=r"of 100 files in .* max_broken=0.05 .*: 6 broken: 003.png") as error:
        for i in range(100):
            data[i]
    assert "099.png" in str(error.value) and "raise max_broken" in str(error.value)
    with pytest.raises(TooManyBrokenError, match="6 broken"):
        ImageFolder(tmp_path, size=8, check="whole")
    assert ImageFolder(tmp_path, size=8, check="whole", max_broken=0.06).num_dropped == 6


@pytest.mark.filterwarnings("ignore:ImageFolder")
def test_the_example_in_place_of_a_broken_one_is_always_the_same(tmp_path):
    hundred(tmp_path, BROKEN)
    one, other = ImageFolder(tmp_path, size=8), ImageFolder(tmp_path, size=8)
    rows = [one[3], one[50], one[3]], [other[50], other[3], other[3]]
    assert torch.equal(rows[0][0]["image"], rows[0][2]["image"]) and torch.equal(
        rows[0][0]["image"], rows[1][1]["image"]
    )
    assert rows[0][0]["file"] == rows[1][2]["file"] not in [f"{i:03d}.png" for i in BROKEN]


@pytest.mark.filterwarnings("ignore:ImageFolder")
def test_a_file_that_a_table_names_and_nobody_has_is_broken(tmp_path):
    hundred(tmp_path)
    (tmp_path / "t.csv").write_text("file\n" + "\n".join(f"{i:03d}.png" for i in range(101)))
    data = ImageFolder(tmp_path, size=8, annotations=tmp_path / "t.csv")
    assert len(data) == 100 and data.dropped == {"100.png": "there is no such file"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "size must be at least 1"),
        ({"crop": "left"}, "crop must be 'center' or 'random'"),
        ({"max_broken": 2}, "a share from 0 to 1"),
        ({"check": "all"}, "check must be"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path, options, message):
    plain(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, **({"size": 8} | options))
