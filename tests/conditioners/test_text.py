"""Text embedders: one embedding per prompt whatever is around it, its null, its mask, and what is remembered."""

import warnings

import pytest
import torch
from peers import peer

from vdiff.conditioners import EmbedderConditioner, Embedding, OpenCLIPTextEmbedder
from vdiff.mixins import LoRA
from vdiff.networks import UNet

ARCH = {"embed_dim": 24, "width": 32, "heads": 4, "layers": 2, "context_length": 12}
PROMPTS = ["a cat", "a dog on a mat", "", "a cat"]

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


def embedder(**options):
    torch.manual_seed(0)
    return OpenCLIPTextEmbedder(ARCH, **options).eval()


def tokens(made, prompts=PROMPTS):
    return made(prompts)["cross_attention"].tensor


def test_a_remembered_embedding_is_the_encoded_one_bit_for_bit(tmp_path):
    plain, kept, filed = embedder(memory=0), embedder(), embedder(memory=0, folder=tmp_path)
    expected = tokens(plain)
    for made in (kept, filed):
        assert torch.equal(tokens(made), expected)
        made.encode = None  # from here on memory serves
        assert torch.equal(tokens(made), expected)
    assert len(kept.remembered.rows) == len(list(tmp_path.iterdir())) == 3  # the same prompt twice is one


def test_a_frozen_embedding_does_not_depend_on_the_batch_around_it():
    prompts = [f"{'very ' * (i % 7)}number {i}" for i in range(21)]
    whole = tokens(embedder(memory=0), prompts)
    for i, prompt in enumerate(prompts):
        assert torch.equal(tokens(embedder(memory=0), [prompt])[0], whole[i])
    assert torch.equal(tokens(embedder(memory=0), prompts[::-1]).flip(0), whole)


def test_memory_is_bounded_and_forgets_what_was_unused_for_longest():
    row = 12 * 32 * 4  # bytes
    made = embedder(memory=3.5 * row / 2**20)
    for prompt in ("a", "b", "c", "a", "d"):
        made([prompt])
    assert len(made.remembered.rows) == 3 and made.remembered.size == 3 * row
    made.encode = None
    made(["a"]), made(["d"]), made(["c"])
    with pytest.raises(TypeError):
        made(["b"])


def test_other_weights_are_not_served_old_embeddings(tmp_path):
    made, other = embedder(folder=tmp_path), embedder(folder=tmp_path)
    before = tokens(made)
    with torch.no_grad():
        made.model.ln_final.weight.mul_(2)
    assert not torch.equal(tokens(made), before)
    made.load_state_dict(other.state_dict())
    assert torch.equal(tokens(made), before)
    assert not torch.equal(tokens(embedder(folder=tmp_path, norm=False)), before)
    assert tokens(made.double()).dtype == torch.float64


def test_a_mixin_on_the_tower_is_heard_and_nothing_of_it_is_remembered():
    made = embedder()
    before = tokens(made)
    lora = LoRA(on="*c_fc", rank=2).attach(made)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    assert not torch.allclose(tokens(made), before)
    lora.detach()
    made.requires_grad_(False)
    assert torch.equal(tokens(made), before)


def test_what_trains_is_not_remembered():
    made = embedder(trainable=True)
    tokens(made).sum().backward()
    assert not made.remembered.rows and made.model.ln_final.bias.grad is not None


def test_the_null_is_the_empty_prompt_or_zero():
    for options in ({}, {"trainable": True}, {"pooled_feeds": "vector"}):
        made = embedder(null="empty", **options)
        said, null = made.with_null(PROMPTS)
        for name in said:
            assert torch.allclose(null[name].tensor, said[name].tensor[2:3].expand_as(null[name].tensor), atol=1e-6)
            assert torch.allclose(said[name].tensor, made(PROMPTS)[name].tensor, atol=1e-6)
    said, null = embedder(null="zero", masked=True).with_null(PROMPTS)
    assert null["cross_attention"].tensor.abs().max() == 0 and null["cross_attention"].mask.all()


def test_condition_and_null_are_one_call_of_the_tower():
    made, calls = embedder(trainable=True), []
    encode = made.encode
    made.encode = lambda ids: calls.append(len(ids)) or encode(ids)
    EmbedderConditioner([made]).eval()({"caption": PROMPTS})
    assert calls == [3]  # two prompts and the empty one


