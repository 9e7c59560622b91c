"""Adapters of text towers: files of diffusers, kohya and peft on our embedders, and ours there."""

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.checkpoints.maps.towers import open_clip_text
from vdiff.conditioners import CLIPTextEmbedder, OpenCLIPTextEmbedder
from vdiff.mixins import LoRA, load_adapter
from vdiff.mixins.formats import AdapterWeights, format_of, read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
ARCH = dict(
    hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=8,
    vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
OPEN = {"embed_dim": 8, "width": 16, "heads": 2, "layers": 2, "context_length": 8, "vocab_size": 50}
IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 1, 1], [0, 9, 8, 1, 1, 1, 1, 1]])
LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def tower():
    """Ours, and transformers' with the same weights."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    ours = CLIPTextEmbedder(ARCH).eval()
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**ARCH)).eval()
    getattr(theirs, "text_model", theirs).load_state_dict(ours.transformer.state_dict())
    return ours, theirs


def said(ours):
    with torch.no_grad():
        return ours.encode(IDS)["tokens"]


def said_by(theirs):
    with torch.no_grad():
        return theirs(IDS).last_hidden_state


@pytest.mark.parametrize(
    "spelling", ["text_encoder.text_model.", "text_encoder.", "lora_te_text_model_", "lora_te1_text_model_"]
)
@pytest.mark.parametrize("is_inside", [False, True])
def test_published_files_of_a_text_encoder_say_here_what_peft_says(is_inside, spelling, tmp_path):
    peft = peer("peft")
    ours, theirs = tower()
    plain = said(ours)
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=LAYERS)
    theirs = peft.get_peft_model(theirs, config).eval()
    tensors = {}
    for name, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        nn.init.normal_(a, std=0.5), nn.init.normal_(b, std=0.5)
        name = name.removeprefix("text_model.")
        if spelling.startswith("lora_te"):
            leaves, name = ("lora_down", "lora_up"), name.replace(".", "_")
        else:
            leaves = (
                ("lora_A", "lora_B")
                if spelling.endswith("text_model.")
                else ("lora_linear_layer.down", "lora_linear_layer.up")
            )
        begin = f"{spelling}{name}."
        tensors |= {f"{begin}{leaves[0]}.weight": a.detach(), f"{begin}{leaves[1]}.weight": b.detach()}
        tensors[f"{begin}alpha"] = torch.tensor(5.0)
    save_weights(tmp_path / "a.safetensors", tensors)
    mixin = load_adapter(tmp_path / "a.safetensors", ours.transformer if is_inside else ours)
    mixin.attach(ours.transformer if is_inside else ours)
    assert len(mixin.sites) == 12 and (said(ours) - plain).abs().max() > 0.1
    torch.testing.assert_close(said(ours), said_by(theirs), rtol=1e-5, atol=1e-5)
    mixin.detach()
    assert torch.equal(said(ours), plain)


def adapted():
    ours, theirs = tower()
    mixin = LoRA(rank={"*.fc1": 2, "*": 3}, alpha=4.0, on=[f"*.{name}" for name in LAYERS]).attach(ours)
    for parameter in mixin.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ours, theirs, mixin


def test_diffusers_reads_ours_and_says_the_same(tmp_path):
    diffusers = peer("diffusers")
    ours, theirs, mixin = adapted()
    write_adapter(AdapterWeights.of(mixin), tmp_path, "diffusers")
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    tensors, alphas, metadata = loader.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in tensors)
    loader.load_lora_into_text_encoder(tensors, alphas, theirs, "text_encoder", metadata=metadata)
    torch.testing.assert_close(said_by(theirs), said(ours), rtol=1e-5, atol=1e-5)


def test_peft_reads_ours_and_says_the_same(tmp_path):
    peft = peer("peft")
    ours, theirs, mixin = adapted()
    write_adapter(AdapterWeights.of(mixin), tmp_path / "p", "peft")
    theirs = peft.PeftModel.from_pretrained(getattr(theirs, "text_model", theirs), str(tmp_path / "p"))
    torch.testing.assert_close(said_by(theirs), said(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["vdiff", "diffusers", "peft", "kohya"])
def test_every_format_leads_back_bit_for_bit(form, tmp_path):
    ours, _, mixin = adapted()
    path = tmp_path / ("p" if form == "peft" else "a.safetensors")
    write_adapter(AdapterWeights.of(mixin), path, form)
    assert format_of(path) == form
    if form == "kohya":
        assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in read_weights(path))
    weights, after = mixin.state_dict(), said(ours)
    mixin.detach()
    again = load_adapter(path, ours).attach(ours)
    assert torch.equal(said(ours), after) and all(torch.equal(again.state_dict()[n], v) for n, v in weights.items())


def layers_of(*leaves):
    """A file of kohya for a second tower, as published."""
    sizes = {"q_proj": (16, 16), "fc1": (64, 16), "fc2": (16, 64)}
    tensors = {}
    for leaf in leaves:
        begin = f"lora_te2_text_model_encoder_layers_1_{'mlp' if leaf.startswith('fc') else 'self_attn'}_{leaf}"
        rows, columns = sizes[leaf]
        tensors |= {
            f"{begin}.lora_down.weight": torch.randn(2, columns),
            f"{begin}.lora_up.weight": torch.randn(rows, 2),
        }
    return tensors


def test_what_open_clip_has_as_layers_gets_its_adapter(tmp_path):
    """The change is that of transformers' weights, which the table of checkpoints leads to ours."""
    torch.manual_seed(0)
    ours, other = OpenCLIPTextEmbedder(OPEN).eval(), OpenCLIPTextEmbedder(OPEN).eval()
    tensors = layers_of("fc1", "fc2")
    save_weights(tmp_path / "a.safetensors", tensors)
    theirs = open_clip_text()(ours.state_dict())
    for leaf in ("fc1", "fc2"):
        begin = f"lora_te2_text_model_encoder_layers_1_mlp_{leaf}."
        change = tensors[f"{begin}lora_up.weight"] @ tensors[f"{begin}lora_down.weight"]
        theirs[f"text_model.encoder.layers.1.mlp.{leaf}.weight"] = (
            theirs[f"text_model.encoder.layers.1.mlp.{leaf}.weight"] + change
        )
    other.load_state_dict(open_clip_text().inverse(theirs))
    load_adapter(tmp_path / "a.safetensors", ours).attach(ours)
    torch.testing.assert_close(said(ours), said(other), rtol=1e-4, atol=1e-4)


def test_what_open_clip_has_no_layer_for_is_refused_and_the_error_says_what_to_do(tmp_path):
    save_weights(tmp_path / "a.safetensors", layers_of("q_proj", "fc1"))
    with pytest.raises(
        WeightFileError, match=r"1 of 2 sites are not in OpenCLIP.*not supported\. Load .*component='unet'"
    ):
        load_adapter(tmp_path / "a.safetensors", OpenCLIPTextEmbedder(OPEN))
    assert set(read_adapter(tmp_path / "a.safetensors").sites) == {
        f"text_model_encoder_layers_1_{name}" for name in ("self_attn_q_proj", "mlp_fc1")
    }
