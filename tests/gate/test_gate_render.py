"""What a check looks like: the facts are in every format, and a stranger's text is only ever text."""

import io
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from checks_made import (
    EVERYTHING,
    GAIN,
    HELD,
    INCOMPLETE,
    OTHER,
    REGRESSED,
    REPLAYED,
    UNDECIDED,
    WORST,
    check,
    flips,
    loss,
    subject,
)
from hypothesis import given, settings
from hypothesis import strategies as some
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console

from bench.gate import render
from bench.gate.render import annotations, markdown, phrases
from bench.gate.statistics import Loss
from bench.gate.verdicts import STATUS, Check, Finding, Flip, Floor, Subject
from bench.quantities import DASH
from bench.report.render.words import MINUS

ONE_OF_EACH = [HELD, REGRESSED, UNDECIDED, INCOMPLETE, replace(OTHER, tier="critical")]

HOSTILE = [
    "[bold]a[/x]",
    "a|b\n| c |",
    "</details><script>alert(1)</script>",
    "::error file=x,line=1::you\r\n::stop-commands::x",
    "--> <img src=x>",
    "@octocat and #12",
    "100%25,x:y",
    "\x1b[31mred\x00\x0b\ud800\ufffe\u202eabc",
    "]]><a/>&amp;",
    "図" * 300,
    "x" * 5000,
    "e\u0301\u200d" * 40,
    "`*_~$\\<!--",
]

nasty = some.one_of(some.sampled_from(HOSTILE), some.text(some.characters(), max_size=120))


def printed(made: Check, width: int = 80, **options: bool) -> str:
    out = io.StringIO()
    # Markup is on, as in a console of rich's own.
    Console(file=out, width=width, color_system=None).print(render.to_text(made, **options))
    return out.getvalue()


def plain(text: str) -> str:
    """Return a printed text without its line breaks, so that a sentence is found however it was wrapped."""
    return " ".join(text.split())


def hostile(name: str, tier: str = "critical") -> Check:
    """Return a check in which everything that can be text is the given one."""
    who = Subject("condition", {"defense": name, "attack": name, "view": name, "data": name}, name)
    flip = Flip(1, 2, name, 3, 4, 5)
    broken = replace(REGRESSED, subject=who, reason=name, flips=(flip,), suspicious=(name,), tier=tier)
    unknown = replace(UNDECIDED, subject=who, reason=name, flips=(flip,))
    return check(
        broken,
        unknown,
        replace(HELD, subject=who),
        suite=name,
        before=name,
        after=name,
        notes=(name, name),
        lines={name: 7},
        replayed=replace(REPLAYED, flips=(flip,)),
    )


