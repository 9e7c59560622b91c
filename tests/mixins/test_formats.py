"""A file of another program says the same thing here, and ours says it there; tensors go through bit for bit."""

import copy
import json

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import WeightFileError, read_metadata, read_weights, save_weights
from vdiff.checkpoints.diffusers_names import to_diffusers, to_ldm
from vdiff.cli import main
from vdiff.mixins import DoRA, JointAttention, LoHa, LoKr, LoRA, load_adapter, load_mixin
from vdiff.mixins.formats import (
    AdapterWeights,
    format_of,
    module_names,
    num_res_blocks,
    read_adapter,
    read_adapters,
    unicon,
    write_adapter,
)
from vdiff.networks import UNet
from vdiff.process import Conditioning

KINDS = {
    "lora": lambda on: LoRA(rank={"*.a": 4, "*": 2}, alpha={"*.b": 3.0, "*": 5.0}, on=on),
    "rslora": lambda on: LoRA(rank=4, alpha=3.0, on=on, rslora=True),
    "dora": lambda on: DoRA(rank=2, alpha=3.0, on=on),
    "loha": lambda on: LoHa(rank=2, alpha=3.0, on=on),
    "loha tucker": lambda on: LoHa(rank=2, alpha=3.0, on=on, tucker=True),
    "lokr": lambda on: LoKr(rank=1, alpha=3.0, on=on),
    "lokr both": lambda on: LoKr(rank=1, alpha=3.0, on=on, decompose_both=True, tucker=True),
    "lokr full": lambda on: LoKr(rank=9, alpha=9.0, on=on),
}
ON = ["m.a", "m.b", "m.c"]


class Host(nn.Module):
    """Linear layers and a convolution, none of them at the top."""

    def __init__(self):
        super().__init__()
        self.m = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(8, 4), "c": nn.Conv2d(1, 4, 3, padding=1)})

    def forward(self, x):
        return self.m["c"](self.m["b"](self.m["a"](x).tanh())[:, None])


def host(kind, on=ON):
    torch.manual_seed(0)
    net = Host()
    mixin = KINDS[kind](on).attach(net)
    for parameter in mixin.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net, mixin


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vdiff", "peft", "kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_there_and_back_bit_for_bit(kind, form, tmp_path):
    net, mixin = host(kind)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        y = net(x)
    one, weights = AdapterWeights.of(mixin), mixin.state_dict()
    path = tmp_path / ("folder" if form == "peft" else "file.safetensors")
    if form == "diffusers" and kind.startswith("loha"):
        with pytest.raises(ValueError, match="diffusers reads LoRA, DoRA and LoKr"):
            write_adapter(one, path, form)
        return
    write_adapter(one, path, form)
    assert format_of(path) == form
    mixin.detach()
    again = load_adapter(path, net)
    if form == "kohya" and kind.startswith("lokr"):  # there, two full factors have no alpha
        weights = {name: value for name, value in weights.items() if name.startswith("m.a") and kind != "lokr full"}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in weights.items())
    with torch.no_grad():
        torch.testing.assert_close(again.attach(net) and net(x), y, rtol=1e-6, atol=1e-6)


def test_alpha_is_always_written(tmp_path):
    _, mixin = host("lora")
    one = AdapterWeights.of(mixin)
    write_adapter(one, tmp_path / "p", "peft")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (
        config["lora_alpha"] == 5
        and config["alpha_pattern"] == {r"^m\.b": 3.0}
        and config["rank_pattern"] == {r"^m\.a": 4}
    )
    write_adapter(one, tmp_path / "k.safetensors", "kohya")
    alphas = {n: v.item() for n, v in read_weights(tmp_path / "k.safetensors").items() if n.endswith("alpha")}
    assert {n.split(".")[0][-3:]: v for n, v in alphas.items()} == {"m_a": 5, "m_b": 3, "m_c": 5}
    write_adapter(one, tmp_path / "d.safetensors", "diffusers")
    said = json.loads(read_metadata(tmp_path / "d.safetensors")["lora_adapter_metadata"])
    assert said["transformer.lora_alpha"] == 5


