"""The recipes for clusters are what they say: options that exist, and files that are read as meant."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from bench import cli

slurm = pytest.importorskip("bench.runner.executors.slurm")

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
COMMANDS = [
    shlex.split(line.removeprefix("$ "))
    for text in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", "").splitlines()
]
FILES = {
    head: yaml.safe_load(body)
    for head, body in re.findall(r"^```yaml\n# file: (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}


def parsed(words: list[str]) -> Any:
    """Return the parameters that a command of `bench` gets; wrong ones raise."""
    group: Any = typer.main.get_command(cli.app)
    command = group.commands[words[1]]
    return command.make_context(words[1], list(words[2:])).params


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_have_options_that_there_are(words: list[str]) -> None:
    assert words[0] == "bench"
    for each in parsed(words).get("slurm") or ():
        slurm._setting(each)


def test_parameters_of_slurm_in_the_text_are_submitits() -> None:
    (text,) = re.findall(r"is any parameter that submitit knows: (.*?)\. `time`", PAGE, re.DOTALL)
    named = [each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", text)]
    assert len(named) == 9
    for each in named:
        (word,) = shlex.split(each)
        slurm._setting(word if "=" in word else f"{word}=1")


def test_the_indexed_job_starts_workers_that_may_end_cleanly() -> None:
    job = FILES["workers.yaml"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"
    assert pod["terminationGracePeriodSeconds"] >= slurm.GRACE
    (container,) = pod["containers"]
    assert parsed(container["command"])["results"] == Path("results/tasks")
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounted == {pod["volumes"][0]["name"]: container["workingDir"]}
    (text,) = re.findall(r"^# file: workers.yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(text.splitlines()) <= 10


def test_the_task_of_skypilot_runs_where_its_bucket_is() -> None:
    task = FILES["sky.yaml"]
    assert set(task) == {"resources", "file_mounts", "workdir", "setup", "run"}
    (mounted,) = task["file_mounts"]
    assert str(parsed(shlex.split(task["run"]))["results"]).startswith(f"{mounted}/")
