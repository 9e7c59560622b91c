"""What every mixin does: attach, detach, scale, switch, save, load, copy, compile."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.checkpoints import WeightFileError, read_metadata, save_weights
from vdiff.hooks import PORT, Part, attached, parts, routed
from vdiff.mixins import JointAttention, LoRA, Mixin, load_mixin
from vdiff.networks import UNet
from vdiff.process import Conditioning
from vdiff.registry import ConfigError, build, isolated


def unet(**changes):
    size = dict(in_channels=1, out_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1)
    net = UNet(**size, attention_factors=(2,), num_heads=2, context_dim=6, norm_groups=4, **changes).eval()
    for parameter in net.parameters():  # what begins at zero would hide what is attached before it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def inputs(rows=4):
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(rows, 1, 8, 8, generator=draw), torch.randn(rows, 3, 6, generator=draw)
    return x, torch.linspace(-1, 1, rows), Conditioning({"cross_attention": text})


def stir(mixin):
    """Weights as after training."""
    for parameter in mixin.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixin


class PlusOne(Mixin, abstract=True):
    """The smallest mixin; not registered."""

    def __init__(self, on="", name="plus", scale=1.0):
        super().__init__(on, name, scale)

    def part(self, module, site):
        return PlusOnePart()


class PlusOnePart(Part):
    def after(self, module, args, kwargs, output):
        return output + self.amount(output)


# Attaching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixin",
    [
        lambda: LoRA(rank=2),
        lambda: LoRA(rank=2, on=["type:Linear", "type:_ConvNd"]),
        lambda: JointAttention(),
        lambda: PlusOne(on=["", "*.attn1", "input_blocks.1"]),  # the root, a leaf of our own, a Sequential
    ],
)
def test_detaching_restores_outputs_and_keys_bit_for_bit(mixin):
    net, (x, c_noise, cond) = unet(), inputs()
    cond = cond.with_(partners=torch.tensor([1, 0, -1, 2]))
    keys, y = list(net.state_dict()), net(x, c_noise, cond)
    one = mixin().attach(net)
    stir(one)
    assert [key for key in net.state_dict() if PORT not in key.split(".")] == keys
    with routed(net, cond):
        assert not torch.equal(net(x, c_noise, cond), y)
    one.detach()
    assert list(net.state_dict()) == keys
    assert torch.equal(net(x, c_noise, cond), y)
    assert not any(PORT in module._modules or module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("mixin", [LoRA(rank=2), JointAttention(), PlusOne()])
def test_parts_are_made_where_their_host_is(mixin):
    net = unet().to("meta")
    mixin.attach(net)
    tensors = [tensor for part in parts(net) for tensor in (*part.parameters(), *part.buffers())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("mixin", [lambda: LoRA(on=["type:Linear", "type:_ConvNd"]), lambda: JointAttention()])
def test_attaching_changes_nothing_before_training(mixin):
    net, (x, c_noise, cond) = unet(), inputs()
    y = net(x, c_noise, cond)
    mixin().attach(net)
    with routed(net, cond.with_(partners=torch.tensor([1, 0, -1, 2]))):
        assert torch.equal(net(x, c_noise, cond), y)


def test_a_detached_mixin_takes_its_weights_to_the_next_host():
    net, (x, c_noise, cond) = unet(), inputs()
    lora = stir(LoRA(rank=2).attach(net))
    y = net(x, c_noise, cond)
    lora.detach()
    assert not lora.is_attached and list(lora.parameters()) == []
    twin = unet()
    twin.load_state_dict(net.state_dict())
    lora.attach(twin)
    assert torch.equal(twin(x, c_noise, cond), y)


def test_attaching_is_all_or_nothing():
    net = unet()
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match="'time_embed' is a Sequential; LoRA goes on Linear"):
        LoRA(on="*").attach(net)
    lora = LoRA(rank={"*.attn1.*": 4})
    with pytest.raises(ValueError, match="no rank for '.*attn2"):
        lora.attach(net)
    assert list(net.state_dict()) == keys
    assert not any(PORT in module._modules for module in net.modules()) and not lora.is_attached


def test_attaching_twice_is_an_error():
    net = unet()
    lora = LoRA().attach(net)
    with pytest.raises(ValueError, match="attached to a UNet already"):
        lora.attach(net)
    with pytest.raises(ValueError, match="called 'lora' is attached to this UNet"):
        LoRA(on="type:Conv2d").attach(net)
    LoRA().attach(net, name="second")
    assert list(attached(net)) == ["lora", "second"]
    lora.detach()
    with pytest.raises(ValueError, match="is not attached"):
        lora.detach()


def test_wrapped_hosts_are_refused():
    class DistributedDataParallel(nn.Module):  # by its name: the class itself needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="Attach first, then wrap"):
        LoRA(on="*").attach(DistributedDataParallel(nn.Linear(2, 2)))
    sharded = nn.Sequential(nn.Linear(2, 2))
    sharded[0].__dict__["__composable_api_state_key_0"] = {}
    with pytest.raises(ValueError, match=r"0 \(Linear\) is wrapped"):
        LoRA(on="*").attach(sharded)


# Scale and switch --------------------------------------------------------------------------------


def test_scale_zero_and_off_are_the_plain_host():
    net, (x, c_noise, cond) = unet(), inputs()
    y = net(x, c_noise, cond)
    lora = stir(LoRA(rank=2).attach(net))
    z = net(x, c_noise, cond)
    wanted = [p.requires_grad for p in net.parameters()]
    with lora.disabled():
        assert torch.equal(net(x, c_noise, cond), y)
        assert [p.requires_grad for p in net.parameters()] == wanted
    with lora.scaled(0.0):
        torch.testing.assert_close(net(x, c_noise, cond), y)
    assert lora.scale == 1 and lora.enabled
    assert torch.equal(net(x, c_noise, cond), z)


def test_scale_and_switch_set_before_attaching_hold_after():
    net, x = nn.Sequential(nn.Identity()), torch.zeros(1)
    plus = PlusOne(on="0", scale=3.0)
    plus.enabled = False
    plus.attach(net)
    assert net(x).item() == 0
    plus.enabled = True
    assert net(x).item() == 3


def test_state_is_restored_when_a_block_fails():
    lora = LoRA().attach(unet())
    with pytest.raises(KeyError), lora.disabled(), lora.scaled(0.1):
        raise KeyError
    assert lora.enabled and lora.scale == 1


@pytest.mark.parametrize("act", ["scale", "enabled", "detach"])
def test_nothing_is_switched_inside_backward(act):
    net = nn.Sequential(nn.Linear(2, 2))
    lora = LoRA(on="0", rank=1).attach(net)
    y = net(torch.ones(1, 2))
    y.register_hook(lambda grad: lora.detach() if act == "detach" else setattr(lora, act, 0.0))
    with pytest.raises(RuntimeError, match="inside backward"):
        y.sum().backward()


def test_rescaling_between_forward_and_backward_keeps_the_gradient():
    net = nn.Sequential(nn.Linear(3, 3))
    lora = stir(LoRA(on="0", rank=2).attach(net))
    x = torch.randn(2, 3)
    (true,) = torch.autograd.grad(net(x).square().sum(), [net[0]._port["lora"].A])
    loss = net(x).square().sum()
    with lora.scaled(0.0), torch.no_grad():
        net(x)
    lora.scale = 0.5
    (ours,) = torch.autograd.grad(loss, [net[0]._port["lora"].A])
    assert torch.equal(ours, true)


def test_gated_rows_equal_separate_runs():
    net, (x, c_noise, cond) = unet(), inputs()
    lora = stir(LoRA(rank=2, on=["type:Linear", "type:_ConvNd"]).attach(net))
    weights = torch.tensor([0.0, 0.25, 1.0, -2.0])
    gated = cond.gated(lora=weights)
    with routed(net, gated):
        together = net(x, c_noise, cond)
    for row, weight in enumerate(weights.tolist()):
        one = Conditioning({"cross_attention": cond["cross_attention"][row : row + 1]})
        with lora.scaled(weight):
            alone = net(x[row : row + 1], c_noise[row : row + 1], one)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


# Copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_a_mixin_of_its_own(duplicate):
    net, (x, c_noise, cond) = unet(), inputs()
    plain = net(x, c_noise, cond)
    lora = stir(LoRA(rank=2).attach(net))
    y = net(x, c_noise, cond)
    twin = duplicate(net)
    assert torch.equal(twin(x, c_noise, cond), y)
    theirs = attached(twin)["lora"]
    assert theirs is not lora and theirs.sites == lora.sites
    theirs.detach()
    assert torch.equal(twin(x, c_noise, cond), plain)
    assert torch.equal(net(x, c_noise, cond), y)
    lora.scale = 0.5
    assert not torch.equal(net(x, c_noise, cond), y)


def test_copying_a_part_of_the_host_does_not_copy_the_rest():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(300, 300))
    LoRA(on="0", rank=1).attach(net)
    assert len(pickle.dumps(net[0])) < 20_000


# Compiled ----------------------------------------------------------------------------------------


def test_one_graph_with_mixins_attached_and_none_more_when_they_are_turned():
    net, (x, c_noise, cond) = unet(), inputs()
    lora, joint = stir(LoRA(rank=2).attach(net)), stir(JointAttention().attach(net))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for scale in (1.0, 0.5, 0.0):
        lora.scale = scale
        for seed in range(2):
            gates = torch.rand(4, generator=torch.Generator().manual_seed(seed))
            with routed(net, cond.gated(lora=gates, joint_attention=gates).with_(partners=torch.arange(4).flip(0))):
                torch.testing.assert_close(compiled(x, c_noise, cond), net(x, c_noise, cond), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    joint.detach()


@pytest.mark.parametrize("in_place", [False, True])
def test_attaching_and_detaching_after_compiling_take_effect(in_place):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x, counter = torch.randn(2, 3), CompileCounterWithBackend("aot_eager")
    y = net(x)
    if in_place:
        net.compile(backend=counter, fullgraph=True)
    compiled = net if in_place else torch.compile(net, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    lora = stir(LoRA(on="0", rank=2).attach(net))
    z = net.forward(x)
    assert not torch.allclose(z, y)
    torch.testing.assert_close(compiled(x), z)
    # torch 2.11 leaves a module that was compiled in place uncompiled after a reset: right, only slower.
    assert counter.frame_count == (1 if in_place and torch.__version__ < "2.13" else 2)
    lora.detach()
    torch.testing.assert_close(compiled(x), y)


def test_a_hook_on_the_compiled_module_itself_is_in_its_graph():
    net = nn.Sequential(nn.Linear(3, 3))
    PlusOne().attach(net)
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(wrap_top_frame=True):  # as DiffusionEngine.compile sets it
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(torch.ones(1, 3)), net(torch.ones(1, 3)))
    assert counter.frame_count == 1


# Files -------------------------------------------------------------------------------------------


def test_a_file_alone_brings_the_mixin_back(tmp_path):
    net, (x, c_noise, cond) = unet(), inputs()
    twin = copy.deepcopy(net)
    lora = stir(LoRA(rank={"*.attn1.*": 4, "*": 2}, alpha=3.0, on=["*.to_[qv]"], scale=0.5).attach(net))
    y = net(x, c_noise, cond)
    lora.save(tmp_path / "style.safetensors")
    assert all(PORT not in key for key in lora.state_dict())
    loaded = load_mixin(tmp_path / "style.safetensors")
    assert isinstance(loaded, LoRA) and loaded.rank == {"*.attn1.*": 4, "*": 2}
    assert torch.equal(loaded.attach(twin)._sites[loaded.sites[0]][1].A, lora._sites[lora.sites[0]][1].A)
    assert torch.equal(twin(x, c_noise, cond), y)


def test_a_mixin_is_saved_detached_as_well(tmp_path):
    net = unet()
    lora = stir(LoRA(rank=2).attach(net))
    weights = lora.state_dict()
    lora.detach()
    lora.save(tmp_path / "a.safetensors")
    loaded = load_mixin(tmp_path / "a.safetensors").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_a_predicate_is_saved_as_the_names_it_picked(tmp_path):
    net = unet()
    lora = LoRA(on=lambda name, module: name.endswith("attn1.to_q")).attach(net)
    lora.save(tmp_path / "a.safetensors")
    assert load_mixin(tmp_path / "a.safetensors").attach(copy.deepcopy(unet())).sites == lora.sites


def test_loading_into_a_mixin_that_is_attached(tmp_path):
    first, second = stir(LoRA(rank=2).attach(unet())), LoRA(rank=2).attach(unet())
    first.save(tmp_path / "a.safetensors")
    second.load(tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_file_for_another_host_says_so(tmp_path):
    LoRA(rank=2, on="0").attach(nn.Sequential(nn.Linear(2, 2))).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="made for a Sequential, this is a UNet"):
        load_mixin(tmp_path / "a.safetensors").attach(unet())
    with pytest.raises(WeightFileError, match="made for a Sequential"):
        LoRA(rank=2).attach(unet()).load(tmp_path / "a.safetensors")


def test_weights_of_another_rank_or_other_sites_change_nothing():
    net = unet()
    lora = LoRA(rank=2).attach(net)
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    weights = stir(LoRA(rank=4).attach(unet())).state_dict()
    with pytest.raises(ValueError, match=r"to_q.A is \(4, 16\), here \(2, 16\).*more"):
        lora.load_state_dict(weights)
    some = {name: value + 1 for name, value in before.items() if "attn1" in name}
    with pytest.raises(ValueError, match="attn2.to_q.A is missing"):
        lora.load_state_dict(some)
    with pytest.raises(ValueError, match="nowhere.A belongs to no site"):
        lora.load_state_dict({**before, "nowhere.A": torch.ones(1)})
    assert all(torch.equal(before[name], value) for name, value in lora.state_dict().items())
    lora.load_state_dict(some, strict=False)
    assert all(torch.equal(lora.state_dict()[name], value) for name, value in some.items())
    waiting = LoRA(rank=2, name="other")
    waiting.load_state_dict(weights)
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        waiting.attach(net)
    assert list(net.state_dict()) == keys


def test_some_weights_wait_for_the_host_with_the_others_new_or_as_they_were():
    net = unet()
    some = {n: v + 1 for n, v in LoRA(rank=2).attach(unet()).state_dict().items() if "attn1" in n} | {
        "gone.A": torch.ones(1)
    }
    new = LoRA(rank=2)
    new.load_state_dict(some, strict=False)
    state = new.attach(net).state_dict()
    assert len(state) > len(some) and all(torch.equal(state[n], v) for n, v in some.items() if n != "gone.A")
    state = {name: value.clone() for name, value in stir(new).state_dict().items()}
    new.detach()
    new.load_state_dict(some, strict=False)
    new.attach(net)
    assert all(torch.equal(value, some.get(name, state[name])) for name, value in new.state_dict().items())
    new.detach()  # whose weights are whole again
    new.load_state_dict(some)
    with pytest.raises(ValueError, match="is missing"):
        new.attach(net)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": "other"}, "not an adapter file"),
        ({"arguments": "{"}, "damaged metadata"),
        ({"arguments": '{"type": "x"}'}, "damaged metadata"),
        ({"type": "os.system"}, "no mixin is called 'os.system'"),
        ({"arguments": '{"rank": 2, "shell": "true"}'}, "takes no 'shell'"),
    ],
)
def test_a_file_that_says_something_odd_builds_nothing(tmp_path, change, text):
    lora = LoRA(rank=2, on="0").attach(nn.Sequential(nn.Linear(2, 2)))
    lora.save(tmp_path / "a.safetensors")
    save_weights(tmp_path / "b.safetensors", lora.state_dict(), read_metadata(tmp_path / "a.safetensors") | change)
    with pytest.raises((WeightFileError, ConfigError), match=text):
        load_mixin(tmp_path / "b.safetensors")


def test_a_folder_is_no_file_of_a_mixin_and_says_what_reads_those_of_peft(tmp_path):
    lora = LoRA(rank=2, on="0").attach(nn.Sequential(nn.Linear(2, 2)))
    for read in (load_mixin, lora.load):
        with pytest.raises(WeightFileError, match=f"{tmp_path}: a folder, .*load_adapter"):
            read(tmp_path)


def test_a_file_says_what_it_is(tmp_path):
    LoRA(rank=2, on="0").attach(nn.Sequential(nn.Linear(2, 2))).save(tmp_path / "a.safetensors")
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert (metadata["type"], metadata["host"]) == ("lora", "Sequential")
    assert json.loads(metadata["arguments"])["rank"] == 2


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not in the registry"):
        PlusOne().attach(nn.Identity()).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="never attached"):
        LoRA().save(tmp_path / "a.safetensors")
    with isolated():

        class Forgetful(PlusOne):
            def __init__(self, size: int = 3):
                super().__init__("", "forgetful")

        with pytest.raises(ValueError, match="keep its argument 'size' as self.size"):
            Forgetful().attach(nn.Identity()).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# Configs -----------------------------------------------------------------------------------------


def test_mixins_are_built_from_configs():
    lora = build({"type": "lora", "rank": {"*.attn1.*": 4, "*": 2}, "alpha": 8, "on": ["*.to_q"]}, "mixin")
    assert (lora.rank, lora.alpha, lora.on, lora.name) == ({"*.attn1.*": 4, "*": 2}, 8.0, ["*.to_q"], "lora")
    assert build("ref_model", "mixin").source == "mixins_off"
    assert build({"type": "joint_attention", "scale": 0.5}, "mixin").scale == 0.5
    with pytest.raises(ConfigError, match="rank"):
        build({"type": "lora", "rank": "many"}, "mixin")


def test_a_mixin_of_ones_own_fits_in_a_few_lines(tmp_path):
    with isolated():

        class Bottleneck(Mixin):
            def __init__(self, width: int = 4, on: str = "role:feed_forward", name: str | None = None):
                super().__init__(on, name)
                self.width = width

            def part(self, module, site):
                return BottleneckPart(module.net[-1].out_features, self.width)

        class BottleneckPart(Part):
            def __init__(self, channels, width):
                super().__init__()
                self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
                nn.init.zeros_(self.up.weight)
                nn.init.zeros_(self.up.bias)

            def after(self, module, args, kwargs, output):
                return output + self.amount(output) * self.up(self.down(output).relu())

        net, (x, c_noise, cond) = unet(), inputs()
        y = net(x, c_noise, cond)
        mixin = build({"type": "bottleneck", "width": 3}, "mixin").attach(net)
        assert torch.equal(net(x, c_noise, cond), y)
        stir(mixin).save(tmp_path / "a.safetensors")
        z = net(x, c_noise, cond)
        mixin.detach()
        load_mixin(tmp_path / "a.safetensors").attach(net)
        assert torch.equal(net(x, c_noise, cond), z) and not torch.equal(z, y)
