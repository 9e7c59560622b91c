"""Every registered sampler, small: truths that hold for all of them, and for those that join later."""

import inspect

from vdiff.process import TrailingDiscretizer
from vdiff.registry import entries
from vdiff.samplers import DPMpp2MSampler, Node, RestartInterval, RestartSampler, Sampler
from vdiff.samplers.adaptive_samplers import AdaptiveSampler

_OURS = "vdiff."


def names(adaptive=False):
    """The registered samplers that are the library's own; without the adaptive ones, which have no plan."""
    found = [name for name, entry in entries("sampler").items() if entry.target.__module__.startswith(_OURS)]
    return [name for name in found if adaptive or not issubclass(entries("sampler")[name].target, AdaptiveSampler)]


def make(name, num_steps=3, **options) -> Sampler:
    """A sampler by name; arguments that it does not take are left out."""
    target = entries("sampler")[name].target
    if target is RestartSampler:
        inner = DPMpp2MSampler(max(num_steps, 2), discretizer=options.get("discretizer"))
        low = inner.levels(options["schedule"]).ratio[-2].item()
        return RestartSampler(inner, [RestartInterval(low, 2 * low, num_steps=2)])
    if name == "dpm_fast":  # whose own levels never begin at pure noise
        options.setdefault("discretizer", TrailingDiscretizer())
    taken = inspect.signature(target).parameters
    return target(**{k: v for k, v in {"num_steps": num_steps, **options}.items() if k in taken})


def is_deterministic(sampler, schedule):
    nodes = sampler_nodes(sampler, schedule)
    return not any("noise" in s.ask or "noise" in s.update for s in sampler.plan(nodes, schedule))


def sampler_nodes(sampler, schedule):
    return Node.of(sampler.levels(schedule))
