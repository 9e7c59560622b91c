"""Conditioners: composition by name, nulls made explicitly, drops that belong to the row's key."""

import math

import pytest
import torch

from vdiff.conditioners import (
    ClassLabelEmbedder,
    Embedder,
    EmbedderConditioner,
    FieldEmbedder,
    ImageLatentsEmbedder,
    ScalarFourierEmbedder,
)
from vdiff.first_stages import IdentityFirstStage
from vdiff.registry import isolated


def batch(rows=8, keys=None, step=0):
    return {
        "label": torch.arange(rows) % 3,
        "fps": torch.linspace(1, 30, rows),
        "noise_key": torch.arange(rows) if keys is None else keys,
        "step": step,
    }


def conditioner(**options):
    return EmbedderConditioner(
        [ClassLabelEmbedder(3, 4, drop=0.5), ScalarFourierEmbedder("fps", width=6, drop=0.5)], **options
    )


def test_embeddings_that_feed_one_name_are_joined_in_order():
    made = conditioner().eval()
    cond = made(batch())
    assert cond["vector"].shape == (8, 10)
    assert torch.equal(cond["vector"][:, :4], made.embedders[0](batch()["label"]))
    assert torch.equal(cond["vector"][:, 4:], made.embedders[1](batch()["fps"]))


def test_the_null_has_every_name_and_says_nothing_of_the_row():
    null = conditioner().eval()(batch()).null
    assert null["vector"].shape == (8, 10)
    assert (null["vector"] == null["vector"][:1]).all()


def test_a_learned_null_learns_and_a_zero_null_is_zero():
    learned, zero = ClassLabelEmbedder(3, 4, null="learned"), ClassLabelEmbedder(3, 4, null="zero")
    assert learned.null(torch.zeros(2, 4)).requires_grad
    assert zero.null(torch.ones(2, 4)).abs().max() == 0
    assert len(learned.table.weight) == 4 and len(zero.table.weight) == 3
    fourier = ScalarFourierEmbedder("fps", width=6, null="learned")
    assert fourier.null(torch.zeros(2, 12)).requires_grad


def test_a_class_for_cross_attention_is_one_token_and_so_is_its_null():
    token, vector = ClassLabelEmbedder(3, 4, feeds="cross_attention"), ClassLabelEmbedder(3, 4)
    token.load_state_dict(vector.state_dict())
    labels = torch.tensor([2, 0])
    assert torch.equal(token(labels), vector(labels)[:, None])
    assert torch.equal(token.null(token(labels)), vector.table.weight[-1].expand(2, 1, 4))


def dropped(made, which):
    cond, null = made(which), made(which).null
    parts = [slice(0, 4), slice(4, 10)]
    return torch.stack([(cond["vector"][:, p] == null["vector"][:, p]).all(1) for p in parts])


def test_training_drops_rows_at_their_rate_and_sampling_drops_none():
    made = conditioner().train()
    rates = dropped(made, batch(2000)).float().mean(1)
    assert rates.tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    assert not dropped(made.eval(), batch(2000)).any()


def test_a_drop_depends_on_the_rows_key_alone():
    made = conditioner().train()
    whole = dropped(made, batch(8))
    for row in range(8):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in batch(8).items()}
        assert torch.equal(dropped(made, alone)[:, 0], whole[:, row])
    assert not torch.equal(dropped(made, batch(200, step=1)), dropped(made, batch(200)))


def test_rows_of_a_pair_lose_their_conditions_together():
    keys = torch.arange(100).repeat_interleave(2)
    lost = dropped(conditioner().train(), batch(200, keys=keys))
    assert torch.equal(lost[:, 0::2], lost[:, 1::2]) and lost.any() and not lost.all()


def test_two_embedders_lose_their_conditions_independently():
    lost = dropped(conditioner().train(), batch(4000)).float()
    assert (lost[0] * lost[1]).mean().item() == pytest.approx(0.25, abs=0.03)


def test_joint_drops_are_exclusive_outcomes():
    rows = [
        {"probability": 0.2, "drop": ["label"]},
        {"probability": 0.3, "drop": ["fps"]},
        {"probability": 0.1, "drop": ["label", "fps"]},
    ]
    made = EmbedderConditioner([ClassLabelEmbedder(3, 4), ScalarFourierEmbedder("fps", width=6)], rows).train()
    label, fps = dropped(made, batch(3000))
    shares = [(label & ~fps), (~label & fps), (label & fps), (~label & ~fps)]
    assert [s.float().mean().item() for s in shares] == pytest.approx([0.2, 0.3, 0.1, 0.4], abs=0.03)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"probability": 0.1, "drop": ["caption", "label"]}],
            r"reads or feeds \['caption'\]. Fields: label, fps. Names that are fed: vector",
        ),
        ([{"probability": 0.7, "drop": ["label"]}, {"probability": 0.7, "drop": ["fps"]}], "at most 1, got .0.7, 0.7"),
        ([{"probability": -0.2, "drop": ["label"]}], "at least 0"),
        ([{"p": 0.1, "drop": ["label"]}], "probability and drop"),
    ],
)
def test_a_wrong_drop_table_is_an_error(rows, message):
    with pytest.raises(ValueError, match=message):
        conditioner(joint_drop=rows)


def test_an_embedder_that_learns_no_null_says_so():
    with isolated():

        class TotalEmbedder(Embedder):
            def forward(self, value):
                return value.flatten(1).sum(1, keepdim=True)

        with pytest.raises(ValueError, match="TotalEmbedder: learns no null"):
            TotalEmbedder("image", "vector", null="learned")


