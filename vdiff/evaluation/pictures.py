"""Pictures to look at: grids and titled rows of samples."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vdiff.evaluation.files import write_whole

_TILE = 48  # small pictures are enlarged until a side has about this many pixels
_PAPER, _INK = (255, 255, 255), (90, 90, 90)


def grid(
    images: Tensor,
    columns: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
    upscale: int | None = None,
    labels: Sequence[object] | Tensor | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Pictures in rows and columns on white, separated by thin gaps.

    Args:
        images: ``(N, 1 or 3, H, W)`` from ``low`` (black) to ``high`` (white); values beyond are clipped, NaN is black.
        columns: By default as square as it gets.
        upscale: Whole factor of enlargement; by default small pictures grow to about 48 pixels.
        labels: A short caption under each picture.
        smooth: Whether to enlarge by bicubic interpolation; otherwise every pixel becomes a crisp square.
    """
    tiles = _tiles(images, low, high, upscale, smooth)
    if labels is not None and len(labels) != len(tiles):
        raise ValueError(f"grid: {len(tiles)} pictures came with {len(labels)} labels; give one each.")
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    width, height = tiles[0].size
    gap, size = _gap(width), _text_size(width)
    font = _font(size)
    below = round(1.5 * size) if labels is not None else 0
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, tile in enumerate(tiles):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        canvas.paste(tile, (x, y))
        if labels is not None:
            text = _shortened(str(_plain(labels[i])), font, width)
            draw.text((x + width / 2, y + height + below / 2), text, fill=_INK, font=font, anchor="mm")
    return canvas


def titled_rows(
    rows: Mapping[str, Tensor],
    low: float = -1.0,
    high: float = 1.0,
    upscale: int | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Rows of pictures, each with its title to the left: inputs, noised, denoised, samples.

    Args:
        rows: Title to pictures ``(N, 1 or 3, H, W)``; rows may differ in length, not in the pictures' size.
        low, high, upscale, smooth: See :func:`grid`.
    """
    if not rows:
        raise ValueError("titled_rows: no rows came; give at least one title with its pictures.")
    sizes = {title: tuple(images.shape[-2:]) for title, images in rows.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"titled_rows: pictures of one size are needed in all rows, got {sizes}.")
    drawn = {title: _tiles(images, low, high, upscale, smooth) for title, images in rows.items()}
    width, height = next(iter(drawn.values()))[0].size
    gap, size = _gap(width), max(11, _text_size(width))
    font = _font(size)
    margin = round(max(font.getlength(title) for title in rows) + 2 * size)
    longest = max(len(tiles) for tiles in drawn.values())
    canvas = Image.new("RGB", (margin + longest * (width + gap), len(rows) * (height + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (title, tiles) in enumerate(drawn.items()):
        y = gap + row * (height + gap)
        draw.text((margin - size, y + height / 2), title, fill=_INK, font=font, anchor="rm")
        for column, tile in enumerate(tiles):
            canvas.paste(tile, (margin + column * (width + gap), y))
    return canvas


def save_picture(image: Image.Image, file: str | Path) -> None:
    """Write a PNG in one act. The same picture gives the same bytes: no date and no other remarks are written."""
    file = Path(file)
    if file.suffix.lower() != ".png":
        raise ValueError(f"save_picture: pictures are saved as .png, got {file.name!r}.")
    content = io.BytesIO()
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    bare.save(content, format="PNG", compress_level=9)
    write_whole(file, content.getvalue())


def _tiles(images: Tensor, low: float, high: float, upscale: int | None, smooth: bool) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"pictures: expected (N, C, H, W) with C 1 (grey) or 3 (RGB), none of them 0; got {tuple(images.shape)}."
        )
    if not high > low:
        raise ValueError(f"pictures: low {low} is black and high {high} is white; high must be the larger.")
    height, width = images.shape[-2:]
    factor = upscale or max(1, round(_TILE / min(height, width)))
    unit = ((images.detach().float() - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)
    values = (unit * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return [Image.fromarray(v).resize((width * factor, height * factor), method) for v in values]


def _gap(width: int) -> int:
    return max(2, width // 12)


def _text_size(width: int) -> int:
    return min(20, max(9, width // 5))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that no machine's fonts matter."""
    return ImageFont.load_default(size)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, Tensor) else label
