"""What every network promises.

A network is an ordinary module for one device. It takes the noise number as given and knows nothing of
schedules, configs or ranks. It and modules inside it may carry an attribute ``role``, by which a mixin finds
them whatever their names are:

- ``self_attention``, ``cross_attention``, ``feed_forward``, ``transformer_block``, ``res_block``: of pictures, each
  frame of a video being one, or of all tokens of a sequence;
- ``temporal_self_attention``, ``temporal_cross_attention``, ``temporal_transformer_block``, ``temporal_res_block``,
  ``temporal_convolution``: along the frames, or the views, of a pixel;
- ``unet``: a network of ``input_blocks``, ``middle_block`` and ``output_blocks``, the last called with the stream and
  a skip as one, ``(B, C, H, W)``; frames are rows ``(b f)``.

A module of a network of videos that keeps the names of an image layer may say in ``beyond_images`` which of its
children and parameters that layer has not: weights of images fill the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vdiff.hooks import accepts, checkpoint
from vdiff.process import Conditioning
from vdiff.registry import Registered

_NOTHING = Conditioning()


class Network(Registered, nn.Module, kind="network"):
    """``network(x, c_noise, cond) -> tensor``.

    Attributes:
        accepts: Names of the conditions that this network takes. A class names all that it can be
            built for, an instance those it was built for.
        built_by: For those, the arguments that build a network which takes them; for error messages.
        entrance: Name of the layer that reads x and, behind it, ``concat``; the columns of its weight are in the
            order of their channels.
    """

    accepts: tuple[str, ...] = ()
    built_by: ClassVar[Mapping[str, str]] = {}
    entrance: ClassVar[str | None] = None

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        """What the network says of ``x``.

        Args:
            x: ``(B, C, ...)``, scaled as the network wants it.
            c_noise: How noisy each row is, in the network's own units, ``(B,)``; or each frame of a video,
                ``(B, F)``, where the network says so.
            cond: Conditions, a row for each of x.
        """

    def accepted(self, cond: Conditioning | None) -> Conditioning:
        """The conditions, none as an empty :class:`Conditioning`.

        Raises:
            ValueError: there is one that neither this network nor anything attached to it takes.
        """
        if cond is None:
            return _NOTHING
        for name in cond.tensors:
            if name not in self.accepts and name not in accepts(self):
                raise ValueError(self._refusal(name))
        return cond

    def needed(self, cond: Conditioning, name: str) -> Tensor:
        """A condition that this network was built for and cannot do without.

        Raises:
            ValueError: it is missing.
        """
        value = cond.get(name)
        if value is None:
            raise ValueError(
                f"{type(self).__name__}: the condition {name!r} is missing, and this network was built with "
                f"{self.built_by.get(name, name)}. It got: {', '.join(cond.tensors) or 'none'}."
            )
        return value

    def _refusal(self, name: str) -> str:
        title = type(self).__name__
        taken = f"This one takes: {', '.join(self.accepts) or 'none'}."
        if name in self.built_by:
            return (
                f"{title}: got the condition {name!r}, for which it must be built with {self.built_by[name]}. {taken}"
            )
        return f"{title}: takes no condition {name!r}. {taken}"


def behind(x: Tensor, concat: Tensor, who: str) -> Tensor:
    """``x`` and the condition ``concat`` behind its channels.

    Raises:
        ValueError: they differ in more than channels.
    """
    if len(concat) != len(x) or concat.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"{who}: 'concat' is {tuple(concat.shape)} and lies behind x, {tuple(x.shape)}: all axes but the channels "
            "must agree."
        )
    return torch.cat([x, concat], dim=1)


def run(layer: nn.Module, *args: object, recompute: bool = False) -> Tensor:
    """``layer(*args)``; with ``recompute`` its activations are not kept but computed again when differentiating."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, module=layer)
    return layer(*args)