def test_wrong_batches_and_labels_are_errors():
    made = conditioner().eval()
    with pytest.raises(KeyError, match="reads 'label'.*It has: fps"):
        made({"fps": torch.ones(2)})
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        made(batch() | {"label": torch.tensor([0, 3])})
    for halves in ([0.5, 1.0], torch.tensor([0.0, 1.0], dtype=torch.float16)):  # 0.5 would be class 0
        with pytest.raises(ValueError, match=r"label holds whole numbers, 0 to 2, and torch.float.* label.long\(\)"):
            made.train()(batch(2) | {"label": halves})
    made.eval()
    with pytest.raises(ValueError, match="label holds one class per row"):
        made(batch() | {"label": torch.tensor(2)})
    with pytest.raises(ValueError, match="fps holds numbers"):
        made(batch() | {"fps": 8.0})
    with pytest.raises(KeyError, match="noise_key"):
        conditioner().train()({"label": torch.zeros(2), "fps": torch.ones(2)})


def test_two_embedders_cannot_feed_a_name_that_takes_one():
    made = EmbedderConditioner(
        [ClassLabelEmbedder(3, 4, feeds="label"), ClassLabelEmbedder(3, 4, feeds="label")]
    ).eval()
    with pytest.raises(ValueError, match="2 embedders feed 'label'"):
        made(batch())


def test_fourier_numbers_are_cosines_then_sines():
    made = ScalarFourierEmbedder("fps", width=4, max_period=100.0)
    got = made(torch.tensor([2.0]))[0]
    waves = [1.0, 100.0**-0.5]
    assert got.tolist() == pytest.approx([math.cos(2 * w) for w in waves] + [math.sin(2 * w) for w in waves], abs=1e-6)
    assert made(torch.ones(5, 3)).shape == (5, 12)


def test_fourier_waves_are_float32_whatever_the_model_is():
    """Rounded to bfloat16, a wave is off by radians at numbers of a thousand."""
    numbers = torch.tensor([1000.0, 37.0])
    exact = ScalarFourierEmbedder("fps", width=64)(numbers)
    assert torch.equal(ScalarFourierEmbedder("fps", width=64).bfloat16()(numbers), exact)


def test_an_engine_without_conditions_has_an_empty_conditioning():
    cond = EmbedderConditioner()({"image": torch.zeros(2)})
    assert cond.num_rows is None and cond.null is None


def test_a_new_embedder_is_a_few_lines():
    with isolated():

        class TotalEmbedder(Embedder):
            def forward(self, value):
                return value.flatten(1).sum(1, keepdim=True)

        made = EmbedderConditioner([TotalEmbedder("image", "vector", drop=1.0)]).train()
        cond = made({"image": torch.ones(2, 3, 3), "noise_key": torch.arange(2), "step": 0})
    assert cond["vector"].tolist() == [[0.0], [0.0]]


def test_a_null_that_is_the_embedding_itself_is_left_alone_by_guidance():
    cond = EmbedderConditioner([ClassLabelEmbedder(3, 4), ScalarFourierEmbedder("fps", width=6, null="same")])(batch())
    assert torch.equal(cond["vector"][:, 4:], cond.null["vector"][:, 4:])
    assert not torch.equal(cond["vector"][:, :4], cond.null["vector"][:, :4])


@pytest.mark.parametrize("level_null", ["same", "zero"])
@pytest.mark.parametrize("way", ["drop", "joint_drop"])
def test_what_guidance_leaves_alone_training_drops_to_zero_and_its_null_is_still_itself(way, level_null):
    drop, joint = (0.5, []) if way == "drop" else (0.0, [{"probability": 0.5, "drop": ["image", "fps"]}])
    options = dict(log_mean=None, sigma=0.0, level_feeds="level", level_null=level_null)
    picture = ImageLatentsEmbedder(IdentityFirstStage(), null="same", drop=drop, **options)
    rate = FieldEmbedder("fps", null="same", drop=drop, absent=-1.0)
    made = EmbedderConditioner([picture, rate], joint)
    given = {"image": torch.rand(500, 1, 2, 2) + 1, "fps": torch.full((500,), 8.0)}
    given |= {"noise_key": torch.arange(500), "step": 0}
    cond = made.train()(given)
    is_dropped = (cond["concat"] == 0).flatten(1).all(1)
    assert is_dropped.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(cond["concat"][~is_dropped], given["image"][~is_dropped])
    assert torch.equal((cond["level"] == 0).all(1), is_dropped & (level_null == "zero"))
    assert set(cond["fps"].tolist()) == {8.0, -1.0} and (way == "drop") != torch.equal(cond["fps"] == -1, is_dropped)
    null = made.eval()(given).null
    assert torch.equal(null["concat"], given["image"]) and torch.equal(null["fps"], given["fps"])


def test_a_joint_drop_tells_two_that_read_one_field_by_the_names_they_feed():
    """As DynamiCrafter: a picture is dropped as tokens, and its latents never are. A word that is both is a field."""
    embedders = [FieldEmbedder("image", "tokens"), FieldEmbedder("image", "concat"), FieldEmbedder("other", "image")]
    given = {"image": torch.ones(500), "other": torch.ones(500), "noise_key": torch.arange(500), "step": 0}
    for words, lost in ((["tokens"], {"tokens"}), (["image"], {"tokens", "concat"}), (["other"], {"image"})):
        cond = EmbedderConditioner(embedders, [{"probability": 0.3, "drop": words}]).train()(given)
        rates = {name: 1 - value.mean().item() for name, value in cond.tensors.items()}
        assert rates == pytest.approx({name: 0.3 * (name in lost) for name in rates}, abs=0.08)
