"""What holds for every mixin at every network: exact to come off, nothing at scale 0, safe to copy, save and recompute.

Each registered mixin stands in the table below with arguments; one that does not fails its test.
"""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.denoisers import VDenoiser
from vdiff.hooks import PORT, attached, routed
from vdiff.mixins import (
    PAG,
    SEG,
    Adapter,
    ByLevel,
    ControlNet,
    DoRA,
    FreeU,
    IPAdapter,
    JointAttention,
    LoHa,
    LoKr,
    LoRA,
    Mixin,
    Record,
    RefModel,
    SkipLayer,
    T2IAdapter,
    TextualInversion,
    TokenMerging,
    load_mixin,
)
from vdiff.networks import DiT, UNet
from vdiff.process import Conditioning, CosineSchedule
from vdiff.registry import entries


@dataclass
class Case:
    """How a mixin is tried.

    Attributes:
        make: A new one.
        conds: Conditions that it brings along, ``(rows) -> tensor`` by name.
        hosts: Where it goes.
        needs: What must be attached before it.
        acts: Whether it changes what the host says of the inputs here.
    """

    make: Callable[[], Mixin]
    conds: dict[str, Callable[[int], torch.Tensor]] | None = None
    hosts: tuple[str, ...] = ("unet", "dit")
    needs: Callable[[nn.Module], Mixin] | None = None
    acts: bool = True


CASES = {
    "adapter": Case(lambda: Adapter(width=3)),
    "by_level": Case(
        lambda: ByLevel("style", {0.5: 0.2, 3.0: 0.7}),
        needs=lambda host: stirred(LoRA(rank=2, name="style").attach(host)),
    ),
    "controlnet": Case(
        lambda: ControlNet(hint_factor=1), {"controlnet": lambda rows: torch.rand(rows, 3, 8, 8)}, ("unet",)
    ),
    "dora": Case(lambda: DoRA(rank=2)),
    "freeu": Case(lambda: FreeU(), hosts=("unet",)),
    "ip_adapter": Case(lambda: IPAdapter(embed_dim=5), {"ip_adapter": lambda rows: torch.randn(rows, 5)}),
    "joint_attention": Case(lambda: JointAttention()),
    "loha": Case(lambda: LoHa(rank=2)),
    "lokr": Case(lambda: LoKr(rank=2)),
    "lora": Case(lambda: LoRA(rank=2)),
    "pag": Case(lambda: PAG()),
    "record": Case(lambda: Record(), acts=False),
    "ref_model": Case(lambda: RefModel(always=True), acts=False),
    "seg": Case(lambda: SEG()),
    "skip_layer": Case(lambda: SkipLayer()),
    "t2i_adapter": Case(
        lambda: T2IAdapter(hint_factor=1), {"t2i_adapter": lambda rows: torch.rand(rows, 3, 8, 8)}, ("unet",)
    ),
    "textual_inversion": Case(lambda: TextualInversion({"<cat>": 2}), hosts=("tower",), acts=False),
    "token_merging": Case(lambda: TokenMerging()),
}
GATED = ("pag", "seg", "skip_layer")  # which do nothing without a gate
EVERY = pytest.mark.parametrize("name, host", [(name, host) for name, case in CASES.items() for host in case.hosts])


def test_every_registered_mixin_stands_in_the_table():
    ours = {name for name, entry in entries("mixin").items() if entry.target.__module__.startswith("vdiff.")}
    assert ours == set(CASES)


def stirred(thing):
    """Weights as after training; they are found where they are, whatever holds them."""
    for parameter in thing.parameters():
        nn.init.normal_(parameter, std=0.2)
    return thing


class Tower(nn.Module):
    """The table of a text tower and what comes after it."""

    def __init__(self):
        super().__init__()
        self.token_embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return self.out(self.token_embedding(ids))


def hosting(host, checkpointing=False):
    torch.manual_seed(0)
    if host == "tower":
        return stirred(Tower())
    if host == "unet":
        net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4, checkpointing=checkpointing)
    else:
        net = DiT(1, 1, 8, 2, 2, context_dim=6, checkpointing=checkpointing)
    return VDenoiser(stirred(net)).eval()


def told(name, rows=2):
    """Conditions for one mixin, or for several."""
    draw, names = torch.manual_seed(1), [name] if isinstance(name, str) else name
    tensors = {"cross_attention": torch.randn(rows, 3, 6)}
    for one in names:
        tensors |= {cond: make(rows) for cond, make in (CASES[one].conds or {}).items()}
    gates = {one: torch.linspace(1, 0.5, rows) for one in names if one in GATED}
    partners = torch.arange(rows).flip(0) if "joint_attention" in names else None
    del draw
    return Conditioning(tensors, gates=gates, partners=partners)


def ask(host, name, with_own=True):
    """What the host says, with the conditions that only the mixin brings or without."""
    torch.manual_seed(1)
    if isinstance(host, Tower):
        return host(torch.tensor([[0, 3, 8]]))
    x, level = torch.randn(2, 1, 8, 8), CosineSchedule()(torch.tensor([0.3, 0.7]))
    cond = told(name)
    if not with_own:
        cond = Conditioning({"cross_attention": cond["cross_attention"]})
    return host(x, level, cond).value


def attach(name, host, stir=True):
    mixin = CASES[name].make().attach(host)
    return stirred(mixin) if stir else mixin


def prepared(name, host, **options):
    made = hosting(host, **options)
    if CASES[name].needs is not None:
        CASES[name].needs(made)
    return made


