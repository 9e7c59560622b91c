r"""Scaled dot-product attention: :math:`\mathrm{softmax}(s\, q k^\top)\, v`, arXiv:1706.03762, eq. 1.

Sequences come as projections leave them, ``(B, S, H, D)``, and torch's kernels see transposed views:
nothing is copied on the way in or out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdiff.attention.choice import BACKENDS, AttentionCall, choose

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_forced: list[str] = []  # written by use_backend only; the innermost is last


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every :func:`attend` inside uses this backend, whatever its caller or config says.

    With gradient checkpointing the backward pass attends again: enclose it as well, or torch reports
    that the recomputed tensors differ.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: no backend is called {name!r}. Known: {', '.join(BACKENDS)}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of queries ``(B, Q, H, D)`` to keys ``(B, K, H, D)`` and values ``(B, K, H, E)``.

    Args:
        mask: Which keys count: ``(B, K)`` for all queries of a row alike, or anything that broadcasts
            to ``(B, H, Q, K)`` with four axes. Boolean, True attends; or floating, added to the logits.
        causal: Query i attends to no key after its own. With unequal lengths the ends are aligned, so
            that the last query sees every key: query i sees keys up to ``i + K - Q``.
        scale: The factor on the logits, by default ``D ** -0.5``.
        backend: One of :data:`BACKENDS`; None and ``sdpa`` leave the choice to torch, but never let
            it fall back to the plain kernel on CUDA. :func:`use_backend` overrides it.

    Returns:
        ``(B, Q, H, E)``. A query that may attend to nothing gets zeros, and so do its gradients.

    Raises:
        ValueError: shapes that do not fit, or a call that the backend, or no fused kernel, can take.
        ImportError: xformers is asked for and not installed.
    """
    _check_shapes(q, k, v)
    backend = _forced[-1] if _forced else backend or "sdpa"
    sees = None
    if mask is not None or (causal and q.shape[1] != k.shape[1]):
        mask, sees = _one_mask(mask, causal, q, k)
        causal = False
    if backend == "math":
        out = _math(q, k, v, mask, causal, scale)
    else:
        if backend != "sdpa" or q.device.type == "cuda":
            _choose(q, k, v, mask, causal, backend)
        out = (
            _xformers(q, k, v, mask, causal, scale)
            if backend == "xformers"
            else _torch(q, k, v, mask, causal, scale, backend)
        )
    return out if sees is None else out.masked_fill(~sees.transpose(1, 2), 0)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, backend: str
) -> Tensor:
    q, k, v = (x.transpose(1, 2) if x.stride(-1) == 1 else x.contiguous().transpose(1, 2) for x in (q, k, v))
    if backend == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    else:
        with sdpa_kernel(_KERNELS[backend]):
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The formula itself, in float32 at least: what the others are compared with."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype)) * factor
    if causal:
        logits = logits.masked_fill(~_causal(q, k), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.to(dtype)).to(v.dtype)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            "attend: backend 'xformers' needs xformers (Linux): pip install xformers. "
            "Backend 'sdpa' needs nothing and is as fast on current devices."
        ) from error
    bias = LowerTriangularMask() if causal else None
    if mask is not None:
        # Its kernels want a bias of all four axes whose rows begin at multiples of eight numbers.
        B, Q, H, K = *q.shape[:3], k.shape[1]
        bias = q.new_zeros(*mask.shape[:3], -(-K // 8) * 8)[..., :K]
        bias = bias.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else bias.copy_(mask)
        bias = bias.expand(B, H, Q, K)
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


def _one_mask(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """All restrictions as one mask of four axes, and which queries see anything, ``(B, H, Q, 1)``; None if all do.

    Kernels disagree about queries that see nothing, some say NaN. So here such a query sees every
    key, and the caller puts zeros in place of what comes of it.
    """
    if mask is None:
        merged = _causal(q, k)[None, None]
        if q.shape[1] <= k.shape[1]:
            return merged, None
    else:
        merged = _four_axes(mask, q, k)
        if causal:
            after = ~_causal(q, k)
            merged = merged & ~after if merged.dtype is torch.bool else merged.masked_fill(after, -torch.inf)
    if merged.dtype is torch.bool:
        sees = merged.any(-1, keepdim=True)
        return merged | ~sees, sees
    sees = (merged > -torch.inf).any(-1, keepdim=True)
    return merged.masked_fill(~sees, 0).to(q.dtype), sees


def _four_axes(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    four = mask[:, None, None] if mask.ndim == 2 else mask
    if four.ndim != 4 or any(n not in (1, size) for n, size in zip(four.shape, full, strict=True)):
        raise ValueError(
            f"attend: a mask is (B, K) or broadcasts to (B, H, Q, K), here {(full[0], full[3])} or {full}; "
            f"got {tuple(mask.shape)}."
        )
    if not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attend: a mask is boolean (True attends) or floating (added to the logits), not {mask.dtype}."
        )
    return four


def _causal(q: Tensor, k: Tensor) -> Tensor:
    Q, K = q.shape[1], k.shape[1]
    return torch.ones(Q, K, dtype=torch.bool, device=q.device).tril(K - Q)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3])
    ):
        raise ValueError(
            "attend: expected q (B, Q, H, D), k (B, K, H, D) and v (B, K, H, E), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, backend: str) -> str:
    kind = q.device.type
    capability, cudnn = _device_facts(q.device)
    call = AttentionCall(
        device_type=kind,
        dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype,
        q_len=q.shape[1],
        k_len=k.shape[1],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        batch=q.shape[0],
        heads=q.shape[2],
        mask=mask is not None,
        causal=causal,
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        capability=capability,
        cudnn=cudnn,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Under a compiler the choice is made once, while tracing, where a cache is no help.
    return choose.__wrapped__(call, backend) if torch.compiler.is_compiling() else choose(call, backend)


@torch.compiler.assume_constant_result
def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and cuDNN version."""
    return _cached_device_facts(device)


@lru_cache
def _cached_device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    if device.type != "cuda":
        return (0, 0), 0
    return torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0
