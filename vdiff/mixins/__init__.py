"""What attaches to a module from outside, and comes off again bit for bit."""

from vdiff.mixins.base import Mixin
from vdiff.mixins.files import load_mixin
from vdiff.mixins.joint_attention import JointAttention
from vdiff.mixins.lora import LoRA
from vdiff.mixins.perturbation import PAG, SEG, SkipLayer
from vdiff.mixins.ref_model import RefModel

__all__ = ["PAG", "SEG", "JointAttention", "LoRA", "Mixin", "RefModel", "SkipLayer", "load_mixin"]
