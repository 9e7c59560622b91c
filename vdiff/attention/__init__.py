"""One function, ``attend(q, k, v)``, and the fused kernels behind it."""

from vdiff.attention.choice import BACKENDS, AttentionCall, Backend, choose, refusal
from vdiff.attention.dot_product import attend, use_backend

__all__ = ["BACKENDS", "AttentionCall", "Backend", "attend", "choose", "refusal", "use_backend"]
