"""The reference answers the same question: the policy without its mixins, a copy, an adapter, or a checkpoint."""

import copy
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdiff.checkpoints import read, save_weights, write
from vdiff.data import Digits, Loader, PairsDataset
from vdiff.denoisers import VDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.hooks import attached, describe, parts
from vdiff.losses import DiffusionDPOLoss
from vdiff.mixins import ControlNet, IPAdapter, LoRA, RefModel
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule, UniformSigmaSampler
from vdiff.registry import build
from vdiff.samplers import EulerSampler
from vdiff.training import EMA, Checkpointing, Logging, Trainer

# Here the network itself is often not frozen, which the mixin warns about where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:RefModel:UserWarning")


def make(**changes):
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4, **changes)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return VDenoiser(net)


def question(rows=4):
    draw = torch.Generator().manual_seed(1)
    t = torch.linspace(0.2, 0.8, rows // 2, dtype=torch.float64).repeat_interleave(2)
    level = CosineSchedule()(t).to(torch.float32)
    cond = Conditioning({"cross_attention": torch.randn(rows, 3, 6, generator=draw)})
    return torch.randn(rows, 1, 8, 8, generator=draw), level, cond


def dpo(prediction, target, beta=5.0):
    """Diffusion-DPO over adjacent winner and loser, arXiv:2311.12908 eq. 14."""
    gain = [(p.value - target).square().flatten(1).mean(1) for p in (prediction, prediction.reference)]
    margin = (gain[0] - gain[1]).unflatten(0, (-1, 2))
    return -F.logsigmoid(-0.5 * beta * (margin[:, 0] - margin[:, 1]))


def trained(denoiser):
    """With a LoRA that does something, and a reference."""
    lora = LoRA(rank=2).attach(denoiser)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lora, RefModel().attach(denoiser)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_starts_at_the_logarithm_of_two(checkpointing):
    denoiser, (x_t, level, cond) = make(checkpointing=checkpointing), question()
    denoiser.requires_grad_(False)
    lora = LoRA(rank=2).attach(denoiser)
    RefModel().attach(denoiser)
    loss = dpo(denoiser(x_t, level, cond), torch.randn(x_t.shape))
    assert torch.equal(loss, torch.full((2,), math.log(2)))
    loss.sum().backward()
    assert all(p.grad is not None for p in lora.parameters()) and any(p.grad.any() for p in lora.parameters())
    assert all(p.grad is None for n, p in denoiser.named_parameters() if "_port" not in n)


def test_the_reference_is_the_denoiser_without_mixins_and_without_gradient():
    denoiser, (x_t, level, cond) = make(), question()
    plain = denoiser(x_t, level, cond).value
    trained(denoiser)
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, plain)
    assert not prediction.reference.value.requires_grad
    assert not torch.equal(prediction.value, plain) and prediction.value.requires_grad
    assert prediction.reference.level is level and prediction.reference.reference is None


