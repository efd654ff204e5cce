import csv
import io
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from manifests import clean, condition, first, manifest, paper, rows
from rich.console import Console

from bench.errors import InputError
from bench.quantities import DASH, format_value, fraction
from bench.report import render, tables
from bench.report.checks import coordinates
from bench.report.render import figure, words
from bench.report.render.words import MINUS
from bench.report.tables import unexamined
from bench.results.conditions import conditions_of
from bench.results.metrics import METRICS
from bench.results.outcomes import OUTCOME_COLUMNS

DOCS = Path(__file__).parents[2] / "docs"

PUBLISHED = {
    "table": "cnnf/3",
    "columns": {
        "Clean": "clean",
        "PGD (first)": "pgd_first",
        "PGD (e2e)": "pgd_e2e",
        "SPSA (first)": "spsa_first",
        "SPSA (e2e)": "spsa_e2e",
        "Transfer": "transfer",
        "Min": "min",
    },
    "rows": {"cnn, last": "CNN", "cnnf, last": "CNN-F (last)", "cnnf, avg": "CNN-F (avg)"},
    "differences": ["narrower nets", "digits & not objects."],
}


@pytest.fixture(scope="module")
def rendered():
    """Return a table of the CNN-F paper's form, with everything on it that a table can have."""
    given, outcomes = paper(n=120)
    for each in (*given["conditions"], *given["skips"]):
        each["coordinates"]["radius"] = 8 / 255
        if each.get("job") == "pgd-e2e-cnnf-last-0":
            each["facts"]["flags"] = ["seven steps through e2e_last do not cross it"]
    given["data"]["digits"]["name"] = "cifar10"
    given["tables"]["T"]["published"] = PUBLISHED
    for seed in (0, 1, 2):
        del outcomes[f"transfer--cnnf-avg-{seed}"]
    del outcomes["spsa-e2e-cnnf-last-1"]
    outcomes["pgd-e2e-cnnf-last-0"].loc[:11, "invalid"] = True
    return tables.cut(given, "T", outcomes.get, unexamined)


@pytest.fixture(scope="module")
def plain():
    """Return a table with one row and two columns whose numbers are round."""
    conditions = [condition("a", n=10), clean("c", n=10)]
    table = {
        "title": "Plain_table",
        "rows": ["defense"],
        "columns": {"Clean": {"attack": "clean"}, "A|B": {"attack": "pgd"}},
    }
    outcomes = {"a": rows(first(10, 5)), "c": rows(first(10, 9), moved=False)}
    return tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined)


def shown(rendered, width=80):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render.to_text(rendered))
    return out.getvalue()


# --- numbers -----------------------------------------------------------------------------------------


def test_numbers_in_their_units():
    assert words.number(0.71349, "percent") == "71.3"
    assert words.number(1.0, "percent") == "100.0"
    assert words.number(0.71349, "distance") == "0.713"
    assert words.number(math.inf, "distance") == "∞"


def test_logits_and_sizes_have_units_of_their_own():
    from bench.results.metrics import Estimate

    assert words.number(-644.52, "number") == f"{MINUS}644.5"
    assert words.number(1_465_120, "millions") == "1.47"
    known = Estimate(-1.0, -2.5, 0.25, 9, None, 1)
    for short in (True, False):
        assert words.interval(known, "number", short=short) == f"{MINUS}2.5 to 0.2"
    assert words.interval(Estimate(1.0, None, None, 1, None, 1), "number") == ""
    assert words.quoted(tables.Quote(-644.5, None), "number") == (f"{MINUS}644.5", "")
    assert words.quoted(tables.Quote(1.46, None), "millions") == ("1.46", "")


