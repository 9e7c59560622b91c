"""What checkpointing recomputes is what was computed, or it is an error."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint as foreign

from vdiff.hooks import Part, checkpoint, insert, parts, remove, routed
from vdiff.process import Conditioning


class Scaled(Part):
    """Adds a nonlinear function of a weight, so that a wrong scale shows in the gradient."""

    def __init__(self):
        super().__init__()
        self.mixin_name = "scaled"
        self.weight = nn.Parameter(torch.randn(3))

    def after(self, module, args, kwargs, output):
        return (output * (1 + self.amount(output) * self.weight)).sin()


def plainly(function, *args, module):
    return function(*args)


def helped(function, *args, module):
    return checkpoint(function, *args, module=module)


def foreignly(function, *args, module):
    return foreign(function, *args, use_reentrant=False)


def compiled(function, *args, module):
    return torch.compile(lambda *args: checkpoint(function, *args, module=module), backend="aot_eager", fullgraph=True)(
        *args
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.run = plainly

    def forward(self, x):
        return self.run(self.block, x, module=self.block)


@pytest.fixture
def net():
    net = Net().double()
    for layer in (net.block[0], net.block[2]):
        insert([("", layer, Scaled().double())], "test")
    return net


def scale(net, value):
    for part in parts(net):
        part.set_scale(value)


def switch(net, is_on):
    for part in parts(net):
        part.enabled = is_on


GATE = Conditioning(gates={"scaled": torch.tensor([0.2, 1.0, 3.0, 0.0])})


def changed_scale(net, x):
    scale(net, 0.7)
    loss = net(x).square().sum()
    scale(net, 0.1)
    loss.backward()


def withdrawn_gate(net, x):
    with routed(net, GATE):
        loss = net(x).square().sum()
    loss.backward()


def switched_off(net, x):
    loss = net(x).square().sum()
    switch(net, False)
    loss.backward()


def two_states_in_one_backward(net, x):
    scale(net, 0.3)
    first = net(x)
    scale(net, 0.9)
    (first - net(x)).square().sum().backward()


def reference_in_between(net, x):
    policy = net(x)
    switch(net, False)
    with torch.no_grad():
        reference = net(x)
    switch(net, True)
    (policy - reference).square().sum().backward()


def reference_by_scale(net, x):
    policy = net(x)
    scale(net, 0.0)
    with torch.no_grad():
        reference = net(x)
    scale(net, 1.0)
    (policy - reference).square().sum().backward()


def gate_kept_until_backward(net, x):
    with routed(net, GATE):
        net(x).square().sum().backward()


def another_scale_at_each_step(net, x):
    for value in (0.3, 0.9):
        scale(net, value)
        net(x).square().sum().backward()


HARMFUL = [changed_scale, withdrawn_gate, switched_off, two_states_in_one_backward]
HARMLESS = [reference_in_between, reference_by_scale, gate_kept_until_backward, another_scale_at_each_step]


def gradients(net, program, run):
    """Of one program on a fresh copy; run twice, so that the second starts from what the first left."""
    net = copy.deepcopy(net)
    net.run = run
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        switch(net, True)
        scale(net, 1.0)
        net.zero_grad()
        program(net, x)
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("program", HARMFUL + HARMLESS)
def test_our_checkpoint_gives_the_gradients_of_no_checkpoint(net, program):
    for ours, true in zip(gradients(net, program, helped), gradients(net, program, plainly), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("program", HARMFUL)
def test_a_foreign_checkpoint_that_would_be_wrong_is_an_error(net, program):
    with pytest.raises(RuntimeError, match="vdiff.hooks.checkpoint"):
        gradients(net, program, foreignly)


@pytest.mark.parametrize("program", HARMLESS)
def test_a_foreign_checkpoint_that_is_right_is_left_alone(net, program):
    for ours, true in zip(gradients(net, program, foreignly), gradients(net, program, plainly), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def test_our_checkpoint_does_not_hide_a_foreign_one_that_would_be_wrong(net):
    x = torch.randn(4, 3, dtype=torch.float64)
    scale(net, 0.3)
    net.run = foreignly
    first = net(x)
    scale(net, 0.9)
    net.run = helped  # is recomputed first, in the state that there is by then
    with pytest.raises(RuntimeError, match="vdiff.hooks.checkpoint"):
        (first - net(x)).square().sum().backward()


def test_the_state_after_backward_is_the_present_one(net):
    net.run = helped
    loss = net(torch.randn(4, 3, dtype=torch.float64)).sum()
    scale(net, 0.25)
    buffers = [part.scale for part in parts(net)]
    loss.backward()
    assert all(part.scale is buffer for part, buffer in zip(parts(net), buffers, strict=True))
    assert all(part.strength == part.scale.item() == 0.25 for part in parts(net))


def test_detaching_between_forward_and_backward_is_an_error(net):
    net.run = helped
    loss = net(torch.randn(4, 3, dtype=torch.float64)).sum()
    remove([(layer, layer._port["scaled"]) for layer in (net.block[0], net.block[2])])
    with pytest.raises(RuntimeError, match="Attach and detach after backward"):
        loss.backward()


def test_attaching_between_forward_and_backward_is_an_error():
    net = Net()
    net.run = helped
    loss = net(torch.randn(4, 3)).sum()
    insert([("", net.block[0], Scaled())], "test")
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        loss.backward()


def test_dropout_is_recomputed_as_it_was():
    block = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x = torch.randn(8, 3, requires_grad=True)
    y = checkpoint(block, x, module=block)
    (grad,) = torch.autograd.grad(y.sum(), x)
    kept = (y != 0).float() * 2
    torch.testing.assert_close(grad, kept @ block[0].weight)


def test_one_graph_with_checkpointing_compiled(net):
    net.float().run = helped
    x = torch.randn(4, 3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for value in (1.0, 0.5, 0.2):
        scale(net, value)
        net.zero_grad()
        compiled(x).square().sum().backward()
        ours = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net(x).square().sum().backward()
        for a, b in zip(ours, net.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("program", [withdrawn_gate, switched_off, reference_in_between, gate_kept_until_backward])
def test_compiled_checkpoints_give_the_gradients_of_no_checkpoint(net, program):
    for ours, true in zip(gradients(net, program, compiled), gradients(net, program, plainly), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("program", [changed_scale, two_states_in_one_backward, reference_by_scale])
def test_a_scale_changed_before_a_compiled_backward_is_an_error(net, program):
    """The graph holds the scale itself, not a copy; torch sees that it is another."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(net, program, compiled)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 recompiles for every checkpointed block")
