import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiff.registry import Config, ConfigFileError, load_config, save_config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return Path(name)

    return write


def load(*args, **kwargs):
    return load_config(*args, **kwargs).to_dict()


def fault(*args, **kwargs):
    with pytest.raises(ConfigFileError) as error:
        load_config(*args, **kwargs)
    return str(error.value)


# Reading -------------------------------------------------------------------------------------------


def test_a_config_is_a_read_only_mapping_that_knows_its_path(write):
    config = load_config(write("a.yaml", "engine:\n  layers:\n  - {width: 3}\n"))
    node = config["engine"]["layers"][0]
    assert isinstance(node, Config) and node.path == "engine.layers.0" and node == {"width": 3}
    assert config.path == "" and len(config) == 1 and list(config) == ["engine"] and config.get("nothing") is None
    assert config.where("engine.layers.0.width") == "a.yaml:3: "
    assert config.where("engine.nothing") == "a.yaml:1: " and config.where("nothing") == ""
    with pytest.raises(TypeError):
        config["engine"] = 3


def test_a_copy_as_plain_data_does_not_change_the_config(write):
    config = load_config(write("a.yaml", "a: {b: [1]}"))
    config.to_dict()["a"]["b"].append(2)
    assert config["a"]["b"] == [1]


def test_on_stays_a_string_key(write):
    assert load(write("a.yaml", 'mixins: {lora: {on: "*.to_q", rank: 16}}')) == {
        "mixins": {"lora": {"on": "*.to_q", "rank": 16}}
    }


def test_an_empty_file_is_an_empty_config(write):
    assert load(write("a.yaml", "")) == load(write("b.yaml", "# later\n")) == load() == {}


@pytest.mark.parametrize("text", ["- a", "word", "3"])
def test_a_config_that_is_no_mapping_is_an_error(write, text):
    assert fault(write("a.yaml", text)).startswith("a.yaml: a config is a mapping, got")


def test_windows_files_and_byte_order_marks_are_fine(write):
    write("a.yaml", "")
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")
    assert load("a.yaml") == {"a": 1, "b": {"c": "x"}}


@pytest.mark.parametrize("content", [b"a: \xff\xfe", b"a: b\x00c", "a: 1".encode("utf-16")])
def test_a_file_that_is_no_text_is_an_error(write, content):
    write("a.yaml", "")
    Path("a.yaml").write_bytes(content)
    assert fault("a.yaml").startswith("a.yaml")


def test_a_file_that_cannot_be_read_is_an_error(write):
    write("sub/a.yaml", 'base: "nul\\0byte.yaml"')
    assert fault("nowhere.yaml").startswith("nowhere.yaml: cannot read this config")
    assert fault("sub").startswith("sub: cannot read this config")
    assert "cannot read this config" in fault("sub/a.yaml")
    missing = fault(write("b.yaml", "a: 1\nbase: [sub/none.yaml]"))
    assert missing.startswith("b.yaml:2: base: sub/none.yaml: cannot read this config")
    os.symlink("loop.yaml", "loop.yaml")
    assert fault("loop.yaml").startswith("loop.yaml: cannot read this config")


def test_yaml_errors_name_file_and_line(write):
    assert fault(write("sub/a.yaml", "a:\n  b: 1\n  b: 2")) == "sub/a.yaml:3: a.b is given twice."


# Inheritance and merging ---------------------------------------------------------------------------


def test_a_base_is_relative_to_the_file_that_names_it(write):
    write("shared/deep/base.yaml", "a: 1\nb: {c: 1, d: 1}")
    write("shared/middle.yaml", "base: deep/base.yaml\nb: {c: 2}")
    assert load(write("runs/top.yaml", "base: ../shared/middle.yaml\ne: 3")) == {"a": 1, "b": {"c": 2, "d": 1}, "e": 3}


