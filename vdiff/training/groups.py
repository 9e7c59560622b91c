"""What is trained: parameters chosen by slot, glob, role or mixin, each choice with its own numbers.

The first entry that matches a parameter has it; what no entry matches is frozen, and modules with
frozen parameters only are in eval mode, so that their statistics stand still too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from vdiff.conditioners import Conditioner
from vdiff.hooks import PORT
from vdiff.hooks import match as match_modules
from vdiff.registry import did_you_mean
from vdiff.training.optimizers import Optimizer, ParamGroup

NEW = "new"


class TrainGroup:
    """One entry of ``train:``.

    Args:
        on: A slot (``denoiser``), a glob over module or parameter names (``*.attn*``), a role
            (``role:self_attention``), a mixin (``mixins.lora``), ``new`` for what no entry of ``init:`` fills and no
            module freezes by itself, or a list of these.
        lr, weight_decay: Of these parameters; by default the optimizer's.
        decay_vectors: Whether weight decay also pulls on scales and biases (parameters with one
            dimension or none).
    """

    def __init__(
        self,
        on: str | list[str] = "*",
        lr: float | None = None,
        weight_decay: float | None = None,
        decay_vectors: bool = False,
    ) -> None:
        self.on = [on] if isinstance(on, str) else list(on)
        if not self.on:
            raise ValueError("train: `on` is an empty list; name a slot, a glob, a role or a mixin.")
        self.lr, self.weight_decay, self.decay_vectors = lr, weight_decay, decay_vectors


@dataclass(frozen=True)
class GroupRow:
    """One line of the start-up report."""

    name: str
    num_tensors: int
    num_parameters: int
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Selection:
    """Who trains.

    Attributes:
        groups: For the optimizer.
        trained: Parameters by name.
        rows: By entry of ``train:``, for the report.
        new: What the word ``new`` meant, where it was used: a run that goes on asks no file again.
        modes: Every module of the engine, parents first, and whether it is in training mode.
    """

    groups: list[ParamGroup]
    trained: dict[str, nn.Parameter]
    rows: list[GroupRow]
    modes: list[tuple[nn.Module, bool]]
    new: tuple[str, ...] | None = None

    @property
    def names(self) -> dict[Tensor, str]:
        return {param: name for name, param in self.trained.items()}

    def set_modes(self) -> None:
        """Training mode for what trains, eval for what is frozen; cheap where nothing changed."""
        for module, is_training in self.modes:
            if module.training is not is_training:
                module.train(is_training)


def select(
    engine: nn.Module,
    entries: Sequence[TrainGroup] | None,
    optimizer: Optimizer,
    new: Collection[str] | None = None,
) -> Selection:
    """Choose what is trained and freeze the rest.

    Args:
        entries: None trains every parameter that asks for a gradient.
        new: Names that ``new`` means, see :class:`vdiff.training.init.Initialised`.

    Raises:
        ValueError: an entry matches nothing, or nothing is trained.
    """
    params = dict(engine.named_parameters())
    if entries is None:
        entries = [TrainGroup("*")]
        matched = [{name for name, param in params.items() if param.requires_grad}]
    else:
        matched = [set().union(*(match(engine, pattern, new) for pattern in entry.on)) for entry in entries]
    groups: list[ParamGroup] = []
    rows: list[GroupRow] = []
    trained: dict[str, nn.Parameter] = {}
    for entry, names in zip(entries, matched, strict=True):
        chosen = {name: param for name, param in params.items() if name in names and name not in trained}
        trained |= chosen
        groups += _groups(list(chosen.values()), entry, optimizer)
        lr = optimizer.lr if entry.lr is None else entry.lr
        decay = optimizer.weight_decay if entry.weight_decay is None else entry.weight_decay
        size = sum(param.numel() for param in chosen.values())
        rows.append(GroupRow(", ".join(entry.on), len(chosen), size, lr, decay))
    if not trained:
        raise ValueError(
            "train: no parameter is trained; every one is frozen by its own module. Name some: train: [{on: ...}]."
        )
    for name, param in params.items():
        param.requires_grad_(name in trained)
    used = tuple(new) if new is not None and any(NEW in entry.on for entry in entries) else None
    return Selection(groups, {n: p for n, p in params.items() if n in trained}, rows, list(_modes(engine)), used)


def check_words(engine: nn.Module, entries: Sequence[TrainGroup] | None) -> None:
    """That every word of ``train:`` means something, before files are read that take minutes; but for ``new``.

    Raises:
        ValueError: one does not.
    """
    for entry in entries or ():
        for pattern in entry.on:
            if pattern != NEW:
                match(engine, pattern)


def match(engine: nn.Module, pattern: str, new: Collection[str] | None = None) -> set[str]:
    """Names of the parameters that one word of ``on:`` means.

    Raises:
        ValueError: none; it lists what there is.
    """
    names = [name for name, _ in engine.named_parameters()]
    if pattern == NEW:
        if not new:
            why = "this run has no `init:`, so that all is new" if new is None else "the entries of `init:` fill it all"
            raise ValueError(f"train: 'new' means what no entry of `init:` fills, and {why}. Leave `train:` out.")
        found = set(new).intersection(names)
    elif pattern.startswith(("role:", "type:")):
        sites = match_modules(engine, pattern, who="train")
        found = {name for name in names if any(name.startswith(f"{site}.") for site in sites)}
    elif pattern == "mixins" or pattern.startswith("mixins."):
        mixin = pattern.partition(".")[2]
        found = {name for name in names if (owner := mixin_of(name)) is not None and mixin in ("", owner)}
    else:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not found:
        modules = [name for name, module in engine.named_modules() if name and any(True for _ in module.parameters())]
        mixins = dict.fromkeys(f"mixins.{owner}" for name in names if (owner := mixin_of(name)))
        hint = did_you_mean(pattern, [*mixins, *modules, *names])
        raise ValueError(
            f"train: {pattern!r} matches no parameter.{hint} There are: {', '.join([*mixins, *modules][:8])}, ..."
        )
    return found


def mixin_of(name: str) -> str | None:
    """The mixin that a parameter belongs to, by its name in the engine; None if to the host itself."""
    steps = name.split(".")
    return steps[steps.index(PORT) + 1] if PORT in steps[:-1] else None


def _groups(params: list[nn.Parameter], entry: TrainGroup, optimizer: Optimizer) -> list[ParamGroup]:
    own = {key: value for key in ("lr", "weight_decay") if (value := getattr(entry, key)) is not None}
    if entry.decay_vectors or own.get("weight_decay", optimizer.weight_decay) == 0:
        return [{"params": params, **own}] if params else []
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim <= 1]
    groups = [{"params": matrices, **own}, {"params": vectors, **own, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _modes(module: nn.Module, parent: bool = True) -> list[tuple[nn.Module, bool]]:
    """A module without parameters (dropout) goes with its parent; so does a conditioner, whose training mode is
    what drops conditions, for guidance needs that while its embedders are frozen."""
    params = list(module.parameters())
    mode = any(p.requires_grad for p in params) if params else parent
    modes = [(module, parent if isinstance(module, Conditioner) else mode)]
    for child in module.children():
        modes += _modes(child, mode)
    return modes


def frozen_by_slot(engine: nn.Module) -> list[tuple[str, int, int]]:
    """(slot, trained parameters, frozen parameters) for the start-up report."""
    rows = []
    for slot, child in engine.named_children():
        sizes = [(p.numel(), p.requires_grad) for p in child.parameters()]
        rows.append((slot, sum(n for n, is_on in sizes if is_on), sum(n for n, is_on in sizes if not is_on)))
    return rows
