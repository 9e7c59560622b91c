"""First stages: pixels to latents and back."""

from vdiff.first_stages.base import FirstStage
from vdiff.first_stages.identity import IdentityFirstStage

__all__ = ["FirstStage", "IdentityFirstStage"]
