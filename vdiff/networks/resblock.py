"""The residual block of latent diffusion's networks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vdiff.networks.layers import CONVOLUTIONS, Downsample, GroupNorm, Upsample, zeroed


class ResBlock(nn.Module):
    r"""Two convolutions around an embedding, added to the input, arXiv:2105.05233.

    ``h = conv(silu(norm(x)))``; then ``h + e`` and ``conv(dropout(silu(norm(h))))``, or with
    ``scale_shift_norm`` the embedding is two, ``norm(h) * (1 + scale) + shift``. The last convolution
    begins at zero, so that a new block is its skip connection.

    Args:
        channels, out_channels: Of input and output; by default the same.
        embedding_dim: Length of the embedding.
        norm_groups: Groups of the normalisations.
        resample: ``up`` doubles height and width before the first convolution and in the skip
            connection, ``down`` halves them.
        dims: Axes after the channels, 1 to 3; see :class:`Downsample`.
    """

    role = "res_block"

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        resample: Literal["up", "down"] | None = None,
        norm_groups: int = 32,
        dims: int = 2,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims]
        out_channels = out_channels or channels
        self.scale_shift_norm = scale_shift_norm
        self.resample = None
        if resample is not None:
            self.resample = {"up": Upsample, "down": Downsample}[resample](channels, conv=False, dims=dims)
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, channels), nn.SiLU(), convolution(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding_dim, 2 * out_channels if scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(convolution(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else convolution(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``(B, C, H, W)``, or other axes, and ``(B, embedding_dim)`` to ``(B, D, H', W')``."""
        if self.resample is None:
            h = self.in_layers(x)
        else:
            norm, activation, conv = self.in_layers
            h = conv(self.resample(activation(norm(x))))
            x = self.resample(x)
        e = self.emb_layers(emb)[(...,) + (None,) * (x.ndim - 2)]
        if self.scale_shift_norm:
            norm, *rest = self.out_layers
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h
