"""The engine: the only hub where the wings of motion and matter meet."""

from vdiff.engine.autoencoder import AutoencoderEngine
from vdiff.engine.base import Batch, Engine
from vdiff.engine.diffusion import DiffusionEngine

__all__ = ["AutoencoderEngine", "Batch", "DiffusionEngine", "Engine"]