def test_a_number_without_an_interval_is_shown_without_one():
    frame = rows([True], moved=False)
    frame["logits"], frame["parameters"] = [[482.5, -644.5]], [1_465_120]
    columns = {
        "first": {"metric": "logit", "class": 0},
        "second": {"metric": "logit", "class": 1},
        "size": {"metric": "parameters"},
        "right": {},
    }
    table = {"title": "x", "rows": {"SDIM": {"attack": "clean"}}, "columns": columns}
    rendered = tables.cut(manifest([clean("c", n=1)], table), "T", {"c": frame}.get, unexamined)
    assert f"| SDIM | 482.5 | {MINUS}644.5 | 1.47 | 100.0<br>[20.7{DASH}100.0] |" in render.to_markdown(
        rendered
    )
    assert "-- " not in render.to_latex(rendered).partition(r"\midrule")[2]
    assert "$-$644.5" in render.to_latex(rendered)
    assert f"{MINUS}644.5" in shown(rendered)
    lines = list(csv.DictReader(io.StringIO(render.to_csv(rendered))))
    assert [line["unit"] for line in lines] == ["number", "number", "millions", "percent"]
    assert [line["value"] for line in lines] == ["482.5", "-644.5", "1.46512", "100.0"]
    assert (lines[0]["low"], lines[0]["high"]) == ("", "")


@pytest.mark.parametrize("n", [10, 360, 10000])
def test_short_intervals_are_never_narrower(n):
    from bench.results.metrics import Estimate, wilson

    for right in range(0, n + 1, max(n // 50, 1)):
        low, high = wilson(right / n, n)
        short = words.interval(Estimate(right / n, low, high, n, None, 1), "percent", short=True)
        shown_low, shown_high = map(int, short.split(DASH))
        assert shown_low <= 100 * low + 1e-6
        assert shown_high >= 100 * high - 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8 / 255, "8/255"),
        (76.5 / 255, "0.3"),
        (0.1, "0.1"),
        (0.0315, "0.0315"),
        (1 / 3, "85/255"),
        (None, DASH),
    ],
)
def test_radii_as_the_field_writes_them(value, text):
    assert format_value(value) == text
    if value is not None:
        assert fraction(text) == pytest.approx(value)


def test_a_fraction_may_have_a_decimal_above_as_papers_write_it():
    assert fraction("76.5/255") == 0.3
    assert fraction("1e-3") == 0.001
    assert fraction(" 8 / 255 ") == 8 / 255


@pytest.mark.parametrize("text", ["8/0", "ten", "1e999", "", "8/", "/8", "1/2/3"])
def test_what_is_no_number_is_said(text):
    with pytest.raises(ValueError, match="expected a number or a fraction like 8/255"):
        fraction(text)


# --- the terminal ------------------------------------------------------------------------------------


def test_eight_columns_and_three_rows_fit_into_80(rendered):
    text = shown(rendered)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    # Nothing was cut short, and every heading is whole.
    assert "…" not in text
    head = " ".join(lines[:7])
    for word in (
        "Clean",
        "PGD",
        "(first)",
        "(e2e)",
        "SPSA",
        "Transfer",
        "Min",
        "Worst",
        "defense",
        "readout",
    ):
        assert word in head


def test_the_terminal_shows_values_spread_interval_and_n(rendered):
    text = shown(rendered)
    cell = rendered.rows[1].cells[1]
    assert f"{100 * cell.estimate.value:.1f}" in text
    assert f"±{100 * cell.estimate.std:.1f}" in text
    assert words.interval(cell.estimate, "percent", short=True) in text
    counts = next(line for line in text.splitlines() if line.startswith("n "))
    assert counts.split()[1:] == ["120", "120", "120", "20", "20", "120", "120", "120"]


def test_holes_and_bounds_are_never_numbers(rendered):
    text = shown(rendered)
    assert "not run" in text
    transfer, lowest, worst = rendered.rows[2].cells[5:]
    assert transfer.estimate is None
    for cell in (lowest, worst):
        assert f"≤{100 * cell.estimate.value:.1f}" in text