def read_html(text: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(text)


# --- numbers and words -------------------------------------------------------------------------------


@given(some.integers(0, 10**6), some.integers(1, 10**6), some.sampled_from([0.0, 0.01, 0.0025, 0.05]))
def test_a_printed_loss_is_on_the_side_of_the_tolerance_on_which_it_is(lost: int, n: int, tolerance: float):
    share = lost % (n + 1) / n
    said = float(phrases.beside(100 * share, 100 * tolerance).replace(MINUS, "-"))
    assert (said > 100 * tolerance) == (100 * share > 100 * tolerance) or abs(share - tolerance) < 1e-9
    assert said == pytest.approx(100 * share, abs=0.0500001)


def test_numbers_near_what_judges_them_have_more_digits():
    assert phrases.beside(1.02, 1) == "1.02"
    assert phrases.beside(0.98, 1) == "0.98"
    assert phrases.beside(1.0, 1) == "1.0"
    assert phrases.beside(4.44, 1) == "4.4"
    assert phrases.beside(-0.04, 1) == "0.0", "no minus sign before nothing"
    assert phrases.beside(-3.06, 1) == f"{MINUS}3.1"
    assert phrases.probability(0.0098, 0.01) == "0.0098"
    assert phrases.probability(0.54321, 0.01) == "0.543"
    assert phrases.probability(1e-30, 0.01) == "<0.0001"
    assert phrases.probability(2e-6, 1e-5) == "0.0000020"
    assert phrases.probability(1.234e-4, 0.01) == "0.00012"
    assert phrases.probability(0, 1e-5) == "<1e-06"
    assert phrases.probability(1.0, 0.01) == "1.000"
    assert phrases.probability(None, 0.01) == DASH


def test_what_is_too_long_ends_with_dots():
    assert phrases.brief("abcdefgh", 8) == "abcdefgh"
    assert phrases.brief("abcdefghi", 8) == "abcde..."
    assert phrases.brief("\x1b" * 3, 8) == "\\x1b\\..."


def test_settings_and_counts():
    assert phrases.points(0.01) == "1 point"
    assert phrases.points(0.0025) == "0.25 points"
    assert phrases.quantity(22.0) == "22"
    assert phrases.quantity(7 / 3) == "2.3"


def test_a_detectable_loss_is_rounded_up_and_never_down():
    assert phrases.detectable(replace(HELD, detectable=0.0201)) == "≥2.1"
    assert phrases.detectable(replace(HELD, detectable=0.07)) == "≥7.0"
    assert phrases.detectable(replace(HELD, detectable=None)) == ""


def test_the_headline_counts_every_verdict():
    assert phrases.headline(check(HELD)) == "held: 1 of 1"
    assert phrases.headline(EVERYTHING) == (
        "regressed: 2 of 6; incomplete: 1; undecided: 1; held: 2; suspicious: 1; advisory: 1 of 1 not held"
    )
    assert phrases.headline(check(HELD, replay_only=True)) == "replay alone: held: 1 of 1"
    assert phrases.headline(check(GAIN), fail_on_gain=True).startswith("regressed: ")


def test_findings_are_read_worst_first():
    advisory = replace(REGRESSED, subject=subject("fgsm"), tier="advisory")
    found = phrases.ordered(check(HELD, UNDECIDED, advisory, REGRESSED, INCOMPLETE, OTHER, GAIN))
    assert [each.verdict for each in found] == [
        *("regressed", "regressed", "not comparable", "incomplete", "undecided", "held", "held")
    ]
    assert found[0] is REGRESSED, "of one verdict the critical one"
    assert found[-1] is GAIN, "then the greater loss"


def test_a_floor_says_where_the_accuracy_is():
    assert (
        phrases.floor(Floor(0.6, 0.6, 0.7)) == "floor 60 %: held, the accuracy is between 60.0 % and 70.0 %"
    )
    below = phrases.floor(Floor(0.6, 0.5, 0.59999))
    assert below == "floor 60 %: not reached, the accuracy is between 50.0 % and 59.999 %"
    assert "undecided" in phrases.floor(Floor(0.6, 0.5, 0.65))


def test_answers_that_are_none_are_words():
    refused = Flip(1, 2, "pgd", 0, 2, 7, refused=(False, True))
    assert phrases.flip_cells(refused) == ("1", "2", "pgd", "0", "2 -> refused")
    assert phrases.flip_cells(Flip(1, 2, "pgd", 0, -1, 7))[-1] == "not finite -> 7"


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (HELD, "nothing to do"),
        (REGRESSED, 'bench baseline accept --reason "..."'),
        (UNDECIDED, "about 6200 decide it"),
        (replace(UNDECIDED, needed=None), "more examples may not decide it"),
        (INCOMPLETE, "bench run tasks.yaml"),
        (replace(OTHER, tier="critical"), "bench baseline save tasks.yaml --out robustness"),
        (OTHER, "critical to this check"),
        (GAIN, "before you trust a gain"),
    ],
)
def test_the_last_line_says_what_to_do(finding: Finding, said: str):
    last = phrases.next_step(check(finding))
    assert last.startswith("Next: ")
    assert said in last
    assert plain(printed(check(finding))).endswith(last)
    assert "bench" not in phrases.next_step(check(finding, lines=None)), "there is no baseline to accept"


def test_of_several_undecided_the_number_decides_those_it_can():
    near = replace(UNDECIDED, subject=subject("fgsm"), needed=None)
    far = replace(UNDECIDED, subject=subject("cw"), needed=9000)
    assert "about 9000 decide 2" in phrases.next_step(check(near, far, UNDECIDED))
    assert "about 9000 decide all" in phrases.next_step(check(far, UNDECIDED))


def test_a_gain_that_fails_is_not_called_held_anywhere():
    made = check(HELD, GAIN)
    assert made.status(fail_on_gain=True) == 1
    assert printed(made, fail_on_gain=True).startswith("regressed: ")
    assert "### Robustness: regressed" in render.to_markdown(made, fail_on_gain=True)
    assert json.loads(render.to_badge(made, fail_on_gain=True))["color"] == "red"
    assert ElementTree.fromstring(render.to_junit(made, fail_on_gain=True)).find(".//failure") is not None
    (line,) = render.to_annotations(made, "tasks.yaml", fail_on_gain=True)
    assert line.startswith("::error ")


