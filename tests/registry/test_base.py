import functools
import subprocess
import sys
import textwrap
import types
from abc import abstractmethod

import pytest
import torch
from torch import nn

from vdiff import register
from vdiff.registry import Registered, RegistryError, RegistryMeta, build, contract, entries, isolated, kinds, lookup


@pytest.fixture(autouse=True)
def _forget():
    with isolated():
        yield


@pytest.fixture
def Gadget():
    class Gadget(Registered, kind="gadget"):
        @abstractmethod
        def turn(self): ...

    return Gadget


def turn(self):
    """A body for concrete gadgets made on the spot."""


def run_file(path, code, module="lab", **scope):
    """Execute ``code`` as the file ``path`` of ``module``."""
    path.write_text(textwrap.dedent(code))
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": module, "Registered": Registered, **scope})


def run_cell(cell, code, scope):
    """Execute ``code`` as a notebook does: in ``__main__``, under a file name that no file has."""
    scope["__name__"] = "__main__"
    exec(compile(textwrap.dedent(code), cell, "exec"), scope)


def python(folder, *args):
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Names ---------------------------------------------------------------------------------------------


def test_a_class_is_known_from_the_moment_it_is_defined(Gadget):
    class EulerAncestralGadget(Gadget):
        turn = turn

    assert lookup("gadget", "euler_ancestral").target is EulerAncestralGadget
    assert EulerAncestralGadget.registered_name == "euler_ancestral"


@pytest.mark.parametrize(
    "class_name, name",
    [
        ("EDMGadget", "edm"),
        ("ZeroSNRGadget", "zero_snr"),
        ("X0Gadget", "x0"),
        ("LogNormalGadget", "log_normal"),
        ("Gadget", "gadget"),  # nothing would be left of it
        ("Gadgetry", "gadgetry"),
    ],
)
def test_the_name_is_the_class_name_without_its_kind(Gadget, class_name, name):
    types.new_class(class_name, (Gadget,), {}, lambda body: body.update(turn=turn, __qualname__=class_name))
    assert list(entries("gadget")) == [name]


def test_a_class_may_ask_for_a_name_and_aliases(Gadget):
    class Mine(Gadget, name="euler_a", aliases=("k_euler_a", "sgm.modules.EulerA")):
        turn = turn

    assert all(lookup("gadget", n).target is Mine for n in ("euler_a", "k_euler_a", "sgm.modules.EulerA"))
    assert list(entries("gadget")) == ["euler_a"]  # aliases are not listed


def test_a_missing_comma_in_aliases_is_an_error_and_not_seven_aliases(Gadget):
    with pytest.raises(TypeError, match="aliases are a tuple of names, got the text 'k_euler'"):

        class Mine(Gadget, aliases=("k_euler")):
            turn = turn


def test_a_class_attribute_called_kind_is_refused(Gadget):
    with pytest.raises(TypeError, match=r"class Mine\(..., kind='...'\)"):

        class Mine(Gadget):
            kind = "residual"
            turn = turn


def test_abstract_classes_are_not_entries(Gadget):
    class HalfGadget(Gadget):
        pass

    class FamilyGadget(Gadget, abstract=True):
        turn = turn

    class MemberGadget(FamilyGadget):
        turn = turn

    assert list(entries("gadget")) == ["member"]
    assert contract("gadget") is Gadget
    assert HalfGadget.registered_name is FamilyGadget.registered_name is None


def test_a_contract_without_abstract_methods_is_not_an_entry():
    class Gizmo(Registered, kind="gizmo"):
        pass

    assert entries("gizmo") == {} and "gizmo" in kinds()


def test_an_unknown_name_lists_the_known_and_the_nearest(Gadget):
    class HeunGadget(Gadget):
        turn = turn

    with pytest.raises(RegistryError, match=r"no gadget is called 'hein'\. Did you mean 'heun'\? Known: heun\."):
        lookup("gadget", "hein")
    with pytest.raises(RegistryError, match=r"no kind is called 'gadgett'\. Did you mean 'gadget'\? Kinds: .*sampler"):
        lookup("gadgett", "heun")


def test_known_kinds_import_their_room_on_the_first_lookup(tmp_path):
    code = """
        import sys, vdiff
        assert "vdiff.process" not in sys.modules and "torch" not in sys.modules
        print(vdiff.registry.lookup("schedule", "edm").target.__name__)
    """
    assert python(tmp_path, "-c", textwrap.dedent(code))[0] == "EDMSchedule\n"


# Taken names ---------------------------------------------------------------------------------------

ONE = """
class Mine(Gadget, name="mine"):
    turn = print
"""


