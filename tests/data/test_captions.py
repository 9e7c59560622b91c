"""Captions: a function of the example, or of the visit, and of nothing else."""

import pytest

from vdiff.data import CaptionsDataset, Digits, Loader

TEMPLATES = ["a handwritten {}", "the digit {}", "{} in ink"]


def captions(**options):
    return CaptionsDataset(Digits("test"), TEMPLATES, **options)


def test_a_caption_says_the_label():
    data = captions(words=[[str(i), f"word{i}"] for i in range(10)])
    assert len(data) == 360 and data.classes == Digits.classes and data.ranges == Digits.ranges
    for i in range(40):
        row = data[i]
        assert row["caption"] in [t.format(w) for t in TEMPLATES for w in data.words[row["label"]]]
        assert row["image"].equal(Digits("test")[i]["image"])


def test_an_example_keeps_its_caption_and_visits_vary():
    data = captions()
    assert [data[i]["caption"] for i in range(20)] == [captions()[i]["caption"] for i in range(20)]
    seen = {data.visit(0, key)["caption"] for key in range(30)}
    assert seen == {t.format(data[0]["label"]) for t in TEMPLATES}
    assert data.visit(0, 7)["caption"] == captions().visit(0, 7)["caption"]


def test_every_template_is_met_about_equally_often():
    data = captions()
    words = [data.visit(3, key)["caption"].split()[0] for key in range(900)]
    assert all(abs(words.count(w) - 300) < 60 for w in ("a", "the"))


def test_batches_carry_captions_whatever_the_workers():
    first = Loader(captions(drop_words=0.3), 8, seed=1).batch(2)["caption"]
    assert first == Loader(captions(drop_words=0.3), 8, seed=1).batch(2)["caption"] and len(set(first)) > 1


def test_training_drops_words_at_their_rate_and_never_the_one_that_matters():
    data = CaptionsDataset(Digits("test"), ["a b c d {}"], drop_words=0.25)
    words = [data.visit(5, key)["caption"].split() for key in range(400)]
    assert all(w[-1] == str(data[5]["label"]) for w in words)
    assert sum(len(w) - 1 for w in words) / 1600 == pytest.approx(0.75, abs=0.04)
    assert len(data[5]["caption"].split()) == 5  # by number it is whole


def test_training_puts_in_odd_words_at_their_rate():
    data = CaptionsDataset(Digits("test"), ["a b c d {}"], odd_words=0.25)
    words = [data.visit(5, key)["caption"].split() for key in range(400)]
    kept = sum(w == own for row in words for w, own in zip(row, "abcd", strict=False))
    assert kept / 1600 == pytest.approx(0.75, abs=0.04) and all(len(w) == 5 for w in words)
    odd = {w for row in words for w in row[:4] if w not in "abcd"}
    assert len(odd) > 300 and all(w.isalpha() and 2 <= len(w) <= 7 for w in odd)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"templates": ["no place"]}, "one {} for the word, got 'no place'"),
        ({"templates": []}, "one template at least"),
        ({"templates": TEMPLATES, "drop_words": 0.6, "odd_words": 0.6}, "add up to at most 1, got 0.6 and 0.6"),
        ({"templates": TEMPLATES, "reads": "class"}, "the rows have no 'class'. They have: image, label"),
        ({"templates": TEMPLATES, "words": [["zero"]]}, "there are words for 0 to 0"),
    ],
)
def test_what_cannot_be_captioned_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionsDataset(Digits("test"), **options)[1]