@pytest.mark.parametrize("arguments", [{"parts": 2}, {"init": "pissa"}, {"init": "olora", "rslora": True}])
def test_what_others_do_not_know_becomes_a_larger_pair_that_does_the_same(arguments, tmp_path):
    net, x = Host(), torch.randn(2, 3, 6)
    lora = LoRA(rank=2, alpha=3.0, on=["m.a", "m.b"], **arguments).attach(net)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    y = net(x)
    write_adapter(AdapterWeights.of(lora), tmp_path / "p", "peft")
    lora.detach()
    load_adapter(tmp_path / "p", net).attach(net)
    torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)


# peft itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours_and_says_the_same(kind, tmp_path):
    peft = peer("peft")
    net, mixin = host(kind)
    x = torch.randn(2, 3, 6)
    y = net(x)
    write_adapter(AdapterWeights.of(mixin), tmp_path / "p", "peft")
    mixin.detach()
    theirs = peft.PeftModel.from_pretrained(net, tmp_path / "p")
    torch.testing.assert_close(theirs(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_we_read_pefts_and_say_the_same(kind, tmp_path):
    peft = peer("peft")
    torch.manual_seed(0)
    net, x = Host(), torch.randn(2, 3, 6)
    common = {"r": 2, "target_modules": ON, "rank_pattern": {"m.a": 3}, "alpha_pattern": {"b": 7}}
    config = {
        "lora": lambda: peft.LoraConfig(lora_alpha=5, init_lora_weights=False, **common),
        "rslora": lambda: peft.LoraConfig(lora_alpha=5, use_rslora=True, init_lora_weights=False, **common),
        "dora": lambda: peft.LoraConfig(lora_alpha=5, use_dora=True, init_lora_weights=False, **common),
        "loha": lambda: peft.LoHaConfig(alpha=5, init_weights=False, use_effective_conv2d=True, **common),
        "lokr": lambda: peft.LoKrConfig(alpha=5, init_weights=False, decompose_both=True, **common),
    }[kind]()
    theirs = peft.get_peft_model(net, config)
    if kind == "dora":
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
    y = theirs(x)
    theirs.save_pretrained(tmp_path / "p")
    plain = theirs.unload()
    load_adapter(tmp_path / "p", plain).attach(plain)
    torch.testing.assert_close(plain(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_of_a_base_that_peft_changed_is_refused_until_it_is_a_plain_one(start, tmp_path):
    peft = peer("peft")
    torch.manual_seed(0)
    net, x = Host(), torch.randn(2, 3, 6)
    plain = copy.deepcopy(net)
    theirs = peft.get_peft_model(
        net, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["m.a", "m.b"], init_lora_weights=start)
    )
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    y = theirs(x)
    theirs.save_pretrained(tmp_path / "residual")
    with pytest.raises(WeightFileError, match="path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "residual", plain)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    load_adapter(tmp_path / "plain", plain).attach(plain)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)


def test_an_embedding_is_that_of_peft(tmp_path):
    peft = peer("peft")
    net, x = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)), torch.randint(9, (2, 5))
    lora = LoRA(rank=2, alpha=3.0, on="0").attach(net)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    y = net(x)
    write_adapter(AdapterWeights.of(lora), tmp_path / "p", "peft")
    lora.detach()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net, tmp_path / "p")(x), y, rtol=1e-6, atol=1e-6)


# Stable Diffusion's UNet in latent diffusion's names and in diffusers' --------------------------------


def small_unet():
    return UNet(4, 4, 32, (1, 2), 2, (1, 2), num_heads=2, context_dim=8).eval()


def test_both_names_of_every_module_lead_to_each_other():
    names = [name for name in module_names(small_unet()) if name]
    assert num_res_blocks(names) == 2
    theirs = {name: to_diffusers(name) for name in names}
    assert None not in theirs.values() and len(set(theirs.values())) == len(names)
    assert {to_ldm(new, among=names): new for new in theirs.values()} == theirs


