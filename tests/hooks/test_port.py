"""A port changes what its host says while it is there, and leaves no trace."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vdiff.hooks import PORT, Part, Port, accepts, attached, describe, insert, is_port_key, parts, ports, remove, within


class Times(Part):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def after(self, module, args, kwargs, output):
        return output * self.factor * self.amount(output)


class Plus(Part):
    def after(self, module, args, kwargs, output):
        return output + self.amount(output)


class PlusBefore(Part):
    def before(self, module, args, kwargs):
        return (args[0] + self.amount(args[0]), *args[1:]), kwargs


class Instead(Part):
    replaces = True

    def after(self, module, args, kwargs, output):
        return torch.zeros_like(output)


class Owner:
    """Stands for the mixin."""


def named(name, part):
    part.mixin_name = name
    part.mixin = Owner()
    return part


def residue(module):
    """Everything of a module that hooks or children could have touched."""
    tables = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    pre = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    return (
        [list(table) for table in (*tables, *pre)],
        list(module._modules),
        list(module.state_dict()),
        set(vars(module)),
    )


def test_removed_parts_leave_no_trace():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    before, y = residue(layer), layer(x)
    part, early = named("a", Times(2)), named("b", PlusBefore())
    insert(iter([("", layer, part), ("", layer, early)]), "test")
    assert not torch.equal(layer(x), y)
    remove([(layer, part), (layer, early)])
    assert residue(layer) == before
    assert torch.equal(layer(x), y)


def test_parts_compose_in_the_order_of_attachment():
    x = torch.randn(2, 3)
    for order, expected in (("times plus", lambda y: y * 2 + 1), ("plus times", lambda y: (y + 1) * 2)):
        layer = nn.Identity()
        made = {"times": Times(2), "plus": Plus()}
        insert([("", layer, named(name, made[name])) for name in order.split()], "test")
        assert torch.equal(layer(x), expected(x))


def test_a_part_before_changes_what_the_host_and_the_parts_after_it_see():
    class Seen(Part):
        def after(self, module, args, kwargs, output):
            self.saw = args[0]
            return output

    layer, x, seen = nn.Linear(3, 3), torch.randn(2, 3), named("seen", Seen())
    y = layer(x + 1)
    insert([("", layer, named("early", PlusBefore())), ("", layer, seen)], "test")
    assert torch.equal(layer(x), y)
    assert torch.equal(seen.saw, x + 1)


def test_hooks_are_registered_only_where_a_part_needs_them():
    layer, plus, early = nn.Linear(3, 3), named("plus", Plus()), named("early", PlusBefore())
    insert([("", layer, plus)], "test")
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == (1, 0)
    insert([("", layer, early)], "test")
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == (1, 1)
    remove([(layer, plus)])
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == (0, 1)


def test_hooks_of_others_stay():
    layer, part = nn.Linear(3, 3), named("plus", Plus())
    handle = layer.register_forward_hook(lambda module, args, output: output * 3)
    y = layer(torch.ones(1, 3))
    insert([("", layer, part)], "test")
    assert torch.equal(layer(torch.ones(1, 3)), y + 1)
    remove([(layer, part)])
    assert torch.equal(layer(torch.ones(1, 3)), y)
    handle.remove()


def test_a_sequential_host_runs_as_before():
    host, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    y, part = host(x), named("plus", Plus())
    insert([("", host, part)], "test")
    assert torch.equal(host(x), y + 1)
    remove([(host, part)])
    assert torch.equal(host(x), y)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])
def test_a_copy_is_independent(duplicate):
    host, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    plain = host(x)
    insert([("0", host[0], named("plus", Plus()))], "test")
    host(x).sum().backward()  # a port that has run copies as well
    twin = duplicate(host)
    assert torch.equal(twin(x), plain + 1)
    parts(twin)[0].set_scale(5)
    assert torch.equal(twin(x), plain + 5)
    assert torch.equal(host(x), plain + 1)
    assert attached(twin)["plus"] is not attached(host)["plus"]
    remove([(twin[0], parts(twin)[0])])
    assert torch.equal(twin(x), plain)
    assert torch.equal(host(x), plain + 1)


def test_what_acts_follows_every_switch_and_term_also_of_a_copy():
    host, x = nn.Linear(2, 2), torch.randn(3, 2)
    bare = host(x)
    insert([("", host, named("one", Plus())), ("", host, named("two", Times(3)))], "Test")
    copied = pickle.loads(pickle.dumps(host))
    for each in (host, copied, copy.deepcopy(host)):
        one, two = each._port.values()
        two.enabled = False
        assert torch.equal(each(x), bare + 1)
        one.term = "elsewhere"
        assert torch.equal(each(x), bare)
        with within(each, "elsewhere"):
            assert torch.equal(each(x), bare + 1)
            one.enabled = False
            assert torch.equal(each(x), bare)
        one.enabled = two.enabled = True
        assert torch.equal(each(x), bare * 3)
        remove([(each, one)])
        one.enabled = False  # of no concern to the port that it left
        assert torch.equal(each(x), bare * 3)


def test_two_that_replace_are_an_error_that_names_both():
    layer = nn.Linear(3, 3)
    insert([("", layer, named("first", Instead()))], "test")
    with pytest.raises(ValueError, match="'first' and 'second' both replace"):
        insert([("", layer, named("second", Instead()))], "test")
    insert([("", layer, named("third", Plus()))], "test")  # adding to it is fine


def test_two_that_are_innermost_are_an_error_that_names_both_and_one_stays_last():
    class Merges(Plus):
        is_innermost = True

    layer = nn.Linear(3, 3)
    insert([("", layer, named("first", Merges()))], "test")
    with pytest.raises(ValueError, match="'first' and 'second' both change the shape"):
        insert([("", layer, named("second", Merges()))], "test")
    insert([("", layer, named("third", Plus()))], "test")
    assert list(layer._port) == ["third", "first"]


def test_inserting_is_all_or_nothing():
    good, bad = nn.Linear(3, 3), nn.ModuleList()
    before = residue(good)
    with pytest.raises(ValueError, match="container that is never called"):
        insert([("good", good, named("a", Plus())), ("bad", bad, named("a", Plus()))], "test")
    assert residue(good) == before


@pytest.mark.parametrize("name", ["", "a.b", "forward", "values", "acting", "term", "training", "witness"])
def test_a_name_that_a_port_cannot_hold_is_refused(name):
    layer = nn.Linear(3, 3)
    before = residue(layer)
    with pytest.raises(ValueError, match="cannot be called"):
        insert([("", layer, named(name, Plus()))], "test")
    assert residue(layer) == before


@pytest.mark.parametrize("own", [8080, nn.Linear(3, 3)], ids=["number", "child"])
def test_a_host_with_an_attribute_of_that_name_is_refused(own):
    layer = nn.Linear(3, 3)
    setattr(layer, PORT, own)
    assert not ports(nn.Sequential(layer)) and not accepts(layer)
    with pytest.raises(ValueError, match="of its own"):
        insert([("", layer, named("a", Plus()))], "test")
    assert getattr(layer, PORT) is own


def test_port_keys_are_told_from_host_keys():
    layer = nn.Linear(3, 3)
    own = set(layer.state_dict())
    insert([("", layer, named("times", Times(2)))], "test")
    assert {key for key in layer.state_dict() if not is_port_key(key)} == own
    assert [key for key in layer.state_dict() if is_port_key(key)] == ["_port.times.factor"]
    assert not is_port_key("import_port.weight")


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_file_loads_strictly_into_a_host_with_parts(assign):
    plain, host = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    part = named("times", Times(2))
    insert([("0", host[0], part)], "test")
    factor = part.factor
    host.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(host[0].weight, plain[0].weight)
    assert part.factor is factor and factor.item() == 2
    with pytest.raises(RuntimeError, match="Unexpected"):
        host.load_state_dict({**plain.state_dict(), "0._port.other.factor": torch.ones(())})


def test_a_file_with_parts_loads_them():
    host = nn.Sequential(nn.Linear(3, 3))
    insert([("0", host[0], named("times", Times(2)))], "test")
    twin = copy.deepcopy(host)
    with torch.no_grad():
        parts(twin)[0].factor.fill_(7)
    host.load_state_dict(twin.state_dict())
    assert parts(host)[0].factor.item() == 7


def test_parts_follow_their_host():
    layer, part = nn.Linear(3, 3).eval(), named("times", Times(2))
    insert([("", layer, part)], "test")
    assert not part.training
    layer.to(torch.float64)
    assert part.factor.dtype == part.scale.dtype == torch.float64
    assert isinstance(layer._modules[PORT], Port)


def test_the_description_tells_who_touches_what_in_which_order():
    host = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert describe(host) == "nothing is attached"
    insert([("0", host[0], named("times", Times(2))), ("0", host[0], named("plus", Plus()))], "test")
    parts(host)[1].enabled = False
    assert describe(host) == "0  times (Times, 1 parameters, scale 1) -> plus (Plus, scale 1, off)"
