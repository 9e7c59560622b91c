"""What attaches to a module from outside, and comes off again bit for bit."""

from vdiff.mixins.adapter import Adapter
from vdiff.mixins.base import Mixin
from vdiff.mixins.by_level import ByLevel
from vdiff.mixins.companion import Companion
from vdiff.mixins.consistency import Consistency
from vdiff.mixins.controlnet import ControlNet
from vdiff.mixins.dora import DoRA
from vdiff.mixins.files import load_mixin
from vdiff.mixins.formats import load_adapter
from vdiff.mixins.freeu import FreeU
from vdiff.mixins.ip_adapter import IPAdapter
from vdiff.mixins.joint_attention import JointAttention
from vdiff.mixins.loha import LoHa
from vdiff.mixins.lokr import LoKr
from vdiff.mixins.lora import LoRA
from vdiff.mixins.perturbation import PAG, SEG, SkipLayer
from vdiff.mixins.readout_guidance import ReadoutGuidance
from vdiff.mixins.record import Record
from vdiff.mixins.ref_model import RefModel
from vdiff.mixins.t2i_adapter import T2IAdapter
from vdiff.mixins.teacher import Teacher
from vdiff.mixins.textual_inversion import TextualInversion
from vdiff.mixins.token_merging import TokenMerging
from vdiff.mixins.weights import WeightMixin, WeightPart

__all__ = [
    "Teacher",
    "Consistency",
    "Companion",
    "PAG",
    "SEG",
    "Adapter",
    "ByLevel",
    "ControlNet",
    "DoRA",
    "FreeU",
    "IPAdapter",
    "JointAttention",
    "LoHa",
    "LoKr",
    "LoRA",
    "Mixin",
    "ReadoutGuidance",
    "Record",
    "RefModel",
    "SkipLayer",
    "T2IAdapter",
    "TextualInversion",
    "TokenMerging",
    "WeightMixin",
    "WeightPart",
    "load_adapter",
    "load_mixin",
]
