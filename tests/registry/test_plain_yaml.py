import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiff.registry import ConfigFileError
from vdiff.registry.plain_yaml import MAX_DEPTH, MAX_NODES, dump, parse

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRICKY = st.sampled_from(
    [
        "on",
        "no",
        "true",
        "null",
        "~",
        "1e-3",
        "010",
        "0x1F",
        "1_000",
        ".inf",
        ".nan",
        "2020-01-01",
        "12:30",
        "=",
        "<<",
        "- a",
    ]
    + [
        "a: b",
        "# c",
        "",
        " ",
        "a\nb",
        "'",
        '"',
        "\t",
        "\x00",
        "\ufeff",
        "\x85",
        "\u2028",
        "!!python/name:os.system",
        "&a",
        "*a",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | TRICKY
TREES = st.dictionaries(
    WORDS | TRICKY,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | TRICKY, inner, max_size=3)
    ),
    max_size=4,
)


def value(text):
    return parse(text, "x.yaml")[0]


def fault(text):
    with pytest.raises(ConfigFileError) as error:
        parse(text, "x.yaml")
    return str(error.value)


def same(a, b):
    """Equal, and of the same types all the way down: 1, 1.0 and True are three things."""
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, max_examples=300)
@given(TREES)
def test_what_is_written_reads_back_equal(tree):
    assert same(value(dump(tree)), tree)


@settings(deadline=None, max_examples=100)
@given(TREES)
def test_other_readers_of_yaml_read_the_same_words(tree):
    def words(tree):
        return {k: words(v) if isinstance(v, dict) else v for k, v in tree.items() if isinstance(v, str | dict)}

    assert words(yaml.safe_load(dump(tree))) == words(tree)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
        ("1_000", 1000),
        ("-7", -7),
        ("010", 10),
        ("08", 8),
        ("-0", 0),
        ("null", None),
        ("~", None),
        ("", None),
        ("True", True),
        ("false", False),
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("nUll", "nUll"),
        ("0x1F", "0x1F"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("[1, [2, {a: 3}]]", [1, [2, {"a": 3}]]),
    ],
)
def test_numbers_and_words(text, expected):
    assert same(value(f"x: {text}"), {"x": expected})


def test_nan_is_a_number():
    assert math.isnan(value("x: .nan")["x"])


def test_keys_are_words_whatever_they_look_like():
    assert value('{on: 1, 2: 3, null: 4, true: 5, "": 6, 1e3: 7}') == {
        "on": 1,
        "2": 3,
        "null": 4,
        "true": 5,
        "": 6,
        "1e3": 7,
    }


def test_an_empty_file_is_nothing_and_windows_files_are_files():
    assert value("") is None and value("# nothing\n") is None
    assert value("\ufeffa: 1\r\nb:\r\n- x\r\n") == {"a": 1, "b": ["x"]}


def test_every_entry_remembers_its_line():
    _, lines = parse("# head\na: 1\nb:\n  c:\n  - x\n  - d: 2\n    e: >-\n      long\n", "x.yaml")
    assert lines == {"a": 2, "b": 3, "b.c": 4, "b.c.0": 5, "b.c.1": 6, "b.c.1.d": 6, "b.c.1.e": 7}


def test_a_key_given_twice_is_an_error_with_its_line():
    assert fault("a:\n  b: 1\n  c: 2\n  b: 3\n") == "x.yaml:4: a.b is given twice."
    assert value("{a: {b: 1}, c: {b: 2}, a.b: 3}") == {
        "a": {"b": 1},
        "c": {"b": 2},
        "a.b": 3,
    }  # three different entries


def test_merge_keys_give_way_to_own_keys_wherever_they_stand():
    text = "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\n"
    assert value(text + "x: {<<: *one, b: 3}")["x"] == {"a": 1, "b": 3}
    assert value(text + "x: {b: 3, <<: *one}")["x"] == {"a": 1, "b": 3}
    assert value(text + "x: {<<: [*one, *two], d: 4}")["x"] == {"a": 1, "b": 1, "c": 2, "d": 4}
    assert value(text + "x: {<<: *two, <<: *one}")["x"] == {"a": 1, "b": 2, "c": 2}
    assert "takes a mapping" in fault("x: {<<: 3}") and "takes a mapping" in fault("x: {<<: [3]}")
    assert fault(text + "x:\n  <<: *one\n  b: 3\n  b: 4") == "x.yaml:6: x.b is given twice."


def test_an_alias_is_a_copy():
    tree = value("a: &a {b: [1]}\nc: *a")
    tree["a"]["b"].append(2)
    assert tree["c"] == {"b": [1]}


@pytest.mark.parametrize(
    "text",
    [
        "x: !!python/object/apply:os.system ['echo no']",
        "x: !!python/name:os.system ''",
        "x: !!python/object/new:os.system {args: ['echo no']}",
        "x: !!python/tuple [1, 2]",
        "x: !mine 3",
        "x: !mine {a: 1}",
        "x: !!set {a, b}",
        "x: !!omap [a: 1]",
        "x: !!binary aGVsbG8=",
        "x: !!timestamp 2020-01-01",
    ],
)
def test_tags_are_refused_on_scalars_lists_and_mappings_alike(text):
    assert fault(text).startswith("x.yaml:1: x: a config has no use for the tag")


@pytest.mark.parametrize("text", ["x: !!int one", "x: !!float one", "x: !!bool maybe", "x: " + "9" * 5000])
def test_a_scalar_that_is_not_what_it_says_is_an_error_with_its_line(text):
    assert fault("# head\n" + text).startswith("x.yaml:2: x: ")


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: 1\nb: [1, 2\nc: 3", 3),
        ("a: b: c", 1),
        ("a: 1\n  b: 2", 2),
        ("a: 'open", 1),
        ("a: *nowhere", 1),
        ("a: 1\n---\nb: 2", 2),
        ("a: 1\n\tb: 2", 2),
        ("[a]: 1", 1),
        ("{a: 1}: 2", 1),
        ("? [a, b]\n: 1", 1),
        ("a: %", 1),
        ("a: 1\nb: @x", 2),
    ],
)
def test_broken_yaml_is_an_error_with_its_line(text, line):
    assert fault(text).startswith(f"x.yaml:{line}: ")


@pytest.mark.parametrize("text", ["a: b\x00c", "\x00", "a: \x07", "a: \ud800"])
def test_characters_that_are_no_text_are_an_error(text):
    assert fault(text).startswith("x.yaml: not YAML that a config may use")


def test_an_alias_bomb_goes_off_in_an_error():
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert f"more than {MAX_NODES} entries" in fault("\n".join(layers))


def test_an_alias_of_itself_is_an_error():
    assert "aliases gone wild" in fault("a: &a [*a]") and "aliases gone wild" in fault("a: &a {b: *a}")
    assert "aliases gone wild" in fault("a: &a {<<: *a}")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 3000, 100_000])
def test_nesting_without_end_is_an_error(depth):
    fault("a: " + "[" * depth + "]" * depth)
    fault("a: " + "{a: " * depth + "1" + "}" * depth)


def test_a_reasonable_depth_and_size_are_fine():
    deep = MAX_DEPTH - 1
    assert value("a: " + "[" * deep + "]" * deep)
    assert len(value("a: [" + "1, " * (MAX_NODES - 2) + "]")["a"]) == MAX_NODES - 2


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=40) | st.text("{}[]:,-&*!?|>'\"%@`#<= \n\tab1.$", max_size=40))
def test_any_text_is_read_or_is_a_config_file_error(text):
    try:
        parse(text, "x.yaml")
    except ConfigFileError as error:
        assert str(error).startswith("x.yaml")
