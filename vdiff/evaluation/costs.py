"""What a module is made of and what one call of it costs, part by part.

On the meta device nothing is computed and nothing is stored, so a network of any size is measured in
seconds. Attention counts there as a fused kernel, which is what devices run: it keeps no matrix of weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vdiff.hooks import PORT, Port

_NEVER_CALLED = (nn.ModuleList.forward, nn.ModuleDict.forward)
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # The kernel that torch takes on the CPU, which the registry leaves out.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}


@dataclass(frozen=True)
class ModuleCost:
    """One module with everything below it; one that has no weights and did not run is left out.

    Attributes:
        name, type: Its path from the root, ``""`` for the root; its class.
        parameters, trainable: How many numbers; those under several names count once.
        mixins: At how many sites at or below it each mixin is attached.
        flops: Of its forward calls; a multiplication and an addition are two.
        activations: Bytes that its forward calls returned.
        saved: Bytes that its forward calls keep for the backward pass, in its own operations and below. A
            tensor counts once, where it is first kept; weights do not count.
    """

    name: str
    type: str
    parameters: int
    trainable: int
    mixins: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    activations: int = 0
    saved: int = 0

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True)
class Costs:
    """The costs of all modules, in the order of ``named_modules``; the root is the first.

    Attributes:
        weights: Bytes of all parameters and buffers.
        gradients: Bytes of the gradients of what is trained.
        training_flops: Of forward and backward, what is recomputed included; 0 where there is nothing to train.
    """

    modules: tuple[ModuleCost, ...]
    weights: int
    gradients: int
    training_flops: int

    def __getitem__(self, name: str) -> ModuleCost:
        return {cost.name: cost for cost in self.modules}[name]


def count_costs(module: nn.Module, call: Callable[[], Any]) -> Costs:
    """Count what ``module`` has, and what ``call``, which calls it with gradients, makes it do.

    Args:
        module: On any device; on ``meta`` nothing is computed. Its gradients are cleared.
        call: Returns what training differentiates, a tensor or several; the sum of their means stands for the loss.

    Raises:
        RuntimeError, NotImplementedError: on the meta device, something that needs real numbers.
    """
    tally = _Tally(module)
    with tally.hooks(), _FusedOnMeta(), _Operations(tally), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda tensor: tensor):
            means = [value.mean() for value in _tensors(call()) if value.requires_grad]
        tally.is_forward = False
        if means:
            loss = torch.stack(means).sum()
            # From its edge: with a tensor torch would set the modes aside, which what is recomputed needs.
            torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
            module.zero_grad()
    modules = [cost for name, child in _modules(module) if (cost := _cost(name, child, tally)) is not None]
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    gradients = sum(_bytes(p) for p in module.parameters() if p.requires_grad)
    return Costs(tuple(modules), sum(map(_bytes, tensors)), gradients, tally.training_flops if means else 0)


def _cost(name: str, module: nn.Module, tally: _Tally) -> ModuleCost | None:
    numbers = {p: p.numel() for p in module.parameters()}
    if name and not numbers and not tally.calls[module]:
        return None
    mixins = Counter(mixin for port in module.modules() if isinstance(port, Port) for mixin in port)
    trainable = sum(n for p, n in numbers.items() if p.requires_grad)
    figures = (tally.flops[module], tally.returned[module], tally.saved[module])
    return ModuleCost(name, type(module).__name__, sum(numbers.values()), trainable, dict(mixins), *figures)


class _Tally:
    """What modules do and keep, by module. Lists that are never called themselves do what their entries do."""

    def __init__(self, root: nn.Module) -> None:
        self.root, self.is_forward = root, True
        self.running: list[nn.Module] = []
        self.calls: Counter[nn.Module] = Counter()
        self.flops: Counter[nn.Module] = Counter()
        self.returned: Counter[nn.Module] = Counter()
        self.saved: Counter[nn.Module] = Counter()
        self.training_flops = 0
        # Held, so that no storage comes to lie where one lay that was counted.
        self.seen = {s._cdata: s for t in (*root.parameters(), *root.buffers()) if (s := t.untyped_storage())}
        modules = dict(_modules(root))
        self.lists = {module: modules[name.rpartition(".")[0]] for name, module in modules.items() if name}
        self.lists = {m: up for m, up in self.lists.items() if type(up).forward in _NEVER_CALLED}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        # Around the ports' hooks: what is attached to a module counts as that module's.
        handles = []
        for _, module in _modules(self.root):
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def around(self) -> set[nn.Module]:
        """The modules that are running, and the lists that they are in."""
        found = {self.root, *self.running}
        stack = list(found)
        while stack:
            if (above := self.lists.get(stack.pop())) is not None and above not in found:
                found.add(above)
                stack.append(above)
        return found

    def count(self, flops: int) -> None:
        self.training_flops += flops
        for module in self.around() if self.is_forward and flops else ():
            self.flops[module] += flops

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            for module in self.around():
                self.saved[module] += storage.nbytes()
        return tensor

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self.running.pop()
        if self.is_forward:  # and not when a checkpoint is computed again
            self.calls[module] += 1
            returned = sum(_bytes(tensor) for tensor in _tensors(output))
            for owner in (module, *([self.lists[module]] if module in self.lists else ())):
                self.returned[owner] += returned


class _Operations(TorchDispatchMode):
    """Adds up the floating-point operations by torch's own formulas."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        formula = _FLOPS.get(function._overloadpacket)
        if formula is None and function is not torch.ops.prim.device.default:
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        if formula is not None:
            self.tally.count(formula(*args, **kwargs, out_val=out))
        return out


class _FusedOnMeta(TorchFunctionMode):
    """On the meta device torch would take the plain kernel of attention; here it takes a fused one."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not args[0].is_meta:
            return function(*args, **kwargs)
        return _fused(*args, **kwargs)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the host; what is attached to it belongs to the module that it is attached to."""
    return ((name, module) for name, module in root.named_modules() if PORT not in name.split("."))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, a sequence, a mapping or a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors([getattr(value, name) for name in value.__dataclass_fields__])


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
