"""A second, frozen model beside a denoiser: a reference to compare with, a teacher to learn from.

It costs nothing where the denoiser with its mixins off will do; otherwise it is a copy in memory of its own.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import nn

from vdiff.checkpoints import load_into, read_run_weights, read_weights
from vdiff.hooks import On, Part, bare_copy, is_port_key, parts, ports
from vdiff.mixins.base import Mixin
from vdiff.networks import in_eval
from vdiff.process import Conditioning, Prediction

Source = Literal["mixins_off", "copy", "adapter", "checkpoint"]
SOURCES: tuple[str, ...] = get_args(Source)


class Companion(Mixin, abstract=True):
    """Asks a frozen model about what the denoiser is asked. Where that model comes from:

    - ``mixins_off``: the denoiser itself with every mixin below it off. No second copy of the weights; right where
      only mixins are trained.
    - ``adapter``: the denoiser with the mixin ``adapter`` on, or those of a list, and all others off: the way from an
      adapter that was fine-tuned first, and beside a frozen ControlNet. They must not be trained. Meanwhile the
      denoiser is as it is set: with it on, if the trained mixin adds to it; with it off, if that began as its copy.
    - ``copy``: a frozen copy of the denoiser with what is attached below it, made by :meth:`begin`; for training the
      whole network. A trainer makes it of the weights the run starts from, in a resumed run too; by hand it
      is made at the first call, unless :meth:`begin` was called before.
    - ``checkpoint``: a frozen copy with the weights of ``file``, read when it is attached.

    It is asked with the conditions that the denoiser got, so what makes those must be frozen as well. It runs without
    gradient and in eval mode. A copy is outside the module tree, so in no optimizer, average,
    checkpoint or ``train()``. It goes to the denoiser's device when it is asked, and is compiled with the engine if
    it exists by then.

    Args:
        source: See above.
        adapter: Name of the mixin, or names of several, for ``adapter``.
        file: For ``checkpoint``: a weight file, or a run or checkpoint folder of vdiff.
        weights: Of such a folder, ``ema`` or ``raw``.
        sha256: Of the file, or of the folder's manifest. It is looked at if given and recorded if not.
        on: The denoiser.
        name: See :class:`Mixin`.

    Attributes:
        words: What error messages call the companion, and the model that is trained.
    """

    words: ClassVar[tuple[str, str]]

    def __init__(
        self, source: Source, adapter: str | list[str] | None, file: Path | None, weights: Literal["ema", "raw"],
        sha256: str | None, on: On, name: str | None,
    ) -> None:  # fmt: skip
        super().__init__(on, name)
        who = type(self).__name__
        if source not in SOURCES:
            raise ValueError(f"{who}: source must be one of {', '.join(SOURCES)}, got {source!r}.")
        for value, key, owner in ((adapter, "adapter", "adapter"), (file, "file", "checkpoint")):
            if (value is None) == (source == owner):
                verb = "needs" if source == owner else "takes no"
                raise ValueError(f"{who}: source {source!r} {verb} {key!r}.")
        if adapter is not None and not adapter:
            raise ValueError(f"{who}: adapter names a mixin, or several; got {adapter!r}.")
        self.source: Source = source
        self.adapter = adapter
        self.file = None if file is None else Path(file)
        self.weights: Literal["ema", "raw"] = weights
        self.sha256 = sha256

    @abstractmethod
    def companion_part(self) -> CompanionPart:
        """A new part, which does not hold its model yet."""

    def part(self, module: nn.Module, site: str) -> CompanionPart:
        part = self.companion_part()
        part.source, part.words = self.source, (type(self).__name__, *self.words)
        part.adapters = (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter or ())
        if self.file is not None:
            part.hold(self._loaded(module, site))
        return part

    def begin(self) -> Self:
        """Make the copy now, of the weights as they are. Does nothing for other sources."""
        if self.source == "copy":
            for module, part in self._sites.values():
                assert isinstance(part, CompanionPart)
                part.hold(_copied(module, part))
        return self

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"file": None if self.file is None else str(self.file)}

    def _loaded(self, module: nn.Module, site: str) -> nn.Module:
        assert self.file is not None
        who, noun = type(self).__name__, self.words[0]
        if not self.file.exists():
            raise FileNotFoundError(f"{who}: there is no {self.file}; it is where the {noun}'s weights lie.")
        if self.file.is_dir():
            tensors, folder = read_run_weights(self.file, self.weights)
            found = _sha256(folder / "manifest.json")
        else:
            tensors, found = read_weights(self.file), _sha256(self.file)
        if self.sha256 not in (None, found):
            raise ValueError(
                f"{who}: {self.file} is not the {noun} that was recorded: its sha256 is {found}, expected "
                f"{self.sha256}. Find the old file, or begin a new run with this one."
            )
        self.sha256 = found
        begin = next((b for b in (f"{site}.", "denoiser.") if any(name.startswith(b) for name in tensors)), "")
        tensors = {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
        if any(is_port_key(name) for name in tensors):
            raise ValueError(
                f"{who}: {self.file} holds weights of mixins. Attach its mixin and use source: adapter, or merge it "
                "into the weights first."
            )
        plain = bare_copy(module)
        load_into(plain, tensors, where=f"{who}: {self.file}")
        return plain


class CompanionPart(Part):
    """At a denoiser: what asks the companion, with the arguments that the denoiser was called with."""

    is_outermost = True
    source: Source
    adapters: tuple[str, ...]
    words: tuple[str, str, str]  # the mixin's class, the companion, the model that is trained

    def __init__(self) -> None:
        super().__init__()
        self._held: tuple[nn.Module, ...] = ()  # a tuple hides it from the module tree
        self._is_checked = False
        del self.scale
        self.scale = torch.empty(0)  # there is no more or less of a companion, so it holds not a byte

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

    @contextmanager
    def asked(self, module: nn.Module) -> Iterator[Callable[..., Prediction]]:
        """What to call, without gradient; not the module itself, so that hooks of the denoiser stay out of it."""
        with torch.no_grad():
            if self.source in ("mixins_off", "adapter"):
                with only(module, lambda part: part.mixin_name in self.adapters):
                    yield module.forward
                return
            companion = self.companion or self.hold(_copied(module, self))
            if (place := _device(module)) != _device(companion):
                companion.to(place)
            yield companion.forward

    def checked(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        """The denoiser's answer; looks once, at the first call that trains, whether the companion stands still.

        Raises:
            TypeError: no answer of a denoiser.
            ValueError: no companion, or one that moves with what is trained.
        """
        who = self.words[0]
        if not isinstance(output, Prediction):
            raise TypeError(
                f"{who} is attached to a {type(module).__name__}, which returned a {type(output).__name__}; "
                "it goes on a denoiser, which returns a Prediction. Set its `on`."
            )
        is_trained = module.training and torch.is_grad_enabled()
        if is_trained and not self._is_checked and not torch.compiler.is_compiling():
            self.check(module, args[2] if len(args) > 2 else kwargs.get("cond"))
            self._is_checked = True
        return output

    def check(self, module: nn.Module, cond: Conditioning | None) -> None:
        """Called once, at the first call that trains."""
        self._check_conditions(cond)
        if not self._held and self.source != "copy":
            self._check_mixins(module)

    def _check_conditions(self, cond: Conditioning | None) -> None:
        """The companion is asked with the very conditions of the model that is trained."""
        who, noun, trained = self.words
        while cond is not None:
            if name := next((name for name, value in cond.tensors.items() if value.requires_grad), None):
                raise ValueError(
                    f"{who}: the condition {name!r} asks for a gradient, so something in the conditioner is trained, "
                    f"and the {noun}, which is told the same, would move with the {trained}. Train below the denoiser "
                    "alone (training.train: [{on: denoiser}], or its mixins), or freeze it "
                    "(engine.conditioner.requires_grad_(False))."
                )
            cond = cond.null

    def _check_mixins(self, module: nn.Module) -> None:
        """The companion is the denoiser itself, with some of its mixins off."""
        who, noun, trained = self.words
        others = [part for part in parts(module) if part is not self]
        with_weights = {part.mixin_name for part in others if part.enabled and any(True for _ in part.parameters())}
        trained_names = {part.mixin_name for part in others if any(p.requires_grad for p in part.parameters())}
        merged = next((part.mixin_name for part in others if part.is_merged), None)
        if merged is not None:
            raise ValueError(f"{who}: {merged!r} is merged into the weights, so it cannot be off. Unmerge it first.")
        if self.source == "adapter":
            names = list(dict.fromkeys(part.mixin_name for part in others))
            known = ", ".join(names) or "none"
            if missing := [name for name in self.adapters if name not in names]:
                raise ValueError(
                    f"{who}: no mixin called {missing[0]!r} is attached below the denoiser. Attached: {known}."
                )
            if moved := [name for name in self.adapters if name in trained_names]:
                raise ValueError(
                    f"{who}: the adapter {moved[0]!r} is itself trained, so the {noun} would move with the "
                    f"{trained}. Freeze it (train: only another mixin, or requires_grad_(False)). Attached: {known}."
                )
        elif not with_weights:
            raise ValueError(
                f"{who}: no other mixin is on below the denoiser, so with mixins off the {noun} is the {trained} "
                "itself. To train the network's own weights, use source: copy (or checkpoint)."
            )
        if left := sorted(with_weights - trained_names - set(self.adapters)):
            kept = ", ".join((*self.adapters, *left))
            warnings.warn(
                f"{who}: {', '.join(left)}: on and not trained, and the {noun} is without, so that it differs from the "
                f"{trained} by more than what is trained. To have it there: source: adapter, adapter: [{kept}].",
                stacklevel=2,
            )
        moving = [n for n, p in module.named_parameters() if p.requires_grad and not is_port_key(n)]
        if moving:
            warnings.warn(
                f"{who}: {len(moving)} of the denoiser's own parameters ask for a gradient ({moving[0]}, ...); once "
                f"they are trained, the {noun} moves with the {trained}. Train mixins only, or use source: copy.",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        mixin = self.mixin
        if self.source == "checkpoint" and isinstance(mixin, Companion):
            return f"{mixin.file}, sha256 {str(mixin.sha256)[:12]}..."
        return f"adapter {', '.join(self.adapters)}" if self.adapters else self.source


@contextmanager
def only(module: nn.Module, is_on: Callable[[Part], bool]) -> Iterator[None]:
    """Every other part off, and everything in eval mode."""
    before = [(part, part.enabled) for part in parts(module)]
    try:
        for part, _ in before:
            part.enabled = is_on(part)
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
            port.take(name)
    return copied


def _device(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
