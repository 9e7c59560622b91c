"""The choice of a kernel, for CUDA devices that need not be there."""

import itertools

import pytest
import torch

from vdiff.attention import BACKENDS, AttentionCall, choose, refusal

HALF, FLOAT = torch.bfloat16, torch.float32


def cuda(dtype=HALF, q_len=1024, k_len=1024, head_dim=64, **facts):
    return AttentionCall("cuda", dtype, q_len, k_len, head_dim, **facts)


@pytest.mark.parametrize(
    "head_dim, kernel",
    [(40, "cudnn"), (64, "cudnn"), (80, "cudnn"), (128, "cudnn"), (160, "flash"), (256, "flash"), (512, "efficient")],
)
def test_head_dimensions_of_known_models_on_hopper(head_dim, kernel):
    """Stable Diffusion 1 has 40, 80 and 160, the others 64, an autoencoder's middle 512."""
    assert choose(cuda(head_dim=head_dim)) == kernel
    assert choose(cuda(head_dim=head_dim, grad=True)) == kernel


@pytest.mark.parametrize("head_dim, kernel", [(40, "flash"), (64, "flash"), (256, "flash"), (512, "efficient")])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_other_devices_prefer_flash(head_dim, kernel, capability):
    assert choose(cuda(head_dim=head_dim, capability=capability)) == kernel


@pytest.mark.parametrize("cudnn", [0, 90800, 91500])
def test_an_old_cudnn_is_not_preferred(cudnn):
    assert choose(cuda(cudnn=cudnn)) == "flash"


@pytest.mark.parametrize(
    "change, kernel",
    [
        ({"k_len": 1}, "flash"),
        ({"k_len": 1, "mask": True}, "efficient"),
        ({"mask": True}, "cudnn"),
        ({"mask": True, "capability": (8, 0)}, "efficient"),
        ({"dtype": FLOAT}, "efficient"),
        ({"dtype": FLOAT, "head_dim": 20}, "efficient"),
        ({"deterministic": True}, "flash"),
        ({"causal": True}, "cudnn"),
        ({"head_dim": 44}, "flash"),
        ({"value_dim": 128}, "cudnn"),
        ({"value_dim": 256}, "efficient"),
        ({"head_dim": 192, "value_dim": 128}, "cudnn"),
        ({"batch": 65536}, "flash"),
        ({"head_dim": 208, "capability": (8, 6)}, "flash"),
        ({"head_dim": 208, "capability": (8, 6), "grad": True}, "efficient"),
        ({"dtype": torch.float16, "capability": (7, 5)}, "efficient"),
        ({"dtype": FLOAT, "capability": (7, 5), "head_dim": 33}, "efficient"),
    ],
)
def test_what_changes_the_choice(change, kernel):
    assert choose(cuda(**change)) == kernel


@pytest.mark.parametrize(
    "change, reasons",
    [
        ({"dtype": torch.float64}, ["flash takes float16", "efficient takes float32"]),
        ({"dtype": FLOAT, "head_dim": 6}, ["multiples of 4 in torch.float32, not 6"]),
        ({"head_dim": 44, "mask": True}, ["flash takes no mask", "multiples of 8 in torch.bfloat16, not 44"]),
        ({"k_len": 0}, ["takes no empty sequence"]),
        ({"dtype": HALF, "capability": (7, 5)}, ["bfloat16, not torch.bfloat16"]),
    ],
)
def test_the_plain_kernel_is_never_taken_in_silence_on_cuda(change, reasons):
    with pytest.raises(ValueError) as caught:
        choose(cuda(**change))
    assert "use_backend('math')" in str(caught.value)
    assert all(reason in str(caught.value) for reason in reasons)
    assert choose(cuda(**change), "math") == "math"


def test_a_forced_backend_is_taken_or_refused_with_the_reason():
    assert choose(cuda(), "flash") == "flash"
    assert choose(cuda(), "xformers") == "xformers"
    with pytest.raises(ValueError, match="backend 'flash' takes no mask"):
        choose(cuda(mask=True), "flash")
    with pytest.raises(ValueError, match="backend 'cudnn' takes head dimensions up to 128, not 160"):
        choose(cuda(head_dim=160), "cudnn")
    with pytest.raises(ValueError, match="backend 'flash' needs compute capability 8.0, here is 7.5"):
        choose(cuda(dtype=torch.float16, capability=(7, 5)), "flash")


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_elsewhere_torch_chooses(device_type):
    call = AttentionCall(device_type, FLOAT, 5, 7, 6, mask=True)
    assert choose(call) == choose(call, "sdpa") == "sdpa"
    assert choose(call, "math") == "math"


def test_choosing_is_pure():
    calls = [
        cuda(dtype, q_len, k_len, dim, mask=mask)
        for dtype, q_len, k_len, dim, mask in itertools.product(
            [HALF, FLOAT], [1, 77], [1, 77], [8, 64, 512], [True, False]
        )
    ]
    first = [choose(call) for call in calls]
    assert [choose.__wrapped__(call) for call in reversed(calls)][::-1] == first
    assert set(first) == {"cudnn", "flash", "efficient"}
    assert all(refusal(kernel, call) is None for kernel, call in zip(first, calls, strict=True))
    assert all(kernel in BACKENDS for kernel in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with torch's answer for a CUDA device")
def test_torch_takes_what_the_rules_say_it_takes():
    cudnn, capability = torch.backends.cudnn.version() or 0, torch.cuda.get_device_capability()
    asked = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    lengths, dims, truth = [1, 2, 77, 256], [4, 6, 8, 40, 44, 64, 128, 160, 256, 512], [False, True]
    for dtype, q_len, k_len, dim, mask, causal, grad in itertools.product(
        [HALF, torch.float16, FLOAT, torch.float64], lengths, lengths, dims, truth, truth, truth
    ):
        if mask and causal:
            continue
        q, k, v = (
            torch.empty(2, n, 3, dim, device="cuda", dtype=dtype, requires_grad=grad).transpose(1, 2)
            for n in (q_len, k_len, k_len)
        )
        given = torch.ones(2, 1, 1, k_len, dtype=torch.bool, device="cuda") if mask else None
        params = torch.backends.cuda.SDPAParams(q, k, v, given, 0.0, causal, False)
        call = AttentionCall(
            "cuda",
            dtype,
            q_len,
            k_len,
            dim,
            dim,
            2,
            3,
            mask,
            causal,
            grad,
            capability,
            cudnn,
        )
        for kernel, can_use in asked.items():
            if refusal(kernel, call) is None:
                assert can_use(params, debug=True), (kernel, call)
