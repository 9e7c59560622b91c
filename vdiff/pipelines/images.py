"""Images and videos made anew from given ones, as a whole or in part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.engine import Batch, DiffusionEngine
from vdiff.first_stages import FirstStage, IdentityFirstStage
from vdiff.networks import in_eval
from vdiff.process import Conditioning
from vdiff.samplers import Callback, Edit, Guider, Inpainting, Sampler, in_turn


@torch.no_grad()
def image_to_image(
    engine: DiffusionEngine,
    pixels: Tensor,
    cond: Conditioning | Batch | None = None,
    strength: float = 0.6,
    *,
    negative: Conditioning | Batch | None = None,
    seeds: int | Sequence[int] = 0,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
    edit: Edit | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Variations of images or videos: noise is added up to time ``strength`` and taken away again (SDEdit).

    Args:
        engine: What samples.
        pixels: In the first stage's pixel range, ``(B, ...)``; one row may be repeated for several seeds.
        cond, negative, seeds, sampler, guider, edit, callback, progress: See :meth:`DiffusionEngine.sample`.
        strength: In (0, 1]: how much is made anew. The walk has as many steps as the sampler's own below that time.

    Returns:
        Pixels, the shape of ``pixels``.

    References:
        Meng et al., arXiv:2108.01073.
    """
    return engine.sample(
        cond,
        negative=negative,
        seeds=seeds,
        sampler=sampler,
        guider=guider,
        x0=encoded(engine, pixels),
        strength=strength,
        edit=edit,
        callback=callback,
        progress=progress,
    )


@torch.no_grad()
def inpaint(
    engine: DiffusionEngine,
    pixels: Tensor,
    mask: Tensor,
    cond: Conditioning | Batch | None = None,
    strength: float = 1.0,
    *,
    negative: Conditioning | Batch | None = None,
    seeds: int | Sequence[int] = 0,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
    edit: Edit | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    paste: bool = True,
) -> Tensor:
    """Parts of images or videos made anew to fit the rest, with a model that was not trained for it.

    The known parts walk down with the one noise they began with; see :class:`~vdiff.samplers.Inpainting`.

    Args:
        engine: What samples.
        pixels: In the first stage's pixel range, ``(B, c, h, w)`` or ``(B, c, f, h, w)``.
        mask: 1 where pixels are made anew, 0 where they are known: ``(B or 1, 1, h, w)`` or ``(B or 1, 1, f, h, w)``.
        cond, negative, seeds, sampler, guider, edit, callback, progress: See :meth:`DiffusionEngine.sample`.
        strength: In (0, 1]: below 1 the parts made anew keep something of what they were.
        paste: Put the known pixels back at the end; they come back through the first stage otherwise.

    Returns:
        Pixels, the shape of ``pixels``.

    References:
        Lugmayr et al., arXiv:2201.09865, section 4.1 (without resampling).
    """
    x0 = encoded(engine, pixels)
    known = Inpainting(x0, latent_mask(mask, x0, engine.first_stage).to(x0.device))
    out = engine.sample(
        cond,
        negative=negative,
        seeds=seeds,
        sampler=sampler,
        guider=guider,
        x0=x0,
        strength=strength,
        edit=known if edit is None else in_turn(edit, known),
        callback=callback,
        progress=progress,
    )
    return torch.where(mask.to(out.device) > 0, out, pixels.to(out)) if paste else out


def encoded(engine: DiffusionEngine, pixels: Tensor) -> Tensor:
    """The latents of ``pixels``, without gradient and in eval mode.

    Raises:
        ValueError: they are no pixels, see :meth:`FirstStage.check_pixels`.
    """
    engine.first_stage.check_pixels(pixels, type(engine.first_stage).__name__)
    with in_eval(engine.first_stage):
        return engine.first_stage.encode(pixels.to(engine.device))


def latent_mask(mask: Tensor, latents: Tensor, first_stage: FirstStage | None = None) -> Tensor:
    """The mask at the resolution of ``latents``: one where any pixel of the cell is made anew.

    Args:
        mask: ``(B or 1, 1, h, w)`` or ``(B or 1, 1, f, h, w)``.
        latents: ``(B, c, ...)`` with as many axes.
        first_stage: Says which pixels a latent stands for; by default cells are even.
    """
    if mask.ndim != latents.ndim or mask.ndim not in (4, 5) or mask.shape[1] != 1:
        raise ValueError(
            f"inpainting: a mask of shape {tuple(mask.shape)} for latents of shape {tuple(latents.shape)}; it has one "
            "channel and as many axes."
        )
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"inpainting: a mask lies in [0, 1], got {mask.min():.3g} to {mask.max():.3g}.")
    stage = IdentityFirstStage() if first_stage is None else first_stage
    return stage.latent_mask(mask, latents.shape[2:]).to(latents.dtype)
