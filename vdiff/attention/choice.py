"""Which kernel attends: a pure function of what is known before the call.

On CUDA torch tries its kernels in an order, and where none fits falls back to one that writes the
whole ``(B, H, Q, K)`` matrix, which is many times slower and runs out of memory. That must not happen
in silence, so the rules of the fused kernels stand here in the open: :func:`refusal` says why a kernel
cannot take a call, and :func:`choose` names the one that will, or raises.

The rules are those of torch 2.11 to 2.14; a test on a GPU compares them with torch's own answer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch

Backend = Literal["sdpa", "cudnn", "flash", "efficient", "xformers", "math"]
BACKENDS: tuple[str, ...] = get_args(Backend)

HALF = (torch.float16, torch.bfloat16)
CUDNN_DIM_LIMIT = 65535
CUDNN_PREFERRED_AFTER = 91500  # cuDNN 9.15 and older err where a length is no multiple of 128


class AttentionCall(NamedTuple):
    """What is known of ``attend(q, k, v)``: q ``(B, Q, H, D)``, k ``(B, K, H, D)``, v ``(B, K, H, E)``.

    A named tuple and no dataclass, because one is made and hashed at every attention call on CUDA.

    Attributes:
        value_dim: E above; None where it is D.
        mask: Whether there is one.
        grad: Whether anything will be differentiated.
        capability: The CUDA device's, (9, 0) for Hopper.
        cudnn: Version of cuDNN as a number, 91900 for 9.19.
        deterministic: Whether torch is told to use deterministic algorithms only.
    """

    device_type: str
    dtype: torch.dtype
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    mask: bool = False
    causal: bool = False
    grad: bool = False
    capability: tuple[int, int] = (9, 0)
    cudnn: int = 91900
    deterministic: bool = False


@lru_cache(maxsize=4096)
def choose(call: AttentionCall, forced: str | None = None) -> str:
    """The backend that will take a call.

    On CUDA that is the fused kernel which torch tries first among those that fit (``cudnn`` comes
    first on Hopper and data-centre Blackwell); on other devices ``sdpa``,
    meaning torch's own choice.

    Args:
        forced: A backend that the caller insists on; ``sdpa`` or None insists on nothing.

    Raises:
        ValueError: the forced backend cannot take the call, or no fused kernel can on CUDA; each
            with its reason.
    """
    if forced not in (None, *BACKENDS):
        raise ValueError(f"attend: no backend is called {forced!r}. Known: {', '.join(BACKENDS)}.")
    if forced not in (None, "sdpa"):
        reason = refusal(forced, call)
        if reason is not None:
            raise ValueError(f"attend: backend {forced!r} {reason}. Backend 'sdpa' leaves the choice to torch.")
        return forced
    if call.device_type != "cuda":
        return "sdpa"
    for kernel in order(call):
        if refusal(kernel, call) is None:
            return kernel
    reasons = "; ".join(f"{kernel} {refusal(kernel, call)}" for kernel in order(call))
    raise ValueError(
        f"attend: no fused kernel takes this call on CUDA, and the plain one is slow and needs the whole "
        f"{call.q_len} x {call.k_len} matrix per head, so it is not used unasked: {reasons}. Change the head "
        "dimension or dtype, or ask for it: with use_backend('math')."
    )


def order(call: AttentionCall) -> tuple[str, ...]:
    """The fused kernels as torch tries them. Where cuDNN is not preferred it comes after the plain one: never."""
    if call.capability[0] in (9, 10) and call.cudnn > CUDNN_PREFERRED_AFTER:
        return ("cudnn", "flash", "efficient")
    return ("flash", "efficient")


def refusal(backend: str, call: AttentionCall) -> str | None:
    """Why a backend cannot take a call, as the end of a sentence, or None where it can."""
    if backend in ("sdpa", "math"):
        return None
    if call.device_type != "cuda":
        # torch has a flash kernel for the CPU as well, which knows its own limits.
        return None if backend == "flash" and call.device_type == "cpu" else "runs on CUDA only"
    if not (call.q_len and call.k_len):
        return "takes no empty sequence"
    return {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "xformers": _xformers}[backend](call)


def _cudnn(call: AttentionCall) -> str | None:
    hopper = call.capability == (9, 0) or call.capability[0] == 10
    value_dim = call.value_dim or call.head_dim
    limit = 192 if (hopper and call.cudnn >= 91100 and (call.head_dim, value_dim) == (192, 128)) else 128
    if reason := _half(call):
        return reason
    if call.cudnn < 90000:
        return f"needs cuDNN 9, here is {call.cudnn}"
    if call.deterministic:
        return "is not deterministic, which torch is told to be"
    if max(call.head_dim, value_dim) > limit:
        return f"takes head dimensions up to {limit}, not {max(call.head_dim, value_dim)}"
    if call.head_dim % 8 or value_dim % 8:
        return f"takes head dimensions that are multiples of 8, not {call.head_dim}"
    if call.k_len == 1:
        return "takes no single key"
    if max(call.batch, call.heads) > CUDNN_DIM_LIMIT:
        return f"takes at most {CUDNN_DIM_LIMIT} rows and heads, not {max(call.batch, call.heads)}"
    return None


def _flash(call: AttentionCall) -> str | None:
    if call.capability < (8, 0):
        return f"needs compute capability 8.0, here is {call.capability[0]}.{call.capability[1]}"
    if reason := _half(call):
        return reason
    if call.mask:
        return "takes no mask"
    if call.value_dim not in (None, call.head_dim):
        return f"takes values as long as keys, not {call.value_dim} for {call.head_dim}"
    if call.head_dim > 256:
        return f"takes head dimensions up to 256, not {call.head_dim}"
    consumer = (8, 6) <= call.capability <= (8, 9) or call.capability[0] == 12
    if call.grad and consumer and 192 < call.head_dim <= 224:
        return f"cannot differentiate head dimension {call.head_dim} on this device"
    if call.causal and call.q_len != call.k_len:
        return "takes causal attention over equal lengths only"
    return None


def _efficient(call: AttentionCall) -> str | None:
    tensor_cores = call.capability >= (8, 0)
    if call.dtype not in (torch.float32, torch.float16) and not (tensor_cores and call.dtype is torch.bfloat16):
        return f"takes float32, float16 and (from compute capability 8.0) bfloat16, not {call.dtype}"
    half = call.dtype in HALF
    multiple = (8 if half else 4) if tensor_cores else (8 if half and call.capability >= (7, 0) else 1)
    value_dim = call.value_dim or call.head_dim
    if call.head_dim % multiple or value_dim % multiple:
        return f"takes head dimensions that are multiples of {multiple} in {call.dtype}, not {call.head_dim}"
    return None


def _xformers(call: AttentionCall) -> str | None:
    if call.dtype is torch.float64:
        return "takes no float64"
    return None


def _half(call: AttentionCall) -> str | None:
    if call.dtype is torch.float16 or (call.dtype is torch.bfloat16 and call.capability >= (8, 0)):
        return None
    return f"takes float16 and (from compute capability 8.0) bfloat16, not {call.dtype}"
