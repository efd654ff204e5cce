"""The template repository of `examples/ci`, from nothing to a red build: it does what its README says."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import junitparser
import pytest
import yaml
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"
OUTPUTS = ("junit.xml", "report.md", "report.json", "badge.json")


class Repository:
    """A copy of the template in a folder of its own, and the programs that run there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("data", "results", "__pycache__"))

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
        given = {**plain, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONHASHSEED": "0", **environment}
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.root,
            env=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def done(self, *words: str) -> str:
        ran = self.python(*words)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def bench(self, command: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inline = ("--executor", "inline") if command in ("run", "check") else ()
        return self.python("-m", "bench.cli", command, *words, *inline, **environment)

    def check(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        junit, markdown, report, badge = OUTPUTS
        asked = ("--junit", junit, "--markdown", markdown, "--json", report, "--badge", badge)
        return self.bench("check", "tasks.yaml", *asked, *words, **environment)

    def report(self) -> dict:
        return json.loads((self.root / "report.json").read_text())

    def pytest(self, *words: str) -> subprocess.CompletedProcess[str]:
        given = ("--robustness-baseline", "robustness", "-p", "no:cacheprovider")
        return self.python("-m", "pytest", *given, *words)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Return the template with a trained network and its baseline; half of its images, to be quick."""
    made = Repository(tmp_path_factory.mktemp("ci") / "repository")
    suite = made.root / "tasks.yaml"
    suite.write_text(suite.read_text().replace("split: test}", "split: test, size: 300}"))
    for script in ("data.py", "train.py"):
        made.done(script)
    for command in (["run", "tasks.yaml"], ["baseline", "save", "tasks.yaml", "--out", "robustness"]):
        ran = made.bench(*command)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return made


@pytest.fixture
def worse(repository: Repository) -> Iterator[Repository]:
    """Train without adversarial images, which is what the template's README breaks on purpose."""
    good = (repository.root / "weights.safetensors").read_bytes()
    repository.done("train.py", "--radius", "0")
    yield repository
    (repository.root / "weights.safetensors").write_bytes(good)


def test_equal_weights_are_held_whatever_the_shards_and_threads(repository: Repository) -> None:
    suite = repository.root / "tasks.yaml"
    written = suite.read_text()
    suite.write_text(written.replace("size: 300}", "size: 300, shard: 110}"))
    try:
        ran = repository.check(OMP_NUM_THREADS="2")
    finally:
        suite.write_text(written)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = repository.report()
    assert found["verdict"] == "held"
    assert len(found["findings"]) == 4
    assert [each["flips"] for each in found["findings"]] == [[]] * 4
    assert [each["loss"]["lost"] + each["loss"]["gained"] for each in found["findings"]] == [0] * 4
    assert found["replayed"]["flips"] == []

    # The plugin beside the model's own test; nothing is left to attack but under the template's own shards.
    ran = repository.pytest("-v", "tests", "robustness/baseline.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout
    assert "robustness/baseline.json::model, label, pgd (logits), digits, linf 0.1 PASSED" in ran.stdout
    assert "held: 3 of 3; advisory: 0 of 1 not held" in ran.stdout


def rounded(weights: Path, bits: int) -> None:
    """Round every matrix of a file of weights to so many bits."""
    found = load_file(weights)
    for name, values in found.items():
        if values.dim() > 1:
            scale = values.abs().max() / (2 ** (bits - 1) - 1)
            found[name] = (values / scale).round() * scale
    save_file(found, weights)


@pytest.mark.parametrize("harm", ["half the epochs", "three bits"])
def test_a_harm_that_nobody_meant_is_red(repository: Repository, harm: str) -> None:
    weights = repository.root / "weights.safetensors"
    good = weights.read_bytes()
    try:
        if harm == "three bits":
            rounded(weights, 3)
        else:
            repository.done("train.py", "--epochs", "4")
        ran = repository.check()
    finally:
        weights.write_bytes(good)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    worst = next(each for each in repository.report()["findings"] if each["subject"]["kind"] == "worst case")
    assert worst["verdict"] == "regressed"


def test_worse_weights_are_red_and_the_flipped_examples_are_named(worse: Repository) -> None:
    ran = worse.check(GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(worse.root / "summary.md"))
    assert ran.returncode == 1, ran.stdout + ran.stderr
    finding = next(
        each for each in worse.report()["findings"] if each["subject"]["name"].startswith("model, label, pgd")
    )
    assert finding["verdict"] == "regressed"
    flip = finding["flips"][0]
    cells = [
        flip["index"],
        flip["truth"],
        flip["attack"],
        flip["seed"],
        f"{flip['before']} -> {flip['after']}",
    ]
    name = finding["subject"]["name"]

    # The terminal.
    assert f"regressed: {name}" in ran.stdout
    assert re.search(r"\s+".join(map(re.escape, map(str, cells))), ran.stdout)
    # An annotation at the line of the task file that asks for the attack.
    lines = (worse.root / "tasks.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.startswith("  pgd:"))
    assert f"::error file=tasks.yaml,line={line},title=regressed" in ran.stdout
    # Markdown: the comment, and the summary of the step.
    row = "| " + " | ".join(str(each).replace("->", "-\\>") for each in cells)
    for page in ("report.md", "summary.md"):
        text = (worse.root / page).read_text()
        assert text.startswith("<!-- crossfire:tasks.yaml -->\n")
        assert row in text
    # JUnit.
    (suite,) = junitparser.JUnitXml.fromfile(str(worse.root / "junit.xml"))
    case = next(each for each in suite if each.name.startswith("pgd (logits)"))
    (result,) = case.result
    assert isinstance(result, junitparser.Failure)
    assert result.type == "regressed"
    assert " | ".join(map(str, cells)) in result.text
    # What is advisory regressed, too, and is only told of.
    square = next(each for each in suite if each.name.startswith("square"))
    assert [type(each) for each in square.result] == [junitparser.Skipped]
    assert json.loads((worse.root / "badge.json").read_text())["color"] == "red"

    # Replay: the stored images alone.
    ran = worse.check("--replay")
    assert ran.returncode in (1, 5), ran.stdout + ran.stderr
    assert worse.report()["replayed"]["flips"]
    assert worse.report()["replay_only"]

    # The plugin, in two processes that share one check.
    ran = worse.pytest("-n", "2")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert re.search(rf"FAILED robustness/baseline\.json::{re.escape(name)}", ran.stdout)
    assert " | ".join(map(str, cells)) in ran.stdout
    assert "Traceback" not in ran.stdout
    assert "1 xfailed" in ran.stdout
    assert re.search("regressed: 2 of 3; .*advisory: 1 of 1 not held", ran.stdout)
    ran = worse.pytest("--robustness-replay")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "replay alone: " in ran.stdout


def test_an_edited_baseline_and_no_suite_are_usage_errors_of_pytest(repository: Repository) -> None:
    index = repository.root / "robustness" / "baseline.json"
    written = index.read_text()
    index.write_text(written.replace("first baseline", "best baseline"))
    try:
        ran = repository.pytest()
    finally:
        index.write_text(written)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "edited by hand, or not whole" in ran.stderr
    assert "Traceback" not in ran.stderr

    ran = repository.pytest("--robustness-suite", "other.yaml")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "other.yaml: no such file; name the task file by --robustness-suite" in ran.stderr


def test_another_question_is_an_error_of_pytest_and_never_green(repository: Repository) -> None:
    suite = repository.root / "tasks.yaml"
    written = suite.read_text()
    suite.write_text(written.replace("radius: 0.1}", "radius: 0.05}"))
    try:
        ran = repository.pytest("robustness/baseline.json")
    finally:
        suite.write_text(written)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "3 errors" in ran.stdout or "4 errors" in ran.stdout
    assert "passed" not in ran.stdout
    assert "not comparable: radius: 0.1 in the baseline, 0.05 now" in ran.stdout


@pytest.mark.parametrize("name", [".github/workflows/robustness.yml", ".gitlab-ci.yml"])
def test_the_ci_files_name_what_the_template_has(name: str) -> None:
    text = (EXAMPLE / name).read_text()
    assert yaml.safe_load(text)
    assert "tasks.yaml" in text
    assert "robustness" in text
    for script in re.findall(r"python (\w+\.py)", text):
        assert (EXAMPLE / script).is_file()