def test_bases_and_files_merge_in_order(write):
    write("one.yaml", "a: 1\nb: 1\nc: 1")
    write("two.yaml", "b: 2\nc: 2")
    top = write("top.yaml", "base: [one.yaml, two.yaml]\nc: 3")
    assert load(top) == {"a": 1, "b": 2, "c": 3}
    assert load("two.yaml", "one.yaml") == {"a": 1, "b": 1, "c": 1}
    assert load(top, "one.yaml", overrides=["a=4"]) == {"a": 4, "b": 1, "c": 1}


def test_a_base_that_includes_itself_is_an_error_with_the_circle(write):
    write("a.yaml", "base: sub/b.yaml")
    write("sub/b.yaml", "base: ../a.yaml")
    assert fault("a.yaml").endswith("`base:` goes in a circle: a.yaml -> sub/b.yaml -> a.yaml.")
    assert "goes in a circle: self.yaml -> self.yaml" in fault(write("self.yaml", "base: self.yaml"))


def test_two_files_may_share_a_base(write):
    write("root.yaml", "a: 1\nb: 1")
    write("left.yaml", "base: root.yaml\na: 2")
    write("right.yaml", "base: root.yaml\nc: 2")
    assert load(write("top.yaml", "base: [left.yaml, right.yaml]")) == {"a": 1, "b": 1, "c": 2}


@pytest.mark.parametrize("base", ["3", "{a: 1}", "[3]", "[[a]]"])
def test_a_base_that_is_no_file_name_is_an_error(write, base):
    assert fault(write("a.yaml", f"x: 1\nbase: {base}")).startswith("a.yaml:2: base: expected a list of files, got")


def test_no_base_is_no_base(write):
    assert load(write("a.yaml", "base:\na: {base: kept}")) == {"a": {"base": "kept"}}


def test_another_type_starts_the_node_anew(write):
    one = write("one.yaml", "sampler: {type: heun, churn: 3, discretizer: {type: karras, rho: 5}}")
    assert load(one, write("two.yaml", "sampler: {type: ddim, eta: 1.0}")) == {"sampler": {"type": "ddim", "eta": 1.0}}
    assert load(one, write("two.yaml", "sampler: {type: heun, eta: 1.0}"))["sampler"]["churn"] == 3
    merged = load(one, write("two.yaml", "sampler: {discretizer: {type: trailing}}"))["sampler"]
    assert merged == {"type": "heun", "churn": 3, "discretizer": {"type": "trailing"}}
    assert load(one, write("two.yaml", "sampler: ddim")) == {"sampler": "ddim"}


def test_a_section_without_a_type_takes_one_and_keeps_its_keys(write):
    one = write("one.yaml", "sampler: {num_steps: 5}")
    assert load(one, write("two.yaml", "sampler: {type: heun}")) == {"sampler": {"num_steps": 5, "type": "heun"}}


def test_a_bare_name_becomes_a_node_when_keys_are_added(write):
    one = write("one.yaml", "sampler: heun")
    assert load(one, write("two.yaml", "sampler: {num_steps: 3}")) == {"sampler": {"type": "heun", "num_steps": 3}}
    assert load(one, write("two.yaml", "sampler: {type: ddim}")) == {"sampler": {"type": "ddim"}}


def test_lists_and_scalars_replace_and_null_clears(write):
    one = write("one.yaml", "a: [1, 2, 3]\nb: {c: 1}\nd: 4\ne: 5")
    merged = load(one, write("two.yaml", "a: [4]\nb: null\nd: {f: 1}\ne: [x]"))
    assert merged == {"a": [4], "b": None, "d": {"f": 1}, "e": ["x"]}


def test_merging_does_not_tie_two_configs_together(write):
    one, two = write("one.yaml", "a: {b: {c: 1}}"), write("two.yaml", "base: one.yaml\na: {b: {c: 2}}")
    assert load(two, one) == {"a": {"b": {"c": 1}}} and load(two) == {"a": {"b": {"c": 2}}}


