"""Weights of an image network into the network of videos that is made of it.

Such a network keeps the names of the image layers and adds others, which look along time. Three things differ:

- *Layers that images have no use for.* Each module says in ``beyond_images`` which of its children and parameters these
  are; they stay as they were built. The networks here begin them so that every frame is an image (DynamiCrafter's
  attention to a picture excepted).
- *Names.* VideoCrafter puts a layer over time between two others, whose number then differs.
- *Shapes.* A weight is brought to the other shape where the layer then says the same as before, and not otherwise:
  see :func:`reshaped`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.checkpoints.maps.lvdm import image_unet

MOVED = re.compile(r"(.*\.|)middle_block\.2\.transformer_blocks\.")  # an image network has a residual block there


def inflate(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of an image network by the module's names and, where they can be brought to them, in its shapes.

    Returns:
        The tensors, and what was done to each whose shape changed, in words.
    """
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tensors = _renamed(tensors, own)
    entrances = _entrances(module)
    changes: dict[str, str] = {}
    for name in tensors.keys() & own.keys():
        if tensors[name].shape != own[name].shape:
            layer = module.get_submodule(name.rpartition(".")[0])
            if (found := reshaped(tensors[name], layer, own[name].shape, name in entrances)) is not None:
                tensors[name], changes[name] = found
    return tensors, dict(sorted(changes.items()))


def reshaped(
    weight: Tensor, layer: nn.Module, shape: Sequence[int], is_entrance: bool = False
) -> tuple[Tensor, str] | None:
    """An image layer's weight in the shape of ``layer``'s, which then says of an image what that layer said.

    - A convolution over one position and a matrix are the same function.
    - More input channels, where the sample comes in: the new ones come last and begin at zero.
    - A kernel over frames, height and width that is centred and of stride 1 in time: the image's kernel is its
      middle slice, and the others are zero.

    Returns:
        The weight, and what was done; None where it cannot be done.
    """
    done = []
    if is_entrance and weight.ndim > 1 and weight.shape[1] < shape[1]:
        done.append(f"{weight.shape[1]} to {shape[1]} input channels, the new at zero")
        weight = torch.cat([weight, weight.new_zeros(len(weight), shape[1] - weight.shape[1], *weight.shape[2:])], 1)
    if isinstance(layer, nn.Conv3d) and weight.ndim == 4 and _is_centred(layer):
        size = layer.kernel_size[0]
        done.append(f"kernel in the middle of {size} frame{'s' if size > 1 else ''}")
        weight = F.pad(weight[:, :, None], (0, 0, 0, 0, size // 2, size // 2))
    ones = [weight.shape[2:].numel(), torch.Size(shape[2:]).numel()]
    if min(weight.ndim, len(shape)) > 1 and weight.ndim != len(shape) and ones == [1, 1]:
        done.append("matrix and convolution over one position")
        weight = weight.reshape(*weight.shape[:2], *shape[2:])
    return (weight, "; ".join(done)) if done and weight.shape == torch.Size(shape) else None


def beyond_images(module: nn.Module) -> list[str]:
    """Names of the modules and parameters below ``module`` that an image network does not have."""
    return [
        f"{name}.{child}" if name else child
        for name, owner in module.named_modules()
        for child in getattr(owner, "beyond_images", ())
        if getattr(owner, child, None) is not None
    ]


def new_names(module: nn.Module, missing: Collection[str], present: Collection[str]) -> dict[str, None]:
    """Which of the missing names belong to layers that images have no use for, in their order.

    A layer that the file has a part of is not new: the file is damaged, or another network's.
    """
    roots = [root for root in beyond_images(module) if not any(is_below(name, root) for name in present)]
    return dict.fromkeys(name for name in missing if any(is_below(name, root) for root in roots))


def is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def globs(names: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """Few words for many names: subtrees without any of the others, ``*.time_stack.*``, and how many names each has.

    A layer that is known by its number is said by its place, in any row: ``input_blocks.*.2.*``.
    """
    taken = {prefix for name in others for prefix in _prefixes(name)}
    counts: dict[str, int] = {}
    for name in names:
        root = next((prefix for prefix in _prefixes(name) if prefix not in taken), name)
        *path, last = root.split(".")
        if last.isdecimal():
            begin = ".".join("*" if step.isdecimal() else step for step in path)
            word = f"{begin}.{last}" if begin else last
        else:
            word = f"*.{last}" if path else last
        word += "" if root == name else ".*"
        counts[word] = counts.get(word, 0) + 1
    return counts


def _renamed(tensors: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    out = dict(tensors)
    stems = {found[1] for name in own if (found := MOVED.match(name))}
    for stem in stems - {found[1] for name in tensors if (found := MOVED.match(name))}:
        below = {name.removeprefix(stem): out.pop(name) for name in tensors if name.startswith(stem)}
        out |= {stem + name: value for name, value in image_unet()(below).items()}
    return out


def _entrances(module: nn.Module) -> set[str]:
    found = [(name, getattr(owner, "entrance", None)) for name, owner in module.named_modules()]
    return {f"{name}.{layer}.weight".lstrip(".") for name, layer in found if layer}


def _is_centred(layer: nn.Conv3d) -> bool:
    size, padding, stride = layer.kernel_size[0], layer.padding, layer.stride[0]
    return size % 2 == 1 and stride == 1 and not isinstance(padding, str) and padding[0] == size // 2


def _prefixes(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[:i]) for i in range(1, len(steps) + 1)]