def test_headings_with_brackets_are_text_and_not_markup():
    conditions = [condition("a")]
    table = {
        "title": "[bold]x",
        "rows": {"[red]Ours": {"defense": "cnn"}},
        "columns": {"[dim]A": {"attack": "pgd"}},
    }
    text = shown(tables.cut(manifest(conditions, table), "T", {"a": rows(first(4, 2))}.get, unexamined))
    for word in ("[bold]x", "[red]Ours", "[dim]A"):
        assert word in text


def test_notes_stand_once_and_are_pointed_at(rendered):
    text = shown(rendered)
    assert text.count("the source is its own victim") == 1
    assert text.count("without Transfer (not run)") == 1
    assert "¹ the source is its own victim" in text
    assert f"{DASH}¹" in text
    said = " ".join(text.split())
    assert "doubt, invalid-moves: 12 of 360 moves were invalid" in said
    assert "12 invalid moves in the whole table" in said
    assert "docs/flags.md" in text


@pytest.mark.parametrize("width", [12, 20, 33, 40, 57, 79, 80, 120, 300])
def test_nothing_is_cut_at_any_width(rendered, width):
    text = shown(rendered, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    # Every heading and every number is there, whatever block it stands in.
    said = "".join(text.split())
    for heading in rendered.columns:
        assert all(word in said for word in heading.split())
    for row in rendered.rows:
        for cell in row.cells:
            if cell.estimate is not None:
                assert f"{100 * cell.estimate.value:.1f}" in said


def test_a_file_is_as_wide_as_its_table(rendered):
    wide = render.joined([rendered], "text")
    assert "…" not in wide
    assert sum("Clean" in line for line in wide.splitlines()[:8]) == 1
    narrow = shown(rendered, 50)
    assert max(map(len, narrow.splitlines())) <= 50 < max(map(len, wide.splitlines()))


def test_a_caption_says_what_where_pins_and_each_own_metric():
    conditions = [condition("a", n=10), clean("c", n=10)]
    columns = {
        "A": {"attack": "pgd"},
        "B": {"attack": "pgd", "metric": "success"},
        "C": {"attack": "pgd", "metric": "success"},
    }
    table = {"title": "x", "where": {"readout": "last", "seed": 0}, "rows": ["defense"], "columns": columns}
    outcomes = {"a": rows(first(10, 5)), "c": rows(first(10, 9), moved=False)}
    said = " ".join(words.caption(tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined)))
    assert "readout last, seed 0." in said
    assert f"Accuracy (%): {METRICS['accuracy'].says}." in said
    assert f"B, C: Success (%): {METRICS['success'].says}." in said


def test_a_curve_over_radii_begins_with_the_clean_images():
    conditions = [condition(f"a{r}", radius=r, n=10) for r in (2 / 255, 8 / 255)] + [clean("c", n=10)]
    outcomes = {f"a{r}": rows(first(10, n)) for r, n in ((2 / 255, 6), (8 / 255, 3))}
    outcomes["c"] = rows(first(10, 9), moved=False)
    given = {
        "title": "x",
        "where": {"attack": "pgd"},
        "rows": ["defense"],
        "columns": ["radius"],
        "figure": {"x": "radius"},
    }
    told = manifest(conditions, given)
    table = tables.cut(told, "T", outcomes.get, unexamined)
    assert "c" in tables.jobs(told, "T")
    page = figure.drawn(table)
    (line,) = page.axes[0].get_lines()
    assert list(line.get_xdata()) == pytest.approx([0, 2 / 255, 8 / 255])
    assert list(line.get_ydata()) == pytest.approx([90, 60, 30])
    assert [each.get_text() for each in page.axes[0].get_xticklabels()] == ["0", "2/255", "8/255"]
    assert "attack pgd, n 10" in page.get_supxlabel()
    for job, cell in zip(("a0.00784314", "a0.0313725"), table.rows[0].cells, strict=True):
        assert cell.jobs[0].startswith(job[:6])


# --- markdown and LaTeX ------------------------------------------------------------------------------


