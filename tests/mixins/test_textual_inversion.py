"""New words: what a tower with a longer table says, from one whose table is as it was."""

import copy

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.conditioners import CLIPTextEmbedder, OpenCLIPTextEmbedder
from vdiff.mixins import TextualInversion, load_mixin
from vdiff.mixins.embedding_files import read_embeddings, save_embeddings

OPEN_CLIP = {"embed_dim": 8, "width": 16, "heads": 2, "layers": 2, "context_length": 12}
CLIP = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
)
PROMPTS = ["a photo of <cat>, <hat> on", "a dog", "<cat>"]

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


def open_clip():
    peer("open_clip")
    return OpenCLIPTextEmbedder(OPEN_CLIP, pooled_feeds="vector").eval()


def transformers():
    peer("transformers")
    peer("open_clip")
    return CLIPTextEmbedder(CLIP, pooled_feeds="vector").eval()


TOWERS = pytest.mark.parametrize("tower", [open_clip, transformers])


def table(embedder):
    return next(m for n, m in embedder.named_modules() if n.endswith("token_embedding"))


def lengthened(embedder, rows):
    """The same tower with the rows at the end of its vocabulary, as others do it."""
    twin = copy.deepcopy(embedder)
    old = table(twin).weight
    new = nn.Embedding(len(old) + len(rows), old.shape[1])
    new.weight.data = torch.cat([old.data, rows])
    for module in twin.modules():
        if isinstance(getattr(module, "token_embedding", None), nn.Embedding):
            module.token_embedding = new
    return twin.requires_grad_(False)


@TOWERS
def test_it_says_what_a_longer_table_says(tower):
    embedder = tower()
    plain = embedder(["a dog"])["cross_attention"].tensor
    inversion = TextualInversion({"<cat>": 2, "<hat>": 1})
    twin = lengthened(embedder, rows := torch.randn(3, 16))
    inversion.attach(embedder)
    with torch.no_grad():
        next(inversion.parameters()).copy_(rows)
    ids = embedder.ids(PROMPTS)
    said, wanted = embedder(PROMPTS), twin(ids)
    torch.testing.assert_close(said["cross_attention"].tensor, wanted["cross_attention"].tensor)
    torch.testing.assert_close(said["vector"].tensor, wanted["vector"].tensor) if tower is transformers else None
    torch.testing.assert_close(said["cross_attention"].tensor[1:2], plain)
    inversion.detach()
    assert torch.equal(embedder(["a dog"])["cross_attention"].tensor, plain)
    assert not any("_port" in key for key in embedder.state_dict())


def test_the_pooled_vector_is_where_the_prompt_ends():
    """open_clip looks for the largest id, which is the end token's as long as no word was learned."""
    embedder = open_clip()
    TextualInversion({"<cat>": 1}).attach(embedder)
    (ids,) = embedder.ids(["a <cat> here"])
    place = ids.tolist().index(49407)
    assert ids.max() > 49407
    model = embedder.model
    x = model.token_embedding(ids[None]) + model.positional_embedding
    for block in model.transformer.resblocks:
        x = block(x, attn_mask=model.attn_mask)
    want = model.ln_final(x)[:, place] @ model.text_projection
    torch.testing.assert_close(embedder(["a <cat> here"])["vector"].tensor, want)


@TOWERS
def test_prompts_with_new_words_become_ids(tower):
    embedder = tower()
    size = table(embedder).num_embeddings
    plain = embedder.ids(["a photo of a dog, on"])[0].tolist()
    TextualInversion({"<cat>": 2, "<cat>s": 1}).attach(embedder)
    a_photo_of_a, _, rest = plain[:5], plain[5], plain[6:]
    new = embedder.ids(["a photo of a <cat>, on", "a photo of a dog, on", "<cat>s"])
    assert new[0].tolist() == [*a_photo_of_a, size, size + 1, *rest[:-1]]
    assert new[1].tolist() == plain
    assert new[2].tolist()[:3] == [49406, size + 2, 49407]  # the longer word first
    with pytest.warns(UserWarning, match="a prompt has 42; it is cut before '<cat> <cat>"):
        long = embedder.ids(["<cat> " * 20])[0].tolist()
    assert len(long) == 12 and long[-1] == 49407


@TOWERS
def test_only_the_vectors_that_a_prompt_names_have_gradients(tower):
    embedder = tower()
    inversion = TextualInversion({"<cat>": 1, "<hat>": 1}).attach(embedder)
    embedder(["a <hat>"])["cross_attention"].tensor.square().sum().backward()
    (rows,) = inversion.parameters()
    assert not rows.grad[0].any() and rows.grad[1].any()
    assert all(p.grad is None for n, p in embedder.named_parameters() if "_port" not in n)


