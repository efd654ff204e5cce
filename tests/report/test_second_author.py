"""Evaluations that somebody else broke, who had the specification alone, are flagged; sound ones are not."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import second_author
from test_broken_evaluations import flags

from bench.report import tables
from bench.report.tables import unexamined
from bench.results.metrics import binomial_p, is_correct
from bench.results.outcomes import Stored
from suites import Ran, suite

LIMITED: dict[str, Any] = {"data": "digits", "threat": {"norm": "linf", "radius": second_author.RADIUS}}
DATA = {"digits": {"name": "digits", "split": "test", "size": 140}}

ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "fgsm": {"use": "fgsm"},
    "pgd": {"use": "pgd", "steps": 40},
    "square": {"use": "square", "queries": 200},
}

DEFENSES = {
    "rounds": "flat-gradient",
    "contrast": "flat-gradient",
    "square root": "flat-gradient",
    "hot": "flat-gradient",
    "clamped": "flat-gradient",
    "probabilities": "probabilities",
    "ripple": "one-step-beats-many",
    "ensemble": "view-differs",
    "rolled": "view-differs",
    "rounds unseen": "view-differs",
    "dropout": "view-differs",
    "shifts": "view-differs",
    "neighbour": "view-differs",
    "far": "view-differs",
    "off the grid": "view-differs",
    "unsure": "view-differs",
    "reversed gradient": "blind-beats-seeing",
    "gradient of noise": "blind-beats-seeing",
    "turned gradient": "blind-beats-seeing",
    "half of the gradient": "blind-beats-seeing",
    "cosines": "blind-beats-seeing",
    "noise undeclared": "answers-differ",
    "company": "answers-differ",
    "scaled twice": "at-chance",
}
"""Broken defenses, and a flag that must stand at PGD, or at the clean answers."""

ALONE = {
    "255": "short-moves",
    "l2-ball": "short-moves",
    "by-batch": "short-moves",
    "over-nothing": "invalid-moves",
    "unprojected": "invalid-moves",
    "four-bits": "invalid-moves",
    "softmax-of-softmax": "flat-gradient",
    "descends": "margin-grew",
    "other-label": "margin-grew",
    "returns-its-start": "lost-successes",
    "first-half": "lost-successes",
    "skips-a-quarter": "lost-successes",
    "mask-inverted": "lost-successes",
    "moves-exchanged": "lost-successes",
    "flees-its-answer": "lost-successes",
    "all-alike": "lost-successes",
}
"""Broken attacks, and a flag that must stand at their number although no other attack is in the table."""

BESIDE = ("tiny-steps", "only-up", "no-sign", "to-class-0")
"""Broken attacks that only a better one beside them shows."""


def cut(ran: Ran, attacks: Iterable[str], defense: str = "d", **more: Any) -> tables.RenderedTable:
    """Cut a table of a few attacks on one defense, as if nothing else had been run."""

    def stored(key: str) -> Stored | None:
        file = ran.store.artefact("evaluate", key)
        return Stored.of(file) if file.exists() else None

    manifest = ran.plan.manifest()
    found = [
        each
        for each in manifest["conditions"]
        if each["coordinates"]["defense"] == defense and each["coordinates"]["attack"] in attacks
    ]
    columns = {each: {"attack": each} for each in attacks}
    table = {"title": "x", "rows": ["defense"], "columns": columns, "extra": ["Min"], **more}
    return tables.cut({**manifest, "conditions": found, "tables": {"T": table}}, "T", stored, unexamined)


def ran(folder: Path, defenses: dict[str, Any], attacks: dict[str, Any], *tasks: dict[str, Any]) -> Ran:
    done = Ran(suite(folder, defenses, attacks, list(tasks), data=DATA))
    assert not done.failed, done.failed[0].error
    return done


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    defenses = {case: {"use": "toy/second", "case": case} for case in DEFENSES}
    return ran(tmp_path_factory.mktemp("defenses"), defenses, ATTACKS, LIMITED)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    own = {case: {"use": f"toy/second-{case}"} for case in (*ALONE, *BESIDE, "sound")}
    return ran(tmp_path_factory.mktemp("attacks"), {"d": {"use": "toy/second"}}, {**ATTACKS, **own}, LIMITED)


@pytest.mark.parametrize("case", DEFENSES)
def test_a_broken_defense_is_flagged(case: str, defended: Ran) -> None:
    found = flags(cut(defended, ATTACKS, case), "doubt", "alarm")
    assert DEFENSES[case] in found["pgd"] | found["clean"], found
    assert found["Min"]


@pytest.mark.parametrize("case", ALONE)
def test_a_broken_attack_is_flagged_without_another_beside_it(case: str, attacked: Ran) -> None:
    assert ALONE[case] in flags(cut(attacked, ["clean", case]), "doubt", "alarm")[case]


@pytest.mark.parametrize("case", BESIDE)
def test_a_weak_attack_is_flagged_beside_one_step(case: str, attacked: Ran) -> None:
    assert "one-step-beats-many" in flags(cut(attacked, ["clean", "fgsm", case]), "alarm")[case]


def test_a_sound_attack_of_ones_own_raises_nothing(attacked: Ran) -> None:
    assert not any(flags(cut(attacked, [*ATTACKS, "sound"]), "doubt", "alarm").values())


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, "ce"),
        ({"radius": second_author.RADIUS, "epochs": 25}, "ce"),
        ({"case": "sound refusal"}, "margin"),
    ],
)
def test_a_sound_defense_raises_nothing_above_a_note(
    settings: dict[str, Any], loss: str, tmp_path: Path
) -> None:
    """Beside a refusal the cross-entropy misses what a search on scores breaks, and is doubted rightly."""
    attacks = {**ATTACKS, "pgd": {**ATTACKS["pgd"], "loss": loss}}
    done = ran(tmp_path, {"d": {"use": "toy/second", **settings}}, attacks, LIMITED)
    assert not any(flags(cut(done, ATTACKS), "doubt", "alarm").values())


def test_sound_searches_for_the_least_move_raise_nothing_above_a_note(tmp_path: Path) -> None:
    attacks = {
        **{name: ATTACKS[name] for name in ("clean", "pgd", "square")},
        "deepfool": {"use": "deepfool"},
        "cw": {"use": "cw-l2", "searches": 4, "steps": 60, "lr": 0.02, "c": 0.1},
    }
    free = {"data": "digits", "threat": {"norm": "l2"}, "attacks": ["deepfool", "cw"]}
    limited = {
        "data": "digits",
        "threat": {"norm": "l2", "radius": 0.5},
        "attacks": ["clean", "pgd", "square"],
    }
    done = ran(tmp_path, {"d": {"use": "toy/second"}}, attacks, limited, free)
    table = cut(done, attacks, radii=[0.5], where={"radius": 0.5})
    assert not any(flags(table, "doubt", "alarm").values())


def test_an_attack_on_a_random_defense_goes_on_after_a_lucky_draw(tmp_path: Path) -> None:
    """One that stopped at the first success of a mean left 59 %, where one step left 39 %."""
    task = {**LIMITED, "views": [{"use": "logits", "draws": 20}], "seeds": [0, 1, 2]}
    attacks = {**ATTACKS, "goes on": {**ATTACKS["pgd"], "drop": False}}
    del attacks["square"]
    done = ran(tmp_path, {"d": {"use": "toy/second", "case": "sound noise"}}, attacks, task)
    assert not any(flags(cut(done, attacks), "doubt", "alarm").values())
    more = fewer = 0
    for seed in task["seeds"]:
        stopped, went_on = (is_correct(done.outcomes(attack=each, seed=seed)) for each in ("pgd", "goes on"))
        more += int((stopped & ~went_on).sum())
        fewer += int((went_on & ~stopped).sum())
    assert binomial_p(more, more + fewer, 0.5) > 0.01
