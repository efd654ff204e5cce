"""What is concluded from two sets of measurements: pairs, worst cases, seeds, floors, tiers."""

from typing import Any

import numpy as np
import pytest
from measures import all_of, held, measured

from bench.errors import InputError
from bench.gate.judge import check_policy, findings, rates, subject_of, tier_of, worst_case_of
from bench.gate.measurements import Measurements, network_of
from bench.gate.replay import image_findings
from bench.gate.verdicts import Check, Finding
from bench.suite.policy import Policy, Tiers


def judged(before: Measurements, now: Measurements, **rules: Any) -> dict[str, Finding]:
    """Return the findings by a short name: the attack, or ``worst case``."""
    found = findings(before, now, Policy(**rules))
    return {str(each.subject.coordinates.get("attack", "worst case")): each for each in found}


def status(*found: Finding) -> int:
    return Check("tasks.yaml", "a", "b", 0.01, 0.01, found).status()


def test_a_loss_of_many_examples_is_a_regression_and_names_them() -> None:
    lost = range(20, 40)
    before, now = all_of([measured("pgd", held(200, 1))]), all_of([measured("pgd", held(200, *lost))])
    (found,) = judged(before, now).values()
    assert found.verdict == "regressed"
    assert found.loss is not None
    assert (found.loss.n, found.loss.lost, found.loss.gained) == (200, 20, 1)
    assert [flip.index for flip in found.flips] == list(lost)
    flip = found.flips[0]
    assert (flip.truth, flip.before, flip.after, flip.attack) == (0, 0, 1, "pgd (logits)")
    assert found.reason.startswith("lost 9.5 points (20 lost and 1 gained of 200 examples, p = ")
    assert status(found) == 1


def test_few_examples_are_undecided_and_enough_of_them_held() -> None:
    few = judged(all_of([measured("pgd", held(60))]), all_of([measured("pgd", held(60))]))["pgd"]
    assert few.verdict == "undecided"
    assert few.needed is not None
    assert few.needed > 60
    n = few.needed + 5
    many = judged(all_of([measured("pgd", held(n))]), all_of([measured("pgd", held(n))]))["pgd"]
    assert (many.verdict, status(few), status(many)) == ("held", 5, 0)


def test_a_network_that_is_the_baseline_s_is_held_at_any_n_if_no_outcome_differs() -> None:
    one, other = measured("pgd", held(20, 3), network="abc"), measured("pgd", held(20, 4), network="abc")
    assert judged(all_of([one]), all_of([one]))["pgd"].verdict == "held"
    assert judged(all_of([one]), all_of([other]))["pgd"].verdict == "undecided"
    unknown = measured("pgd", held(20, 3))
    assert judged(all_of([unknown]), all_of([unknown]))["pgd"].verdict == "undecided"
    retrained = measured("pgd", held(20, 3), network="abd")
    assert judged(all_of([one]), all_of([retrained]))["pgd"].verdict == "undecided"


def test_seeds_are_averaged_example_by_example_and_are_no_more_examples() -> None:
    before = all_of([measured("pgd", held(300), seed=seed) for seed in range(3)])
    now = all_of(
        [measured("pgd", held(300, *(range(30) if seed == 0 else ())), seed=seed) for seed in range(3)]
    )
    loss = judged(before, now)["pgd"].loss
    assert loss is not None
    assert (loss.n, loss.gained) == (300, 0)
    assert loss.lost == pytest.approx(10)
    every = all_of([measured("pgd", held(300, *range(30)), seed=seed) for seed in range(3)])
    alone = judged(all_of([measured("pgd", held(300))]), all_of([measured("pgd", held(300, *range(30)))]))
    together = judged(before, every)["pgd"]
    assert together.p == pytest.approx(alone["pgd"].p)
    assert [(flip.seed, flip.index) for flip in together.flips[:3]] == [(0, 0), (1, 0), (2, 0)]


