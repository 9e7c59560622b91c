"""attend: every backend computes the formula, and what cannot be computed well is said."""

import subprocess
import sys
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vdiff.attention import attend, use_backend

ON_CPU = ["sdpa", "flash", "math"]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(q_len=5, k_len=7, dtype=torch.float32, batch=2, heads=3, dim=8):
    return (
        draw(batch, q_len, heads, dim, dtype=dtype),
        draw(batch, k_len, heads, dim, dtype=dtype, seed=1),
        draw(batch, k_len, heads, dim, dtype=dtype, seed=2),
    )


def by_loops(q, k, v, sees, scale=None, added=None):
    """One query at a time, over the keys that it sees; zeros where there are none."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = sees[b, h, i].nonzero().flatten()
        if len(keys):
            logits = k[b, keys, h] @ q[b, i, h] * scale
            logits = logits if added is None else logits + added[b, h, i, keys]
            out[b, i, h] = logits.softmax(0) @ v[b, keys, h]
    return out


def everything(q, k):
    return torch.ones(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_is_the_formula(backend):
    q, k, v = qkv(dtype=torch.float64)
    expected = by_loops(q, k, v, everything(q, k), scale=0.7)
    assert (attend(q, k, v, scale=0.7, backend=backend) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", ["keys", "full", "broadcast"])
def test_true_attends(backend, shape):
    q, k, v = qkv(dtype=torch.float64)
    keep = {"keys": (2, 7), "full": (2, 3, 5, 7), "broadcast": (1, 1, 5, 7)}[shape]
    mask = draw(*keep, seed=3) > 0
    mask[..., 0] = True
    four = mask[:, None, None] if mask.ndim == 2 else mask
    expected = by_loops(q, k, v, everything(q, k) & four)
    assert (attend(q, k, v, mask, backend=backend) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_floating_mask_is_added(backend):
    q, k, v = qkv(dtype=torch.float64)
    added = draw(2, 3, 5, 7, dtype=torch.float64, seed=3)
    added[:, :, :, 2] = -torch.inf
    sees = everything(q, k)
    sees[..., 2] = False
    assert (attend(q, k, v, added, backend=backend) - by_loops(q, k, v, sees, added=added)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("q_len, k_len", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_aligns_the_ends(backend, q_len, k_len, masked):
    """(7, 4) has queries before the first key: they see nothing and get zeros."""
    q, k, v = qkv(q_len, k_len, dtype=torch.float64)
    sees = everything(q, k) & (torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len)
    mask = None
    if masked:
        mask = torch.ones(2, k_len, dtype=torch.bool)
        mask[1, :2] = False
        sees = sees & mask[:, None, None]
    out = attend(q, k, v, mask, causal=True, backend=backend)
    assert (out - by_loops(q, k, v, sees)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("floating", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_zero_gradients(backend, floating):
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    given = torch.zeros(2, 7).masked_fill(~mask, -torch.inf) if floating else mask
    out = attend(q, k, v, given, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[1] == 0).all() and out[0].abs().min() > 0
    assert all((g[1] == 0).all() and g[0].abs().max() > 0 for g in grads)


def test_backends_agree_in_bfloat16():
    q, k, v = qkv(33, 41, dtype=torch.bfloat16, dim=16)
    outs = [attend(q, k, v, backend=backend) for backend in ON_CPU]
    assert all(out.dtype is torch.bfloat16 for out in outs)
    exact = by_loops(q.double(), k.double(), v.double(), everything(q, k))
    assert all((out - exact).abs().max() < 0.02 for out in outs)


def test_values_may_be_longer_than_keys():
    q, k, _ = qkv(dtype=torch.float64)
    v = draw(2, 7, 3, 12, dtype=torch.float64)
    for backend in ("sdpa", "math"):
        assert (attend(q, k, v, backend=backend) - by_loops(q, k, v, everything(q, k))).abs().max() < 1e-12


def test_neither_inputs_nor_output_are_copied():
    """The output of the fused kernel, seen as (B, S, H * D), is memory in order."""
    q, k, v = qkv()
    with torch.profiler.profile() as profile:
        out = attend(q, k, v).flatten(2)
    assert out.is_contiguous()
    assert not {"aten::clone", "aten::contiguous", "aten::copy_"} & {event.key for event in profile.key_averages()}


def test_the_context_manager_beats_the_argument_and_ends(monkeypatch):
    called = []
    monkeypatch.setattr("vdiff.attention.dot_product._math", lambda q, k, v, *rest: called.append(1) or v)
    q, k, v = qkv(5, 5)
    with use_backend("sdpa"), use_backend("math"):
        attend(q, k, v, backend="flash")
        assert called == [1]
    attend(q, k, v)
    assert called == [1]
    with pytest.raises(RuntimeError, match="inner"), use_backend("math"):
        raise RuntimeError("inner")
    attend(q, k, v)
    assert called == [1]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_under_compile(compiler):
    counter = CompileCounter()
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.tensor([[True] * 7, [False] * 7])

    def several(q, k, v, mask):
        return (
            attend(q, k, v)
            + attend(q, k, v, mask)
            + attend(q, k, v, mask, causal=True)
            + attend(q, k, v, backend="flash")
            + attend(q, k, v, backend="math")
        )

    compiled = torch.compile(several, backend=counter, fullgraph=True)
    assert torch.equal(compiled(q, k, v, mask), several(q, k, v, mask))
    compiled(q, k, v, mask)
    assert counter.frame_count == 1
    torch._dynamo.reset()
    compiled = torch.compile(several, backend=compiler, fullgraph=True)
    out, expected = compiled(q, k, v, mask), several(q, k, v, mask)
    assert (out - expected).abs().max() < 1e-6
    for got, want in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        assert (got - want).abs().max() < 1e-5


def test_a_backend_forced_after_compiling_is_noticed():
    counter = CompileCounter()
    q, k, v = qkv()
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    compiled(q, k, v)
    with use_backend("math"):
        compiled(q, k, v)
    compiled(q, k, v)
    assert counter.frame_count == 2


def test_the_choice_for_cuda_traces_as_a_constant(monkeypatch):
    """No CUDA here: the facts of a Hopper card are put in, and the tensors' device is taken for one."""

    from vdiff.attention import dot_product as module

    monkeypatch.setattr(module, "_cached_device_facts", lambda device: ((9, 0), 91900))

    def chosen(q, k, v):
        return q * len(module._choose(q, k, v, None, False, "flash"))

    q, k, v = qkv(5, 5)
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(q, k, v), q * 5)


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "xformers"])
def test_cuda_backends_are_refused_on_the_cpu(backend):
    with pytest.raises(ValueError, match=f"'{backend}' runs on CUDA only"):
        attend(*qkv(), backend=backend)


