"""A check from a task file to its verdict: saved, edited, run again, replayed, compared."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import bench
from bench.api import checking, running
from bench.api.running import Options, Project
from bench.errors import InputError
from bench.gate import baseline
from bench.gate.compare import compare
from bench.gate.measurements import from_results
from bench.gate.replay import sampled
from bench.gate.verdicts import Check
from bench.registry import ATTACKS as REGISTERED
from bench.results import replays
from bench.results.replays import Replay
from bench.runner import executors
from bench.runner.craft import stored
from bench.runner.executors.protocol import Asked
from bench.suite.jobs import Starts
from bench.suite.policy import Policy
from suites import TASK, suite

INLINE = Options(executors.ready("inline", Asked(["cpu"])))
ATTACKS = {
    "clean": {"use": "none"},
    "pgd": {"use": "pgd", "steps": 3},
    "square": {"use": "square", "queries": 5},
}
FURTHER = {"norm": "linf", "radius": 0.2}
LONGER = {"use": "pgd", "steps": 4}
LINEAR = {"use": "toy/linear", "epochs": 3}
VIEWED = {**TASK, "views": ["logits"], "readouts": ["plain"]}


def project(folder: Path, linear: dict[str, Any] = LINEAR, **changes: Any) -> Project:
    """Write a task file and plan it; results go to a folder beside it."""
    attacks = changes.pop("attacks", ATTACKS)
    task = {**VIEWED, **changes.pop("task", {})}
    suite(folder, {"linear": linear}, attacks, [task], **changes)
    found = running.planned(folder / "suite.yaml", folder / "results", None)
    found.store.open()
    return found


def run(made: Project) -> Project:
    running.Run(made, INLINE).do()
    return made


def check(made: Project, **options: Any) -> Check:
    return checking.check(made, made.plan.suite.folder / "robustness", INLINE, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task file, its results and their baseline."""
    folder = tmp_path_factory.mktemp("saved")
    checking.save(run(project(folder)), folder / "robustness")
    return folder


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "home"))


def test_nothing_changed_is_held_and_runs_no_attack_again(home: Path) -> None:
    made = project(home)
    before = sorted((home / "results" / "train").iterdir())
    found = check(made)
    assert (found.verdict, found.status()) == ("held", 0)
    assert {each.subject.kind for each in found.findings} == {"condition", "worst case"}
    assert all(each.loss and each.loss.churn == 0 for each in found.findings)
    assert sorted((home / "results" / "train").iterdir()) == before
    replayed = found.replayed
    assert replayed is not None
    assert (replayed.flips, replayed.mended) == ((), 0)
    assert (replayed.images, replayed.examples) == (2 * 60, 60)
    assert found.lines is not None
    text = (home / "suite.yaml").read_text().splitlines()
    pgd = next(each for each in found.findings if each.subject.coordinates.get("attack") == "pgd")
    assert text[found.lines[pgd.subject.name] - 1].strip().startswith("pgd:")


def test_equal_weights_in_other_shards_are_held_without_a_flip(home: Path) -> None:
    text = (home / "suite.yaml").read_text()
    assert "shard: 25" in text
    (home / "suite.yaml").write_text(text.replace("shard: 25", "shard: 7"))
    made = running.planned(home / "suite.yaml", home / "other", None)
    made.store.open()
    found = check(made)
    assert found.verdict == "held"
    assert not any(each.flips for each in found.findings)
    assert sum(1 for _ in (home / "other" / "craft").iterdir()) > 9


def test_worse_weights_regress_and_replay_alone_sees_it(home: Path) -> None:
    made = project(home, {**LINEAR, "epochs": 3, "lr": 0.0})
    alone = check(made, replay_only=True)
    assert alone.replay_only
    assert alone.status() in (1, 5)
    assert alone.replayed is not None
    assert alone.replayed.flips
    found = check(made)
    assert (found.verdict, found.status()) == ("regressed", 1)
    worst = next(each for each in found.findings if each.subject.kind == "worst case")
    assert worst.verdict == "regressed"
    assert worst.flips
    assert worst.loss is not None
    assert len(worst.flips) == worst.loss.lost


