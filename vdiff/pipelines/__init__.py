"""Tasks as a few calls on an engine each, from pixels to pixels."""

from vdiff.pipelines.images import image_to_image, inpaint, latent_mask
from vdiff.pipelines.inversion import edit_by_inversion, invert

__all__ = ["edit_by_inversion", "image_to_image", "inpaint", "invert", "latent_mask"]
