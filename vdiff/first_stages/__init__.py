"""First stages: pixels to latents and back."""

from vdiff.first_stages.autoencoder_kl import AutoencoderKL
from vdiff.first_stages.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from vdiff.first_stages.base import Autoencoder, FirstStage, Reconstruction
from vdiff.first_stages.convolutional import ConvolutionalAutoencoder
from vdiff.first_stages.frames_as_channels import FramesAsChannelsFirstStage
from vdiff.first_stages.gaussian import DiagonalGaussian, GaussianAutoencoder
from vdiff.first_stages.identity import IdentityFirstStage
from vdiff.first_stages.temporal_decoder import TemporalDecoderAutoencoder
from vdiff.first_stages.vq import Codebook, VQAutoencoder

__all__ = [
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "Codebook",
    "ConvolutionalAutoencoder",
    "DiagonalGaussian",
    "FirstStage",
    "FramesAsChannelsFirstStage",
    "GaussianAutoencoder",
    "IdentityFirstStage",
    "Reconstruction",
    "TemporalDecoderAutoencoder",
    "VQAutoencoder",
]
