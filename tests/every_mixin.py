"""Every registered mixin and every registered network, small: what goes where, and with what it is tried there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import nn

from vdiff.denoisers import VDenoiser
from vdiff.mixins import (
    PAG,
    SEG,
    Adapter,
    ByLevel,
    Consistency,
    ControlNet,
    DoRA,
    FreeU,
    IPAdapter,
    JointAttention,
    LoHa,
    LoKr,
    LoRA,
    Mixin,
    Record,
    RefModel,
    SkipLayer,
    T2IAdapter,
    Teacher,
    TextualInversion,
    TokenMerging,
)
from vdiff.networks import CogVideoX, DiT, LVDMUNet, UNet, VideoUNet
from vdiff.process import Conditioning, CosineSchedule


class Tower(nn.Module):
    """The table of a text tower and what comes after it."""

    def __init__(self):
        super().__init__()
        self.token_embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return self.out(self.token_embedding(ids))


_UNET = dict(channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_dim=6, norm_groups=4)
_VIEWS = dict(motion_context_dim=3, num_classes="sequential", vector_dim=5)
_PICTURE = dict(image_tokens=2, learned_image_scale=True, max_distance=2)
_TRANSFORMER = dict(width=16, depth=2, num_heads=1, patch_size=(1, 2, 2))

# A network, and the shape of a sample. Of the UNets of videos only the middle attends, which is quick to copy.
NETWORKS = {
    "unet": (partial(UNet, 1, 1, 8, attention_factors=(2,), **_UNET), (1, 8, 8)),
    "video_unet": (partial(VideoUNet, 1, 1, 8, attention_factors=(), **_UNET), (1, 3, 4, 4)),
    "multi_view": (partial(VideoUNet, 1, 1, 8, attention_factors=(), **_UNET, **_VIEWS), (1, 6, 4, 4)),
    "lvdm_unet": (partial(LVDMUNet, 1, 1, 8, attention_factors=(), **_UNET, **_PICTURE), (1, 3, 4, 4)),
    "dit": (partial(DiT, 1, 1, 8, 2, 2, context_dim=6), (1, 8, 8)),
    "video_dit": (partial(DiT, 1, 1, context_dim=6, **_TRANSFORMER), (1, 3, 4, 4)),
    "cogvideox": (partial(CogVideoX, 1, 1, text_dim=6, emb_dim=4, **_TRANSFORMER), (1, 3, 4, 4)),
}
VIDEOS = ("video_unet", "multi_view", "lvdm_unet", "video_dit", "cogvideox")
UNETS = ("unet", "video_unet", "multi_view", "lvdm_unet")
ALL = tuple(NETWORKS)
NO_UNET = dict.fromkeys(("dit", "video_dit", "cogvideox"), "matches 'role:unet'.*Roles: ")
LIE = {"video_dit": dict(grid=(3, 2, 2)), "cogvideox": dict(grid=(3, 2, 2), text=3)}  # how tokens lie


@dataclass
class Case:
    """How a mixin is tried.

    Attributes:
        make: A new one.
        conds: Conditions that it brings along, by name, for a sample ``(rows, 1, ...)``.
        hosts: Where it goes.
        refused: Where it does not, and why.
        own: Arguments for some hosts.
        needs: What must be attached before it.
        acts: Whether it changes what the host says of the inputs here.
    """

    make: Callable[..., Mixin]
    conds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    hosts: tuple[str, ...] = ALL
    refused: dict[str, str] = field(default_factory=dict)
    own: dict[str, dict] = field(default_factory=dict)
    needs: Callable[[nn.Module], Mixin] | None = None
    acts: bool = True


def hint(x):
    return torch.rand(len(x), 3, *x.shape[2:])


CASES = {
    "adapter": Case(partial(Adapter, width=3), own={"cogvideox": {"place": "parallel-ffn"}}),
    "by_level": Case(
        lambda: ByLevel("style", {0.5: 0.2, 3.0: 0.7}),
        needs=lambda host: stirred(LoRA(rank=2, name="style").attach(host)),
    ),
    "consistency": Case(Consistency),
    "controlnet": Case(partial(ControlNet, hint_factor=1), {"controlnet": hint}, UNETS, NO_UNET),
    "dora": Case(partial(DoRA, rank=2)),
    "freeu": Case(FreeU, hosts=UNETS, refused=NO_UNET),
    "ip_adapter": Case(
        partial(IPAdapter, embed_dim=5),
        {"ip_adapter": lambda x: torch.randn(len(x), 5)},
        tuple(host for host in ALL if host != "cogvideox"),
        {"cogvideox": "a CogVideoX without cross-attention has nothing to go beside"},
    ),
    "joint_attention": Case(JointAttention),
    "loha": Case(partial(LoHa, rank=2)),
    "lokr": Case(partial(LoKr, rank=2)),
    "lora": Case(partial(LoRA, rank=2)),
    "pag": Case(PAG, own={"cogvideox": dict(text=3)}),
    "record": Case(Record, acts=False),
    "ref_model": Case(partial(RefModel, always=True), acts=False),
    "seg": Case(SEG, own=LIE),
    "skip_layer": Case(SkipLayer),
    "t2i_adapter": Case(partial(T2IAdapter, hint_factor=1), {"t2i_adapter": hint}, UNETS, NO_UNET),
    "teacher": Case(Teacher, acts=False),
    "textual_inversion": Case(
        partial(TextualInversion, {"<cat>": 2}),
        hosts=("tower",),
        refused=dict.fromkeys(ALL, r"matches '\*token_embedding'"),
        acts=False,
    ),
    "token_merging": Case(TokenMerging, own=LIE),
}
PERTURBATIONS = ("pag", "seg", "skip_layer")  # which do nothing without a gate
AT_DENOISER = ("by_level", "consistency", "ref_model", "teacher")
WEIGHTS = ("dora", "loha", "lokr", "lora")
PAIRS = [(name, host) for name, case in CASES.items() for host in case.hosts]


def stirred(thing, seed=0):
    """Weights as after training; they are found where they are, whatever holds them."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in thing.parameters():
        nn.init.normal_(parameter, std=0.2, generator=draw)
    return thing


