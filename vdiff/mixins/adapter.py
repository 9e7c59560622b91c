r"""Adapters: small networks that read at one place of a block and write at another.

:math:`\delta = s\,U(\mathrm{act}(D\,h))` for tokens, with convolutions for feature maps; ``U`` begins at zero. Where
an adapter reads and where it writes are the two choices that the placement study (Xiang et al., arXiv:2303.18181)
separates, and a place is spelt as there, ``<reads>-<writes>``:

- tokens: ``attn1i``, ``attn2i``, ``ffni`` are the residual stream in front of self-attention, cross-attention and
  feed-forward, ``attn1o``, ``attn2o``, ``ffno`` what these say before it is added, ``transo`` the stream behind the
  block, ``attn2c`` the context;
- feature maps: ``resi`` and ``reso`` in front of and behind a residual block;
- two more to read from: ``ffnm`` the hidden layer of the feed-forward, ``resm`` what the first convolution says.

Or as a form and a layer, ``<form>-<layer>``: ``sequential`` reads what the layer says, ``parallel`` what it is given,
and both write behind it; ``cross`` writes behind the layer that follows the one it reads from (in a layer of several
parts: that follow the first of them).
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from vdiff.hooks import On
from vdiff.mixins.adapter_parts import ACTIVATIONS, READS, STREAM, AdapterPart, ResAdapterPart, TokenAdapterPart
from vdiff.mixins.base import Mixin

FORMS = {
    "sequential": {
        "attn1": "attn1o-attn2i", "attn2": "attn2o-ffni", "ffn": "ffno-transo", "res": "reso-reso",
        "whole": "transo-transo",
    },
    "parallel": {
        "attn1": "attn1i-attn2i", "attn2": "attn2i-ffni", "ffn": "ffni-transo", "res": "resi-reso",
        "whole": "attn1i-transo",
    },
    "cross": {
        "attn1": "attn1o-ffni", "attn2": "attn2o-transo", "ffn": "ffnm-transo", "res": "resm-reso",
        "whole": "attn1o-transo",
    },
}  # fmt: skip


class Adapter(Mixin):
    """An adapter in every transformer block or residual block.

    Of networks of videos those are the blocks over pixels, with all frames as rows; an adapter along time is one on
    ``role:temporal_transformer_block``.

    Args:
        place: Where it reads and writes: ``attn2o-ffni``, the study's best, or a form and a layer
            (``parallel-ffn``); see the module's text.
        width: Of the hidden layer (the study's mid dimension: 60 for tokens, 7 for feature maps).
        activation: Between the two layers.
        learn_scale: Train a factor on what is added, from 1.
        match: Widths always fit; where numbers of tokens or pixels differ between what is read and where it is
            written (a residual block that resamples): ``refuse``, or ``interpolate``.
        init: ``zero`` changes nothing at first; ``default`` is torch's, as the study's own code has it.
        on: Blocks whose parts are called ``attn1``, ``attn2`` and ``ff``, each with a normalisation in front, numbered
            in their order; or residual blocks. By default all of that role.
        name, scale: See :class:`Mixin`.

    References:
        Xiang et al., arXiv:2303.18181, section 4; Houlsby et al., arXiv:1902.00751 (sequential); He et al.,
        arXiv:2110.04366 (parallel).
    """

    def __init__(
        self,
        place: str = "attn2o-ffni",
        width: int = 60,
        activation: Literal["relu", "gelu", "silu", "sigmoid", "identity"] = "relu",
        learn_scale: bool = False,
        match: Literal["refuse", "interpolate"] = "refuse",
        init: Literal["zero", "default"] = "zero",
        on: On | None = None,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        self.reads, self.writes = _placed(place)
        is_res = self.reads.startswith("res")
        super().__init__(on if on is not None else f"role:{'res' if is_res else 'transformer'}_block", name, scale)
        if width < 1:
            raise ValueError(f"Adapter: width must be positive, got {width}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Adapter: no activation is called {activation!r}. Known: {', '.join(ACTIVATIONS)}.")
        self.place, self.width, self.activation = place, width, activation
        self.learn_scale, self.match, self.init = learn_scale, match, init

    def part(self, module: nn.Module, site: str) -> AdapterPart:
        kind = ResAdapterPart if self.reads.startswith("res") else TokenAdapterPart
        return kind(self, module, f"Adapter: {site!r} ({type(module).__name__})")


def _placed(place: str) -> tuple[str, str]:
    first, _, second = place.partition("-")
    if first in FORMS:
        if second not in FORMS[first]:
            raise ValueError(f"Adapter: no layer is called {second!r} in {place!r}. Known: {', '.join(FORMS[first])}.")
        first, _, second = FORMS[first][second].partition("-")
    if (first, second) == ("attn2c", "attn2c") or (first in ("resi", "resm", "reso") and second == "reso"):
        return first, second
    if (first, second) == ("resi", "resi"):
        return first, second
    if first not in READS or second not in STREAM:
        raise ValueError(
            f"Adapter: a place is <form>-<layer>, of {', '.join(FORMS)} and {', '.join(FORMS['cross'])}, or "
            f"<reads>-<writes>, of {', '.join(READS)} and {', '.join(STREAM)}; attn2c-attn2c; resi, resm, reso and "
            f"resi, reso; got {place!r}."
        )
    if READS.index(first) > STREAM[second]:
        raise ValueError(f"Adapter: {place!r} would write in front of what it reads.")
    return first, second
