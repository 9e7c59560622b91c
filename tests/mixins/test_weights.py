"""LoRA and its relatives: one contract, whatever stands for the change of a weight."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.hooks import PORT, checkpoint, routed
from vdiff.mixins import DoRA, LoHa, LoKr, LoRA, load_mixin
from vdiff.networks import DiT, UNet
from vdiff.process import Conditioning

MIXINS = {
    "lora": lambda on: LoRA(rank=2, alpha=3.0, on=on),
    "rslora": lambda on: LoRA(rank=4, alpha=3.0, on=on, rslora=True),
    "pissa": lambda on: LoRA(rank=2, on=on, init="pissa"),
    "olora": lambda on: LoRA(rank=2, alpha=4.0, on=on, init="olora"),
    "gaussian": lambda on: LoRA(rank=2, on=on, init="gaussian"),
    "dora": lambda on: DoRA(rank=2, alpha=3.0, on=on),
    "loha": lambda on: LoHa(rank=2, alpha=3.0, on=on, tucker=True),
    "lokr": lambda on: LoKr(rank=1, alpha=3.0, on=on, decompose_both=True),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(3, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 3, padding=1), lambda: torch.randn(3, 4, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (3, 5))),
}


def unet():
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4).eval()
    return net, (
        torch.randn(2, 1, 8, 8),
        torch.tensor([0.1, 0.7]),
        Conditioning({"cross_attention": torch.randn(2, 3, 6)}),
    )


def dit():
    net = DiT(1, 1, 16, 2, 2, patch_size=2, num_classes=3).eval()
    return net, (torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.7]), Conditioning({"label": torch.tensor([0, 2])}))


NETWORKS = {"unet": (unet, ["type:Linear", "type:_ConvNd"]), "dit": (dit, ["type:Linear", "type:Embedding"])}


def stir(module_or_mixin, std=0.3):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module_or_mixin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * std)
    return module_or_mixin


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items() if PORT not in name.split(".")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Every change of every layer ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mixin", MIXINS)
def test_it_begins_as_nothing_acts_as_its_delta_and_comes_off(mixin, layer):
    make, draw = LAYERS[layer]
    net, x = nn.Sequential(make()).eval(), draw()
    y, before = net(x), weights(net)
    one = MIXINS[mixin]("0").attach(net)
    assert torch.equal(net(x), y)
    stir(one)
    z = net(x)
    assert not torch.allclose(z, y)
    with one.scaled(0.0):
        assert torch.allclose(net(x), y, rtol=0, atol=1e-6)
    with one.merged():  # the layer with the changed weight is the oracle for what it adds
        torch.testing.assert_close(net(x), z, rtol=1e-4, atol=1e-5)
        assert same(weights(net), before)  # a file of a merged host is that of the host
    assert same(weights(net), before) and torch.equal(net(x), z)
    one.detach()
    assert torch.equal(net(x), y) and same(dict(net.state_dict()), before)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mixin", ["lora", "pissa", "dora", "loha", "lokr"])
def test_networks_get_it_lose_it_merge_it_and_keep_it(mixin, network, tmp_path):
    make, on = NETWORKS[network]
    torch.manual_seed(0)
    net, inputs = make()
    stir(net, 0.1)  # what begins at zero would hide what is attached before it
    with torch.no_grad():
        y, before = net(*inputs), weights(net)
        one = MIXINS[mixin]([f"{role}" for role in on] if mixin != "pissa" else "*.to_[qkv]").attach(net)
        assert torch.equal(net(*inputs), y)
        z = stir(one) and net(*inputs)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(*inputs), z)
        one.merge()
        torch.testing.assert_close(net(*inputs), z, rtol=1e-3, atol=1e-4 * float(z.abs().max()))
        twin = copy.deepcopy(net)
        assert same(weights(net), before)
        one.unmerge()
        assert same(weights(net), before) and torch.equal(net(*inputs), z)
        twin_one = twin.get_submodule(one.sites[0])._port[one.name].mixin
        assert (
            same(weights(twin), before) and twin_one is not one and torch.equal(twin_one.unmerge() and twin(*inputs), z)
        )
        one.save(tmp_path / "a.safetensors")
        one.detach()
        assert torch.equal(net(*inputs), y) and same(dict(net.state_dict()), before)
        assert torch.equal(load_mixin(tmp_path / "a.safetensors").attach(net) and net(*inputs), z)


# Starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_leaves_it_alone_and_takes_its_largest_part(init):
    net = nn.Sequential(nn.Linear(8, 6))
    before = net[0].weight.clone()
    lora = LoRA(rank=2, alpha=4.0, on="0", init=init).attach(net)
    part = net[0]._port["lora"]
    assert torch.equal(net[0].weight, before)
    product = part.unit * part.B.detach() @ part.A.detach()
    if init == "pissa":  # Eckart and Young: no other matrix of rank 2 is nearer
        u, s, v = torch.linalg.svd(before)
        torch.testing.assert_close(product, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    else:
        q = part.B.detach()
        torch.testing.assert_close(q.T @ q, torch.eye(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(q @ part.A.detach(), q @ q.T @ before, rtol=1e-4, atol=1e-5)
    net(torch.randn(3, 8)).sum().backward()
    assert part.A.grad.any() and part.B.grad.any()  # both learn from the first step, unlike with a zero B
    lora.detach()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_a_base_in_half_precision_is_that_from_the_same_numbers(init):
    nets = [nn.Sequential(nn.Linear(8, 6).bfloat16()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].float()
    half, whole = (LoRA(rank=2, on="0", init=init).attach(net).state_dict() for net in nets)
    assert all(torch.equal(half[name], whole[name]) for name in ("0.A", "0.B"))


@pytest.mark.parametrize("init, width", [("gaussian", 1 / 4), ("kaiming", (3 * 4096) ** -0.5)])
def test_a_drawn_start_is_as_wide_as_pefts(init, width):
    """Normal of 1 / rank, or uniform up to 1 / sqrt(in)."""
    net = nn.Sequential(nn.Linear(4096, 4))
    A, B = LoRA(rank=4, on="0", init=init).attach(net).parameters()
    assert abs(A.std().item() / width - 1) < 0.03 and not B.any()


def test_dora_scales_directions_and_its_norm_is_a_constant_to_the_gradient():
    net, x = nn.Sequential(nn.Linear(5, 4, bias=False)), torch.randn(7, 5)
    dora = stir(DoRA(rank=2, alpha=3.0, on="0").attach(net))
    part, weight = net[0]._port["dora"], net[0].weight.detach()
    changed = weight + 1.5 * part.B @ part.A
    wanted = x @ (part.magnitude[:, None] * changed / changed.detach().norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(net(x), wanted)
    ours = torch.autograd.grad(net(x).square().sum(), list(dora.parameters()))
    theirs = torch.autograd.grad(wanted.square().sum(), list(dora.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [2, 4])
def test_dora_on_a_layer_that_begins_at_zero_changes_nothing_and_learns(num):
    net, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(7, 5)
    nn.init.zeros_(net[0].weight[:num])
    y = net(x)
    dora = DoRA(rank=2, on="0").attach(net)
    optimizer = torch.optim.SGD(dora.parameters(), 0.1)
    assert torch.equal(net(x), y)
    for _ in range(3):  # B, then the length, then the output
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in dora.parameters())
        optimizer.step()
    z = net(x)
    assert z.isfinite().all() and ((z - y)[:, :num].abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize("mixin", ["pissa", "olora", "dora"])
def test_what_begins_at_the_base_begins_there_again_when_reset(mixin):
    torch.manual_seed(0)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 6, 3))
        one = MIXINS[mixin](["0", "1"]).attach(net)
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = MIXINS[mixin](["0", "1"]).attach(net, name="fresh")
    leaves = [name for name in one.state_dict() if mixin != "dora" or name.endswith("magnitude")]
    assert leaves and all(torch.equal(one.state_dict()[name], fresh.state_dict()[name]) for name in leaves)
    fresh.detach()
    x = torch.randn(2, 6)
    with one.disabled():
        y = net[0](x)
    assert torch.equal(net[0](x), y)
    stir(one)
    assert not torch.equal(net[0](x), y)


def test_fused_parts_are_pairs_of_their_own():
    net, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(2, 4, 6)
    y = net(x)
    stir(LoRA(rank=2, on="0", parts=3).attach(net))
    part = net[0]._port["lora"]
    assert part.A.shape == (6, 6) and part.B.shape == (9, 2)
    change = [x @ a.T @ b.T for a, b in zip(part.A.chunk(3), part.B.chunk(3), strict=True)]
    torch.testing.assert_close(net(x), y + torch.cat(change, -1))


def test_fused_convolutions_too():
    net, x = nn.Sequential(nn.Conv1d(4, 12, 1)).eval(), torch.randn(2, 4, 5)
    lora = stir(LoRA(rank=2, on="0", parts=3).attach(net))
    z = net(x)
    torch.testing.assert_close(lora.merge() and net(x), z)


# Routing, compiling, recomputing -----------------------------------------------------------------


@pytest.mark.parametrize("mixin", MIXINS)
def test_rows_get_as_much_as_their_gate_says_and_train(mixin):
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(4, 5, 6)
    one = stir(MIXINS[mixin]("0").attach(net))
    gates = torch.tensor([0.0, 1.0, 0.5, -1.0])
    with routed(net, Conditioning(gates={one.name: gates})):
        together = net(x)
    grads = torch.autograd.grad(together.square().sum(), list(one.parameters()))
    total = [torch.zeros_like(g) for g in grads]
    for row, gate in enumerate(gates.tolist()):
        with one.scaled(gate):
            alone = net(x[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone)
            for sum_, grad in zip(
                total, torch.autograd.grad(alone.square().sum(), list(one.parameters())), strict=True
            ):
                sum_ += grad
    torch.testing.assert_close(list(grads), total, rtol=1e-4, atol=1e-4)


def test_one_graph_with_all_of_them_and_none_more_when_turned_or_swapped():
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Conv1d(3, 3, 3, padding=1)), torch.randn(2, 3, 6)
    every = [stir(make(["0", "2"]).attach(net, name=name)) for name, make in MIXINS.items()]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)

    def run(value):
        with routed(net, Conditioning(gates={"lora": torch.tensor([1.0, value]), "dora": torch.tensor([value, 1.0])})):
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), net(x))

    run(0.3)
    for value in (0.5, 2.0):
        run(value)
        for one in every:
            one.scale = value
            one.load_state_dict({name: v * value for name, v in one.state_dict().items()})  # a hot swap
        run(value)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mixin", MIXINS)
def test_recomputed_blocks_have_the_gradients_of_kept_ones(mixin):
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(2, 6)
    one = stir(MIXINS[mixin]("0").attach(net))
    wanted = torch.autograd.grad(net(x).square().sum(), list(one.parameters()))
    loss = checkpoint(net, x, module=net).square().sum()
    one.scale = 0.3
    torch.testing.assert_close(torch.autograd.grad(loss, list(one.parameters())), wanted)


def test_a_file_of_another_alpha_is_not_loaded_into_an_adapter(tmp_path):
    def make(**arguments):
        return LoRA(rank=2, on="0", **arguments).attach(nn.Sequential(nn.Linear(4, 4)))

    stir(make(alpha=8.0)).save(tmp_path / "a.safetensors")
    for other, text in ((make(alpha=4.0), "alpha at '0' is 8, here 4"), (make(alpha=8.0, rslora=True), "rsLoRA")):
        with pytest.raises(ValueError, match=text):
            other.load(tmp_path / "a.safetensors")
    same_alpha = make(alpha=8.0)
    same_alpha.load(tmp_path / "a.safetensors")
    assert same_alpha.state_dict()["0.B"].any()


# Refusals ----------------------------------------------------------------------------------------


def test_wrong_numbers_and_hosts_are_named():
    net = nn.Sequential(nn.Linear(4, 6), nn.Embedding(3, 6), nn.LayerNorm(6), nn.Conv1d(4, 4, 1, groups=2))
    for make, text in (
        (lambda: LoRA(on="0", parts=4), "6 outputs, which are not 4 fused parts"),
        (lambda: LoRA(on="1", parts=2), "fused parts"),
        (lambda: LoRA(on="3", parts=2), "2 groups"),
        (lambda: LoRA(on="0", rank=5, init="pissa"), "at most 4; got 5"),
        (lambda: LoHa(on="2"), "'2' is a LayerNorm; LoHa goes on"),
        (lambda: LoKr(on="0", factor={"x": 2}), "LoKr: no factor for '0'"),
    ):
        with pytest.raises(ValueError, match=text):
            make().attach(net)
    for make in (lambda: DoRA(dropout=1.0), lambda: LoHa(rank=0), lambda: LoRA(parts=0), lambda: LoRA(init="eva")):
        with pytest.raises(ValueError, match="must be|init is"):
            make()
