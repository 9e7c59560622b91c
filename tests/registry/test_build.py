"""Classes here are written without postponed annotations where they refer to names of a test."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest
from torch import Tensor, nn, tensor

from vdiff import build, load_config, register
from vdiff.registry import ConfigError, Plan, Registered, check, entries, isolated, kind_of, kinds, signature

if TYPE_CHECKING:
    from somewhere import Something


@pytest.fixture(autouse=True)
def _forget():
    with isolated():
        yield


@pytest.fixture(autouse=True)
def house(_forget):
    """A small library: a house of rooms, four floors deep."""
    register("lamp", "led")(Led)
    register("lamp", "oil", aliases=("old.lamps.Oil",))(Oil)
    register("desk", "plain")(PlainDesk)
    register("wing", "east")(EastWing)
    register("house", "small")(SmallHouse)


class Lamp(Registered, kind="lamp"):
    pass


class Led(Lamp, abstract=True):
    def __init__(self, watts: int = 5, warmth: float = 0.5, mode: Literal["on", "off", 3] = "on") -> None:
        if watts < 0:
            raise ValueError(f"watts must not be negative, got {watts}.")
        self.watts, self.warmth, self.mode = watts, warmth, mode


class Oil(Lamp, abstract=True):
    def __init__(self, oil: str, wick: tuple[float, float] = (1.0, 2.0)) -> None:
        self.oil, self.wick = oil, wick


class Desk(Registered, kind="desk"):
    pass


@dataclasses.dataclass
class Chair:
    legs: int
    colour: str = "red"


class PlainDesk(Desk, abstract=True):
    def __init__(
        self,
        lamp: Lamp,
        spare: Lamp | None = None,
        chairs: list[Chair] | None = None,
        word: "str | Lamp" = "none",
        level: "float | Lamp" = 0.0,
        notes: Any = None,
        size: int | float | str = 1,
        call: Callable[[], int] | None = None,
    ) -> None:
        self.lamp, self.spare, self.chairs, self.word = lamp, spare, chairs, word
        self.level, self.notes, self.size, self.call = level, notes, size, call


class Wing(Registered, kind="wing"):
    pass


class EastWing(Wing, abstract=True):
    def __init__(self, desk: Desk, lamps: Sequence[Lamp] = (), named: Mapping[str, Lamp] | None = None) -> None:
        self.desk, self.lamps, self.named = desk, lamps, named


class House(Registered, kind="house"):
    pass


class SmallHouse(House, abstract=True):
    def __init__(self, wing: Wing, file: Path | None = None, files: list[Path] | None = None) -> None:
        self.wing, self.file, self.files = wing, file, files


def desk(**keys):
    return {"type": "plain", "lamp": "led", **keys}


def faults(node, kind="desk"):
    with pytest.raises(ConfigError) as error:
        build(node, kind)
    return str(error.value)


# What comes out ------------------------------------------------------------------------------------


def test_a_tree_is_built_inside_out():
    node = {"type": "small", "wing": {"type": "east", "desk": {"type": "plain", "lamp": {"type": "led", "watts": 7}}}}
    built = build(node, "house")
    assert type(built) is SmallHouse and built.wing.desk.lamp.watts == 7 and built.wing.desk.lamp.warmth == 0.5


def test_a_bare_name_stands_for_a_node_without_arguments():
    assert type(build("led", "lamp")) is Led and type(build(desk(), "desk").lamp) is Led


def test_an_alias_builds_the_same_and_saves_under_the_name():
    plan = check({"type": "old.lamps.Oil", "oil": "olive"}, "lamp")
    assert type(plan.make()) is Oil and plan.tree() == {"type": "oil", "oil": "olive"}


def test_the_kind_may_come_from_the_path(tmp_path):
    (tmp_path / "a.yaml").write_text("lamp: {type: led, watts: 3}")
    assert build(load_config(tmp_path / "a.yaml")["lamp"]).watts == 3
    assert build("led", path="a.b.lamp").watts == 5


def test_without_any_kind_the_error_says_what_to_do(tmp_path):
    (tmp_path / "a.yaml").write_text("lamp: {type: led}")
    for node in (load_config(tmp_path / "a.yaml"), {"type": "led"}, "led"):
        with pytest.raises(ConfigError, match="of which kind"):
            build(node)


def test_finished_objects_pass_through():
    lamp, call = Led(), lambda: 3
    assert build(lamp, "lamp") is lamp and build(lamp) is lamp
    built = build(desk(lamp=lamp, spare=lamp, word=lamp, level=lamp, notes=lamp, call=call, chairs=[Chair(3)]), "desk")
    assert built.lamp is built.spare is built.word is built.level is built.notes is lamp
    assert built.call is call and built.chairs == [Chair(3)]
    assert build({"type": "east", "desk": built, "lamps": [lamp, "led"]}, "wing").lamps[0] is lamp


def test_a_tensor_passes_for_a_sequence():
    @register("gizmo", "table")
    def table(betas: Sequence[float]) -> Any:
        return betas

    assert isinstance(build({"type": "table", "betas": tensor([0.1, 0.2])}, "gizmo"), Tensor)


def test_a_finished_object_of_another_kind_is_an_error():
    assert faults(desk(lamp=build(desk(), "desk"))).startswith("desk.lamp: expected a lamp, got <")
    assert "expected a lamp or nothing" in faults(desk(spare=build(desk(), "desk")))


def test_optional_components_take_null_and_names():
    built = build(desk(spare="led"), "desk")
    assert type(built.spare) is Led and build(desk(spare=None), "desk").spare is None


def test_a_union_with_str_takes_the_string_as_it_is():
    built = build(desk(word="led"), "desk")
    assert built.word == "led" and type(build(desk(word={"type": "led"}), "desk").word) is Led


def test_a_union_with_a_number_takes_numbers_names_and_nodes():
    assert build(desk(level=2), "desk").level == 2.0
    assert type(build(desk(level="led"), "desk").level) is Led
    assert build(desk(level={"type": "led", "watts": 1}), "desk").level.watts == 1


def test_unions_of_plain_types_convert_nothing_that_fits():
    for value in (1, 1.5, "1"):
        built = build(desk(size=value), "desk").size
        assert built == value and type(built) is type(value)


def test_lists_and_mappings_of_components():
    wing = build(
        {"type": "east", "desk": desk(), "lamps": ["led", {"type": "oil", "oil": "x"}], "named": {"a": "led"}}, "wing"
    )
    assert [type(lamp) for lamp in wing.lamps] == [Led, Oil] and type(wing.named["a"]) is Led


def test_plain_classes_are_built_from_mappings():
    assert build(desk(chairs=[{"legs": 3}, {"legs": 4, "colour": "blue"}]), "desk").chairs == [
        Chair(3),
        Chair(4, "blue"),
    ]


def test_a_plain_class_keeps_a_parameter_called_type():
    @dataclasses.dataclass
    class Label:
        type: str

    def labelled(label: Label) -> Any:
        return label

    register("gizmo", "labelled")(labelled)
    assert build({"type": "labelled", "label": {"type": "blue"}}, "gizmo") == Label("blue")
    assert check({"type": "labelled", "label": {"type": "blue"}}, "gizmo").tree()["label"] == {"type": "blue"}


def test_a_module_annotation_takes_the_kind_of_its_name(monkeypatch):
    from vdiff.registry import base

    monkeypatch.setitem(base.ROOMS, "tower", "vdiff.process")
    register("tower", "linear")(nn.Linear)

    def two(tower: nn.Module, mapped: dict[str, nn.Module], other: nn.Module | None = None) -> Any:
        return tower

    def maybe(tower: nn.Module | None = None) -> Any:
        return tower

    register("gizmo", "two")(two)
    register("gizmo", "maybe")(maybe)
    node = {"type": "linear", "in_features": 2, "out_features": 3}
    assert isinstance(build({"type": "two", "tower": node, "mapped": {}}, "gizmo"), nn.Linear)
    assert isinstance(build({"type": "maybe", "tower": node}, "gizmo"), nn.Linear)
    assert build({"type": "maybe", "tower": None}, "gizmo") is None


def test_untyped_parameters_get_plain_data_and_never_config_nodes(tmp_path):
    @register("gizmo", "any")
    def gizmo(notes, **rest):  # noqa: ANN001, ANN003
        return notes, rest

    (tmp_path / "a.yaml").write_text("gizmo: {type: any, notes: {a: [{b: 1}]}, more: {c: {d: 2}}}")
    notes, rest = build(load_config(tmp_path / "a.yaml")["gizmo"])
    assert type(notes) is dict and type(notes["a"][0]) is dict
    assert type(rest["more"]) is dict and type(rest["more"]["c"]) is dict


def test_tuples_arrive_as_tuples_and_integers_as_floats_where_asked():
    built = build({"type": "oil", "oil": "x", "wick": [1, 2]}, "lamp")
    assert built.wick == (1.0, 2.0) and type(built.wick) is tuple and type(built.wick[0]) is float


def test_everything_in_a_config_can_be_written_as_constructor_calls():
    built = build(desk(lamp={"type": "led", "watts": 3}, chairs=[{"legs": 2}], size=3), "desk")
    by_hand = PlainDesk(Led(watts=3), chairs=[Chair(2)], size=3)
    assert vars(built) | {"lamp": 0} == vars(by_hand) | {"lamp": 0} and vars(built.lamp) == vars(by_hand.lamp)


# Faults --------------------------------------------------------------------------------------------


def test_an_unknown_key_at_depth_four_has_path_and_nearest_spelling():
    lamp = {"type": "led", "wats": 3}
    node = {"type": "small", "wing": {"type": "east", "desk": {"type": "plain", "lamp": lamp}}}
    with pytest.raises(ConfigError) as error:
        build(node, "house", "engine")
    assert str(error.value) == "engine.wing.desk.lamp.wats: Led takes no 'wats'. Did you mean 'watts'?"


def test_an_unknown_key_like_no_other_lists_what_is_accepted():
    assert faults({"type": "led", "zzz": 3}, "lamp") == "lamp.zzz: Led takes no 'zzz'. It takes: watts, warmth, mode."


def test_an_unknown_name_lists_the_known_and_the_nearest():
    assert faults(desk(lamp="let")) == "desk.lamp: no lamp is called 'let'. Did you mean 'led'? Known: led, oil."


def test_a_missing_key_is_named():
    assert faults(desk(lamp="oil")) == "desk.lamp: Oil needs 'oil'."


def test_a_missing_type_lists_the_known():
    assert faults(desk(lamp={"watts": 3})) == "desk.lamp: a lamp needs a `type:`. Known: led, oil."


@pytest.mark.parametrize(
    "node, text",
    [
        ({"type": "led", "watts": True}, "lamp.watts: expected int, got True."),
        ({"type": "led", "watts": 3.0}, "lamp.watts: expected int, got 3.0."),
        ({"type": "led", "watts": "3"}, "lamp.watts: expected int, got '3'."),
        ({"type": "led", "watts": None}, "lamp.watts: expected int, got None."),
        ({"type": "led", "watts": [3]}, "lamp.watts: expected int, got [3]."),
        ({"type": "led", "warmth": "hot"}, "lamp.warmth: expected float, got 'hot'."),
        ({"type": "led", "warmth": False}, "lamp.warmth: expected float, got False."),
        ({"type": "led", "mode": "dim"}, "lamp.mode: expected one of 'on', 'off', 3, got 'dim'."),
        ({"type": "led", "mode": 3.0}, "lamp.mode: expected one of 'on', 'off', 3, got 3.0."),
        ({"type": "oil", "oil": 3}, "lamp.oil: expected str, got 3."),
        ({"type": "oil", "oil": Path("x")}, "lamp.oil: expected str, got PosixPath('x')."),
        ({"type": "oil", "oil": "x", "wick": [1.0]}, "lamp.wick: expected tuple[float, float], got [1.0]."),
        (
            {"type": "oil", "oil": "x", "wick": [1.0, 2.0, 3.0]},
            "lamp.wick: expected tuple[float, float], got [1.0, 2.0, 3.0].",
        ),
        ({"type": "oil", "oil": "x", "wick": "ab"}, "lamp.wick: expected tuple[float, float], got 'ab'."),
        ({"type": "oil", "oil": "x", "wick": [1.0, "b"]}, "lamp.wick.1: expected float, got 'b'."),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_came(node, text):
    assert faults(node, "lamp") == text


@pytest.mark.parametrize(
    "keys, text",
    [
        ({"lamp": 3}, "desk.lamp: expected a lamp, got 3."),
        ({"lamp": ["led"]}, "desk.lamp: expected a lamp, got ['led']."),
        ({"lamp": None}, "desk.lamp: expected a lamp, got None."),
        ({"spare": 3}, "desk.spare: expected a lamp or nothing, got 3."),
        ({"word": 3}, "desk.word: expected str or a lamp, got 3."),
        ({"level": True}, "desk.level: expected float or a lamp, got True."),
        ({"size": [1]}, "desk.size: expected int or float or str, got [1]."),
        ({"chairs": {"legs": 3}}, "desk.chairs: expected list[Chair] or nothing, got {'legs': 3}."),
        ({"chairs": [{"legs": 3}, {"legs": "x"}]}, "desk.chairs.1.legs: expected int, got 'x'."),
        ({"chairs": [{}]}, "desk.chairs.0: Chair needs 'legs'."),
        ({"chairs": ["red"]}, "desk.chairs.0: expected Chair, got 'red'."),
        ({"word": {"type": "led", "wats": 1}}, "desk.word.wats: Led takes no 'wats'. Did you mean 'watts'?"),
        ({"spare": {"type": "led", "watts": "x"}}, "desk.spare.watts: expected int, got 'x'."),
        ({"call": "os.system"}, "desk.call: expected collections.abc.Callable[[], int] or nothing, got 'os.system'."),
    ],
)
def test_a_wrong_component_says_what_was_expected_and_what_came(keys, text):
    assert faults(desk(**keys)) == text


def test_a_path_is_not_built_from_a_mapping_nor_from_a_number():
    for value in ({"a": 1}, 3):
        text = faults({"type": "small", "wing": {"type": "east", "desk": desk()}, "file": value}, "house")
        assert text == f"house.file: expected Path or nothing, got {value!r}."


def test_a_protocol_refuses_plain_data_in_words():
    class Shines(Protocol):
        def shine(self) -> None: ...

    def gizmo(lamp: Shines) -> Any:
        return lamp

    register("gizmo", "one")(gizmo)
    assert faults({"type": "one", "lamp": "led"}, "gizmo") == "gizmo.lamp: expected Shines, got 'led'."


def test_all_faults_are_reported_at_once_and_nothing_is_constructed():
    made = []

    @register("lamp", "counted")
    def counted(watts: int = 1) -> Any:
        made.append(watts)

    wing = {
        "type": "east",
        "desk": desk(lamp={"type": "led", "watts": "x", "wats": 3}, chairs=[{"leg": 3}]),
        "lamps": ["counted", "hein"],
    }
    lines = faults(wing, "wing").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "wing.desk.lamp.wats",
        "wing.desk.lamp.watts",
        "wing.desk.chairs.0.leg",
        "wing.desk.chairs.0",
        "wing.lamps.1",
    ]
    assert made == []


def test_faults_name_file_and_line_even_of_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "desk:\n  type: plain\n  lamp: let\n  spare:\n    type: led\n    watts: x\n"
        "  chairs:\n  - legs: 3\n  - {legs: y}\n"
    )
    with pytest.raises(ConfigError) as error:
        build(load_config("a.yaml")["desk"])
    assert [line.rpartition("desk")[0] for line in str(error.value).splitlines()] == [
        "a.yaml:3: ",
        "a.yaml:6: ",
        "a.yaml:9: ",
    ]


def test_a_refusing_constructor_is_an_error_with_its_path_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert faults(desk(lamp={"type": "led", "watts": -1})) == "desk.lamp: watts must not be negative, got -1."
    (tmp_path / "a.yaml").write_text("desk:\n  type: plain\n  lamp: {type: led,\n    watts: -1}\n")
    with pytest.raises(ConfigError, match=r"^a\.yaml:3: desk\.lamp: watts must not be negative") as error:
        build(load_config("a.yaml")["desk"])
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no weights"), ImportError("pip install 'vdiff[video]'"), TypeError("odd")]
)
def test_what_a_user_can_mend_is_a_config_error(error):
    def broken() -> None:
        raise error

    register("lamp", "broken")(broken)
    assert faults(desk(lamp="broken")) == f"desk.lamp: {error}"


def test_a_fault_of_the_code_stays_what_it_is_and_says_where():
    def broken() -> None:
        raise KeyError("bug")

    register("lamp", "broken")(broken)
    with pytest.raises(KeyError) as error:
        build(desk(lamp="broken"), "desk")
    assert error.value.__notes__ == ["while building desk.lamp"]


def test_a_fault_of_a_component_that_builds_inside_has_the_outer_path():
    def nested() -> Any:
        return build("let", "lamp")

    register("lamp", "nested")(nested)
    assert faults(desk(lamp="nested")).startswith("desk.lamp: lamp: no lamp is called 'let'.")


def test_a_long_value_is_cut_in_the_message():
    assert len(faults({"type": "led", "watts": ["x" * 50] * 1000}, "lamp")) < 200


# Dotted targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.eval", "numpy.load", "lab_of_evil.run", "lab_of_evil", "vdiff.cli.main"]
)
@pytest.mark.parametrize("key", ["type", "call", "notes", "word"])
def test_a_config_string_imports_nothing(target, key, tmp_path, monkeypatch):
    (tmp_path / "lab_of_evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\ndef run(): pass")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"type": target, "lamp": "led"} if key == "type" else desk(**{key: target})
    before = set(sys.modules)
    try:
        built = build(node, "desk")
    except ConfigError as error:
        assert key in ("type", "call") and target in str(error)
    else:
        assert key in ("notes", "word") and getattr(built, key) == target
    assert set(sys.modules) == before and not (tmp_path / "proof").exists()


def test_a_dotted_name_is_told_how_to_come_in():
    assert "A config imports nothing: register the class, and name its module under `imports:`" in faults(
        desk(lamp="my_lab.Lamp")
    )


@pytest.mark.parametrize("name", [None, 3, ["led"], {"type": "led"}, "", "__class__"])
def test_an_odd_type_is_an_unknown_name(name):
    assert "no lamp is called" in faults({"type": name}, "lamp")


# Paths ---------------------------------------------------------------------------------------------

BASE = """
house:
  type: small
  file: one.txt
  files: [two.txt, ../three.txt, /four.txt, ~/five.txt]
  wing: {type: east, desk: {type: plain, lamp: led}}
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a", "b", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a" / "base.yaml").write_text(BASE)
    return tmp_path