def test_unknown_backends_and_wrong_shapes_are_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="no backend is called 'fa9'.*sdpa"):
        attend(q, k, v, backend="fa9")
    with pytest.raises(ValueError, match="no backend is called"), use_backend("fa9"):
        pass
    with pytest.raises(ValueError, match=r"expected q \(B, Q, H, D\).*\(2, 5, 3, 8\)"):
        attend(q, k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match=r"a mask is \(B, K\).*\(2, 7\).*got \(5, 7\)"):
        attend(q, k, v, torch.ones(5, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="not torch.int64"):
        attend(q, k, v, torch.ones(2, 7, dtype=torch.int64))


def test_xformers_gets_its_layout_and_an_aligned_bias(monkeypatch):
    """A stand-in for its kernel, which checks what it is given and computes the formula."""
    seen = {}

    def kernel(q, k, v, attn_bias=None, scale=None):
        seen["bias"] = attn_bias
        return attend(q, k, v, attn_bias, scale=scale, backend="math")

    fake = types.SimpleNamespace(memory_efficient_attention=kernel, LowerTriangularMask=lambda: None)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(sys.modules["vdiff.attention.dot_product"], "_choose", lambda *call: "xformers")
    q, k, v = qkv()
    mask = draw(2, 7, seed=3) > 0
    assert (attend(q, k, v, mask, backend="xformers") - attend(q, k, v, mask, backend="math")).abs().max() < 1e-6
    assert seen["bias"].shape == (2, 3, 5, 7) and seen["bias"].stride(0) % 8 == 0


def test_xformers_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(sys.modules["vdiff.attention.dot_product"], "_choose", lambda *call: "xformers")
    with pytest.raises(ImportError, match="pip install xformers"):
        attend(*qkv(), backend="xformers")


@pytest.mark.slow
def test_importing_the_room_imports_no_xformers():
    code = "import sys, vdiff.attention; assert not [m for m in sys.modules if m.startswith('xformers')]"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the CUDA kernels")
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_kernels_are_the_formula(backend, masked):
    if backend == "flash" and masked:
        pytest.skip("flash takes no mask")
    q, k, v = (x.cuda().requires_grad_() for x in qkv(130, 77, dtype=torch.bfloat16, dim=64))
    mask = (torch.arange(77, device="cuda") < torch.tensor([[50], [0]], device="cuda")) if masked else None
    results = []
    for name in (backend, "math"):
        out = attend(q, k, v, mask, backend=name)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        assert (got - want).float().norm() <= 0.02 * want.float().norm()
