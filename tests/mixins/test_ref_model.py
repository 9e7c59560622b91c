"""The reference is the policy without its mixins, on the same question."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.denoisers import VDenoiser
from vdiff.mixins import LoRA, RefModel
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule


def make(**changes):
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4, **changes)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return VDenoiser(net)


def question(rows=4):
    draw = torch.Generator().manual_seed(1)
    t = torch.linspace(0.2, 0.8, rows // 2, dtype=torch.float64).repeat_interleave(2)
    level = CosineSchedule()(t).to(torch.float32)
    cond = Conditioning({"cross_attention": torch.randn(rows, 3, 6, generator=draw)})
    return torch.randn(rows, 1, 8, 8, generator=draw), level, cond


def dpo(prediction, target, beta=5.0):
    """Diffusion-DPO over adjacent winner and loser, arXiv:2311.12908 eq. 14."""
    gain = [(p.value - target).square().flatten(1).mean(1) for p in (prediction, prediction.reference)]
    margin = (gain[0] - gain[1]).unflatten(0, (-1, 2))
    return -F.logsigmoid(-0.5 * beta * (margin[:, 0] - margin[:, 1]))


def trained(denoiser):
    """With a LoRA that does something, and a reference."""
    lora = LoRA(rank=2).attach(denoiser)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lora, RefModel().attach(denoiser)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_starts_at_the_logarithm_of_two(checkpointing):
    denoiser, (x_t, level, cond) = make(checkpointing=checkpointing), question()
    denoiser.requires_grad_(False)
    lora = LoRA(rank=2).attach(denoiser)
    RefModel().attach(denoiser)
    loss = dpo(denoiser(x_t, level, cond), torch.randn(x_t.shape))
    assert torch.equal(loss, torch.full((2,), math.log(2)))
    loss.sum().backward()
    assert all(p.grad is not None for p in lora.parameters()) and any(p.grad.any() for p in lora.parameters())
    assert all(p.grad is None for n, p in denoiser.named_parameters() if "_port" not in n)


def test_the_reference_is_the_denoiser_without_mixins_and_without_gradient():
    denoiser, (x_t, level, cond) = make(), question()
    plain = denoiser(x_t, level, cond).value
    trained(denoiser)
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, plain)
    assert not prediction.reference.value.requires_grad
    assert not torch.equal(prediction.value, plain) and prediction.value.requires_grad
    assert prediction.reference.level is level and prediction.reference.reference is None


def test_gradients_are_right_with_the_network_checkpointed():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        denoiser, (x_t, level, cond) = make(checkpointing=checkpointing), question()
        lora, _ = trained(denoiser)
        dpo(denoiser(x_t, level, cond), torch.zeros_like(x_t)).sum().backward()
        grads.append([p.grad for p in lora.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


def test_where_no_gradient_is_recorded_it_is_asked_only_always():
    denoiser, (x_t, level, cond) = make(), question()
    ref = RefModel().attach(denoiser)
    with torch.no_grad():
        assert denoiser(x_t, level, cond).reference is None
        ref.detach()
        RefModel(always=True).attach(denoiser)
        assert denoiser(x_t, level, cond).reference is not None


def test_switches_and_modes_are_as_before_even_after_a_failure():
    denoiser, (x_t, level, cond) = make(dropout=0.3), question()
    lora, _ = trained(denoiser)
    other = LoRA(name="other").attach(denoiser)
    other.enabled = False
    denoiser.train()
    denoiser.network.middle_block.eval()
    modes = [module.training for module in denoiser.modules()]
    calls = []

    def fail_second(module, args):
        calls.append(module.training)
        if len(calls) % 2 == 0:
            raise RuntimeError("on purpose")

    handle = denoiser.network.register_forward_pre_hook(fail_second)
    with pytest.raises(RuntimeError, match="on purpose"):
        denoiser(x_t, level, cond)
    handle.remove()
    assert calls == [True, False]  # the reference sees no dropout
    assert [module.training for module in denoiser.modules()] == modes
    assert all(part.enabled for _, part in lora._sites.values())
    assert not any(part.enabled for _, part in other._sites.values())


def test_compiled_there_are_two_graphs():
    denoiser, (x_t, level, cond) = make(), question()
    lora, _ = trained(denoiser)
    true = denoiser(x_t, level, cond)
    counter = CompileCounterWithBackend("eager")
    denoiser.network.compile(backend=counter, fullgraph=True)
    for scale in (0.5, 0.1, 1.0):
        lora.scale = scale
        ours = denoiser(x_t, level, cond)
    torch.testing.assert_close(ours.value, true.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.reference.value, true.reference.value, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_what_is_no_denoiser_is_refused():
    host = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="role:denoiser"):
        RefModel().attach(host)
    RefModel(on="0").attach(host)
    with pytest.raises(TypeError, match="attached to a Linear, which returned a Tensor"):
        host(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="source"):
        RefModel(source="copy")


def test_its_file_has_no_weights(tmp_path):
    from vdiff.mixins import load_mixin

    RefModel().attach(make()).save(tmp_path / "ref.safetensors")
    denoiser, (x_t, level, cond) = make(), question()
    load_mixin(tmp_path / "ref.safetensors").attach(denoiser)
    assert denoiser(x_t, level, cond).reference is not None
