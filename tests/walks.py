"""What a walk costs beside the denoiser, and whether it is one graph."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vdiff.denoisers import Denoiser
from vdiff.process import EDMSchedule, Prediction, X0Parameterization


class Idle(Denoiser, name="idle_for_tests"):
    """Says that everything is clean already."""

    language = X0Parameterization()

    def forward(self, x_t, level, cond=None):
        return Prediction(self.language, x_t, x_t, level)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def calls_and_kernels(sampler, schedule):
    """Network calls and kernels beside them, per step; fails if the walk reads a tensor."""
    start = torch.randn(2, 4)
    run = sampler.bind(Idle(), schedule, start, seeds=[0, 1]).draw_ahead()
    with torch.no_grad(), Counter() as counter:
        run(start)
    assert not [name for name in counter.names if "_local_scalar_dense" in name or "is_nonzero" in name]
    return len(run.stages) / run.num_steps, len(counter.names) / run.num_steps


def is_one_graph(sampler):
    """Whether a compiled walk agrees with the eager one, in one graph for all schedules."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, start = CompileCounter(), torch.randn(3, 4)
    walk = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    for schedule in (EDMSchedule(), EDMSchedule(sigma_max=40.0), EDMSchedule(sigma_max=20.0)):
        run = sampler.bind(Idle(), schedule, start, seeds=[0, 1, 2]).draw_ahead()
        with torch.no_grad():
            assert (walk(run, start) - run(start)).abs().max() < 1e-4
    return counter.frame_count == 1
