"""The composite action: its scripts, run with a `bench` and a `gh` that note what they are told."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checks_made import EVERYTHING

from bench.gate.render import to_markdown

ACTION = Path(__file__).parents[2] / ".github" / "actions" / "robustness"
STEPS = yaml.safe_load((ACTION / "action.yml").read_text())["runs"]["steps"]
NOTE = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.stdout.write(os.environ.get("ANSWER", ""))
sys.exit(int(os.environ.get("ENDS", "0")))
"""


class Shell:
    """A folder with programs that write down how they were called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "output"
        for name in ("bench", "gh", "python"):
            program = root / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(NOTE.format(python=sys.executable))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "NOTES": str(self.root / "notes"),
            "GITHUB_OUTPUT": str(self.output),
            "RUNNER_TEMP": str(self.root / "temp"),
            **environment,
        }
        return subprocess.run(
            ["bash", *words],
            cwd=self.root,
            env=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def notes(self) -> list[list[str]]:
        path = self.root / "notes"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def script(name: str) -> str:
    (found,) = (each["run"] for each in STEPS if each.get("name") == name)
    return found


def check(shell: Shell, **given: str) -> subprocess.CompletedProcess[str]:
    inputs = {
        "SUITE": "tasks.yaml",
        "BASELINE": "robustness",
        "RESULTS": "results/robustness",
        "REPLAY": "false",
        "ARGS": "",
    }
    # As GitHub starts bash.
    return shell.run("--noprofile", "--norc", "-eo", "pipefail", "-c", script("Check"), **{**inputs, **given})


def test_no_input_is_a_part_of_a_script() -> None:
    scripts = [each["run"] for each in STEPS if "run" in each]
    assert len(scripts) == 5
    assert not any("${{" in each for each in scripts)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0, "held"),
        (1, "regressed"),
        (2, "usage"),
        (3, "not comparable"),
        (4, "incomplete"),
        (5, "undecided"),
        (137, "stopped"),
    ],
)
def test_the_status_is_that_of_the_check(shell: Shell, status: int, verdict: str) -> None:
    assert check(shell, ENDS=str(status)).returncode == 0
    said = dict(line.split("=", 1) for line in shell.output.read_text().splitlines())
    assert said["status"] == str(status)
    assert said["verdict"] == verdict
    # The last step ends with it, when everything is written.
    assert STEPS[-1]["name"] == "Verdict"
    ended = shell.run("-e", "-c", script("Verdict"), STATUS=said["status"], VERDICT=said["verdict"])
    assert ended.returncode == status


def test_a_check_is_asked_for_all_its_forms(shell: Shell) -> None:
    check(shell, REPLAY="true", ARGS="--fail-on-gain\n\n--device=cpu\n")
    (words,) = shell.notes()
    report = shell.root / "temp" / "robustness-report"
    assert words == [
        "check",
        "--baseline=robustness",
        "--results=results/robustness",
        f"--junit={report}/junit.xml",
        f"--markdown={report}/report.md",
        f"--json={report}/report.json",
        f"--badge={report}/badge.json",
        "--replay",
        "--fail-on-gain",
        "--device=cpu",
        "--",
        "tasks.yaml",
    ]


def test_what_looks_like_a_command_is_a_word(shell: Shell) -> None:
    bad = "$(touch harm) `touch harm`; touch harm; \"' * --executor=inline"
    check(shell, SUITE=bad, BASELINE=bad, RESULTS=bad, ARGS=f"--x={bad}")
    (words,) = shell.notes()
    assert words[-1] == bad
    assert f"--baseline={bad}" in words
    assert f"--results={bad}" in words
    assert f"--x={bad}" in words
    assert not (shell.root / "harm").exists()


@pytest.mark.parametrize("package", ["", "crossfire-bench==1; $(touch harm)\n--no-deps"])
def test_what_is_installed_is_said_by_the_user_or_by_the_action(shell: Shell, package: str) -> None:
    (shell.root / "temp").mkdir()
    ran = shell.run("-e", "-c", script("Install"), PACKAGE=package, GITHUB_ACTION_PATH=str(ACTION))
    assert ran.returncode == 0, ran.stderr
    ((*words, last),) = shell.notes()
    assert words[:3] == ["-m", "pip", "install"]
    if package:
        assert Path(last).read_text() == f"{package}\n"
    else:
        assert (Path(last) / "pyproject.toml").is_file()
    assert not (shell.root / "harm").exists()


def report(shell: Shell, text: str) -> str:
    path = shell.root / "report.md"
    path.write_text(text)
    return str(path)


def comment(shell: Shell, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"GITHUB_REPOSITORY": "us/ours", "NUMBER": "7", **environment}
    return shell.run(str(ACTION / "comment.sh"), report(shell, text), **given)


def test_the_first_comment_is_made(shell: Shell) -> None:
    ran = comment(shell, to_markdown(EVERYTHING))
    assert ran.returncode == 0, ran.stderr
    look, write = shell.notes()
    assert look[:3] == ["api", "--paginate", "repos/us/ours/issues/7/comments?per_page=100"]
    assert write[:4] == ["api", "--method", "POST", "repos/us/ours/issues/7/comments"]
    assert f"body=@{shell.root}/report.md" in write


def test_a_comment_that_is_there_is_rewritten(shell: Shell) -> None:
    ran = comment(shell, to_markdown(EVERYTHING), ANSWER="11\n12\n")
    assert ran.returncode == 0, ran.stderr
    _, write = shell.notes()
    assert write[:4] == ["api", "--method", "PATCH", "repos/us/ours/issues/comments/11"]


@pytest.mark.parametrize("text", ["", "### Robustness: held\n"])
def test_nothing_is_written_where_there_is_no_report(shell: Shell, text: str) -> None:
    assert comment(shell, text).returncode == 1
    assert shell.notes() == []
