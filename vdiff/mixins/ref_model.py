"""The reference policy beside the trained one: what preference losses compare with."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from vdiff.checkpoints import load_into, read_run_weights, read_weights
from vdiff.hooks import PORT, On, Part, Port, is_port_key, parts, ports, remove
from vdiff.mixins.base import Mixin
from vdiff.networks import in_eval
from vdiff.process import Prediction

SOURCES = ("mixins_off", "copy", "adapter", "checkpoint")


class RefModel(Mixin):
    """Asks the reference policy about the same ``(x_t, level, cond)`` and puts it in ``Prediction.reference``.

    It runs without gradient and in eval mode, so a host with dropout of its own differs from its reference
    while it trains. Where it comes from:

    - ``mixins_off``: the denoiser itself with every mixin below it off. No second copy of the weights; right where
      only mixins are trained.
    - ``adapter``: the denoiser with the mixin ``adapter`` on and all others off: the way from an adapter that
      was fine-tuned first. It must not be trained. While the policy runs it is as it is set: on, if the trained
      mixin adds to it; off, if that began as its copy.
    - ``copy``: a frozen copy of the denoiser with what is attached to it, made by :meth:`begin`; for training the
      whole network. A trainer makes it of the weights the run starts from, in a resumed run too; by hand it
      is made at the first call, unless :meth:`begin` was called before.
    - ``checkpoint``: a frozen copy with the weights of ``file``, read when it is attached.

    A copy is a companion: outside the module tree, so in no optimizer, average, checkpoint or ``train()``. It goes
    to the denoiser's device when it is asked. It is compiled with the engine if it exists by then.

    Args:
        source: See above.
        adapter: Name of the mixin, for ``adapter``.
        file: For ``checkpoint``: a weight file, or a run or checkpoint folder of vdiff.
        weights: Of such a folder, ``ema`` or ``raw``.
        sha256: Of the file, or of the folder's manifest. It is looked at if given and recorded if not.
        always: Also where no gradient is recorded (validation; but sampling too, which then costs twice).
        on: The denoiser.
        name: See :class:`Mixin`.

    References:
        Wallace et al., arXiv:2311.12908.
    """

    def __init__(
        self,
        source: Literal["mixins_off", "copy", "adapter", "checkpoint"] = "mixins_off",
        adapter: str | None = None,
        file: Path | None = None,
        weights: Literal["ema", "raw"] = "ema",
        sha256: str | None = None,
        always: bool = False,
        on: On = "role:denoiser",
        name: str | None = None,
    ) -> None:
        super().__init__(on, name)
        if source not in SOURCES:
            raise ValueError(f"RefModel: source must be one of {', '.join(SOURCES)}, got {source!r}.")
        for value, key, owner in ((adapter, "adapter", "adapter"), (file, "file", "checkpoint")):
            if (value is None) == (source == owner):
                verb = "needs" if source == owner else "takes no"
                raise ValueError(f"RefModel: source {source!r} {verb} {key!r}.")
        self.source, self.adapter, self.always = source, adapter, always
        self.file = None if file is None else Path(file)
        self.weights: Literal["ema", "raw"] = weights
        self.sha256 = sha256

    def part(self, module: nn.Module, site: str) -> RefModelPart:
        part = RefModelPart(self.source, self.adapter, self.always)
        if self.file is not None:
            part.hold(self._loaded(module, site))
        return part

    def begin(self) -> Self:
        """Make the copy now, of the weights as they are. Does nothing for other sources."""
        if self.source == "copy":
            for module, part in self._sites.values():
                assert isinstance(part, RefModelPart)
                part.hold(_copied(module, part))
        return self

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"file": None if self.file is None else str(self.file)}

    def _loaded(self, module: nn.Module, site: str) -> nn.Module:
        assert self.file is not None
        if not self.file.exists():
            raise FileNotFoundError(f"RefModel: there is no {self.file}; it is where the reference's weights lie.")
        if self.file.is_dir():
            tensors, folder = read_run_weights(self.file, self.weights)
            found = _sha256(folder / "manifest.json")
        else:
            tensors, found = read_weights(self.file), _sha256(self.file)
        if self.sha256 not in (None, found):
            raise ValueError(
                f"RefModel: {self.file} is not the reference that was recorded: its sha256 is {found}, expected "
                f"{self.sha256}. Find the old file, or begin a new run with this one."
            )
        self.sha256 = found
        begin = next((b for b in (f"{site}.", "denoiser.") if any(name.startswith(b) for name in tensors)), "")
        tensors = {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
        if any(is_port_key(name) for name in tensors):
            raise ValueError(
                f"RefModel: {self.file} holds weights of mixins. Attach its mixin and use source: adapter, or merge it "
                "into the weights first."
            )
        plain = _plain(_copied(module))
        load_into(plain, tensors, where=f"RefModel: {self.file}")
        return plain


class RefModelPart(Part):
    """At a denoiser: its prediction, with the reference's in it."""

    def __init__(self, source: str, adapter: str | None, always: bool) -> None:
        super().__init__()
        self.source, self.adapter, self.always = source, adapter, always
        self._held: tuple[nn.Module, ...] = ()  # a tuple hides it from the module tree
        self._said: Prediction | None = None
        self._is_checked = False
        del self.scale
        self.scale = torch.empty(0)  # there is no more or less of a reference, so it holds not a byte

    @property
    def companion(self) -> nn.Module | None:
        """The frozen copy, if there is one yet."""
        return self._held[0] if self._held else None

    def hold(self, copied: nn.Module) -> nn.Module:
        """Freeze a copy and keep it, in place of the last one."""
        self._held = (copied.eval().requires_grad_(False),)
        return copied

    def companions(self) -> tuple[nn.Module, ...]:
        return self._held

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The reference answers first: what it needs in memory is free again before the policy keeps anything."""
        self._said = None  # of a call that failed
        if self.always or torch.is_grad_enabled():
            with torch.no_grad(), self._reference(module) as reference:
                self._said = reference(*args, **kwargs)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        said, self._said = self._said, None
        if not isinstance(output, Prediction):
            raise TypeError(
                f"RefModel is attached to a {type(module).__name__}, which returned a {type(output).__name__}; "
                "it goes on a denoiser, which returns a Prediction. Set its `on`."
            )
        is_trained = module.training and torch.is_grad_enabled()
        if is_trained and not self._is_checked and not torch.compiler.is_compiling():
            self._check(module)
        return output if said is None else output.with_(reference=said)

    @contextmanager
    def _reference(self, module: nn.Module) -> Iterator[Callable[..., Prediction]]:
        """What to call; not the module itself, so that hooks of the denoiser stay out of it."""
        if self.source in ("mixins_off", "adapter"):
            with _only(module, self.adapter):
                yield module.forward
            return
        companion = self.companion or self.hold(_copied(module, self))
        if (place := _device(module)) != _device(companion):
            companion.to(place)
        yield companion.forward

    def _check(self, module: nn.Module) -> None:
        """Once, at the first call that trains: is it a reference, and does it stand still?"""
        others = [part for part in parts(module) if part is not self]
        if self._held or self.source == "copy":
            self._is_checked = True
            return
        merged = next((part.mixin_name for part in others if getattr(part, "is_merged", False)), None)
        if merged is not None:
            raise ValueError(f"RefModel: {merged!r} is merged into the weights, so it cannot be off. Unmerge it first.")
        if self.source == "adapter":
            mine = [part for part in others if part.mixin_name == self.adapter]
            known = ", ".join(dict.fromkeys(part.mixin_name for part in others)) or "none"
            if not mine:
                raise ValueError(
                    f"RefModel: no mixin called {self.adapter!r} is attached below the denoiser. Attached: {known}."
                )
            if any(p.requires_grad for part in mine for p in part.parameters()):
                raise ValueError(
                    f"RefModel: the adapter {self.adapter!r} is itself trained, so the reference would move with the "
                    f"policy. Freeze it (train: only another mixin, or requires_grad_(False)). Attached: {known}."
                )
        elif not any(part.enabled for part in others):
            raise ValueError(
                "RefModel: no other mixin is on below the denoiser, so with mixins off the reference is the policy "
                "itself. To train the network's own weights, use source: copy (or checkpoint)."
            )
        moving = [n for n, p in module.named_parameters() if p.requires_grad and not is_port_key(n)]
        if moving:
            warnings.warn(
                f"RefModel: {len(moving)} of the denoiser's own parameters ask for a gradient ({moving[0]}, ...); once "
                "they are trained, the reference moves with the policy. Train mixins only, or use source: copy.",
                stacklevel=2,
            )
        self._is_checked = True

    def extra_repr(self) -> str:
        mixin = self.mixin
        if self.source == "checkpoint" and isinstance(mixin, RefModel):
            return f"{mixin.file}, sha256 {str(mixin.sha256)[:12]}..."
        return f"adapter {self.adapter}" if self.adapter else self.source


@contextmanager
def _only(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Every mixin off but ``adapter``, and everything in eval mode."""
    before = [(part, part.enabled) for part in parts(module)]
    try:
        for part, _ in before:
            part.enabled = part.mixin_name == adapter
        with in_eval(module):
            yield
    finally:
        for part, was_enabled in before:
            part.enabled = was_enabled


def _copied(module: nn.Module, own: Part | None = None) -> nn.Module:
    """A copy in memory of its own, with its mixins' parts but ``own``; whatever else a mixin touches stays behind."""
    shared: dict[int, Any] = {id(part.mixin): part.mixin for part in parts(module)}
    if own is not None:
        shared[id(own)] = own
    copied = copy.deepcopy(module, shared)
    for port in ports(copied):
        for name in [name for name, part in port.items() if part is own]:
            del port._modules[name]
    return copied


def _plain(module: nn.Module) -> nn.Module:
    """Without its mixins."""
    touched = [(host, host._modules.get(PORT)) for host in module.modules()]
    remove([(host, part) for host, port in touched if isinstance(port, Port) for part in port.values()])
    return module


def _device(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