def test_the_worst_case_is_taken_example_by_example_clean_images_included() -> None:
    before = all_of(
        [measured("clean", held(100, 0)), measured("pgd", held(100, 1, 2)), measured("spsa", held(100, 2, 3))]
    )
    found = judged(before, before)["worst case"].loss
    assert found is not None
    assert found.before == pytest.approx(0.96)
    # Each attack breaks as many as before, but others, so that fewer stand against all.
    now = all_of(
        [measured("clean", held(100, 0)), measured("pgd", held(100, 4, 5)), measured("spsa", held(100, 6, 7))]
    )
    told = judged(before, now)
    loss = told["worst case"].loss
    assert loss is not None
    assert (loss.lost, loss.gained, loss.after) == (4, 3, pytest.approx(0.95))
    assert {flip.index: flip.attack for flip in told["worst case"].flips} == {
        4: "pgd (logits)", 5: "pgd (logits)", 6: "spsa (logits)", 7: "spsa (logits)",
    }  # fmt: skip
    assert rates(before) == {worst_case_of(next(iter(before.measured.values())).condition).name: (0.96, 100)}


def test_a_seed_that_lacks_an_attack_is_no_part_of_the_worst_case() -> None:
    every = [measured("clean", held(50), seed=seed) for seed in range(3)]
    every += [measured("pgd", held(50, 0, 1), seed=seed) for seed in range(2)]
    every += [measured("spsa", held(50, 2), seed=0)]
    loss = judged(all_of(every), all_of(every))["worst case"].loss
    assert loss is not None
    assert loss.before == pytest.approx(47 / 50)


def test_a_worst_case_is_of_the_examples_that_all_its_attacks_saw() -> None:
    before = all_of([measured("pgd", held(100, 50)), measured("spsa", held(10, 1))])
    loss = judged(before, before)["worst case"].loss
    assert loss is not None
    # Of the others it would read as held what one attack alone was tried on.
    assert (loss.n, loss.before) == (10, pytest.approx(0.9))
    assert [n for _, n in rates(before).values()] == [10]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"params": {"steps": 20}}, "attack.params.steps: none in the baseline, 20 now"),
        ({"digest": "1" * 64}, "data: other examples than the baseline's"),
        ({"radius": 0.2}, "radius: 0.1 in the baseline, 0.2 now"),
        ({"data": "mnist"}, "data: digits in the baseline, mnist now"),
        ({"source": "other"}, "source: none in the baseline, other now"),
    ],
)
def test_another_question_is_not_comparable_and_says_where_it_differs(
    changes: dict[str, Any], said: str
) -> None:
    before = all_of([measured("pgd", held(50))])
    (found,) = judged(before, all_of([measured("pgd", held(50), **changes)])).values()
    assert (found.verdict, found.reason) == ("not comparable", said)
    assert status(found) == 3
    (unrun,) = judged(before, all_of([], [measured("pgd", held(50), **changes)])).values()
    assert (unrun.verdict, unrun.reason) == ("not comparable", said)


def test_other_numbers_of_examples_and_other_seeds_are_not_comparable() -> None:
    before = all_of([measured("pgd", held(50), seed=0), measured("pgd", held(50), seed=1)])
    fewer = judged(before, all_of([measured("pgd", held(40), seed=seed) for seed in (0, 1)]))["pgd"]
    assert (fewer.verdict, fewer.reason) == ("not comparable", "n: 50 in the baseline, 40 now")
    one = judged(before, all_of([measured("pgd", held(50), seed=0)]))["pgd"]
    assert (one.verdict, one.reason) == ("not comparable", "nothing asks for it any more")


def test_what_was_not_measured_is_incomplete_and_so_is_the_worst_case_that_needs_it() -> None:
    both = [measured("clean", held(2000)), measured("pgd", held(2000)), measured("spsa", held(2000))]
    found = judged(all_of(both), all_of(both[:2], both[2:]))
    assert found["spsa"].verdict == found["worst case"].verdict == "incomplete"
    assert found["spsa"].reason == "not measured: it was not run"
    assert found["pgd"].verdict == "held"
    assert status(*found.values()) == 4


