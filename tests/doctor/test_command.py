"""`bench doctor`: what it prints, how it ends, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.api import doctoring, running
from bench.runner.context import WorkerContext
from bench.runner.examine import sights

SUITE = """
data: {d: {name: digits, size: 60, resize: 16}}
defenses:
  sound:
    {use: standard, net: smallcnn, width: 0.25, epochs: 8, batch: 64, augment: false, lr: 0.05, warmup: 0}
  hidden: {use: module, build: "mynet:hidden"}
  unasked: {use: module, build: "mynet:hidden"}
attacks: {clean: {use: none}, fgsm: {use: fgsm}}
tasks: [{data: d, threat: {norm: linf, radius: 0.1}, defenses: [sound, hidden], attacks: [clean, fgsm]}]
"""

NETWORK = '''
"""A network whose answers are one-hot: no gradient leads anywhere."""
import torch
from sklearn.datasets import load_digits
from torch import nn


class Nearest(nn.Module):
    def __init__(self):
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        means = [images[labels == label].mean(0) / 16 for label in range(10)]
        self.register_buffer("means", torch.tensor(means, dtype=torch.float32))

    def forward(self, x):
        scores = -torch.cdist(nn.functional.avg_pool2d(x, 2).flatten(1), self.means.to(x.dtype))
        return nn.functional.one_hot(scores.argmax(1), 10) + 0 * scores


def hidden():
    return Nearest()
'''


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BENCH_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "bench.cli", *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task file whose defenses are trained."""
    home = tmp_path_factory.mktemp("doctor")
    (home / "suite.yaml").write_text(SUITE)
    (home / "mynet.py").write_text(NETWORK)
    done = bench(home, "run", "suite.yaml", "--executor", "inline")
    assert done.returncode == 0, done.stderr
    return home


def test_a_hidden_defense_is_told_from_a_sound_one(folder: Path) -> None:
    done = bench(folder, "doctor", "suite.yaml", "--images", "24")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    heads = [line for line in lines if line.startswith(("sound/label", "hidden/label"))]
    assert len(heads) == 2
    said = done.stdout.partition("hidden/label")[2]
    (row,) = [line for line in said.splitlines() if line.startswith(" alarm  not-uphill")]
    assert row.rstrip() == " alarm  not-uphill               attack a view whose gradient leads uphill"
    assert all(len(line) <= 80 for line in lines if not line.startswith("    "))
    assert "alarm" not in done.stdout.partition("sound/label")[2].partition("hidden/label")[0]


def test_json_has_everything_and_one_defense_can_be_asked_for(folder: Path) -> None:
    done = bench(folder, "doctor", "suite.yaml", "--defense", "sound", "--json", "--images", "24")
    (found,) = json.loads(done.stdout)["defenses"]
    assert (found["defense"], found["readout"], found["norm"], found["radius"]) == (
        *("sound", "label", "linf"),
        0.1,
    )
    tests = {each["test"]: each for each in found["findings"]}
    assert tests["process"]["level"] == "quiet"
    assert tests["uphill"]["message"].endswith("24, 24, 24 of 24 images (radius / 64, 16, 4)")
    # FGSM alone left what a longer attack breaks, or not: the status says which.
    heavy = [each for each in found["findings"] if each["level"] in ("doubt", "alarm")]
    assert done.returncode == bool(heavy)
    assert {each["code"] for each in heavy} <= {"stronger-attack"}


def test_stored_attacks_of_the_same_threat_are_used_where_they_are(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    project = running.planned(tmp_path / "copy" / "suite.yaml", tmp_path / "copy" / "results" / "suite", None)
    sound, hidden = doctoring.cases(project, None, 40)
    assert (sound.title, hidden.title) == ("sound/label", "hidden/label")
    assert [(each.use, each.params) for each in sound.job.views] == [("logits", {})]
    fgsm = {
        each.coordinates["defense"]: project.store.outcomes(each.job.key)
        for each in project.plan.conditions
        if each.coordinates["attack"] == "fgsm"
    }
    for case in (sound, hidden):
        rows = fgsm[case.defense]
        right = [label == truth for label, truth in zip(rows["label"], rows["truth"], strict=True)][:40]
        # What was wrong before any attack is not held either.
        assert case.held is not None
        assert sum(case.held) > 0
        assert all(right[row] for row, held in enumerate(case.held) if held)
    assert all(sight.entry.name == "logits" for sight in sights(hidden.job))
    shutil.rmtree(tmp_path / "copy" / "results" / "suite" / "evaluate")
    assert [case.held for case in doctoring.cases(project, ["hidden"], 40)] == [None]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--defense", "hiden"], "--defense: unknown defense 'hiden'; did you mean 'hidden'?"),
        (
            ["--defense", "unasked"],
            "suite.yaml: no task attacks unasked, so that there is nothing to examine",
        ),
        (["--results", "nowhere"], "nowhere: there is no such results folder"),
    ],
)
def test_what_cannot_be_examined_is_refused(folder: Path, words: list[str], said: str) -> None:
    done = bench(folder, "doctor", "suite.yaml", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_one_that_cannot_be_examined_is_named_and_the_others_are(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    # Its code has changed since it was built, to what raises.
    (tmp_path / "copy" / "mynet.py").write_text(NETWORK.replace("return Nearest()", "raise OSError('gone')"))
    project = running.planned(folder / "suite.yaml", folder / "results" / "suite", None)
    sound, hidden = doctoring.cases(project, None, 24)
    context = WorkerContext(folder / "results" / "suite", tmp_path / "copy", None, "cpu", {})
    found = list(doctoring.examined([sound, hidden], context, images=24, limit=5))
    assert [each.findings.failed for each in found] == [False, True]
    assert found[0].findings.untested != ("examination",)
    (said,) = found[1].findings.found
    assert said.message


def test_what_is_not_trained_is_named_with_the_command(folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    done = bench(folder, "doctor", "suite.yaml", "--results", "empty")
    assert done.returncode == 2
    assert "sound (" in done.stderr
    assert "hidden (" in done.stderr
    assert "bench run suite.yaml" in done.stderr