def test_names_of_a_unet_with_other_levels_are_not_guessed():
    names = ["input_blocks.2.0.op", "input_blocks.3.1.transformer_blocks.0.attn1.to_q"]
    for name in names:  # with one residual block a level
        with pytest.raises(ValueError, match="num_res_blocks="):
            to_diffusers(name)
    assert to_diffusers(names[0], 1) == "down_blocks.0.downsamplers.0.conv"
    assert to_diffusers(names[1], 1) == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def their_unet():
    diffusers = peer("diffusers")
    kind = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 8, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(down_block_types=kind[0], up_block_types=kind[1], norm_num_groups=32, **sizes)


def test_the_names_are_those_of_diffusers(their_unet):
    ours = {to_diffusers(name) for name in module_names(small_unet())}
    theirs = {name for name, module in their_unet.named_modules() if "weight" in module._parameters}
    assert ours == theirs


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_diffusers_reads_ours_and_says_the_same(kind, their_unet, tmp_path):
    peer("peft")
    net, their_unet = small_unet(), copy.deepcopy(their_unet)  # peft leaves its wrappers behind
    ours, theirs = dict(net.named_parameters()), dict(their_unet.named_parameters())
    with torch.no_grad():  # one network, twice
        for name, value in ours.items():
            module, leaf = name.rsplit(".", 1)
            value.copy_(theirs[f"{to_diffusers(module)}.{leaf}"])
    on = ["*.to_[qkv]", "*.in_layers.2"]
    make = {"lora": LoRA, "dora": DoRA, "lokr": LoKr}[kind]
    mixin = make(rank={"*.to_q": 3, "*": 2}, alpha=5.0, on=on if kind == "lora" else "*.to_q").attach(net)
    for parameter in mixin.parameters():
        nn.init.normal_(parameter, std=0.3)
    write_adapter(AdapterWeights.of(mixin), tmp_path, "diffusers")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert format_of(file) == format_of(tmp_path) == "diffusers"
    their_unet.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="unet", adapter_name=kind)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        y = net(x, torch.tensor([7.0]), Conditioning({"cross_attention": text}))
        torch.testing.assert_close(their_unet(x, torch.tensor([7.0]), text).sample, y, rtol=1e-4, atol=1e-4)
    again = load_adapter(file, small_unet())
    assert same(again.state_dict(), mixin.state_dict())


@pytest.mark.parametrize(
    "spelling",
    [
        "unet.{}.lora.down.weight",
        "unet.{}.lora_A.weight",
        "{}.lora_A.weight",
        "unet.{processor}_lora.down.weight",
        "{processor}_lora.down.weight",
    ],
)
def test_older_spellings_of_diffusers_mean_the_same(spelling, tmp_path):
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    processor = site.replace("attn1.to_q", "attn1.processor.to_q")
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    down = spelling.format(site, processor=processor)
    up = down.replace("down", "up").replace("up_blocks", "down_blocks").replace("lora_A", "lora_B")
    save_weights(tmp_path / "a.safetensors", {down: a, up: b})
    mixin = load_adapter(tmp_path / "a.safetensors", small_unet())
    ours = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    assert same(mixin.state_dict(), {f"{ours}.A": a, f"{ours}.B": b})
    assert (mixin.rank, mixin.alpha) == (2, 2)  # nothing said: alpha is the rank


@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_kohyas_names_are_read_beside_the_modules_of_the_host(naming, tmp_path):
    net = small_unet()
    lora = LoRA(rank=2, alpha=1.5, on=["*.to_out.0", "*.in_layers.2", "*.emb_layers.1", "*.op"]).attach(net)
    one = AdapterWeights.of(lora)
    from vdiff.mixins.formats import kohya

    kohya.write({"unet": one if naming == "ldm" else one.in_diffusers()}, tmp_path / "k.safetensors")
    names = read_weights(tmp_path / "k.safetensors")
    assert any(n.startswith("lora_unet_input_blocks" if naming == "ldm" else "lora_unet_down_blocks") for n in names)
    weights = lora.state_dict()
    lora.detach()
    again = load_adapter(tmp_path / "k.safetensors", net)
    assert same(again.state_dict(), weights) and again.alpha == 1.5


# SAT and UniCon ----------------------------------------------------------------------------------