# --- nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [check(), check(OTHER), check(replace(HELD, tier="advisory"))])
def test_without_a_critical_finding_nothing_is_green(made: Check):
    assert made.status() == STATUS["incomplete"]
    assert printed(made).startswith("incomplete: nothing critical was compared")
    assert "### Robustness: incomplete" in render.to_markdown(made)
    suite = ElementTree.fromstring(render.to_junit(made))
    assert [each.get("type") for each in suite.iter("error")] == ["incomplete"]
    badge = json.loads(render.to_badge(made))
    assert (badge["message"], badge["color"], badge["isError"]) == ("incomplete", "orange", True)
    assert render.to_annotations(made, "tasks.yaml")[0].startswith("::error ")
    assert json.loads(render.to_json(made, made.status()))["verdict"] == "incomplete"


# --- text --------------------------------------------------------------------------------------------


def test_the_text_has_every_number_of_a_finding():
    said = printed(check(REGRESSED))
    for each in ("500", "61.2", "56.8", "4.4", "2.4 to 7.3", "22", "<0.0001", "≥2.6", "regressed: 1 of 1"):
        assert each in said
    assert REGRESSED.reason in plain(said)


def test_the_text_shows_what_broke_up_to_a_limit():
    said = printed(check(replace(REGRESSED, flips=flips(57))))
    rows = re.findall(r"^ +(\d+) +(\d) +pgd \(e2e_last\) +0 +(\d) -> (\d)", said, re.M)
    expected = [(str(7 * i), str(i % 10), str(i % 10), str((i + 3) % 10)) for i in range(20)]
    assert rows == expected
    assert "and 37 more" in said
    assert "more" not in printed(check(replace(REGRESSED, flips=flips(20))))


def test_the_text_says_everything_else_that_is_known():
    said = plain(printed(EVERYTHING))
    for each in (
        "1024 images of 256 examples, as the baseline's attacks left them, shown again: 201",
        "14 are not",
        "3 examples that the baseline held against everything are broken now",
        "break 2 examples that today's own attacks do not break",
        "floor 60 %: not reached, the accuracy is between 47.4 % and 58.6 %",
        "About 6200 examples (now 500) would decide it",
        "not comparable, advisory: ",
        *GAIN.suspicious,
        *EVERYTHING.notes,
    ):
        assert each in said


def test_a_replay_speaks_of_the_stored_images_alone():
    made = check(HELD, replay_only=True, replayed=REPLAYED)
    assert phrases.REPLAY_ONLY in plain(printed(made))
    assert phrases.REPLAY_ONLY in render.to_markdown(made)
    assert "### Replay: held" in render.to_markdown(made)
    assert phrases.REPLAY_ONLY in render.to_junit(made)
    badge = json.loads(render.to_badge(made))
    assert (badge["message"], badge["color"]) == ("replay held", "blue")


@pytest.mark.parametrize("finding", ONE_OF_EACH)
def test_every_verdict_is_in_every_format(finding: Finding):
    made = check(finding)
    verdict = finding.verdict
    assert printed(made).startswith(f"{verdict}: 1 of 1")
    assert f"### Robustness: {verdict}\n" in render.to_markdown(made)
    assert json.loads(render.to_json(made, made.status()))["findings"][0]["verdict"] == verdict
    assert json.loads(render.to_badge(made))["message"].startswith(verdict)
    assert [verdict in each for each in render.to_annotations(made, "x")] == [True] * (verdict != "held")


@settings(max_examples=60, deadline=None)
@given(nasty)
@pytest.mark.parametrize("width", [80])
def test_no_line_is_wider_than_the_terminal(width: int, name: str):
    said = printed(hostile(name), width)
    assert max(map(cell_len, said.split("\n"))) <= width
    assert all(each.isprintable() or each == "\n" for each in said)


def test_large_numbers_fit_too():
    big = loss(10**7, 0.5, 1234567.5, 234567.5, low=-1.0, high=1.0, p=0.01000001)
    said = printed(check(replace(REGRESSED, loss=big, p=0.01000001, detectable=0.999, tier="advisory")))
    assert max(map(cell_len, said.split("\n"))) <= 80
    assert "10000000" in said
    assert "1234567.5" in said


def test_brackets_are_text():
    said = printed(hostile("[bold]a[/x] :warning:"))
    assert "[bold]a[/x] :warning:" in plain(said)