def test_dropped_rows_are_the_empty_prompt_with_its_mask():
    conditioner = EmbedderConditioner([embedder(drop=0.5, masked=True)]).train()
    batch = {"caption": ["a dog on a mat"] * 64, "noise_key": torch.arange(64), "step": 0}
    cond = conditioner(batch)
    counts = cond.masks["cross_attention"].sum(1)
    assert set(counts.tolist()) == {2, 7}  # start and end, or start, five words and end
    is_dropped = counts == 2
    assert torch.equal(cond["cross_attention"][is_dropped], cond.null["cross_attention"][is_dropped])
    assert cond.null.masks["cross_attention"].sum(1).tolist() == [2] * 64


def test_the_mask_ends_at_the_end_of_the_prompt():
    mask = embedder(masked=True)(["a cat", "a dog on a mat"])["cross_attention"].mask
    assert mask.sum(1).tolist() == [4, 7] and mask[0].tolist() == [True] * 4 + [False] * 8


def test_masks_reach_attention():
    """Tokens behind the end change the picture only where no mask hides them."""
    network = UNet(1, 1, 16, (1,), 1, (1,), num_heads=2, context_dim=32, norm_groups=8).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for masked in (True, False):
        made = EmbedderConditioner([embedder(masked=masked)]).eval()
        cond = made({"caption": ["a cat"]})
        behind = cond["cross_attention"].clone()
        behind[:, 4:] += 1
        out, other = (network(x, torch.ones(1), c) for c in (cond, cond.with_(tensors={"cross_attention": behind})))
        assert torch.allclose(out, other, atol=1e-6) == masked


def test_a_template_goes_around_prompts_and_not_around_nothing():
    plain, framed = embedder(), embedder(template="a photo of {}")
    assert torch.equal(tokens(framed, ["a cat", ""]), tokens(plain, ["a photo of a cat", ""]))
    with pytest.raises(ValueError, match="one {} for the prompt"):
        embedder(template="a photo")


def test_token_ids_are_prompts_too():
    made = embedder()
    ids = made.ids(PROMPTS)
    assert torch.equal(tokens(made, ids), tokens(made))
    assert torch.equal(tokens(made, ids[:, :8]), tokens(made))  # padded
    with pytest.raises(ValueError, match="whole token ids"):
        made(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="13 token ids in a row; this tower reads 12"):
        made(torch.zeros(2, 13, dtype=torch.long))


LONG = "a photo of a very small cat on a red mat in front of a house"


def test_long_prompts_are_cut_as_open_clip_cuts_and_said_once():
    made, tokenizer = embedder(), peer("open_clip").tokenizer.SimpleTokenizer()
    with pytest.warns(UserWarning, match="reads 12 tokens and a prompt has 18; it is cut before 'mat in front of a h"):
        ids = made.ids(["a cat", LONG, "", LONG.upper()])
    assert torch.equal(ids, tokenizer(["a cat", LONG, "", LONG], context_length=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.ids([LONG])
        embedder().ids(["a photo of a very small cat on a red"])  # ten words, a beginning and an end
    with pytest.warns(UserWarning, match="cut before 'red mat"):
        embedder(template="oh {}").ids([LONG])
    with pytest.warns(UserWarning, match=f"cut before '{'x' * 20}"):  # one word without end
        embedder().ids(["x" * 300])


def test_a_prompt_alone_is_not_a_list_of_letters():
    with pytest.raises(ValueError, match=r"one string per row, such as \['a cat'\]; got 'a dog'"):
        embedder()("a dog")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": "pooled", "masked": True}, "no tokens to mask"),
        ({"pooled_feeds": "cross_attention"}, "both feed 'cross_attention'"),
        ({"null": "learned"}, "learns no null"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        embedder(**options)


def test_masks_of_joined_tokens_follow_the_join():
    first, second = (
        Embedding(torch.zeros(2, 3, 4), torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()),
        Embedding(torch.ones(2, 3, 4)),
    )
    from vdiff.conditioners.composition import _join

    assert _join("cross_attention", [first, first], 2).mask.equal(first.mask)
    joined = _join("cross_attention", [first, second], 1)
    assert joined.tensor.shape == (2, 6, 4) and joined.mask.sum(1).tolist() == [4, 5]


def test_fields_of_different_length_are_named():
    from vdiff.conditioners import ScalarFourierEmbedder

    made = EmbedderConditioner([embedder(), ScalarFourierEmbedder("fps")]).eval()
    with pytest.raises(ValueError, match="one value per row, and they differ in number: caption 4, fps 2"):
        made({"caption": PROMPTS, "fps": [8.0, 9.0]})