def test_replay_runs_no_attack(home: Path) -> None:
    made = project(home, {**LINEAR, "lr": 0.4})
    check(made, replay_only=True)
    names = [json.loads(path.read_text()) for path in (home / "results" / "craft").glob("*/job.json")]
    new = [each for each in names if each["attack_run"].get("starts")]
    assert {each["attack_run"]["attack"]["use"] for each in new} == {"replay"}


def test_attacks_that_can_begin_at_stored_images_do(home: Path) -> None:
    check(project(home))
    jobs = [json.loads(path.read_text()) for path in (home / "results" / "craft").glob("*/job.json")]
    begun = [each["attack_run"]["attack"]["use"] for each in jobs if each["attack_run"].get("starts")]
    assert set(begun) == {"replay", "pgd"}


def test_what_stored_images_break_beyond_today_s_attacks_is_counted(tmp_path: Path) -> None:
    home = tmp_path
    # So short that going on from where it ended breaks more.
    short = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 1, "step_size": 0.03}}
    checking.save(run(project(home, attacks=short)), home / "robustness")
    found = check(project(home, attacks=short)).replayed
    assert found is not None
    # Independently: an example is broken where any evaluation of it has another label.
    own, stored_too = set[int](), set[int]()
    for path in (home / "results" / "evaluate").glob("*/job.json"):
        begun = json.loads(path.read_text())["attack_run"].get("starts") is not None
        rows = pd.read_parquet(path.parent / "outcomes.parquet")
        wrong = set(rows["index"][rows["label"] != rows["truth"]])
        (stored_too if begun else own).update(wrong)
    assert found.beyond == len(stored_too - own) > 0


def test_stored_images_are_shown_to_the_last_bit(home: Path) -> None:
    made = project(home)
    check(made)
    shown: dict[str, Any] = {}
    for path in (home / "results" / "craft").glob("*/job.json"):
        job = json.loads(path.read_text())
        run_, part = job["attack_run"], load_file(path.parent / "images.safetensors")
        name = (run_["attack"]["use"], run_.get("starts") is not None, tuple(job["slice"]))
        if run_["attack"]["use"] in ("pgd", "square", "replay"):
            shown.setdefault(str(name), []).append(part)
    pgd = [part for name, parts in shown.items() if name.startswith("('pgd', False") for part in parts]
    again = [part for name, parts in shown.items() if name.startswith("('replay'") for part in parts]
    for each in pgd:
        assert any(
            torch.equal(each["index"], other["index"])
            and torch.equal(each["moved"], other["moved"])
            and torch.equal(each["images"], other["images"])
            for other in again
        )


@pytest.mark.parametrize(
    ("changes", "said", "unasked"),
    [
        ({"attacks": {**ATTACKS, "pgd": LONGER}}, "attack.params.steps: 3 in the baseline, 4 now", {"pgd"}),
        ({"task": {"limit": 50}}, "n: 60 in the baseline, 50 now", set(ATTACKS)),
        ({"task": {"threat": FURTHER}}, "radius: 0.1 in the baseline, 0.2 now", set(ATTACKS)),
        ({"task": {"attacks": ["clean", "square"]}}, "nothing asks for it any more", set()),
    ],
)  # fmt: skip
def test_another_question_is_not_comparable(
    home: Path, changes: dict[str, Any], said: str, unasked: set[str]
) -> None:
    made = project(home, {**LINEAR, "lr": 0.4}, **changes)
    found = check(made)
    assert found.status() == 3
    assert said in {each.reason for each in found.findings}
    # Nothing is spent on what cannot be compared.
    done = {path.name for path in (home / "results" / "evaluate").iterdir()}
    asked = {each.job.key: each.coordinates["attack"] for each in made.plan.conditions}
    undone = {attack for key, attack in asked.items() if key not in done}
    assert undone == unasked