def test_every_line_of_a_merged_config_is_known(write):
    write("base.yaml", "engine:\n  sampler:\n    type: heun\n    churn: 3\n")
    config = load_config(
        write("top.yaml", "base: base.yaml\nengine:\n\n  sampler: {num_steps: 3}\n"), overrides=["engine.a.b=1"]
    )
    assert config.where("engine.sampler.churn") == "base.yaml:4: "
    assert config.where("engine.sampler.num_steps") == config.where("engine.sampler") == "top.yaml:4: "
    assert config.where("engine.a.b") == config.where("engine.a.b.c") == ""


# Overrides -----------------------------------------------------------------------------------------

PLAIN = "sampler: heun\nengine: {layers: [{width: 1}, [2, {deep: 3}], name], empty: , size: 3}"


def override(write, *overrides):
    return load(write("a.yaml", PLAIN), overrides=overrides)


def test_overrides_come_last_and_in_order(write):
    assert override(write, "engine.size=4", "engine.size=5")["engine"]["size"] == 5


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1e-3", 0.001),
        ("null", None),
        ("", ""),
        ("true", True),
        ("on", "on"),
        ("007", 7),
        ("a=b=c", "a=b=c"),
        ("=", "="),
        ("'1'", "1"),
        ("[1, [a, {b: 2}]]", [1, ["a", {"b": 2}]]),
        ("{type: ddim, eta: 1.0}", {"type": "ddim", "eta": 1.0}),
        ("two words", "two words"),
        ("$5", "$5"),
        ("../x.yaml", "../x.yaml"),
        ("-1", -1),
    ],
)
def test_an_override_is_read_as_yaml(write, text, expected):
    value = override(write, f"engine.size={text}")["engine"]["size"]
    assert value == expected and type(value) is type(expected)


def test_an_override_reaches_into_lists(write):
    layers = override(write, "engine.layers.0.width=5", "engine.layers.1.1.deep=6", "engine.layers.1.0=7")["engine"][
        "layers"
    ]
    assert layers == [{"width": 5}, [7, {"deep": 6}], "name"]


def test_an_override_turns_a_bare_name_into_a_node(write):
    assert override(write, "sampler.num_steps=3")["sampler"] == {"type": "heun", "num_steps": 3}
    assert override(write, "sampler=ddim", "sampler.num_steps=3")["sampler"] == {"type": "ddim", "num_steps": 3}
    assert override(write, "engine.layers.2.width=3")["engine"]["layers"][2] == {"type": "name", "width": 3}


def test_an_override_makes_the_sections_on_its_way(write):
    assert override(write, "new.section.key=1")["new"] == {"section": {"key": 1}}
    assert override(write, "engine.empty.key=1")["engine"]["empty"] == {"key": 1}


@pytest.mark.parametrize("turn", [1, -1])
def test_another_type_by_override_takes_the_arguments_away_but_not_those_of_other_overrides(write, turn):
    file = write("a.yaml", "sampler: {type: heun, churn: 40}")
    overrides = ["sampler.type=ddim", "sampler.eta=0.5"][::turn]
    assert load(file, overrides=overrides)["sampler"] == {"type": "ddim", "eta": 0.5}
    assert load(file, overrides=["sampler.type=heun"])["sampler"] == {"type": "heun", "churn": 40}


def test_overrides_stand_alone():
    assert load(overrides=["a.b=1"]) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "text, part",
    [
        ("novalue", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        (".a=3", "expected key=value"),
        ("engine.=3", "expected key=value"),
        ("engine.size.x=3", "engine.size is 3, not a section"),
        ("engine.layers.9=1", "'9' is no entry of a list of 3"),
        ("engine.layers.3=1", "'3' is no entry of a list of 3"),
        ("engine.layers.-1=1", "'-1' is no entry of a list of 3"),
        ("engine.layers.\u00b2=1", "is no entry of a list of 3"),
        ("engine.layers.width=1", "'width' is no entry of a list of 3"),
        ("engine.layers.x.width=1", "'x' is no entry of a list of 3"),
        ("engine.size=[1", "not YAML"),
        ("engine.size=!!python/name:os.system x", "no use for the tag"),
        ("engine.size={a: 1, a: 2}", "a is given twice"),
    ],
)
def test_a_bad_override_is_an_error_that_quotes_it(write, text, part):
    message = fault(write("a.yaml", PLAIN), overrides=[text])
    assert message.startswith(f"override {text!r}") and part in message


