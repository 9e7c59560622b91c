"""Pictures as conditions: through a CLIP image tower, or through a first stage."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.checkpoints import load_into, read_weights
from vdiff.conditioners.base import Embedder, Embedding
from vdiff.conditioners.open_clip import PREFIXES, architecture
from vdiff.first_stages import FirstStage
from vdiff.networks import sinusoidal
from vdiff.process import RowKeys, normal, spread, upload

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
      VideoCrafter and DynamiCrafter read them.

    Videos ``(B, c, f, h, w)`` give the tokens of all frames one after the other, ``pooled`` one a frame.

    Args:
        arch: A name that open_clip knows, or an image tower of one's own: ``embed_dim`` and what open_clip calls
            ``vision_cfg``, such as ``{embed_dim: 64, width: 64, head_width: 16, layers: 2, patch_size: 8,
            image_size: 32}``.
        weights: A file in open_clip's layout; the text tower in it is left out. None: random, with a warning.
        pixel_range: Lowest and highest value of the pictures. Values beyond it are an error where the host may look:
            on the CPU, and when sampling.
        reads, feeds, drop: See :class:`Embedder`. The null is zero.
        trainable: Otherwise frozen.

    Stable Video Diffusion resizes with a blur of its own before; the resizing here, bicubic with antialiasing,
    differs from that by a few grey values at edges.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str | dict[str, Any] = "ViT-H-14",
        weights: Path | None = None,
        reads: str = "image",
        feeds: str = "cross_attention",
        drop: float = 0.0,
        output: Literal["pooled", "patches", "hidden"] = "pooled",
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        trainable: bool = False,
    ) -> None:
        super().__init__(reads, feeds, drop)
        if pixel_range[0] >= pixel_range[1]:
            raise ValueError(f"OpenCLIPImageEmbedder: pixel_range goes from low to high, got {pixel_range}.")
        self.arch, self.output, self.pixel_range, self.trainable = arch, output, pixel_range, trainable
        config = architecture(arch, "OpenCLIPImageEmbedder")
        vision = config["vision_cfg"] if isinstance(arch, str) else config["text_cfg"]
        self.model = nn.ModuleDict({"visual": _visual(config, vision)})
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
        if is_video:
            tokens = tokens.unflatten(0, (len(value), -1))
            tokens = tokens if self.output == "pooled" else tokens.flatten(1, 2)
        elif self.output == "pooled" and self.feeds == "cross_attention":
            tokens = tokens[:, None]
        return tokens

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
        x = (pixels.to(self.mean).expand(-1, 3, -1, -1) - low) / (high - low)
        size = tuple(self.tower.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def _tokens(self, x: Tensor) -> Tensor:
        tower = self.tower
        hidden = tower.transformer(tower._embeds(x))
        if self.output == "hidden":
            return hidden
        pooled, tokens = tower._pool(hidden)
        if self.output == "patches":
            return tokens
        return pooled if tower.proj is None else pooled @ tower.proj


@dataclass(frozen=True, eq=False)
class Noised:
    """A picture, and how much noise each row gets.

    Attributes:
        pixels: ``(B, c, h, w)`` or ``(B, c, f, h, w)``.
        sigma: ``(B,)`` float32 on the host; zero: none.
        keys: Of the rows' noise; None: the same noise for all rows.
    """

    pixels: Tensor
    sigma: Tensor
    keys: RowKeys | None


class ImageLatentsEmbedder(Embedder, name="image_latents"):
    r"""The latents of a picture, noised a little, for ``concat``; and how much, for the network to know.

    :math:`\mathrm{encode}(x + \sigma \epsilon)` (Stable Video Diffusion, CogVideoX) or, with ``noised: latents``,
    :math:`\mathrm{encode}(x) + \sigma \epsilon`. Training draws :math:`\ln\sigma` from a normal distribution, by the
    row's key; sampling takes the batch field ``sigma_field`` where there is one, and otherwise ``sigma``.

    Args:
        first_stage: Frozen, with the scale and shift that belong to these latents. Stable Video Diffusion has its
            own encoder for them, whose latents are not scaled.
        reads: Pictures ``(B, c, h, w)`` in the first stage's range, or videos ``(B, c, f, h, w)``.
        feeds: The name that the latents feed.
        drop: See :class:`Embedder`. The null is zero, for the latents; the level keeps its value.
        log_mean, log_std: Of :math:`\ln\sigma` in training; -3 and 0.5 in both papers.
        sigma: When sampling; 0.02 in Stable Video Diffusion.
        noised: ``pixels``, ``latents`` or ``nothing``.
        level_feeds: The name that the level feeds as sines and cosines of ``sigma``; None: none.
        level_width: Of these.
        sigma_field: The field with the level of each row, ``(B,)``.
        frames: Video latents to make of a picture's, ``(B, c, frames, h, w)``.
        fill: What the frames after the first are: the picture again (Stable Video Diffusion) or zero (CogVideoX).

    References:
        Blattmann et al., arXiv:2311.15127, appendix D; Yang et al., arXiv:2408.06072; noise augmentation, Ho et al.,
        arXiv:2106.15282.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        reads: str = "image",
        feeds: str = "concat",
        drop: float = 0.0,
        log_mean: float = -3.0,
        log_std: float = 0.5,
        sigma: float = 0.02,
        noised: Literal["pixels", "latents", "nothing"] = "pixels",
        level_feeds: str | None = None,
        level_width: int = 256,
        sigma_field: str = "cond_aug",
        frames: int | None = None,
        fill: Literal["repeat", "zero"] = "repeat",
    ) -> None:
        super().__init__(reads, feeds, drop)
        if sigma < 0 or log_std < 0 or (frames is not None and frames < 1):
            raise ValueError("ImageLatentsEmbedder: sigma and log_std are at least 0, frames at least 1.")
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.log_mean, self.log_std, self.sigma, self.noised = log_mean, log_std, sigma, noised
        self.level_feeds, self.level_width, self.sigma_field = level_feeds, level_width, sigma_field
        self.frames, self.fill = frames, fill

    def read(self, batch: Mapping[str, Any], is_training: bool = False) -> Noised:
        pixels = super().read(batch)
        keys = RowKeys.of(batch) if "noise_key" in batch and "step" in batch else None
        if is_training:
            drawn = RowKeys.of(batch).normal(f"augmentation/{self.reads}/level", ())
            sigma = torch.exp(self.log_mean + self.log_std * drawn)
        elif self.sigma_field in batch:
            sigma = torch.as_tensor(batch[self.sigma_field]).float().cpu()
        else:
            sigma = torch.full((len(pixels),), self.sigma)
        if sigma.shape != (len(pixels),):
            raise ValueError(
                f"ImageLatentsEmbedder: {self.sigma_field} holds one number per row, ({len(pixels)},); "
                f"its shape is {tuple(sigma.shape)}."
            )
        return Noised(pixels, sigma, keys)

    def forward(self, value: Noised) -> dict[str, Embedding]:
        pixels, sigma = value.pixels, upload(value.sigma, value.pixels.device)
        if self.noised == "pixels":
            pixels = self._with_noise(pixels, sigma, value.keys)
        latents = self.first_stage.encode(pixels)
        if self.noised == "latents":
            latents = self._with_noise(latents, sigma, value.keys)
        if self.frames is not None:
            latents = self._filled(latents if latents.ndim == 5 else latents[:, :, None], self.frames)
        feeds = {self.feeds: Embedding(latents)}
        if self.level_feeds is not None:
            feeds[self.level_feeds] = Embedding(sinusoidal(sigma, self.level_width))
        return feeds

    def with_null(self, value: Noised) -> tuple[dict[str, Embedding], dict[str, Embedding]]:
        said = self(value)
        return said, {**said, self.feeds: Embedding(torch.zeros_like(said[self.feeds].tensor))}

    def _with_noise(self, x: Tensor, sigma: Tensor, keys: RowKeys | None) -> Tensor:
        purpose = f"augmentation/{self.reads}/noise"
        # Without keys, one noise for all rows: a row must not depend on its place in the batch.
        noise = keys.normal(purpose, x.shape[1:]) if keys is not None else normal(x.shape[1:], purpose)
        return x + spread(sigma, x) * upload(noise, x.device).to(x.dtype)

    def _filled(self, latents: Tensor, frames: int) -> Tensor:
        more = frames - latents.shape[2]
        if more < 0:
            raise ValueError(f"ImageLatentsEmbedder: {latents.shape[2]} frames came, and frames is {frames}.")
        last = latents[:, :, -1:].expand(-1, -1, more, -1, -1)
        return torch.cat([latents, last if self.fill == "repeat" else torch.zeros_like(last)], 2)


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
