"""The autoencoder of Stable Video Diffusion: frames in one by one, out together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdiff.first_stages.autoencoder_kl import AutoencoderKL
from vdiff.first_stages.gaussian import TrainsOn
from vdiff.first_stages.tiles import tiled
from vdiff.networks.temporal_decoder import TemporalDecoder


class TemporalDecoderAutoencoder(AutoencoderKL, name="temporal_decoder"):
    """Latent diffusion's encoder, and a decoder with layers over time against flicker, arXiv:2311.15127, section 4.1.

    A long video is decoded in chunks of ``chunk`` frames, whose layers over time see nothing beyond the chunk: memory
    depends on the chunk and not on the video, and so do, a little, the frames at its ends. The attribute may be set
    at any time. A picture is decoded as a video of one frame.

    Args:
        chunk: Frames that are decoded together; None all.
        quant_conv: Whether a 1 x 1 convolution stands behind the encoder. Generative-models' first stage has none;
            diffusers takes that of the image autoencoder.
        post_quant_conv: Whether one stands before the decoder, as in the image autoencoder; in no published one.
        trains_on: See :class:`vdiff.first_stages.AutoencoderKL`.
        scale, and all other arguments: See :class:`vdiff.first_stages.convolutional.ConvolutionalAutoencoder`;
            ``max_rows`` are pictures or frames that are encoded together.
    """

    decoder_class = TemporalDecoder

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 4,
        attention_factors: Sequence[int] = (),
        mid_attention: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        quant_conv: bool = False,
        post_quant_conv: bool = False,
        scale: float = 0.18215,
        shift: float = 0.0,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
        max_rows: int | None = None,
        chunk: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        checkpointing: bool = False,
        backend: str | None = None,
        trains_on: TrainsOn = "mean",
    ) -> None:
        super().__init__(
            in_channels, channels, channel_mult, num_res_blocks, latent_channels, None, attention_factors,
            mid_attention, dropout, norm_groups, quant_conv, scale, shift, pixel_range, max_rows, tile, tile_overlap,
            checkpointing, backend, trains_on,
        )  # fmt: skip
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if post_quant_conv else nn.Identity()
        if chunk is not None and chunk < 1:
            raise ValueError(f"TemporalDecoderAutoencoder: chunk must be at least 1, got {chunk}.")
        self.chunk = chunk

    def pixels(self, z: Tensor) -> Tensor:
        if z.ndim == 4 and z.shape[1] == self.latent_channels:
            return self.pixels(z[:, :, None])[:, :, 0]
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"{type(self).__name__}: latents are (B, {self.latent_channels}, h, w) or "
                f"(B, {self.latent_channels}, f, h, w), got {tuple(z.shape)}."
            )
        return torch.cat([self._chunk(part) for part in z.split(self.chunk or z.shape[2], dim=2)], dim=2)

    def _chunk(self, z: Tensor) -> Tensor:
        if (cells := self._tile_cells()) is None:
            return self._clip(z)
        return tiled(self._clip, z, *cells, 1, self.factor)

    def _clip(self, z: Tensor) -> Tensor:
        num_rows, _, num_frames, *_ = z.shape
        frames = self.decoder(self.post_quant_conv(z.transpose(1, 2).flatten(0, 1)), num_frames)
        return frames.unflatten(0, (num_rows, num_frames)).transpose(1, 2)
