"""Worst mode, from a task file to a table: fewer passes, the same worst case, keys that no receipt moves."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bench
from bench.api import running
from bench.errors import InputError
from bench.noise import Noise
from bench.registry import bound
from bench.results.manifest import Outcomes
from bench.results.metrics import is_correct
from bench.results.outcomes import Stored
from bench.runner.craft import draws
from bench.suite import planner, resolve
from bench.suite.jobs import Craft, modules_of
from bench.suite.planner import Plan
from bench.suite.worst import Rates
from suites import TASK, suite

ATTACKS: dict[str, Any] = {
    "still": {"use": "none"},
    "step": {"use": "fgsm"},
    "walk": {"use": "pgd", "steps": 4, "loss": "margin"},
    "least": {"use": "fab-t", "steps": 3, "classes": 2},
    "search": {"use": "square", "queries": 15},
}
TABLE: dict[str, Any] = {
    "title": "Attacks",
    "rows": ["defense", "readout"],
    "columns": {name: {"attack": name} for name in ATTACKS},
    "extra": ["Min", "Worst"],
}
ASKED = {**TASK, "readouts": ["plain"], "views": ["logits"]}


def written(folder: Path, attacks: dict[str, Any] = ATTACKS, table: Any = None, **task: Any) -> Path:
    tables = {"T": TABLE if table is None else table}
    return suite(folder, {"linear": {"use": "toy/linear"}}, attacks, [{**ASKED, **task}], tables=tables)


def planned(path: Path, receipts: planner.ReceiptOf | None = None) -> Plan:
    return planner.make(resolve.load(path), None, receipts)


def in_order(plan: Plan) -> list[str]:
    """Return the registered names of the members of the plan's sequence, as they run."""
    (run,) = {each.attack_run for each in plan.graph() if isinstance(each, Craft) and each.attack_run.members}
    return [run.members[place].attack.name for place in run.attack.params["order"]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bench.Finished, bench.Finished]:
    folder = tmp_path_factory.mktemp("worst")
    path = written(folder)
    full = bench.run(path, results=folder / "full", executor="inline")
    worst = bench.run(path, results=folder / "worst", executor="inline", worst=True)
    assert not full.failed
    assert not worst.failed
    return folder, full, worst


def test_the_worst_case_is_the_same_example_by_example_at_fewer_passes(both: Any) -> None:
    folder = both[0]
    broken: dict[str, set[int]] = {}
    spent = {}
    for name in ("full", "worst"):
        plan = running.planned(folder / "suite.yaml", folder / name, None, worst=name == "worst").plan
        frames = [Outcomes(folder / name)(key) for key in {each.job.key for each in plan.conditions}]
        every = pd.concat([frame.frame() for frame in frames if isinstance(frame, Stored)])
        # What moves as little as it can counts within the radius.
        fell = every[~is_correct(every) & (every["distance"] <= 0.1 + 1e-6)]
        broken[name], spent[name] = set(fell["index"]), every["forwards"].sum()
    assert broken["worst"] == broken["full"]
    assert 0 < len(broken["full"]) < 60
    assert spent["worst"] < 0.9 * spent["full"]


def test_a_table_says_its_mode_and_what_single_attacks_count(both: Any) -> None:
    _, full, worst = both
    one, other = full.tables["T"], worst.tables["T"]
    assert list(one.columns) == [*ATTACKS, "Min", "Worst"]
    stood = [name if name == "still" else f"{name}, of those that stood" for name in ATTACKS]
    assert list(other.columns) == [*stood, "Min", "Worst"]
    assert other["Worst"].tolist() == one["Worst"].tolist()
    assert other["still"].tolist() == one["still"].tolist()
    assert other["Min"].isna().all()
    text = other.to_markdown()
    assert "Worst mode: each attack saw only the examples that stood against those before it" in text
    assert "worst mode knows no Min: each attack saw only what stood" in text
    assert "**" not in text
    assert "orst mode" not in one.to_markdown()