def test_a_path_is_relative_to_the_file_that_wrote_it(folders):
    house = build(load_config(folders / "a" / "base.yaml")["house"])
    a = folders / "a"
    assert house.file == a / "one.txt"
    assert house.files == [a / "two.txt", a / "../three.txt", Path("/four.txt"), folders / "home" / "five.txt"]


def test_after_a_merge_each_path_is_still_relative_to_its_own_file(folders):
    (folders / "b" / "over.yaml").write_text("base: ../a/base.yaml\nhouse: {files: [two.txt]}")
    house = build(load_config(folders / "b" / "over.yaml")["house"])
    assert house.file == folders / "a" / "one.txt" and house.files == [folders / "b" / "two.txt"]
    (folders / "b" / "other.yaml").write_text("house: {file: one.txt}")
    house = build(load_config(folders / "a" / "base.yaml", folders / "b" / "other.yaml")["house"])
    assert house.file == folders / "b" / "one.txt" and house.files[0] == folders / "a" / "two.txt"


def test_a_path_given_as_an_override_is_relative_to_the_current_folder(folders):
    overrides = ["house.file=one.txt", "house.files.0=two.txt"]
    house = build(load_config(folders / "a" / "base.yaml", overrides=overrides)["house"])
    assert house.file.absolute() == folders / "here" / "one.txt"
    assert (
        house.files[0].absolute() == folders / "here" / "two.txt" and house.files[1] == folders / "a" / "../three.txt"
    )


