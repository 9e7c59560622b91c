import pytest
import torch
from torch import nn

from vdiff.data import Dataset, Loader
from vdiff.process import EDMSchedule, LogNormalSigmaSampler, RowKeys
from vdiff.training import AdamW, TrainGroup, select, start_report


class Pictures(Dataset, abstract=True):
    def __init__(self, low=-1.0, ranges=((-1.0, 1.0))):
        self.low, self.ranges = low, {"image": ranges} if ranges else {}

    def __len__(self):
        return 12

    num_dropped = 3

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.rand(1, 4, 4, generator=generator) * (1 - self.low) + self.low, "label": index % 10}


class Engine(nn.Module):
    input_key = "image"

    def __init__(self):
        super().__init__()
        self.first_stage = nn.Identity()
        self.first_stage.pixel_range = (-1.0, 1.0)
        self.denoiser = nn.Linear(4, 4)
        self.conditioner = nn.Embedding(10, 8)

    def levels(self, batch):
        return LogNormalSigmaSampler()(EDMSchedule(), RowKeys.of(batch))


def report(engine, datasets, **options):
    selection = select(engine, [TrainGroup("denoiser", lr=0.5)], AdamW())
    return start_report(engine, selection, datasets, Loader(datasets["train"], 8).batch(0), **options)


def test_it_says_what_is_about_to_happen():
    engine, datasets = Engine(), {"train": Pictures(), "validation": Pictures()}
    text = report(engine, datasets, notes=["A note."])
    words = [line.split() for line in text.splitlines()]
    assert ["train", "Pictures", "12", "3"] in words and ["validation", "Pictures", "12", "3"] in words
    assert ["denoiser", "20", "0"] in words and ["conditioner", "0", "80"] in words
    assert ["denoiser", "2", "20", "0.5", "0.01"] in words
    batch = Loader(datasets["train"], 8).batch(0)
    image = next(line for line in words if line[:1] == ["image"])
    assert image[1:6] == ["(8,", "1,", "4,", "4)", "float32"] and image[6] == f"{batch['image'].min():.3g}"
    label = next(line for line in words if line[:1] == ["label"])
    assert label[1:5] == ["(8,)", "int64", str(len(batch["label"].unique())), "different:"]
    ratio = engine.levels(batch).ratio.double()
    middle = words[words.index(["smallest", "5%", "25%", "50%", "75%", "95%", "largest"]) + 2]
    assert middle[3] == f"{ratio.quantile(0.5):.3g}"
    assert "A note." in text and "noise_key" not in text


def test_a_range_that_contradicts_the_first_stage_is_an_error():
    with pytest.raises(ValueError, match=r"data.train: 'image' is declared in \[0, 1\], and the first stage expects"):
        report(Engine(), {"train": Pictures(0.0, (0.0, 1.0))})
    with pytest.raises(ValueError, match="data.validation: no range is declared"):
        report(Engine(), {"train": Pictures(), "validation": Pictures(ranges=None)})
    with pytest.raises(ValueError, match="values from"):
        report(Engine(), {"train": Pictures(low=-9.0)})


def test_an_input_that_is_not_in_the_batch_is_an_error():
    engine = Engine()
    engine.input_key = "video"
    with pytest.raises(ValueError, match=r"the engine reads 'video' \(input_key\), and batches have: image, label"):
        report(engine, {"train": Pictures()})


def test_rows_without_signal_are_counted_apart():
    engine = Engine()
    level = engine.levels(Loader(Pictures(), 8).batch(0))
    level.alpha[2] = 0.0
    engine.levels = lambda batch: level
    assert "(1 rows without signal)" in report(engine, {"train": Pictures()})


def test_an_engine_that_would_sample_another_shape_is_refused():
    engine = Engine()
    engine.sample_shape = (1, 9, 9)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\) per example, the engine's sample_shape is \(1, 9, 9\)"):
        report(engine, {"train": Pictures()})
