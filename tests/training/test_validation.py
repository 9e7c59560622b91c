import pytest
import torch
from torch import nn

from vdiff.data import Dataset, Digits, Loader
from vdiff.networks import in_eval
from vdiff.registry import build, isolated
from vdiff.training import EMA, Validation

ENGINE = {
    "type": "diffusion",
    "input_key": "image",
    "sample_shape": [1, 8, 8],
    "schedule": "edm",
    "sigma_sampler": "log_normal",
    "loss": "mse",
    "sampler": {"type": "heun", "num_steps": 2},
    "denoiser": {
        "type": "edm",
        "network": {
            "type": "unet",
            "in_channels": 1,
            "out_channels": 1,
            "channels": 8,
            "channel_mult": [1],
            "num_res_blocks": 1,
            "norm_groups": 4,
            "attention_factors": [1],
            "num_heads": 2,
            "dropout": 0.5,
        },
    },
}

with isolated():

    class Groups(Dataset):
        """Digits as the first of several streams, the others darker and darker."""

        def __init__(self, streams):
            self.digits, self.streams = Digits("test"), streams

        def __len__(self):
            return 4

        def __getitem__(self, index):
            row = self.digits[index]
            return [row | {"image": row["image"] / (s + 1), "stream": s} for s in range(self.streams)]


def setting():
    """An engine whose average differs from its weights."""
    engine, validation = build(ENGINE, "engine"), Validation(num_batches=2, num_pictures=4)
    for p in engine.parameters():
        nn.init.normal_(p, std=0.05)
    ema = EMA(decay=0.5)
    ema.start(dict(engine.named_parameters()))
    for p in engine.parameters():
        p.data.mul_(1.5)
    return engine, validation, validation.loader(Digits("test"), 16), ema


def test_the_figures_are_those_of_the_weights_they_name():
    engine, validation, loader, ema = setting()
    figures = validation.figures(engine, loader, dict, ema)
    with in_eval(engine), torch.no_grad():
        raw = torch.cat([engine(loader.batch(n)).per_row for n in range(2)]).mean().item()
        with ema.applied(engine):
            averaged = torch.cat([engine(loader.batch(n)).per_row for n in range(2)]).mean().item()
    assert figures["validation/loss"] == pytest.approx(raw)
    assert figures["validation/ema/loss"] == pytest.approx(averaged) and raw != averaged


def test_autocast_never_sees_weights_of_before_the_swap():
    engine, validation, loader, ema = setting()

    def bfloat16():
        return torch.autocast("cpu", torch.bfloat16)

    swapped = validation.figures(engine, loader, dict, ema, bfloat16)["validation/ema/loss"]
    with ema.applied(engine):
        alone = validation.figures(engine, loader, dict, None, bfloat16)["validation/loss"]
    assert swapped == alone
    assert swapped != validation.figures(engine, loader, dict, ema)["validation/ema/loss"]


def test_the_picture_is_the_same_each_time_and_of_the_averaged_weights():
    engine, validation, loader, ema = setting()
    state = torch.get_rng_state()
    first, second = (validation.picture(engine, loader, dict, ema) for _ in range(2))
    assert first.tobytes() == second.tobytes() and torch.equal(torch.get_rng_state(), state)
    assert validation.picture(engine, loader, dict).tobytes() != first.tobytes()


def test_what_is_no_picture_is_not_drawn():
    engine, validation, loader, _ = setting()
    assert Validation(num_pictures=0).picture(engine, loader, dict) is None
    engine.input_key = "label"
    assert validation.picture(engine, loader, dict) is None


@pytest.mark.parametrize(
    "streams, num_pictures, drawn", [(1, 3, 3), (2, 3, 2), (2, 1, 2), (3, 8, 6), (3, 2, 3), (3, 99, 12)]
)
def test_a_picture_has_no_row_without_its_partner(streams, num_pictures, drawn):
    """As many whole groups as fit, and one at least."""
    engine = build(ENGINE | {"mixins": {"joint_attention": {"type": "joint_attention"}}}, "engine")
    shown, pictures = [], engine.pictures
    engine.pictures = lambda batch, seed: shown.append(batch) or pictures(batch, seed)
    assert Validation(num_pictures=num_pictures).picture(engine, Loader(Groups(streams), 4), dict) is not None
    (batch,) = shown
    assert len(batch["image"]) == len(batch["noise_key"]) == drawn
    assert streams == 1 or batch["partner"].sort().values.tolist() == list(range(drawn))


def test_a_set_smaller_than_a_batch_is_one_batch():
    data = Digits("test")
    assert Validation().loader(data, 1000).batch_size == len(data)
