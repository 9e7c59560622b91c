"""Files of ComfyUI, LyCORIS and peft with what is not in every file: read, or refused by name with what to do."""

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import WeightFileError, save_weights
from vdiff.mixins import load_adapter
from vdiff.mixins.formats import format_of, read_adapter
from vdiff.networks import UNet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.conv = nn.Linear(6, 6), nn.Linear(6, 4), nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x):
        return self.to_k(self.to_q(x))


def changed(net, file, site):
    """How an adapter changes what a layer says, for a picture or a vector."""
    x = torch.randn(2, 3, 8, 8) if site == "conv" else torch.randn(2, 6)
    layer = net.get_submodule(site)
    with torch.no_grad():
        before = layer(x)
        load_adapter(file, net).attach(net)
        return x, layer(x) - before


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("leaves, alpha", [(("lora_A", "lora_B"), None), (("lora_down", "lora_up"), 0.5)])
def test_files_of_comfyui_are_read_by_the_networks_names(leaves, alpha, prefix, tmp_path):
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    tensors = {f"{prefix}to_q.{leaf}.weight": value for leaf, value in zip(leaves, (a, b), strict=True)}
    tensors |= {} if alpha is None else {f"{prefix}to_q.alpha": torch.tensor(alpha)}
    save_weights(tmp_path / "a.safetensors", tensors)
    assert format_of(tmp_path / "a.safetensors") == "diffusers"
    x, change = changed(Net(), tmp_path / "a.safetensors", "to_q")
    torch.testing.assert_close(change, (alpha or 2) / 2 * x @ a.T @ b.T)


def test_and_by_latent_diffusions(tmp_path):
    site = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = {
        "lora_down.weight": torch.randn(2, 32),
        "lora_up.weight": torch.randn(32, 2),
        "dora_scale": torch.ones(32, 1),
    }
    save_weights(tmp_path / "a.safetensors", {f"diffusion_model.{site}.{leaf}": v for leaf, v in tensors.items()})
    mixin = load_adapter(tmp_path / "a.safetensors", UNet(4, 4, 32, (1,), 1, (1,), num_heads=2, context_dim=8))
    assert mixin.registered_name == "dora"
    assert set(mixin.state_dict()) == {f"{site}.{leaf}" for leaf in ("A", "B", "magnitude")}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_says_the_same_by_either_name(kind, prefix, tmp_path):
    """Of two full Kronecker factors alpha is not read."""
    if kind == "loha":
        weights = {f"hada_w{i}_{x}": torch.randn((6, 2) if x == "a" else (2, 6)) for i in (1, 2) for x in "ab"}
        pairs = [weights[f"hada_w{i}_a"] @ weights[f"hada_w{i}_b"] for i in (1, 2)]
        expected = 0.5 / 2 * pairs[0] * pairs[1]
    else:
        weights = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(3, 3)}
        expected = torch.kron(weights["lokr_w1"], weights["lokr_w2"])
    tensors = {f"{prefix}to_q.{leaf}": v for leaf, v in (weights | {"alpha": torch.tensor(0.5)}).items()}
    save_weights(tmp_path / "a.safetensors", tensors)
    x, change = changed(Net(), tmp_path / "a.safetensors", "to_q")
    torch.testing.assert_close(change, x @ expected.T, rtol=1e-5, atol=1e-5)


def test_a_convolution_among_few_channels_is_what_lycoris_calls_in_a_row(tmp_path):
    """LoCon with ``use_tucker``: down, mid with the host's stride and padding, up."""
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(5, 2, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    save_weights(tmp_path / "a.safetensors", {f"lora_unet_conv.{leaf}": v for leaf, v in tensors.items()})
    x, change = changed(Net(), tmp_path / "a.safetensors", "conv")
    conv = nn.functional.conv2d
    torch.testing.assert_close(
        change, 1.5 * conv(conv(conv(x, down), mid, stride=2, padding=1), up), rtol=1e-5, atol=1e-5
    )
    save_weights(
        tmp_path / "a.safetensors", {f"lora_unet_conv.{n}": v for n, v in (tensors | {"lora_mid.weight": up}).items()}
    )
    with pytest.raises(WeightFileError, match=r"with a lora_mid the first is \(rank, in, 1, 1\) and the second"):
        read_adapter(tmp_path / "a.safetensors")


PAIR = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(6, 2)}
LOHA = {f"hada_w{i}_{x}": torch.ones((6, 2) if x == "a" else (2, 6)) for i in (1, 2) for x in "ab"}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 3)}


@pytest.mark.parametrize(
    "sites, message",
    [
        ({"to_q": PAIR, "to_k": LOKR}, "several kinds in one file: {'lokr': 1, 'lora': 1}.*make a file of each"),
        ({"to_q": LOHA | {"dora_scale": torch.ones(6, 1)}}, "a loha with a dora_scale .LyCORIS' dora_wd.*Fuse the"),
        ({"to_q": LOKR | {"dora_scale": torch.ones(6, 1)}}, "a lokr with a dora_scale .LyCORIS' dora_wd.*Fuse the"),
        ({"to_q": PAIR | {"lora_up.bias": torch.ones(6)}}, "a bias of the pair .peft's lora_bias.*Fuse the"),
        ({"to_q": PAIR, "to_k": {"diff": torch.ones(4, 6)}}, "a whole weight's change, not one of low rank. Fuse the"),
        ({"to_q": {"oft_blocks": torch.ones(2, 3, 3)} | PAIR}, "of OFT, GLoRA or .IA..3.*Fuse the"),
    ],
)
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_what_is_not_read_is_named_with_what_to_do(prefix, sites, message, tmp_path):
    tensors = {f"{prefix}{site}.{leaf}": v for site, weights in sites.items() for leaf, v in weights.items()}
    save_weights(tmp_path / "a.safetensors", tensors)
    with pytest.raises(WeightFileError, match=message):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": "all"}, "bias is 'all': biases of the network were trained besides"),
        ({"lora_bias": True}, "lora_bias is True: the pairs have biases"),
        ({"modules_to_save": ["to_k"]}, r"modules_to_save is \['to_k'\]: whole modules were trained besides"),
    ],
)
def test_what_peft_trains_besides_is_named_with_what_to_do(options, message, tmp_path):
    peft = peer("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["to_q"], **options))
    model.save_pretrained(str(tmp_path / "p"))
    with pytest.raises(WeightFileError, match=rf"{message}.*merge_and_unload"):
        read_adapter(tmp_path / "p")
