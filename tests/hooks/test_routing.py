"""Gates and partners reach the parts of their mixin for one call, row by row."""

import copy

import pytest
import torch
from torch import nn

from vdiff.hooks import Part, check_partners, expand_gate, expand_partners, insert, parts, routed
from vdiff.process import Conditioning


class Plus(Part):
    def after(self, module, args, kwargs, output):
        return output + self.amount(output)


class PlusEach(Plus):
    weighs_partners = True


@pytest.fixture
def net():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    for site, name, part in ((net[0], "a", Plus()), (net[1], "b", PlusEach())):
        part.mixin_name = name
        insert([("", site, part)], "test")
    return net


def test_each_mixin_gets_its_own_gate(net):
    x = torch.zeros(2, 3)
    gates = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5, 2.0])}
    with routed(net, Conditioning(gates=gates)):
        assert torch.equal(net(x), torch.tensor([[1.5], [2.0]]).expand(2, 3))
    assert torch.equal(net(x), torch.full((2, 3), 2.0))


def test_gated_rows_equal_separate_runs(net):
    x, weights = torch.randn(3, 2), torch.tensor([0.0, 0.3, 1.0])
    with routed(net, Conditioning(gates={"a": weights})):
        together = net(x)
    (part,) = (part for part in parts(net) if part.mixin_name == "a")
    for row, weight in enumerate(weights):
        part.set_scale(weight)
        assert torch.equal(together[row], net(x[row : row + 1])[0])


def test_routes_are_withdrawn_when_the_call_fails(net):
    with pytest.raises(RuntimeError, match="on purpose"), routed(net, Conditioning(gates={"a": torch.ones(2)})):
        raise RuntimeError("on purpose")
    assert all(part.gate is None and part.partners is None for part in parts(net))


def test_routes_nest(net):
    outer, inner = torch.ones(2), torch.zeros(2)
    with routed(net, Conditioning(gates={"a": outer}, partners=torch.tensor([1, 0]))):
        with routed(net, Conditioning(gates={"a": inner})):
            assert all(part.partners is None for part in parts(net))
        gates = {part.mixin_name: part.gate for part in parts(net)}
        assert gates["a"] is outer and gates["b"] is None
        assert all(part.partners is not None for part in parts(net))


def test_a_replaced_submodule_is_routed_too(net):
    with routed(net, Conditioning(gates={"a": torch.zeros(2)})):
        pass
    net[0] = copy.deepcopy(net[0])
    with routed(net, Conditioning(gates={"a": torch.zeros(2)})):
        assert torch.equal(net(torch.zeros(2, 1)), torch.ones(2, 1))


def test_folded_rows_are_batch_major():
    x = torch.zeros(2, 3, 1)  # b f c
    gate = torch.tensor([1.0, 5.0])
    folded = x.flatten(0, 1) + expand_gate(gate, 6)[:, None]
    assert torch.equal(folded.unflatten(0, (2, 3)), x + gate[:, None, None])
    partners = expand_partners(torch.tensor([1, -1]), 6)
    assert partners.tolist() == [3, 4, 5, -1, -1, -1]  # the same frame of the other video


def test_partners_are_looked_at_only_where_nothing_waits_for_it():
    wrong = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="row 0 is its own partner"):
        check_partners(wrong, 2)
    check_partners(wrong.to("meta"), 2)
    torch.compile(lambda partners: check_partners(partners, 2), backend="eager", fullgraph=True)(wrong)


def test_a_gated_amount_is_in_the_dtype_of_what_it_multiplies():
    part = Part()
    part.gate = torch.rand(4)
    x = torch.randn(4, 2, dtype=torch.bfloat16)
    assert (x * part.amount(x)).dtype == torch.bfloat16
    part.gate = None
    assert (x * part.amount(x)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "cond, rows, text",
    [
        (Conditioning(gates={"c": torch.ones(2)}), None, "no mixin of that name is attached.*Attached: [ab], [ab]"),
        (Conditioning(gates={"a": torch.ones(2, 1)}), None, "one number per row"),
        (Conditioning(gates={"a": torch.tensor(1.0)}), None, "one number per row"),
        (
            Conditioning(gates={"a": torch.ones(2, 2)}, partners=torch.tensor([[1, -1], [0, -1]])),
            None,
            r"one number per row, \(2,\); it is \(2, 2\)",
        ),
        (Conditioning(gates={"a": torch.ones(2)}, partners=torch.tensor([0])), None, "row 1 has none"),
        (
            Conditioning(gates={"b": torch.ones(2, 3)}, partners=torch.tensor([[1, -1], [0, -1]])),
            None,
            r"one number per row, \(2,\), or one for each partner, \(2, 2\); it is \(2, 3\)",
        ),
        (Conditioning(gates={"a": torch.ones(2)}), 4, r"gate of 'a' must hold one number per row, \(4,\)"),
    ],
)
def test_a_route_that_fits_nothing_is_an_error(net, cond, rows, text):
    with pytest.raises(ValueError, match=text):
        routed(net, cond, rows=rows)


def test_rows_that_are_no_multiple_of_the_batch_are_an_error(net):
    with routed(net, Conditioning(gates={"a": torch.ones(2)})), pytest.raises(ValueError, match="batch-major"):
        net(torch.zeros(3, 1))
