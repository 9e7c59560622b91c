"""vdiff: a library for research on image and video diffusion.

Define a class and it is registered; write a YAML file and it is an engine; attach a mixin to any
network and take it off again bit for bit.
"""

from vdiff.registry import build, load_config, register

__all__ = ["build", "load_config", "register"]
__version__ = "0.1.0"
