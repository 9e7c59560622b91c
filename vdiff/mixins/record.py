"""Recording: what modules say, or where attention looks, kept for a look at it; nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.checkpoints import save_weights
from vdiff.hooks import On, Part
from vdiff.hooks.witness import in_backward
from vdiff.mixins.base import Mixin
from vdiff.networks.transformer import repeated


class Record(Mixin):
    """Keeps activations or attention maps of every site, in memory, and writes them to a file.

    Rows are those that the site sees: of a video often one for each frame, ``(b f)``, or for each pixel, ``(b h w)``.
    They are copies without gradient, on the device where they were made: recording waits for nothing. Recomputation
    in backward is not recorded.

    Args:
        what: ``output``, ``input`` (the first argument), or ``attention``: maps ``(B, heads, Q, K)`` whose rows sum to
            1, of modules with ``to_q`` and ``to_k`` that make one softmax of their products.
        keep: The ``last`` of all calls, or ``all`` of them in order (not compiled: each would be another graph).
        on: Modules that return one tensor.
        name: See :class:`Mixin`.
    """

    def __init__(
        self,
        what: Literal["output", "input", "attention"] = "output",
        keep: Literal["last", "all"] = "last",
        on: On = "role:transformer_block",
        name: str | None = None,
    ) -> None:
        super().__init__(on, name)
        if what not in ("output", "input", "attention") or keep not in ("last", "all"):
            raise ValueError(f"Record: what is output, input or attention, keep last or all; got {what!r}, {keep!r}.")
        self.what, self.keep = what, keep

    def part(self, module: nn.Module, site: str) -> RecordPart:
        if self.what == "attention" and not (hasattr(module, "to_q") and hasattr(module, "to_k")):
            raise ValueError(f"Record: {site!r} ({type(module).__name__}) has no to_q and to_k to make maps of.")
        if self.what == "attention" and (hasattr(module, "to_k_ip") or getattr(module, "max_distance", None)):
            also = "a picture beside the text" if hasattr(module, "to_k_ip") else "distances as well"
            raise ValueError(f"Record: {site!r} ({type(module).__name__}) attends to {also}, which is no one map.")
        return RecordPart(self.what, self.keep)

    @property
    def values(self) -> dict[str, list[Tensor]]:
        """By site, in the order of calls; sites that were not called are not there."""
        found = {site: part.kept() for site, (_, part) in self._sites.items() if isinstance(part, RecordPart)}
        return {site: kept for site, kept in found.items() if kept}

    def last(self) -> dict[str, Tensor]:
        """By site, what was recorded last."""
        return {site: kept[-1] for site, kept in self.values.items()}

    def clear(self) -> None:
        for _, part in self._sites.values():
            assert isinstance(part, RecordPart)
            part.kept().clear()
            part.tape = Tape()

    def write(self, file: str | Path) -> None:
        """As one safetensors file: ``<site>`` for a single recording, ``<site>.<i>`` for several."""
        tensors = {}
        for site, kept in self.values.items():
            names = [site or "itself"] if self.keep == "last" else [f"{site or 'itself'}.{i}" for i in range(len(kept))]
            tensors |= dict(zip(names, kept, strict=True))
        if not tensors:
            raise ValueError(f"Record: {self.name!r} has recorded nothing; call the network first.")
        save_weights(file, tensors, {"what": self.what})


class Tape:
    """What was recorded; an object of its own, that a compiled call writes to and never reads."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.all: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"last": None, "all": []}  # a copy has recorded nothing yet


class RecordPart(Part):
    def __init__(self, what: str, keep: str) -> None:
        super().__init__()
        self.what, self.keep, self.tape = what, keep, Tape()

    def kept(self) -> list[Tensor]:
        return self.tape.all if self.keep == "all" or self.tape.last is None else [self.tape.last]

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:  # noqa: ANN401
        if not torch.compiler.is_compiling() and in_backward():
            return output
        first = args[0] if args else next(iter(kwargs.values()))
        value = output if self.what == "output" else first
        if self.what == "attention":
            with torch.no_grad():
                value = attention_map(module, first, args, kwargs)
        if not isinstance(value, Tensor):
            raise ValueError(f"Record: a {type(module).__name__} has a {type(value).__name__} to record, not a tensor.")
        if self.keep == "all":
            self.tape.all.append(value.detach().clone())
        else:
            self.tape.last = value.detach().clone()
        return output


def attention_map(module: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """``(B, heads, Q, K)`` in float32: what the module's softmax gives, computed again."""
    context = args[1] if len(args) > 1 else kwargs.get("context")
    mask = args[2] if len(args) > 2 else kwargs.get("mask")
    heads = (module.num_heads, -1)
    q = module.to_q(x).unflatten(-1, heads)
    k = repeated(module.to_k(x if context is None else context), len(x)).unflatten(-1, heads)
    if hasattr(module, "norm_q"):
        q, k = module.norm_q(q), module.norm_k(k)
    if (turns := args[3] if len(args) > 3 else kwargs.get("rotations")) is not None:
        from vdiff.networks.positions import rotate

        q, k = rotate(q, turns), rotate(k, turns)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    if getattr(module, "is_causal", False):
        logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        mask = repeated(mask, len(x))
        logits = logits.masked_fill(~(mask[:, None, None] if mask.ndim == 2 else mask), -torch.inf)
    return logits.softmax(-1)