@pytest.mark.parametrize("side", ["baseline", "today"])
def test_an_invalid_move_is_incomplete(side: str) -> None:
    whole, void = measured("pgd", held(2000)), measured("pgd", held(2000), invalid=3)
    pair = (all_of([void]), all_of([whole])) if side == "baseline" else (all_of([whole]), all_of([void]))
    (found,) = judged(*pair).values()
    assert found.verdict == "incomplete"
    assert found.reason.startswith("3 of 2000 moves of")


def test_radii_that_print_alike_are_two_subjects() -> None:
    near = [measured("pgd", held(50, 1), radius=0.12341), measured("pgd", held(50, 2, 3), radius=0.12342)]
    found = findings(all_of(near), all_of(near), Policy())
    assert [each.loss.before for each in found if each.loss] == [0.98, 0.96]
    assert len({each.subject.name for each in found}) == 2


def test_names_that_run_together_are_two_subjects() -> None:
    pair = [
        measured("pgd", held(50, 1), defense="a, b", readout="c"),
        measured("pgd", held(50, 2, 3), defense="a", readout="b, c"),
    ]
    found = findings(all_of(pair), all_of(pair), Policy())
    assert [each.loss.before for each in found if each.loss] == [0.98, 0.96]


def test_clean_images_of_two_threats_are_two_subjects() -> None:
    many, few = measured("clean", held(100)), measured("clean", held(20), norm="l2", radius=None)
    found = findings(all_of([many, few]), all_of([many, few]), Policy())
    assert sorted(each.loss.n for each in found if each.loss) == [20, 100]
    assert len({each.subject.name for each in found}) == 2


def test_distances_are_compared_at_the_baseline_s_median() -> None:
    far = np.linspace(1, 2, 101)
    before = all_of([measured("cw", [0] * 101, distances=far.tolist())])
    (found,) = judged(before, before).values()
    assert found.subject.radius == pytest.approx(1.5)
    assert found.loss is not None
    assert found.loss.before == pytest.approx(50 / 101)
    nearer = all_of([measured("cw", [0] * 101, distances=(far - 0.2).tolist())])
    (worse,) = judged(before, nearer).values()
    assert worse.loss is not None
    # Those between 1.5 and 1.7 were further away than the median, and are not any more.
    assert (worse.loss.lost, worse.loss.gained) == (20, 0)
    assert worse.verdict == "regressed"
    still = all_of(
        [measured("cw", [0] * 101, distances=far.tolist()), measured("clean", held(101, 100), radius=None)]
    )
    assert judged(still, still)["cw"].subject.radius == pytest.approx(1.49)


def test_a_gain_that_is_too_good_and_a_new_flag_are_suspicious() -> None:
    before = all_of([measured("pgd", held(500, *range(100)))])
    now = all_of([measured("pgd", held(500), flat=400)])
    (found,) = judged(before, now).values()
    assert found.verdict == "held"
    assert any(each.startswith("20.0 points more are held") for each in found.suspicious)
    assert any(
        each.startswith("new flag flat-gradient: the gradient vanished on 400") for each in found.suspicious
    )
    check = Check("tasks.yaml", "a", "b", 0.01, 0.01, (found,))
    assert (check.status(), check.status(fail_on_gain=True)) == (0, 1)
    (known,) = judged(now, now).values()
    assert known.suspicious == ()


def test_a_floor_is_judged_by_the_bounds_of_the_worst_case() -> None:
    both = all_of([measured("clean", held(1000)), measured("pgd", held(1000, *range(400)))])
    by_floor = {floor: judged(both, both, floors={"model": floor})["worst case"] for floor in (50, 60, 70)}
    assert [each.floor.verdict for each in by_floor.values() if each.floor] == [
        "held",
        "undecided",
        "regressed",
    ]
    assert by_floor[70].verdict == "regressed"
    assert "is below the floor of 70 %" in by_floor[70].reason
    assert by_floor[50].floor is not None
    assert by_floor[50].floor.low < 0.6 < by_floor[50].floor.high