# --- Markdown ----------------------------------------------------------------------------------------


def test_the_marker_is_the_first_line_and_the_same_for_every_check_of_a_suite():
    first = {render.to_markdown(check(each)).split("\n")[0] for each in ONE_OF_EACH}
    assert first == {"<!-- crossfire:tasks.yaml -->"}


def test_the_markdown_is_a_table_with_every_finding():
    html = read_html(render.to_markdown(EVERYTHING))
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]
    assert [row[0] for row in rows] == [each.subject.name for each in phrases.ordered(EVERYTHING)]
    assert rows[0][1:] == [
        *("500<br>≥2.6", "61.2 -&gt; 56.8", "4.4<br>[2.4 to 7.3]", "22 / 0", "&lt;0.0001"),
        "<strong>regressed</strong>",
    ]
    assert html.count("<details>") == html.count("</details>") == 4
    assert "and 2 more" in html


@settings(max_examples=60, deadline=None)
@given(nasty)
def test_no_name_is_markup_and_none_calls_anyone(name: str):
    text = render.to_markdown(hostile(name))
    html = read_html(text)
    known = "h3|p|table|thead|tbody|tr|th|td|strong|ul|li|details|summary|sub|br"
    comment = re.match(r"<!-- crossfire:[^<>\n]* -->\n", html)
    assert comment is not None
    rest = html[comment.end() :]
    left = re.sub(rf'</?({known})( style="text-align:(left|right)")? ?/?>', "", rest)
    assert "<" not in left
    assert not re.search(r"@(?!&#8203;)\w", text[text.index("\n") :])
    assert rest.count("<details>") == rest.count("</details>") == 3


def many(n: int, name: str) -> Check:
    """Return a check of many findings, each with all that can be said of one."""
    who = [replace(subject(), name=f"{each} {name}") for each in range(n)]
    found = [
        replace(UNDECIDED, subject=each, reason=name, flips=flips(30, name), suspicious=(name,))
        for each in who
    ]
    return check(*found, notes=(name,) * n, suite=name, before=name, after=name)


@pytest.mark.parametrize("name", ["a", "@" * 3000, "\U00020000" * 3000, "&lt;" * 900, "\x00" * 3000])
@pytest.mark.parametrize("limit", [40_000, markdown.COMMENT, markdown.SUMMARY])
def test_the_markdown_never_outgrows_its_limit(name: str, limit: int):
    text = render.to_markdown(many(1500, name), limit=limit)
    assert len(text.encode()) <= limit < 2**20
    assert markdown._CUT in text
    assert "undecided: 1500 of 1500" in text
    assert phrases.next_step(check(UNDECIDED))[:10] in text, "the end is still there"
    assert text.count("<details>") == text.count("</details>")


def test_what_was_cut_is_counted():
    text = render.to_markdown(many(1500, "a"))
    rows = len(re.findall(r"^\| \d+ a \|", text, re.M))
    assert 50 < rows < 1500
    assert f"and {1500 - rows} more" in text
    assert markdown._CUT not in render.to_markdown(EVERYTHING)


def test_a_limit_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="39999 bytes is too small, expected at least 40000"):
        render.to_markdown(check(HELD), limit=39_999)


# --- JUnit -------------------------------------------------------------------------------------------


def cases(made: Check, **options: bool):
    suites = JUnitXml.fromstring(render.to_junit(made, **options).encode())
    (suite,) = suites
    return suite, list(suite)


def test_junitparser_reads_what_was_written():
    suite, found = cases(EVERYTHING)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (7, 3, 1, 1)
    kinds = {(each.classname, each.name): [type(result) for result in each.result] for each in found}
    assert kinds == {
        ("cnnf", "pgd (e2e_last)@linf 8/255, data=digits, readout=last"): [Failure],
        ("cnnf (worst case)", "worst case@linf 8/255, data=digits, readout=last"): [Failure],
        ("cnnf", "cw (e2e_last)@l2, data=digits, readout=last"): [Skipped],
        ("cnnf", "spsa (e2e_last)@linf 8/255, data=digits, readout=last"): [Error],
        ("cnnf", "apgd (e2e_last)@linf 8/255, data=digits, readout=last"): [Failure],
        ("cnnf", "clean@linf 8/255, data=digits, readout=last"): [],
        ("cnnf", "square (e2e_last)@linf 8/255, data=digits, readout=last"): [],
    }
    assert [each.result[0].type for each in found[:2]] == ["regressed", "regressed"]
    assert found[4].result[0].type == "undecided"
    assert found[2].result[0].message.startswith("advisory: not comparable: The settings differ")
    assert GAIN.suspicious[0] in found[-1].system_out


