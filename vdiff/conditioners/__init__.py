"""Conditioners and embedders: what a network is told besides the noisy sample."""

from vdiff.conditioners.base import JOINED_ALONG, Conditioner, Embedder, EmbedderConditioner
from vdiff.conditioners.embedders import ClassLabelEmbedder, ScalarFourierEmbedder

__all__ = [
    "JOINED_ALONG",
    "ClassLabelEmbedder",
    "Conditioner",
    "Embedder",
    "EmbedderConditioner",
    "ScalarFourierEmbedder",
]
