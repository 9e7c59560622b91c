"""Merged weights stand in the place of the host's own, which are left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.checkpoints import load_into
from vdiff.hooks import PORT, checkpoint, own
from vdiff.mixins import ControlNet, DoRA, LoHa, LoKr, LoRA
from vdiff.networks import UNet

KINDS = {
    "lora": lambda **own: LoRA(rank=2, **own),
    "pissa": lambda **own: LoRA(rank=2, init="pissa", **own),
    "olora": lambda **own: LoRA(rank=2, init="olora", **own),
    "dora": lambda **own: DoRA(rank=2, **own),
    "loha": lambda **own: LoHa(rank=2, **own),
    "lokr": lambda **own: LoKr(rank=1, decompose_both=True, **own),
}


def stir(mixin, std=0.3):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * std)
    return mixin


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items() if PORT not in name.split(".")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chain(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(4, 4), nn.Linear(4, 4)))).eval(), torch.randn(3, 4)


def test_several_are_merged_and_unmerged_in_any_order():
    net, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    before = weights(net)
    one = stir(LoRA(on="0", rank=2, name="one").attach(net))
    two = stir(DoRA(on="0", rank=2, name="two").attach(net))
    z = net(x)
    one.merge()
    two.merge()
    torch.testing.assert_close(net(x), z)
    one.unmerge()
    torch.testing.assert_close(net(x), z)
    two.unmerge()
    assert torch.equal(net(x), z) and same(weights(net), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_unmerging_is_exact_in_every_dtype(dtype):
    net = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    before = weights(net)
    lora = stir(LoRA(on="0").attach(net))
    for _ in range(3):
        lora.merge()
        assert not torch.equal(net[0].weight, before["0.weight"])
        lora.unmerge()
    assert same(weights(net), before)


def test_what_would_do_nothing_while_merged_is_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    lora = stir(LoRA(on="0").attach(net)).merge()
    for act in (lambda: setattr(lora, "scale", 0.5), lambda: setattr(lora, "enabled", False), lora.merge):
        with pytest.raises(ValueError, match="merged"):
            act()
    with pytest.raises(RuntimeError, match="unmerge"):
        net.load_state_dict({"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)})
    lora.unmerge()
    with pytest.raises(ValueError, match="merged"), lora.merged():
        net[0]._port["lora"].gate = torch.ones(2)
        net(torch.randn(2, 4))
    net[0]._port["lora"].gate = None
    lora.merge()
    lora.detach()
    assert not net[0]._modules.get(PORT)


def test_a_file_of_a_merged_host_loads_into_a_plain_one():
    net, plain = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    before = weights(net)
    stir(LoRA(on="0").attach(net)).merge()
    load_into(plain, {name: v for name, v in net.state_dict().items() if PORT not in name})
    assert same(weights(plain), before)


# The host's own parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("sites", ["0", "*"])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_stay_tied_and_as_they_were(kind, sites):
    net, x = chain()
    net[1].weight = net[0].weight
    tied, before = net[0].weight, weights(net)
    one = stir(KINDS[kind](on=sites).attach(net))
    z = net(x)
    one.merge()
    torch.testing.assert_close(net(x), z, rtol=1e-4, atol=1e-5)
    assert own(net[0]) is own(net[1]) is tied and same(weights(net), before)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x)) and own(twin[0]) is own(twin[1])
    one.unmerge()
    assert net[0].weight is net[1].weight is tied and same(weights(net), before) and torch.equal(net(x), z)


def test_an_optimizer_made_before_or_while_merged_holds_the_own_parameters_and_its_steps_are_kept():
    net, x = chain()
    lora = stir(LoRA(on="0", rank=2).attach(net))
    wanted = [id(p) for p in net.parameters()]
    net(x).sum().backward()
    lora.merge()
    assert [id(p) for p in net.parameters()] == wanted
    before = own(net[0]).clone()
    torch.optim.SGD(net.parameters(), 0.1).step()
    with pytest.raises(ValueError, match="have changed since"):
        net(x)
    lora.unmerge()
    torch.testing.assert_close(net[0].weight, before - 0.1 * net[0].weight.grad)


def test_training_what_is_merged_is_an_error():
    net, x = chain()
    lora = stir(LoRA(on="0", rank=2).attach(net)).merge()
    net.train()
    for frozen in ([], list(lora.parameters()), [own(net[0])]):
        for parameter in net.parameters():
            parameter.requires_grad_(all(parameter is not one for one in frozen))
        with pytest.raises(ValueError, match="neither would learn"):
            net(x)
    with torch.no_grad():
        net(x)
    net.requires_grad_(False)
    other = LoRA(on="1", rank=2).attach(net, name="other")
    net(x).sum().backward()  # something else is trained
    assert any(p.grad.any() for p in other.parameters())
    net.eval().requires_grad_(True)
    net(x.requires_grad_()).sum().backward()  # guidance by a gradient
    assert x.grad.any()


def again(lora):
    lora.unmerge()
    lora.scale = 0.25
    lora.merge()


@pytest.mark.parametrize("do", [again, LoRA.unmerge])
def test_merging_between_forward_and_recomputation_is_an_error(do):
    """The second run would be of other weights."""
    net, x = chain()
    net.requires_grad_(False)
    style = stir(LoRA(rank=2, on="0", name="style").attach(net))
    for parameter in style.parameters():
        parameter.requires_grad_(False)
    stir(LoRA(rank=2, on="1", name="trained").attach(net))
    style.merge()
    y = checkpoint(net.forward, x, module=net)
    do(style)
    with pytest.raises(RuntimeError, match="merged or unmerged"):
        y.sum().backward()
    checkpoint(net.forward, x, module=net).sum().backward()


@pytest.mark.parametrize("do", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net.double()])
def test_a_merged_host_is_copied_kept_and_moved_as_merged(do):
    net, x = chain()
    one, two = stir(LoRA(on="0", rank=2, name="one").attach(net)), stir(DoRA(on="0", rank=2, name="two").attach(net))
    one.merge()
    two.merge()
    y, before = net(x), weights(net)
    net = do(net)
    dtype = net[0].weight.dtype
    torch.testing.assert_close(net(x.to(dtype)), y.to(dtype), rtol=1e-5, atol=1e-5)
    for name in ("one", "two"):
        net[0]._port[name].mixin.unmerge()
    assert all(torch.equal(value, before[name].to(dtype)) for name, value in weights(net).items())


def test_a_compiled_host_follows_merging():
    net, x = chain()
    lora = stir(LoRA(on="0", rank=2).attach(net))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), net(x))
            stir(lora)
            lora.merge()
            torch.testing.assert_close(compiled(x), net(x))
            lora.unmerge()
    assert counter.frame_count == 2


def test_a_computed_weight_cannot_stand_aside():
    net, _ = chain()
    torch.nn.utils.parametrizations.weight_norm(net[0])
    lora = LoRA(on=["0", "1"], rank=2).attach(net)
    with pytest.raises(ValueError, match="of '0' is no parameter but computed"):
        lora.merge()
    assert not lora.is_merged


@pytest.mark.parametrize("kind", ["pissa", "dora"])
def test_a_computed_weight_is_a_base_as_it_is_by_then(kind):
    net, x = chain()
    torch.nn.utils.parametrizations.weight_norm(net[0])
    before = net(x)
    KINDS[kind](on="0").attach(net)
    torch.testing.assert_close(net(x), before)


def test_a_merged_weight_asks_for_no_gradient():
    net, _ = chain()
    own = net[0].weight
    stir(LoRA(on="0", rank=2)).attach(net).merge()
    assert net[0].weight is not own and not net[0].weight.requires_grad and own.requires_grad


# Several on one host -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_one_of_the_own_weight_whatever_is_merged(kind):
    net, x = chain()
    other = stir(LoRA(on="0", rank=2, name="other").attach(net))
    one = stir(KINDS[kind](on="0").attach(net, name="one"))
    z = net(x)
    other.merge()
    torch.testing.assert_close(net(x), z, rtol=1e-5, atol=1e-5)
    one.detach()
    late = KINDS[kind](on="0").attach(net, name="one")  # begins at the own weight, too
    late_state = late.state_dict()
    other.unmerge()
    late.detach()
    early = KINDS[kind](on="0").attach(net, name="one")
    from_base = [name for name in late_state if name.endswith(("magnitude", "A0", "B0"))]
    assert all(torch.equal(late_state[name], early.state_dict()[name]) for name in from_base)
    assert len(from_base) == {"dora": 1, "pissa": 2, "olora": 2}.get(kind, 0)


def test_a_copied_encoder_is_one_of_the_own_weights():
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4)
    lora = stir(LoRA(on="*.to_[qkv]", rank=2).attach(net)).merge()
    control = ControlNet(hint_factor=1).attach(net)._sites[""][1].control_model
    site = next(site for site in lora.sites if site.startswith("input_blocks"))
    copied = control.get_submodule(site)
    assert copied.weight is own(copied)
    assert torch.equal(copied.weight, own(net.get_submodule(site)))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_under_autocast_is_as_exact_as_without_and_outlasts_inference(kind):
    net, x = chain(nn.Linear(4, 4))
    one = stir(KINDS[kind](on="0").attach(net))
    wanted = one.merge() and net[0].weight.clone()
    one.unmerge()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        one.merge()
    assert torch.equal(net[0].weight, wanted)
    net(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, wanted.sum(0).expand_as(x))
