"""Names of a host's modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from vdiff.hooks import is_port_key


def module_names(host: nn.Module) -> list[str]:
    """Modules of a host that an adapter may sit on."""
    return [name for name, module in host.named_modules() if not is_port_key(name) and "weight" in module._parameters]


def num_res_blocks(names: Iterable[str]) -> int:
    """How many residual blocks a level of latent diffusion's UNet has; 2 where the names do not tell."""
    rows = [int(found[1]) for name in names if (found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", name))]
    return min(rows) - 1 if rows else 2
