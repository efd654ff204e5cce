"""The gate and random defenses: an example's value is its mean over draws, and examples are compared."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from measures import all_of, held, measured
from rich.console import Console
from scipy import stats

from bench.api import checking, running
from bench.api.running import Options, Project
from bench.gate import baseline, statistics
from bench.gate.judge import findings, worst_case_of
from bench.gate.measurements import Measured, Measurements, from_results
from bench.gate.render import phrases, records, text
from bench.gate.replay import image_findings
from bench.gate.statistics import paired_loss, verdict_of
from bench.gate.verdicts import Check, Finding
from bench.results.conditions import FACTS
from bench.results.outcomes import BROKEN_SHARE
from bench.results.seals import seal
from bench.runner import executors
from bench.runner.executors.protocol import Asked
from bench.suite.policy import Policy
from suites import TASK, suite

ALPHA, TOLERANCE = 0.01, 0.01
PAGE = Path(__file__).parents[2] / "docs" / "ci.md"
INLINE = Options(executors.ready("inline", Asked(["cpu"])))


def drawn(attack: str, shares: Sequence[float], draws: int = 20, **changes: Any) -> Measured:
    """A condition of a random defense whose examples are held in these shares of its draws."""
    made = measured(attack, [int(each > 0.5) for each in shares], **changes)
    rows = {**made.rows, "broken_share": 1 - np.asarray(shares, float)}
    return replace(made, rows=rows, question=replace(made.question, draws=draws))


def judged(before: Measurements, now: Measurements, **rules: Any) -> dict[str, Finding]:
    found = findings(before, now, Policy.model_validate(rules))
    return {str(each.subject.coordinates.get("attack", "worst case")): each for each in found}


# --- values ----------------------------------------------------------------------------------------------


def test_an_example_counts_by_its_mean_over_draws_and_seeds() -> None:
    was = [drawn("pgd", [1.0, 0.5, 0.2, 0.0], seed=0), drawn("pgd", [0.5, 1.0, 0.6, 0.0], seed=1)]
    now = [drawn("pgd", [0.9, 0.5, 0.4, 0.0], seed=0), drawn("pgd", [0.4, 1.0, 0.8, 0.0], seed=1)]
    loss = judged(all_of(was), all_of(now))["pgd"].loss
    assert loss is not None
    # Of the means: 0.75 to 0.65, 0.75 to 0.75, 0.4 to 0.6, 0 to 0.
    assert (loss.n, loss.lost, loss.gained) == (4, pytest.approx(0.1), pytest.approx(0.2))
    assert loss.before == pytest.approx((0.75 + 0.75 + 0.4) / 4)
    assert loss.p == paired_loss(np.array([0.1, 0, 0, 0]), np.array([0, 0, 0.2, 0]), alpha=ALPHA).p


def test_in_a_worst_case_an_example_is_held_as_often_as_against_its_worst_attack() -> None:
    def both(pgd: Sequence[float], clean: Sequence[float]) -> Measurements:
        return all_of([drawn("pgd", pgd), drawn("clean", clean)])

    before, now = both([0.9, 0.2, 0.5], [1.0, 0.1, 0.5]), both([0.9, 0.6, 0.5], [0.8, 0.5, 1.0])
    loss = judged(before, now)["worst case"].loss
    assert loss is not None
    assert (loss.lost, loss.gained) == (pytest.approx(0.1), pytest.approx(0.4))


def test_at_the_median_distance_a_share_counts() -> None:
    distances = [0.1, 0.2, 0.3, 0.4]
    clean = drawn("clean", [1.0, 1.0, 1.0, 0.6])
    one = drawn("cw", [0.0, 0.0, 0.0, 0.0], distances=distances)
    other = drawn("cw", [0.25, 0.5, 0.0, 0.0], distances=distances)
    found = judged(all_of([one, clean]), all_of([other, clean]))["cw"]
    assert found.subject.radius == pytest.approx(0.2)
    assert found.loss is not None
    # Held before: nothing, nothing, the third as it is further away, and the fourth where it is held unmoved.
    assert (found.loss.before, found.loss.gained) == (1.6 / 4, 0.75)


def test_other_draws_are_another_question() -> None:
    one, other = drawn("pgd", [1.0] * 10), drawn("pgd", [1.0] * 10, draws=50)
    (found,) = findings(all_of([one]), all_of([other]), Policy())
    assert (found.verdict, found.reason) == ("not comparable", "draws: 20 in the baseline, 50 now")
    (found,) = findings(all_of([measured("pgd", held(10))]), all_of([one]), Policy())
    assert (found.verdict, found.reason) == ("not comparable", "draws: 1 in the baseline, 20 now")


def test_floors_are_judged_on_shares_and_on_what_stored_images_leave_of_them() -> None:
    both = all_of([drawn("pgd", [0.9] * 1000), drawn("clean", [1.0] * 1000)])
    subject = worst_case_of(drawn("pgd", [1.0]).condition)
    rules = Policy(floors={"model": 80})

    def floor(extra: dict[int, float]) -> Any:
        made = findings(both, both, rules, {subject: {0: extra}})
        return next(each.floor for each in made if each.subject == subject)

    assert floor({}).verdict == "held"
    assert (floor({}).low, floor({}).high) == statistics.clopper_pearson(900, 1000, 0.99)
    # 400 of them are held in 0.6 of the draws against stored images, others in more than against attacks.
    lower = floor({**dict.fromkeys(range(400), 0.6), **dict.fromkeys(range(400, 1000), 1.0)})
    assert (lower.low, lower.high) == statistics.clopper_pearson(780, 1000, 0.99)
    assert lower.verdict == "undecided"


# --- flips -----------------------------------------------------------------------------------------------


def test_a_flip_is_told_by_shares_and_by_the_attack_that_breaks_it_most() -> None:
    before = all_of(
        [
            drawn("pgd", [1.0, 0.95, 0.6, 0.4, 1.0]),
            drawn("square", [1.0, 1.0, 0.55, 1.0, 0.9]),
            drawn("clean", [1.0] * 5),
        ]
    )
    now = all_of(
        [
            drawn("pgd", [0.4, 0.6, 0.5, 0.0, 1.0]),
            drawn("square", [0.1, 0.55, 0.5, 0.0, 0.8]),
            drawn("clean", [1.0, 1.0, 0.5, 1.0, 1.0]),
        ]
    )
    found = judged(before, now)["worst case"]
    # The first fell from all to a tenth. The third was held in most draws, and is in half of them unmoved: no
    # attack found it. The fourth was broken in most draws before.
    told = [(each.index, each.attack, each.shares) for each in found.flips]
    assert told == [(0, "square (logits)", pytest.approx((1.0, 0.1))), (2, "clean", (0.55, 0.5))]
    assert phrases.FLIP_HEADS[2] == "found by"
    assert phrases.flip_cells(found.flips[0])[4] == "0 -> 1, held in 100 % -> 10 % of draws"
    check = Check("tasks.yaml", "robustness", "results", TOLERANCE, ALPHA, (found,))
    console = Console(width=200, record=True, file=StringIO())
    console.print(text.to_text(check))
    assert "held in 55 % -> 50 % of draws" in console.export_text()
    written = json.loads(records.to_json(check, 0))["findings"][0]["flips"][0]["shares"]
    assert written == pytest.approx([1.0, 0.1])


def test_of_one_answer_a_flip_has_no_shares() -> None:
    found = judged(all_of([measured("pgd", held(5))]), all_of([measured("pgd", held(5, 2))]))["pgd"]
    (flip,) = found.flips
    assert (flip.index, flip.shares) == (2, None)
    assert phrases.flip_cells(flip)[4] == "2 -> 3"


def test_a_gain_says_what_the_failures_that_are_gone_were_found_by() -> None:
    n = 400
    before = all_of(
        [
            measured("pgd", held(n, *range(100))),
            measured("square", held(n, *range(90, 130))),
            measured("clean", held(n, *range(20))),
        ]
    )
    now = all_of([measured(name, held(n, *range(10))) for name in ("pgd", "square", "clean")])
    found = judged(before, now)
    assert "what is held again had been found by: pgd (logits) 80, square (logits) 30, clean 10" in (
        found["worst case"].suspicious
    )
    # Of one attack there is nothing to tell apart.
    assert not any("found by" in each for each in found["pgd"].suspicious)


def test_images_alone_of_a_random_defense_are_held_where_nothing_is_lost() -> None:
    subject = worst_case_of(drawn("pgd", [1.0]).condition)

    def verdict(*seed: tuple[float, float]) -> str:
        (found,) = image_findings({subject: [dict(enumerate(seed))]}, Policy())
        return found.verdict

    assert verdict(*[(0.7, 0.7)] * 50, (0.2, 0.9)) == "held"
    assert verdict(*[(0.7, 0.7)] * 50, (0.9, 0.85)) == "undecided"
    assert verdict(*[(0.7, 0.6)] * 50) == "regressed"


# --- what a baseline keeps -------------------------------------------------------------------------------


def write(folder: Path, every: Sequence[Measured]) -> None:
    measurements = all_of(every)
    baseline.write(folder, measurements, suite="tasks.yaml", runs=[], images=b"", history=[], versions={})


def test_a_baseline_says_what_each_failure_was_found_by(tmp_path: Path) -> None:
    every = [
        measured("pgd", held(6, 0, 1)),
        measured("square", held(6, 1, 2)),
        measured("clean", held(6, 2, 3)),
        measured("pgd", held(6, 5), defense="other"),
    ]
    write(tmp_path, every)
    table = pq.read_table(tmp_path / "outcomes.parquet").to_pandas()
    by = {number: rows.found_by.tolist() for number, rows in table.groupby("condition")}
    # Unmoved images come first, then the first attack that breaks; each attack of the row says the same.
    assert by[0] == by[1] == [0, 0, 2, 2, -1, -1]
    # Clean images are part of several worst cases, and an attack alone is part of none.
    assert by[2] == by[3] == [-1] * 6
    read = baseline.read(tmp_path).measurements
    assert list(read.measured) == list(all_of(every).measured)


def test_shares_are_written_and_read_back_where_there_are_any(tmp_path: Path) -> None:
    every = [drawn("pgd", [1.0, 0.35, 0.0]), measured("pgd", held(3, 1), defense="other")]
    write(tmp_path, every)
    random, plain = baseline.read(tmp_path).measurements.measured.values()
    assert random.rows["broken_share"].tolist() == every[0].rows["broken_share"].tolist()
    assert "broken_share" not in plain.rows
    assert (random.question.draws, plain.question.draws) == (20, 1)


def test_a_baseline_from_before_there_were_draws_is_read(tmp_path: Path) -> None:
    """It has neither the column nor the entries."""
    root = tmp_path / "baseline"
    shutil.copytree(Path(__file__).parents[2] / "results" / "baseline", root)
    told = json.loads((root / "baseline.json").read_text())
    for each in told["conditions"]:
        for entry in ("draws", "precision"):
            each["question"].pop(entry)
        each["facts"] = {name: each["facts"][name] for name in FACTS}
    (root / "baseline.json").write_text(json.dumps(seal(told)))
    assert BROKEN_SHARE not in pq.read_schema(root / "outcomes.parquet").names
    found = baseline.read(root).measurements
    assert {each.question.draws for each in found.measured.values()} == {1}
    assert len(found.measured) == len(told["conditions"])


# --- simulated -------------------------------------------------------------------------------------------


def noisy_pair(noise: np.random.Generator, n: int, loss: float, draws: int) -> tuple[Measured, Measured]:
    """A random defense twice, each time by other draws; `loss` is what it truly lost, a share.

    Some examples are easy, some hard, and many between: 27 of 100 change between one draw and the next.
    """
    chance = noise.beta(0.8, 0.5, n)
    worse = chance * (1 - loss / (0.8 / 1.3))
    one, other = noise.binomial(draws, chance) / draws, noise.binomial(draws, worse) / draws
    return drawn("pgd", one.tolist(), draws), drawn("pgd", other.tolist(), draws)


@pytest.mark.parametrize(("n", "draws"), [(60, 5), (300, 1), (300, 20), (1000, 10)])
def test_a_random_defense_against_itself_raises_no_alarm(n: int, draws: int) -> None:
    noise, runs = np.random.default_rng([n, draws]), 300
    alarms = 0
    for _ in range(runs):
        one, other = noisy_pair(noise, n, 0.0, draws)
        loss = paired_loss(1 - one.rows["broken_share"], 1 - other.rows["broken_share"], alpha=ALPHA)
        alarms += loss.p < ALPHA
    # More is seen once in 10,000 times where the level is kept.
    assert alarms <= stats.binom.ppf(1 - 1e-4, runs, ALPHA)


def test_the_gate_itself_raises_no_alarm_over_worst_cases() -> None:
    """Two attacks that are equally strong and the clean images, through all that a check does with them."""
    noise, runs, n, draws = np.random.default_rng(7), 100, 200, 10
    alarms = 0
    for _ in range(runs):
        chance = noise.beta(0.8, 0.5, n)
        sides = []
        for _ in range(2):
            counts = {name: noise.binomial(draws, chance) / draws for name in ("pgd", "square")}
            clean = noise.binomial(draws, np.minimum(chance + 0.2, 1)) / draws
            every = {**counts, "clean": clean}
            sides.append(all_of([drawn(name, each.tolist(), draws) for name, each in every.items()]))
        found = judged(*sides)
        assert found["worst case"].p is not None
        alarms += any(each.p is not None and each.p < ALPHA for each in found.values())
    assert alarms <= stats.binom.ppf(1 - 1e-4, runs, ALPHA)


FOUND = {
    (300, 0.05): {1: 0.145, 5: 0.815, 20: 1.0},
    (1000, 0.02): {1: 0.092, 5: 0.527, 20: 0.999},
}
"""How often a loss is called regressed, of 1,000 runs, as the page has it."""


@pytest.mark.parametrize(("n", "loss"), FOUND)
def test_losses_are_found_and_draws_are_what_finds_them(n: int, loss: float) -> None:
    noise, runs, cells = np.random.default_rng(n), 200, FOUND[n, loss]
    for draws, recorded in cells.items():
        said = 0
        for _ in range(runs):
            one, other = noisy_pair(noise, n, loss, draws)
            found = paired_loss(1 - one.rows["broken_share"], 1 - other.rows["broken_share"], alpha=ALPHA)
            said += verdict_of(found, found.p, tolerance=TOLERANCE, alpha=ALPHA) == "regressed"
        # Both are counts: their difference has the variances of both.
        spread = np.sqrt(recorded * (1 - recorded) * (1 / runs + 1 / 1000))
        assert abs(said / runs - recorded) <= 4 * spread + 1 / runs
    row = " | ".join(f"{100 * share:.0f} %" for share in cells.values())
    assert f"| {n:,}, {100 * loss:g} | {row} |" in PAGE.read_text()


def test_five_points_are_found_at_a_thousand_examples() -> None:
    noise, runs = np.random.default_rng(11), 100
    for _ in range(runs):
        one, other = noisy_pair(noise, 1000, 0.05, 20)
        loss = paired_loss(1 - one.rows["broken_share"], 1 - other.rows["broken_share"], alpha=ALPHA)
        assert verdict_of(loss, loss.p, tolerance=TOLERANCE, alpha=ALPHA) == "regressed"


@pytest.mark.parametrize("draws", [5, 20])
def test_the_interval_of_a_random_defense_covers(draws: int) -> None:
    noise, runs, missed = np.random.default_rng(draws), 300, 0
    for _ in range(runs):
        one, other = noisy_pair(noise, 300, 0.05, draws)
        loss = paired_loss(1 - one.rows["broken_share"], 1 - other.rows["broken_share"], alpha=ALPHA)
        missed += not loss.low <= 0.05 <= loss.high
    assert missed <= stats.binom.ppf(1 - 1e-4, runs, ALPHA)


def test_a_thousand_draws_of_many_seeds_are_values() -> None:
    noise = np.random.default_rng(0)
    values = np.mean(noise.integers(0, 1001, (2, 9, 300)) / 1000, axis=1)
    loss = paired_loss(*values, alpha=ALPHA)
    assert loss.value == pytest.approx(float((values[0] - values[1]).mean()))


# --- a check from end to end -----------------------------------------------------------------------------

NOISY = {"use": "toy/noisy", "epochs": 3, "kept": 0.6}
ATTACKS = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}}
VIEWED = {**TASK, "views": ["logits"], "readouts": ["plain"]}


def project(folder: Path, noisy: dict[str, Any] = NOISY, **changes: Any) -> Project:
    suite(folder, {"noisy": noisy}, ATTACKS, [VIEWED], **{"draws": 10, **changes})
    found = running.planned(folder / "suite.yaml", folder / "results", None)
    found.store.open()
    return found


def check(made: Project, **options: Any) -> Check:
    return checking.check(made, made.plan.suite.folder / "robustness", INLINE, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    made = project(folder)
    running.Run(made, INLINE).do()
    checking.save(made, folder / "robustness")
    return folder


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "home"))


def test_the_same_random_network_is_held_by_check_and_by_replay(home: Path) -> None:
    found = check(project(home))
    assert found.verdict == "held"
    assert all(each.loss is not None and each.loss.churn == 0 for each in found.findings)
    again = check(project(home), replay_only=True)
    assert again.verdict == "held"
    assert again.replayed is not None
    assert (again.replayed.flips, again.replayed.mended) == ((), 0)
    # Fractions were compared: the network is random, and its answers to the same image are the same draws.
    (worst,) = again.findings
    assert worst.loss is not None
    assert 0 < worst.loss.before < 1
    # What was broken unmoved alone is not replayed, and may read as a gain.
    assert worst.loss.lost == 0


def test_a_random_network_that_sees_less_is_worse_and_its_flips_have_shares(home: Path) -> None:
    found = check(project(home, {**NOISY, "kept": 0.05}))
    assert found.verdict == "regressed"
    worst = next(each for each in found.findings if each.subject.kind == "worst case")
    assert worst.flips
    for flip in worst.flips:
        assert flip.shares is not None
        assert flip.shares[1] <= 0.5 < flip.shares[0]
        assert 10 * flip.shares[0] == pytest.approx(round(10 * flip.shares[0]))


def test_other_draws_are_not_comparable_and_the_file_says_which(home: Path) -> None:
    found = check(project(home, draws=5))
    assert (found.verdict, found.status()) == ("not comparable", 3)
    assert any("draws: 10 in the baseline, 5 now" in each.reason for each in found.findings)


def test_the_baseline_reads_back_the_shares(home: Path) -> None:
    read = baseline.read(home / "robustness").measurements.measured
    was = from_results(home / "results", home / "suite.yaml").measured
    for place, each in was.items():
        assert np.array_equal(read[place].rows["broken_share"], each.rows["broken_share"])
        assert read[place].question == each.question
        assert each.question.draws == 10
