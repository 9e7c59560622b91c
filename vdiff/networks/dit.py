"""The diffusion transformer, DiT, arXiv:2212.09748, for images and for videos.

Patches become tokens, every token attends to every other, and the noise level enters through the
normalisations. Text enters by cross-attention or as tokens of its own in front of the others. The state dict::

    patch_embed, out                 patches to tokens, tokens to patches
    noise_embed                      the noise number; and label_embed, vector_embed, added to it
    context_embed                    text tokens, where they join the sequence
    blocks.i                         one :class:`ModulatedBlock` each
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
from vdiff.networks.modulated import ModulatedBlock, ModulatedOut, linear
from vdiff.networks.patches import Patch, patchify, unpatchify
from vdiff.networks.positions import coordinates, rotations, shares, sincos
from vdiff.process import Conditioning

NOISE_DIM = 256  # length of the sinusoidal embedding, as published


class DiT(Network, name="dit"):
    """Images ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, or videos ``(B, c, F, H, W)`` likewise.

    Sizes are any multiples of the patch. ``c_noise`` goes into a sinusoidal embedding as it is, one number
    per row, ``(B,)``, or per frame of a video, ``(B, F)``. It begins by saying zero.

    Conditions, each only where the network is built for it:

    - ``cross_attention`` ``(B, n, context_dim)``, and its mask ``(B, n)``, True counts;
    - ``vector`` ``(B, vector_dim)``;
    - ``label`` ``(B,)``, whole numbers;
    - ``concat`` ``(B, c, H, W)`` or ``(B, c, F, H, W)``, put behind x; ``in_channels`` counts both.

    Args:
        width, depth: Length of a token, number of blocks. The paper's S, B, L and XL have (384, 12),
            (768, 12), (1024, 24) and (1152, 28), with 6, 12, 16 and 16 heads.
        patch_size: A number or (height, width) for a network of images; (frames, height, width) for one of
            videos, to which an image is a video of one frame. Where a patch spans several frames and each
            has a noise level of its own, the patch is told the mean of their embeddings.
        mlp_ratio: Width of the feed-forward in units of ``width``.
        positions: ``sincos``, added to the tokens, or ``rotary``, turning queries and keys; see
            :mod:`vdiff.networks.positions`.
        trained_size: Size of the training data, (height, width) or (frames, height, width) in pixels or
            latents as they come in. If given, other sizes are stretched to it; otherwise a larger
            one goes on beyond.
        context_dim: Length of the tokens in ``cross_attention``; None for a network without text.
        context_by: ``cross_attention``, an attention of its own in each block, or ``concatenation``: text
            tokens stand in front of the others, at the origin, and pass through the same layers. Where
            each frame has its own level, they are told the mean of the frames' embeddings.
        num_classes: How many labels there are; for guidance count the empty label as well.
        vector_dim: Length of ``vector``.
        qk_norm: See :class:`TokenAttention`.
        checkpointing: Keep no activations of the blocks for the backward pass.
        attention_backend: See :func:`vdiff.attention.attend`.
    """

    accepts = ("cross_attention", "vector", "label", "concat")
    entrance = "patch_embed"
    built_by = {"cross_attention": "context_dim", "vector": "vector_dim", "label": "num_classes"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int | Sequence[int] = 2,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "rotary"] = "sincos",
        trained_size: Sequence[int] | None = None,
        context_dim: int | None = None,
        context_by: Literal["cross_attention", "concatenation"] = "cross_attention",
        num_classes: int | None = None,
        vector_dim: int | None = None,
        qk_norm: bool = False,
        checkpointing: bool = False,
        attention_backend: Backend | None = None,
    ) -> None:
        super().__init__()
        sizes = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        _check(width, num_heads, sizes, trained_size, positions)
        self.in_channels, self.width = in_channels, width
        self.num_axes = len(sizes)
        self.patch: Patch = (1, *sizes) if len(sizes) == 2 else sizes  # type: ignore[assignment]
        self.positions, self.head_dim = positions, width // num_heads
        self.trained_grid = trained_size and [n // p for n, p in zip(trained_size, sizes, strict=True)]
        self.context_dim, self.vector_dim, self.num_classes = context_dim, vector_dim, num_classes
        self.checkpointing = checkpointing
        built_for = {"cross_attention": context_dim, "vector": vector_dim, "label": num_classes, "concat": True}
        self.accepts = tuple(name for name in type(self).accepts if built_for[name] is not None)

        volume = self.patch[0] * self.patch[1] * self.patch[2]
        self.patch_embed = linear(in_channels * volume, width)
        self.noise_embed = _mlp(NOISE_DIM, width)
        self.label_embed = None if num_classes is None else nn.Embedding(num_classes, width)
        self.vector_embed = None if vector_dim is None else _mlp(vector_dim, width)
        joins = context_dim is not None and context_by == "concatenation"
        self.context_embed = linear(context_dim, width) if joins and context_dim else None
        attends = None if joins else context_dim
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, num_heads, int(mlp_ratio * width), attends, qk_norm, attention_backend)
            for _ in range(depth)
        )
        self.out = ModulatedOut(width, out_channels * volume)
        for layer in (self.noise_embed, self.label_embed):  # as the paper's code begins
            for module in () if layer is None else layer.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
        cond = self.accepted(cond)
        video = self._as_video(x, cond)
        grid = self._grid(video)
        tokens = self.patch_embed(patchify(video, self.patch))
        emb = self._embedding(c_noise, cond, x)
        context = None if self.context_dim is None else self.needed(cond, "cross_attention")
        mask = None if context is None else cond.masks.get("cross_attention")

        where = coordinates(grid[-self.num_axes :], self.trained_grid, x.device)
        if self.positions == "sincos":
            tokens = tokens + sincos(where, self.width).to(tokens.dtype)
        num_text = 0
        if self.context_embed is not None and context is not None:
            num_text = context.shape[1]
            tokens = torch.cat([self.context_embed(context), tokens], dim=1)
            where = torch.cat([where.new_zeros(num_text, self.num_axes), where])
            mask = None if mask is None else F.pad(mask, (0, tokens.shape[1] - num_text), value=True)
        turns = rotations(where, self.head_dim) if self.positions == "rotary" else None
        emb, groups = self._groups(emb, grid, num_text)
        for block in self.blocks:
            tokens = run(block, tokens, emb, context, mask, turns, groups, recompute=self.checkpointing)
        patches = self.out(tokens[:, num_text:], emb, None if groups is None else groups[num_text:])
        return unpatchify(patches, self.patch, grid).reshape(len(x), -1, *x.shape[2:])

    def _as_video(self, x: Tensor, cond: Conditioning) -> Tensor:
        concat = cond.get("concat")
        if concat is not None:
            x = behind(x, concat, "DiT")
        ndims = (4,) if self.num_axes == 2 else (4, 5)
        if x.ndim not in ndims or x.shape[1] != self.in_channels:
            parts = "x" if concat is None else f"x and 'concat' ({concat.shape[1]} channels)"
            shape = f"(B, {self.in_channels}, {'H' if self.num_axes == 2 else 'F, H'}, W)"
            hint = " For videos give patch_size three numbers: (frames, height, width)." if x.ndim == 5 else ""
            raise ValueError(f"DiT: expected {parts} to be {shape}, got {tuple(x.shape)}.{hint}")
        return x[:, :, None] if x.ndim == 4 else x

    def _grid(self, video: Tensor) -> tuple[int, int, int]:
        """How many patches there are along frames, height and width."""
        sizes = tuple(video.shape[2:])
        if any(size % patch for size, patch in zip(sizes, self.patch, strict=True)):
            near = tuple(max(round(n / p), 1) * p for n, p in zip(sizes, self.patch, strict=True))
            raise ValueError(
                f"DiT: frames, height and width must be multiples of the patch {self.patch}, got {sizes}; "
                f"the nearest is {near}."
            )
        frames, height, width = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
        return frames, height, width

    def _embedding(self, c_noise: Tensor, cond: Conditioning, x: Tensor) -> Tensor:
        """What tokens are told, ``(B, 1, width)``, or per frame of patches, ``(B, F / f, width)``; after its SiLU."""
        if c_noise.shape != x.shape[:1] and not (x.ndim == 5 and c_noise.shape == (x.shape[0], x.shape[2])):
            shapes = f"({len(x)},)" if x.ndim == 4 else f"({len(x)},) or per frame ({len(x)}, {x.shape[2]})"
            raise ValueError(f"DiT: c_noise is one number per row, {shapes}; got the shape {tuple(c_noise.shape)}.")
        emb = self.noise_embed(sinusoidal(c_noise, NOISE_DIM).to(x.dtype))
        emb = emb[:, None] if c_noise.ndim == 1 else emb.unflatten(1, (-1, self.patch[0])).mean(2)
        if self.label_embed is not None:
            emb = emb + self.label_embed(self.needed(cond, "label"))[:, None]
        if self.vector_embed is not None:
            vector = self.needed(cond, "vector")
            if vector.shape[1:] != (self.vector_dim,):
                raise ValueError(
                    f"DiT: vector_dim is {self.vector_dim}, and the embeddings that feed 'vector' are "
                    f"{tuple(vector.shape[1:])} wide. Make the two agree."
                )
            emb = emb + self.vector_embed(vector)[:, None]
        return F.silu(emb)

    def _groups(self, emb: Tensor, grid: tuple[int, int, int], num_text: int) -> tuple[Tensor, Tensor | None]:
        """The embeddings, and which of them each token is told; None where there is one for all."""
        if emb.shape[1] == 1:
            return emb, None
        groups = torch.arange(grid[0], device=emb.device).repeat_interleave(grid[1] * grid[2])
        if not num_text:
            return emb, groups
        emb = torch.cat([emb, emb.mean(1, keepdim=True)], dim=1)
        return emb, F.pad(groups, (num_text, 0), value=grid[0])


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(linear(dim, out_dim), nn.SiLU(), linear(out_dim, out_dim))


def _check(
    width: int, num_heads: int, patch: tuple[int, ...], trained_size: Sequence[int] | None, positions: str
) -> None:
    if len(patch) not in (2, 3) or any(size < 1 for size in patch):
        raise ValueError(f"DiT: patch_size is a number, (height, width) or (frames, height, width), got {patch}.")
    if width % num_heads:
        raise ValueError(f"DiT: num_heads={num_heads} does not divide the width {width}.")
    if trained_size is not None and (
        len(trained_size) != len(patch) or any(n % p or not n for n, p in zip(trained_size, patch, strict=True))
    ):
        raise ValueError(
            f"DiT: trained_size must have a multiple of the patch {patch} along each axis, got {tuple(trained_size)}."
        )
    try:
        shares(width if positions == "sincos" else width // num_heads, len(patch))
    except ValueError as error:
        which = "width" if positions == "sincos" else "width / num_heads"
        raise ValueError(f"DiT: {positions} {error} That is {which}; change it.") from None