def test_the_message_of_a_failure_has_its_facts():
    (result,) = cases(check(REGRESSED))[1][0].result
    for each in (
        "n = 500",
        "61.2 % -> 56.8 %",
        "loss 4.4 points (99 % interval 2.4 to 7.3)",
        "tolerance 1 point",
        "lost 22, gained 0",
        "adjusted p <0.0001",
    ):
        assert each in result.message
        assert each in result.text
    assert "133 | 9 | pgd (e2e_last) | 0 | 9 -> 2\nand 2 more" in result.text


def test_advisory_findings_fail_nothing_and_are_told():
    made = check(HELD, *(replace(each, tier="advisory", subject=subject("cw")) for each in ONE_OF_EACH[1:]))
    suite, found = cases(made)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 0, 0, 4)
    told = [each.result[0].message for each in found if each.result]
    assert all(each.startswith("advisory: ") for each in told)
    assert "advisory: regressed: 22 of 500" in told[0]


def test_radii_at_which_one_attack_is_read_are_tests_of_their_own():
    at = subject("cw", radius=None)
    made = check(*(replace(HELD, subject=replace(at, radius=each)) for each in (0.5, 1.0)))
    assert [each.name for each in cases(made)[1]] == [
        f"cw (e2e_last)@linf {each}, data=digits, readout=last" for each in ("0.5", "1")
    ]


@settings(max_examples=60, deadline=None)
@given(nasty, some.sampled_from(["critical", "advisory"]))
def test_any_name_is_xml(name: str, tier: str):
    suite, found = cases(hostile(name, tier))
    assert suite.tests == len(found) == 3
    assert (suite.failures, suite.skipped) == ((2, 0) if tier == "critical" else (1, 1))
    if name.isprintable() and name.strip():
        assert f"data={name}" in found[0].name


# --- JSON --------------------------------------------------------------------------------------------

shares = some.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(nasty, shares, some.floats(allow_nan=True, allow_infinity=True), some.floats(-1, 1))
def test_the_json_gives_back_every_number(name: str, share: float, wild: float, low: float):
    found = Loss(n=3, before=share, after=share / 3, lost=share, gained=1 / 3, p=share, low=low, high=wild)
    flip = Flip(5, 2, name, 0, 2, -1, refused=(True, False))
    finding = Finding(
        Subject("condition", {"attack": name, "radius": math.inf}, name, radius=share),
        "undecided",
        name,
        loss=found,
        p=share,
        needed=7,
        detectable=low,
        floor=Floor(share, low, wild),
        suspicious=(name,),
        flips=(flip,),
    )
    made = check(finding, tolerance=share, alpha=share, replayed=replace(REPLAYED, flips=(flip,)))

    def refuse(token: str) -> None:
        raise AssertionError(token)

    text = render.to_json(made, 5)
    assert text.isascii()
    read = json.loads(text, parse_constant=refuse)
    (got,) = read["findings"]
    numbers = got["loss"]
    for key in Loss.__dataclass_fields__:
        value, back = getattr(found, key), number(numbers[key])
        assert back == value or (math.isnan(back) and math.isnan(value))
    assert (numbers["value"], numbers["churn"]) == (found.value, found.churn)
    assert [number(got["floor"][key]) for key in ("least", "low")] == [share, low]
    assert got["floor"]["verdict"] == Floor(share, low, wild).verdict
    assert (got["p"], got["needed"], got["detectable"], got["line"]) == (share, 7, low, 12)
    assert got["subject"]["coordinates"] == {"attack": name, "radius": "inf"}
    assert got["flips"] == read["replayed"]["flips"]
    assert Flip(**{**got["flips"][0], "refused": tuple(got["flips"][0]["refused"])}) == flip
    assert (read["status"], read["verdict"], read["tolerance"]) == (5, "undecided", share)


