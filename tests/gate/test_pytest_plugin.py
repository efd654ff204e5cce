"""The pytest plugin: what becomes of each verdict, what it refuses, and that unasked it costs nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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
    check,
)

from bench import pytest_plugin
from bench.errors import InputError
from bench.gate.verdicts import Subject
from bench.pytest_plugin import Gate, answers_of, heard
from bench.suite.places import results_folder

TEST = "def test_one():\n    pass\n"
LOOKS = """
import sys


def pytest_sessionfinish():
    heavy = {"torch", "numpy", "scipy", "pandas", "pyarrow", "filelock"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""


def ran(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_every_verdict_has_its_outcome() -> None:
    found = answers_of(EVERYTHING).tests
    outcomes = {each.subject.name: found[each.subject.name][0] for each in EVERYTHING.findings}
    assert outcomes == {
        HELD.subject.name: "passed",
        UNDECIDED.subject.name: "failed",
        REGRESSED.subject.name: "failed",
        OTHER.subject.name: "advisory",
        GAIN.subject.name: "passed",
        INCOMPLETE.subject.name: "error",
        EVERYTHING.findings[-1].subject.name: "failed",
    }


def test_what_is_not_comparable_is_an_error_and_no_skip() -> None:
    other = replace(OTHER, tier="critical")
    outcome, said = answers_of(check(HELD, other)).tests[other.subject.name]
    assert outcome == "error"
    assert said.startswith("not comparable: The settings differ: steps was 40 and is 20.")


def test_a_gain_fails_where_it_is_asked_to() -> None:
    assert answers_of(check(GAIN)).tests[GAIN.subject.name][0] == "passed"
    outcome, said = answers_of(check(GAIN), fail_on_gain=True).tests[GAIN.subject.name]
    assert outcome == "failed"
    assert "A gain of 10.0 points" in said
    advisory = replace(GAIN, tier="advisory")
    assert answers_of(check(HELD, advisory), fail_on_gain=True).tests[GAIN.subject.name][0] == "passed"


def test_nothing_critical_is_never_green() -> None:
    found = answers_of(check(replace(HELD, tier="advisory")))
    assert found.tests[HELD.subject.name][0] == "error"
    assert found.tests[HELD.subject.name][1].startswith("incomplete: nothing critical was compared")


def test_a_failure_has_the_facts_and_the_first_flips() -> None:
    said = answers_of(EVERYTHING).tests[REGRESSED.subject.name][1]
    assert said.startswith(f"regressed: {REGRESSED.reason}\n")
    assert "lost 22, gained 0" in said
    assert "\n7 | 1 | pgd (e2e_last) | 0 | 1 -> 4\n" in said
    assert said.endswith("and 2 more")


def test_the_summary_tells_of_replay_warnings_and_what_to_do() -> None:
    lines = answers_of(EVERYTHING).summary
    assert lines[0].startswith("regressed: 2 of 6")
    assert any(line.startswith(f"warning: {GAIN.subject.name}: A gain") for line in lines)
    assert "  7 | 1 | pgd (e2e_last) | 0 | 1 -> 4" in lines
    assert lines[-1].startswith("Next: look at what broke")
    assert (
        pytest_plugin.answers_of(check(HELD, replayed=REPLAYED, replay_only=True))
        .summary[2]
        .startswith("Only stored adversarial images")
    )


def test_without_its_option_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(TEST)
    (tmp_path / "conftest.py").write_text(LOOKS)
    found = ran(tmp_path, "-s")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "crossfire" in found.stdout, "the entry point is not installed: pip install -e ."
    assert "heavy: []" in found.stdout


def test_without_a_baseline_pytest_ends_with_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(TEST)
    found = ran(tmp_path, "--robustness-baseline", "robustness")
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "robustness/baseline.json: no such file; save one after a run with" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("option", ["--robustness-replay", "--robustness-suite=tasks.yaml"])
def test_an_option_that_would_check_nothing_is_a_usage_error(tmp_path: Path, option: str) -> None:
    (tmp_path / "test_one.py").write_text(TEST)
    found = ran(tmp_path, option)
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{option.partition('=')[0]}: checks nothing without a baseline" in found.stderr


def test_a_finding_that_no_test_stands_for_is_heard_by_all() -> None:
    floor = replace(INCOMPLETE, subject=Subject("worst case", {"defense": "model"}, "model, floor of 20 %"))
    found = answers_of(check(HELD, floor))
    names = [HELD.subject.name]
    outcome, said = heard(found, names).tests[HELD.subject.name]
    assert outcome == "error"
    assert said.startswith("incomplete: ")
    assert heard(found, [*names, floor.subject.name]) == found
    assert heard(answers_of(check(HELD)), names).tests[HELD.subject.name][0] == "passed"


def test_subjects_of_one_name_are_answered_by_the_worse() -> None:
    other = replace(REGRESSED, subject=replace(REGRESSED.subject, name=HELD.subject.name))
    for pair in ((HELD, other), (other, HELD)):
        assert answers_of(check(*pair)).tests[HELD.subject.name][0] == "failed"


@pytest.mark.parametrize(
    ("key", "option", "expected"),
    [
        ("", None, "results/mine"),
        ("results: ../kept/there\n", None, "kept/there"),
        ("results: ../kept/there\n", "elsewhere", "elsewhere"),
    ],
    ids=["usual", "the file's", "the option's"],
)
def test_results_lie_where_a_run_leaves_them(
    key: str, option: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that looked elsewhere would compute everything once more."""
    suite = tmp_path / "suites" / "mine.yaml"
    suite.parent.mkdir()
    suite.write_text(f"{key}data:\n  digits: {{name: digits, split: test}}\n")
    options = {"baseline": "robustness", "suite": "suites/mine.yaml", "results": option}
    config = SimpleNamespace(
        invocation_params=SimpleNamespace(dir=tmp_path),
        args=[],
        getoption=lambda name: options.get(name.removeprefix("robustness_")),
    )
    asked: list[Path] = []

    def planned(path: Path, results: Path | None, _: Path | None) -> None:
        asked.append(results_folder(path, results))
        raise InputError("that is all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.api.running.planned", planned)
    monkeypatch.setattr(Gate, "_read", lambda _: SimpleNamespace(suite="suites/mine.yaml"))
    monkeypatch.setattr(pytest_plugin, "_names", lambda _, replay: ["model"])
    assert Gate(cast(Any, config)).answers().error == "that is all"
    assert asked == [Path(expected)]
