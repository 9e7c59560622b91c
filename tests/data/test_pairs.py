"""Pairs: the preferred one first, one noise for both, in each of three layouts."""

import json

import pytest
import torch

from vdiff.data import Digits, ImageFolder, Loader, PairsDataset
from vdiff.process import RowKeys
from vdiff.registry import build

PAIRS = [(4, 9), (0, 7), (1, 1)]


@pytest.fixture(scope="module")
def digits():
    return Digits("test")


def test_rows_of_a_pair_are_adjacent_and_share_conditions_and_noise(digits):
    batch = Loader(PairsDataset(digits, PAIRS), 3, shuffle=False).batch(0)
    assert batch["image"].shape == (6, 1, 8, 8)
    for place, (win, lose) in enumerate(PAIRS):
        assert torch.equal(batch["image"][2 * place], digits.images[win])
        assert torch.equal(batch["image"][2 * place + 1], digits.images[lose])
    assert batch["label"].tolist() == [int(digits.labels[win]) for win, _ in PAIRS for _ in range(2)]
    noise = RowKeys.of(batch).normal("noise", (3,))
    assert torch.equal(noise[::2], noise[1::2]) and noise[:, 0].unique().numel() == 3


def test_named_fields_and_stacked_channels_hold_the_same(digits):
    rows, fields, stacked = (PairsDataset(digits, PAIRS, layout=name) for name in ("rows", "fields", "channels"))
    win, lose = rows[0]
    assert torch.equal(fields[0]["win_image"], win["image"]) and torch.equal(fields[0]["lose_image"], lose["image"])
    assert "image" not in fields[0] and fields[0]["label"] == win["label"]
    assert fields.ranges == {"win_image": (-1.0, 1.0), "lose_image": (-1.0, 1.0)}
    assert stacked[0]["image"].shape == (2, 8, 8)
    assert torch.equal(stacked[0]["image"], torch.cat([win["image"], lose["image"]]))
    assert Loader(stacked, 3).batch(0)["image"].shape == (3, 2, 8, 8)


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.json", json.dumps([{"win": w, "lose": v, "score": 0.5} for w, v in PAIRS])),
        ("p.csv", "win,lose,score\n" + "\n".join(f"{w},{v},0.5" for w, v in PAIRS)),
        ("p.json", json.dumps(PAIRS)),
    ],
)
def test_pairs_may_come_from_a_file(digits, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    data = build({"type": "pairs", "dataset": digits, "pairs": str(tmp_path / name)}, "dataset")
    assert [p[:2] for p in data.pairs] == PAIRS
    assert ("score" in data[0][0]) == ("score" in text)


def test_both_sides_of_a_visit_are_cropped_and_flipped_alike(tmp_path):
    from PIL import Image

    for name, grey in (("a.png", 0), ("b.png", 255)):
        image = Image.linear_gradient("L").rotate(90).resize((32, 16))
        image.putpixel((0, 0), grey)
        image.save(tmp_path / name)
    data = PairsDataset(ImageFolder(tmp_path, size=(8, 8), crop="random", flip=0.5, channels=1), [(0, 1)])
    for key in range(10):
        win, lose = data.visit(0, key)
        assert (win["image"] - lose["image"]).abs()[:, 2:, 2:].max() < 1e-6


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], "has no pairs"),
        ([(0, 360)], r"pairs, pair 0 names examples 0 and 360; the data set has 0 to 359"),
        ([(0, 1), (2,)], "pair 1 is .*expected two numbers"),
        ([{"win": 1}], "expected two numbers, win and lose"),
    ],
)
def test_pairs_that_are_none_are_named(digits, pairs, message):
    with pytest.raises(ValueError, match=message):
        PairsDataset(digits, pairs)
    with pytest.raises(FileNotFoundError, match=r"no file none.json"):
        PairsDataset(digits, "none.json")


def test_a_field_that_is_compared_must_be_there(digits):
    with pytest.raises(ValueError, match="have no 'video'; they have image, label"):
        PairsDataset(digits, PAIRS, data_fields=["video"])[0]
