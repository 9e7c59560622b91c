"""One part with the weights, others that act for it inside its host; copies without anything attached."""

import copy

import pytest
import torch
from torch import nn

from vdiff.hooks import PORT, Part, accepts, attached, bare_copy, checkpoint, parts
from vdiff.mixins import LoRA, Mixin
from vdiff.networks import Network
from vdiff.process import Conditioning


class Squares(Mixin, abstract=True):
    """At a chain: squares what the chain is given and adds it behind the first layer, times a weight."""

    def part(self, module, site):
        return SquaresPart()


class SquaresPart(Part):
    accepts = ("strength",)

    def __init__(self):
        super().__init__()
        self.weight, self.hand = nn.Parameter(torch.tensor(0.5)), None

    def helpers(self, module):
        hand = Given()
        self.__dict__["hand"] = hand  # it belongs to another module
        return {"0": hand}

    def before(self, module, args, kwargs):
        self.hand.given = args[0].square() * self.weight
        return args, kwargs

    def after(self, module, args, kwargs, output):
        self.hand.given = None
        return output


class Given(Part):
    def after(self, module, args, kwargs, output):
        return output + self.given * self.amount(self.given)


def chain():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def by_hand(host, x, weight, scale=1.0):
    return host[1](host[0](x) + scale * weight * x.square())


def test_helpers_act_are_turned_and_come_off_with_their_part():
    host, x = chain(), torch.randn(2, 3)
    plain, keys = host(x), list(host.state_dict())
    mixin = Squares("", "squares").attach(host)
    assert mixin.sites == ("",) and [name for name, _ in mixin.named_parameters()] == ["weight"]
    assert {part.mixin_name for part in parts(host)} == {"squares"} and len(parts(host)) == 2
    bare = chain()
    bare.load_state_dict({k: v for k, v in host.state_dict().items() if PORT not in k})
    torch.testing.assert_close(host(x), by_hand(bare, x, 0.5))
    with mixin.scaled(0.3):
        torch.testing.assert_close(host(x), by_hand(bare, x, 0.5, 0.3))
    with mixin.disabled():
        assert torch.equal(host(x), plain)
    mixin.detach()
    assert torch.equal(host(x), plain) and list(host.state_dict()) == keys
    assert not any(PORT in m._modules or m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_helpers_of_a_copy_belong_to_the_copy():
    host, x = chain(), torch.randn(2, 3)
    Squares("", "squares").attach(host)
    y, twin = host(x), copy.deepcopy(host)
    nn.init.zeros_(attached(twin)["squares"]._sites[""][1].weight)
    assert torch.equal(host(x), y) and not torch.equal(twin(x), y)
    attached(twin)["squares"].detach()
    assert not parts(twin) and torch.equal(host(x), y)


def test_what_was_given_is_there_again_when_it_is_recomputed():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[1](checkpoint(self[0], x, module=self[0]))

    host, x = Checkpointed(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3)
    mixin = Squares("", "squares").attach(host)
    twin = copy.deepcopy(host)
    twin.__class__ = nn.Sequential
    host(x).square().sum().backward()
    twin(x).square().sum().backward()
    (ours,), (theirs,) = mixin.parameters(), attached(twin)["squares"].parameters()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_bare_copy_has_nothing_attached_and_leaves_the_original_as_it_is():
    host, x = chain(), torch.randn(2, 3)
    plain = host(x)
    lora = LoRA(on="type:Linear", rank=1).attach(host)
    for parameter in lora.parameters():
        nn.init.ones_(parameter)
    y, other = host(x), nn.Identity()
    bare = bare_copy(host)
    assert torch.equal(bare(x), plain) and torch.equal(host(x), y) and bare[0].weight is not host[0].weight
    assert not any(PORT in m._modules or m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert bare_copy(host, {host[1]: other})[1] is other


def test_a_network_accepts_what_its_attachments_read():
    class Plain(Network, abstract=True):
        accepts = ("label",)

        def __init__(self):
            super().__init__()
            self.layers = chain()

        def forward(self, x, c_noise, cond=None):
            return self.layers(x)

    net, cond = Plain(), Conditioning({"strength": torch.ones(2)})
    with pytest.raises(ValueError, match="takes no condition 'strength'"):
        net.accepted(cond)
    mixin = Squares("layers", "squares").attach(net)
    assert accepts(net.layers) == ("strength",) and accepts(net) == ()
    with pytest.raises(ValueError, match="takes no condition 'strength'"):
        net.accepted(cond)  # attached further in, where conditions do not come by
    mixin.detach()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_mixin_that_is_off_still_has_its_condition(enabled):
    class Plain(Network, abstract=True):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x, c_noise, cond=None):
            self.accepted(cond)
            return x

    class Reads(Mixin, abstract=True):
        def part(self, module, site):
            part = Part()
            part.accepts = ("hint",)
            return part

    net, cond = Plain(), Conditioning({"hint": torch.ones(2)})
    mixin = Reads("", "reads").attach(net)
    mixin.enabled = enabled
    net(torch.ones(1), None, cond)
