"""Whatever stands in a file, reading it ends soon: with plain data, or with one sentence and its line."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resolve import GOOD, write

from bench.api import running
from bench.errors import InputError
from bench.suite import resolve, yaml_source


def read(folder: Path, content: str | bytes) -> Any:
    path = folder / "suite.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return yaml_source.read(path).data


def trouble(folder: Path, content: str | bytes) -> str:
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        read(folder, content)
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files that grow -----------------------------------------------------------------------------------

TEN = range(10)


def levels(kind: str) -> str:
    """Return ten levels of ten aliases each: 10 billion values."""
    lines = ["l0: &l0 {k: v}" if kind == "merge" else "l0: &l0 [v]"]
    for level in range(1, 10):
        below = ", ".join(f"*l{level - 1}" for _ in TEN)
        match kind:
            case "values":
                lines.append(f"l{level}: &l{level} [{below}]")
            case "mapping":
                pairs = ", ".join(f"k{each}: *l{level - 1}" for each in TEN)
                lines.append(f"l{level}: &l{level} {{{pairs}}}")
            case "key":
                lines.append(f"? &l{level} [{below}]\n: v")
            case "merge":
                lines.append(f"l{level}: &l{level} {{<<: [{below}]}}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["values", "mapping", "key", "merge"])
def test_a_file_that_grows_by_its_aliases_is_refused_before_it_does(kind: str, tmp_path: Path) -> None:
    said = trouble(tmp_path, levels(kind))
    # 1111 + 11110 values are within bounds, ten times as many are not.
    assert re.fullmatch(
        r"suite.yaml:\d+: too large: with its aliases written out the file has more than 50,000 values", said
    )


def test_long_texts_count_by_their_characters(tmp_path: Path) -> None:
    long = "a: &a " + "x" * 50_000 + "\nb: ["
    assert len(read(tmp_path, long + "*a, " * 10 + "]")["b"]) == 10
    assert "1,048,576 characters" in trouble(tmp_path, long + "*a, " * 30 + "]")
    assert "expected a task file of at most 1 MiB" in trouble(tmp_path, "a: " + "x" * (1 << 20))


@pytest.mark.parametrize(
    "content",
    [
        "[" * 5000,
        "{a: " * 5000,
        "- " * 5000,
        "? " * 5000,
        "\n".join(" " * each + "a:" for each in range(900)),
        "l0: &l0 [v]\n" + "\n".join(f"l{each}: &l{each} [*l{each - 1}]" for each in range(1, 3000)),
    ],
    ids=["lists", "mappings", "items", "keys", "blocks", "aliases"],
)
def test_what_lies_too_deep_is_refused(content: str, tmp_path: Path) -> None:
    assert "too deep: more than 50 lists and mappings lie in each other" in trouble(tmp_path, content)


def test_a_few_aliases_and_merges_are_read_as_yaml_means_them(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 4}\nc: *a\nd: {<<: [*a, *a]}\n"
    assert read(tmp_path, text) == yaml.safe_load(text)
    found = yaml_source.read(tmp_path / "suite.yaml")
    assert [found.line("b", each) for each in ("x", "y")] == ["suite.yaml:2", "suite.yaml:1"]
    assert trouble(tmp_path, "a: &a [*a]") == "suite.yaml:1: an alias stands inside what it names"
    assert trouble(tmp_path, "a: &a {x: 1}\nb: &b {x: 2}\nc: {<<: [*a, *b]}") == (
        "suite.yaml:3: << takes c.x from two mappings; write it out"
    )
    assert "<< stands twice" in trouble(tmp_path, "a: &a {x: 1}\nc: {<<: *a, <<: *a}")
    assert "<< takes over mappings alone" in trouble(tmp_path, "a: &a 3\nc: {<<: *a}")


# Values that are read otherwise than they look -----------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("010", "expected a decimal number, found 010"),
        ("-010", "expected a decimal number, found -010"),
        ("8:55", "expected a decimal number, found 8:55"),
        ("1:30.5", "expected a decimal number, found 1:30.5"),
        ("0x1F", "expected a decimal number, found 0x1F"),
        (".nan", "expected a decimal number, found .nan"),
        ("1.0e+400", "expected a decimal number, found 1.0e+400"),
        ("9" * 5000, "expected a number of at most 100 characters, found 5000"),
        ("0x" + "f" * 5000, "expected a number of at most 100 characters"),
        ("9" * 30, "expected a whole number of 64 bits"),
        ("2020-01-01", "'2020-01-01' is a timestamp in YAML; quote it if it is text"),
        ("2020-99-99", "'2020-99-99' is a timestamp in YAML; quote it if it is text"),
        ("=", "'=' is a value in YAML; quote it if it is text"),
        ("!!int x", "not plain YAML: the tag 'tag:yaml.org,2002:int'"),
        ('!!int ""', "not plain YAML: the tag"),
        ("!!bool x", "not plain YAML: the tag"),
        ("!!binary gIGC", "not plain YAML: the tag 'tag:yaml.org,2002:binary'"),
        ("!!set {a, b}", "not plain YAML: the tag 'tag:yaml.org,2002:set'"),
        ("!!python/name:os.system", "not plain YAML: the tag"),
        ("! x", "not plain YAML: the tag '!'"),
        (r'"\ud800"', "U+D800 cannot stand in a text"),
        (r'"\0"', "U+0000 cannot stand in a text"),
        (r'"\e[31m"', "U+001B cannot stand in a text"),
        (r'"\u202e"', "U+202E cannot stand in a text"),
        (r'"\U00110000"', "not YAML: "),
        (r'"\UFFFFFFFF"', "not YAML: "),
        ("\x1b[31m", "U+001B cannot stand in a task file"),
        ("a\x00b", "U+0000 cannot stand in a task file"),
        ("a\u202eb", "U+202E cannot stand in a task file"),
        ("\tx: [", "not plain YAML: "),
        ("*nothing", "not plain YAML: found undefined alias 'nothing'"),
    ],
)
def test_values_that_would_be_something_else_are_refused_with_their_line(
    written: str, said: str, tmp_path: Path
) -> None:
    found = trouble(tmp_path, f"# a comment\na: {written}\n")
    assert found.startswith("suite.yaml:2: ")
    assert said in found


def test_plain_values_are_what_they_look_like(tmp_path: Path) -> None:
    text = "a: [1, -2, +3, 1_000, 0, 0.5, -1.5, 1.0e-3, 010.5, 08, .inf, -.INF, yes, ~, '010', 1e-3, 8/255]"
    expected = [1, -2, 3, 1000, 0, 0.5, -1.5, 1e-3, 10.5, "08", math.inf, -math.inf, True, None, "010"]
    assert read(tmp_path, text)["a"] == [*expected, "1e-3", "8/255"]


def test_keys_are_text_as_they_are_written(tmp_path: Path) -> None:
    text = "{1: a, 0.10: b, yes: c, ~: d, 2020-01-01: e, .nan: f, 010: g, '<<<': h}"
    assert list(read(tmp_path, text)) == ["1", "0.10", "yes", "~", "2020-01-01", ".nan", "010", "<<<"]
    assert "1 stands twice (first in line 1)" in trouble(tmp_path, "1: a\n'1': b")
    assert "a key is a list or a mapping" in trouble(tmp_path, "[a, b]: c")


def test_what_is_not_one_text_of_utf_8_is_refused(tmp_path: Path) -> None:
    good = "a: 1\nb: é\n"
    data = {"a": 1, "b": "é"}
    assert read(tmp_path, "\ufeff" + good) == read(tmp_path, good.replace("\n", "\r\n")) == data
    assert trouble(tmp_path, good.encode("latin-1")).startswith("suite.yaml:2: is not UTF-8: ")
    assert "UTF-8" in trouble(tmp_path, good.encode("utf-16"))
    assert (
        trouble(tmp_path, good + "---\nc: 2\n") == "suite.yaml:3: not plain YAML: but found another document"
    )
    assert read(tmp_path, "") == {}
    for path, said in (
        (tmp_path, "expected a file, found a folder"),
        (Path("/dev/null"), "expected a file, found a device"),
        (tmp_path / "a\0b", "cannot be read|no such file"),
        (tmp_path / ("a" * 300), "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            yaml_source.read(path)


# Names ---------------------------------------------------------------------------------------------

NASTY = {
    r'"a\0b"': "U+0000",
    r'"\ud800"': "U+D800",
    r'"\e[31mred"': "U+001B",
    r'"\u202eevil"': "U+202E",
    r'"a\nb"': "U+000A",
    r'"a\tb"': "U+0009",
    r'"a\u00a0b"': "U+00A0",
    r'"a\u200bb"': "U+200B",
    r'"a\u2028b"': "U+2028",
    '""': "empty",
    '" a"': "without a space at its ends",
    "a" * 101: "at most 100 characters, found 101",
    "é" * 300: "at most 100 characters, found 300",
}

SPACES = ("U+000A", "U+0009", "U+00A0", "U+2028")
"""Of these a sentence makes one space."""

PLACES = {
    "data": ("  digits: {name", "  NAME: {name: digits}\n  digits: {name", 3),
    "defense": ("  linear: {", "  NAME: {use: toy/linear}\n  linear: {", 5),
    "attack": ("  pgd: {", "  NAME: {use: pgd}\n  pgd: {", 8),
    "table": ("  1:\n", "  NAME: {title: t, rows: [defense, readout], columns: [attack]}\n  1:\n", 14),
    "column": ("columns: [attack]", "columns: {NAME: {attack: pgd}}", 17),
    "row": ("rows: [defense, readout]", "rows: {NAME: {defense: linear, readout: plain}}", 16),
    "planned": ("  pgd: {", "  cw: {use: not-yet, planned: NAME}\n  pgd: {", 8),
    "title": ("title: A table", "title: NAME", 15),
    "label": ("columns: [attack]", "columns: [attack]\n    figure: {x: attack, xlabel: NAME}", 18),
}


@pytest.mark.parametrize("place", PLACES)
def test_names_are_checked_when_the_file_is_read(place: str, tmp_path: Path) -> None:
    old, new, line = PLACES[place]
    assert old in GOOD
    sentence = place in ("planned", "title", "label")
    for name, said in NASTY.items():
        text = GOOD.replace(old, new.replace("NAME", name), 1)
        lawful = sentence and (
            len(name) > 100 or said in ("U+000A", "U+0009", "U+00A0", "U+2028", "without a")
        )
        if lawful or (sentence and "space" in said):
            resolve.load(write(tmp_path, text))
            continue
        with pytest.raises(InputError) as caught:
            resolve.load(write(tmp_path, text))
        found = str(caught.value)
        assert found.startswith(f"suite.yaml:{line}: "), (name, found)
        assert said in found, found
        assert found.isprintable(), found
        assert len(found) < 300


def test_values_that_tables_show_are_names(tmp_path: Path) -> None:
    for old, new, line in (
        ("views: [logits]", "views: [{use: logits, a: NAME}]", 12),
        ("use: pgd,", "use: NAME, planned: it comes,", 8),
    ):
        for name, said in NASTY.items():
            with pytest.raises(InputError) as caught:
                resolve.load(write(tmp_path, GOOD.replace(old, new.replace("NAME", name))))
            assert str(caught.value).startswith(f"suite.yaml:{line}: ")
            assert said in str(caught.value)


def test_sentences_are_one_line_and_not_endless(tmp_path: Path) -> None:
    text = GOOD.replace("title: A table", "title: >\n      A table\n      of two lines")
    assert resolve.load(write(tmp_path, text)).model.tables["1"].title == "A table of two lines"
    with pytest.raises(
        InputError, match=r"suite.yaml:15: tables.1.title: .* at most 500 characters, found 501"
    ):
        resolve.load(write(tmp_path, GOOD.replace("A table", "a" * 501)))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("'a:b'", "becomes a file's name, and : cannot stand there"),
        ("'a\\b'", "becomes a file's name, and \\ cannot stand there"),
        ("'a*'", "becomes a file's name, and * cannot stand there"),
        ("😀" * 60, "becomes a file's name: expected at most 200 bytes, found 240"),
    ],
)
def test_keys_of_tables_can_be_files(key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve.load(write(tmp_path, GOOD.replace("  1:\n", f"  {key}:\n")))
    assert str(caught.value).startswith("suite.yaml:14: tables.")
    assert said in str(caught.value)


@pytest.mark.parametrize(("one", "other"), [("A", "a"), ("a/b", "a-b"), ("é", "e\u0301"), ("ß", "SS")])
def test_two_tables_are_never_one_file_on_any_file_system(one: str, other: str, tmp_path: Path) -> None:
    table = "{title: t, rows: [defense, readout], columns: [attack]}"
    text = GOOD.partition("tables:\n")[0] + f"tables:\n  '{one}': {table}\n  '{other}': {table}\n"
    with pytest.raises(InputError, match=r"suite.yaml:15: tables .* would be written to one file"):
        running.planned(write(tmp_path, text), tmp_path / "results", None)


# Anything ------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("data", "defenses", "attacks", "tasks", "tables", "use", "pgd", "name", "digits", "steps", "linf"),
        *("&a", "*a", "&b", "*b", "<<", "!!binary", "!!int", "!", "? ", ": ", "- ", "[", "]", "{", "}", ","),
        *(
            '"\\ud800"',
            '"\\0"',
            "'",
            '"',
            "|",
            ">",
            "#",
            "%YAML 1.2",
            "---",
            "...",
            "\t",
            "\r\n",
            "\ufeff",
            "@",
        ),
        *("0x1", "010", "1:30", ".nan", ".inf", "1e999999", "9" * 200, "2020-01-01", "~", "yes", "=", "\x1b"),
    ]
)
YAMLISH = st.lists(st.one_of(WORDS, st.text(max_size=4), st.sampled_from(["\n", "\n  ", " "])), max_size=60)
QUICK = settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(call: Callable[[Path], Any], path: Path) -> Any:
    try:
        return call(path)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    return said


@QUICK
@given(
    st.one_of(st.binary(max_size=300), YAMLISH.map(lambda words: "".join(words).encode("utf-8", "replace")))
)
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "suite.yaml"
    path.write_bytes(content)
    found = read_or_refused(yaml_source.read, path)
    if isinstance(found, yaml_source.Document):
        yaml.safe_dump(found.data)


LINES = st.lists(st.tuples(st.integers(0, 18), YAMLISH), min_size=1, max_size=3)


@QUICK
@given(LINES)
def test_any_suite_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, list[str]]]) -> None:
    lines = GOOD.splitlines()
    for number, words in changes:
        start, colon, _ = lines[number % len(lines)].partition(":")
        lines[number % len(lines)] = f"{start}{colon} {''.join(words)}"
    path = tmp_path / "suite.yaml"
    path.write_bytes("\n".join(lines).encode("utf-8", "replace"))
    read_or_refused(resolve.load, path)
