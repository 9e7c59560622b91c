"""Tiny random checkpoints of every published family, as their originals lay them out."""

import torch

from vdiff.checkpoints import FAMILIES
from vdiff.checkpoints.architecture import Told
from vdiff.conditioners import CLIPTextEmbedder, OpenCLIPImageEmbedder, OpenCLIPTextEmbedder, T5TextEmbedder
from vdiff.first_stages import AutoencoderKL, AutoencoderKLCogVideoX, TemporalDecoderAutoencoder, VQAutoencoder
from vdiff.mixins import ControlNet
from vdiff.networks import CogVideoX, LVDMUNet, Resampler, UNet, VideoUNet

UNET = dict(
    in_channels=4, out_channels=4, channels=8, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(2,), head_dim=8, norm_groups=4,
)  # fmt: skip
COG = dict(
    in_channels=8, out_channels=4, width=32, depth=2, num_heads=2, text_dim=12, emb_dim=8, text_length=6,
    positions="rotary",
)  # fmt: skip
# OpenAI's towers are told by their width.
CLIP = dict(
    hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, max_position_embeddings=16,
    vocab_size=100,
)  # fmt: skip
OPEN_CLIP = dict(embed_dim=24, width=16, heads=2, layers=2, context_length=16, vocab_size=100)
VISION = dict(embed_dim=12, width=16, head_width=8, layers=2, patch_size=8, image_size=16)
T5 = dict(d_model=12, d_ff=16, num_layers=2, num_heads=2, d_kv=4, feed_forward_proj="gated-gelu", vocab_size=32)
STAGE = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)


def controlling(net):
    """The copy of a network that a ControlNet is."""
    return ControlNet(hint_channels=1).attach(net)._sites[""][1].control_model


# Family: how it is built, and what no shape of so small a model tells.
MODELS = {
    "unet": (lambda: UNet(**UNET, num_classes="sequential", vector_dim=6), {}),
    "video_unet": (lambda: VideoUNet(**UNET), {}),
    "sv4d_unet": (lambda: VideoUNet(**UNET, motion_context_dim=12), {}),
    "lvdm_unet": (lambda: LVDMUNet(**UNET, fps=False), {}),
    "controlnet": (lambda: controlling(UNet(**UNET, num_classes="sequential", vector_dim=6)), {}),
    "video_controlnet": (lambda: controlling(VideoUNet(**UNET)), {}),
    "sv4d_controlnet": (lambda: controlling(VideoUNet(**UNET, motion_context_dim=12)), {}),
    "cogvideox": (lambda: CogVideoX(**COG, trained_size=(8, 12), learned_size=(4, 8, 12)), {"patch_frames": 1}),
    "autoencoder_kl": (lambda: AutoencoderKL(**STAGE), {}),
    "temporal_decoder": (lambda: TemporalDecoderAutoencoder(**STAGE, quant_conv=True), {}),
    "autoencoder_kl_cogvideox": (lambda: AutoencoderKLCogVideoX(**STAGE, latent_channels=4, time_factor=2), {}),
    "vq": (lambda: VQAutoencoder(16, latent_channels=3, **STAGE), {}),
    "clip_text": (lambda: CLIPTextEmbedder(CLIP), {}),
    "open_clip_text": (lambda: OpenCLIPTextEmbedder(OPEN_CLIP), {}),
    "open_clip_image": (lambda: OpenCLIPImageEmbedder(VISION), {}),
    "resampler": (lambda: Resampler(16, 12, 4, 8, 2, 2, 4), {}),
    "t5_text": (lambda: T5TextEmbedder(T5, length=6), {}),
}
# Of a layout whose marks the one above lacks.
MODELS_OF_LAYOUT = {("lvdm_unet", "dynamicrafter_256"): lambda: LVDMUNet(**UNET)}
FAMILY = {family.name: family for family in FAMILIES}
LAYOUTS = [(family.name, layout.name) for family in FAMILIES for layout in family.layouts]


def weights(name, layout="vdiff", prefix=""):
    """Of a family in a layout; no two tensors are alike."""
    build, given = MODELS[name]
    build = MODELS_OF_LAYOUT.get((name, layout), build)
    generator = torch.Generator().manual_seed(0)
    state = build().state_dict()
    drawn = {v.data_ptr(): torch.randn(v.shape, generator=generator) for v in state.values()}  # tied ones are one
    ours = {n: drawn[v.data_ptr()] for n, v in state.items()}
    table = FAMILY[name].layout(layout).table(Told(ours, given))
    return {prefix + n: v for n, v in table(ours).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
