"""Tiny random checkpoints of every published family, as their originals lay them out."""

import torch

from vdiff.checkpoints import FAMILIES
from vdiff.checkpoints.architecture import Told
from vdiff.first_stages import AutoencoderKL, AutoencoderKLCogVideoX, TemporalDecoderAutoencoder
from vdiff.networks import CogVideoX, LVDMUNet, UNet, VideoUNet

UNET = dict(
    in_channels=4, out_channels=4, channels=8, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(2,), head_dim=8, norm_groups=4,
)  # fmt: skip
COG = dict(
    in_channels=8, out_channels=4, width=32, depth=2, num_heads=2, text_dim=12, emb_dim=8, text_length=6,
    positions="rotary",
)  # fmt: skip
STAGE = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)

# Family: how it is built, and what no shape of so small a model tells.
MODELS = {
    "unet": (lambda: UNet(**UNET, num_classes="sequential", vector_dim=6), {}),
    "video_unet": (lambda: VideoUNet(**UNET), {}),
    "sv4d_unet": (lambda: VideoUNet(**UNET, motion_context_dim=12), {}),
    "lvdm_unet": (lambda: LVDMUNet(**UNET, fps=False), {}),
    "cogvideox": (lambda: CogVideoX(**COG, trained_size=(8, 12), learned_size=(4, 8, 12)), {"patch_frames": 1}),
    "autoencoder_kl": (lambda: AutoencoderKL(**STAGE), {}),
    "temporal_decoder": (lambda: TemporalDecoderAutoencoder(**STAGE, quant_conv=True), {}),
    "autoencoder_kl_cogvideox": (lambda: AutoencoderKLCogVideoX(**STAGE, latent_channels=4, time_factor=2), {}),
}
FAMILY = {family.name: family for family in FAMILIES}
LAYOUTS = [(family.name, layout.name) for family in FAMILIES for layout in family.layouts]


def weights(name, layout="vdiff", prefix=""):
    """Of a family in a layout; no two tensors are alike."""
    build, given = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    ours = {n: torch.randn(v.shape, generator=generator) for n, v in build().state_dict().items()}
    table = FAMILY[name].layout(layout).table(Told(ours, given))
    return {prefix + n: v for n, v in table(ours).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