def test_a_saved_plan_means_the_same_files_from_anywhere(folders):
    from vdiff.registry import save_config

    config = load_config(folders / "a" / "base.yaml", overrides=["house.file=mine.txt"])
    plan = check(config["house"])
    save_config({"house": plan.tree()}, folders / "b" / "saved.yaml")
    again = check(load_config(folders / "b" / "saved.yaml")["house"])
    assert again.tree() == plan.tree() and again.make().file == folders / "here" / "mine.txt"


# Plans and signatures ------------------------------------------------------------------------------


def test_a_plan_saves_what_was_given_and_no_defaults():
    node = desk(lamp={"type": "led", "watts": 3}, chairs=[{"legs": 3}], word="x", size=2)
    assert check(node, "desk").tree() == node | {"lamp": {"type": "led", "watts": 3}}
    assert check("led", "lamp").tree() == {"type": "led"}
    assert isinstance(check("led", "lamp"), Plan)


def test_the_same_plan_makes_new_objects_each_time():
    plan = check(desk(), "desk")
    assert plan.make().lamp is not plan.make().lamp


def test_a_name_only_a_type_checker_sees_spoils_no_other_annotation():
    def gizmo(lamp: "Lamp", thing: "Something" = None, count: "int" = 3) -> Any:
        return lamp, thing

    register("gizmo", "one")(gizmo)
    assert signature(gizmo)["count"].annotation is int and signature(gizmo)["thing"].annotation == "Something"
    lamp, thing = build({"type": "one", "lamp": "led", "thing": {"a": 1}}, "gizmo")
    assert type(lamp) is Led and thing == {"a": 1}
    assert faults({"type": "one", "lamp": "led", "count": "x"}, "gizmo") == "gizmo.count: expected int, got 'x'."


