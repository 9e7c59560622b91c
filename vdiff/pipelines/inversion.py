"""The noise that an image comes from, and images edited by walking down from it under other conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff.engine import Batch, DiffusionEngine
from vdiff.networks import in_eval
from vdiff.pipelines.images import encoded
from vdiff.process import Conditioning
from vdiff.samplers import Guider, NoneGuider, Sampler


@torch.no_grad()
def invert(
    engine: DiffusionEngine,
    pixels: Tensor,
    cond: Conditioning | Batch | None = None,
    strength: float = 1.0,
    *,
    negative: Conditioning | Batch | None = None,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
) -> Tensor:
    """The noise that the engine's walk leads to ``pixels``, in the space of the latents.

    Args:
        engine: What samples; its sampler, or ``sampler``, is deterministic.
        pixels: In the first stage's pixel range, ``(B, ...)``.
        cond: Conditions that describe them.
        strength: In (0, 1]: the time up to which they are walked.
        negative, sampler, guider: See :meth:`DiffusionEngine.sample`. By default without guidance, under which the
            walk back is far steadier.

    Returns:
        ``(B, ...)``, as :meth:`~vdiff.samplers.Sampler.invert` has it.

    References:
        Song et al., arXiv:2010.02502, section 5.4; Mokady et al., arXiv:2211.09794 (why without guidance).
    """
    x0 = encoded(engine, pixels)
    with in_eval(engine):
        return (sampler or engine.sampler).invert(
            engine.denoiser,
            engine.schedule,
            x0,
            engine.conditions(cond, negative),
            guider=guider or NoneGuider(),
            strength=strength,
        )


@torch.no_grad()
def edit_by_inversion(
    engine: DiffusionEngine,
    pixels: Tensor,
    source: Conditioning | Batch | None,
    target: Conditioning | Batch | None,
    strength: float = 1.0,
    *,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
) -> Tensor:
    """What ``pixels`` would be under other conditions: up under ``source``, down again under ``target``.

    Args:
        engine, pixels, sampler: See :func:`invert`.
        source: Conditions that describe ``pixels``.
        target: Conditions of what is wanted.
        strength: In (0, 1]: less keeps more.
        guider: Of the way down.

    Returns:
        Pixels, the shape of ``pixels``.
    """
    noise = invert(engine, pixels, source, strength, sampler=sampler)
    with in_eval(engine):
        x0 = (sampler or engine.sampler)(
            engine.denoiser,
            engine.schedule,
            noise,
            engine.conditions(target),
            guider=guider or engine.guider,
            x0=encoded(engine, pixels) if strength < 1 else None,
            strength=strength,
        )
        return engine.first_stage.decode(x0)