def test_sats_fused_parts_are_diffusers_separate_ones_and_back(tmp_path):
    sat = "transformer.layers.3.attention."
    tensors = {
        f"model.diffusion_model.{sat}query_key_value.matrix_{w}.{i}": torch.randn((2, 6) if w == "A" else (6, 2))
        for w in "AB"
        for i in range(3)
    }
    tensors |= {
        f"model.diffusion_model.{sat}dense.matrix_{w}.0": torch.randn((2, 6) if w == "A" else (6, 2)) for w in "AB"
    }
    tensors[f"model.diffusion_model.{sat}dense.original.weight"] = torch.randn(6, 6)
    torch.save({"module": tensors}, tmp_path / "a.pt")
    with pytest.raises(WeightFileError, match="do not say alpha"):
        read_adapter(tmp_path / "a.pt")
    one = read_adapter(tmp_path / "a.pt", alpha=1.0)
    assert one.sites[f"{sat}query_key_value"].parts == 3
    write_adapter(one, tmp_path / "d.safetensors", "diffusers")
    found = read_weights(tmp_path / "d.safetensors")
    block = "transformer.transformer_blocks.3.attn1"
    key = f"model.diffusion_model.{sat}query_key_value.matrix_B.1"
    assert len(found) == 8 and torch.equal(found[f"{block}.to_k.lora_B.weight"], tensors[key])
    write_adapter(read_adapter(tmp_path / "d.safetensors"), tmp_path / "s.safetensors", "sat")
    assert same(read_weights(tmp_path / "s.safetensors"), {k: v for k, v in tensors.items() if "original" not in k})
    assert read_adapter(tmp_path / "s.safetensors").sites[f"{sat}dense"].alpha == 1  # and now it is said
    net = nn.ModuleDict({"query_key_value": nn.Linear(6, 18)})
    assert load_adapter(_only(tmp_path, one, "query_key_value"), net).attach(net).parts == 3


def _only(folder, one, leaf):
    from dataclasses import replace

    (site,) = (site for name, site in one.sites.items() if name.endswith(leaf))
    write_adapter(replace(one, sites={leaf: site}), folder / "one.safetensors", "sat")
    return folder / "one.safetensors"


@pytest.mark.parametrize("blocks", [1, 2])
def test_unicon_at_every_attention_of_a_network_comes_back_bit_for_bit(blocks, tmp_path):
    def fresh():
        return UNet(1, 1, 8, (1, 2), blocks, (1, 2), num_heads=2, context_dim=6, norm_groups=4)

    net, other = fresh(), fresh()
    pair = {name: LoRA(rank=2, on="*.attn1.to_[qkv]", name=name).attach(net) for name in ("xy_lora", "yx_lora")}
    mixins = pair | {"y_lora": LoRA(rank=2, on=["*.attn1.to_q", "*.attn2.to_k"], name="y_lora").attach(net)}
    mixins["joint_attention"] = JointAttention(own=list(pair)).attach(net)
    for parameter in (parameter for mixin in mixins.values() for parameter in mixin.parameters()):
        nn.init.normal_(parameter)
    unicon.write(unicon.of(mixins, {}, num_res_blocks(module_names(net))), tmp_path)
    for name, mixin in unicon.mixins(unicon.read(tmp_path), other).items():
        assert same(mixin.attach(other).state_dict(), mixins[name].state_dict())


