"""A low-rank difference is the layer with a changed weight, whatever the layer."""

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.mixins import LoRA
from vdiff.mixins.lora import LinearLoRAPart, LoRAPart

LAYERS = {
    "linear": lambda: (nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1)), (2, 4, 7, 6)),
    "conv2d grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "conv2d circular": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
    "conv3d": lambda: (nn.Conv3d(4, 2, 3, padding="same"), (2, 4, 3, 5, 4)),
}


def merged(part, weight):
    """The weight that the pair stands for."""
    scale = part.unit * part.strength
    groups = part.parts
    down, up = part.A.chunk(groups), part.B.flatten(1).chunk(groups)
    delta = torch.cat([torch.einsum("or,r...->o...", u, d) for u, d in zip(up, down, strict=True)])
    return weight + scale * delta


@pytest.mark.parametrize("layer, parts", [*((layer, 1) for layer in LAYERS), ("linear", 2), ("linear", 4)])
def test_the_pair_is_a_change_of_weight(layer, parts):
    host, shape = LAYERS[layer]()
    host, x = host.double(), torch.randn(shape, dtype=torch.float64)
    net = nn.Sequential(host)
    lora = LoRA(on="0", rank=2, alpha=3.0, parts=parts, scale=0.7).attach(net)
    nn.init.normal_(host._port["lora"].B)
    host.double()
    y = net(x)
    weight = merged(host._port["lora"], host.weight.detach())
    lora.detach()
    host.weight.data = weight
    torch.testing.assert_close(y, net(x), rtol=1e-6, atol=1e-6)  # the scale is kept in float32


def test_indices_are_not_dropped():
    net, x = nn.Sequential(nn.Embedding(5, 4)).train(), torch.arange(5)
    part = LoRA(on="0", rank=2, dropout=0.5).attach(net)._sites["0"][1]
    nn.init.normal_(part.A)
    said = net(x)
    part.dropout = 0.0
    assert torch.equal(said, net(x)) and not torch.equal(said, net[0].weight)


def test_weights_are_kept_in_float32():
    try:
        torch.set_default_dtype(torch.bfloat16)
        net = nn.Sequential(nn.Linear(6, 4))
        lora = LoRA(on="0", rank=2).attach(net)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in lora.parameters()} == {torch.float32} and net[0].weight.dtype == torch.bfloat16
    assert net(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d circular", "conv3d"])
def test_outputs_are_those_of_peft(layer):
    peft = peer("peft")
    host, shape = LAYERS[layer]()
    if layer == "conv2d circular":  # peft forgets the padding mode, as it forgets dilation
        host = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(shape)
    ours = nn.Sequential(host)
    part = LoRA(on="0", rank=2, alpha=3.0).attach(ours)._sites["0"][1]
    nn.init.normal_(part.B)
    y = ours(x)
    part.mixin.detach()
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(ours, config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(part.A)
        layer.lora_B["default"].weight.copy_(part.B)
    torch.testing.assert_close(theirs(x), y, rtol=1e-6, atol=1e-6)


def test_rank_and_alpha_go_by_glob_and_the_first_that_fits():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    lora = LoRA(on="*", rank={"0": 1, "*": 2}, alpha={"1": 8.0, "*": 3.0}).attach(net)
    shapes = {site: (len(part.A), part.unit) for site, (_, part) in lora._sites.items()}
    assert shapes == {"0": (1, 3.0), "1": (2, 4.0)}


def test_alpha_is_the_rank_unless_told():
    assert LoRA(on="0", rank=5).attach(nn.Sequential(nn.Linear(9, 9)))._sites["0"][1].scale.item() == 1


def test_the_start_is_that_of_the_paper():
    part = LoRA(on="0", rank=4).attach(nn.Sequential(nn.Linear(64, 8)))._sites["0"][1]
    assert not part.B.any()
    assert 0 < part.A.abs().max() <= 1 / 8  # kaiming uniform with a = sqrt(5): 1 / sqrt(fan in)


def test_dropout_acts_on_the_difference_in_training_only():
    net, x = nn.Sequential(nn.Linear(50, 50)), torch.randn(4, 50)
    y = net(x)
    lora = LoRA(on="0", dropout=0.5).attach(net)
    assert torch.equal(net(x), y)  # not on the host
    nn.init.normal_(lora._sites["0"][1].B)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_of_a_linear_layer_is_the_long_one(dtype):
    net, x = nn.Sequential(nn.Linear(6, 6)).to(dtype), torch.randn(4, 6, dtype=dtype)
    LoRA(2, on="0").attach(net)
    (part,) = net[0]._port.values()
    nn.init.normal_(part.B)
    assert type(part) is LinearLoRAPart and torch.equal(part.change(net[0], x), LoRAPart.change(part, net[0], x))
    part.dropout = 0.5  # set later, it counts as well
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_in_float32_and_outputs_in_the_host_dtype(dtype):
    net = nn.Sequential(nn.Linear(6, 6)).to(dtype)
    part = LoRA(on="0").attach(net)._sites["0"][1]
    assert part.A.dtype == part.B.dtype == torch.float32
    y = net(torch.randn(2, 6, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert part.B.grad.dtype == torch.float32 and part.B.grad.any()


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_it_works_under_autocast(layer):
    host, shape = LAYERS[layer]()
    net, x = nn.Sequential(host), torch.randn(shape)
    part = LoRA(on="0", rank=2).attach(net)._sites["0"][1]
    nn.init.normal_(part.B)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)


def test_an_input_given_by_keyword_is_found():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    nn.init.normal_(LoRA(on="").attach(layer)._sites[""][1].B)
    assert torch.equal(layer(input=x), layer(x))


def test_the_output_of_torch_attention_is_refused_because_it_is_never_called():
    with pytest.raises(ValueError, match="never calls it"):
        LoRA(on="*.out_proj").attach(nn.Sequential(nn.MultiheadAttention(4, 2)))


def test_unfit_layers_are_named():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (2, 0)))

    net = nn.ModuleDict({"norm": nn.LayerNorm(3), "causal": Causal(2, 2, 3), "grouped": nn.Conv1d(6, 6, 1, groups=3)})
    for on, text in (("norm", "'norm' is a LayerNorm"), ("causal", "forward of its own"), ("grouped", "multiple")):
        with pytest.raises(ValueError, match=text):
            LoRA(on=on).attach(net)


def test_a_packed_weight_is_refused():
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)  # as in 4 bits
    with pytest.raises(ValueError, match=r"goes from 6 to 4, and its weight is \(12, 1\): packed"):
        LoRA(on="0").attach(nn.Sequential(layer))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": {}}, {"rank": {"*": -1}}, {"dropout": 1.0}, {"rank": 2.5}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="LoRA: "):
        LoRA(**wrong)