def test_other_examples_are_not_comparable(home: Path) -> None:
    text = (home / "suite.yaml").read_text()
    assert "split: test" in text
    (home / "suite.yaml").write_text(text.replace("split: test", "split: train"))
    found = check(running.planned(home / "suite.yaml", home / "results", None))
    assert found.status() == 3
    assert {each.reason for each in found.findings} == {"data: other examples than the baseline's"}


@pytest.mark.parametrize("alone", [True, False])
def test_a_defense_that_cannot_be_fitted_is_incomplete(home: Path, alone: bool) -> None:
    found = check(project(home, {**LINEAR, "fail": True}), replay_only=alone)
    assert found.status() == 4
    assert {each.verdict for each in found.findings} == {"incomplete"}
    assert found.replayed is not None
    assert found.replayed.images == 0


def test_a_shard_that_fails_is_incomplete(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = REGISTERED["square"]

    @wraps(entry.make)
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("asked to fail")

    monkeypatch.setitem(REGISTERED._entries, "square", replace(entry, make=fail))
    found = check(project(home, {**LINEAR, "lr": 0.4})).findings
    verdicts = {each.subject.coordinates.get("attack", "worst case"): each.verdict for each in found}
    assert verdicts["square"] == verdicts["worst case"] == "incomplete"


def test_compare_says_the_same_of_two_folders(home: Path) -> None:
    worse = project(home, {**LINEAR, "lr": 0.0})
    other = running.Project(worse.plan, type(worse.store)(home / "worse"), worse.manifest)
    other.store.open()
    run(other)
    found = compare(home / "results", home / "worse", Policy())
    assert found.status() == 1
    assert found.lines is None
    same = compare(home / "results", home / "results", Policy())
    assert same.verdict == "held"
    numbers = {each.subject.name: each.loss for each in check(worse).findings}
    assert numbers == {each.subject.name: each.loss for each in found.findings}


def test_two_folders_are_compared_without_torch() -> None:
    code = "import sys, bench.gate.compare, bench.gate.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_attack_with_invalid_moves_makes_no_baseline(tmp_path: Path) -> None:
    made = run(project(tmp_path, attacks={"clean": {"use": "none"}, "wild": {"use": "toy/invalid"}}))
    with pytest.raises(InputError, match=r"linear, plain, wild.*: \d+ moves could not be shown"):
        checking.save(made, tmp_path / "robustness")
    assert not (tmp_path / "robustness").exists()


def test_accepting_keeps_the_history_and_asks_for_a_reason(home: Path) -> None:
    made = project(home, {**LINEAR, "lr": 0.1})
    with pytest.raises(InputError, match="jobs to do before a baseline can be saved"):
        checking.accept(made, home / "robustness", "slower")
    run(made)
    with pytest.raises(InputError, match="--reason: expected why"):
        checking.accept(made, home / "robustness", "  ")
    with pytest.raises(InputError, match="there is a baseline already"):
        checking.save(made, home / "robustness")
    old = baseline.read(home / "robustness").history
    checking.accept(made, home / "robustness", "a slower\nrate")
    history = baseline.read(home / "robustness", replays=True).history
    assert history[0] == old[0]
    assert [each.reason for each in history] == ["the first baseline", "a slower rate"]
    assert history[1].numbers != history[0].numbers
    assert check(made).verdict == "held"


def test_a_baseline_reads_back_what_was_measured(home: Path) -> None:
    read = baseline.read(home / "robustness", replays=True).measurements.measured
    there = from_results(home / "results", home / "suite.yaml").measured
    assert read.keys() == there.keys()
    for place, each in there.items():
        other = read[place]
        assert (other.condition, other.question, other.network) == (
            each.condition,
            each.question,
            each.network,
        )
        assert other.flags == each.flags
        for name, values in other.rows.items():
            assert np.array_equal(values, each.rows[name], equal_nan=values.dtype.kind == "f"), name


@pytest.mark.parametrize("name", [baseline.INDEX, baseline.OUTCOMES, baseline.REPLAY])
def test_every_byte_of_a_baseline_counts(home: Path, name: str) -> None:
    path = home / "robustness" / name
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError):
            baseline.read(home / "robustness", replays=True)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError):
        baseline.read(home / "robustness", replays=True)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        baseline.read(home / "robustness", replays=True)