@EVERY
def test_it_comes_off_bit_for_bit(name, host):
    module = prepared(name, host)
    ports = {site for site, m in module.named_modules() if PORT in m._modules}
    keys, plain, modes = (
        list(module.state_dict()),
        ask(module, name, False),
        [p.requires_grad for p in module.parameters()],
    )
    mixin = attach(name, module)
    assert [key for key in module.state_dict() if f".{mixin.name}." not in f".{key}"] == keys
    if CASES[name].acts:
        assert not torch.allclose(ask(module, name), plain, rtol=0, atol=1e-6)
    mixin.detach()
    assert list(module.state_dict()) == keys and [p.requires_grad for p in module.parameters()] == modes
    assert torch.equal(ask(module, name, False), plain)
    assert {site for site, m in module.named_modules() if PORT in m._modules} == ports
    if not ports:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@EVERY
def test_it_is_nothing_at_scale_zero_and_switched_off(name, host):
    module = prepared(name, host)
    plain = ask(module, name, False)
    mixin = attach(name, module)
    full = ask(module, name)
    with mixin.scaled(0.0):
        torch.testing.assert_close(ask(module, name), plain, rtol=1e-4, atol=1e-5)
    with mixin.disabled():
        assert torch.equal(ask(module, name), plain)
    assert torch.equal(ask(module, name), full)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@EVERY
def test_a_copy_has_one_of_its_own(name, host, duplicate):
    module = prepared(name, host)
    plain = ask(module, name, False)
    mixin = attach(name, module)
    full = ask(module, name)
    twin = duplicate(module)
    theirs = attached(twin)[mixin.name]
    assert theirs is not mixin and torch.equal(ask(twin, name), full)
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(ask(module, name), full)
    theirs.detach()
    assert torch.equal(ask(twin, name, False), plain) and torch.equal(ask(module, name), full)


@EVERY
def test_a_file_brings_it_back(name, host, tmp_path):
    module = prepared(name, host)
    mixin = attach(name, module)
    full = ask(module, name)
    mixin.save(tmp_path / "mixin.safetensors")
    mixin.detach()
    again = load_mixin(tmp_path / "mixin.safetensors").attach(module)
    assert torch.equal(ask(module, name), full)
    again.detach()
    mixin.attach(module)  # and the first brings its weights along
    assert torch.equal(ask(module, name), full)


@EVERY
def test_the_gradient_is_the_same_where_activations_are_recomputed(name, host):
    """And stays so when the mixin is turned before backward."""
    if host == "tower":
        pytest.skip("a table of embeddings is never recomputed")
    grads = []
    for checkpointing in (False, True):
        module = prepared(name, host, checkpointing=checkpointing)
        mixin = attach(name, module, stir=False)
        torch.manual_seed(2)
        stirred(mixin)
        loss = ask(module, name).square().sum()
        mixin.scale = 0.25
        loss.backward()
        weights = [*mixin.parameters()] or [p for key, p in module.named_parameters() if "attn1.to_q" in key]
        grads.append([weight.grad for weight in weights])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-5)
    assert any(grad.any() for grad in grads[0])


def compiled_agrees(names, host):
    """One graph for several scales and gates, and the numbers of eager mode."""
    module = hosting(host)
    net, mixins = module.network, [attach(name, module.network) for name in names]
    x, c_noise, counter = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(wrap_top_frame=True), torch.no_grad():  # as DiffusionEngine.compile sets it
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        for scale in (1.0, 0.5):
            for mixin in mixins:
                mixin.scale = scale
            with routed(net, cond := told(names)) if cond_is_routed(names) else nullcontext(cond := told(names)):
                torch.testing.assert_close(compiled(x, c_noise, cond), net(x, c_noise, cond), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def cond_is_routed(names):
    return any(name in (*GATED, "joint_attention") for name in names)


# Those of a denoiser or a tower; those that hand self-attention a context or fewer tokens; LoRA's relatives.
NOT_TOGETHER = ("by_level", "ref_model", "textual_inversion", "seg", "token_merging", "dora", "loha", "lokr")


@pytest.mark.parametrize("host", ["unet", "dit"])
def test_one_graph_holds_them_all(host):
    compiled_agrees([n for n, case in CASES.items() if host in case.hosts and n not in NOT_TOGETHER], host)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, host", [("token_merging", "unet"), ("token_merging", "dit"), ("dora", "unet"), ("lokr", "dit")]
)
def test_one_graph_holds_each(name, host):
    if name != "token_merging":
        return compiled_agrees([name], host)
    module = hosting(host)
    merging = attach(name, module)
    x, c_noise, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), told(name)
    compiled = torch.compile(module.network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c_noise, cond), module.network(x, c_noise, cond), rtol=1e-4, atol=1e-4)
    merging.detach()


def test_two_that_replace_what_a_module_does_are_refused_together():
    from vdiff.hooks import Part

    class Replacing(Part):
        replaces = True

    class Constant(Mixin, abstract=True):
        def part(self, module, site):
            return Replacing()

    module = hosting("dit")
    Constant("*.ff", "one").attach(module)
    with pytest.raises(ValueError, match="'one' and 'two' both replace what this module does"):
        Constant("*.ff", "two").attach(module)


@EVERY
def test_a_pattern_that_picks_nothing_and_a_wrapped_host_are_errors(name, host):
    module = prepared(name, host)
    mixin = CASES[name].make()
    mixin.on = "*.nowhere"
    with pytest.raises(ValueError, match="no module of .* matches '.*nowhere'"):
        mixin.attach(module)
    next(m for n, m in module.named_modules() if not n).__dict__["__composable_api_state_key_0"] = {}
    with pytest.raises(ValueError, match="Attach first, then wrap"):
        CASES[name].make().attach(module)
