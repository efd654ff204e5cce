"""One attack of a row raises in worst mode: a hole in its column, and the worst case over the others."""

import json
import os
import signal
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bench
from bench import cli
from bench.api import running
from bench.results.manifest import Outcomes
from bench.results.metrics import is_correct
from bench.results.outcomes import Stored
from bench.runner.interrupts import Terminated, terminable
from suites import TASK, Ran, suite

OTHERS: dict[str, Any] = {
    "still": {"use": "none"},
    "step": {"use": "fgsm"},
    "walk": {"use": "pgd", "steps": 3, "loss": "margin"},
    "search": {"use": "square", "queries": 10},
}
BROKEN: dict[str, Any] = {**OTHERS, "crash": {"use": "toy/crash"}}
ASKED = {**TASK, "readouts": ["plain"], "views": ["logits"]}


def table(attacks: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "Attacks",
        "rows": ["defense", "readout"],
        "columns": {name: {"attack": name} for name in attacks},
        "extra": ["Worst"],
    }


def written(folder: Path, attacks: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    linear, tables = {"linear": {"use": "toy/linear"}}, {"T": table(attacks)}
    return suite(folder, linear, attacks, [ASKED], **{"tables": tables, **more})


def ran(folder: Path, attacks: dict[str, Any], *, worst: bool, **more: Any) -> bench.Finished:
    path = written(folder, attacks, **more)
    return bench.run(path, results=folder / f"worst-{worst}", executor="inline", worst=worst)


def details(finished: bench.Finished) -> pd.DataFrame:
    frame = finished.tables["T"].details()
    return frame.set_index(frame["column"].str.removesuffix(", of those that stood"))


def broken(folder: Path, *, worst: bool) -> set[int]:
    """Return the examples that any evaluation of a results folder has an attack break."""
    root = folder / f"worst-{worst}"
    plan = running.planned(folder / "suite.yaml", root, None, worst=worst).plan
    frames = [Outcomes(root)(key) for key in {each.job.key for each in plan.conditions}]
    every = pd.concat([frame.frame() for frame in frames if isinstance(frame, Stored)])
    return set(every["index"][~is_correct(every)])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bench.Finished, bench.Finished]:
    folder = tmp_path_factory.mktemp("raised")
    return folder, ran(folder, BROKEN, worst=False), ran(folder, BROKEN, worst=True)


def test_the_row_has_the_worst_case_of_a_full_crossing_over_the_others(both: Any) -> None:
    folder, full, worst = both
    assert full.failed
    assert not worst.failed
    assert worst.holes == full.holes == 1
    one, other = details(full), details(worst)
    assert broken(folder, worst=True) == broken(folder, worst=False)
    assert other.loc["Worst", "value"] == one.loc["Worst", "value"] < one.loc["still", "value"]
    assert other.loc["Worst", "n"] == one.loc["Worst", "n"] == 60
    assert other.loc["Worst", "bound"] == one.loc["Worst", "bound"] == "≤"
    assert "without crash (not run)" in other.loc["Worst", "note"]


def test_its_column_is_a_hole_with_the_reason_and_no_number_hides_it(both: Any) -> None:
    _, full, worst = both
    one, other = details(full), details(worst)
    for frame in (one, other):
        assert pd.isna(frame.loc["crash", "value"])
        assert frame.loc["crash", "note"].startswith("not run")
    stood = round(60 * other.loc["still", "value"] / 100)
    count = int(other.loc["crash", "note"].split()[5])
    assert "it raised on" in other.loc["crash", "note"]
    assert other.loc["search", "n"] <= count <= stood
    said = f"crash (logits) raised on {count} of 60 examples"
    for name in ("crash", "Worst"):
        assert "attack-raised" in other.loc[name, "flags"]
    for name in ("still", "step", "walk", "search"):
        assert "attack-raised" not in (other.loc[name, "flags"] or "")
    assert said in worst.tables["T"].to_markdown()


def test_its_rows_its_cost_and_its_rate_are_nobody_s(both: Any) -> None:
    from bench.report import attack_cost
    from bench.results.manifest import read
    from bench.results.store import Store

    folder, _, _ = both
    root = folder / "worst-True"
    frame = bench.outcomes(root)
    assert set(frame.attack) == set(OTHERS)
    assert any("crash" in each and "it raised on" in each for each in frame.attrs["notes"])
    store = Store(root)
    manifest = read(root, folder / "suite.yaml")
    costs = attack_cost.spent(manifest, Outcomes(root), lambda key: store.receipt("evaluate", key))
    assert {each.at["attack"] for each in costs} == set(OTHERS) - {"still"}
    (told,) = [
        json.loads(each.read_text())["members"]
        for each in (root / "evaluate").glob("*/receipt.json")
        if "members" in each.read_text()
    ]
    assert told["toy/crash"]["kills"] == 0
    assert told["toy/crash"]["raised"] > 0
    assert "raised" not in told["fgsm"]


