"""What latent diffusion's image autoencoders share: encoder, decoder, frames, slices, tiles, scale and shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vdiff.first_stages.base import Autoencoder
from vdiff.first_stages.tiles import cells, tiled
from vdiff.networks.autoencoder import AutoencoderDecoder, AutoencoderEncoder


class ConvolutionalAutoencoder(Autoencoder, abstract=True):
    """Convolutional encoder and decoder; a video goes through them frame by frame.

    Pictures ``(B, c, h, w)`` become ``(B, latent_channels, h / f, w / f)``, videos ``(B, c, f, h, w)`` alike.
    Latents are ``(z - shift) * scale`` of the code z. The attributes ``max_rows``, ``tile`` and
    ``tile_overlap`` may be set at any time.

    Args:
        in_channels: Of the pictures.
        channels, channel_mult, num_res_blocks: See :class:`vdiff.networks.autoencoder.AutoencoderEncoder`.
            A latent cell stands for ``f x f`` pixels, f being 2 to the power of ``len(channel_mult) - 1``.
        latent_channels: Of z.
        code_channels: Of what the encoder says, by default ``latent_channels``; with ``quant_conv`` they may differ.
        attention_factors: By how much levels with attention are smaller than the picture.
        mid_attention: Whether the middle attends.
        quant_conv: Whether a 1 x 1 convolution stands before and after the code.
        scale, shift: Bring latents to the spread that the denoiser expects.
        pixel_range: The values of the pixels.
        max_rows: Pictures or frames that go through at once; None all.
        tile: Side of a tile in pixels, a multiple of f; larger pictures go through in tiles. None: no tiles.
        tile_overlap: Of neighbouring tiles in pixels, by default a quarter of the tile.
        checkpointing: Keep no activations of the blocks for the backward pass.
        backend: See :func:`vdiff.attention.attend`.
    """

    code_factor = 1  # numbers that the encoder says per number of the code
    decoder_class: ClassVar[type[nn.Module]] = AutoencoderDecoder

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 4,
        code_channels: int | None = None,
        attention_factors: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        quant_conv: bool = True,
        scale: float = 1.0,
        shift: float = 0.0,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        max_rows: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        checkpointing: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        code_channels = code_channels or latent_channels
        if scale == 0:
            raise ValueError(f"{who}: scale must not be 0.")
        if not quant_conv and code_channels != latent_channels:
            raise ValueError(f"{who}: without quant_conv the code is the latent; leave out code_channels.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"{who}: max_rows must be at least 1, got {max_rows}.")
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        self.scale, self.shift, self.pixel_range = scale, shift, pixel_range
        self.max_rows, self.tile, self.tile_overlap = max_rows, tile, tile_overlap
        self._tile_cells()
        levels = (
            channels, channel_mult, num_res_blocks, attention_factors, mid_attention, dropout, norm_groups,
            checkpointing, backend,
        )  # fmt: skip
        said = self.code_factor * code_channels
        self.encoder = AutoencoderEncoder(in_channels, said, *levels)
        self.decoder = self.decoder_class(code_channels, in_channels, *levels)
        self.quant_conv = nn.Conv2d(said, self.code_factor * latent_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, code_channels, 1) if quant_conv else nn.Identity()

    def decode(self, latents: Tensor) -> Tensor:
        """The way back of :meth:`encode`; values may lie a little beyond ``pixel_range``."""
        return self.pixels(latents / self.scale + self.shift)

    def latents(self, z: Tensor) -> Tensor:
        """Latents of a code z."""
        return (z - self.shift) * self.scale

    def said(self, pixels: Tensor) -> Tensor:
        """What the encoder says of pixels, after ``quant_conv``: ``code_factor * latent_channels`` channels."""
        self.latent_shape(pixels.shape[1:])
        return self._each(lambda x: self.quant_conv(self.encoder(x)), pixels, self.factor, 1)

    def pixels(self, z: Tensor) -> Tensor:
        """Pixels of a code z, neither scaled nor shifted."""
        if z.ndim not in (4, 5) or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"{type(self).__name__}: latents are (B, {self.latent_channels}, h, w) or "
                f"(B, {self.latent_channels}, f, h, w), got {tuple(z.shape)}."
            )
        return self._each(lambda x: self.decoder(self.post_quant_conv(x)), z, 1, self.factor)

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        channels, *frames, height, width = pixel_shape if len(pixel_shape) in (3, 4) else (None, 0, 0)
        if channels != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: a sample is ({self.in_channels}, h, w) or ({self.in_channels}, f, h, w), "
                f"got {tuple(pixel_shape)}."
            )
        for name, size in (("height", height), ("width", width)):
            if size % self.factor or size < self.factor:
                below = size // self.factor * self.factor
                legal = f"{below} and {below + self.factor}" if below else f"{self.factor}"
                raise ValueError(
                    f"{type(self).__name__}: the {name} {size} is no multiple of {self.factor}. "
                    f"The nearest that are: {legal}. Crop or resize."
                )
        return (self.latent_channels, *frames, height // self.factor, width // self.factor)

    def _each(self, function: Callable[[Tensor], Tensor], x: Tensor, enter: int, leave: int) -> Tensor:
        """A function of pictures on pictures or frames: folded, in slices, in tiles."""
        if x.ndim == 5:
            frames = x.transpose(1, 2).flatten(0, 1)
            return self._each(function, frames, enter, leave).unflatten(0, (len(x), -1)).transpose(1, 2)
        if self.max_rows is not None and len(x) > self.max_rows:
            return torch.cat([self._each(function, part, enter, leave) for part in x.split(self.max_rows)])
        if (side_and_overlap := self._tile_cells()) is None:
            return function(x)
        return tiled(function, x, *side_and_overlap, enter, leave)

    def _tile_cells(self) -> tuple[int, int] | None:
        """Side and overlap of tiles in latent cells; None without tiles."""
        return cells(type(self).__name__, self.tile, self.tile_overlap, self.factor)
