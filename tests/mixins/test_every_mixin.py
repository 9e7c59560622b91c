"""What holds for every mixin at every network: exact to come off, nothing at scale 0, safe to copy, save and recompute.

The table is in ``tests/every_mixin.py``; a registered mixin or network that does not stand there fails its test.
"""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from every_mixin import AT_DENOISER, CASES, NETWORKS, PAIRS, WEIGHTS, ask, given, hosting, made, said, stirred
from torch import nn

from vdiff.hooks import PORT, attached
from vdiff.mixins import load_mixin
from vdiff.process import CosineSchedule
from vdiff.registry import entries

EVERY = pytest.mark.parametrize("name, host", PAIRS)


@pytest.fixture
def module(name, host):
    """A host with what the mixin needs there already; taken off again, whatever the test did."""
    module = hosting(host)
    if CASES[name].needs is not None:
        CASES[name].needs(module)
    yield module
    for mixin in attached(module).values():
        mixin.detach()


def attach(name, host, module):
    return stirred(made(name, host).attach(module), seed=1)


def ours(kind):
    return {name: entry for name, entry in entries(kind).items() if entry.target.__module__.startswith("vdiff.")}


def test_every_registered_mixin_is_tried_at_every_registered_network():
    assert set(ours("mixin")) == set(CASES)
    assert {entry.target for entry in ours("network").values()} == {make.func for make, _ in NETWORKS.values()}
    for name, case in CASES.items():
        assert {*case.hosts, *case.refused} >= set(NETWORKS), name
        assert not {*case.hosts} & {*case.refused}, name


def test_the_documentation_says_what_goes_where():
    """The table in docs/mixins.md: a cell is filled where the mixin is tried, at all forms of a network."""
    page = (Path(__file__).parents[2] / "docs" / "mixins.md").read_text()
    head, _, *rows = re.search(r"^\| +\|.*cogvideox.*\n(?:\|.*\n)+", page, re.M)[0].splitlines()
    columns = re.findall(r"`(\w+)`", head)
    assert columns == list(ours("network"))
    said = {}
    for row in rows:
        names, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        said |= {name: [cell != "" for cell in cells] for name in re.findall(r"`(\w+)`", names)}
    forms = {
        column: [h for h, (make, _) in NETWORKS.items() if make.func.registered_name == column] for column in columns
    }
    assert said == {
        name: [set(forms[column]) <= set(case.hosts) for column in columns]
        for name, case in CASES.items()
        if set(case.hosts) & set(NETWORKS)
    }


@EVERY
def test_it_comes_off_bit_for_bit(name, host, module):
    ports = {site for site, m in module.named_modules() if PORT in m._modules}
    keys, plain = list(module.state_dict()), ask(module, host)
    modes = [p.requires_grad for p in module.parameters()]
    mixin = attach(name, host, module)
    assert [key for key in module.state_dict() if f".{mixin.name}." not in f".{key}"] == keys
    if CASES[name].acts:
        assert not torch.allclose(ask(module, host, name), plain, rtol=0, atol=1e-6)
    mixin.detach()
    assert list(module.state_dict()) == keys and [p.requires_grad for p in module.parameters()] == modes
    assert torch.equal(ask(module, host), plain)
    assert {site for site, m in module.named_modules() if PORT in m._modules} == ports
    if not ports:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@EVERY
def test_it_is_nothing_at_scale_zero_and_switched_off(name, host, module):
    plain = ask(module, host)
    mixin = attach(name, host, module)
    full = ask(module, host, name)
    with mixin.scaled(0.0):
        torch.testing.assert_close(ask(module, host, name), plain, rtol=1e-4, atol=1e-5)
    with mixin.disabled():
        assert torch.equal(ask(module, host, name), plain)
    assert torch.equal(ask(module, host, name), full)


# A denoiser hands gates to its network only; of the others one changes shapes, and one changes nothing.
GATED = [pair for pair in PAIRS if pair[0] not in (*AT_DENOISER, "token_merging", "record")]


