"""Networks here and in diffusers, with the same random weights and the same questions, at several sizes.

diffusers is a part of no import here: it is asked for its half where it is installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from vdiff.checkpoints.changes import Unfold
from vdiff.checkpoints.keymap import KeyMap
from vdiff.checkpoints.maps.autoencoder import autoencoder_kl, temporal_decoder
from vdiff.checkpoints.maps.cogvideox import diffusers_autoencoder, diffusers_transformer
from vdiff.checkpoints.maps.lvdm import unet_3d
from vdiff.checkpoints.maps.unet import plain_attention, unet, video_unet
from vdiff.first_stages import AutoencoderKL, AutoencoderKLCogVideoX, TemporalDecoderAutoencoder
from vdiff.networks import CogVideoX, DiT, LVDMUNet, UNet, VideoUNet, sinusoidal
from vdiff.networks.positions import coordinates, rotations
from vdiff.process import Conditioning


class Twin(ABC):
    """A network of ours and what it is asked; the same in diffusers.

    Args:
        x: Shape of the sample, rows first.
        tokens: Of text, where there is any.
        options: Of our constructor.
    """

    def __init__(self, *x, tokens=0, **options):
        self.x, self.tokens, self.options = x, tokens, options
        mult = options.get("channel_mult", (1, 2, 4, 4))
        self.widths = tuple(options.get("channels", 0) * m for m in mult)
        self.num_res_blocks = options.get("num_res_blocks", 2)
        self.attends = tuple(2**level in options.get("attention_factors", (1, 2, 4)) for level in range(len(mult)))

    @abstractmethod
    def ours(self):
        """Our network."""

    @abstractmethod
    def theirs(self, diffusers):
        """diffusers' network of the same shape."""

    @abstractmethod
    def names(self):
        """The table of our names to theirs."""

    def inputs(self):
        """What both are asked, by name."""
        return {"x": torch.randn(self.x)}

    @abstractmethod
    def ask(self, net, given):
        """What ours says."""

    @abstractmethod
    def ask_theirs(self, net, given):
        """What theirs says, its axes in our order."""

    def match(self, theirs, ours):
        """Give theirs the weights of ours: the same memory where they are the same tensors."""
        theirs.load_state_dict(self.names()(ours.state_dict()), assign=True)

    def levels(self, attending, plain):
        """Their names of levels, from the first to the last."""
        return tuple(attending if attends else plain for attends in self.attends)

    def heads(self):
        """How many each level has."""
        return self.options.get("num_heads") or tuple(width // self.options["head_dim"] for width in self.widths)

    def text(self):
        """The context, and the noise numbers of the rows."""
        dim = self.options.get("context_dim") or self.options.get("text_dim")
        return {
            "x": torch.randn(self.x),
            "c_noise": torch.linspace(3.0, 741.0, self.x[0]),
            "context": torch.randn(self.x[0], self.tokens, dim),
        }


class StableDiffusion(Twin):
    """Stable Diffusion 1 and 2; with a vector SDXL."""

    def ours(self):
        return UNet(**self.options)

    def theirs(self, diffusers):
        down, up = (self.levels(f"CrossAttn{way}Block2D", f"{way}Block2D") for way in ("Down", "Up"))
        extra = {}
        if self.time_dim:
            extra = dict(
                addition_embed_type="text_time", addition_time_embed_dim=self.time_dim,
                projection_class_embeddings_input_dim=self.options["vector_dim"],
            )  # fmt: skip
        return diffusers.UNet2DConditionModel(
            block_out_channels=self.widths, layers_per_block=self.num_res_blocks, down_block_types=down,
            up_block_types=up[::-1], cross_attention_dim=self.options["context_dim"], attention_head_dim=self.heads(),
            transformer_layers_per_block=self.options.get("transformer_depth", 1),
            use_linear_projection=self.options.get("linear_projection", False), **extra,
        )  # fmt: skip

    @property
    def time_dim(self):
        """Length of the embedding of each of SDXL's six numbers; the text's is five times as long."""
        return self.options.get("vector_dim", 0) // 11

    def names(self):
        return unet(self.num_res_blocks, self.attends)

    def inputs(self):
        given = self.text()
        if self.time_dim:
            ids = torch.arange(6.0 * self.x[0]).reshape(-1, 6) * 100
            text = torch.randn(self.x[0], 5 * self.time_dim)
            vector = torch.cat([text, sinusoidal(ids, self.time_dim).flatten(1)], dim=1)
            given |= {"ids": ids, "pooled": text, "vector": vector}
        return given

    def ask(self, net, given):
        cond = {"cross_attention": given["context"]} | ({"vector": given["vector"]} if self.time_dim else {})
        return net(given["x"], given["c_noise"], Conditioning(cond))

    def ask_theirs(self, net, given):
        added = {"text_embeds": given["pooled"], "time_ids": given["ids"]} if self.time_dim else None
        return net(given["x"], given["c_noise"], given["context"], added_cond_kwargs=added, return_dict=False)[0]


class Unconditional(Twin):
    """The UNet without a context."""

    def ours(self):
        return UNet(**self.options)

    def theirs(self, diffusers):
        down, up = (self.levels(f"Attn{way}Block2D", f"{way}Block2D") for way in ("Down", "Up"))
        return diffusers.UNet2DModel(
            in_channels=self.x[1], out_channels=self.x[1], block_out_channels=self.widths, freq_shift=0,
            layers_per_block=self.num_res_blocks, down_block_types=down, up_block_types=up[::-1],
            attention_head_dim=self.options["head_dim"],
        )  # fmt: skip

    def names(self):
        return unet(self.num_res_blocks, self.attends, attention=plain_attention(self.options["head_dim"]))

    def inputs(self):
        return {"x": torch.randn(self.x), "c_noise": torch.linspace(3.0, 741.0, self.x[0])}

    def ask(self, net, given):
        return net(given["x"], given["c_noise"])

    def ask_theirs(self, net, given):
        return net(given["x"], given["c_noise"], return_dict=False)[0]


class StableVideoDiffusion(Twin):
    """Stable Video Diffusion's UNet."""

    def ours(self):
        return VideoUNet(num_classes="sequential", **self.options)

    def theirs(self, diffusers):
        names = [f"{way}BlockSpatioTemporal" for way in ("Down", "Up")]
        down, up = (self.levels(f"CrossAttn{name}", name) for name in names)
        net = diffusers.UNetSpatioTemporalConditionModel(
            in_channels=self.x[1], block_out_channels=self.widths, layers_per_block=self.num_res_blocks,
            cross_attention_dim=self.options["context_dim"], num_attention_heads=self.heads(),
            addition_time_embed_dim=self.options["vector_dim"] // 3, down_block_types=down, up_block_types=up[::-1],
            projection_class_embeddings_input_dim=self.options["vector_dim"],
        )  # fmt: skip
        for name, module in net.named_modules():
            if isinstance(module, nn.GroupNorm) and "resnets" in name:
                module.eps = 1e-5  # generative-models'; diffusers has 1e-6 in some
        return net

    def names(self):
        return video_unet(self.num_res_blocks, self.attends)

    def inputs(self):
        ids = torch.tensor([[6.0, 127, 0.02]]).expand(self.x[0], -1)
        vector = sinusoidal(ids, self.options["vector_dim"] // 3).flatten(1)
        return self.text() | {"ids": ids, "vector": vector}

    def ask(self, net, given):
        cond = {"cross_attention": given["context"], "vector": given["vector"]}
        return net(given["x"], given["c_noise"], Conditioning(cond))

    def ask_theirs(self, net, given):
        x = given["x"].transpose(1, 2)
        return net(x, given["c_noise"], given["context"], given["ids"], return_dict=False)[0].transpose(1, 2)


class ModelScope(Twin):
    """VideoCrafter's UNet as far as diffusers has it."""

    def ours(self):
        return LVDMUNet(fps=False, **self.options)

    def theirs(self, diffusers):
        down, up = (self.levels(f"CrossAttn{way}Block3D", f"{way}Block3D") for way in ("Down", "Up"))
        return diffusers.UNet3DConditionModel(
            block_out_channels=self.widths, layers_per_block=self.num_res_blocks, down_block_types=down,
            up_block_types=up[::-1], cross_attention_dim=self.options["context_dim"],
            attention_head_dim=self.options["head_dim"],
        )  # fmt: skip

    def names(self):
        return unet_3d(self.num_res_blocks, self.attends)

    def inputs(self):
        return self.text()

    def ask(self, net, given):
        return net(given["x"], given["c_noise"], Conditioning({"cross_attention": given["context"]}))

    def ask_theirs(self, net, given):
        return net(given["x"], given["c_noise"], given["context"], return_dict=False)[0]


class Transformer(Twin):
    """The DiT; diffusers' has an embedding of the noise number in every block, alike."""

    def ours(self):
        return DiT(self.x[1], self.x[1], num_classes=11, **self.options)

    def theirs(self, diffusers):
        net = diffusers.DiTTransformer2DModel(
            num_attention_heads=self.options["num_heads"], in_channels=self.x[1], num_layers=self.options["depth"],
            attention_head_dim=self.options["width"] // self.options["num_heads"], sample_size=self.x[-1],
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
        for block in net.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # the paper's frequencies
        return net

    def names(self):
        block = {
            "modulation.*": "norm1.linear.*", "attn1.to_out.*": "attn1.to_out.0.*", "attn1.*": "attn1.*",
            "ff.up.*": "ff.net.0.proj.*", "ff.down.*": "ff.net.2.*",
        }  # fmt: skip
        return KeyMap(block.items()).under("blocks.{i}", "transformer_blocks.{i}") + KeyMap(
            [
                ("patch_embed.*", "pos_embed.proj.*", Unfold((2, 2))),
                ("out.modulation.*", "proj_out_1.*"),
                ("out.proj.*", "proj_out_2.*"),
                ("noise_embed.0.*", "timestep_embedder.linear_1.*"),
                ("noise_embed.2.*", "timestep_embedder.linear_2.*"),
                ("label_embed.*", "class_embedder.embedding_table.*"),
            ]
        )

    def match(self, theirs, ours):
        weights = self.names()(ours.state_dict())
        for name in [n for n in weights if n.startswith(("timestep_embedder", "class_embedder"))]:
            value = weights.pop(name)
            weights |= {f"transformer_blocks.{i}.norm1.emb.{name}": value for i in range(self.options["depth"])}
        for name in ("proj_out_2.weight", "proj_out_2.bias"):  # ours by channel, row, column; theirs by row, column
            weights[name] = weights[name].unflatten(0, (-1, 2, 2)).movedim(0, 2).flatten(0, 2)
        theirs.load_state_dict(weights, assign=True)

    def inputs(self):
        rows = self.x[0]
        return {"x": torch.randn(self.x), "c_noise": torch.linspace(3.0, 741.0, rows), "label": torch.arange(rows)}

    def ask(self, net, given):
        return net(given["x"], given["c_noise"], Conditioning({"label": given["label"]}))

    def ask_theirs(self, net, given):
        return net(given["x"], given["c_noise"], given["label"], return_dict=False)[0]


class Cog(Twin):
    """CogVideoX; diffusers is given the rotations, which its pipelines make once for all steps."""

    def ours(self):
        return CogVideoX(in_channels=self.x[1], out_channels=self.x[1], **self.options)

    def theirs(self, diffusers):
        heads, (_, _, frames, height, width) = self.options["num_heads"], self.x
        net = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=self.options["width"] // heads, in_channels=self.x[1],
            out_channels=self.x[1], time_embed_dim=self.options.get("emb_dim", 512), num_layers=self.options["depth"],
            text_embed_dim=self.options["text_dim"], sample_height=height, sample_width=width,
            sample_frames=4 * (frames - 1) + 1, patch_size=2, max_text_seq_length=self.tokens,
            use_rotary_positional_embeddings=self.is_rotary,
        )  # fmt: skip
        net.norm_out.norm.eps = 1e-6  # the original's; diffusers has 1e-5
        return net

    @property
    def is_rotary(self):
        return self.options.get("positions") == "rotary"

    def names(self):
        return diffusers_transformer()

    def inputs(self):
        given = self.text()
        if self.is_rotary:
            frames, height, width = self.x[2:]
            where = coordinates((frames, height // 2, width // 2))
            turns = rotations(where, self.options["width"] // self.options["num_heads"])
            given["turns"] = tuple(part.repeat_interleave(2, dim=-1) for part in turns.unbind(-1))
        return given

    def ask(self, net, given):
        return net(given["x"], given["c_noise"], Conditioning({"cross_attention": given["context"]}))

    def ask_theirs(self, net, given):
        out = net(
            given["x"].transpose(1, 2), given["context"], given["c_noise"], image_rotary_emb=given.get("turns"),
            return_dict=False,
        )  # fmt: skip
        return out[0].transpose(1, 2)


class ImageAutoencoder(Twin):
    """Latent diffusion's autoencoder, one way; x is what goes in."""

    def __init__(self, way, *x, **options):
        super().__init__(*x, **options)
        self.way = way

    def ours(self):
        return AutoencoderKL(num_res_blocks=self.num_res_blocks, **self.options)

    def theirs(self, diffusers):
        count = len(self.widths)
        return diffusers.AutoencoderKL(
            block_out_channels=self.widths, layers_per_block=self.num_res_blocks, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count,
        )  # fmt: skip

    def names(self):
        return autoencoder_kl(len(self.widths))

    def inputs(self):
        return {"x": torch.randn(self.x, requires_grad=self.way == "decode")}  # decoders are trained behind encoders

    def ask(self, net, given):
        return net.posterior(given["x"]).mean if self.way == "encode" else net.pixels(given["x"])

    def ask_theirs(self, net, given):
        if self.way == "encode":
            return net.encode(given["x"], return_dict=False)[0].mean
        return net.decode(given["x"], return_dict=False)[0]


class FrameDecoder(ImageAutoencoder):
    """Stable Video Diffusion's decoder."""

    def ours(self):
        return TemporalDecoderAutoencoder(quant_conv=True, **self.options)

    def theirs(self, diffusers):
        return diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=self.widths, layers_per_block=self.num_res_blocks,
            down_block_types=("DownEncoderBlock2D",) * len(self.widths),
        )  # fmt: skip

    def names(self):
        return temporal_decoder(len(self.widths))

    def ask_theirs(self, net, given):
        rows = given["x"].transpose(1, 2).flatten(0, 1)
        frames = net.decode(rows, num_frames=self.x[2], return_dict=False)[0]
        return frames.unflatten(0, (self.x[0], -1)).transpose(1, 2)


class ClipAutoencoder(ImageAutoencoder):
    """CogVideoX's autoencoder by the chunks of both."""

    def ours(self):
        return AutoencoderKLCogVideoX(num_res_blocks=self.num_res_blocks, latent_channels=4, **self.options)

    def theirs(self, diffusers):
        return diffusers.AutoencoderKLCogVideoX(
            block_out_channels=self.widths, layers_per_block=self.num_res_blocks, latent_channels=4
        )

    def names(self):
        return diffusers_autoencoder(len(self.widths))


def drawn(net, std=None):
    """Every weight drawn, for what begins at zero would hide what stands before it.

    Args:
        std: Of a normal cut off at two of them; by default one that keeps the size of what goes through.
    """
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                spread = std or parameter[0].numel() ** -0.5
                nn.init.trunc_normal_(parameter, std=spread, a=-2 * spread, b=2 * spread)
            elif std is None:
                nn.init.normal_(parameter, mean=float("weight" in name), std=0.1)
    return net.eval()


SDXL = dict(in_channels=4, out_channels=4, channel_mult=(1, 2, 4), attention_factors=(2, 4), linear_projection=True,
            num_classes="sequential")  # fmt: skip
SVD = dict(in_channels=8, out_channels=4)
TINY = dict(in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(1,))
SMALL = dict(in_channels=4, out_channels=4, channels=64, channel_mult=(1, 2, 4), attention_factors=(1, 2))
ROTARY = dict(positions="rotary")
COG = dict(text_dim=4096, tokens=226)

TWINS = {
    "unet, SD 1": {
        "tiny": StableDiffusion(2, 4, 8, 8, tokens=7, **TINY, num_heads=4, context_dim=16),
        "middle": StableDiffusion(2, 4, 16, 16, tokens=77, **SMALL, num_heads=8, context_dim=256),
    },
    "unet, SDXL": {
        "tiny": StableDiffusion(
            2,
            4,
            8,
            8,
            tokens=7,
            **SDXL | TINY | dict(attention_factors=(2,)),
            head_dim=16,
            context_dim=16,
            transformer_depth=(1, 2),
            vector_dim=88,
        ),
        "middle": StableDiffusion(
            2,
            4,
            16,
            16,
            tokens=77,
            **SDXL,
            channels=64,
            head_dim=32,
            context_dim=256,
            transformer_depth=(1, 2, 4),
            vector_dim=352,
        ),
        "full": StableDiffusion(
            2,
            4,
            128,
            128,
            tokens=77,
            **SDXL,
            channels=320,
            head_dim=64,
            context_dim=2048,
            transformer_depth=(1, 2, 10),
            vector_dim=2816,
        ),
    },
    "unet, no context": {
        "tiny": Unconditional(2, 4, 8, 8, **TINY, head_dim=16),
        "middle": Unconditional(2, 4, 32, 32, **SMALL, head_dim=32),
    },
    "video_unet, SVD": {
        "tiny": StableVideoDiffusion(2, 8, 3, 4, 4, tokens=1, **TINY | SVD, head_dim=16, context_dim=16, vector_dim=24),
        "middle": StableVideoDiffusion(
            1, 8, 4, 16, 16, tokens=1, **SMALL | SVD, head_dim=32, context_dim=256, vector_dim=192
        ),
        "full": StableVideoDiffusion(
            2, 8, 14, 72, 128, tokens=1, **SVD, channels=320, head_dim=64, context_dim=1024, vector_dim=768
        ),
    },
    "lvdm_unet": {
        "tiny": ModelScope(2, 4, 3, 4, 4, tokens=7, **TINY, head_dim=8, context_dim=16),
        "middle": ModelScope(1, 4, 4, 16, 16, tokens=77, **SMALL, head_dim=32, context_dim=256),
    },
    "dit": {
        "tiny": Transformer(2, 4, 8, 8, width=32, depth=2, num_heads=4),
        "middle": Transformer(2, 4, 32, 32, width=384, depth=4, num_heads=6),
    },
    "cogvideox, 2b": {
        "tiny": Cog(2, 4, 4, 8, 12, tokens=6, width=32, depth=2, num_heads=2, text_dim=12, emb_dim=8, spacing=1.875),
        "middle": Cog(1, 4, 4, 16, 16, tokens=64, width=384, depth=4, num_heads=6, text_dim=256, spacing=1.875),
        "full": Cog(2, 16, 13, 60, 90, **COG, width=1920, depth=30, num_heads=30, spacing=1.875),
    },
    "cogvideox, 5b": {
        "tiny": Cog(2, 4, 4, 8, 12, tokens=6, width=32, depth=2, num_heads=2, text_dim=12, emb_dim=8, **ROTARY),
        "middle": Cog(1, 4, 4, 16, 16, tokens=64, width=384, depth=4, num_heads=6, text_dim=256, **ROTARY),
        "full": Cog(2, 16, 13, 60, 90, **COG, width=3072, depth=42, num_heads=48, **ROTARY),
    },
    "autoencoder_kl, encode": {
        "tiny": ImageAutoencoder("encode", 2, 3, 16, 16, channels=32, channel_mult=(1, 2)),
        "middle": ImageAutoencoder("encode", 1, 3, 64, 64, channels=32, channel_mult=(1, 2, 4)),
    },
    "autoencoder_kl, decode": {
        "tiny": ImageAutoencoder("decode", 2, 4, 8, 8, channels=32, channel_mult=(1, 2)),
        "middle": ImageAutoencoder("decode", 1, 4, 16, 16, channels=32, channel_mult=(1, 2, 4)),
    },
    "temporal_decoder, decode": {
        "tiny": FrameDecoder("decode", 1, 4, 3, 8, 8, channels=32, channel_mult=(1, 2)),
        "middle": FrameDecoder("decode", 1, 4, 4, 8, 8, channels=32, channel_mult=(1, 2, 4)),
    },
    "autoencoder_kl_cogvideox, encode": {
        "tiny": ClipAutoencoder("encode", 1, 3, 9, 16, 16, channels=32, channel_mult=(1, 1, 1, 1)),
        "middle": ClipAutoencoder("encode", 1, 3, 9, 32, 32, channels=32, channel_mult=(1, 2, 2, 2)),
    },
    "autoencoder_kl_cogvideox, decode": {
        "tiny": ClipAutoencoder("decode", 1, 4, 3, 2, 2, channels=32, channel_mult=(1, 1, 1, 1)),
        "middle": ClipAutoencoder("decode", 1, 4, 3, 4, 4, channels=32, channel_mult=(1, 2, 2, 2)),
    },
}
