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


def save_tokenizer(folder, words):
    """A tokenizer of transformers for these words, whose ids follow ``<pad>`` 0 and ``</s>`` 1, in a folder."""
    tokenizers, transformers = peer("tokenizers"), peer("transformers")
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    whole.save_pretrained(folder)
    return whole


def _open_package(name):
    """The package without its ``__init__``: k-diffusion's imports CLIP, which needs a setuptools of 2024."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name)
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package


class _InFloat64:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


def diffusers_walk(monkeypatch, scheduler, ratios, denoise, start, **options):
    """A walk of a multistep scheduler of diffusers over these levels, in float64 where it would force float32.

    ``denoise(x, ratio)`` sees and says what is of the variance-preserving frame.
    """
    import torch

    name = f"diffusers.schedulers.scheduling_{scheduler}"
    module = peer(name)
    monkeypatch.setattr(module, "torch", _InFloat64(torch))
    (kind,) = [v for k, v in vars(module).items() if k.endswith("Scheduler") and getattr(v, "__module__", "") == name]
    theirs = kind(prediction_type="sample", **options)
    theirs.set_timesteps(len(ratios) - 1)
    theirs.sigmas = ratios.clone()
    theirs.timesteps = torch.arange(len(ratios) - 1, 0, -1)
    theirs.set_begin_index(0)
    x = start
    for ratio, t in zip(ratios, theirs.timesteps, strict=False):
        x = theirs.step(denoise(x, ratio), t, x).prev_sample
    return x
