"""F_theta: what maps a noisy sample, its noise number and conditions to a tensor of the sample's kind."""

from vdiff.networks.base import Network
from vdiff.networks.dit import DiT
from vdiff.networks.embeddings import sinusoidal
from vdiff.networks.layers import Downsample, GroupNorm, Upsample, zeroed
from vdiff.networks.modes import in_eval
from vdiff.networks.modulated import ModulatedBlock, TokenAttention, TokenFeedForward
from vdiff.networks.patches import patchify, unpatchify
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import (
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from vdiff.networks.unet import UNet

__all__ = [
    "AttentionBlock",
    "BasicTransformerBlock",
    "CrossAttention",
    "DiT",
    "Downsample",
    "FeedForward",
    "GroupNorm",
    "ModulatedBlock",
    "Network",
    "ResBlock",
    "SpatialTransformer",
    "TokenAttention",
    "TokenFeedForward",
    "UNet",
    "Upsample",
    "in_eval",
    "patchify",
    "sinusoidal",
    "unpatchify",
    "zeroed",
]
