"""Pictures as conditions, through a CLIP image tower."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.checkpoints import load_into, read_weights
from vdiff.conditioners.base import Embedder, Embedding, Feeds, check_is_tensor
from vdiff.conditioners.open_clip import PREFIXES, architecture

# Of the pictures that CLIP was trained on, in [0, 1].
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_PREFIXES = {f"{p}visual.": "" for p in (*PREFIXES, "", "embedder.model.", "image_encoder.model.")} | {
    f"conditioner.embedders.{i}.open_clip.model.visual.": "" for i in range(8)
}


class OpenCLIPImageEmbedder(Embedder, name="open_clip_image"):
    """Pictures through a CLIP image tower of open_clip; resized and normalised here, and differentiable.

    Pictures ``(B, 1 or 3, h, w)`` give, by ``output``:

    - ``pooled``: CLIP's embedding, ``(B, width)``, and for ``cross_attention`` ``(B, 1, width)``;
    - ``patches``: the tokens of the patches, normalised, ``(B, n, width)``;
    - ``hidden``: all tokens as they leave the last block, the class token first, ``(B, 1 + n, width)``, as
      VideoCrafter and DynamiCrafter read them;
    - ``penultimate``: the same as they leave the last block but one, as IP-Adapter Plus reads them.

    Videos ``(B, c, f, h, w)`` give the tokens of all frames one after the other, ``pooled`` one a frame; or, with
    ``per_frame``, those of each frame apart, ``(B, f, n, width)``.

    Args:
        arch: A name that open_clip knows, or an image tower of one's own: ``embed_dim`` and what open_clip calls
            ``vision_cfg``, such as ``{embed_dim: 64, width: 64, head_width: 16, layers: 2, patch_size: 8,
            image_size: 32}``.
        weights: A file in open_clip's layout; the text tower in it is left out. None: random, with a warning.
        pixel_range: Lowest and highest value of the pictures. Values beyond it are an error where the host may look:
            on the CPU, and when sampling.
        reads, feeds, drop: See :class:`Embedder`.
        null: ``zero``, or ``empty``: what the tower says of a picture of CLIP's mean colour, as IP-Adapter Plus has it.
        trainable: Otherwise frozen.
        per_frame: For networks in which a frame attends to its own tokens, as SVD's, and a moment in SV4D's.
        resize: ``blurred``, as the towers of SVD, SV3D, SV4D, VideoCrafter and DynamiCrafter were fed: a Gaussian blur,
            then bicubic from corner to corner, see :func:`blurred`; or ``antialiased``, bicubic with antialiasing, as
            CLIP itself and IP-Adapter prepare pictures. They differ by some grey values at edges. Both squeeze a
            picture that is not square.
    """

    has_empty = True
    is_picture = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str | dict[str, Any] = "ViT-H-14",
        weights: Path | None = None,
        reads: str = "image",
        feeds: str = "cross_attention",
        drop: float = 0.0,
        output: Literal["pooled", "patches", "hidden", "penultimate"] = "pooled",
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        trainable: bool = False,
        per_frame: bool = False,
        null: Literal["zero", "empty"] = "zero",
        resize: Literal["blurred", "antialiased"] = "blurred",
    ) -> None:
        super().__init__(reads, feeds, drop, null)
        if resize not in ("blurred", "antialiased"):
            raise ValueError(f"OpenCLIPImageEmbedder: resize is 'blurred' or 'antialiased', got {resize!r}.")
        if pixel_range[0] >= pixel_range[1]:
            raise ValueError(f"OpenCLIPImageEmbedder: pixel_range goes from low to high, got {pixel_range}.")
        self.arch, self.output, self.pixel_range, self.trainable = arch, output, pixel_range, trainable
        self.per_frame, self.resize = per_frame, resize
        config = architecture(arch, "OpenCLIPImageEmbedder", "vision_cfg")
        self.model = nn.ModuleDict({"visual": _visual(config, config["vision_cfg"])})
        if output == "penultimate" and len(self.tower.transformer.resblocks) < 2:
            raise ValueError("OpenCLIPImageEmbedder: output 'penultimate' needs a tower of two layers or more.")
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)
        self.is_random = False
        if weights is None:
            self.is_random = not next(self.model.parameters()).is_meta
        elif not next(self.model.parameters()).is_meta:
            tensors = read_weights(weights)
            prefix = max((p for p in IMAGE_PREFIXES if any(n.startswith(p) for n in tensors)), key=len, default="")
            load_into(self.tower, tensors, prefix={prefix: ""}, where=f"OpenCLIPImageEmbedder from {weights}")
        if not trainable:
            self.model.requires_grad_(False).eval()
        self.register_load_state_dict_post_hook(_weights_came)

    @property
    def tower(self) -> Any:
        return self.model["visual"]

    def idle_weights(self) -> list[str]:
        """Globs over weights that nothing reads."""
        unread = {"pooled": [], "patches": ["proj"], "hidden": ["proj", "ln_post.*"]}
        last = f"transformer.resblocks.{len(self.tower.transformer.resblocks) - 1}.*"
        unread["penultimate"] = [*unread["hidden"], last]
        return [f"model.visual.{name}" for name in unread[self.output]]

    def train(self, mode: bool = True) -> OpenCLIPImageEmbedder:
        super().train(mode)
        if not any(p.requires_grad for p in self.model.parameters()):
            self.model.eval()
        return self

    def forward(self, value: Tensor) -> Tensor:
        if self.is_random:
            self.is_random = False
            warnings.warn(
                f"OpenCLIPImageEmbedder: the image tower {self.arch} has random weights; give weights: FILE, unless it "
                "learns from scratch.",
                stacklevel=2,
            )
        is_video = value.ndim == 5
        tokens = self._tokens(self.prepare(value.movedim(2, 1).flatten(0, 1) if is_video else value))
        if self.output == "pooled" and (is_video or self.feeds == "cross_attention"):
            tokens = tokens[:, None]
        if is_video:
            tokens = tokens.unflatten(0, (len(value), -1))
        return tokens.flatten(1, 2) if is_video and not self.per_frame else tokens

    def with_null(self, value: Tensor) -> tuple[Feeds, Feeds]:
        if self.null_kind == "zero":
            return super().with_null(value)
        low, high = self.pixel_range
        colour = (low + (high - low) * self.mean).view(1, 3, *(1,) * (value.ndim - 2))
        said, nothing = self(value), self(colour.expand(-1, -1, *value.shape[2:]))
        return {self.feeds: Embedding(said)}, {self.feeds: Embedding(nothing.expand_as(said))}

    def check(self, batch: Mapping[str, Any]) -> None:
        check_is_tensor(batch[self.reads], self.reads, "pictures (B, 1 or 3, h, w)")

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pictures as the tower reads them: its size, three channels, CLIP's mean and spread.

        Raises:
            ValueError: of another shape, or outside ``pixel_range``.
        """
        low, high = self.pixel_range
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
            raise ValueError(
                f"OpenCLIPImageEmbedder: {self.reads} holds pictures (B, 1 or 3, h, w) of a floating type from {low:g} "
                f"to {high:g}; got {tuple(pixels.shape)} of {pixels.dtype}."
            )
        if pixels.device.type == "cpu" or not torch.is_grad_enabled():  # training waits for no device to look
            least, most = (x.item() for x in pixels.detach().aminmax())
            slack = 0.02 * (high - low)
            if not (low - slack <= least and most <= high + slack):
                raise ValueError(
                    f"OpenCLIPImageEmbedder: {self.reads} has values from {least:.3g} to {most:.3g}, and pixel_range "
                    f"is {low:g} to {high:g}. Set pixel_range to what the data have."
                )
        size = tuple(self.tower.image_size)
        x = (pixels.to(self.mean.device, torch.promote_types(self.mean.dtype, torch.float32)) - low) / (high - low)
        if x.shape[2:] != size and self.resize == "blurred":
            x = F.interpolate(blurred(x, size), size, mode="bicubic", align_corners=True)
        elif x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return ((x - self.mean) / self.std).to(self.mean.dtype)

    def _tokens(self, x: Tensor) -> Tensor:
        tower = self.tower
        if self.output == "penultimate":
            before_last = len(tower.transformer.resblocks) - 2
            return tower.transformer.forward_intermediates(tower._embeds(x), indices=[before_last], stop_early=True)[0]
        hidden = tower.transformer(tower._embeds(x))
        if self.output == "hidden":
            return hidden
        pooled, tokens = tower._pool(hidden)
        if self.output == "patches":
            return tokens
        return pooled if tower.proj is None else pooled @ tower.proj