def test_blocks_compiled_inside_our_checkpoint_are_compiled_once(net):
    net.float()
    x, counter = torch.randn(4, 3), CompileCounterWithBackend("aot_eager")
    changed_scale(net, x)
    true = [p.grad.clone() for p in net.parameters()]
    net.run = helped
    net.block.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        net.zero_grad()
        changed_scale(net, x)
        for a, b in zip(net.parameters(), true, strict=True):
            torch.testing.assert_close(a.grad, b)
    assert counter.frame_count == 1


class Outer(Part):
    """Works something out of the whole call, for a part further in."""

    def __init__(self, hand):
        super().__init__()
        self.mixin_name, self.hand = "outer", [hand]

    def before(self, module, args, kwargs):
        self.hand[0].given = args[0].square()
        return args, kwargs

    def after(self, module, args, kwargs, output):
        self.hand[0].given = None
        return output


class Inner(Part):
    def __init__(self):
        super().__init__()
        self.mixin_name = "inner"

    def before(self, module, args, kwargs):
        return (args if self.given is None else (args[0] + self.given,)), kwargs


@pytest.mark.parametrize("place", ["inside", "whole"])
def test_what_was_given_for_a_call_is_there_when_it_is_repeated_or_it_is_an_error(place):
    net, x, hand = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(4, 3, dtype=torch.float64), Inner()
    insert([("", net, Outer(hand)), ("", net[0], hand)], "test")
    (true,) = torch.autograd.grad(net(x).square().sum(), net[0].weight)
    if place == "whole":  # the second run works it out again
        loss = foreign(net, x, use_reentrant=False).square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, net[0].weight), (true,), rtol=1e-12, atol=1e-12)
        return
    net[0] = Foreign(net[0])
    with pytest.raises(RuntimeError, match="worked out for it"):
        net(x).square().sum().backward()


class Foreign(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return foreign(self.inner, x, use_reentrant=False)
