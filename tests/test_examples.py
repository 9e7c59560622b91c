"""The examples run and show what they say."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def two_dimensions():
    spec = importlib.util.spec_from_file_location("two_dimensions", EXAMPLES / "two_dimensions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs(two_dimensions, tmp_path):
    two_dimensions.main(num_steps=2, out=tmp_path / "ring.png")
    assert (tmp_path / "ring.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_ring_is_learned_and_turned(two_dimensions, tmp_path):
    before, after, near, angle = two_dimensions.main(num_steps=200, out=tmp_path / "ring.png")
    assert after < before / 2
    assert (near < 0.24).float().mean() > 0.5  # chance is a sixth
    assert abs(angle - math.pi / 12) < 0.05
    assert (tmp_path / "ring.png").stat().st_size > 1000