def test_the_same_name_in_two_files_is_an_error_that_names_both(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE, "lab.one", Gadget=Gadget)
    with pytest.raises(RegistryError) as error:
        run_file(tmp_path / "two.py", ONE, "lab.two", Gadget=Gadget)
    for part in ("gadget/mine is taken", "lab.one.Mine", "one.py", "lab.two.Mine", "two.py", "name='...'"):
        assert part in str(error.value)
    assert lookup("gadget", "mine").target.__module__ == "lab.one"


def test_two_classes_of_one_file_cannot_share_a_name(Gadget, tmp_path):
    with pytest.raises(RegistryError, match="gadget/mine is taken"):
        run_file(tmp_path / "one.py", ONE + ONE.replace("class Mine", "class Other"), Gadget=Gadget)


def test_an_alias_is_taken_like_a_name_and_nothing_is_added_by_halves(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    with pytest.raises(RegistryError, match="gadget/mine is taken"):

        class Other(Gadget, aliases=("fresh", "mine")):
            turn = turn

    assert list(entries("gadget")) == ["mine"]
    with pytest.raises(RegistryError):
        lookup("gadget", "fresh")


def test_two_kinds_may_use_the_same_name(Gadget):
    class Gizmo(Registered, kind="gizmo"):
        pass

    class OneGadget(Gadget, name="one"):
        turn = turn

    class OneGizmo(Gizmo, name="one"):
        pass

    assert lookup("gadget", "one").target is OneGadget and lookup("gizmo", "one").target is OneGizmo


def test_a_second_contract_for_a_kind_is_an_error_that_names_both(Gadget, tmp_path):
    with pytest.raises(RegistryError, match=r"kind/gadget is taken: .*test_base.*two\.py"):
        run_file(tmp_path / "two.py", "class Gadget(Registered, kind='gadget'): pass")
    assert contract("gadget") is Gadget


def test_running_a_file_again_replaces_its_classes(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    first = lookup("gadget", "mine").target
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    assert lookup("gadget", "mine").target is not first


def test_an_alias_that_the_new_version_gave_up_is_gone(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE.replace('"mine"', '"mine", aliases=("old",)'), Gadget=Gadget)
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    with pytest.raises(RegistryError, match="no gadget is called 'old'"):
        lookup("gadget", "old")


def test_a_notebook_cell_run_twice_replaces(Gadget):
    scope = {"Gadget": Gadget}
    run_cell("/tmp/ipykernel_7/111.py", ONE, scope)
    run_cell("/tmp/ipykernel_7/222.py", ONE, scope)  # an edited cell gets another name
    assert lookup("gadget", "mine").target is scope["Mine"]


def test_another_class_in_a_notebook_does_not_replace(Gadget):
    scope = {"Gadget": Gadget}
    run_cell("/tmp/ipykernel_7/111.py", ONE, scope)
    with pytest.raises(RegistryError, match="gadget/mine is taken"):
        run_cell("/tmp/ipykernel_7/222.py", ONE.replace("class Mine", "class Other"), scope)


def test_a_notebook_does_not_replace_what_a_file_holds(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    with pytest.raises(RegistryError, match="gadget/mine is taken"):
        run_cell("/tmp/ipykernel_7/111.py", ONE, {"Gadget": Gadget})


def test_a_module_may_run_as_main_and_be_imported(tmp_path):
    package = tmp_path / "lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gadgets.py").write_text(
        textwrap.dedent("""
            from vdiff.registry import Registered, lookup

            class Gadget(Registered, kind="gadget"):
                pass

            class Mine(Gadget):
                pass

            if __name__ == "__main__":
                import lab.gadgets
                print(lookup("gadget", "mine").target.__module__)
        """)
    )
    assert python(tmp_path, "-m", "lab.gadgets")[0] == "lab.gadgets\n"


# Classes made at run time --------------------------------------------------------------------------


@pytest.fixture
def Tower():
    class Tower(Registered, nn.Module, kind="tower"):
        @abstractmethod
        def forward(self, x): ...

    return Tower


@pytest.fixture
def MLP(Tower):
    class MLP(Tower, name="mlp"):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

        def forward(self, x):
            return self.layer(x)

    return MLP


def test_module_contracts_are_modules_and_abstract(Tower, MLP):
    assert isinstance(build({"type": "mlp", "width": 3}, "tower"), nn.Module)
    with pytest.raises(TypeError, match="abstract"):
        Tower()


def test_parametrize_makes_a_subclass_that_is_not_an_entry(MLP):
    class Halve(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = MLP()
    model.extra = nn.Parameter(torch.ones(2))
    nn.utils.parametrize.register_parametrization(model, "extra", Halve())
    assert type(model) is not MLP and isinstance(model, MLP)
    assert lookup("tower", "mlp").target is MLP and list(entries("tower")) == ["mlp"]
    assert type(model).registered_name == "mlp"


def test_fully_shard_makes_a_subclass_that_is_not_an_entry(MLP):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(MLP(), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
    assert type(model).__name__ == "FSDPMLP" and isinstance(type(model), RegistryMeta)
    assert lookup("tower", "mlp").target is MLP and list(entries("tower")) == ["mlp"]


# Factories and foreign classes ---------------------------------------------------------------------


def test_foreign_classes_and_factories_register_from_outside():
    register("gizmo", "linear", aliases=("dense",))(nn.Linear)
    register("gizmo", "wide")(functools.partial(nn.Linear, 8))

    @register("gizmo", "twice")
    def twice(width: int, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width, bias), nn.Linear(width, width, bias))

    assert build({"type": "dense", "in_features": 2, "out_features": 3}, "gizmo").weight.shape == (3, 2)
    assert build({"type": "wide", "out_features": 3}, "gizmo").weight.shape == (3, 8)
    assert len(build({"type": "twice", "width": 2}, "gizmo")) == 2
    assert list(entries("gizmo")) == ["linear", "twice", "wide"]


def test_a_taken_name_is_an_error_for_nameless_factories_too(tmp_path):
    register("gizmo", "wide")(functools.partial(nn.Linear, 8))
    with pytest.raises(RegistryError, match="gizmo/wide is taken"):
        run_file(tmp_path / "two.py", "register('gizmo', 'wide')(lambda: 3)", register=register)


def test_one_class_may_have_two_names():
    register("gizmo", "a")(nn.Linear)
    register("gizmo", "b")(nn.Linear)
    assert list(entries("gizmo")) == ["a", "b"]


# Plugins -------------------------------------------------------------------------------------------


def make_plugin(folder, name, code):
    """An installed distribution, as far as importlib.metadata can tell."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vdiff.plugins]\n{name} = {name}\n")


def test_plugins_bring_entries_and_kinds_and_a_broken_one_only_warns(tmp_path):
    make_plugin(
        tmp_path,
        "good_lab",
        """
        from vdiff.process import FlowSchedule
        from vdiff.registry import Registered

        class LabSchedule(FlowSchedule):
            pass

        class Thing(Registered, kind="thing"):
            pass

        class BlueThing(Thing):
            pass
        """,
    )
    make_plugin(tmp_path, "broken_lab", "raise ImportError('no such wheel')")
    code = """
        import sys
        from vdiff.registry import build, entries, isolated, kinds, lookup
        assert "good_lab" not in sys.modules
        with isolated():  # what plugins bring outlives the isolation in which they happened to load
            lookup("thing", "blue")
        print(type(build("lab", "schedule")).__name__, list(entries("thing")), "thing" in kinds())
    """
    out, warned = python(tmp_path, "-W", "always", "-c", textwrap.dedent(code))
    assert out == "LabSchedule ['blue'] True\n"
    assert "plugin 'broken_lab'" in warned and "no such wheel" in warned
    assert warned.count("plugin 'broken_lab'") == 1


# Isolation -----------------------------------------------------------------------------------------


def test_what_is_registered_in_isolation_is_forgotten_outside():
    before = kinds()
    with isolated():

        class Gizmo(Registered, kind="gizmo"):
            pass

        class BlueGizmo(Gizmo):
            pass

        register("schedule", "odd")(lambda: None)
        assert "gizmo" in kinds() and "odd" in entries("schedule")
    assert kinds() == before and contract("gizmo") is None and "odd" not in entries("schedule")
    with pytest.raises(RegistryError, match="no kind is called 'gizmo'"):
        entries("gizmo")


def test_a_replaced_entry_comes_back_after_isolation(Gadget, tmp_path):
    run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
    first = lookup("gadget", "mine").target
    with pytest.raises(ZeroDivisionError), isolated():
        run_file(tmp_path / "one.py", ONE, Gadget=Gadget)
        raise ZeroDivisionError
    assert lookup("gadget", "mine").target is first


def test_rooms_imported_in_isolation_stay_known(tmp_path):
    code = """
        from vdiff.registry import contract, entries, isolated
        with isolated():
            entries("schedule")
        print("edm" in entries("schedule"), contract("discretizer").__name__)
    """
    assert python(tmp_path, "-c", textwrap.dedent(code))[0] == "True Discretizer\n"