def test_markdown_is_a_table_that_github_reads(rendered):
    text = render.to_markdown(rendered)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    conditions = [[part.strip() for part in line.strip("|").split("|")] for line in table]
    assert conditions[0] == ["defense", "readout", *rendered.columns]
    assert set(conditions[1]) == {":--", "--:"}
    cell = rendered.rows[0].cells[1]
    value = f"{100 * cell.estimate.value:.1f} ± {100 * cell.estimate.std:.1f}"
    low, high = 100 * cell.estimate.low, 100 * cell.estimate.high
    assert conditions[2][3] == f"**{value}**<br>[{low:.1f}{DASH}{high:.1f}]"
    assert conditions[-1] == ["n", "", "120", "120", "120", "20", "20", "120", "120", "120"]
    # Every mark has its footnote.
    marks = set(re.findall(r"[¹²³⁴⁵⁶⁷⁸⁹⁰]+", "".join(table)))
    notes = re.findall(r"^(\d+)\. ", text, re.MULTILINE)
    assert {str(int(each.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))) for each in marks} == set(
        notes
    )


def test_a_bar_in_a_heading_does_not_cut_the_table(plain):
    assert "| A\\|B |" in render.to_markdown(plain)


def test_published_numbers_and_differences_are_shown(rendered):
    for text in (" ".join(shown(rendered).split()), render.to_markdown(rendered)):
        assert "48.72" in text
        assert "Published: Adversarial accuracy on CIFAR-10 (cnnf/3)." in text
        assert "Known difference: narrower nets. Known difference: digits & not objects." in text
    lines = render.to_markdown(rendered).splitlines()
    ours = next(at for at, line in enumerate(lines) if line.startswith("| cnnf | avg |"))
    assert lines[ours + 1].startswith("| *published* |  | *80.27 ±0.69* | *48.72 ±0.64* |")


def test_latex_is_escaped_and_bold(rendered, plain):
    text = render.to_latex(rendered)
    assert r"\toprule" in text
    assert r"\begin{tabular}{llrrrrrrrr}" in text
    cell = rendered.rows[0].cells[1]
    value, std = 100 * cell.estimate.value, 100 * cell.estimate.std
    assert rf"\textbf{{{value:.1f}}}" in text
    assert rf"{{\scriptsize $\pm${std:.1f}}}" in text
    ends = words.interval(cell.estimate, "percent", short=True).replace(DASH, "--")
    assert rf"{{\scriptsize {ends}}}" in text
    assert text.startswith("% Packages: ")
    assert "\\midrule\nn &  & 120 & 120 & 120 & 20 & 20 & 120 & 120 & 120 \\\\\n\\bottomrule" in text
    assert r"\shortstack[r]{PGD\\(first)}" in text
    assert r"digits \& not objects" in text
    assert "e2e\\_last" in text
    assert "±" not in text.replace("\\", "")
    assert r"Plain\_table" in render.to_latex(plain)
    assert text.count(r"\begin{") == text.count(r"\end{")


# --- for programs ------------------------------------------------------------------------------------


def test_csv_has_a_line_for_each_cell_and_documented_columns(rendered):
    lines = list(csv.DictReader(io.StringIO(render.to_csv(rendered))))
    assert len(lines) == 3 * 8
    documented = (DOCS / "results.md").read_text(encoding="utf-8")
    for name in lines[0]:
        assert f"`{name}`" in documented
    for row, line in zip([row for row in rendered.rows for _ in rendered.columns], lines, strict=True):
        assert (line["defense"], line["readout"]) == row.label
        cell = row.cells[rendered.columns.index(line["column"])]
        if cell.estimate is None:
            assert (line["value"], line["low"], line["high"], line["n"], line["seeds"]) == ("",) * 5
            assert line["note"]
        else:
            assert float(line["value"]) == pytest.approx(100 * cell.estimate.value, abs=1e-5)
            assert int(line["n"]) == cell.estimate.n
            assert float(line["low"]) <= float(line["value"]) <= float(line["high"])
    holes = {(line["readout"], line["column"]): line["note"] for line in lines if not line["value"]}
    assert holes == {
        ("last", "Transfer"): "the source is its own victim",
        ("avg", "Transfer"): "not run",
        # SPSA lacks a seed, and the least of means over different seeds is none.
        ("last", "Min"): "not all seeds of SPSA (e2e) were run, and others have other seeds",
    }
    assert {line["published"] for line in lines if line["column"] == "Min"} == {"42.31", "48.9", "48.72"}