def blurred(x: Tensor, size: Sequence[int]) -> Tensor:
    r"""Pictures ``(B, c, h, w)`` before they are made smaller, blurred along each axis as kornia and scikit-image do.

    Along an axis that gets smaller by a factor f the Gaussian has :math:`\sigma = (f - 1) / 2`, over an odd number of
    pixels, :math:`4 \sigma` or the next, 3 at least; borders are mirrored. An axis that grows stays as it is.

    Args:
        size: What they are to become, height and width.
    """
    for axis, new in ((2, size[0]), (3, size[1])):
        sigma = (x.shape[axis] / new - 1) / 2
        if sigma <= 0:
            continue
        radius = max(int(4 * sigma), 3) // 2
        weights = [math.exp(-(place**2) / (2 * sigma**2)) for place in range(-radius, radius + 1)]
        mirrored = F.pad(x, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="reflect")
        num, x = x.shape[axis], torch.zeros_like(x)
        for place, weight in enumerate(weights):  # no convolution, which autocast would round
            x = x + weight / sum(weights) * mirrored.narrow(axis, place, num)
    return x


def _visual(config: Mapping[str, Any], vision: Mapping[str, Any]) -> nn.Module:
    from open_clip.model import _build_vision_tower

    try:
        tower: Any = _build_vision_tower(config["embed_dim"], dict(vision), config.get("quick_gelu", False))  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"open_clip builds no image tower from {dict(vision)}: {error}") from error
    if not hasattr(tower, "_pool"):
        raise ValueError("OpenCLIPImageEmbedder: a tower that is no plain vision transformer; choose a ViT.")
    return tower


def _weights_came(embedder: nn.Module, keys: Any) -> None:
    assert isinstance(embedder, OpenCLIPImageEmbedder)
    embedder.is_random = embedder.is_random and bool(keys.missing_keys)
