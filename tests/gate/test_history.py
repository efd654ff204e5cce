"""The history of a baseline: what it says, what it leaves open, and what nobody can plant in it."""

import csv
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.gate import history
from bench.gate.baseline import Accepted, Baseline
from bench.gate.measurements import Measurements
from bench.quantities import DASH
from bench.report.render import figure

HOSTILE = "\x1b[31m\u202e<script>alert(1)</script> $x_1$ | [red]a[/] =cmd()\r"


def accepted(number: int, numbers: Any, **changes: Any) -> Accepted:
    told = {
        "when": f"2026-{number // 28 % 12 + 1:02d}-{number % 28 + 1:02d}T10:{number % 60:02d}:30Z",
        "who": "ada",
        "reason": f"change {number}",
        "commit": f"{number:040x}",
        "numbers": numbers,
    }
    return Accepted(**{**told, **changes})


def baseline(*every: Accepted) -> Baseline:
    return Baseline(Path("robustness"), "tasks.yaml", Measurements("robustness", {}), (), every, {})


def long(entries: int, subjects: int = 2) -> Baseline:
    names = [f"model {each}, label, worst case, digits, linf 0.1" for each in range(subjects)]
    return baseline(
        *(
            accepted(number, {name: [0.5 + 0.01 * place, 100] for place, name in enumerate(names)})
            for number in range(entries)
        )
    )


def test_a_number_has_the_interval_of_wilson():
    # Newcombe (1998), table I: 81 of 263, method 3 (the score method without continuity correction).
    (record,) = csv.DictReader(
        StringIO(history.written(baseline(accepted(1, {"a": [81 / 263, 263]})), "csv"))
    )
    assert float(record["value"]) == pytest.approx(100 * 81 / 263)
    assert [round(float(record[end]), 2) for end in ("low", "high")] == [25.53, 36.62]
    assert record["n"] == "263"


def test_what_was_not_asked_is_a_gap_and_no_zero():
    told = baseline(
        accepted(1, {"old": [0.25, 40], "both": [0.75, 40]}),
        accepted(2, {"both": [0.75, 40]}),
        accepted(3, {"both": [0.75, 40], "new": [0.5, 40]}),
    )
    text = history.written(told, "text")
    rows = [line.split()[2:] for line in text.splitlines() if re.match(r"\d +2026", line)][-3:]
    low, both, high = f"14{DASH}41", f"59{DASH}86", f"35{DASH}65"
    assert rows == [
        ["25.0", low, "75.0", both, DASH],
        [DASH, "75.0", both, DASH],
        [DASH, "75.0", both, "50.0", high],
    ]
    records = list(csv.DictReader(StringIO(history.written(told, "csv"))))
    assert [(each["number"], each["subject"]) for each in records] == [
        ("1", "old"),
        ("1", "both"),
        ("2", "both"),
        ("3", "both"),
        ("3", "new"),
    ]
    curves = history.drawn(told).axes[0].get_lines()
    holes = [[value != value for value in line.get_ydata()] for line in curves]
    assert holes == [[False, True, True], [False, False, False], [True, True, False]]


def test_a_change_says_who_when_where_and_why():
    told = baseline(accepted(1, {"a": [0.5, 40]}, who="grace", reason="quantised", commit="0123456789abcdef"))
    for form in ("text", "markdown"):
        text = history.written(told, form)  # type: ignore[arg-type]
        for said in ("grace", "quantised", "0123456", "2026-01-02 10:01"):
            assert said in text
    (document,) = json.loads(history.written(told, "json"))
    assert document["commit"] == "0123456789abcdef"
    assert document["numbers"] == [
        {
            "subject": "a",
            "value": 50,
            "low": pytest.approx(35.199, abs=1e-3),
            "high": pytest.approx(64.801, abs=1e-3),
            "n": 40,
        }
    ]


def test_a_change_outside_a_repository_has_no_commit():
    told = baseline(accepted(1, {"a": [0.5, 40]}, commit=None))
    assert f" {DASH} " in history.written(told, "text")
    assert json.loads(history.written(told, "json"))[0]["commit"] is None
    assert "no commit" in texts(told)