def test_json_says_the_same_as_csv(rendered, plain):
    first_, second = json.loads(render.joined([rendered, plain], "json"))
    lines = csv.DictReader(io.StringIO(render.to_csv(rendered)))
    for record, line in zip(first_["cells"], lines, strict=True):
        assert {name: "" if value is None else str(value) for name, value in record.items()} == line
    assert second["cells"][1]["value"] == 50
    assert first_["flags"][0]["code"] == "unequal-examples"


def test_an_infinite_median_survives_json():
    conditions = [condition("a", radius=None, kind="minimum-norm")]
    table = {"title": "x", "rows": ["defense"], "columns": {"CW": {"attack": "pgd"}}, "metric": "distance"}
    rendered = tables.cut(manifest(conditions, table), "T", {"a": rows(first(4, 3))}.get, unexamined)
    cell = json.loads(render.joined([rendered], "json"))[0]["cells"][0]
    assert (cell["value"], cell["unit"]) == ("inf", "distance")
    assert "∞" in shown(rendered)
    assert r"$\infty$" in render.to_latex(rendered)


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex", "json"])
def test_several_tables_as_one_text(rendered, plain, form):
    text = render.joined([rendered, plain], form)
    assert text.endswith("\n")
    assert "Transfer" in text
    assert len(text) > len(render.joined([rendered], form))


# --- figures -----------------------------------------------------------------------------------------


def curves(**changes):
    radii = (0.1, 0.2, 0.3)
    conditions = [
        condition(f"{defense}{radius}", defense=defense, radius=radius, n=100)
        for defense in ("cnn", "cnnf")
        for radius in radii
    ]
    stood = {"cnn": (80, 50, 20), "cnnf": (85, 60, 30)}
    outcomes = {
        f"{defense}{radius}": rows(first(100, count))
        for defense, counts in stood.items()
        for radius, count in zip(radii, counts, strict=True)
    }
    del outcomes["cnn0.2"]
    table = {
        "title": "Curves",
        "rows": ["defense"],
        "columns": ["radius"],
        "figure": {"x": "radius"},
        **changes,
    }
    return tables.cut(manifest(conditions, table), "T", outcomes.get, unexamined)


def drawn(rendered):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    for curve, style in zip(figure._curves(rendered), figure.styles(), strict=False):
        figure._draw(axes, curve, style)
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}, axes


def test_a_curve_for_each_row_broken_at_holes():
    lines, axes = drawn(curves())
    np.testing.assert_allclose(lines["cnnf"], [(0.1, 85), (0.2, 60), (0.3, 30)])
    np.testing.assert_allclose(lines["cnn"], [(0.1, 80), (0.2, math.nan), (0.3, 20)])
    assert len(axes.collections) == 2


def test_a_curve_for_each_column_where_the_axis_runs_over_rows():
    columns = {"Plain": {"defense": "cnn"}, "Feedback": {"defense": "cnnf"}}
    lines, _ = drawn(curves(rows=["radius"], columns=columns))
    assert set(lines) == {"Plain", "Feedback"}
    np.testing.assert_allclose(lines["Feedback"], [(0.1, 85), (0.2, 60), (0.3, 30)])