def test_a_floor_is_judged_on_the_one_attack_of_a_row() -> None:
    alone = all_of([measured("pgd", held(1000, *range(400)))])
    (found,) = findings(alone, alone, Policy(floors={"model": 70}))
    assert found.floor is not None
    assert (found.verdict, found.floor.verdict) == ("regressed", "regressed")
    subject = worst_case_of(measured("pgd", [1]).condition)
    (lower,) = findings(
        alone, alone, Policy(floors={"model": 50}), {subject: {0: dict.fromkeys(range(600), 0.0)}}
    )
    assert lower.floor is not None
    assert lower.floor.verdict == "regressed"


def test_a_floor_that_nothing_is_judged_on_is_never_green() -> None:
    far = np.linspace(1, 2, 2001)
    free = all_of([measured("cw", [0] * 2001, distances=far.tolist(), network="same")])
    clean = all_of([measured("clean", held(2000), network="same")])
    for each in (free, clean):
        assert status(*findings(each, each, Policy())) == 0
        found = findings(each, each, Policy(floors={"model": 20}))
        assert status(*found) == 4
        assert found[-1].reason.startswith("no accuracy within a radius")


def test_a_floor_that_is_not_held_decides_in_any_tier() -> None:
    both = all_of([measured("clean", held(1000)), measured("pgd", held(1000, *range(400)))])
    rules: dict[str, Any] = {"floors": {"model": 70}, "tiers": {"critical": [{"attack": "pgd"}]}}
    found = judged(both, both, **rules)
    assert (found["worst case"].tier, found["worst case"].verdict) == ("critical", "regressed")
    assert judged(both, both, **{**rules, "floors": {"model": 50}})["worst case"].tier == "advisory"


def test_what_stored_images_break_counts_for_the_floor_alone() -> None:
    both = all_of(
        [measured("pgd", held(1000, *range(400))), measured("clean", held(1000), norm="l2", radius=None)]
    )
    subject = next(
        each.subject for each in findings(both, both, Policy()) if each.subject.kind == "worst case"
    )
    # 200 of these are broken already.
    extra = {subject: {0: dict.fromkeys(range(200, 600), 0.0)}}
    found = next(
        each
        for each in findings(both, both, Policy(floors={"model": 50}), extra)
        if each.subject.kind == "worst case"
    )
    assert found.floor is not None
    assert found.floor.verdict == "regressed"
    assert found.floor.low < 0.4 < found.floor.high
    assert found.loss is not None
    assert found.loss.lost == 0


def test_tiers_say_what_decides() -> None:
    pgd, spsa = (subject_of(measured(name, [1]).condition) for name in ("pgd", "spsa"))
    worst = worst_case_of(measured("pgd", [1]).condition)
    rules = Policy(tiers=Tiers(advisory=[{"attack": "spsa"}]))
    assert [tier_of(each, rules) for each in (pgd, spsa, worst)] == ["critical", "advisory", "critical"]
    only = Policy.model_validate({"tiers": {"critical": [{"attack": ["pgd", "apgd"]}]}})
    assert [tier_of(each, only) for each in (pgd, spsa, worst)] == ["critical", "advisory", "advisory"]
    named = Policy.model_validate({"tiers": {"critical": ["model"], "advisory": [{"attack": "spsa"}]}})
    assert [tier_of(each, named) for each in (pgd, spsa, worst)] == ["critical", "advisory", "critical"]


def test_an_advisory_regression_is_told_and_decides_nothing() -> None:
    before = all_of([measured("pgd", held(2000)), measured("spsa", held(2000))])
    now = all_of([measured("pgd", held(2000)), measured("spsa", held(2000, *range(200)))])
    rules: dict[str, Any] = {"tiers": {"critical": [{"attack": "pgd"}]}}
    found = judged(before, now, **rules)
    assert (found["spsa"].verdict, found["spsa"].tier) == ("regressed", "advisory")
    assert status(*found.values()) == 0