def test_a_change_without_numbers_is_told():
    told = baseline(accepted(1, {}))
    assert "change 1" in history.written(told, "text")
    assert "change 1" in history.written(told, "markdown")
    assert "change 1" in history.written(told, "csv")
    assert "change 1" in texts(told)


@pytest.mark.parametrize("entries", [1, 20, 200])
@pytest.mark.parametrize("subjects", [1, 6, 30])
def test_a_history_fits_into_80_columns_and_names_everything(entries, subjects):
    told = long(entries, subjects)
    text = history.written(told, "text")
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"change {number}" in text for number in range(entries))
    # Each change is a line of the list, and one of each table of five worst cases.
    rows = re.findall(r"^ *\d+  2026", text, re.MULTILINE)
    assert len(rows) == entries * (1 + -(-subjects // 5))


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "json"])
def test_nothing_planted_is_run(form):
    planted = {"when": HOSTILE, "who": HOSTILE, "reason": HOSTILE, "commit": HOSTILE}
    text = history.written(baseline(accepted(1, {HOSTILE: [0.5, 40]}, **planted)), form)
    assert all(each.isprintable() or each == "\n" for each in text)
    if form == "markdown":
        assert "<script>" not in text.replace("\\<script\\>", "")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6, 4}
    if form == "text":
        assert "[red]" in text.replace("\n", "")


def test_a_formula_in_a_reason_is_text_in_a_spreadsheet():
    text = history.written(baseline(accepted(1, {"a": [0.5, 40]}, reason="=cmd()")), "csv")
    assert "'=cmd()" in text


def texts(told: Baseline) -> str:
    page = history.drawn(told)
    return "\n".join(text.get_text() for axes in page.axes for text in axes.texts)


def test_a_picture_escapes_what_is_planted(tmp_path):
    told = baseline(accepted(1, {HOSTILE: [0.5, 40]}, reason=HOSTILE, who=HOSTILE))
    path = tmp_path / "history.svg"
    history.draw(told, path, "svg")
    tree = ElementTree.parse(path)
    assert not [each for each in tree.iter() if each.tag.endswith("script")]
    said = "".join(tree.getroot().itertext())
    assert "\\x1b[31m\\u202e<script>" in said
    assert "$x_1$" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_same_history_is_the_same_file(tmp_path, form):
    for name in ("one", "two"):
        history.draw(long(3), tmp_path / name, form)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes()[:4] == {"svg": b"<?xm", "png": b"\x89PNG"}[form]


def test_a_picture_has_a_curve_and_a_name_for_each_worst_case_however_many():
    axes = history.drawn(long(3, 40)).axes
    assert len(axes[0].get_lines()) == 40
    names = [each.get_text() for each in axes[1].get_legend().get_texts()]
    assert names == [f"model {each}, label, worst case, digits, linf 0.1 (n = 100)" for each in range(40)]
    styles = list(figure.styles())
    assert len(styles) < 40, "with as many styles, nothing is seen of those beyond"


def test_a_picture_of_a_long_history_names_the_newest_changes():
    told = long(200)
    said = texts(told)
    assert "change 199" in said
    assert "change 187" not in said
    assert "and 188 before" in said
    ticks = history.drawn(told).axes[0].get_xticks()
    assert max(ticks) == 200
    assert len(ticks) <= 10


def test_intervals_of_a_picture_are_those_of_the_table():
    told = baseline(accepted(1, {"a": [0.5, 40]}), accepted(2, {"a": [0.0, 40]}))
    (lines,) = history.drawn(told).axes[0].collections
    ends = [sorted(segment[:, 1]) for segment in lines.get_segments()]  # type: ignore[attr-defined]
    assert ends[0] == pytest.approx([35.199, 64.801], abs=1e-3)
    assert ends[1] == pytest.approx([0, 100 * 1.959964**2 / (40 + 1.959964**2)], abs=1e-3)
