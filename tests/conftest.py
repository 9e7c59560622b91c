"""Every test runs on few threads, so that the suite fits beside other work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _global_randomness_is_fixed():
    """Tests that build networks draw their weights; the draw is the same whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _what_other_tests_compiled_is_forgotten(request):
    """Code that several networks share (torch's own wrappers) is compiled for eight of them at most."""
    if any(word in request.node.name for word in ("graph", "compil", "inductor")):
        torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
