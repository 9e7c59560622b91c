r"""Steering a sample by something differentiable that is read off the network, or off what it says.

Derive, say what is to become small, attach to the denoiser::

    class Brighter(ReadoutGuidance):
        def energy(self, features, prediction, head):
            return -prediction.x0.flatten(1).mean(1)


    Brighter(scale=30.0).attach(engine)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part, match
from vdiff.mixins.base import Mixin
from vdiff.process import Prediction


class ReadoutGuidance(Mixin, abstract=True):
    r"""At every level, one step down an energy: :math:`\hat x_0 - s\,\frac{\sigma^2}{\alpha}\nabla_{x_t} E`.

    With :math:`E = -\log p(y \mid x_t)` and scale 1 this is Bayes' rule: samples of the data given y. The network is
    asked once more, with gradient, wherever the denoiser is asked; at pure noise, where x0 is anybody's guess, nothing
    is changed. Not under ``torch.compile``: features are read by hooks that come and go with the call.

    Args:
        features: Modules below the denoiser whose outputs the energy reads; none by default.
        on: The denoiser.
        name: See :class:`Mixin`.
        scale: The s above.

    References:
        Luo et al., arXiv:2312.02150, section 3.2; Dhariwal & Nichol, arXiv:2105.05233, section 4.
    """

    def __init__(
        self, features: On | None = None, on: On = "role:denoiser", name: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(on, name, scale)
        self.features = features

    @abstractmethod
    def energy(self, features: Mapping[str, Tensor], prediction: Prediction, head: nn.Module) -> Tensor:
        """What is to become small, one number per row, ``(B,)``.

        Args:
            features: Outputs of the chosen modules by name, in this call.
            prediction: What the denoiser says, with gradient.
            head: What :meth:`head` made, with the weights it has now.
        """

    def head(self) -> nn.Module:
        """A module with weights of the energy's own, saved with the mixin; by default there is none."""
        return nn.Identity()

    def part(self, module: nn.Module, site: str) -> ReadoutGuidancePart:
        sites = [] if self.features is None else list(match(module, self.features, type(self).__name__))
        return ReadoutGuidancePart(sites, self.head())


class ReadoutGuidancePart(Part):
    """At a denoiser: its prediction, moved down the energy."""

    mixin: ReadoutGuidance

    def __init__(self, sites: Sequence[str], head: nn.Module) -> None:
        super().__init__()
        self.sites, self.head = tuple(sites), head

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        if not isinstance(output, Prediction):
            raise TypeError(
                f"{type(self.mixin).__name__} is attached to a {type(module).__name__}, which returned a "
                f"{type(output).__name__}; it goes on a denoiser. Set its `on`."
            )
        level, slope = output.level.like(output.x_t), self._slope(module, args, kwargs)
        means_something = (level.alpha > 0) & (level.sigma > 0)
        _, per_value = output.language.reading(level)  # how far x0 moves with what the network says
        step = self.amount(slope) * level.sigma**2 / (level.alpha * per_value) * slope
        return output.with_(value=output.value - torch.where(means_something, step, 0.0).to(output.value.dtype))

    def _slope(self, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """The gradient of the energy in what the denoiser is asked about."""
        named = dict(zip(("x_t", "level", "cond"), args, strict=False)) | kwargs
        with torch.enable_grad(), reading(module, self.sites) as features:
            x_t = named.pop("x_t").detach().requires_grad_()
            prediction = module.forward(x_t, **named)  # not called: this part stays out of it
            energy = self.mixin.energy(features, prediction, self.head)
            if energy.shape != x_t.shape[:1]:
                raise ValueError(
                    f"{type(self.mixin).__name__}.energy is one number per row, ({len(x_t)},); it is "
                    f"{tuple(energy.shape)}."
                )
            (slope,) = torch.autograd.grad(energy.sum(), x_t)
        return slope


@contextmanager
def reading(root: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what the modules of these names return, by name."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            found[site] = output

        return hook

    handles = [root.get_submodule(site).register_forward_hook(keep(site)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