def test_what_each_attack_left_multiplies_to_the_worst_case(both: Any) -> None:
    folder, _, worst = both
    details = worst.tables["T"].details().set_index("column")
    order = in_order(running.planned(folder / "suite.yaml", folder / "new", None, worst=True).plan)
    names = {"fgsm": "step", "pgd": "walk", "fab-t": "least", "square": "search"}
    columns = [f"{names[name]}, of those that stood" for name in order]
    shares, counts = (details.loc[columns, field].tolist() for field in ("value", "n"))
    right = round(60 * details.loc["still", "value"] / 100)
    assert counts[0] == right
    for n, share, left in zip(counts, shares, [*counts[1:], None], strict=True):
        stood = round(n * share / 100)
        if left is not None:
            assert left == stood
    assert stood == round(60 * details.loc["Worst", "value"] / 100)


def test_outcomes_costs_and_images_are_each_attack_s_own(both: Any) -> None:
    folder, _, worst = both
    details = worst.tables["T"].details().set_index("column")
    rows = bench.outcomes(folder / "worst")
    for name in ("step", "walk", "least", "search"):
        own, told = rows[rows.attack == name], details.loc[f"{name}, of those that stood"]
        assert len(own) == told["n"]
        assert 100 * own.correct.mean() == pytest.approx(told["value"])
        assert ((own.label == own.truth) == own.correct).all()
        assert (own.distance.isna() == own.correct).all()
        assert (own[~own.correct].distance <= 0.1 + 1e-6).all()
        assert (own.forwards > 0).all()
        shown = bench.images(folder / "worst", attack=name)
        assert set(shown.index.tolist()) == set(own["index"][~own.correct])
        assert (shown.label != shown.truth).all()
    with pytest.raises(InputError, match="say which"):
        bench.images(folder / "worst", norm="linf", view="logits")


def test_a_table_over_all_attacks_needs_no_attack_by_itself(tmp_path: Path) -> None:
    table = {"title": "All", "rows": ["defense"], "columns": {"All": {}, "Two": {"attack": ["step", "walk"]}}}
    full, worst = (
        bench.run(written(tmp_path, table=table), results=tmp_path / name, executor="inline", worst=mode)
        for name, mode in (("full", False), ("worst", True))
    )
    assert list(worst.tables["T"].columns) == ["All", "Two, of those that stood"]
    assert worst.tables["T"]["All"].tolist() == full.tables["T"]["All"].tolist()


# --- keys and order -----------------------------------------------------------------------------------


def test_the_order_and_the_labels_are_in_no_key(tmp_path: Path) -> None:
    before = planned(written(tmp_path, worst=True))
    turned = dict(reversed([(f"new {name}", use) for name, use in ATTACKS.items()]))
    table = {**TABLE, "columns": {name: {"attack": name} for name in turned}}
    after = planned(written(tmp_path, turned, table=table, worst=True))
    assert {job.key for job in before.graph()} == {job.key for job in after.graph()}
    alone = planned(written(tmp_path))
    assert not {job.key for job in before.graph() if isinstance(job, Craft)} & {
        job.key for each in alone.conditions if each.facts["use"] != "none" for job in each.job.crafts
    }


def test_without_receipts_the_attacks_with_the_fewest_passes_go_first(tmp_path: Path) -> None:
    assert in_order(planned(written(tmp_path, worst=True))) == ["fgsm", "pgd", "square", "fab-t"]


def test_receipts_put_the_most_kills_per_second_first_and_move_no_key(tmp_path: Path) -> None:
    alone = planned(written(tmp_path))
    jobs = {each.facts["use"]: each.job.key for each in alone.conditions}
    path = written(tmp_path, worst=True)
    cold = planned(path)
    told = {"fgsm": (1, 1.0), "pgd": (30, 2.0), "square": (20, 1.0), "fab-t": (1, 40.0)}
    receipts = {
        jobs[use]: {"kills": kills, "crafting": {"seconds": seconds}}
        for use, (kills, seconds) in told.items()
    }
    warm = planned(path, lambda kind, key: receipts.get(key))
    assert in_order(warm) == ["square", "pgd", "fgsm", "fab-t"]
    assert {job.key for job in cold.graph()} == {job.key for job in warm.graph()}
    # One is missing: nothing to compare it by.
    del receipts[jobs["pgd"]]
    assert in_order(planned(path, lambda kind, key: receipts.get(key))) == in_order(cold)


