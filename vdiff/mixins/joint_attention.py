"""Joint attention: rows of a batch that look at each other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On, Part, bringer, expand_partners, parts, within
from vdiff.mixins.base import Mixin
from vdiff.process import spread

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTEXTS = ("context", "encoder_hidden_states")  # what attention calls the sequence that it attends to


class JointAttention(Mixin):
    r"""Every row attends to its partner as well as to itself.

    :math:`h_i = \mathrm{attn}(x_i) + s\,P\,\mathrm{attn}(q(x_i), k(x_j), v(x_j))` with j the partner of i, the host's
    own projections for both terms and a trained ``P`` that starts at zero, so that attaching changes nothing. Who is
    whose partner is said per call, ``Conditioning.partners``; rows without one, and calls without any, are as before.
    With P partners per row, ``(B, P)``, their terms are added. The mixin's gate weighs the term row by row, ``(B,)``,
    or partner by partner, ``(B, P)``.

    Partners are whole samples. Of a video in a UNet each frame looks at the same frame of its partner, and layers over
    time are left alone; in transformers over all frames every token looks at all of the partner's.

    Other mixins on the host's projections act on both terms, each row's tokens under that row's gates: a LoRA that is
    gated to the second stream changes its queries, and its keys and values wherever they are looked at. Those in
    ``own`` act on the joint term alone, and no others do there.

    Args:
        on: Self-attention, called as ``module(x)``, with ``x`` of shape ``(rows, n, c)`` where its last layer is linear
            and ``(rows, c, ...)`` where it is a convolution. Its ``forward`` takes ``partners``, as this library's do;
            or ``context`` or ``encoder_hidden_states``, and then mixins on its layers take no gates.
        post: What ``P`` sees. ``conv``: what the row was told, c to c. ``conv_fuse``: what both partners were told,
            the one that stands first in the batch first, 2c to 2c; for one partner per row.
        own: Names of mixins, attached before, that make up the joint term: LoRAs of the pair.
        width: The c of the host's output; by default read from its last layer.
        name, scale: See :class:`Mixin`.

    References:
        Li et al., arXiv:2410.11439, here without a second copy of the attention weights.
    """

    def __init__(
        self,
        on: On = "role:self_attention",
        post: Literal["conv", "conv_fuse"] = "conv",
        own: Sequence[str] = (),
        width: int | None = None,
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if post not in ("conv", "conv_fuse"):
            raise ValueError(f"JointAttention: post must be 'conv' or 'conv_fuse', got {post!r}.")
        self.post, self.own, self.width = post, list(own), width
        self._owned: list[Part] = []

    def part(self, module: nn.Module, site: str) -> JointAttentionPart:
        layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
        if not layers:
            raise ValueError(
                f"JointAttention: {site!r} ({type(module).__name__}) has neither linear layer nor convolution."
            )
        last = layers[-1]
        width, axis = (last.out_features, -1) if isinstance(last, nn.Linear) else (last.out_channels, 1)
        return JointAttentionPart(self.width or width, axis, self.post, bool(self.own), _names(module, site))

    def attach(self, root: nn.Module, name: str | None = None) -> Self:
        """See :meth:`Mixin.attach`.

        Raises:
            ValueError: also, a mixin in ``own`` that is not attached yet, or sits elsewhere besides.
        """
        super().attach(root, name)
        there = parts(root)
        known = {part.mixin_name for part in there}
        if missing := [one for one in self.own if one not in known or one == self.name]:
            self.detach()
            raise ValueError(
                f"JointAttention: own names {missing[0]!r}, and no mixin of that name is attached. Attach it before "
                f"{self.name!r}. Attached: {', '.join(sorted(known - {self.name})) or 'none'}."
            )
        self._owned = [part for part in there if part.mixin_name in self.own]
        inside = {part for module, _ in self._sites.values() for part in parts(module)}
        if idle := next((part.mixin_name for part in self._owned if part not in inside), None):
            self._owned = []
            self.detach()
            raise ValueError(
                f"JointAttention: {idle!r} is to act in the joint term alone, and sits outside of {self.name!r} too, "
                "where it would never act. Narrow its `on` to layers of the attention that is joined."
            )
        for part in self._owned:
            part.term = self.name
        return self

    def detach(self) -> None:
        """See :meth:`Mixin.detach`; those in ``own`` then act wherever their host is called, as before."""
        super().detach()
        for part in self._owned:
            part.term = ""
        self._owned = []


class JointAttentionPart(Part):
    """The projection ``P`` of what a row was told by its partner.

    Args:
        width: c.
        channel_axis: Of the host's output.
        post: See :class:`JointAttention`.
        has_own: Whether the joint term has mixins of its own.
        names: Of the arguments of the host's ``forward``.
    """

    weighs_partners = True

    def __init__(
        self,
        width: int,
        channel_axis: int = -1,
        post: str = "conv",
        has_own: bool = False,
        names: Sequence[str] = ("x", "context", "mask", "partners"),
    ) -> None:
        super().__init__()
        self.channel_axis, self.post, self.has_own = channel_axis, post, has_own
        self.names = list(names)
        total = width if post == "conv" else 2 * width
        self.project = nn.Linear(total, total, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.project.weight)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if self.partners is None:
            return output
        x, rest = self._arguments(module, args, kwargs)
        partners = expand_partners(self.partners, len(x))
        if partners.ndim == 1:
            partners = partners[:, None]
        if self.post == "conv_fuse" and partners.shape[1] > 1:
            raise ValueError("JointAttention: post='conv_fuse' is for pairs; it takes one partner per row, (B,).")
        for place, partner in enumerate(partners.unbind(1)):
            told = self._told(module, x, partner.clamp(min=0), rest).movedim(self.channel_axis, -1)
            is_alone = spread(partner < 0, told)
            told = self._projected(told.masked_fill(is_alone, 0), partner)
            # Nothing comes from another row to one that is alone, whatever that row holds.
            told = (told * self.amount(told, place)).masked_fill(is_alone, 0).movedim(-1, self.channel_axis)
            output = output + told.to(output.dtype)
        return output

    def _told(self, module: nn.Module, x: Tensor, partner: Tensor, rest: dict[str, Any]) -> Tensor:
        """What each row is told by its partner, before ``P``. The host's forward: this part stays out of it."""
        with within(module, self.mixin_name) if self.has_own else nullcontext():
            if "partners" in self.names:
                return module.forward(x, partners=partner, **rest)
            if any(part.gate is not None for part in parts(module) if part is not self and part.enabled):
                raise ValueError(
                    f"JointAttention: a {type(module).__name__} cannot be asked for the keys of another row, so mixins "
                    "on its layers would change the partner's tokens by the gate of the row that looks. Give its "
                    "forward an argument `partners` (see CrossAttention), or leave the gates of those mixins away."
                )
            context = next(name for name in CONTEXTS if name in self.names)
            return module.forward(x, **{context: x[partner]}, **rest)

    def _projected(self, told: Tensor, partner: Tensor) -> Tensor:
        weight = self.project.weight.to(told.dtype)
        if self.post == "conv":
            return F.linear(told, weight)
        is_first = spread(torch.arange(len(told), device=told.device) < partner, told)
        other = told[partner.clamp(min=0)]
        pair = torch.cat([torch.where(is_first, told, other), torch.where(is_first, other, told)], dim=-1)
        first, second = F.linear(pair, weight).chunk(2, dim=-1)
        return torch.where(is_first, first, second)

    def _arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The input, and the other arguments by name; self-attention has no context."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = given.pop(self.names[0])
        rest = {name: value for name, value in given.items() if value is not None}
        refused = (*CONTEXTS, "partners") if "partners" in self.names else (*CONTEXTS, "mask", "attention_mask")
        if name := next((name for name in rest if name in refused), None):
            if other := bringer(module, name):
                raise ValueError(
                    f"JointAttention: {other!r}, attached to the same {type(module).__name__}, brings a {name} of its "
                    "own, and then no partner can be looked at. Call without its gate or without partners, or narrow "
                    "`on` of one of them."
                )
            raise ValueError(
                f"JointAttention: a {type(module).__name__} was called with {name!r}. It goes on self-attention"
                f"{'' if 'partners' in self.names else ' without masks'}; narrow `on`."
            )
        return x, rest

    def extra_repr(self) -> str:
        return self.post


def _names(module: nn.Module, site: str) -> list[str]:
    """The arguments of a module's forward.

    Raises:
        ValueError: it can attend to nothing but its input.
    """
    names = list(inspect.signature(module.forward).parameters)
    if not any(name in names for name in ("partners", *CONTEXTS)):
        raise ValueError(
            f"JointAttention: {site!r} ({type(module).__name__}) cannot attend to anything but its input: its forward "
            f"takes {', '.join(names) or 'nothing'}, and neither partners nor {' nor '.join(CONTEXTS)}. Narrow `on`."
        )
    return names
