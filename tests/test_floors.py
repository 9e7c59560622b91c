"""The plan of the house, read from its imports."""

import ast
from pathlib import Path

import pytest

import vdiff

ROOT = Path(vdiff.__file__).parent
FLOORS = [
    ["registry"],
    ["process"],
    ["attention", "hooks"],
    ["networks", "losses", "data", "checkpoints"],
    ["first_stages", "denoisers"],
    ["conditioners", "samplers", "mixins"],
    ["engine", "dialects"],
    ["pipelines", "parallel", "evaluation"],
    ["training"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ["torchvision", "sklearn", "xformers", "open_clip", "transformers", "lightning", "pytorch_lightning"]
HEAVY += ["matplotlib", "rich", "tensorboard", "torch.utils.tensorboard", "av"]
ADAPTERS = ["training/lightning.py"]  # subclass a foreign class; imported by nobody but their users
BUILDERS = ("registry/", "cli/", "training/run.py", "engine/", "mixins/files.py", "mixins/formats/")
BUILDERS += ("process/parameterizations.py",)

FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
every_file = pytest.mark.parametrize("name", NAMES)


def imports(tree, name):
    """Every module that is imported anywhere, as (line, dotted name, at module level)."""
    package = ["vdiff", *Path(name).parts[:-1]]
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for node in ast.walk(f)}
    inside |= {id(node) for block in ast.walk(tree) if is_for_type_checkers(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            found = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        yield from ((node.lineno, module, id(node) not in inside) for module in found)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def called(node):
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def is_under(module, package):
    return module == package or module.startswith(package + ".")


def faults(name, source):
    tree = ast.parse(source)
    room = Path(name).parts[0] if len(Path(name).parts) > 1 else None
    for line, module, at_top in imports(tree, name):
        parts = module.split(".")
        other = parts[1] if parts[0] == "vdiff" and len(parts) > 1 else None
        if room and other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]:
            yield f"{name}:{line}: {room} imports {module} from its own floor or above"
        if room not in (None, "parallel") and is_under(module, "torch.distributed"):
            yield f"{name}:{line}: only parallel/ imports torch.distributed"
        if room != "registry" and any(is_under(module, package) for package in ("omegaconf", "yaml")):
            yield f"{name}:{line}: only registry/ imports {module}"
        if at_top and name not in ADAPTERS and any(is_under(module, package) for package in HEAVY):
            yield f"{name}:{line}: {module} is imported where it is used, not at the top"
    if not name.startswith(BUILDERS):
        builders = {"build"} | {a.asname for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
                                if a.name == "build" and a.asname}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_build(node, builders):
                yield f"{name}:{node.lineno}: a constructor receives finished objects; build is called elsewhere"


def is_build(node, builders):
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr == "build" and ast.unparse(function.value) in ("vdiff", "registry", "vdiff.registry")
    return isinstance(function, ast.Name) and function.id in builders


@every_file
def test_the_plan_is_kept(name):
    assert list(faults(name, (ROOT / name).read_text())) == []


def test_every_room_is_on_the_plan():
    rooms = {Path(name).parts[0] for name in NAMES if len(Path(name).parts) > 1}
    assert rooms <= set(FLOOR) and {"registry", "process"} <= rooms


def test_only_the_front_door_stands_outside_the_rooms():
    assert [name for name in NAMES if len(Path(name).parts) == 1] in (["__init__.py"], ["__init__.py", "__main__.py"])


def test_there_is_no_utils():
    assert not [name for name in NAMES if Path(name).stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    "name, source, part",
    [
        ("process/x.py", "from vdiff.engine import DiffusionEngine", "from its own floor or above"),
        ("process/x.py", "def f():\n    import vdiff.networks", "from its own floor or above"),
        ("process/x.py", "from vdiff import engine", "from its own floor or above"),
        ("process/x.py", "from ..engine import x", "from its own floor or above"),
        ("process/x.py", "from .. import engine", "from its own floor or above"),
        ("process/sub/x.py", "from ...engine import x", "from its own floor or above"),
        ("losses/x.py", "import vdiff.networks.unet", "from its own floor or above"),
        ("process/x.py", "import importlib\nimportlib.import_module('vdiff.cli')", "from its own floor or above"),
        ("training/x.py", "import torch.distributed as dist", "only parallel/"),
        ("training/x.py", "def f():\n    from torch import distributed", "only parallel/"),
        ("training/x.py", "from torch.distributed.fsdp import fully_shard", "only parallel/"),
        ("engine/x.py", "def f():\n    import yaml", "only registry/"),
        ("engine/x.py", "from omegaconf import OmegaConf", "only registry/"),
        ("data/x.py", "import sklearn.svm", "where it is used"),
        ("data/x.py", "try:\n    import av\nexcept ImportError:\n    av = None", "where it is used"),
        ("training/x.py", "from torch.utils.tensorboard import SummaryWriter", "where it is used"),
        ("networks/x.py", "from vdiff.registry import build\nbuild({})", "build is called elsewhere"),
        ("networks/x.py", "from vdiff.registry import build as make\nmake({})", "build is called elsewhere"),
        (
            "networks/x.py",
            "import vdiff\nclass A:\n    def f(self):\n        vdiff.build({})",
            "build is called elsewhere",
        ),
        ("training/loop.py", "from vdiff import build\nbuild({})", "build is called elsewhere"),
    ],
)
def test_a_breach_is_seen(name, source, part):
    found = list(faults(name, source))
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize(
    "name, source",
    [
        ("engine/x.py", "from vdiff.process import NoiseLevel\nfrom vdiff.engine.y import z\nfrom .y import z"),
        ("parallel/x.py", "import torch.distributed as dist"),
        ("registry/x.py", "import yaml"),
        ("data/x.py", "def f():\n    import sklearn, rich"),
        ("data/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import av"),
        ("data/x.py", "import average, torchvisionary"),
        ("cli/x.py", "from vdiff.registry import build\nbuild({})"),
        ("networks/x.py", "self.build({})\nmodel.build()"),
    ],
)
def test_what_is_allowed_is_not_a_breach(name, source):
    assert list(faults(name, source)) == []