@pytest.mark.parametrize("name, host", [pair for pair in GATED if pair[1] != "tower"])
def test_each_row_gets_as_much_as_its_gate_says_however_it_is_folded(name, host, module):
    """Rows are ``(b f)``, ``(b t v)`` or ``(b h w)`` inside; a gate that went to another row would show here."""
    plain = ask(module, host)
    mixin = attach(name, host, module)
    full = ask(module, host, name, gates={name: torch.ones(2)})
    gated = ask(module, host, name, gates={name: torch.tensor([1.0, 0.0])})
    assert (gated[0] - plain[0]).abs().max() > 1e-6
    torch.testing.assert_close(gated[1], plain[1], rtol=1e-4, atol=1e-5)
    if name != "joint_attention":  # where a row looks at its partner, which is another now
        torch.testing.assert_close(gated[0], full[0], rtol=1e-4, atol=1e-5)
    mixin.detach()


@pytest.mark.parametrize("name, host", [pair for pair in PAIRS if pair[1] == "video_unet"])
def test_frames_that_are_images_are_each_as_if_alone(name, host, module):
    """What a mixin does to a video it does frame by frame: layers over time bring frames together, and they are off."""
    attach(name, host, module)
    x, time, cond = given(host, [name])
    level = CosineSchedule()(time)

    @torch.no_grad()
    def shown(frames):
        tensors = {key: value[:, :, frames] if value.ndim == 5 else value for key, value in cond.tensors.items()}
        return module(x[:, :, frames], level, cond.with_(tensors=tensors | {"image_only": torch.ones(2)})).value

    alone = torch.cat([shown(slice(f, f + 1)) for f in range(x.shape[2])], dim=2)
    torch.testing.assert_close(shown(slice(None)), alone, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_copy_of_what_was_pickled_has_one_of_its_own(name, host, module):
    plain = ask(module, host)
    mixin = attach(name, host, module)
    full = ask(module, host, name)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(module)))
    theirs = attached(twin)[mixin.name]
    assert theirs is not mixin and torch.equal(ask(twin, host, name), full)
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(ask(module, host, name), full)
    theirs.detach()
    assert torch.equal(ask(twin, host), plain)


@EVERY
def test_a_file_brings_it_back(name, host, module, tmp_path):
    mixin = attach(name, host, module)
    full = ask(module, host, name)
    mixin.save(tmp_path / "mixin.safetensors")
    mixin.detach()
    again = load_mixin(tmp_path / "mixin.safetensors").attach(module)
    assert torch.equal(ask(module, host, name), full)
    again.detach()
    mixin.attach(module)  # and the first brings its weights along
    assert torch.equal(ask(module, host, name), full)


@pytest.mark.parametrize("name, host", [(name, host) for name, host in PAIRS if name in WEIGHTS])
def test_merged_it_is_the_same_and_unmerged_the_host_is_what_it_was(name, host, module):
    plain, before = ask(module, host), {key: value.clone() for key, value in module.state_dict().items()}
    mixin = attach(name, host, module)
    full, keys = ask(module, host, name), list(module.state_dict())
    for one in (module, pickle.loads(pickle.dumps(module))):
        theirs = attached(one)[mixin.name].merge()
        close = dict(rtol=1e-3, atol=1e-4 * full.abs().max().item())
        torch.testing.assert_close(ask(one, host, name), full, **close)
        theirs.unmerge()
        assert torch.equal(ask(one, host, name), full) and list(one.state_dict()) == keys
        theirs.detach()
        assert torch.equal(ask(one, host), plain)
        assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("name, host", [pair for pair in PAIRS if pair[1] != "tower"])
def test_the_gradient_is_the_same_where_activations_are_recomputed(name, host):
    """And stays so when the mixin is turned down, and then off, before backward."""
    grads = []
    for checkpointing in (False, True):
        module = hosting(host, checkpointing)
        needed = CASES[name].needs and CASES[name].needs(module)
        mixin = attach(name, host, module)
        loss = said(module, host, name).square().sum()
        mixin.scale, mixin.enabled = 0.25, False
        weights = [*mixin.parameters()] or [p for key, p in module.named_parameters() if "attn1.to_q" in key]
        grads.append(torch.autograd.grad(loss, weights, allow_unused=True))
        for one in (mixin, needed):
            if one is not None:
                one.detach()
    assert any(grad is not None and grad.any() for grad in grads[0])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-5)