def test_words_of_several_mixins_have_ids_of_their_own():
    embedder = open_clip()
    first, second = TextualInversion({"<cat>": 2}).attach(embedder), TextualInversion({"<hat>": 1}, name="hat")
    second.attach(embedder)
    (ids,) = embedder.ids(["<hat> <cat>"])
    size = table(embedder).num_embeddings
    assert ids.tolist()[1:4] == [size + 2, size, size + 1]
    x = table(embedder)(ids[None])
    torch.testing.assert_close(x[0, 1:4], torch.cat([second.vectors["<hat>"], first.vectors["<cat>"]]))


def test_a_word_begins_as_others_are():
    embedder = open_clip()
    inversion = TextualInversion({"<cat>": 3, "<hat>": 1}, start={"<hat>": [320]}).attach(embedder)
    rows = table(embedder).weight
    assert torch.equal(inversion.vectors["<hat>"], rows[[320]])
    inversion.start_from(embedder, "<cat>", "a dog")
    ids = embedder.ids(["a dog"])[0, [1, 2, 1]]
    assert torch.equal(inversion.vectors["<cat>"], rows[ids])
    assert inversion.vectors["<hat>"].std() > 0


@pytest.mark.parametrize("layout", ["diffusers", "one vector", "webui", "sdxl"])
def test_files_of_the_community_are_read(layout, tmp_path):
    rows, word, key = torch.randn(2, 16), "<cat>", None
    file = tmp_path / "cat.safetensors"
    if layout == "diffusers":
        save_weights(file, {"<cat>": rows})
    elif layout == "one vector":
        rows = rows[:1]
        save_weights(file, {"<cat>": rows[0]})
    elif layout == "webui":
        file, word = tmp_path / "cat.pt", "cat"
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "cat", "step": 100}, file)
    else:
        word, key = "cat", "clip_g"
        save_weights(file, {"clip_l": torch.randn(2, 8), "clip_g": rows})
    inversion = TextualInversion.read(file, key=key).attach(open_clip())
    assert torch.equal(inversion.vectors[word], rows)
    assert torch.equal(TextualInversion.read(file, "<x>", key).attach(open_clip()).vectors["<x>"], rows)


def test_files_are_written_as_others_read_them(tmp_path):
    inversion = TextualInversion({"<cat>": 2}).attach(open_clip())
    inversion.write(tmp_path / "cat.safetensors")
    assert {k: tuple(v.shape) for k, v in read_weights(tmp_path / "cat.safetensors").items()} == {"<cat>": (2, 16)}
    inversion.write(tmp_path / "one.safetensors", key="clip_l")
    assert list(read_weights(tmp_path / "one.safetensors")) == ["clip_l"]
    both = {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 16)}
    save_embeddings(tmp_path / "xl.safetensors", both)
    assert torch.equal(read_embeddings(tmp_path / "xl.safetensors", "w", "clip_g")["w"], both["clip_g"])


def test_our_own_file_brings_the_words_back(tmp_path):
    embedder = open_clip()
    inversion = TextualInversion({"<cat>": 2, "<hat>": 1}).attach(embedder)
    inversion.save(tmp_path / "words.safetensors")
    said = embedder(PROMPTS)["cross_attention"].tensor
    inversion.detach()
    again = load_mixin(tmp_path / "words.safetensors").attach(embedder)
    torch.testing.assert_close(embedder(PROMPTS)["cross_attention"].tensor, said)
    assert again.vectors.keys() == {"<cat>", "<hat>"}


def test_what_does_not_fit_is_refused(tmp_path):
    save_weights(tmp_path / "cat.safetensors", {"<cat>": torch.randn(2, 5)})
    with pytest.raises(ValueError, match="are 5 long, and this tower's 16"):
        TextualInversion.read(tmp_path / "cat.safetensors").attach(open_clip())
    with pytest.raises(ValueError, match="no module of OpenCLIPTextEmbedder matches"):
        TextualInversion({"<cat>": 1}, on="*.shared").attach(open_clip())
    with pytest.raises(ValueError, match="goes on an nn.Embedding"):
        TextualInversion({"<cat>": 1}, on="0").attach(nn.Sequential(nn.Linear(2, 2)))
    save_embeddings(tmp_path / "xl.safetensors", {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 16)})
    with pytest.raises(WeightFileError, match="say which: key='clip_"):
        read_embeddings(tmp_path / "xl.safetensors")
    for words in ({}, {"": 1}, {"<cat>": 0}):
        with pytest.raises(ValueError, match="words are names"):
            TextualInversion(words)
    with pytest.raises(ValueError, match="start names '<hat>'"):
        TextualInversion({"<cat>": 1}, start={"<hat>": [1]})
