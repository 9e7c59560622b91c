"""Every sampler, language and guider together; and what a walk costs, for each sampler that joins the registry."""

import inspect

import pytest
import torch
from every_sampler import make, names
from walks import Counter, Idle, is_one_graph

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, CosineSchedule, EDMSchedule, FlowSchedule, Prediction
from vdiff.registry import build, entries, isolated
from vdiff.samplers import DPMpp2MSampler, NoneGuider

SCHEDULES = {"edm": EDMSchedule(), "cosine": CosineSchedule(), "flow": FlowSchedule()}
ROWS = 2


def own(kind):
    """Names of the library's own entries of a kind."""
    return [name for name, entry in entries(kind).items() if entry.target.__module__.startswith("vdiff.")]


with isolated():

    class Speaker(Denoiser):
        """Says something smooth in any language."""

        def __init__(self, language):
            super().__init__()
            self.language = language

        def forward(self, x_t, level, cond=None):
            shift = 0.0 if cond is None else cond["vector"].to(x_t)[:, :, None, None, None]
            return Prediction(self.language, 0.3 * torch.tanh(x_t) + 0.1 * shift, x_t, level)


def conditions():
    return Conditioning({"vector": torch.ones(ROWS, 1)}, null=Conditioning({"vector": torch.zeros(ROWS, 1)}))


def guider(name, weak):
    """A guider by name, from what its constructor wants."""
    target = entries("guider")[name].target
    wanted = {}
    for p in inspect.signature(target).parameters.values():
        if p.default is not inspect.Parameter.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        annotation = str(p.annotation)
        if "Denoiser" in annotation:
            wanted[p.name] = weak
        elif "Guider" in annotation:
            wanted[p.name] = build({"type": "cfg", "scale": 2.0}, "guider")
        elif "dict" in annotation or "Mapping" in annotation:
            wanted[p.name] = {"vector": 2.0}
        elif "list[str]" in annotation:
            wanted[p.name] = ["vector"]
        elif "list" in annotation or "Sequence" in annotation:
            wanted[p.name] = [1.0, 2.0]
        else:
            wanted[p.name] = 2.0
    if "scale" in inspect.signature(target).parameters:
        wanted["scale"] = 2.0
    return target(**wanted)


@pytest.mark.parametrize("name", names(adaptive=True))
def test_every_sampler_speaks_every_language_under_every_guider(name):
    """Finite, the shape of the noise, and float32; levels at which a language says nothing are left out."""
    noise = torch.randn(ROWS, 1, 3, 2, 2)
    for i, language in enumerate(own("parameterization")):
        # Every language on every schedule in turn; the noise is undefined where no signal is left.
        is_edm = language == "epsilon" or name not in names()  # some adaptive ones do not begin at pure noise
        schedule = EDMSchedule() if is_edm else list(SCHEDULES.values())[i % 3]
        sampler = make(name, 3, schedule=schedule, rtol=1.0, atol=1.0)  # the widest steps they take
        denoiser = Speaker(build({"type": language}, "parameterization"))
        weak = Speaker(build({"type": language}, "parameterization"))
        for j, each in enumerate(own("guider")):
            if name not in names() and (i + j) % 5:
                continue  # an adaptive walk takes a hundred calls: every language and every guider, not each with each
            out = sampler(denoiser, schedule, noise, conditions(), guider=guider(each, weak), seeds=range(ROWS))
            assert out.shape == noise.shape and out.dtype == torch.float32, (language, each)
            assert torch.isfinite(out).all(), (language, each)


@pytest.mark.parametrize("name", names())
def test_every_walk_is_one_graph_whatever_the_run(name):
    if name == "restart":
        pytest.skip("its levels are placed by the schedule, so each schedule has a graph")
    assert is_one_graph(make(name, 3))


@pytest.mark.parametrize("name", names())
def test_no_walk_reads_the_device(name):
    start = torch.randn(2, 4)
    run = make(name, 6, schedule=EDMSchedule()).bind(Idle(), EDMSchedule(), start, seeds=[0, 1]).draw_ahead()
    with torch.no_grad(), Counter() as counter:
        run(start)
    assert not [n for n in counter.names if "_local_scalar_dense" in n or "is_nonzero" in n]
    per_call = len(counter.names) / len(run.stages)
    assert per_call <= 10  # a kernel per term


def test_2m_is_at_most_four_kernels_a_step():
    start = torch.randn(2, 4)
    run = DPMpp2MSampler(50).bind(Idle(), EDMSchedule(), start, guider=NoneGuider())
    with torch.no_grad(), Counter() as counter:
        run(start)
    assert len(counter.names) / 50 <= 4


# On a device -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", names())
def test_the_loop_never_waits_for_the_device(name):
    start = torch.randn(2, 4, device="cuda")
    run = make(name, 6, schedule=EDMSchedule()).bind(Idle(), EDMSchedule(), start, seeds=[0, 1])
    run(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(start)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", names())
def test_the_loop_can_be_captured(name):
    """In a CUDA graph, replayed on another start."""
    starts = [torch.randn(2, 4, device="cuda") for _ in range(2)]
    run = make(name, 6, schedule=EDMSchedule()).bind(Idle(), EDMSchedule(), starts[0], seeds=[0, 1]).draw_ahead()
    want = run(starts[1])
    held = starts[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(held)
    held.copy_(starts[1])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
