"""Embedders for classes and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.conditioners.base import Embedder, is_on_host
from vdiff.first_stages import FirstStage, IdentityFirstStage
from vdiff.networks import sinusoidal


class ClassLabelEmbedder(Embedder):
    """A learned vector per class; for ``cross_attention`` one token.

    Args:
        num_classes: Labels are 0 ... ``num_classes`` - 1.
        width: Length of the vector.
        reads, feeds, drop: See :class:`Embedder`.
        null: ``learned`` gives the null a vector of its own; ``zero`` makes it zero.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        reads: str = "label",
        feeds: str = "vector",
        drop: float = 0.0,
        null: Literal["zero", "learned"] = "learned",
    ) -> None:
        super().__init__(reads, feeds, drop, null)
        self.num_classes = num_classes
        self.choices = range(num_classes)
        self.table = nn.Embedding(num_classes + (null == "learned"), width)

    def forward(self, value: Tensor) -> Tensor:
        """``value`` holds labels, ``(B,)``."""
        labels = torch.as_tensor(value)
        if labels.ndim != 1:
            raise ValueError(
                f"ClassLabelEmbedder: {self.reads} holds one class per row, (B,), such as [3]; "
                f"its shape is {tuple(labels.shape)}."
            )
        if labels.is_floating_point():
            raise ValueError(
                f"ClassLabelEmbedder: {self.reads} holds whole numbers, 0 to {self.num_classes - 1}, and "
                f"{labels.dtype} came. Where they are whole, hand over {self.reads}.long()."
            )
        # Training waits for no device to look; sampling and validation do, for a wrong index kills a CUDA process.
        is_looked_at = labels.device.type == "cpu" or not torch.is_grad_enabled()
        if is_looked_at and bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(
                f"ClassLabelEmbedder: {self.reads} holds {labels.tolist()}, classes are 0 to {self.num_classes - 1}."
            )
        said = self.table(labels.to(self.table.weight.device).long())
        return said[:, None] if self.feeds == "cross_attention" else said

    def null(self, like: Tensor) -> Tensor:
        if self.null_kind == "zero":
            return torch.zeros_like(like)
        return self.table.weight[-1].to(like.dtype).expand_as(like)

    def parse(self, word: str) -> int:
        if not word.isdecimal() or int(word) >= self.num_classes:
            raise ValueError(f"the classes of this engine are 0 to {self.num_classes - 1}.")
        return int(word)


