"""Text towers of transformers: the model's own numbers, its files read, and prompts where no tokenizer is at hand."""

import pytest
import torch
from peers import peer, save_tokenizer

from vdiff.conditioners import CLIPTextEmbedder, OpenCLIPImageEmbedder, OpenCLIPTextEmbedder, T5TextEmbedder
from vdiff.registry import build

CLIP = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=16
)
T5 = dict(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu", vocab_size=100)
PROMPTS = ["a cat", "a dog on a mat"]

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture(autouse=True)
def transformers():
    torch.manual_seed(0)
    return peer("transformers")


def clip(**options):
    return CLIPTextEmbedder(CLIP, pooled_feeds="vector", **options).eval()


def test_clip_tokens_are_those_of_transformers():
    made = clip()
    ids = made.ids(PROMPTS)
    assert ids[0].tolist() == [49406, 320, 2368, *[49407] * 13]  # padded with the end, as Stable Diffusion was
    theirs = made.transformer(ids, output_hidden_states=True)
    assert torch.allclose(made(PROMPTS)["cross_attention"].tensor, theirs.last_hidden_state, atol=1e-6)
    assert torch.allclose(made(PROMPTS)["vector"].tensor, theirs.pooler_output, atol=1e-6)
    made.layer, made.norm = "penultimate", False
    made.remembered.forget()
    assert torch.allclose(made(PROMPTS)["cross_attention"].tensor, theirs.hidden_states[-2], atol=1e-6)
    made.norm = True
    made.remembered.forget()
    inner = getattr(made.transformer, "text_model", made.transformer)
    expected = inner.final_layer_norm(theirs.hidden_states[-2])
    assert torch.allclose(made(PROMPTS)["cross_attention"].tensor, expected, atol=1e-6)


def test_open_clip_and_transformers_are_one_tower_in_two_layouts(tmp_path):
    """Weights of the one, renamed, give the tokens of the other: masks, normalisations and activations agree."""
    from safetensors.torch import save_file

    ours = OpenCLIPTextEmbedder({"embed_dim": 24, "width": 32, "heads": 4, "layers": 3, "context_length": 16}).eval()
    renamed = {}
    for name, value in ours.model.state_dict().items():
        name = name.replace("transformer.resblocks.", "encoder.layers.").replace("ln_final", "final_layer_norm")
        name = name.replace("token_embedding", "embeddings.token_embedding").replace(".attn.", ".self_attn.")
        name = name.replace("positional_embedding", "embeddings.position_embedding.weight")
        name = name.replace("ln_", "layer_norm").replace("c_fc", "fc1").replace("c_proj", "fc2")
        if "in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        elif name not in ("text_projection", "logit_scale"):
            renamed[name] = value.clone()
    file = tmp_path / "model.safetensors"
    save_file({f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in renamed.items()}, file)
    theirs = CLIPTextEmbedder({**CLIP, "hidden_act": "gelu"}, file).eval()
    ids = ours.ids(PROMPTS)
    expected, tokens = ours.encode(ids)["tokens"], theirs.encode(ids)["tokens"]
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_t5_tokens_are_those_of_transformers_and_a_mask_hides_padding():
    ids = torch.tensor([[5, 6, 1, 0, 0, 0], [7, 8, 9, 10, 11, 1]])
    plain, masked = (T5TextEmbedder(T5, length=6, masked=m).eval() for m in (False, True))
    masked.load_state_dict(plain.state_dict())
    assert torch.allclose(
        plain(ids)["cross_attention"].tensor, plain.transformer(input_ids=ids).last_hidden_state, atol=1e-6
    )
    said = masked(ids)["cross_attention"]
    assert said.mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    alone = T5TextEmbedder(T5, length=3).eval()
    alone.load_state_dict(plain.state_dict())
    assert torch.allclose(said.tensor[:1, :3], alone(ids[:1, :3])["cross_attention"].tensor, atol=1e-6)


def test_t5_needs_no_tokenizer_to_say_nothing_and_says_what_it_needs_for_more():
    made = T5TextEmbedder(T5, length=6).eval()
    _, null = made.with_null(torch.tensor([[5, 6, 1]]))
    assert torch.allclose(null["cross_attention"].tensor, made.encode(torch.tensor([[1, 0, 0, 0, 0, 0]]))["tokens"])
    with pytest.raises(ValueError, match=r"as token ids \(B, n\) that end in 1. Or give tokenizer: FOLDER"):
        made(PROMPTS)


def test_t5_prompts_are_cut_and_padded_as_transformers_does(tmp_path):
    tokens = save_tokenizer(tmp_path, ["a", "cat", "on", "mat"])
    prompts = ["a cat", "a cat on a mat on a mat", "a cat on a mat"]
    theirs = tokens(prompts, max_length=6, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    made = T5TextEmbedder(T5, length=6, tokenizer=tmp_path)
    with pytest.warns(UserWarning, match="T5TextEmbedder: .* 6 tokens and a prompt has 9; it is cut before 'on a mat'"):
        assert torch.equal(made.ids(prompts), theirs)
    with pytest.warns(UserWarning, match="CLIPTextEmbedder: .* 16 tokens and a prompt has 20; .* 'cat cat cat cat'"):
        assert clip().ids(["cat " * 18])[0].tolist() == [49406, *[2368] * 14, 49407]


def test_t5_weights_come_from_a_file(tmp_path):
    from safetensors.torch import save_file

    made = T5TextEmbedder(T5, length=6)
    saved = {k: v.clone() for k, v in made.transformer.state_dict().items() if "embed_tokens" not in k}
    save_file(saved, tmp_path / "t5.safetensors")
    other = T5TextEmbedder(T5, tmp_path / "t5.safetensors", length=6)
    ids = torch.tensor([[5, 6, 1]])
    assert torch.equal(made(ids)["cross_attention"].tensor, other(ids)["cross_attention"].tensor)


# The sizes that Hugging Face publishes for these towers.
@pytest.mark.parametrize(
    "node, count",
    [
        ({"type": "clip_text", "arch": "openai/clip-vit-large-patch14"}, 123_060_480),
        ({"type": "t5_text", "arch": "google/t5-v1_1-xxl"}, 4_762_310_656),
        ({"type": "t5_text", "arch": "t5-v1_1-small"}, 35_332_800),
    ],
)
def test_published_towers_are_built_without_memory(node, count):
    with torch.device("meta"):
        made = build(node, "embedder")
    assert all(p.is_meta for p in made.parameters())
    assert sum(p.numel() for p in made.parameters()) == count


def test_an_unknown_tower_is_an_error():
    with pytest.raises(ValueError, match="no architecture is called 'clip-huge'. Known: clip-vit-large-patch14"):
        CLIPTextEmbedder("clip-huge")


@pytest.mark.parametrize(
    "tower, arch, unknown, near",
    [
        (CLIPTextEmbedder, {"width": 32, "heads": 4, "layers": 2}, "'width', 'heads', 'layers'", "num_hidden_layers"),
        (CLIPTextEmbedder, {**CLIP, "hiden_size": 32}, "'hiden_size'", "Did you mean 'hidden_size'?"),
        (T5TextEmbedder, {**T5, "d_modle": 32}, "'d_modle'", "Did you mean 'd_model'?"),
        (OpenCLIPTextEmbedder, {"embed_dim": 8, "hidden_size": 8}, "'hidden_size'", "It takes: embed_dim, .*width"),
        (OpenCLIPImageEmbedder, {"embed_dim": 8, "widht": 8}, "'widht'", "Did you mean 'width'.*head_width"),
    ],
)
def test_a_name_that_no_tower_reads_is_an_error_that_says_which_are_read(tower, arch, unknown, near):
    with pytest.raises(ValueError, match=f"{tower.__name__}: arch takes no {unknown}[.].*{near}"):
        tower(arch)


def test_transformers_other_words_for_a_number_of_t5_are_read():
    assert T5TextEmbedder({**T5, "hidden_size": 16}).tower.config.d_model == 16