def test_a_decorated_factory_is_read_where_it_was_written():
    scope = {"functools": functools}
    exec("def quiet(f):\n    @functools.wraps(f)\n    def g(*a, **k):\n        return f(*a, **k)\n    return g", scope)

    @scope["quiet"]
    def gizmo(lamp: "Lamp") -> Any:
        return lamp

    assert signature(gizmo)["lamp"].annotation is Lamp


def test_the_kind_of_an_annotation():
    assert kind_of(Lamp) == kind_of(Lamp | None) == kind_of(Led) == kind_of(str | Lamp) == "lamp"
    assert kind_of(int) is kind_of(list[Lamp]) is kind_of(None) is kind_of(nn.Module, "lamp") is None
    assert kind_of(nn.Module, "network") == kind_of(nn.Module | None, "network") == "network"


ROOMS_AT_HAND = ["schedule", "parameterization", "sigma_sampler", "discretizer"]


@pytest.mark.parametrize("kind", ROOMS_AT_HAND)
def test_every_annotation_of_every_entry_means_something_at_run_time(kind):
    for entry in entries(kind).values():
        for name, parameter in signature(entry.target).items():
            assert not isinstance(parameter.annotation, str), f"{entry.where}: {name}: {parameter.annotation}"
            assert parameter.annotation is not parameter.empty, f"{entry.where}: {name} has no annotation"


def test_kinds_are_known_without_importing_their_rooms():
    assert {"sampler", "engine", "mixin", "lamp"} <= set(kinds())
