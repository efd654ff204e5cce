"""Tables on rounded images: counted from answers that are known, as any table is from outcomes."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from manifests import clean, condition, first, manifest, rows, skip

from bench.quantities import DASH
from bench.report import rounding
from bench.report.rounding import RoundedCell, cells, left_of, written
from bench.results.conditions import Condition
from bench.results.metrics import wilson
from bench.results.outcomes import arrays

TABLE = {
    "title": "T",
    "rows": ["defense"],
    "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}, "SPSA": {"attack": "spsa"}},
}
N = 40


def answers(stood: Any, refused: Any = None) -> dict[str, Any]:
    """Return what a defense answers to rounded images of class 3, where it stands on some."""
    held = np.asarray(stood, bool)
    nobody = np.zeros(len(held), bool)
    return {"label": np.where(held, 3, 5), "rejected": nobody if refused is None else refused}


def made(rounded: Mapping[str, Any], *more: Mapping[str, Any], **outcomes: Any) -> list[RoundedCell]:
    """Return the cells of a table of clean images and PGD, by the rounded answers of each job."""
    conditions = [clean("clean"), condition("pgd", n=N), *more]
    told = manifest(conditions, TABLE, [skip("it needs scores", attack="spsa")], data={"digits": {}})
    known = {"clean": rows(first(N, 38), moved=False), "pgd": rows(first(N, 12)), **outcomes}
    asked: list[str] = []

    def ask(each: Condition) -> Any:
        asked.append(each.job)
        return rounded[each.job]

    found = cells(told, ["T"], known.get, ask)
    assert len(asked) == len(set(asked)), "each evaluation is asked about once"
    return found


def test_accuracies_and_survivors_are_counted_by_hand() -> None:
    # 28 were broken; of these 5 are right once they are rounded, and 2 that stood are broken then.
    after = first(N, 12) | (np.arange(N) >= 35)
    after[:2] = False
    pgd, spsa = made({"pgd": answers(after)})
    assert (pgd.row, pgd.column, pgd.table) == (("cnn",), "PGD", "T")
    assert pgd.scored.estimate is not None
    assert pgd.rounded.estimate is not None
    assert (pgd.scored.estimate.value, pgd.rounded.estimate.value) == (12 / N, 15 / N)
    assert (pgd.rounded.estimate.low, pgd.rounded.estimate.high) == pytest.approx(wilson(15 / N, N))
    assert (pgd.found, pgd.kept) == (28, 23)
    assert pgd.surviving == (23 / 28, *wilson(23 / 28, 28))
    # What cannot be attacked is a dash with its reason; clean images are no business of rounding.
    assert (spsa.column, spsa.reason, spsa.surviving) == ("SPSA", "it needs scores", None)


def test_answers_that_do_not_change_change_no_number() -> None:
    before = rows(first(N, 12), rejected=np.arange(N) % 5 == 0)
    same = {name: before[name].to_numpy() for name in ("label", "rejected")}
    (pgd, _) = made({"pgd": same}, pgd=before)
    assert pgd.rounded.estimate == pgd.scored.estimate
    assert pgd.found == pgd.kept > 0


def test_refusals_count_as_everywhere() -> None:
    """A moved image that is refused is right; one that nobody moved is not."""
    stood = np.array([True, False, False, False])
    before = arrays(rows(stood, distance=np.array([0.1, 0.1, 0.1, 0.0])))
    after = {**before, "rejected": np.array([False, True, False, True])}
    assert left_of(before, after) == (2, 2, 1)


def test_seeds_are_averaged_and_targets_are_a_worst_case() -> None:
    other = condition("pgd-1", seed=1, n=N)
    target = condition("pgd-t", target=1, n=N)
    stood = {"pgd": first(N, 10), "pgd-1": first(N, 30), "pgd-t": np.arange(N) >= 5}
    known = {name: rows(each) for name, each in stood.items()}
    after = {name: answers(each) for name, each in stood.items()}
    (pgd, _) = made({**after, "pgd": answers(first(N, 20))}, other, target, **known)
    assert pgd.rounded.estimate is not None
    # Example by example within a seed: 5 to 19 stand of seed 0, 30 of seed 1.
    assert pgd.rounded.estimate.value == pytest.approx((15 / N + 30 / N) / 2)
    assert pgd.found == 30 + 10 + 5
    assert pgd.kept == 20 + 10 + 5


def test_distances_are_read_at_the_radius_of_the_column() -> None:
    """What moved further failed there, however its rounded image is answered."""
    table = {
        "title": "T",
        "rows": ["defense"],
        "columns": ["radius"],
        "where": {"attack": "cw"},
        "radii": [0.1, 1.0],
    }
    cw = condition("cw", attack="cw", kind="minimum-norm", radius=None, n=4)
    told = manifest([clean("clean", n=4, radius=None), cw], table, data={"digits": {}})
    known = {
        "clean": rows(np.ones(4, bool), moved=False),
        "cw": rows(np.zeros(4, bool), distance=np.array([0.05, 0.08, 0.5, 0.9])),
    }
    near, far = cells(told, ["T"], known.get, lambda _: answers([True, False, False, True]))
    assert (near.found, near.kept) == (2, 1)
    assert (far.found, far.kept) == (4, 2)
    assert near.rounded.estimate is not None
    assert near.rounded.estimate.value == 3 / 4


def test_what_was_not_run_or_cannot_be_asked_is_a_dash_with_the_reason() -> None:
    (lost, _) = made({"pgd": "images are not kept there"})
    assert (lost.reason, lost.rounded.estimate) == ("images are not kept there", None)
    assert lost.scored.estimate is not None, "what is stored is there all the same"
    (gone, _) = made({}, pgd=None)
    assert gone.reason == "not run"


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "json"])
def test_each_form_says_numbers_and_reasons(form: Any) -> None:
    found = made({"pgd": answers(first(N, 15))})
    text = written(found, form)
    if form in ("csv", "json"):
        lines = json.loads(text) if form == "json" else list(csv.DictReader(io.StringIO(text)))
        pgd, spsa = lines
        assert [float(pgd[name]) for name in ("value", "rounded_value", "n", "found", "kept")] == [
            30.0, 37.5, 40, 28, 25,
        ]  # fmt: skip
        assert float(pgd["survive"]) == pytest.approx(100 * 25 / 28, abs=1e-6)
        assert float(pgd["survive_low"]) < float(pgd["survive"]) < float(pgd["survive_high"])
        assert spsa["reason"] == "it needs scores"
        assert not spsa["rounded_value"]
    else:
        for said in ("30.0", "37.5", "25 of 28", "it needs scores", "1/510", "Table T"):
            assert said in text
    if form == "text":
        assert max(map(len, text.splitlines())) <= 80


def test_a_name_that_a_terminal_would_obey_is_spelled() -> None:
    found = made({"pgd": "\x1b[2J[bold]"})
    assert "\x1b" not in written(found, "text")
    assert "\x1b" not in written(found, "markdown")
    assert rounding._line(found[0])[-1] == DASH
