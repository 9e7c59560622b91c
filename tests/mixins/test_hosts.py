"""An adapter belongs to a family of networks, wherever one of them lies; and how much of it depends on the level."""

import math

import pytest
import torch
from torch import nn

from vdiff.denoisers import EDMDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.losses import MSELoss
from vdiff.mixins import ByLevel, LoRA, load_mixin
from vdiff.networks import DiT, UNet
from vdiff.process import Conditioning, EDMSchedule, LogNormalSigmaSampler
from vdiff.registry import build
from vdiff.samplers import EulerSampler


def network():
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, norm_groups=4)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(parameter)))
    return net


def engine(net=None, **mixins):
    return DiffusionEngine(
        "image", EDMDenoiser(net or network()), EDMSchedule(), LogNormalSigmaSampler(), MSELoss(), EulerSampler(3),
        mixins=mixins, sample_shape=(1, 8, 8),
    ).eval()  # fmt: skip


def stirred(mixin):
    for parameter in mixin.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixin


def test_an_adapter_trained_in_an_engine_goes_on_the_bare_network_and_back(tmp_path):
    on = "denoiser.network.*.qkv"
    lora = LoRA(rank={"denoiser.network.middle*": 2, "*": 3}, alpha={"*middle*": 4.0, "*": 1.0}, on=on)
    one = engine(style=lora)
    stirred(lora).save(tmp_path / "a.safetensors")
    assert lora.host == "UNet" and "middle_block.1.qkv" in lora.sites
    assert "middle_block.1.qkv.A" in lora.state_dict()
    x, c_noise = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.5])
    with torch.no_grad():
        y = one.denoiser.network(x, c_noise)
        net = network()
        bare = load_mixin(tmp_path / "a.safetensors").attach(net)
        assert torch.equal(net(x, c_noise), y)
        bare.save(tmp_path / "b.safetensors")
        other = engine()
        again = load_mixin(tmp_path / "b.safetensors").attach(other)
        assert torch.equal(other.denoiser.network(x, c_noise), y) and again.sites == lora.sites
        again.detach()
        again.attach(network())  # what was detached knows its sites
    assert {name for name in one.state_dict() if "_port" in name} == {
        f"denoiser.network.{site}._port.style.{leaf}" for site in lora.sites for leaf in "AB"
    }


def test_another_family_is_refused_wherever_it_lies(tmp_path):
    stirred(LoRA(rank=2, on="*.qkv").attach(network())).save(tmp_path / "a.safetensors")
    dit = DiT(1, 1, 16, 1, 2)
    for root in (dit, engine(dit)):
        with pytest.raises(ValueError, match="was made for a UNet, this is a"):
            load_mixin(tmp_path / "a.safetensors").attach(root)
    two = nn.ModuleList([network(), network()])
    with pytest.raises(ValueError, match="holds 2: 0, 1. Attach it to one"):
        load_mixin(tmp_path / "a.safetensors").attach(two)


def test_a_mixin_on_several_networks_belongs_to_what_holds_them():
    one = engine()
    one.companion = network()
    assert LoRA(rank=2, on="*.qkv").attach(one).host == "DiffusionEngine"


def test_a_mixin_is_called_by_its_key():
    assert engine(style=LoRA(rank=2, on="*.qkv")).mixins["style"].name == "style"
    engine(style=LoRA(rank=2, on="*.qkv", name="style"))
    with pytest.raises(ValueError, match="its key is its name, and it is called 'other'"):
        engine(style=LoRA(rank=2, on="*.qkv", name="other"))


# By level ----------------------------------------------------------------------------------------


def level_of(one, *sigmas):
    return EDMSchedule().at_ratio(torch.tensor(sigmas, dtype=torch.float64)).to(torch.float32)


@pytest.mark.parametrize("sigma, scale", [(0.01, 0.0), (0.1, 0.0), (1.0, 0.5), (10.0, 1.0), (80.0, 1.0)])
def test_the_scale_is_linear_in_the_logarithm_of_the_level_and_constant_outside(sigma, scale):
    one = engine(lora=LoRA(rank=2, on="*.qkv"))
    lora = stirred(one.mixins["lora"])
    x = torch.randn(2, 1, 8, 8)
    level = level_of(one, sigma, sigma)
    with torch.no_grad(), lora.scaled(scale):
        wanted = one.denoiser(x, level).value
    ByLevel("lora", {10.0: 1.0, 0.1: 0.0}).attach(one)
    with torch.no_grad():
        torch.testing.assert_close(one.denoiser(x, level).value, wanted, rtol=1e-4, atol=1e-5)


def test_every_row_has_its_own_level_and_gates_are_multiplied():
    one = engine(lora=LoRA(rank=2, on="*.qkv"))
    stirred(one.mixins["lora"])
    by_level = ByLevel("lora", {10.0: 1.0, 0.1: 0.0}).attach(one)
    x, level = torch.randn(2, 1, 8, 8), level_of(one, 0.05, 20.0)
    with torch.no_grad():
        gated = one.denoiser(x, level, Conditioning(gates={"lora": torch.tensor([1.0, 0.5])})).value
        with by_level.disabled():
            wanted = one.denoiser(x, level, Conditioning(gates={"lora": torch.tensor([0.0, 0.5])})).value
    torch.testing.assert_close(gated, wanted)


def test_a_level_per_frame_is_refused():
    one = engine(lora=LoRA(rank=2, on="*.qkv"))
    ByLevel("lora", {1.0: 1.0}).attach(one)
    with pytest.raises(ValueError, match=r"'lora' is gated per row, and the level is per frame, \(2, 3\)"):
        one.denoiser(torch.randn(2, 1, 8, 8), one.schedule(torch.full((2, 3), 0.5)))


def test_it_follows_a_walk_of_sampling_and_comes_off():
    one = engine(lora=LoRA(rank=2, on="*.qkv"))
    stirred(one.mixins["lora"])
    full = one.sample(num=2)
    with one.mixins["lora"].disabled():
        none = one.sample(num=2)
    by_level = ByLevel("lora", {1e-3: 0.0}).attach(one)
    torch.testing.assert_close(one.sample(num=2), none)
    with by_level.scaled(0.0):
        torch.testing.assert_close(one.sample(num=2), full)
    by_level.detach()
    assert torch.equal(one.sample(num=2), full)


def test_it_is_built_from_a_config_and_refuses_what_is_no_scale():
    mixin = build({"type": "by_level", "mixin": "style", "scales": {0.3: 1.0, 3: 0}}, "mixin")
    assert mixin.scales == {0.3: 1.0, 3.0: 0.0}
    for scales in ({}, {0.0: 1.0}, {1.0: math.inf}):
        with pytest.raises(ValueError, match="ByLevel: scales"):
            ByLevel("style", scales)
