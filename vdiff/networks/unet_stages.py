"""How the stages of a UNet follow each other, whatever they are made of, and what its arguments must agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from vdiff.process import Conditioning

Direction = Literal["up", "down"]


class Stages(NamedTuple):
    """The modules of a UNet under latent diffusion's names, and the width in which they end."""

    input_blocks: nn.ModuleList
    middle_block: nn.Module
    output_blocks: nn.ModuleList
    width: int


class Encoder(Protocol):
    """A UNet as far as its middle, which a copy may walk alone; its ``role`` is ``unet``."""

    input_blocks: nn.ModuleList
    middle_block: nn.Module

    def begin(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> tuple[Tensor, tuple]:
        """What x is behind the first block, ``(rows, channels, ...)``, and what every block is told besides."""
        ...


def encode(net: Encoder, h: Tensor, told: tuple) -> tuple[Tensor, list[Tensor]]:
    """From there on: what leaves the middle, and the skips, one from each block on the way down."""
    _, *blocks = net.input_blocks
    skips = [h]
    for block in blocks:
        h = block(h, *told)
        skips.append(h)
    return net.middle_block(h, *told), skips


def assemble(
    in_channels: int,
    channels: int,
    widths: Sequence[int],
    num_res_blocks: Sequence[int],
    attention_factors: Sequence[int],
    res_block: Callable[[int, int], nn.Module],
    attention: Callable[[int, int | None], nn.Module],
    resample: Callable[[int, Direction], nn.Module],
    stage: Callable[..., nn.Module],
    convolution: type[nn.Module] = nn.Conv2d,
) -> Stages:
    """The way down, the middle, and the way up, whose every stage takes one skip connection.

    Args:
        widths, num_res_blocks: By level; one block more on the way up.
        attention_factors: Downsampling factors of the levels with attention; the middle always has it.
        res_block: From a width to a width.
        attention: At a width and level; None is the middle.
        resample: At a width.
        stage: Of the modules that one stage runs.
        convolution: The class of the first layer.
    """
    levels = range(len(widths))
    input_blocks = nn.ModuleList([stage(convolution(in_channels, channels, 3, padding=1))])
    skips, width = [channels], channels
    for level in levels:
        for _ in range(num_res_blocks[level]):
            layers = [res_block(width, widths[level])]
            width = widths[level]
            if 2**level in attention_factors:
                layers.append(attention(width, level))
            input_blocks.append(stage(*layers))
            skips.append(width)
        if level < levels[-1]:
            input_blocks.append(stage(resample(width, "down")))
            skips.append(width)

    middle_block = stage(res_block(width, width), attention(width, None), res_block(width, width))

    output_blocks = nn.ModuleList()
    for level in reversed(levels):
        for i in range(num_res_blocks[level] + 1):
            layers = [res_block(width + skips.pop(), widths[level])]
            width = widths[level]
            if 2**level in attention_factors:
                layers.append(attention(width, level))
            if level and i == num_res_blocks[level]:
                layers.append(resample(width, "up"))
            output_blocks.append(stage(*layers))
    return Stages(input_blocks, middle_block, output_blocks, width)


def mlp(dim: int, hidden_dim: int, out_dim: int | None = None) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim or hidden_dim))


def label_embedding(
    who: str, num_classes: int | str | None, vector_dim: int | None, embedding_dim: int
) -> nn.Module | None:
    """What embeds a label or a vector, None where there is neither."""
    if (num_classes == "sequential") != (vector_dim is not None):
        raise ValueError(
            f"{who}: num_classes='sequential' and vector_dim go together, got {num_classes!r} and {vector_dim}."
        )
    if num_classes is None:
        return None
    if vector_dim is not None:
        return nn.Sequential(mlp(vector_dim, embedding_dim))
    if num_classes == "continuous":
        return nn.Linear(1, embedding_dim)
    return nn.Embedding(int(num_classes), embedding_dim)


def per_level(who: str, name: str, value: int | bool | Sequence, levels: int) -> list:
    """One value for each level, from one for all or one for each."""
    if isinstance(value, int):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{who}: {name} has {len(value)} values for {levels} levels: {list(value)}.")
    return list(value)


def check_widths(who: str, channels: int, widths: Sequence[int], norm_groups: int) -> None:
    for width in (channels, *widths):
        if width % norm_groups:
            raise ValueError(
                f"{who}: every width must be a multiple of norm_groups={norm_groups}, got {width} "
                f"(channels={channels}). Change channels, or norm_groups for a small network."
            )


def check_attention(
    who: str, widths: Sequence[int], attention_factors: Sequence[int], num_heads: int | None, head_dim: int | None
) -> None:
    factors = [2**level for level in range(len(widths))]
    for factor in attention_factors:
        if factor not in factors:
            raise ValueError(f"{who}: attention_factors has {factor}, but the levels downsample by {factors}.")
    divisor = num_heads or head_dim
    if not divisor or (num_heads and head_dim):
        raise ValueError(f"{who}: give num_heads or head_dim, one of them; got {num_heads} and {head_dim}.")
    for factor, width in zip(factors, widths, strict=True):
        if (factor in attention_factors or factor == factors[-1]) and width % divisor:
            what = f"num_heads={num_heads}" if num_heads else f"head_dim={head_dim}"
            raise ValueError(f"{who}: {what} does not divide the width {width} at downsampling factor {factor}.")


def check_size(who: str, height: int, width: int, factor: int) -> None:
    if height % factor or width % factor:
        near = tuple(max(round(n / factor), 1) * factor for n in (height, width))
        raise ValueError(
            f"{who}: height and width must be multiples of {factor}, got {(height, width)}; the nearest is {near}."
        )
