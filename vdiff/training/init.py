"""Weights to start from. Not resuming: the step, the optimizer and the average begin anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from vdiff.checkpoints import (
    find_checkpoint,
    is_by_others,
    is_in_folders,
    load_into,
    load_published,
    open_weights,
    read_parts,
    read_run_weights,
    read_weights,
)
from vdiff.checkpoints.loading import by_prefix, check_met, summary
from vdiff.hooks import attached
from vdiff.registry import did_you_mean


class InitEntry:
    """One entry of ``init:``; several are loaded in order.

    A published checkpoint, in its original layout or in diffusers', goes part by part to where each belongs, see
    :func:`vdiff.checkpoints.load_published`.

    Args:
        file: A weight file, a run or checkpoint folder of vdiff, or a folder of diffusers'.
        into: Module that gets them, dotted from the engine: ``denoiser.network``; by default the engine.
        prefix: How names in the file begin and what to put there: ``{"model.diffusion_model.": ""}``.
        ignore: Globs over names below ``into`` that are left alone. Each must meet one.
        strict: Whether every name must be on both sides; False is for files by our names.
        inflate: Whether the file is of an image network and goes into a network of videos made of it: what images
            have no use for stays as built, see :mod:`vdiff.checkpoints.inflation`.
        only_adapter: Name of a mixin: its own small file, read into that mixin alone.
        inside: Key in a torch file under which the weights lie.
        weights: Of a run, a checkpoint folder or a published file, ``ema`` or ``raw``.
        config: Run file of the run that ``file`` is the folder of; :func:`vdiff.training.train` trains it first,
            unless it is there and finished.
        leave_out: How names in the file begin that are left out. Each must meet one.
        given: What a published file does not tell, see :class:`vdiff.checkpoints.architecture.Told`. All of it must be
            asked for.
    """

    def __init__(
        self,
        file: Path,
        into: str = "",
        prefix: dict[str, str] | None = None,
        ignore: list[str] | None = None,
        strict: bool = True,
        only_adapter: str | None = None,
        inside: str | None = None,
        weights: Literal["ema", "raw"] = "ema",
        config: Path | None = None,
        inflate: bool = False,
        leave_out: list[str] | None = None,
        given: dict[str, int] | None = None,
    ) -> None:
        if only_adapter is not None and (into or prefix or inside or inflate):
            raise ValueError("init: an adapter's file says where it belongs; leave out into, prefix, inside, inflate.")
        unread = [name for name, value in (("leave_out", leave_out), ("given", given)) if value]
        clash = {"only_adapter": only_adapter, "prefix": prefix, "inside": inside, "strict: false": not strict}
        if inflate and leave_out:
            clash["inflate"] = inflate
        if unread and (why := [name for name, value in clash.items() if value]):
            raise ValueError(
                f"init: {' and '.join(unread)} beside {', '.join(why)}: not read together. Leave one of them out."
            )
        self.file, self.into, self.prefix, self.ignore = Path(file), into, prefix, tuple(ignore or ())
        self.strict, self.only_adapter, self.inside, self.inflate = strict, only_adapter, inside, inflate
        self.weights: Literal["ema", "raw"] = weights
        self.config = None if config is None else Path(config)
        self.leave_out, self.given = tuple(leave_out or ()), dict(given or {})

    def load(self, engine: nn.Module) -> Filled:
        """Load it.

        Raises:
            ValueError: no such file, module or mixin, or the weights do not fit; nothing was changed then.
            OSError: reading failed; it says so if the module is half filled.
        """
        if self.only_adapter is not None:
            return self._load_adapter(engine, self.only_adapter)
        is_published = self._is_published()
        if is_published and not self.inflate:
            came = load_published(
                engine, self.file, self.into, weights=self.weights, ignore=self.ignore, leave_out=self.leave_out,
                given=self.given,
            )  # fmt: skip
            return Filled(str(came), came.loaded)
        target, begin = self._target(engine), f"{self.into}." if self.into else ""
        tensors = self._translated(begin) if is_published else self._read(begin)
        where = f"init: {self.file} into {self.into or 'the engine'}"
        if self.ignore:
            check_met(self.ignore, {*target.state_dict(), *by_prefix(tensors, self.prefix, where)[0]}, where)
        report = load_into(
            target, tensors, strict=self.strict, ignore=self.ignore, prefix=self.prefix, inflate=self.inflate,
            where=where,
        )  # fmt: skip
        return Filled(f"{self.file.name}: {report}", tuple(begin + name for name in report.loaded))

    def _load_adapter(self, engine: nn.Module, name: str) -> Filled:
        mixins = attached(engine)
        if name not in mixins:
            known = ", ".join(mixins) or "none"
            raise ValueError(f"init: no mixin is called {name!r}.{did_you_mean(name, mixins)} Attached: {known}.")
        mixins[name].load(self.file)
        own = set(mixins[name].parameters())
        return Filled(f"{name} from {self.file.name}", tuple(n for n, p in engine.named_parameters() if p in own))

    def _target(self, engine: nn.Module) -> nn.Module:
        try:
            return engine.get_submodule(self.into)
        except AttributeError:
            hint = did_you_mean(self.into, [name for name, _ in engine.named_modules() if name])
            raise ValueError(f"init: the engine has no module {self.into!r}.{hint}") from None

    def _is_published(self) -> bool:
        """Whether the file is written by others and its names are not brought to ours by ``prefix``."""
        if self.prefix or self.inside:
            return False
        found = is_in_folders(self.file) if self.file.is_dir() else is_by_others(open_weights(self.file).header)
        if found and not self.strict:
            raise ValueError(
                f"init: {self.file} is not by our names, and strict: false is for files that are. Of a published file, "
                "ignore: leaves weights of the module alone, leave_out: names in the file."
            )
        return found

    def _translated(self, begin: str) -> dict[str, Tensor]:
        """Of a published file, what is below a name, by our names there."""
        tensors = read_parts(open_weights(self.file), begin, self.weights, self.given)
        return {name.removeprefix(begin): value for name, value in tensors.items()}

    def _read(self, begin: str) -> dict[str, Tensor]:
        """Of a run what is below a name, of a weight file all of it; both by our names."""
        if self.given:
            raise ValueError(f"init: {self.file} is by our names, and given: is of published files. Leave it out.")
        if not self.file.is_dir():
            return self._without(read_weights(self.file, self.inside))
        tensors, _ = read_run_weights(find_checkpoint(self.file), self.weights)
        return {n.removeprefix(begin): v for n, v in self._without(tensors).items() if n.startswith(begin)}

    def _without(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is not left out."""
        for start in self.leave_out:
            if not any(name.startswith(start) for name in tensors):
                raise ValueError(
                    f"init: leave_out {start!r} meets no name in {self.file}. They begin: {summary(tensors)}."
                )
        return {n: v for n, v in tensors.items() if not (self.leave_out and n.startswith(self.leave_out))}


@dataclass(frozen=True)
class Filled:
    """What one entry of ``init:`` did: a line for the report, and the names in the engine that it filled."""

    line: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Initialised:
    """What all entries of ``init:`` did.

    Attributes:
        lines: For the report.
        new: Names of the parameters that no entry filled and that their own module does not freeze, mixins' included;
            None where there is no entry.
    """

    lines: tuple[str, ...]
    new: tuple[str, ...] | None


def initialize(engine: nn.Module, sources: Sequence[InitEntry]) -> Initialised:
    """Load every source in order."""
    if not sources:
        return Initialised((), None)
    done = [source.load(engine) for source in sources]
    by_name = dict(engine.named_parameters(remove_duplicate=False))
    filled = {by_name[name] for one in done for name in one.names if name in by_name}
    new = (name for name, param in engine.named_parameters() if param.requires_grad and param not in filled)
    return Initialised(tuple(one.line for one in done), tuple(new))
