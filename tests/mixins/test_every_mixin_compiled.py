"""Mixins under ``torch.compile(fullgraph=True)``, at every network: one graph, whatever is turned afterwards."""

from contextlib import nullcontext

import pytest
import torch
from every_mixin import AT_DENOISER, CASES, NETWORKS, given, hosting, made, stirred
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.hooks import attached, routed

# Those of a denoiser or a tower; those that hand self-attention a context or fewer tokens; LoRA's relatives.
APART = (*AT_DENOISER, "textual_inversion", "seg", "token_merging", "dora", "loha", "lokr")
TOGETHER = {host: [n for n, case in CASES.items() if host in case.hosts and n not in APART] for host in NETWORKS}


AS_THE_ENGINE = torch._dynamo.config.patch(  # as DiffusionEngine.compile sets it
    wrap_top_frame=True, skip_fwd_side_effects_in_bwd_under_checkpoint=True
)


@pytest.fixture
def net(host):
    net = hosting(host).network
    yield net
    for mixin in attached(net).values():
        mixin.detach()


def route(net, cond):
    return routed(net, cond) if cond.gates or cond.partners is not None else nullcontext()


def compiled_agrees(net, host, names, is_plain_first):
    """One graph for several scales and gates, and the numbers of eager mode; attached after compiling, one more."""
    counter = CompileCounterWithBackend("eager")
    with AS_THE_ENGINE, torch.no_grad():
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        if is_plain_first:
            plain = compiled(*given(host, []))
        mixins = [stirred(made(name, host).attach(net), seed=1) for name in names]
        x, c_noise, cond = given(host, names)
        for scale in (1.0, 0.5):
            for mixin in mixins:
                mixin.scale = scale
            turned = cond.with_(gates={name: gate * scale for name, gate in cond.gates.items()})
            with route(net, turned):
                said = compiled(x, c_noise, turned)
                torch.testing.assert_close(said, net(x, c_noise, turned), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1 + is_plain_first
    if is_plain_first:
        assert not torch.allclose(said, plain, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "host",
    [h if h in ("unet", "dit", "cogvideox") else pytest.param(h, marks=pytest.mark.slow) for h in TOGETHER],
)
def test_one_graph_holds_them_all_and_attaching_after_compiling_takes_effect(host, net):
    assert {"lora", "joint_attention", "pag", "skip_layer", "adapter", "record"} <= set(TOGETHER[host])
    compiled_agrees(net, host, TOGETHER[host], is_plain_first=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, host", [("dora", "unet"), ("lokr", "dit"), ("loha", "cogvideox"), ("seg", "cogvideox")])
def test_one_graph_holds_each(name, host, net):
    compiled_agrees(net, host, [name], is_plain_first=False)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["unet", "dit", "cogvideox"])
def test_merging_tokens_is_one_graph_at_one_scale(host, net):
    """Another scale has other shapes."""
    made("token_merging", host).attach(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given(host, [])), net(*given(host, [])), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["dit", "cogvideox", "video_unet"])
def test_the_gradient_is_right_or_an_error_where_activations_are_recomputed(host):
    """Compiled with checkpointing and turned before backward: gates and switches do not matter, a scale is noticed."""
    made_for, grads = ("lora", "adapter", "skip_layer"), []
    for is_compiled in (False, True):
        net = hosting(host, checkpointing=is_compiled).network
        mixins = [stirred(made(name, host).attach(net), seed=1) for name in made_for]
        weights = [weight for mixin in mixins for weight in mixin.parameters()]
        x, c_noise, cond = given(host, made_for)
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if is_compiled else net

        def loss(run=run, net=net, x=x, c_noise=c_noise, cond=cond):
            with routed(net, cond):
                return run(x, c_noise, cond).square().sum()

        with AS_THE_ENGINE:
            before = loss()
            for mixin in mixins:
                mixin.enabled = False
            grads.append(torch.autograd.grad(before, weights))
            for mixin in mixins:
                mixin.enabled = True
            before, mixins[0].scale = loss(), 0.25
            if is_compiled:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(before, weights)
        for mixin in mixins:
            mixin.detach()
    assert all(grad.any() for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
