"""The video autoencoder of CogVideoX, arXiv:2408.06072, section 2.1: causal in time, 4 x 8 x 8 pixels to a cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vdiff.first_stages.gaussian import DiagonalGaussian, GaussianAutoencoder, TrainsOn, check_trains_on
from vdiff.first_stages.tiles import cells, tiled
from vdiff.networks.causal import Chunk
from vdiff.networks.causal_autoencoder import CausalDecoder, CausalEncoder


class AutoencoderKLCogVideoX(GaussianAutoencoder, name="autoencoder_kl_cogvideox"):
    """Clips of ``4 k + 1`` frames to ``k + 1`` frames of the mean of a Gaussian over latents.

    With ``front_latents: 1`` they are ``k + 2``: where a patch of the network is of two frames (CogVideoX 1.5), the
    first latent of a clip stands twice at its front, and decoding drops what stands there. A picture stays one.

    The first frame stands for itself, so a picture is a clip of one. No layer looks ahead, and a clip goes through in
    one of two modes, which may be changed at any time:

    - ``whole``: all at once. The normalisations see the whole clip, and memory grows with it.
    - ``streaming``: by chunks of 8 frames or 2 latent frames, the first with what is left over. Convolutions remember
      the frames before, so they make no seams; the normalisations see one chunk at a time. Memory grows with the clip
      only by what goes in and comes out; :meth:`encode_by_chunk` and :meth:`decode_by_chunk` hand it out in parts.

    Published latents and videos were made by streaming. What fits into one chunk, such as 9 frames, is the same in
    both modes; longer clips differ by the statistics of the normalisations. Any k is legal here; diffusers decodes an
    even number n of latent frames to 4 n frames, as if no frame stood for itself.

    Args:
        in_channels: Of the clips.
        channels, channel_mult, num_res_blocks, time_factor: See
            :class:`vdiff.networks.causal_autoencoder.CausalEncoder`.
        latent_channels: Of z.
        scale, shift: Latents are ``(z - shift) * scale``: 1.15258426 for CogVideoX-2b, 0.7 for all others.
        mode: See above.
        chunk: Latent frames of a chunk. Published latents are of 2.
        front_latents: Copies of its first latent in front of a clip's.
        pixel_range: The values of the pixels.
        max_rows: Clips that go through at once; None all.
        tile: Side of a tile in pixels; larger pictures go through in tiles, each a clip of its own. None: no tiles.
        tile_overlap: Of neighbouring tiles in pixels, by default a quarter of the tile.
        checkpointing: Keep no activations of the blocks for the backward pass, in ``whole``.
        trains_on: What a diffusion model is trained on, the Gaussian's ``mean`` or a ``sample`` of it, see
            :class:`vdiff.first_stages.AutoencoderKL`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        latent_channels: int = 16,
        time_factor: int = 4,
        dropout: float = 0.0,
        norm_groups: int = 32,
        scale: float = 1.0,
        shift: float = 0.0,
        mode: Literal["whole", "streaming"] = "streaming",
        chunk: int = 2,
        front_latents: int = 0,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        max_rows: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        checkpointing: bool = False,
        trains_on: TrainsOn = "mean",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_trains_on(trains_on, who)
        if scale == 0:
            raise ValueError(f"{who}: scale must not be 0.")
        for name, number, least in (
            ("chunk", chunk, 1),
            ("max_rows", max_rows, 1),
            ("front_latents", front_latents, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"{who}: {name} must be at least {least}, got {number}.")
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.factor, self.time_factor = 2 ** (len(channel_mult) - 1), time_factor
        self.scale, self.shift, self.pixel_range = scale, shift, pixel_range
        self.mode, self.chunk, self.max_rows, self.front_latents = mode, chunk, max_rows, front_latents
        self.tile, self.tile_overlap, self.trains_on = tile, tile_overlap, trains_on
        cells(who, tile, tile_overlap, self.factor)
        levels = (channels, channel_mult, num_res_blocks, time_factor, dropout, norm_groups, checkpointing)
        self.encoder = CausalEncoder(in_channels, 2 * latent_channels, *levels)
        self.decoder = CausalDecoder(latent_channels, in_channels, *levels)

    def encode(self, pixels: Tensor) -> Tensor:
        """``(B, c, f, h, w)`` to ``(B, latent_channels, (f - 1) / 4 + 1, h / 8, w / 8)``, with ``front_latents`` frames
        more; a picture ``(B, c, h, w)`` to one without frames."""
        return super().encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """The way back of :meth:`encode`; values may lie a little beyond ``pixel_range``."""
        return self.pixels(self._unscaled(self._without_front(latents)))

    def encode_by_chunk(self, pixels: Tensor) -> Iterator[Tensor]:
        """Streaming, the latents of one chunk after the other, ``(B, latent_channels, n, h / 8, w / 8)``; no tiles."""
        self.latent_shape(pixels.shape[1:])
        for index, said in enumerate(_by_chunk(self.encoder, pixels, self.chunk * self.time_factor)):
            latents = self._scaled(DiagonalGaussian.of(said).mean)
            yield self._with_front(latents) if index == 0 and _is_clip(pixels) else latents

    def decode_by_chunk(self, latents: Tensor) -> Iterator[Tensor]:
        """Streaming, the frames of one chunk after the other, ``(B, c, n, h, w)``; no tiles."""
        self._check_latents(latents)
        latents = self._without_front(latents)
        yield from _by_chunk(lambda z, chunk: self.decoder(self._unscaled(z), chunk), latents, self.chunk)

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        self.latent_shape(pixels.shape[1:])
        chunk = self.chunk * self.time_factor
        return DiagonalGaussian.of(self._through(self.encoder, pixels, chunk, self.factor, 1))

    def pixels(self, z: Tensor) -> Tensor:
        self._check_latents(z)
        return self._through(self.decoder, z, self.chunk, 1, self.factor)

    def latents(self, z: Tensor) -> Tensor:
        return self._with_front(self._scaled(z)) if _is_clip(z) else self._scaled(z)

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        """As :meth:`FirstStage.latent_shape`.

        Raises:
            ValueError: there are no ``4 k + 1`` frames, or height or width is no multiple of 8.
        """
        who, t = type(self).__name__, self.time_factor
        channels, *frames, height, width = pixel_shape if len(pixel_shape) in (3, 4) else (None, 0, 0)
        if channels != self.in_channels:
            raise ValueError(
                f"{who}: a sample is ({self.in_channels}, f, h, w) or ({self.in_channels}, h, w), "
                f"got {tuple(pixel_shape)}."
            )
        for name, size, first, step in (
            *(("number of frames", n, 1, t) for n in frames),
            ("height", height, self.factor, self.factor),
            ("width", width, self.factor, self.factor),
        ):
            if size < first or (size - first) % step:
                below = first + (size - first) // step * step
                legal = f"{below} and {below + step}" if below >= first else f"{first}"
                rule = f"{t} k + 1" if name == "number of frames" else f"a multiple of {self.factor}"
                raise ValueError(
                    f"{who}: the {name} must be {rule}, got {size}. The nearest legal: {legal}. "
                    f"{'Cut or repeat frames' if name == 'number of frames' else 'Crop or resize'}."
                )
        frames = [(n - 1) // t + 1 + (self.front_latents if n > 1 else 0) for n in frames]
        return (self.latent_channels, *frames, height // self.factor, width // self.factor)

    def latent_mask(self, mask: Tensor, size: Sequence[int]) -> Tensor:
        """The first latent of a clip stands for one frame, the others for ``time_factor`` each, and those in front for
        what the first does."""
        if mask.ndim == 5 and mask.shape[2] > 1:
            if (mask.shape[2] - 1) % self.time_factor:
                raise ValueError(
                    f"{type(self).__name__}: a mask of {mask.shape[2]} frames; a clip has {self.time_factor} k + 1."
                )
            groups = mask[:, :, 1:].unflatten(2, (-1, self.time_factor)).amax(3)
            mask = self._with_front(torch.cat([mask[:, :, :1], groups], dim=2))
        return super().latent_mask(mask, size)

    def _with_front(self, latents: Tensor) -> Tensor:
        """A clip's latents with copies of the first in front."""
        if not self.front_latents:
            return latents
        return torch.cat([latents[:, :, :1].expand(-1, -1, self.front_latents, -1, -1), latents], dim=2)

    def _without_front(self, latents: Tensor) -> Tensor:
        """The inverse."""
        if not _is_clip(latents):
            return latents
        if latents.shape[2] <= self.front_latents:
            raise ValueError(
                f"{type(self).__name__}: {latents.shape[2]} frames of latents, of which {self.front_latents} stand in "
                f"front; a clip has at least {self.front_latents + 1}."
            )
        return latents[:, :, self.front_latents :]

    def _scaled(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.scale + self.shift

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim not in (4, 5) or z.shape[1] != self.latent_channels:
            c = self.latent_channels
            raise ValueError(
                f"{type(self).__name__}: latents are (B, {c}, f, h, w) or (B, {c}, h, w), got {tuple(z.shape)}."
            )

    def _through(self, function: Callable[..., Tensor], x: Tensor, chunk: int, enter: int, leave: int) -> Tensor:
        """Encoder or decoder on clips or pictures: in this mode, in slices, in tiles."""
        if x.ndim == 4:
            return self._through(function, x[:, :, None], chunk, enter, leave).squeeze(2)
        if self.max_rows is not None and len(x) > self.max_rows:
            parts = x.split(self.max_rows)
            return torch.cat([self._through(function, part, chunk, enter, leave) for part in parts])
        clip = function if self.mode == "whole" else lambda x: torch.cat(list(_by_chunk(function, x, chunk)), dim=2)
        if (tiles := cells(type(self).__name__, self.tile, self.tile_overlap, self.factor)) is None:
            return clip(x)
        return tiled(clip, x, *tiles, enter, leave)


def _is_clip(x: Tensor) -> bool:
    """Of pixels or latents: more than a picture, which may be a clip of one frame."""
    return x.ndim == 5 and x.shape[2] > 1


def _by_chunk(function: Callable[..., Tensor], x: Tensor, size: int) -> Iterator[Tensor]:
    """A causal function of ``(B, C, F, H, W)`` on chunks of ``size`` frames, the first longer by what is left over."""
    past: dict = {}
    start, frames = 0, x.shape[2]
    while start < frames:
        stop = start + size if start else min(size + frames % size, frames)
        yield function(x[:, :, start:stop], Chunk(start == 0, past))
        start = stop
