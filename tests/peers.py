"""Peers to compare with. A missing one skips the test, and fails it under `make test`."""

import importlib
import importlib.util
import os
import sys
import types

import pytest


def peer(name):
    """The module of a peer from the `test` extra."""
    try:
        if name.startswith("k_diffusion."):
            _open_package("k_diffusion")
        return importlib.import_module(name)
    except Exception as error:
        message = f"{name} cannot be imported: {error!r}"
        if os.environ.get("VDIFF_REQUIRE_PEERS"):
            pytest.fail(message)
        pytest.skip(message)


def _open_package(name):
    """The package without its ``__init__``: k-diffusion's imports CLIP, which needs a setuptools of 2024."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name)
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