@pytest.mark.parametrize("form", ["svg", "png"])
def test_a_figure_is_the_same_file_each_time(tmp_path, form):
    rendered = curves()
    for name in ("one", "two"):
        render.draw(rendered, tmp_path / f"{name}.{form}")
    one = (tmp_path / f"one.{form}").read_bytes()
    assert one == (tmp_path / f"two.{form}").read_bytes()
    if form == "svg":
        assert b"Curves" in one
        assert b"accuracy (%)" in one


def test_a_table_without_a_figure_cannot_be_drawn(plain, tmp_path):
    with pytest.raises(InputError, match="names no figure"):
        render.draw(plain, tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot be drawn"):
        render.draw(curves(), tmp_path / "x.docx")


# --- documentation -----------------------------------------------------------------------------------


def test_everything_stored_is_documented():
    documented = (DOCS / "results.md").read_text(encoding="utf-8")
    given = condition("a")
    for name in (*OUTCOME_COLUMNS, *METRICS, *given, *given["coordinates"], *given["facts"]):
        assert f"`{name}`" in documented, name
    section = documented.partition("## outcomes.parquet")[2].partition("\n## ")[0]
    for name, (kind, null) in OUTCOME_COLUMNS.items():
        entry = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
        expected = kind.replace("list<float32>", "list of float32") + (", null" if null else "")
        assert entry.split(" | ")[1] == expected


def test_what_conditions_are_grouped_by_are_coordinates_alone():
    (one,) = conditions_of(manifest([condition("a", **{"inference.cycles": 2})], {}))
    assert dict(coordinates(one)) == one.coordinates
    assert dict(coordinates(one, "seed", "inference")) == {
        name: value for name, value in one.coordinates.items() if name not in ("seed", "inference.cycles")
    }


def test_a_figure_marks_what_is_doubted_and_names_the_flags():
    n = 200
    conditions = [condition(f"a{r}", radius=r) for r in (0.1, 0.2)]
    conditions += [condition(f"b{r}", radius=r, attack="spsa", access="score") for r in (0.1, 0.2)]
    stood = {"a0.1": 120, "a0.2": 100, "b0.1": 125, "b0.2": 60}
    outcomes = {key: rows(first(n, count)) for key, count in stood.items()}
    given = {"title": "x", "rows": ["attack"], "columns": ["radius"], "figure": {"x": "radius"}}
    table = tables.cut(manifest(conditions, given), "T", outcomes.get, unexamined)
    page = figure.drawn(table)
    asked, doubts = page.get_supxlabel().split("\n")
    assert asked == "data digits, norm linf, n 200; bands: 95 % intervals of one seed"
    assert doubts == "open marks: doubt blind-beats-seeing"
    marks = [each.get_offsets() for each in page.axes[0].collections if len(each.get_offsets()) == 1]
    assert [tuple(map(float, each[0])) for each in marks if each[0][0] == 0.2] == [(0.2, 50.0), (0.2, 30.0)]
    drawn = figure.bars(table)
    assert [bar.get_hatch() or "" for bar in drawn.axes[0].patches] == ["", "///", "", "///"]
    assert drawn.axes[0].get_xlabel() == "hatched: doubt blind-beats-seeing"


def test_no_mark_is_cut_on_a_narrow_terminal_however_many_a_number_has():
    said = [f"reason {number}" for number in range(12)]
    attacks = [f"a{place}" for place in range(8)]
    conditions = [condition(each, attack=each, flags=said) for each in attacks]
    outcomes = {each: rows(first(360, 100)) for each in attacks}
    given = {
        "title": "x",
        "rows": ["defense"],
        "columns": {f"Column {each}": {"attack": each} for each in attacks},
    }
    text = shown(tables.cut(manifest(conditions, given), "T", outcomes.get, unexamined))
    grid = text[: text.index("Data digits")]
    assert "…" not in grid
    marks = re.findall(r"[¹²³⁴⁵⁶⁷⁸⁹⁰]+", grid)
    assert sorted(Counter(marks).values()) == [len(attacks)] * len(said)
