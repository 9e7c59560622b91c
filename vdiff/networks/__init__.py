"""F_theta: what maps a noisy sample, its noise number and conditions to a tensor of the sample's kind."""

from vdiff.networks.base import Network
from vdiff.networks.cogvideox import CogVideoX
from vdiff.networks.dit import DiT
from vdiff.networks.embeddings import sinusoidal
from vdiff.networks.expert import ExpertBlock
from vdiff.networks.layers import Downsample, GroupNorm, Upsample, zeroed
from vdiff.networks.lvdm_layers import (
    ConvolvedResBlock,
    FrameAttention,
    FrameTransformer,
    ImageCrossAttention,
    TemporalConvolution,
)
from vdiff.networks.lvdm_unet import LVDMUNet
from vdiff.networks.modes import in_eval
from vdiff.networks.modulated import ModulatedBlock, TokenAttention, TokenFeedForward
from vdiff.networks.multi_view import MultiViewTransformer
from vdiff.networks.patches import patchify, unpatchify
from vdiff.networks.resampler import PerceiverAttention, Resampler
from vdiff.networks.resblock import ResBlock
from vdiff.networks.temporal import (
    AlphaBlender,
    Clip,
    TemporalResBlock,
    TemporalTransformerBlock,
    VideoResBlock,
    VideoTransformer,
)
from vdiff.networks.transformer import (
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from vdiff.networks.unet import UNet
from vdiff.networks.video_unet import VideoUNet

__all__ = [
    "AlphaBlender",
    "AttentionBlock",
    "BasicTransformerBlock",
    "Clip",
    "CogVideoX",
    "ConvolvedResBlock",
    "CrossAttention",
    "DiT",
    "Downsample",
    "ExpertBlock",
    "FeedForward",
    "FrameAttention",
    "FrameTransformer",
    "GroupNorm",
    "ImageCrossAttention",
    "LVDMUNet",
    "ModulatedBlock",
    "MultiViewTransformer",
    "Network",
    "PerceiverAttention",
    "ResBlock",
    "Resampler",
    "SpatialTransformer",
    "TemporalConvolution",
    "TemporalResBlock",
    "TemporalTransformerBlock",
    "TokenAttention",
    "TokenFeedForward",
    "UNet",
    "Upsample",
    "VideoResBlock",
    "VideoTransformer",
    "VideoUNet",
    "in_eval",
    "patchify",
    "sinusoidal",
    "unpatchify",
    "zeroed",
]
