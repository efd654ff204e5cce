"""A random defense that is asked several times about each image: what is asked, kept, counted and said."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import but, condition, manifest, rows
from scipy import stats

from bench.api import packing
from bench.errors import InputError
from bench.noise import seed_of
from bench.report import tables
from bench.report.checks.answers import _luck
from bench.report.tables import unexamined
from bench.results import metrics
from bench.results.conditions import conditions_of
from bench.results.manifest import write
from bench.results.outcomes import arrays
from bench.results.store import Store
from bench.runner import estimates
from bench.runner.context import WorkerContext, load
from bench.runner.train import fitted
from bench.suite import planner, resolve
from bench.suite.planner import Plan
from suites import TASK, Ran, suite

DEFENSES = {"still": {"use": "toy/linear", "epochs": 1}, "noisy": {"use": "toy/noisy", "epochs": 1}}
ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "fgsm": {"use": "fgsm"},
    # What is crafted on a defense that is not random is the same in any shards.
    "transfer": {"use": "fgsm", "source": {"defense": "still", "view": "logits"}},
}
ALONE = {name: ATTACKS[name] for name in ("clean", "fgsm")}
VIEWED = {**TASK, "views": ["logits"], "readouts": ["plain"]}


def planned(folder: Path, **more: Any) -> Plan:
    return planner.make(resolve.load(suite(folder, DEFENSES, ATTACKS, [VIEWED], **more)))


def ran(
    folder: Path, defenses: dict[str, Any] = DEFENSES, attacks: dict[str, Any] = ATTACKS, **more: Any
) -> Ran:
    folder.mkdir(exist_ok=True)
    done = Ran(suite(folder, defenses, attacks, [VIEWED], **more))
    assert not done.failed
    return done


# --- the key of a task file ------------------------------------------------------------------------------


def test_draws_change_the_evaluations_of_random_defenses_and_nothing_else(tmp_path: Path) -> None:
    plain, one, several = planned(tmp_path), planned(tmp_path, draws=1), planned(tmp_path, draws=20)
    assert one.manifest()["conditions"] == plain.manifest()["conditions"]
    for before, now in zip(plain.conditions, several.conditions, strict=True):
        assert before.coordinates == now.coordinates
        assert before.job.crafts == now.job.crafts
        assert before.job.victim == now.job.victim
        drawn = now.coordinates["defense"] == "noisy"
        assert (before.job.key != now.job.key) == drawn
        assert now.facts == {**before.facts, "draws": 20} if drawn else now.facts == before.facts
    read = {each.coordinates["defense"]: each.facts.draws for each in conditions_of(several.manifest())}
    assert read == {"still": 1, "noisy": 20}


@pytest.mark.parametrize("wrong", [0, -3, 1001, 2.5, True, "abc", None, [20]])
def test_draws_that_are_none_are_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InputError) as refused:
        planned(tmp_path, draws=wrong)
    (line,) = str(refused.value).splitlines()
    assert "suite.yaml" in line
    assert "draws" in line


@pytest.mark.parametrize("most", [1, 1000])
def test_the_bounds_themselves_are_draws(tmp_path: Path, most: int) -> None:
    assert planned(tmp_path, draws=most).conditions


# --- what is asked ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(tmp_path_factory.mktemp("asked"), draws=8)


def test_the_share_is_what_asking_by_hand_gives(asked: Ran) -> None:
    found = asked.outcomes(defense="noisy", attack="clean").set_index("index")
    job = next(
        each.job
        for each in asked.plan.conditions
        if (each.coordinates["defense"], each.coordinates["attack"]) == ("noisy", "clean")
    )
    context = WorkerContext(asked.store.root, asked.plan.suite.folder, None, "cpu", {})
    model = fitted(job.victim, context, asked.store).eval()
    data = job.crafts[0].attack_run.data
    split = load(data, context)
    for place, image, truth in list(
        zip(split.index.tolist(), split.images, split.labels.tolist(), strict=True)
    )[::7]:
        labels = []
        for draw in range(8):
            torch.manual_seed(seed_of("draw", data.key, 0, place, draw))
            with torch.no_grad():
                labels.append(int(model.logits(image[None]).argmax()))
        assert found.broken_share[place] == np.mean([each != truth for each in labels])
        assert found.label[place] == labels[0]


def test_neither_shards_nor_their_order_decide_a_draw(asked: Ran, tmp_path: Path) -> None:
    data = {"digits": {"name": "digits", "split": "test", "size": 60, "shard": 7}}
    other = ran(tmp_path / "other", draws=8, data=data)
    for attack in ("clean", "transfer"):
        one, two = (each.outcomes(defense="noisy", attack=attack) for each in (asked, other))
        names = ["index", "label", "rejected", "score", "broken_share"]
        assert one[names].equals(two[names])
        assert 0 < one.broken_share.mean() < 1


def test_of_fewer_draws_they_are_the_first(asked: Ran, tmp_path: Path) -> None:
    fewer = ran(tmp_path / "fewer", draws=2)
    one, two = (each.outcomes(defense="noisy", attack="fgsm") for each in (asked, fewer))
    assert one.label.equals(two.label)
    assert set(np.unique(two.broken_share)) <= {0, 0.5, 1}
    # Two draws out of eight: what both broke was broken at least twice, and so on.
    assert (one.broken_share >= two.broken_share / 4).all()
    assert (1 - one.broken_share >= (1 - two.broken_share) / 4).all()


def test_other_seeds_have_other_draws(tmp_path: Path) -> None:
    task = {**VIEWED, "seeds": [0, 1], "defenses": ["coin"], "attacks": ["clean"]}
    done = Ran(suite(tmp_path, {"coin": {"use": "toy/random"}}, ALONE, [task], draws=20))
    one, two = (done.outcomes(seed=seed).broken_share for seed in (0, 1))
    assert not one.equals(two)


def test_the_draws_of_a_fair_coin_are_binomial(tmp_path: Path) -> None:
    """Ten classes by chance: neither the draws of an example nor the examples know of each other."""
    done = ran(tmp_path, {"coin": {"use": "toy/random"}}, ALONE, draws=40)
    for attack in ALONE:
        broken = 40 * done.outcomes(attack=attack).broken_share.to_numpy()
        assert abs(broken.mean() - 36) < 4 * math.sqrt(40 * 0.09 / 60)
        low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 59)
        assert low < 59 * broken.var(ddof=1) / 3.6 < high


def test_a_defense_that_answers_nan_is_broken_in_every_draw(tmp_path: Path) -> None:
    done = ran(tmp_path, {"coin": {"use": "toy/random", "nan": True}}, ALONE, draws=3)
    assert (done.outcomes(attack="fgsm").broken_share == 1).all()


def test_a_deterministic_defense_is_asked_once(asked: Ran) -> None:
    assert "broken_share" not in asked.outcomes(defense="still", attack="fgsm")
    for each in asked.plan.conditions:
        receipt = asked.store.receipt("evaluate", each.job.key)
        assert receipt is not None
        drawn = each.coordinates["defense"] == "noisy"
        assert receipt.get("queries_per_example") == ({"forwards": 8.0} if drawn else None)
        assert estimates.passes(each.job) == (8 if drawn else 1)


def test_packed_outcomes_keep_the_share(asked: Ran) -> None:
    write(asked.store, asked.plan.manifest())
    job = next(each.job for each in asked.plan.conditions if each.coordinates["defense"] == "noisy")
    before = arrays(asked.store.outcomes(job.key))
    packing.packed(asked.store.root)
    assert not (asked.store.root / "evaluate" / job.key).exists()
    after = arrays(Store(asked.store.root).outcomes(job.key))
    assert np.array_equal(after["broken_share"], before["broken_share"])


# --- what is counted -------------------------------------------------------------------------------------


def shares(*broken: float, **changes: Any) -> dict[str, Any]:
    """Outcomes whose examples are broken in these shares of the draws."""
    return dict(arrays(rows([each < 0.5 for each in broken], broken_share=np.array(broken), **changes)))


def values(name: str, attacked: Any, still: Any) -> list[float]:
    return metrics.score(metrics.METRICS[name], attacked, still).values.tolist()


def test_the_value_of_an_example_is_its_mean_over_draws() -> None:
    attacked, still = shares(0.0, 0.25, 1.0, 0.5), shares(0.25, 0.0, 0.0, 1.0, moved=False)
    assert values("accuracy", attacked, still) == [1, 0.75, 0, 0.5]
    # Of two images the attacker submits the one that is right less often.
    assert values("robust", attacked, still) == [0.75, 0.75, 0, 0]
    assert values("robust", still, still) == [0.75, 1, 1, 0]
    parts = [metrics.score(metrics.METRICS["accuracy"], each, None) for each in (attacked, still)]
    assert metrics.settle(metrics.METRICS["accuracy"], parts).values.tolist() == [0.75, 0.75, 0, 0]
    # Whatever needs more than right or wrong is of the first draw.
    assert values("success", attacked, still) == [0, 0, 1]


def test_seeds_are_averaged_after_draws_and_both_are_no_more_examples() -> None:
    accuracy = metrics.METRICS["accuracy"]
    seeds = {
        seed: [metrics.score(accuracy, shares(*broken), None)]
        for seed, broken in enumerate([(0.0, 0.5, 1.0, 0.1), (0.2, 0.4, 0.6, 0.0)])
    }
    found = metrics.estimate(accuracy, seeds)
    assert found is not None
    assert found.value == pytest.approx(0.65)
    assert (found.n, found.seeds) == (4, 2)
    assert (found.low, found.high) == metrics.wilson(found.value, 4)


def test_at_a_radius_the_share_of_the_image_that_fits_in_it_counts() -> None:
    near = shares(1.0, 0.75, 0.5, 0.0, distance=np.array([0.05, 0.3, 0.05, 0.05]))
    still = shares(0.0, 0.25, 1.0, 0.25, moved=False)
    read = metrics.within(near, still, 0.1)
    assert metrics.held_share(read).tolist() == [0, 0.75, 0.5, 1]
    assert metrics.held_at(near, still, 0.1).tolist() == [0, 0.75, 0, 0.75]
    assert metrics.held_at(near, None, 0.1).tolist() == [0, 1, 0.5, 1]
    # A clean image that was asked about once counts as 0 or 1.
    once = {name: each for name, each in still.items() if name != "broken_share"}
    assert metrics.held_share(metrics.within(near, once, 0.1)).tolist() == [0, 1, 0.5, 1]
    # Without a limit an attack that moves as little as it can breaks whatever it broke.
    assert metrics.held_at(near, None, math.inf).tolist() == [0, 0.25, 0.5, 1]


def chances(noise: np.random.Generator, kind: str, n: int) -> Any:
    """How likely each example is to be held: the mean of all is 0.9 or 0.6."""
    match kind:
        case "rare, and always broken":
            return (noise.random(n) < 0.9).astype(float)
        case "rare among easy ones":
            return np.where(noise.random(n) < 0.1, 0.0, 1.0) * 0.999 + 0.0009
        case "alike":
            return np.full(n, 0.6)
        case _:
            return noise.beta(0.6, 0.4, n)


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        ("rare, and always broken", 0.9),
        ("rare among easy ones", 0.9),
        ("alike", 0.6),
        ("easy and hard", 0.6),
    ],
)
def test_the_interval_of_shares_covers(kind: str, truth: float) -> None:
    noise, runs, n, draws = np.random.default_rng(5), 2000, 100, 20
    accuracy, covered = metrics.METRICS["accuracy"], 0
    for _ in range(runs):
        held = noise.binomial(draws, chances(noise, kind, n)) / draws
        found = metrics.estimate(accuracy, {0: [metrics.PerExample(np.arange(n), held)]})
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    # Wilson's own coverage at p = 0.9 and n = 100 is 0.936, by the binomial distribution.
    counts = np.arange(n + 1)
    ends = np.array([metrics.wilson(each / n, n) for each in counts])
    exact = stats.binom.pmf(counts, n, truth)[(ends[:, 0] <= truth) & (truth <= ends[:, 1])].sum()
    assert covered >= stats.binom.ppf(1e-4, runs, exact)


# --- what is said ----------------------------------------------------------------------------------------


def table(metric: str, **at: Any) -> Any:
    kept = [condition(name, attack=name, random=True, n=3) for name in ("pgd", "spsa")]
    for each in kept:
        each["facts"]["draws"] = 20
    still = but(kept[0], job="clean", attack="clean", view=None, idle=True, radius=None, kind="minimum-norm")
    frames = {
        "pgd": rows([1, 1, 0], broken_share=[0.0, 0.35, 0.9], **at),
        "spsa": rows([1, 0, 1], broken_share=[0.1, 0.6, 0.0], **at),
        "clean": rows([1, 1, 1], moved=False, broken_share=[0.0, 0.0, 0.25], **at),
    }
    asked = {"title": "x", "rows": ["defense"], "columns": {"A": {"attack": "pgd"}}, "extra": ["Worst"]}
    asked["columns"] = {name: {"attack": name} for name in ("pgd", "spsa")}
    made = manifest([*kept, still], {**asked, "metric": metric})
    return tables.cut(made, "T", frames.get, unexamined).rows[0].cells


def test_a_table_counts_shares_and_says_so() -> None:
    pgd, spsa, worst = table("accuracy")
    assert [each.estimate.value for each in (pgd, spsa, worst)] == pytest.approx(
        [(1 + 0.65 + 0.1) / 3, (0.9 + 0.4 + 1) / 3, (0.9 + 0.4 + 0.1) / 3]
    )
    for each in (pgd, spsa, worst):
        assert each.notes == ("mean over 20 draws of a random defense",)
    assert table("success")[0].notes == ("the first of 20 draws",)
    (flag,) = [each.message for each in worst.flags if each.code == "unluckiest-answer"]
    assert flag.startswith("an example counts by the unluckiest of 2 means over 20 draws")


@pytest.mark.parametrize("draws", [2, 20])
def test_what_chance_may_take_from_means_bounds_what_it_takes(draws: int) -> None:
    """The mean of the bound over runs is at least the mean of what the worst of several means loses."""
    noise, n, attacks, runs = np.random.default_rng(3), 300, 4, 200
    base = noise.beta(0.5, 0.5, n)
    chance = np.clip(base + noise.normal(0, 0.05, (attacks, n)), 0, 1)
    bounds, taken = [], []
    for _ in range(runs):
        held = noise.binomial(draws, chance) / draws
        answers = [shares(*(1 - each)) for each in held]
        bounds.append(_luck(answers, draws))
        taken.append(chance.min(0).mean() - held.min(0).mean())
    assert np.mean(bounds) >= np.mean(taken) > 0
