"""The variational autoencoder of latent diffusion, Stable Diffusion and their video models' frames."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vdiff.first_stages.convolutional import ConvolutionalAutoencoder
from vdiff.first_stages.gaussian import DiagonalGaussian, GaussianAutoencoder, TrainsOn, check_trains_on


class AutoencoderKL(ConvolutionalAutoencoder, GaussianAutoencoder, name="autoencoder_kl"):
    """Pictures to the mean of a Gaussian over latents, arXiv:2112.10752, section 3.1 with the KL penalty.

    By default that of Stable Diffusion 1 and 2, whose latents have ``scale=0.18215`` (0.13025 in SDXL). Published
    ones differ from it by:

    ==== ========================= ================= ===================
    f    ``channel_mult``          latent_channels   attention_factors
    ==== ========================= ================= ===================
    4    ``(1, 2, 4)``             3                 ``()``
    8    ``(1, 2, 4, 4)``          4                 ``()``
    16   ``(1, 1, 2, 2, 4)``       16                ``(16,)``
    32   ``(1, 1, 2, 2, 4, 4)``    64                ``(16, 32)``
    ==== ========================= ================= ===================

    with ``quant_conv=False`` in SVD and since SD 3.

    Args:
        trains_on: What a diffusion model is trained on, the Gaussian's ``mean`` or a ``sample`` of it. Published models
            were trained on samples. Conditions and what is edited are the mean's latents always.
        in_channels, and all other arguments: See :class:`vdiff.first_stages.convolutional.ConvolutionalAutoencoder`.
    """

    code_factor = 2

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
        trains_on: TrainsOn = "mean",
    ) -> None:
        super().__init__(
            in_channels, channels, channel_mult, num_res_blocks, latent_channels, code_channels, attention_factors,
            mid_attention, dropout, norm_groups, quant_conv, scale, shift, pixel_range, max_rows, tile, tile_overlap,
            checkpointing, backend,
        )  # fmt: skip
        check_trains_on(trains_on, type(self).__name__)
        self.trains_on: TrainsOn = trains_on

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(self.said(pixels))
