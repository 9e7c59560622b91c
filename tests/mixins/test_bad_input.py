"""What a mixin refuses, at every network: each a clear error, and the host is as it was.

A pattern that matches nothing, two that replace one site, weights of another rank or host, attaching after wrapping,
partners with a hole, and a network on which the mixin cannot act. Single cases are in the files of their mixins.
"""

import pytest
import torch
from every_mixin import ALL, CASES, PAIRS, WEIGHTS, ask, hosting, made

from vdiff.hooks import PORT, Part, attached, role_sites
from vdiff.mixins import JointAttention, Mixin

EVERY = pytest.mark.parametrize("name, host", PAIRS)
REFUSED = [(name, host, why) for name, case in CASES.items() for host, why in case.refused.items()]


@pytest.fixture
def module(host):
    """A host, to which nothing may be attached in the end that was not taken off."""
    module = hosting(host)
    yield module
    is_left = any(PORT in m._modules for m in module.modules())
    for mixin in attached(module).values():
        mixin.detach()
    assert not is_left


@EVERY
def test_a_pattern_that_picks_nothing(name, host, module):
    mixin = made(name, host)
    mixin.on = "*.nowhere"
    with pytest.raises(ValueError, match="no module of .* matches '.*nowhere'.*Modules begin: "):
        mixin.attach(module)


@pytest.mark.parametrize("name, host, why", REFUSED)
def test_a_network_on_which_it_cannot_act(name, host, why, module):
    with pytest.raises(ValueError, match=why):
        CASES[name].make().attach(module)


@EVERY
def test_a_host_that_is_wrapped_already(name, host, module):
    inner = next(m for m in module.modules() if m is not module)
    inner.__dict__["__composable_api_state_key_0"] = {}  # as replicate and fully_shard mark it
    try:
        with pytest.raises(ValueError, match=rf"\({type(inner).__name__}\) is wrapped .* Attach first, then wrap"):
            made(name, host).attach(module)
    finally:
        del inner.__dict__["__composable_api_state_key_0"]


class Replacing(Part):
    replaces = True


class Constant(Mixin, abstract=True):
    """Says something else than its host; both names of the two are in the error."""

    def part(self, module, site):
        return Replacing()


@pytest.mark.parametrize("host", ALL)
def test_two_that_replace_what_a_module_does(host, module):
    one = Constant("role:feed_forward", "one").attach(module)
    with pytest.raises(ValueError, match="'one' and 'two' both replace what this module does.*`on`"):
        Constant(["role:self_attention", "role:feed_forward"], "two").attach(module)
    one.detach()


@pytest.mark.parametrize("name, host", [(name, host) for name, host in PAIRS if name in WEIGHTS])
def test_weights_of_another_rank_and_of_another_host(name, host, module):
    mixin = made(name, host).attach(module)
    other = CASES[name].make.func(rank=1)
    other.load_state_dict(mixin.state_dict())
    mixin.detach()
    with pytest.raises(ValueError, match="these weights do not fit: .* Rank or `on` differ"):
        other.attach(module)
    with pytest.raises(ValueError, match=f"was made for a {mixin.host}, this is a .* set its `host` to None"):
        mixin.attach(hosting("unet" if host != "unet" else "dit"))


@pytest.mark.parametrize("host", ALL)
def test_partners_with_a_hole(host, module):
    joint = JointAttention().attach(module)
    for partners, said in (
        ([1], "given for 1 of 2 rows: row 1 has none"),
        ([1, 2], "partner of row 1 is 2; there are"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(module, host, partners=torch.tensor(partners))
    assert len(joint.sites) == len(role_sites(module, "self_attention"))
    joint.detach()