def number(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value


def test_the_json_has_all_flips_and_no_field_is_lost():
    made = check(replace(REGRESSED, flips=flips(57)), replayed=REPLAYED, notes=("a",))
    read = json.loads(render.to_json(made, 1))
    assert len(read["findings"][0]["flips"]) == 57
    assert set(read) == set(Check.__dataclass_fields__) - {"lines"} | {
        *("format", "status", "verdict", "suspicious")
    }
    assert set(read["findings"][0]) == {*Finding.__dataclass_fields__, "line"}
    assert json.loads(render.to_json(replace(made, lines=None), 1))["findings"][0]["line"] is None


# --- badge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message", "color"),
    [
        (check(HELD, replace(HELD, loss=loss(before=0.612, lost=0))), "held, worst 61.2 %", "brightgreen"),
        (check(HELD, REGRESSED), f"regressed {MINUS}4.4", "red"),
        (check(REGRESSED, replace(WORST, loss=loss(lost=60))), f"regressed {MINUS}12.0", "red"),
        (check(HELD, replace(WORST, loss=None)), "regressed", "red"),
        (check(HELD, UNDECIDED), "undecided", "yellow"),
        (check(HELD, replace(OTHER, tier="critical")), "not comparable", "lightgrey"),
        (check(HELD, INCOMPLETE), "incomplete", "orange"),
        (check(HELD, GAIN), "held, suspicious", "yellow"),
        (check(HELD, replace(REGRESSED, tier="advisory")), "held, worst 98.4 %", "brightgreen"),
    ],
)
def test_the_badge(made: Check, message: str, color: str):
    badge = json.loads(render.to_badge(made))
    assert badge == {
        "schemaVersion": 1,
        "label": "robustness",
        "message": message,
        "color": color,
        "isError": made.status() != 0,
    }


# --- annotations -------------------------------------------------------------------------------------


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """Read a workflow command as GitHub's runner does (ActionCommand.TryParseV2, with its escapes)."""
    head, message = line.removeprefix("::").split("::", 1)
    level, _, listed = head.partition(" ")
    pairs = dict(each.split("=", 1) for each in listed.split(","))
    return level, {key: unescaped(each) for key, each in pairs.items()}, unescaped(message)


def unescaped(text: str) -> str:
    signs = {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"}
    return re.sub("|".join(signs), lambda found: signs[found[0]], text)


def test_annotations_point_at_the_line_that_asked():
    found = [parsed(each) for each in render.to_annotations(EVERYTHING, "suites/tasks.yaml")]
    assert [(level, at["line"]) for level, at, _ in found] == [
        *(("error", "14"), ("error", "18"), ("error", "17")),
        *(("warning", "15"), ("warning", "13"), ("warning", "16")),
    ]
    assert {at["file"] for _, at, _ in found} == {"suites/tasks.yaml"}
    assert found[0][1]["title"] == f"regressed: {REGRESSED.subject.name}"
    assert [message for *_, message in found] == [
        *(each.reason for each in (REGRESSED, WORST, INCOMPLETE, OTHER, UNDECIDED)),
        *GAIN.suspicious,
    ]
    assert "line" not in parsed(render.to_annotations(check(REGRESSED, lines=None), "x")[0])[1]


@settings(max_examples=60, deadline=None)
@given(nasty)
def test_no_name_ends_a_workflow_command(name: str):
    lines = render.to_annotations(hostile(name), f"a,b:c/{name}")
    assert all(each.isprintable() for each in lines)
    found = [parsed(each) for each in lines]
    assert [(level, set(at)) for level, at, _ in found] == [
        *(("error", {"file", "line", "title"}), ("warning", {"file", "line", "title"})),
        ("warning", {"file", "line", "title"}),
    ]
    assert {at["line"] for _, at, _ in found} == {"7"}
    if name.isprintable() and 0 < len(name) < 150:
        assert all(at["file"] == f"a,b:c/{name}" for _, at, _ in found)
        assert found[0][2] == name
        assert found[0][1]["title"] == f"regressed: {name}"


@pytest.mark.parametrize(("n", "rest"), [(10, None), (11, "2 more"), (37, "28 more")])
def test_github_shows_ten_and_the_last_counts_the_rest(n: int, rest: str | None):
    wrong = [replace(REGRESSED, subject=subject(f"a{each}")) for each in range(n)]
    unknown = [replace(UNDECIDED, subject=subject(f"b{each}")) for each in range(n)]
    lines = render.to_annotations(check(*wrong, *unknown), "tasks.yaml")
    for level in ("error", "warning"):
        ours = [each for each in lines if each.startswith(f"::{level} ")]
        assert len(ours) == annotations.MOST
        assert ours[-1].endswith(f"::{rest} {level}s are in the report.") == (rest is not None)