# Interpolation -------------------------------------------------------------------------------------


def test_interpolation_reads_other_entries_and_the_environment(write, monkeypatch):
    monkeypatch.setenv("VDIFF_DATA", "/data/root")
    text = "size: 8\nfile: ${oc.env:VDIFF_DATA}/digits\n"
    text += "other: {size: '${size}', copy: '${other.list}', list: [1, '${size}']}"
    expected = {"size": 8, "file": "/data/root/digits", "other": {"size": 8, "copy": [1, 8], "list": [1, 8]}}
    assert load(write("a.yaml", text)) == expected


def test_interpolation_sees_merged_files_and_overrides(write):
    one = write("one.yaml", "size: 8\ncopy: ${size}")
    assert load(one, write("two.yaml", "size: 9"))["copy"] == 9
    assert load(one, overrides=["size=7", "again=${copy}"])["again"] == 7


@pytest.mark.parametrize(
    "text, path, part",
    [
        ("${nowhere}", "b.0.c", "'nowhere' not found"),
        ("x${oc.env:VDIFF_NOWHERE}", "b.0.c", "'VDIFF_NOWHERE' not found"),
        ("${b}", "b.0.c", "parent node"),
        ("${b.0.c}", "b.0.c", "ecursive"),
        ("${", "b.0.c", ""),
        ("${no_such_resolver:3}", "b.0.c", "no_such_resolver"),
        ("???", "b.0.c", "Missing mandatory value"),
    ],
)
def test_an_interpolation_error_names_file_line_and_path(write, monkeypatch, text, path, part):
    monkeypatch.delenv("VDIFF_NOWHERE", raising=False)
    message = fault(write("a.yaml", f"a: 1\nb:\n- c: '{text}'\n"))
    assert message.startswith(f"a.yaml:3: {path}: cannot interpolate: ") and part in message
    assert "full_key" not in message


def test_a_config_out_of_a_checkpoint_is_not_interpolated(write):
    assert load(write("a.yaml", "a: ${oc.env:HOME}\nb: ${a}\nc: ???"), interpolate=False) == {
        "a": "${oc.env:HOME}",
        "b": "${a}",
        "c": "???",
    }


# Imports -------------------------------------------------------------------------------------------


