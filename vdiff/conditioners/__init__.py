"""Conditioners and embedders: what a network is told besides the noisy sample."""

from vdiff.conditioners.base import Conditioner, Embedder, Embedding, Feeds
from vdiff.conditioners.composition import JOINED_ALONG, EmbedderConditioner
from vdiff.conditioners.embedders import ClassLabelEmbedder, FieldEmbedder, ScalarFourierEmbedder
from vdiff.conditioners.guidance import GuidanceScaleEmbedder
from vdiff.conditioners.huggingface import CLIPTextEmbedder, T5TextEmbedder
from vdiff.conditioners.image_latents import ImageLatentsEmbedder
from vdiff.conditioners.open_clip import OpenCLIPTextEmbedder
from vdiff.conditioners.pictures import OpenCLIPImageEmbedder
from vdiff.conditioners.resampler import ImageTokensEmbedder
from vdiff.conditioners.text import TextEmbedder

__all__ = [
    "JOINED_ALONG",
    "CLIPTextEmbedder",
    "ClassLabelEmbedder",
    "Conditioner",
    "Embedder",
    "EmbedderConditioner",
    "Embedding",
    "Feeds",
    "FieldEmbedder",
    "GuidanceScaleEmbedder",
    "ImageLatentsEmbedder",
    "ImageTokensEmbedder",
    "OpenCLIPImageEmbedder",
    "OpenCLIPTextEmbedder",
    "ScalarFourierEmbedder",
    "T5TextEmbedder",
    "TextEmbedder",
]