@cache
def hosting(host, checkpointing=False):
    """A host, built once: who attaches takes off again."""
    if host == "tower":
        return stirred(Tower())
    return VDenoiser(stirred(NETWORKS[host][0](checkpointing=checkpointing))).eval()


def given(host, names, rows=2, **options):
    """A sample, its noise number and conditions: those of the host, and what some mixins bring along."""
    torch.manual_seed(1)
    x = torch.randn(rows, *NETWORKS[host][1])
    tensors = {"cross_attention": torch.randn(rows, 3, 6)}
    if host == "multi_view":  # three moments of two views
        tensors |= {"cross_attention": torch.randn(rows, 3, 3, 6), "vector": torch.randn(rows, 5)}
        tensors["views"] = torch.randn(rows, 3, 2, 4, 4)
    if host == "lvdm_unet":
        tensors |= {"image_tokens": torch.randn(rows, 2, 6), "fps": torch.linspace(8, 24, rows)}
    for name in names:
        tensors |= {cond: make(x) for cond, make in CASES[name].conds.items()}
    gates = {name: torch.linspace(1, 0.5, rows) for name in names if name in PERTURBATIONS} | options.get("gates", {})
    partners = options.get("partners", torch.arange(rows).flip(0) if "joint_attention" in names else None)
    return x, torch.linspace(0.3, 0.7, rows), Conditioning(tensors, gates=gates, partners=partners)


@torch.no_grad()
def ask(module, host, *names, **options):
    """What :func:`said` is, for looking at."""
    return said(module, host, *names, **options)


def said(module, host, *names, **options):
    """What the host says, with the conditions that the mixins of these names bring along."""
    if host == "tower":
        return module(torch.tensor([[0, 3, 8]]))
    x, time, cond = given(host, names, **options)
    return module(x, CosineSchedule()(time), cond).value


def made(name, host):
    return CASES[name].make(**CASES[name].own.get(host, {}))