@pytest.fixture
def lab(write, monkeypatch, tmp_path):
    """A package whose import leaves a proof, and a config that wants it."""
    name = f"lab_{tmp_path.name.replace('-', '_')}"
    write(f"{name}/__init__.py", "")
    write(f"{name}/mixins.py", f"open({str(tmp_path / 'proof')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    write("a.yaml", f"a: 1\nimports: [{name}.mixins]")
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


@pytest.mark.parametrize("allow", [False, [], ["other"], ["lab"], ["{name}.mix"], ["{name}.mixins.deeper"]])
def test_imports_are_refused_unless_the_caller_allows_them(lab, allow):
    allow = allow and [prefix.format(name=lab) for prefix in allow]
    message = fault("a.yaml", allow_imports=allow)
    assert message.startswith(f"a.yaml:2: imports: this config wants to import '{lab}.mixins', which runs its code")
    assert "allow_imports=True" in message and "--allow-imports" in message
    assert not Path("proof").exists() and lab not in sys.modules


@pytest.mark.parametrize("allow", [True, ["{name}"], ["other", "{name}.mixins"]])
def test_imports_are_honoured_when_the_caller_allows_them(lab, allow):
    allow = allow if allow is True else [prefix.format(name=lab) for prefix in allow]
    assert load("a.yaml", allow_imports=allow)["a"] == 1 and Path("proof").exists()


def test_nothing_is_imported_unless_everything_may_be(lab, write):
    write("a.yaml", f"imports: [{lab}.mixins, os]")
    assert "wants to import 'os'" in fault("a.yaml", allow_imports=[lab])
    assert not Path("proof").exists()


def test_a_file_cannot_allow_its_own_imports(lab, write):
    write("a.yaml", f"imports: {lab}.mixins\nallow_imports: true")
    assert "wants to import" in fault("a.yaml") and not Path("proof").exists()


def test_an_import_that_fails_names_the_line(write):
    write("a.yaml", "a: 1\nimports: no_such_lab")
    said = fault("a.yaml", allow_imports=True)
    assert said.startswith("a.yaml:2: imports: cannot import 'no_such_lab': ModuleNotFound")
    assert fault(write("a.yaml", "imports: {a: 1}"), allow_imports=True).startswith(
        "a.yaml:1: imports: expected a list of modules"
    )
    assert fault(write("a.yaml", "imports: [.relative]"), allow_imports=True).startswith(
        "a.yaml:1: imports: cannot import"
    )


# Saving --------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab$\\{}:'\"?"), max_size=8).filter(lambda text: text != "???")
VALUE = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXT
TREE = st.dictionaries(
    st.text("ab_", min_size=1, max_size=4).filter(lambda key: key != "base"),
    st.recursive(
        VALUE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["on", "type", "k"]), inner)
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=150)
@given(TREE)
def test_a_saved_config_loads_back_equal(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(tree, file)
    assert load(file) == tree and load(file, interpolate=False) == tree


def test_a_resolved_config_loads_back_equal(write, monkeypatch):
    monkeypatch.setenv("VDIFF_DATA", "/data")
    config = load_config(
        write("a.yaml", "on: {x: '${oc.env:VDIFF_DATA}'}\nlr: 1e-4\nliteral: \\${x}\nwords: ['on', '1', null]"),
        overrides=["a.b=1e-3"],
    )
    save_config(config, "saved.yaml")
    monkeypatch.delenv("VDIFF_DATA")
    again = load_config("saved.yaml")
    assert again == config and again["literal"] == "${x}" and again["on"]["x"] == "/data"
    save_config({"sub": config["on"], "tuple": (1, 2)}, "part.yaml")
    assert load("part.yaml") == {"sub": {"x": "/data"}, "tuple": [1, 2]}


def test_only_plain_data_is_saved(write):
    write("a.yaml", "")
    with pytest.raises(Exception, match="cannot represent"):
        save_config({"a": object()}, "a.yaml")


def test_a_module_beside_the_file_that_names_it_is_found(tmp_path, monkeypatch):
    (tmp_path / "lab_beside_the_run.py").write_text("FOUND = True\n")
    (tmp_path / "run.yaml").write_text("imports: [lab_beside_the_run]\n")
    path = list(sys.path)
    load_config(tmp_path / "run.yaml", allow_imports=True)
    assert sys.modules.pop("lab_beside_the_run").FOUND and sys.path == path


def test_so_is_one_in_the_current_folder_where_the_config_lies_elsewhere(tmp_path, monkeypatch):
    """The config of a run folder is a copy; its modules stayed where the command was given."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "lab_of_this_folder.py").write_text("FOUND = True\n")
    (tmp_path / "outputs" / "config.yaml").write_text("imports: [lab_of_this_folder]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as under a console script
    load_config("outputs/config.yaml", allow_imports=True)
    assert sys.modules.pop("lab_of_this_folder").FOUND


def test_a_module_that_fails_to_import_is_named(tmp_path):
    (tmp_path / "lab_that_fails.py").write_text("1 / 0\n")
    (tmp_path / "run.yaml").write_text("imports: [lab_that_fails]\n")
    with pytest.raises(ConfigFileError, match="run.yaml:1: imports: cannot import 'lab_that_fails': ZeroDivisionError"):
        load_config(tmp_path / "run.yaml", allow_imports=True)