def test_a_folder_of_unicon_is_read_and_written_as_it_was(tmp_path):
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    loras = {}
    for lora in ("xy_lora", "yx_lora"):
        loras[lora] = {
            f"unet.{block}.attn1n.{leaf}.lora.{way}.weight": torch.randn((2, 32) if way == "down" else (32, 2))
            for leaf in ("to_q", "to_out.0")
            for way in ("down", "up")
        }
        save_weights(tmp_path / "u" / lora / "pytorch_lora_weights.safetensors", loras[lora])
    post = {f"{block}.conv1n.weight": torch.randn(32, 32), f"{block}.attn1n.to_q.lora_A.weight": torch.zeros(1)}
    torch.save(post, tmp_path / "u" / "model.pth")
    (tmp_path / "u" / "config.json").write_text(json.dumps({"model_name": "depth", "post_joint": "conv"}))
    model = unicon.read(tmp_path / "u")
    assert model.about["model_name"] == "depth" and list(model.post) == [f"{block}.conv1n"]
    unicon.write(model, tmp_path / "v")
    for lora, tensors in loras.items():
        assert same(read_weights(tmp_path / "v" / lora / "pytorch_lora_weights.safetensors"), tensors)
    assert unicon.read(tmp_path / "v").about == model.about
    net = small_unet()
    mixins = unicon.mixins(model, net)
    assert list(mixins) == ["xy_lora", "yx_lora", "joint_attention"]
    for mixin in mixins.values():
        mixin.attach(net)
    projection = net.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1")._port["joint_attention"].project
    assert torch.equal(projection.weight, post[f"{block}.conv1n.weight"])
    again = unicon.of(mixins, model.about)
    assert same(again.post, model.post)
    for name, one in model.loras.items():
        assert all(same(again.loras[name].sites[site].tensors, held.tensors) for site, held in one.sites.items())
    text = ("sd15", str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert main(["convert", str(tmp_path / "u"), text[1], "--host", text[0]]) == 0
    assert main(["convert", text[1], text[2], "--to", "unicon"]) == 0
    for lora, tensors in loras.items():
        assert same(read_weights(tmp_path / "theirs" / lora / "pytorch_lora_weights.safetensors"), tensors)
    (tmp_path / "u" / "yx_lora" / "pytorch_lora_weights.safetensors").unlink()
    (tmp_path / "u" / "yx_lora").rmdir()
    with pytest.raises(WeightFileError, match="yx_lora is missing"):
        unicon.read(tmp_path / "u")


# What is wrong -----------------------------------------------------------------------------------


def test_unknown_names_are_listed(tmp_path):
    save_weights(
        tmp_path / "k.safetensors",
        {"lora_unet_m_a.lora_down.weight": torch.ones(1, 6), "lora_unet_m_a.lora_odd.weight": torch.ones(1)},
    )
    with pytest.raises(WeightFileError, match="1 unknown names: m_a.lora_odd.weight"):
        read_adapter(tmp_path / "k.safetensors")
    save_weights(tmp_path / "k.safetensors", {"lora_unet_m_a.lora_down.weight": torch.ones(1, 6)})
    with pytest.raises(WeightFileError, match="'m_a' has A, which is no whole adapter"):
        read_adapter(tmp_path / "k.safetensors")
    save_weights(tmp_path / "w.safetensors", {"weight": torch.ones(1)})
    with pytest.raises(WeightFileError, match="no adapter in a format that is known"):
        format_of(tmp_path / "w.safetensors")


def test_sites_that_the_host_lacks_are_listed(tmp_path):
    _, mixin = host("lora")
    write_adapter(AdapterWeights.of(mixin), tmp_path / "p", "peft")
    with pytest.raises(WeightFileError, match="3 of 3 sites are not in UNet: m.a, m.b, m.c"):
        load_adapter(tmp_path / "p", small_unet())


def test_a_name_that_means_two_modules_is_an_error(tmp_path):
    net = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(2, 2)}), "a_b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
    lora = LoRA(rank=1, on="a.b_c").attach(net)
    write_adapter(AdapterWeights.of(lora), tmp_path / "k.safetensors", "kohya")
    lora.detach()
    with pytest.raises(WeightFileError, match="'a_b_c' may mean a.b_c or a_b.c"):
        load_adapter(tmp_path / "k.safetensors", net)


def test_a_rank_that_contradicts_the_weights_and_a_wrong_host_are_errors(tmp_path):
    _, mixin = host("rslora")
    write_adapter(AdapterWeights.of(mixin), tmp_path / "p", "peft")
    file = tmp_path / "p" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 7}))
    with pytest.raises(WeightFileError, match="'m.a' is said to have rank 7, and its weights have 4"):
        read_adapter(tmp_path / "p")
    mixin.save(tmp_path / "v.safetensors")
    with pytest.raises(WeightFileError, match="made for a Host, this is a UNet"):
        load_adapter(tmp_path / "v.safetensors", small_unet())