def test_a_sequence_tells_the_rates_of_its_members(tmp_path: Path) -> None:
    plan = planned(written(tmp_path, worst=True))
    (run,) = {each.attack_run for each in plan.graph() if isinstance(each, Craft) and each.attack_run.members}
    told = {"fgsm": (5, 10), "pgd": (50, 40), "square": (0, 40), "fab-t": (4, 10)}
    rates = Rates()
    rates.learn(run, None)
    rates.learn(run, {"seconds": 3})
    assert [run.members[place].attack.name for place in rates.order(run.members)] == in_order(plan)
    members = {name: {"kills": kills, "passes": passes} for name, (kills, passes) in told.items()}
    rates.learn(run, {"kills": 59, "crafting": {"seconds": 10.0}, "members": members})
    order = [run.members[place].attack.name for place in rates.order(run.members)]
    assert order == ["pgd", "fgsm", "fab-t", "square"]


def test_a_second_run_with_other_receipts_has_nothing_to_do(both: Any) -> None:
    folder = both[0]
    again = bench.run(folder / "suite.yaml", results=folder / "worst", executor="inline", worst=True)
    assert again.jobs == 0
    # All that the full crossing has told by now is of another folder; here it is the sequence's own.
    rates = [
        each
        for each in (folder / "worst" / "evaluate").glob("*/receipt.json")
        if "members" in each.read_text()
    ]
    assert len(rates) == 1


def test_members_draw_what_they_draw_alone_and_their_code_counts(tmp_path: Path) -> None:
    alone = {each.attack_run.key for each in planned(written(tmp_path)).graph() if isinstance(each, Craft)}
    graph = planned(written(tmp_path, worst=True)).graph()
    job = next(each for each in graph if isinstance(each, Craft) and each.attack_run.members)
    index, cpu = torch.tensor([7, 3, 40]), torch.device("cpu")
    noise = draws(job, index, cpu)
    noise.uniform((5,))
    for member in job.attack_run.members:
        assert member.key in alone
        stream = bound({"use": member.attack.name, **member.attack.params}).stream
        rows = torch.tensor([2, 0])
        own = Noise(member.key, index)
        assert torch.equal(noise.spawn(stream).uniform((4,)), own.uniform((4,)))
        assert torch.equal(
            noise.select(rows).spawn(stream).normal((2, 2)), Noise(member.key, index[rows]).normal((2, 2))
        )
    assert {"attacks.sequence", "attacks.square", "attacks.fab", "attacks.pgd"} <= modules_of(job)


def test_draws_from_a_shard_come_last(tmp_path: Path) -> None:
    attacks = {"library": {"use": "torchattacks/FGSM"}, "walk": {"use": "pgd", "steps": 4}}
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, attacks, [{**ASKED, "worst": True}])
    assert in_order(planned(path)) == ["pgd", "torchattacks/FGSM"]


# --- what stays apart, and what is refused --------------------------------------------------------------


def test_what_is_not_sure_to_be_broken_stays_apart(tmp_path: Path) -> None:
    attacks = {
        "walk": {"use": "pgd", "steps": 4},
        "step": {"use": "fgsm"},
        "aimed": {"use": "pgd", "steps": 4, "targets": "next"},
        "seen": {"use": "boundary", "steps": 3},
    }
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, attacks, [{**TASK, "worst": True}])
    found: dict[Any, set[bool]] = {}
    for each in planned(path).conditions:
        name = (each.coordinates["attack"], each.coordinates["view"], each.coordinates["readout"])
        found.setdefault(name, set()).add("member" in each.facts)
        assert each.facts["exact"] or "member" not in each.facts
    assert {name[0] for name, joined in found.items() if True in joined} == {"walk", "step"}


def test_a_task_overrules_the_file_and_two_ways_are_refused(tmp_path: Path) -> None:
    tasks = [{**ASKED, "worst": False}]
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, ATTACKS, tasks, worst=True)
    assert not any("member" in each.facts for each in planned(path).conditions)
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, ATTACKS, [ASKED], worst=True)
    assert sum("member" in each.facts for each in planned(path).conditions) == 4
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, ATTACKS, [ASKED, {**ASKED, "worst": True}])
    with pytest.raises(InputError, match=r"tasks\[1\]: asks step on linear .* in worst mode and out of it"):
        planned(path)


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ("[]", r"attacks\.it\.of: .*at least 1"),
        ("[{use: pdg}]", r"attacks\.it\.of\.use: unknown attack 'pdg'; did you mean 'pgd'"),
        ("[{use: pgd, stepz: 3}]", r"attacks\.it\.of.*stepz"),
        ("[{use: sequence, of: [{use: pgd}]}]", r"attacks\.it: of: a sequence within a sequence"),
        ("[{use: pgd}, {use: pgd}]", r"attacks\.it: of: pgd stands twice"),
    ],
)
def test_bad_members_are_refused_with_their_line(of: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "data: {digits: {name: digits, split: test, size: 60, shard: 25}}\n"
        "defenses: {linear: {use: toy/linear}}\n"
        f"attacks:\n  it: {{use: sequence, of: {of}}}\n"
        "tasks: [{data: digits, threat: {norm: linf, radius: 0.1}}]\n"
    )
    with pytest.raises(InputError, match=r"suite\.yaml:4: " + sentence):
        planned(path)


