import pytest
import torch
from torch import nn

from vdiff.registry import ConfigError, build
from vdiff.training.optimizers import optimizer_memory, restore_optimizer

RECIPES = [
    ("adamw", {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.99]}, torch.optim.AdamW),
    ("adam", {"lr": 1e-2}, torch.optim.Adam),
    ("sgd", {"lr": 1e-2, "momentum": 0.9}, torch.optim.SGD),
]


def params():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(17, 5, 3, 3), (64,), (7,), (1,), (101, 33)]]


def walk(optimizer, ps, steps=range(20)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return ps


@pytest.mark.parametrize("name, options, torch_class", RECIPES)
def test_fused_kernels_repeat_bitwise_and_agree_with_the_plain_formula(name, options, torch_class):
    def run():
        ps = params()
        optimizer = build({"type": name, **options}, "optimizer")([{"params": ps}])
        assert isinstance(optimizer, torch_class) and optimizer.defaults["fused"]
        return walk(optimizer, ps)

    plain = params()
    walk(torch_class(plain, foreach=False, **options), plain)
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first, plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name, options, torch_class", RECIPES)
def test_memory_taken_and_put_back_continues_bitwise(name, options, torch_class):
    recipe = build({"type": name, **options}, "optimizer")
    whole = params()
    walk(recipe([{"params": whole}]), whole)

    half = params()
    optimizer = recipe([{"params": half}])
    walk(optimizer, half, range(11))
    names = {p: f"layer.{i}" for i, p in enumerate(half)}
    tensors, numbers = optimizer_memory(optimizer, names)
    other = recipe([{"params": half}])
    restore_optimizer(other, names, {k: v.clone() for k, v in tensors.items()} | numbers)
    walk(other, half, range(11, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))
    with pytest.raises(ValueError, match="parameters that are not trained now: gone"):
        restore_optimizer(other, names, {"gone/exp_avg": torch.ones(1)})


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="lr and weight_decay must be 0 or more"):
        build({"type": "adamw", "lr": -1}, "optimizer")
    with pytest.raises(ConfigError, match="Did you mean 'betas'"):
        build({"type": "adamw", "beta": [0.9, 0.9]}, "optimizer")
