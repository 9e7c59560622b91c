"""Tasks as a few calls on an engine each, from pixels to pixels."""

from vdiff.pipelines.images import image_to_image, inpaint, latent_mask
from vdiff.pipelines.inversion import edit_by_inversion, invert
from vdiff.pipelines.joint import complete, sample_pairs, streams_of

__all__ = [
    "complete",
    "edit_by_inversion",
    "image_to_image",
    "inpaint",
    "invert",
    "latent_mask",
    "sample_pairs",
    "streams_of",
]
