"""The port: how things attach to modules that they do not own, and come off again."""

from vdiff.hooks.attachment import bare_copy, insert, remove
from vdiff.hooks.matching import On, match, role_sites
from vdiff.hooks.port import PORT, Part, Port, accepts, attached, bringer, describe, is_port_key, parts, ports, within
from vdiff.hooks.recompute import checkpoint
from vdiff.hooks.routing import routed
from vdiff.hooks.rows import check_partners, expand_gate, expand_partners
from vdiff.hooks.stand_in import Same, move_stand_ins, own, stand_down, stand_in
from vdiff.hooks.witness import refuse_in_backward

__all__ = [
    "PORT",
    "On",
    "Part",
    "Port",
    "Same",
    "accepts",
    "attached",
    "bare_copy",
    "bringer",
    "check_partners",
    "checkpoint",
    "describe",
    "expand_gate",
    "expand_partners",
    "insert",
    "is_port_key",
    "match",
    "parts",
    "move_stand_ins",
    "own",
    "ports",
    "refuse_in_backward",
    "remove",
    "role_sites",
    "routed",
    "stand_down",
    "stand_in",
    "within",
]
