"""CogVideoX, arXiv:2408.06072: a transformer over the tokens of a text and of a video in one sequence.

The state dict::

    patch_embed, text_embed, out     patches and text to tokens, tokens to patches
    noise_embed, offset_embed        what the modulations are told
    positions                        a table of positions, where it is learned
    blocks.i                         one :class:`ExpertBlock` each
    norm                             after the last block
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.attention import Backend
from vdiff.networks.base import Network, behind, run
from vdiff.networks.embeddings import sinusoidal
from vdiff.networks.expert import ExpertBlock
from vdiff.networks.modulated import ModulatedOut, linear
from vdiff.networks.patches import Patch, patchify, unpatchify
from vdiff.networks.positions import coordinates, fitted, rotations, shares, sincos
from vdiff.process import Conditioning

OFFSET = 2.0  # of every published network that is told one, in training and after


class CogVideoX(Network, name="cogvideox"):
    """Video latents ``(B, in_channels, F, H, W)`` to ``(B, out_channels, F, H, W)``.

    Sizes are any multiples of the patch. ``c_noise`` goes into a sinusoidal embedding as it is, one number per row,
    ``(B,)``, or per frame, ``(B, F)``, of which the text is then told the mean. It begins by saying zero.

    Conditions:

    - ``cross_attention`` ``(B, n, text_dim)``, always needed; n is 226 in all published networks. They attend to
      padding as well; a mask ``(B, n)``, True counts, leaves it out.
    - ``concat`` ``(B, c, F, H, W)``, put behind x; ``in_channels`` counts both. For image to video the latent of the
      first frame, and zeros.
    - ``ofs`` ``(B,)``, with ``offset_dim``; 2 where it is not given, as it always was in training.

    Published, with ``out_channels=16``:

    ============ ============ ======= ====== ========== ============ ===========================================
    .            in_channels  width   depth  num_heads  patch_size   and
    ============ ============ ======= ====== ========== ============ ===========================================
    2b           16           1920    30     30         (1, 2, 2)    ``spacing=1.875``
    5b           16           3072    42     48         (1, 2, 2)    ``positions="rotary", trained_size=(60, 90)``
    5b-I2V       32           3072    42     48         (1, 2, 2)    and ``learned_size=(13, 60, 90)``
    1.5-5b       16           3072    42     48         (2, 2, 2)    ``positions="rotary"``
    1.5-5b-I2V   32           3072    42     48         (2, 2, 2)    and ``offset_dim=512``
    ============ ============ ======= ====== ========== ============ ===========================================

    Args:
        width, depth: Length of a token, number of blocks.
        patch_size: (frames, height, width).
        text_dim: Length of a text token as it comes, 4096 of T5 XXL.
        emb_dim: Length of what modulations are told.
        mlp_ratio: Width of the feed-forward in units of ``width``.
        positions: ``sincos``, added to the video's tokens, or ``rotary``, turning their queries and keys; see
            :mod:`vdiff.networks.positions`. Text has no place.
        spacing: Tokens per unit of position along height and width, without ``trained_size``.
        trained_size: (height, width) in latents. If given, other sizes are scaled to fit in it; otherwise a larger
            one goes on beyond.
        learned_size: (frames, height, width) in latents. If given, learned positions are added to text and video
            tokens, and height and width are no others; there may be fewer frames.
        text_length: Tokens of text that learned positions are for.
        offset_dim: Length of the embedding of ``ofs``; None: there is none.
        checkpointing: Keep no activations of the blocks for the backward pass.
        attention_backend: See :func:`vdiff.attention.attend`.
    """

    accepts = ("cross_attention", "concat", "ofs")
    built_by = {"ofs": "offset_dim", "cross_attention": "text_dim"}

    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        width: int = 1920,
        depth: int = 30,
        num_heads: int = 30,
        patch_size: Sequence[int] = (1, 2, 2),
        text_dim: int = 4096,
        emb_dim: int = 512,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "rotary"] = "sincos",
        spacing: float = 1.0,
        trained_size: Sequence[int] | None = None,
        learned_size: Sequence[int] | None = None,
        text_length: int = 226,
        offset_dim: int | None = None,
        checkpointing: bool = False,
        attention_backend: Backend | None = None,
    ) -> None:
        super().__init__()
        _check(width, num_heads, patch_size, positions, trained_size, learned_size)
        if trained_size is not None and spacing != 1:
            raise ValueError("CogVideoX: trained_size sets the positions; leave out spacing.")
        self.in_channels, self.width, self.head_dim = in_channels, width, width // num_heads
        self.patch: Patch = tuple(patch_size)  # type: ignore[assignment]
        self.text_dim, self.text_length, self.offset_dim = text_dim, text_length, offset_dim
        self.positioned, self.spacing, self.checkpointing = positions, spacing, checkpointing
        self.trained_grid = trained_size and [n // p for n, p in zip(trained_size, self.patch[1:], strict=True)]
        self.learned_grid = learned_size and [n // p for n, p in zip(learned_size, self.patch, strict=True)]
        self.accepts = tuple(name for name in type(self).accepts if name != "ofs" or offset_dim is not None)

        volume = self.patch[0] * self.patch[1] * self.patch[2]
        self.patch_embed = linear(in_channels * volume, width)
        self.text_embed = linear(text_dim, width)
        self.noise_embed = _mlp(width, emb_dim)
        self.offset_embed = None if offset_dim is None else _mlp(offset_dim, emb_dim)
        self.positions = None
        if self.learned_grid is not None:
            frames, height, columns = self.learned_grid
            self.positions = nn.Parameter(torch.zeros(1, text_length + frames * height * columns, width))
        self.blocks = nn.ModuleList(
            ExpertBlock(width, num_heads, int(mlp_ratio * width), emb_dim, attention_backend) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.out = ModulatedOut(width, out_channels * volume, emb_dim, affine=True)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        cond = self.accepted(cond)
        video = self._behind_x(x, cond)
        grid = self._grid(video)
        text = self.text_embed(self._text(cond))
        tokens = self.patch_embed(patchify(video, self.patch))
        num_text = text.shape[1]

        where = self._where(grid, x.device)
        turns = None
        if self.positioned == "sincos":
            tokens = tokens + sincos(where, self.width).to(tokens.dtype)
        else:  # text stands at the origin, where nothing is turned
            turns = rotations(F.pad(where, (0, 0, num_text, 0)), self.head_dim)
        tokens = torch.cat([text, tokens], dim=1)
        if self.positions is not None:
            tokens = tokens + self._learned(grid, num_text)

        mask = cond.masks.get("cross_attention")
        mask = None if mask is None else F.pad(mask, (0, tokens.shape[1] - num_text), value=True)
        emb = self._embedding(c_noise, cond, x)
        groups = None
        if emb.shape[1] > 1:
            groups = torch.arange(grid[0], device=x.device).repeat_interleave(grid[1] * grid[2])
        for block in self.blocks:
            tokens = run(block, tokens, emb, num_text, mask, turns, groups, recompute=self.checkpointing)
        patches = self.out(self.norm(tokens[:, num_text:]), emb, groups)
        return unpatchify(patches, self.patch, grid)

    def _behind_x(self, x: Tensor, cond: Conditioning) -> Tensor:
        concat = cond.get("concat")
        video = x if concat is None else behind(x, concat, "CogVideoX")
        if video.ndim != 5 or video.shape[1] != self.in_channels:
            parts = "x" if concat is None else f"x and 'concat' ({concat.shape[1]} channels)"
            raise ValueError(
                f"CogVideoX: expected {parts} to be (B, {self.in_channels}, F, H, W), got {tuple(video.shape)}."
            )
        return video

    def _grid(self, video: Tensor) -> tuple[int, int, int]:
        """How many patches there are along frames, height and width."""
        sizes = tuple(video.shape[2:])
        if any(size % patch for size, patch in zip(sizes, self.patch, strict=True)):
            near = tuple(max(round(n / p), 1) * p for n, p in zip(sizes, self.patch, strict=True))
            raise ValueError(
                f"CogVideoX: frames, height and width must be multiples of the patch {self.patch}, got {sizes}; "
                f"the nearest is {near}."
            )
        frames, height, width = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
        return frames, height, width

    def _text(self, cond: Conditioning) -> Tensor:
        text = self.needed(cond, "cross_attention")
        if text.ndim != 3 or text.shape[2] != self.text_dim:
            raise ValueError(
                f"CogVideoX: 'cross_attention' is (B, n, {self.text_dim}), got {tuple(text.shape)}. "
                "text_dim and the embedder that feeds it must agree."
            )
        return text

    def _where(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """Positions of the video's tokens, ``(N, 3)``."""
        if self.trained_grid is not None:
            return fitted(grid, self.trained_grid, device)
        frames, height, width = grid
        return coordinates(grid, (frames, height / self.spacing, width / self.spacing), device)

    def _learned(self, grid: tuple[int, int, int], num_text: int) -> Tensor:
        """Rows of the learned table, ``(1, num_text + N, width)``."""
        assert self.positions is not None and self.learned_grid is not None
        frames, *sides = self.learned_grid
        if grid[0] > frames or list(grid[1:]) != sides or num_text > self.text_length:
            sizes = [n * p for n, p in zip(self.learned_grid, self.patch, strict=True)]
            raise ValueError(
                f"CogVideoX: positions were learned for up to {sizes[0]} frames of {sizes[1]} x {sizes[2]} latents and "
                f"{self.text_length} tokens of text; got {[n * p for n, p in zip(grid, self.patch, strict=True)]} and "
                f"{num_text}."
            )
        text, video = self.positions[:, :num_text], self.positions[:, self.text_length :]
        return torch.cat([text, video[:, : grid[0] * grid[1] * grid[2]]], dim=1)

    def _embedding(self, c_noise: Tensor, cond: Conditioning, x: Tensor) -> Tensor:
        """What tokens are told, ``(B, 1, emb_dim)``, or per frame of patches, ``(B, F / f, emb_dim)``; after a SiLU."""
        if c_noise.shape != x.shape[:1] and c_noise.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"CogVideoX: c_noise is one number per row, ({len(x)},), or per frame ({len(x)}, {x.shape[2]}); "
                f"got the shape {tuple(c_noise.shape)}."
            )
        emb = self.noise_embed(sinusoidal(c_noise, self.width).to(x.dtype))
        emb = emb[:, None] if c_noise.ndim == 1 else emb.unflatten(1, (-1, self.patch[0])).mean(2)
        if self.offset_embed is not None and self.offset_dim is not None:
            ofs = cond.get("ofs")
            ofs = c_noise.new_full((len(x),), OFFSET) if ofs is None else ofs
            emb = emb + self.offset_embed(sinusoidal(ofs, self.offset_dim).to(x.dtype))[:, None]
        return F.silu(emb)


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(linear(dim, out_dim), nn.SiLU(), linear(out_dim, out_dim))


def _check(
    width: int,
    num_heads: int,
    patch: Sequence[int],
    positions: str,
    trained_size: Sequence[int] | None,
    learned_size: Sequence[int] | None,
) -> None:
    if len(patch) != 3 or any(size < 1 for size in patch):
        raise ValueError(f"CogVideoX: patch_size is (frames, height, width), got {tuple(patch)}.")
    if width % num_heads:
        raise ValueError(f"CogVideoX: num_heads={num_heads} does not divide the width {width}.")
    for name, size, along in (("trained_size", trained_size, patch[1:]), ("learned_size", learned_size, patch)):
        if size is not None and (
            len(size) != len(along) or any(n % p or n < 1 for n, p in zip(size, along, strict=True))
        ):
            raise ValueError(f"CogVideoX: {name} must be multiples of the patch {tuple(along)}, got {tuple(size)}.")
    try:
        shares(width if positions == "sincos" else width // num_heads, 3)
    except ValueError as error:
        which = "width" if positions == "sincos" else "width / num_heads"
        raise ValueError(f"CogVideoX: {positions} {error} That is {which}; change it.") from None
