"""The engine: the only hub where the wings of motion and matter meet."""

from vdiff.engine.diffusion import Batch, DiffusionEngine, Engine

__all__ = ["Batch", "DiffusionEngine", "Engine"]
