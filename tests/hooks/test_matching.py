"""Sites are picked by name, role, type or predicate; picking nothing is an error that helps."""

import re

import pytest
from torch import nn

from vdiff.hooks import Part, insert, match, role_sites


class Attention(nn.Module):
    role = "self_attention"

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))

    def forward(self, x):
        return self.to_out(self.to_q(x) + self.to_k(x))


@pytest.fixture
def net():
    return nn.Sequential(Attention(), nn.Conv1d(2, 2, 1), Attention())


@pytest.mark.parametrize(
    "on, names",
    [
        ("*.to_[qk]", ["0.to_q", "0.to_k", "2.to_q", "2.to_k"]),
        (["2.*", "1"], ["1", "2.to_q", "2.to_k", "2.to_out", "2.to_out.0"]),
        ("role:self_attention", ["0", "2"]),
        ("type:_ConvNd", ["1"]),
        ("", [""]),
        (lambda name, module: name.endswith("to_q"), ["0.to_q", "2.to_q"]),
    ],
)
def test_patterns_pick_modules_in_their_order(net, on, names):
    assert list(match(net, on)) == names


def test_the_star_picks_all_but_the_root(net):
    assert len(match(net, "*")) == len(list(net.modules())) - 1


def test_ports_and_what_is_in_them_are_never_picked(net):
    part = Part()
    part.mixin_name, part.inner = "mine", nn.Linear(2, 2)
    before = list(match(net, "*"))
    insert([("0.to_q", net[0].to_q, part)], "test")
    assert list(match(net, "*")) == before
    assert "0.to_q" in match(net, "type:Linear") and len(match(net, "type:Linear")) == 6


def test_a_shared_module_is_one_site_found_under_either_name():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": shared})
    assert list(match(net, "*")) == ["a"]
    assert list(match(net, "b")) == ["b"]


@pytest.mark.parametrize(
    "on, text",
    [
        ("*.to_w", r"matches '\*.to_w'. Did you mean 'to_[qk]'\?"),
        ("layers.*", "Modules begin: 0, 0.to_q, 0.to_k, 0.to_out, 0.to_out.0, 1, ..."),
        (["0", "nothing"], "matches 'nothing'"),
        ("role:self_atention", r"Did you mean 'self_attention'\? Roles: self_attention"),
        ("type:Linea", r"Did you mean 'Linear'\? Types: Attention, Conv1d"),
        (lambda name, module: False, "satisfies `on`"),
        ([], "glob, a list of globs or a predicate"),
        (3, "glob, a list of globs or a predicate"),
    ],
)
def test_picking_nothing_is_an_error_that_helps(net, on, text):
    with pytest.raises(ValueError, match="LoRA: ") as error:
        match(net, on, "LoRA")
    assert re.search(text, str(error.value))


def test_sites_of_a_role_may_be_none(net):
    assert role_sites(net, "self_attention") == ["0", "2"]
    assert role_sites(net, "absent") == []