def test_a_newer_baseline_is_refused(home: Path) -> None:
    path = home / "robustness" / baseline.INDEX
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match=r"made by a newer Crossfire \(form 2, this one knows 1\); upgrade"):
        baseline.read(home / "robustness")


# --- stored images -----------------------------------------------------------------------------------


def images_of(n: int, moved: list[int]) -> Replay:
    mask = np.zeros(n, bool)
    mask[moved] = True
    draws = np.random.default_rng(0)
    return Replay(np.arange(n)[::-1].copy(), mask, draws.random((len(moved), 1, 4, 4), np.float32))


def test_a_limit_leaves_equally_many_first_examples_of_each_run() -> None:
    runs = {
        "a": images_of(100, list(range(100))),
        "b": images_of(100, list(range(0, 100, 2))),
        "c": images_of(5, [1]),
    }
    whole = sum(each.size for each in runs.values())
    assert {key: len(each.index) for key, each in sampled(runs, whole).items()} == {
        "a": 100,
        "b": 100,
        "c": 5,
    }
    half = sampled(runs, whole // 2)
    (n,) = {len(half["a"].index), len(half["b"].index)}
    assert sum(each.size for each in half.values()) <= whole // 2
    assert sum(each.first(n + 1).size for each in runs.values()) > whole // 2
    assert half["b"].images.shape[0] == (n + 1) // 2
    assert sampled(runs, 10) == {}
    assert sampled({}, 10) == {}


def test_stored_images_are_put_beside_their_examples(tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    kept = images_of(6, [0, 3, 4])
    path.write_bytes(replays.spelled({"run": kept}))
    x = torch.rand(4, 1, 4, 4)
    # Index 5 to 0 stand in this order; 0, 3 and 4 of it are stored.
    index = torch.tensor([5, 1, 4, 2])
    z = stored(Starts(path, "run", kept.digest), x, index)
    assert torch.equal(z[0], torch.from_numpy(kept.images[0]))
    assert torch.equal(z[1], torch.from_numpy(kept.images[2]))
    assert torch.equal(z[2], x[2])
    assert torch.equal(z[3], torch.from_numpy(kept.images[1]))
    with pytest.raises(InputError, match="of other examples"):
        stored(Starts(path, "run", kept.digest), x, torch.tensor([5, 1, 4, 9]))
    with pytest.raises(InputError, match="are not those that the baseline names"):
        stored(Starts(path, "run", "0" * 64), x, index)
    with pytest.raises(InputError, match="has no images of run other"):
        stored(Starts(path, "other", kept.digest), x, index)
    with pytest.raises(InputError, match="no such file"):
        stored(Starts(tmp_path / "nowhere", "run", kept.digest), x, index)


def test_replay_cannot_be_asked_for_by_hand() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(InputError, match="replay shows a baseline's images: bench check does"):
        bench.evaluate(model, x, y, attack="replay")


def test_stored_images_of_a_minimum_norm_attack_count_within_the_radius_alone(tmp_path: Path) -> None:
    attacks = {"clean": {"use": "none"}, "deepfool": {"use": "deepfool", "steps": 20}}
    task = {"threat": {"norm": "l2", "radius": 0.2}}
    checking.save(run(project(tmp_path, attacks=attacks, task=task)), tmp_path / "robustness")
    found = check(project(tmp_path, attacks=attacks, task=task), replay_only=True)
    assert found.replayed is not None
    # Every stored image breaks the network, and most of them lie further away than the radius.
    worst = next(each for each in found.findings if each.subject.kind == "worst case")
    assert worst.loss is not None
    assert worst.loss.before == worst.loss.after > 0.2
    assert found.replayed.flips == ()