def test_nothing_compared_is_never_green() -> None:
    assert status() == 4
    before = all_of([measured("pgd", held(2000))])
    rules: dict[str, Any] = {"tiers": {"advisory": ["model"]}}
    assert status(*judged(before, before, **rules).values()) == 4


def test_many_subjects_ask_for_more_certainty() -> None:
    def suite(lost: int) -> Measurements:
        return all_of(
            [measured("pgd", held(400, *range(lost if at == 0 else 0)), defense=f"m{at}") for at in range(30)]
        )

    alone = all_of([measured("pgd", held(400, *range(8)), defense="m0")])
    assert judged(all_of([measured("pgd", held(400), defense="m0")]), alone)["pgd"].verdict == "regressed"
    found = [each for each in findings(suite(0), suite(8), Policy()) if each.flips]
    assert [each.verdict for each in found] == ["undecided"]
    # What is printed of the examples knows of the others, too.
    (one,) = findings(all_of([measured("pgd", held(400), defense="m0")]), alone, Policy())
    assert found[0].detectable is not None
    assert one.detectable is not None
    assert found[0].detectable > one.detectable


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            {"floors": {"modle": 50}},
            ["check.floors.modle", "unknown defense 'modle'", "did you mean 'model'"],
        ),
        (
            {"tiers": {"critical": [{"atack": "pgd"}]}},
            ["unknown coordinate 'atack'", "did you mean 'attack'"],
        ),
        ({"tiers": {"advisory": ["modl"]}}, ["check.tiers.advisory.0", "no condition has 'modl'"]),
    ],
)
def test_rules_about_what_there_is_not_are_refused(rules: dict[str, Any], words: list[str]) -> None:
    condition = measured("pgd", [1]).condition
    with pytest.raises(InputError) as error:
        check_policy(Policy.model_validate(rules), [condition], lambda *place: ".".join(map(str, place)))
    for word in words:
        assert word in str(error.value)


def test_a_network_is_told_by_weights_code_and_settings_and_not_by_the_attack() -> None:
    def told(
        weights: str = "w", code: str = "c", inference: float = 1.0, attack: str = "a", build: str = "b"
    ) -> str | None:
        params = {"build": ["model:build", {"model": build}], "epochs": 3}
        train = {"key": "train", "defense": {"use": "module", "params": params}}
        described = {"victim": {"train": train, "inference": {"t": inference}}, "readout": "label"}
        sources = {"defenses.module": code, "attacks.pgd": attack}
        return network_of(described, {"inputs": {"train": weights, "craft": attack}, "sources": sources})

    same = told()
    assert same is not None
    assert told(attack="other") == same
    others = [told(weights="v"), told(code="d"), told(inference=2.0), told(build="e")]
    assert len({same, *others}) == 5
    assert network_of({"victim": {"train": {"key": "train"}}}, {"inputs": {}}) is None


def test_images_alone_are_held_where_none_flips_and_regressed_where_they_cannot_be_made_up_for() -> None:
    subject = worst_case_of(measured("pgd", [1]).condition)

    def verdict(n: int, flipped: int, mended: int) -> str:
        seed = {at: (1.0, float(at >= flipped)) for at in range(n - mended)}
        seed |= {at: (0.0, 1.0) for at in range(n - mended, n)}
        (found,) = image_findings({subject: [seed]}, Policy())
        return found.verdict

    assert verdict(60, 0, 0) == verdict(60, 0, 30) == "held"
    assert verdict(60, 1, 0) == verdict(500, 30, 30) == "undecided"
    assert verdict(500, 30, 2) == "regressed"


def test_seeds_whose_images_are_of_other_examples_are_compared_where_they_agree() -> None:
    subject = worst_case_of(measured("pgd", [1]).condition)
    first = {at: (1.0, 1.0) for at in range(10)}
    second = {at: (1.0, float(at != 9)) for at in range(5, 20)}
    (found,) = image_findings({subject: [first, second]}, Policy())
    assert found.loss is not None
    assert (found.loss.n, found.loss.lost) == (5, 0.5)