class ScalarFourierEmbedder(Embedder):
    """One or several numbers per row as sines and cosines: fps, motion, crop sizes; or one per frame: camera angles.

    Args:
        reads: A field of shape ``(B,)`` or ``(B, n)``.
        width: Of each number's embedding; even.
        max_period: Of the slowest wave.
        offset: Added to the numbers first; -1 where a network is told frames per second less one.
        scale: They are multiplied by it then; 1000 for numbers in [0, 1].
        frames: Where set, numbers belong to views, ``(B, V)``, or to T moments of V views, ``(B, T, V)``, and each of
            so many frames has an embedding of its own, ``(B, frames, width)``. Frames are all views of the first
            moment, then of the next; views that are not told by moment stay what they are.
        default: The number or numbers of every row where a batch has no such field; None makes that an error.
        feeds, drop, null: See :class:`Embedder`.

    References:
        Podell et al., arXiv:2307.01952, section 2.2 (size conditioning); Voleti et al., arXiv:2403.12008 (angles).
    """

    place: Tensor

    def __init__(
        self,
        reads: str,
        width: int = 256,
        max_period: float = 10_000.0,
        scale: float = 1.0,
        frames: int | None = None,
        feeds: str = "vector",
        drop: float = 0.0,
        null: Literal["zero", "learned", "same"] = "zero",
        offset: float = 0.0,
        default: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(reads, feeds, drop, null)
        if width % 2:
            raise ValueError(f"ScalarFourierEmbedder: width must be even, got {width}.")
        if frames is not None and frames < 1:
            raise ValueError(f"ScalarFourierEmbedder: frames is at least 1, got {frames}.")
        self.width, self.max_period, self.scale, self.frames = width, max_period, scale, frames
        self.offset, self.default = offset, default
        self.register_buffer("place", torch.empty(0), persistent=False)  # moves with the module
        self.absent = nn.Parameter(torch.zeros(width)) if null == "learned" else None

    def forward(self, value: Tensor) -> Tensor:
        """``(B, width)`` or ``(B, n * width)``, cosines first as in the field's time embeddings; or for each frame."""
        numbers = torch.as_tensor(value, device=self.place.device).float()
        if self.frames is not None:
            numbers = self._by_frame(numbers, self.frames)
        elif numbers.ndim not in (1, 2):
            raise ValueError(
                f"ScalarFourierEmbedder: {self.reads} holds numbers, (B,) or (B, n), such as [8.0]; "
                f"its shape is {tuple(numbers.shape)}."
            )
        waves = sinusoidal((numbers + self.offset) * self.scale, self.width, self.max_period)
        return waves.flatten(1) if self.frames is None else waves

    def _by_frame(self, numbers: Tensor, frames: int) -> Tensor:
        """``(B, V)`` or ``(B, T, V)`` to ``(B, frames)``."""
        is_still = numbers.ndim == 2 and numbers.shape[1] > 0 and frames % numbers.shape[1] == 0
        if not is_still and (numbers.ndim != 3 or numbers[0].numel() != frames):
            raise ValueError(
                f"ScalarFourierEmbedder: {self.reads} holds a number for each view, (B, V), where V divides the "
                f"{frames} frames, or for each view at every moment, (B, T, V), T * V of them; its shape is "
                f"{tuple(numbers.shape)}."
            )
        return numbers.repeat(1, frames // numbers.shape[1]) if is_still else numbers.flatten(1)

    def null(self, like: Tensor) -> Tensor:
        if self.absent is None:
            return torch.zeros_like(like)
        return self.absent.repeat(like.shape[-1] // self.width).expand_as(like)

    def parse(self, word: str) -> float | list[float]:
        numbers = _numbers(word)
        return numbers[0] if len(numbers) == 1 else numbers


class FieldEmbedder(Embedder):
    """A field as it is: a picture for ``concat``, or a number that the network embeds itself, such as ``fps``.

    Args:
        reads, drop: See :class:`Embedder`.
        feeds: By default the name it reads.
        absent: The value of the null, in every entry.
        offset: Added to the field.
        default: The number or numbers of every row where a batch has no such field; None makes that an error.
        null: ``same``: the null has the field as well, as the hint of a ControlNet is in both branches of guidance;
            what training drops is ``absent`` all the same.
    """

    place: Tensor

    def __init__(
        self,
        reads: str,
        feeds: str | None = None,
        drop: float = 0.0,
        absent: float = 0.0,
        null: Literal["zero", "same"] = "zero",
        offset: float = 0.0,
        default: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(reads, feeds or reads, drop, null)
        self.absent, self.offset, self.default = absent, offset, default
        self.is_picture = self.feeds == "concat"
        self._pixels: tuple[FirstStage, ...] = ()  # what an engine of pixels has for a first stage
        self.register_buffer("place", torch.empty(0), persistent=False)  # moves with the module

    def share(self, first_stage: FirstStage) -> None:
        self._pixels = (first_stage,) if isinstance(first_stage, IdentityFirstStage) else ()

    def check(self, batch: Mapping[str, Any]) -> None:
        value = torch.as_tensor(batch[self.reads])
        if self.is_picture and value.numel() and is_on_host(value):
            for stage in self._pixels:  # beside latents it may be latents too, of any scale
                stage.check_pixels(value.float(), f"FieldEmbedder: {self.reads!r}")  # a mask may be of whole numbers

    def forward(self, value: Tensor) -> Tensor:
        field = torch.as_tensor(value).to(self.place.device)
        return field + self.offset if self.offset else field  # whole numbers stay whole

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.absent)

    def parse(self, word: str) -> float | list[float]:
        numbers = _numbers(word)
        return numbers[0] if len(numbers) == 1 else numbers


def _numbers(word: str) -> list[float]:
    try:
        return [float(part) for part in word.split(",")]
    except ValueError:
        raise ValueError(f"a number, or several with commas between, and not {word!r}.") from None
