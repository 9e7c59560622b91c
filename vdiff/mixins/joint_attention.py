"""Joint attention: rows of a batch that look at each other."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On, Part, expand_partners
from vdiff.mixins.base import Mixin
from vdiff.process import spread

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class JointAttention(Mixin):
    r"""Every row attends to its partner as well as to itself.

    :math:`h = \mathrm{attn}(x) + s\,P\,\mathrm{attn}(x, \mathrm{context} = x_{partner})`, with the host's own
    projections for both and a trained ``P`` that starts at zero, so that attaching changes nothing. Who is
    whose partner is said per call, ``Conditioning.partners``; rows without one, and calls without any, are
    as before. Other mixins on the host's projections act on both terms.

    Args:
        on: Modules called as ``module(x)`` that also take ``context=``, with ``x`` of shape ``(rows, n, c)`` where
            their last layer is linear, ``(rows, c, ...)`` where it is a convolution.
        width: The c of their output; by default read from that layer.
        name, scale: See :class:`Mixin`.

    References:
        Li et al., arXiv:2410.11439, here without a second copy of the attention weights.
    """

    def __init__(
        self, on: On = "role:self_attention", width: int | None = None, name: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(on, name, scale)
        self.width = width

    def part(self, module: nn.Module, site: str) -> JointAttentionPart:
        layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
        if not layers:
            raise ValueError(
                f"JointAttention: {site!r} ({type(module).__name__}) has neither linear layer nor convolution."
            )
        last = layers[-1]
        if isinstance(last, nn.Linear):
            return JointAttentionPart(self.width or last.out_features, channel_axis=-1)
        return JointAttentionPart(self.width or last.out_channels, channel_axis=1)


class JointAttentionPart(Part):
    """The projection ``P`` of what a row's partner has to say."""

    def __init__(self, width: int, channel_axis: int = -1) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.project = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.project.weight)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.partners is None:
            return output
        x, rest = _arguments(module, args, kwargs)
        partners = expand_partners(self.partners, len(x))
        told = x[partners.clamp(min=0)]
        joint = module.forward(x, context=told, **rest)  # not called: this part stays out of it
        joint = F.linear(joint.movedim(self.channel_axis, -1), self.project.weight.to(joint.dtype))
        joint = joint.movedim(-1, self.channel_axis)
        has_partner = spread(partners >= 0, joint)
        return output + (joint * self.amount(joint)).masked_fill(~has_partner, 0).to(output.dtype)


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The input, and keywords other than the context; self-attention has none."""
    rest = {name: value for name, value in kwargs.items() if value is not None and name != "x"}
    if any(value is not None for value in args[1:]) or any(name in rest for name in ("context", "mask")):
        raise ValueError(
            f"JointAttention: a {type(module).__name__} was called with a context or a mask. "
            "It goes on self-attention without masks; narrow `on`."
        )
    return (args[0] if args else kwargs["x"]), rest