def test_the_message_is_told_and_kept_and_the_run_says_that_a_number_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Ran(written(tmp_path, BROKEN, worst=True))
    assert not found.failed
    notes = [each["note"] for each in found.said if "note" in each]
    assert any(
        "toy/crash raised, and" in each and "ValueError: the attack is broken" in each for each in notes
    )
    kept = [json.loads(each.read_text()) for each in (tmp_path / "results" / "craft").glob("*/receipt.json")]
    assert sum(bool(each["notes"]) for each in kept) == 3
    words = ["bench", "run", str(tmp_path / "suite.yaml"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*words, "--executor", "inline"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    assert "1 cell of those that were asked for have no number" in capsys.readouterr().out


def test_what_raised_on_some_shards_alone_is_a_hole_and_what_it_broke_elsewhere_is_broken(
    tmp_path: Path,
) -> None:
    # Shards of 25, 25 and 10: the last is too few for it, also where it is the first to see them.
    attacks = {"still": OTHERS["still"], "picky": {"use": "toy/picky"}, "search": OTHERS["search"]}
    full, worst = (ran(tmp_path / "some", attacks, worst=mode) for mode in (False, True))
    sound = {**attacks, "picky": {"use": "toy/picky", "least": 0}}
    truth = ran(tmp_path / "sound", sound, worst=False)
    value = {name: details(each).loc["Worst", "value"] for name, each in
             (("full", full), ("worst", worst), ("truth", truth))}  # fmt: skip
    assert value["truth"] <= value["worst"] <= value["full"]
    assert broken(tmp_path / "some", worst=False) < broken(tmp_path / "some", worst=True)
    assert broken(tmp_path / "some", worst=True) <= broken(tmp_path / "sound", worst=False)
    found = details(worst)
    assert pd.isna(found.loc["picky", "value"])
    assert 0 < int(found.loc["picky", "note"].split()[5]) <= 10
    assert found.loc["Worst", "bound"] == "≤"


def test_a_column_of_some_attacks_counts_what_these_left_where_another_one_raised(tmp_path: Path) -> None:
    columns = {"Two": {"attack": ["step", "walk"]}, "With": {"attack": ["step", "crash"]}}
    tables = {"T": {**table(BROKEN), "columns": columns, "extra": []}}
    found = details(ran(tmp_path, BROKEN, worst=True, tables=tables))
    plain = details(ran(tmp_path / "plain", OTHERS, worst=True, tables={"T": {
        **tables["T"], "columns": {"Two": columns["Two"], "With": {"attack": "step"}},
    }}))  # fmt: skip
    assert found.loc["Two", ["value", "n"]].tolist() == plain.loc["Two", ["value", "n"]].tolist()
    assert found.loc["With", ["value", "n"]].tolist() == plain.loc["With", ["value", "n"]].tolist()
    assert found.loc["With", "bound"] == "≤"
    assert pd.isna(found.loc["Two", "bound"]) or found.loc["Two", "bound"] == ""
    assert "attack-raised" in found.loc["With", "flags"]


def test_where_every_attack_raises_the_job_fails_and_nothing_looks_robust(tmp_path: Path) -> None:
    attacks = {
        "still": OTHERS["still"],
        "crash": {"use": "toy/crash"},
        "picky": {"use": "toy/picky", "least": 99},
    }
    found = ran(tmp_path, attacks, worst=True)
    assert found.failed
    frame = details(found)
    assert frame.loc[["crash", "picky", "Worst"], "value"].isna().all()
    assert frame.loc["still", "value"] > 0


@pytest.mark.parametrize("order", list(permutations(["fgsm", "toy/crash", "square"])), ids="-".join)
def test_a_sequence_of_the_file_is_a_bound_that_names_who_raised(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    members = {"fgsm": {"use": "fgsm"}, "square": OTHERS["search"], "toy/crash": {"use": "toy/crash"}}
    of = [members[name] for name in order]
    attacks = {
        "it": {"use": "sequence", "of": of},
        "sound": {"use": "sequence", "of": [each for each in of if each["use"] != "toy/crash"]},
    }
    found = ran(tmp_path, attacks, worst=False)
    frame = details(found)
    assert frame.loc["it", ["value", "n"]].tolist() == frame.loc["sound", ["value", "n"]].tolist()
    assert frame.loc["it", "bound"] == frame.loc["Worst", "bound"] == "≤"
    assert "without toy/crash on the examples on which it raised" in frame.loc["it", "note"]
    assert "attack-raised" in frame.loc["it", "flags"]
    assert "attack-raised" not in (frame.loc["sound", "flags"] or "")
    assert "toy/crash raised on" in found.tables["T"].to_markdown()


def test_a_signal_that_an_attack_has_hidden_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attacks.common import in_turn

    def hides(sentence: str) -> None:
        with suppress(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)

    # As an extension module does that loses the exception, so that nothing tells of it.
    monkeypatch.setattr(in_turn, "remark", hides)
    with terminable(), pytest.raises(Terminated):
        ran(tmp_path, BROKEN, worst=True)
    made = (tmp_path / "worst-True" / "craft").glob("*/receipt.json")
    jobs = (json.loads(each.with_name("job.json").read_text()) for each in made)
    # Clean images may have come first.
    assert {each["attack_run"]["attack"]["use"] for each in jobs} <= {"none"}


@pytest.mark.parametrize("what", ["time", "memory", "input"])
def test_what_is_no_fault_of_an_attack_fails_the_job(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.errors import OvertimeError
    from bench.registry import ATTACKS

    errors = {
        "time": OvertimeError("it took longer than its limit of 1 s"),
        "memory": torch.OutOfMemoryError("no room"),
        "input": bench.InputError("images.npy: changed"),
    }

    def make(*_: Any, **__: Any) -> Any:
        try:
            raise errors[what]
        except Exception:  # noqa: BLE001 - as a library does
            raise RuntimeError("the library failed") from None

    entry = ATTACKS["toy/crash"]
    changed = type(entry)(name="toy/crash", make=make, version=1, norms={"linf"})
    monkeypatch.setitem(ATTACKS._entries, "toy/crash", changed)
    if what == "input":
        with pytest.raises(bench.InputError, match=r"images\.npy: changed"):
            ran(tmp_path, BROKEN, worst=True)
        return
    found = ran(tmp_path, BROKEN, worst=True)
    assert found.failed
    assert all(str(errors[what]) in each for each in found.failed)
    assert details(found).loc[["step", "crash", "Worst"], "value"].isna().all()
