"""Names are text: no terminal, document or spreadsheet takes a part of one for anything else."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from manifests import clean, condition, manifest, rows
from markdown_it import MarkdownIt
from rich.console import Console

from bench import cli, escaping
from bench.errors import InputError
from bench.quantities import DASH
from bench.report import attack_cost, render, tables
from bench.report.firsthand import quiet
from bench.report.render.words import MINUS
from bench.report.tables import unexamined
from bench.runner.estimates import Estimates
from bench.runner.progress import Display
from suites import TASK, suite

NASTY = [
    "[/x]",
    "std[l2]",
    "[bold]std",
    ":warning:",
    "a|b",
    "`a`",
    "*a*",
    "_a_",
    "__init__",
    "~~a~~",
    "<b>a</b>",
    "<script>alert(1)</script>",
    "![a](b)",
    "&copy;",
    "$x^2$",
    "$\\frac{",
    "\\input{x}",
    "a&b%c$d#e_f{g}h~i^j\\k",
    "#1",
    '"quoted"',
    "'quoted'",
    "a,b;c",
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "=cmd|'/C_calc'!A0",
    "ünï·中😀",
]


def rendered_of(name: str, title: str | None = None) -> Any:
    """Return a table whose rows, columns, title, notes and flags bear a name."""
    conditions = [condition("a", defense=name), clean("c", defense=name)]
    conditions[0]["facts"]["flags"] = [f"{name}: a flag"]
    table = {
        "title": title or name,
        "rows": ["defense"],
        "columns": {title or name: {"attack": "pgd"}, "Clean": {"attack": "clean"}},
    }
    outcomes = {"a": rows([True, False]), "c": rows([True, True], moved=False)}
    return tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined)


@pytest.mark.parametrize("name", NASTY)
def test_a_terminal_shows_names_as_they_are(name: str) -> None:
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=True, color_system="truecolor").print(
        render.to_text(rendered_of(name))
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert plain.count(name) >= 4
    assert f"{name}: a flag" in plain


@pytest.mark.parametrize("name", NASTY)
def test_markdown_shows_names_as_they_are(name: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(render.to_markdown(rendered_of(name)))
    said = [
        "".join(each.content if each.type == "text" else f"<{each.type}>" for each in token.children or ())
        for token in tokens
        if token.type == "inline"
    ]
    assert said[0] == f"Table T: {name}"
    assert said[2] == name
    assert name in said
    assert [each for each in said if each.endswith(f"{name}: a flag")]
    found = {each.type for token in tokens for each in token.children or ()}
    assert found <= {"text", "strong_open", "strong_close", "html_inline", "softbreak", "text_special"}
    html = [each.content for token in tokens for each in token.children or () if each.type == "html_inline"]
    assert set(html) <= {"<br>"}
    # GitHub's formulas are no part of CommonMark.
    assert not re.search(r"(?<!\\)\$", render.to_markdown(rendered_of(name)))


@pytest.mark.parametrize("name", NASTY)
def test_a_spreadsheet_runs_no_name(name: str) -> None:
    (line, _) = csv.DictReader(io.StringIO(render.to_csv(rendered_of(name))))
    for text in (line["defense"], line["column"]):
        assert text == (f"'{name}" if name[0] in "=+-@" else name)
    assert float(line["value"]) == 50
    for text in line.values():
        assert not re.match(r"\s*[=+@-]", text)


def test_numbers_in_a_spreadsheet_stay_numbers() -> None:
    for value in (-1, -0.5, None, True, "-1", "+2.5e3", "-inf"):
        assert escaping.in_csv(value) is value
    for text in ("-1+1", "=1", " =1", "\t=1", "\r@x", "--1", "+a"):
        assert str(escaping.in_csv(text))[0] == "'"


LATEX = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textquotedbl{}": '"',
    r"\textasciigrave{}": "`",
    "{[}": "[",
    "{*}": "*",
    **{f"\\{each}": each for each in "&%$#_{}"},
}


@pytest.mark.parametrize("name", NASTY)
def test_latex_prints_names_as_they_are(name: str) -> None:
    text = render.to_latex(rendered_of(name))
    row = next(each for each in text.splitlines() if each.endswith(r"\\") and "50.0" in each)
    first = re.split(r"(?<!\\)&", row)[0].strip()
    spelled = re.compile("|".join(map(re.escape, LATEX)))
    assert spelled.sub(lambda found: LATEX[found[0]], first) == name
    # What is left of it when all that is known is taken out means nothing to LaTeX.
    assert not set(spelled.sub("", first)) & set("\\{}$&#^_~%*[")
    (caption,) = re.findall(r"\\caption\{(.*)\}\n", text)
    assert name in spelled.sub(lambda found: LATEX[found[0]], caption)


def test_a_label_of_latex_is_plain() -> None:
    conditions = [condition("a")]
    given = manifest(conditions, {"title": "t", "rows": ["defense"], "columns": ["attack"]})
    given["tables"] = {"a{b}%#\\ c": given["tables"].popitem()[1]}
    rendered = tables.cut(given, "a{b}%#\\ c", {"a": rows([True])}.get, unexamined)
    assert r"\label{tab:a-b-----c}" in render.to_latex(rendered)


@pytest.mark.parametrize("name", NASTY)
def test_json_holds_names_as_they_are(name: str) -> None:
    (found,) = json.loads(render.joined([rendered_of(name)], "json"))
    assert found["title"] == found["cells"][0]["column"] == found["cells"][0]["defense"] == name


@pytest.mark.parametrize("name", NASTY)
def test_figures_show_names_as_they_are(name: str, tmp_path: Path) -> None:
    conditions = [condition(f"r{radius}", radius=radius, defense=name) for radius in (0.1, 0.2)]
    table = {
        "title": name,
        "rows": ["defense"],
        "columns": {f"at {radius}": {"attack": "pgd", "radius": radius} for radius in (0.1, 0.2)},
        "figure": {"x": "radius", "xlabel": name, "ylabel": name},
    }
    rendered = tables.cut(
        manifest(conditions, table),
        "T",
        {f"r{r}": rows([True, False]) for r in (0.1, 0.2)}.get,
        unexamined,
    )
    with pytest.warns(UserWarning, match="Glyph") if not name.isascii() else nothing():
        render.draw(rendered, tmp_path / "f.svg")
    drawn = ElementTree.parse(tmp_path / "f.svg").iter("{http://www.w3.org/2000/svg}text")
    texts = ["".join(each.itertext()).strip() for each in drawn]
    assert texts.count(name) == 4


class nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("name", NASTY)
def test_costs_show_names_as_they_are(name: str) -> None:
    cost = attack_cost.Cost(
        {"data": "d", "defense": name, "attack": "pgd", "view": name, "norm": "l2", "radius": 0.1},
        2, 3.0, 3.0, 3.0, 0.1, name,
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=300, color_system=None).print(attack_cost.text([cost]))
    assert out.getvalue().count(name) == 3
    line = next(csv.DictReader(io.StringIO(attack_cost.written([cost], "csv"))))
    assert line["defense"] == (f"'{name}" if name[0] in "=+-@" else name)
    tokens = MarkdownIt("commonmark").enable(["table"]).parse(attack_cost.written([cost], "markdown"))
    said = [
        "".join(each.content for each in token.children or ()) for token in tokens if token.type == "inline"
    ]
    assert said.count(name) == 2


# What is not printable --------------------------------------------------------------------------------

UNSEEN = ["\x1b[31mred", "\x1b]0;title\x07", "a\x00b", "\u202eevil", "\ud800", "\x9b31m", "a\u2028b"]


@pytest.mark.parametrize("text", UNSEEN)
def test_nothing_unprintable_leaves_in_any_form(text: str, tmp_path: Path) -> None:
    # A manifest of somebody else's: in a task file such names are refused.
    rendered = rendered_of(text, title="T")
    for form in ("text", "markdown", "csv", "latex", "json"):
        found = render.joined([rendered], cast(Any, form))
        assert found.replace("\n", "").isprintable(), form
        found.encode()
    (document,) = json.loads(render.joined([rendered], "json"))
    assert document["cells"][0]["defense"] == text
    with pytest.raises(InputError, match=r"^table 'T': "):
        rendered_of(text)


@pytest.mark.parametrize("text", [*UNSEEN, *NASTY])
def test_messages_show_what_they_quote(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def fails() -> None:
        raise InputError(f"weights: {text}: no such file")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with pytest.raises(SystemExit):
        cli.main()
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    assert said == f"error: weights: {escaping.shown(text)}: no such file\n"
    assert said.strip().isprintable()


class Work:
    """A job that has nothing but a key."""

    key = "k"


@pytest.mark.parametrize("text", [*UNSEEN, *NASTY])
def test_the_live_display_shows_what_it_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.runner.progress.title", lambda job: f"train {text}")
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    job = cast(Any, Work())
    state = cast(Any, SimpleNamespace(todo={job: ()}))
    costs = cast(Estimates, SimpleNamespace(informed=False))
    display = Display(console, state, costs, ("cpu",), quiet)
    display.started(job, 0)
    console.print(display._picture())
    display.ended(cast(Any, SimpleNamespace(job=job, slot=0, error=ValueError(text))))
    said = out.getvalue()
    assert said.count(escaping.shown(text)) == 3
    assert said.replace("\n", "").isprintable()


# Terminals of few letters ----------------------------------------------------------------------------


def test_what_a_terminal_lacks_is_spelled_and_no_footnote_becomes_a_digit() -> None:
    for encoding, text, expected in (
        ("ascii", "71.0¹·²", "71.0[1,2]"),
        ("ascii", f"71.0 ± 2.0 {DASH} ≤ ∞ {MINUS} 3", "71.0 +/- 2.0 - <= inf - 3"),
        ("ascii", "ü😀", "\\xfc\\U0001f600"),
        ("latin-1", "71.0¹² ± ü", "71.0¹² ± ü"),
        ("latin-1", "71.0⁴", "71.0[4]"),
        ("utf-8", "71.0⁴ ± ü😀", "71.0⁴ ± ü😀"),
        ("utf-8", "a\ud800", "a\\ud800"),
    ):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        escaping.readable(stream)
        stream.write(text)
        stream.flush()
        assert raw.getvalue().decode(encoding) == expected


PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
"""A locale that Python would leave, if it were let: file names are ASCII, too."""


@pytest.mark.parametrize("more", [{"PYTHONIOENCODING": "ascii"}, PLAIN], ids=["ascii", "C"])
def test_no_command_fails_on_an_ascii_terminal(more: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    defenses = {name: {"use": "module", "build": "mine:build"} for name in ("[/x]", "std[l2]", "ünï", ":x:")}
    attacks = {"clean": {"use": "none"}, "=1+1": {"use": "fgsm"}}
    table = {"title": "[/x] ± ünï", "rows": ["defense"], "columns": ["attack"], "extra": ["Min", "Worst"]}
    suite(tmp_path, defenses, attacks, [TASK], tables={"t": table})
    environment = {**os.environ, **more, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for words in (
        "run suite.yaml --executor inline",
        "plan suite.yaml",
        *(f"report suite.yaml --format {form}" for form in ("text", "markdown", "csv", "latex", "json")),
        "report suite.yaml --cost",
        "list attacks",
        "schema",
        "--help",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *words.split()],
            cwd=tmp_path, env=environment, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr)
        said = done.stdout.decode("ascii")
        if words.endswith(("inline", "text")):
            assert "[/x]" in said
            assert "std[l2]" in said
            assert ":x:" in said
            assert "\\xfcn\\xef" in said
    (tmp_path / "suite.yaml").write_text(
        (tmp_path / "suite.yaml").read_text().replace("\n  t:", "\n  ü:"), "utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "plan", "suite.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == (2 if more is PLAIN else 0)
    assert b"cannot write" in done.stderr or more is not PLAIN