def test_a_member_that_cannot_run_is_a_skip_with_its_reason(tmp_path: Path) -> None:
    attacks = {"it": {"use": "sequence", "of": [{"use": "pgd"}, {"use": "square"}]}, "fab": {"use": "fab"}}
    task = {**ASKED, "threat": {"norm": "l1", "radius": 1}}
    path = suite(tmp_path, {"linear": {"use": "toy/linear"}}, attacks, [task])
    assert [each.reason for each in planned(path).skips] == ["sequence is made for l2, linf"]


def test_a_check_refuses_worst_mode(both: Any) -> None:
    from bench.gate import measurements

    folder = both[0]
    with pytest.raises(InputError, match="leave out worst"):
        measurements.from_results(folder / "worst", folder / "suite.yaml")


# --- what worst mode cannot know -----------------------------------------------------------------------


def tables_of(folder: Path, tables: dict[str, Any], worst: bool) -> bench.Finished:
    """Run attacks on a linear network, in worst mode or out of it."""
    path = suite(
        folder,
        {"linear": {"use": "toy/linear"}},
        ATTACKS,
        [ASKED],
        tables=tables,
    )
    found = bench.run(path, results=folder / f"worst-{worst}", executor="inline", worst=worst)
    assert not found.failed
    return found


SOME_OF_THEM: dict[str, Any] = {
    # Columns of several attacks; all of them; some of them.
    "grouped": {
        **TABLE,
        "columns": {
            "Gradients": {"attack": ["step", "walk"]},
            "Others": {"attack": ["least", "search"]},
        },
        "extra": ["Worst"],
    },
    "all": {**TABLE, "columns": {"All": {}}, "extra": ["Worst"]},
    "some": {
        **TABLE,
        "columns": {name: {"attack": name} for name in ("walk", "search")},
        "where": {"attack": ["walk", "search"]},
        "extra": ["Worst"],
    },
    "distance": {
        **TABLE,
        "metric": "distance",
        "columns": {name: {"attack": name} for name in ("step", "walk", "least", "search")},
        "extra": [],
    },
}


def test_the_worst_case_is_that_of_the_full_crossing_or_none(tmp_path: Path) -> None:
    full = tables_of(tmp_path, SOME_OF_THEM, False)
    worst = tables_of(tmp_path, SOME_OF_THEM, True)
    for key in ("grouped", "all"):
        assert worst.tables[key]["Worst"].tolist() == full.tables[key]["Worst"].tolist(), key
        assert worst.tables[key].details().set_index("column").loc["Worst", "n"] == 60
    assert full.tables["some"]["Worst"].notna().all()
    assert worst.tables["some"]["Worst"].isna().all()
    assert "worst mode knows no worst case over some of a row's attacks" in worst.tables["some"].to_markdown()


def test_no_least_distance_is_told_where_an_attack_stops_at_the_first_success(tmp_path: Path) -> None:
    full = tables_of(tmp_path, {"distance": SOME_OF_THEM["distance"]}, False)
    worst = tables_of(tmp_path, {"distance": SOME_OF_THEM["distance"]}, True)
    assert full.tables["distance"].notna().to_numpy().all()
    assert worst.tables["distance"].isna().to_numpy().all()
    assert "worst mode knows no distance" in worst.tables["distance"].to_markdown()


def test_random_defenses_are_attacked_by_each_attack_alone(tmp_path: Path) -> None:
    path = suite(
        tmp_path, {"noisy": {"use": "toy/noisy"}}, ATTACKS, [{**TASK, "views": ["logits"]}], worst=True
    )
    crafts = [each.attack_run for each in planned(path).graph() if isinstance(each, Craft)]
    assert crafts
    assert not any(each.members for each in crafts)