def test_gradients_are_right_with_the_network_checkpointed():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        denoiser, (x_t, level, cond) = make(checkpointing=checkpointing), question()
        lora, _ = trained(denoiser)
        dpo(denoiser(x_t, level, cond), torch.zeros_like(x_t)).sum().backward()
        grads.append([p.grad for p in lora.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


def test_where_no_gradient_is_recorded_it_is_asked_only_always():
    denoiser, (x_t, level, cond) = make(), question()
    ref = RefModel().attach(denoiser)
    with torch.no_grad():
        assert denoiser(x_t, level, cond).reference is None
        ref.detach()
        RefModel(always=True).attach(denoiser)
        assert denoiser(x_t, level, cond).reference is not None


def test_switches_and_modes_are_as_before_even_after_a_failure():
    denoiser, (x_t, level, cond) = make(dropout=0.3), question()
    lora, _ = trained(denoiser)
    other = LoRA(name="other").attach(denoiser)
    other.enabled = False
    denoiser.train()
    denoiser.network.middle_block.eval()
    modes = [module.training for module in denoiser.modules()]
    calls = []

    def fail(module, args):
        calls.append(module.training)
        if len(calls) == 3:
            raise RuntimeError("on purpose")

    handle = denoiser.network.register_forward_pre_hook(fail)
    denoiser(x_t, level, cond)
    with pytest.raises(RuntimeError, match="on purpose"):
        denoiser(x_t, level, cond)
    handle.remove()
    assert calls == [False, True, False]  # the reference sees no dropout
    assert [module.training for module in denoiser.modules()] == modes
    assert all(part.enabled for _, part in lora._sites.values())
    assert not any(part.enabled for _, part in other._sites.values())


def test_an_answer_does_not_outlive_a_policy_that_fails():
    denoiser, (x_t, level, cond) = make(), question()
    trained(denoiser)
    handle = denoiser.network.register_forward_pre_hook(lambda module, args: 1 / 0 if torch.is_grad_enabled() else None)
    with pytest.raises(ZeroDivisionError):
        denoiser(x_t, level, cond)
    handle.remove()
    with torch.no_grad():
        assert denoiser(x_t, level, cond).reference is None


def test_compiled_there_are_two_graphs():
    denoiser, (x_t, level, cond) = make(), question()
    lora, _ = trained(denoiser)
    true = denoiser(x_t, level, cond)
    counter = CompileCounterWithBackend("eager")
    denoiser.network.compile(backend=counter, fullgraph=True)
    for scale in (0.5, 0.1, 1.0):
        lora.scale = scale
        ours = denoiser(x_t, level, cond)
    torch.testing.assert_close(ours.value, true.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.reference.value, true.reference.value, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


# A policy that is its own reference costs nothing ------------------------------------------------


def test_with_mixins_off_the_reference_holds_not_a_byte():
    def held():
        return sum(t.nbytes for t in (*denoiser.parameters(), *denoiser.buffers()))

    denoiser, (x_t, level, cond) = make(), question()
    LoRA(rank=2).attach(denoiser)
    before = held()
    RefModel().attach(denoiser)
    denoiser(x_t, level, cond)
    (part,) = (part for part in parts(denoiser) if part.mixin_name == "ref_model")
    assert held() == before and not list(part.parameters()) and not list(part.buffers()) and not part.companions()


def test_training_with_it_takes_no_more_memory_at_its_peak():
    peaks = []
    for loss in (lambda p: (p.value**2).mean(), lambda p: dpo(p, torch.zeros_like(p.value)).mean()):
        denoiser, (x_t, level, cond) = make(), question(16)
        denoiser.requires_grad_(False)
        LoRA(rank=2).attach(denoiser)
        if peaks:
            RefModel().attach(denoiser)
        with Live() as live:
            loss(denoiser(x_t, level, cond)).backward()
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]


class Live(TorchDispatchMode):
    """Bytes of storages made inside that are alive, and their greatest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known | before:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, size):
        self.now -= size


# A copy ------------------------------------------------------------------------------------------


def test_a_copy_stays_what_the_policy_was():
    denoiser, (x_t, level, cond) = make(), question()
    first = denoiser(x_t, level, cond).value.detach()
    RefModel(source="copy").attach(denoiser)
    assert torch.equal(denoiser(x_t, level, cond).reference.value, first)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, first) and not torch.equal(prediction.value, first)
    assert not prediction.reference.value.requires_grad


def test_a_copy_is_no_part_of_the_module():
    denoiser, (x_t, level, cond) = make(dropout=0.3), question()
    names = [*dict(denoiser.named_modules())], [*dict(denoiser.named_parameters())], [*denoiser.state_dict()]
    ref = RefModel(source="copy").attach(denoiser).begin()
    (companion,) = (c for part in parts(denoiser) for c in part.companions())
    mine = {id(module) for module in denoiser.modules()}
    assert not mine & {id(module) for module in companion.modules()}
    assert not {p.data_ptr() for p in denoiser.parameters()} & {p.data_ptr() for p in companion.parameters()}
    denoiser.train()
    denoiser(x_t, level, cond)
    assert not any(module.training for module in companion.modules())
    assert not any(p.requires_grad for p in companion.parameters())
    ref.detach()
    assert ([*dict(denoiser.named_modules())], [*dict(denoiser.named_parameters())], [*denoiser.state_dict()]) == names


def test_a_copy_holds_the_mixins_as_they_were_and_not_itself():
    denoiser, (x_t, level, cond) = make(), question()
    lora = LoRA(rank=2).attach(denoiser)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    first = denoiser(x_t, level, cond).value.detach()
    RefModel(source="copy").attach(denoiser).begin()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.zero_()
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, first) and not torch.equal(prediction.value, first)
    (companion,) = (c for part in parts(denoiser) for c in part.companions())
    assert {part.mixin_name for part in parts(companion)} == {"lora"}


def test_a_copy_goes_where_the_denoiser_is():
    denoiser, (x_t, level, cond) = make(), question()
    RefModel(source="copy").attach(denoiser).begin()
    denoiser.to("meta")
    prediction = denoiser(x_t.to("meta"), level.to("meta"), cond.to("meta"))
    assert prediction.reference.value.is_meta


def test_a_deep_copy_of_the_policy_has_a_reference_of_its_own():
    denoiser, (x_t, level, cond) = make(), question()
    RefModel(source="copy").attach(denoiser).begin()
    twin = copy.deepcopy(denoiser)
    with torch.no_grad():
        for part in parts(denoiser):
            for parameter in part.companions()[0].parameters():
                parameter.zero_()
    assert torch.equal(twin(x_t, level, cond).reference.value, twin(x_t, level, cond).value.detach())


def engine(**ref):
    return DiffusionEngine(
        "image",
        VDenoiser(UNet(1, 1, 8, (1,), 1, (), num_heads=2, norm_groups=4)),
        CosineSchedule(),
        UniformSigmaSampler(),
        DiffusionDPOLoss(50.0),
        EulerSampler(4),
        mixins={"reference": RefModel(**ref)},
    )


def tuned(run, num_steps, **options):
    torch.manual_seed(0)  # as a run file does: the same initial weights whenever it is started
    policy = engine(source="copy")
    data = PairsDataset(Digits("test"), [(4, 9), (0, 7), (1, 2)])
    quiet = {"logging": Logging(loggers=[]), "checkpoint": Checkpointing(every=2)}
    Trainer(num_steps, 2, device="cpu", ema=EMA(0.9), **quiet, **options).fit(policy, data, run)
    return policy


def test_a_copy_is_in_no_optimizer_average_or_checkpoint(tmp_path):
    policy = tuned(tmp_path, 2)
    names = {name for name, _ in policy.named_parameters()}
    files, _ = read(tmp_path / "checkpoints" / "step-00000002")
    assert set(files["model"]) == set(policy.state_dict()) and set(files["ema"]) == names
    assert {name.partition("/")[0] for name in files["optimizer"]} == names
    assert not any("_port" in name for name in names)


def test_a_resumed_run_compares_with_where_it_began_and_ends_bit_for_bit_the_same(tmp_path):
    whole = tuned(tmp_path / "whole", 4)
    tuned(tmp_path / "parts", 2)
    resumed = tuned(tmp_path / "parts", 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    ((begun,), (again,)) = ([c for p in parts(e) for c in p.companions()] for e in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), again.parameters(), strict=True))


def test_compiled_with_a_copy_there_are_two_graphs():
    policy = engine(source="copy")
    policy.mixins["reference"].begin()
    batch = Loader(PairsDataset(Digits("test"), [(4, 9), (0, 7)]), 2).batch(0)
    counter = CompileCounterWithBackend("eager")
    policy.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        policy(batch).per_row.mean().backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("source", ["copy", "mixins_off"])
def test_a_reference_that_is_told_what_is_trained_is_refused(source):
    denoiser, (x_t, level, cond) = make().train(), question()
    denoiser.requires_grad_(False)
    LoRA(rank=2).attach(denoiser)
    RefModel(source=source).attach(denoiser)
    name, value = next(iter(cond.tensors.items()))
    moving = cond.with_(tensors={**cond.tensors, name: value.clone().requires_grad_()})
    with pytest.raises(ValueError, match=rf"RefModel: the condition '{name}' asks for a gradient.*on: denoiser"):
        denoiser(x_t, level, moving)
    with pytest.raises(ValueError, match="asks for a gradient"):  # not once and then never again
        denoiser(x_t, level, cond.with_(null=moving))
    denoiser(x_t, level, cond)


# A second adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy_adds_to_it", [True, False])
def test_with_an_adapter_the_reference_is_the_host_with_that_adapter_alone(policy_adds_to_it):
    denoiser, (x_t, level, cond) = make(), question()
    denoiser.requires_grad_(False)
    tuned = LoRA(rank=2, name="sft").attach(denoiser)
    for parameter in tuned.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    alone = denoiser(x_t, level, cond).value
    tuned.enabled = policy_adds_to_it
    policy = LoRA(rank=2, name="policy").attach(denoiser)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.3)
    without = denoiser(x_t, level, cond).value
    RefModel(source="adapter", adapter="sft").attach(denoiser)
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, alone) and torch.equal(prediction.value, without)
    assert tuned.enabled is policy_adds_to_it and not torch.equal(without, alone)


def test_what_is_frozen_stays_in_the_reference_where_it_is_named_and_is_warned_of_where_not():
    """DPO of a LoRA beside a frozen ControlNet and picture: at first both policies are one."""
    denoiser, (x_t, level, cond) = make().train(), question()
    denoiser.requires_grad_(False)
    frozen = [ControlNet(hint_factor=1).attach(denoiser), IPAdapter(embed_dim=5).attach(denoiser)]
    for parameter in (parameter for mixin in frozen for parameter in mixin.parameters()):
        nn.init.normal_(parameter, std=0.3).requires_grad_(False)
    LoRA(rank=2, name="policy").attach(denoiser)
    hints = {"controlnet": torch.rand(4, 3, 8, 8), "ip_adapter": torch.randn(4, 5)}
    cond = Conditioning(cond.tensors | hints)
    ref = RefModel().attach(denoiser)
    with pytest.warns(UserWarning, match=r"controlnet, ip_adapter: on and not trained.*\[controlnet, ip_adapter\]"):
        prediction = denoiser(x_t, level, cond)
    assert not torch.equal(prediction.reference.value, prediction.value)
    ref.detach()
    ref = build({"type": "ref_model", "source": "adapter", "adapter": ["controlnet", "ip_adapter"]}, "mixin")
    ref.attach(denoiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, prediction.value)


def test_an_adapter_that_is_missing_or_moves_is_refused():
    denoiser, (x_t, level, cond) = make(), question()
    LoRA(rank=2, name="policy").attach(denoiser)
    ref = RefModel(source="adapter", adapter="sft").attach(denoiser)
    with pytest.raises(ValueError, match="no mixin called 'sft'.*Attached: policy"):
        denoiser(x_t, level, cond)
    ref.detach()
    ref = RefModel(source="adapter", adapter=["policy", "sft"]).attach(denoiser)
    with pytest.raises(ValueError, match="no mixin called 'sft'"):
        denoiser(x_t, level, cond)
    ref.detach()
    RefModel(source="adapter", adapter="policy").attach(denoiser)
    with pytest.raises(ValueError, match="'policy' is itself trained"):
        denoiser(x_t, level, cond)


# A checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_is_read_when_attached_and_its_sum_is_recorded(tmp_path, form):
    old, (x_t, level, cond) = make(), question()
    if form == "file":
        file = tmp_path / "old.safetensors"
        save_weights(file, old.state_dict(), {})
    else:
        file = write(tmp_path / "step", {"model": {f"denoiser.{n}": v for n, v in old.state_dict().items()}}, {})
    denoiser = make()
    LoRA(rank=2).attach(denoiser)
    ref = RefModel(source="checkpoint", file=file, weights="raw").attach(denoiser)
    prediction = denoiser(x_t, level, cond)
    assert torch.equal(prediction.reference.value, old(x_t, level, cond).value)
    assert not torch.equal(prediction.value, prediction.reference.value)
    assert len(ref.sha256) == 64 and ref.arguments()["sha256"] == ref.sha256
    assert ref.sha256[:12] in describe(denoiser)
    with pytest.raises(ValueError, match=f"its sha256 is {ref.sha256}, expected 00"):
        RefModel(source="checkpoint", file=file, weights="raw", sha256="00").attach(make())


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    denoiser = make()
    with pytest.raises(FileNotFoundError, match="there is no"):
        RefModel(source="checkpoint", file=tmp_path / "none.safetensors").attach(denoiser)
    LoRA(rank=2).attach(denoiser)
    save_weights(tmp_path / "tuned.safetensors", denoiser.state_dict(), {})
    with pytest.raises(ValueError, match="holds weights of mixins.*source: adapter"):
        RefModel(source="checkpoint", file=tmp_path / "tuned.safetensors").attach(denoiser)
    assert {part.mixin_name for part in parts(denoiser)} == {"lora"}


# What is refused ---------------------------------------------------------------------------------


def test_a_policy_that_would_be_its_own_reference_is_refused():
    denoiser, (x_t, level, cond) = make(), question()
    RefModel().attach(denoiser)
    with pytest.raises(ValueError, match="the reference is the policy itself.*source: copy"):
        denoiser(x_t, level, cond)
    lora = LoRA(rank=2).attach(denoiser)
    with pytest.warns(UserWarning, match="own parameters ask for a gradient"):
        denoiser(x_t, level, cond)
    ref = attached(denoiser)["ref_model"]
    ref.detach()
    denoiser.requires_grad_(False)
    ref.attach(denoiser)
    with lora.merged(), pytest.raises(ValueError, match="'lora' is merged"):
        denoiser(x_t, level, cond)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "elsewhere"}, "source must be one of"),
        ({"source": "adapter"}, "source 'adapter' needs 'adapter'"),
        ({"source": "adapter", "adapter": []}, "adapter names a mixin, or several"),
        ({"source": "checkpoint"}, "source 'checkpoint' needs 'file'"),
        ({"source": "copy", "file": "a.safetensors"}, "source 'copy' takes no 'file'"),
    ],
)
def test_a_source_says_what_it_needs(arguments, message):
    with pytest.raises(ValueError, match=message):
        RefModel(**arguments)


def test_what_is_no_denoiser_is_refused():
    host = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="role:denoiser"):
        RefModel().attach(host)
    RefModel(on="0").attach(host)
    with pytest.raises(TypeError, match="attached to a Linear, which returned a Tensor"):
        host(torch.zeros(1, 2))


def test_its_file_has_no_weights(tmp_path):
    from vdiff.mixins import load_mixin

    RefModel().attach(make()).save(tmp_path / "ref.safetensors")
    denoiser, (x_t, level, cond) = make(), question()
    LoRA(rank=2).attach(denoiser)
    load_mixin(tmp_path / "ref.safetensors").attach(denoiser)
    assert denoiser(x_t, level, cond).reference is not None