def test_files_of_a_whole_pipeline_ask_which_part(tmp_path):
    pair = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    tensors = {f"{part}.x.{leaf}": value for part in ("unet", "text_encoder") for leaf, value in pair.items()}
    save_weights(tmp_path / "a.safetensors", tensors)
    assert list(read_adapters(tmp_path / "a.safetensors")) == ["unet", "text_encoder"]
    with pytest.raises(WeightFileError, match="adapters of unet, text_encoder; say which"):
        read_adapter(tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors", "text_encoder").sites["x"].rank == 1


def test_a_dora_scale_per_input_is_refused(tmp_path):
    tensors = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(8, 2), "dora_scale": torch.ones(1, 6)}
    save_weights(tmp_path / "k.safetensors", {f"lora_unet_m_a.{leaf}": value for leaf, value in tensors.items()})
    with pytest.raises(WeightFileError, match=r"\(1, 6\) for 8 outputs"):
        read_adapter(tmp_path / "k.safetensors")


# On the command line -----------------------------------------------------------------------------


def test_convert_goes_from_one_format_to_another(tmp_path, capsys):
    lora = LoRA(rank=2, alpha=1.0, on="*.attn1.to_q").attach(small_unet())
    lora.save(tmp_path / "a.safetensors")
    (tmp_path / "host.yaml").write_text(
        "engine: {denoiser: {network: {type: unet, in_channels: 4, out_channels: 4, channels: 32, "
        "channel_mult: [1, 2], num_res_blocks: 2, attention_factors: [1, 2], num_heads: 2, context_dim: 8}}}"
    )
    a, k, p, b = (str(tmp_path / name) for name in ("a.safetensors", "k.safetensors", "p", "b.safetensors"))
    assert main(["convert", a, k, "--to", "kohya"]) == 0
    assert main(["convert", k, p, "--to", "peft"]) == 2
    assert "--host" in capsys.readouterr().err
    assert main(["convert", k, p, "--to", "peft", "--host", str(tmp_path / "host.yaml")]) == 0
    assert main(["convert", p, b, "--host", str(tmp_path / "host.yaml")]) == 0
    assert "rank 2" in capsys.readouterr().out
    again = load_mixin(b)
    assert same(again.state_dict(), lora.state_dict()) and again.host == "UNet" and again.alpha == 1


@pytest.mark.parametrize("form", ["peft", "kohya", "kohya to peft"])
@pytest.mark.parametrize("factor", [-1, 4])
def test_one_factor_gives_the_kronecker_products_of_all_layers_kernels_apart(factor, form, tmp_path):
    """A file does not tell a pair's channels from its kernel, and peft has one factor for all layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 20, 3, padding=1), nn.Conv2d(20, 40, 3, padding=1), nn.Conv2d(40, 14, 1))
    plain, x = copy.deepcopy(net), torch.randn(2, 4, 5, 5)
    lokr = LoKr(rank=1, alpha=3.0, on=["0", "1", "2"], factor=factor).attach(net)
    for parameter in lokr.parameters():
        nn.init.normal_(parameter, std=0.4)
    y = net(x)
    path, first = tmp_path / "folder", tmp_path / "file.safetensors"
    one = AdapterWeights.of(lokr)
    if form.startswith("kohya"):
        write_adapter(one, first, "kohya")
        one = AdapterWeights.of(load_adapter(first, plain))
    if form.endswith("peft"):
        write_adapter(one, path, "peft")
        theirs = peer("peft").PeftModel.from_pretrained(copy.deepcopy(plain), path).eval()
        torch.testing.assert_close(theirs(x), y, rtol=1e-5, atol=1e-5)
    load_adapter(path if form.endswith("peft") else first, plain).attach(plain)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)


def test_peft_has_no_word_for_factors_by_layer(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    lokr = LoKr(rank=1, on=["0", "1"], factor={"0": 2, "1": 8}).attach(net)
    with pytest.raises(ValueError, match="one decompose_factor for all sites"):
        write_adapter(AdapterWeights.of(lokr), tmp_path / "folder", "peft")
