"""Flags that the outcomes behind one cell raise by themselves."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bench.report.checks.evidence import (
    Evidence,
    differed,
    failed,
    is_own_source,
    is_random,
    iterates,
    title,
)
from bench.report.checks.flags import Flag, Level
from bench.results import standing
from bench.results.conditions import Condition
from bench.results.metrics import Mask, binomial_p, goal_reached
from bench.results.outcomes import TIED, Rows

SHARE = 0.01
"""Share of the examples above which what was seen on them raises a flag."""

CHANCE = 0.01
"""Significance level."""

REACH = 0.5
"""Share of the radius to which an attack that fails should at least have looked."""


PACE = 0.5
"""Pace at the end of an attack, with its mean pace as 1, above which it was not done when it ended."""

FEW = 5
"""Of fewer examples that held nothing is said about the attack's pace."""


def cell_flags(seen: Sequence[Evidence]) -> list[Flag]:
    """Return the flags that the outcomes behind one cell raise by themselves.

    Args:
        seen: The evidence of the cell's conditions.

    Returns:
        The flags, in the order of the checks.
    """
    found = [flag for check in _CHECKS for flag in check(seen)]
    flags = dict.fromkeys(flag for each in seen for flag in each.condition.facts.flags)
    # Seeds may find the same.
    return list(dict.fromkeys([*found, *(Flag("out-of-reach", flag) for flag in flags)]))


def invalid_moves(seen: Iterable[Evidence]) -> int:
    """Return the number of invalid moves.

    Args:
        seen: The evidence of some conditions.

    Returns:
        How many adversarial images were not lawful, so that the clean image was shown instead.
    """
    return sum(int(each.rows["invalid"].sum()) for each in seen)


def _count(seen: Iterable[Evidence]) -> int:
    return sum(len(each.rows["index"]) for each in seen)


def _attacked(seen: Sequence[Evidence], *columns: str) -> list[Evidence]:
    """Return the evidence of attacks by themselves that has some columns."""
    return [
        each
        for each in seen
        if not each.condition.facts.idle
        and each.condition.facts.member is None
        and all(name in each.rows for name in columns)
    ]


def _on_failed(seen: Sequence[Evidence], column: str, says: Callable[[Rows], Mask]) -> tuple[int, int]:
    """Count what `says` tells of the examples that attacks failed on; return the count, and of how many."""
    count = known = 0
    for each in _attacked(seen, column):
        there = failed(each.rows) & ~np.isnan(each.rows[column])
        count += int((there & says(each.rows)).sum())
        known += int(there.sum())
    return count, known


# --- the trial ------------------------------------------------------------------------------------------


def trial_flags(seen: Sequence[Evidence]) -> list[Flag]:
    """Return what attacks failed at where the answer is known.

    Args:
        seen: The evidence of the cell's conditions, of each attack by itself.

    Returns:
        The flags, each once.
    """
    found = [
        Flag("trial", f"{title(each.condition)}: {code}: {message}", level)
        for each in seen
        for code, level, message in (each.trial or {}).get("found", ())
        if level != "note"
    ]
    return list(dict.fromkeys(found))


# --- the images and the answers ------------------------------------------------------------------------


def _invalid(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if count := invalid_moves(seen):
        n = _count(seen)
        level: Level = "alarm" if count == n else "doubt" if count > SHARE * n else "note"
        said = f"{count} of {n} moves were invalid: the clean image was shown"
        yield Flag("invalid-moves", "; ".join([said, *_reasons(seen)]), level)


def _reasons(seen: Sequence[Evidence]) -> Iterable[str]:
    """Yield for each attack why its moves were invalid: how many for which reason, and by how much."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    most: dict[tuple[str, str], float] = {}
    norms = {_attack(each): each.condition.norm for each in seen}
    for each in seen:
        name = _attack(each)
        for reason, (count, length) in (each.invalid or {}).items():
            counts[name][reason] += count
            if length is not None:
                most[name, reason] = max(length, most.get((name, reason), 0.0))
    for name, reasons in counts.items():
        said = [
            f"{count} {_why(reason, most.get((name, reason)), norms[name])}"
            for reason, count in reasons.items()
        ]
        yield f"{name}: {', '.join(said)}"


def _attack(each: Evidence) -> str:
    """Return the name of an attack; which of several that were run as one made a move, is not noted."""
    return title(each.condition) if each.condition.facts.member is None else "attacks run as one"


_WHY = {
    "not finite": "not finite",
    "out of the box": "outside the box [0, 1]",
    "out of the budget": "outside the ball",
}
"""Reasons by what receipts call them; others are of a form."""


def _why(reason: str, most: float | None, norm: str) -> str:
    """Return a reason in words, with its length where it has one."""
    said = _WHY.get(reason, f"of {reason}")
    if most is None:
        return said
    return f"{said} (by up to {most:.2g}{f' in {norm}' if reason == 'out of the budget' else ''})"


def _not_finite(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if count := sum(int((each.rows["label"] < 0).sum()) for each in seen):
        yield Flag("not-finite", f"{count} of {_count(seen)} answers were not finite, and count as broken")


def _differs(seen: Sequence[Evidence]) -> Iterable[Flag]:
    count, asked = differed([each.rows for each in seen])
    if count:
        declared = any(each.condition.facts.random for each in seen)
        said = f"{count} of {asked} answers differed when asked again"
        yield Flag("answers-differ", said, "note" if declared else None)


def _ties(seen: Sequence[Evidence]) -> Iterable[Flag]:
    known = [each.rows for each in seen if TIED in each.rows and not np.isnan(each.rows[TIED]).all()]
    n = sum(len(rows["index"]) for rows in known)
    count = sum(int((failed(rows) & (rows[TIED] > 0)).sum()) for rows in known)
    if count > SHARE * n:
        yield Flag(
            "ties",
            f"{count} of {n} images count as right although another class has the same logit: the order of "
            "the classes decides",
        )


# --- the view and the answer ---------------------------------------------------------------------------


def _view_differs(seen: Sequence[Evidence]) -> Iterable[Flag]:
    """Compare verdicts of a view that is said to be exactly what is scored with those of the defense."""
    if is_random(seen):
        return
    for column, what in (("view_margin", "attacked"), ("view_margin_clean", "clean")):
        won = held = known = 0
        for each in _attacked(seen, column):
            rows = each.rows if column == "view_margin" else each.clean
            if rows is None or not each.condition.facts.exact:
                continue
            at, there = _together(rows, each.rows)
            margin = each.rows[column][at]
            answer = _won(rows, each.rows, there, at)
            known += int((~np.isnan(margin)).sum())
            won += int(((margin > 0) & ~answer).sum())
            held += int(((margin < 0) & answer).sum())
        if won or held:
            said = (
                f"of {known} {what} images {won} are successes on the view and failures on the answer, and "
                f"{held} the other way round, though the view is said to be exactly what is scored"
            )
            yield Flag("view-differs", said, None if won + held > SHARE * known else "note")


def _probabilities(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for each in _attacked(seen, "probabilities"):
        # The answers of a read-out alone, to an attack that sees no more, are probabilities of 0 and 1.
        facts, known = each.condition.facts, each.rows["probabilities"]
        known = known[~np.isnan(known)]
        if facts.access != "decision" and len(known) and known.all():
            climbs = facts.access == "gradient" and facts.loss is None
            yield Flag(
                "probabilities",
                f"the view's answers to all of {len(known)} examples are non-negative and sum to 1, as those "
                "of a softmax do: the attack takes them for logits",
                None if climbs else "note",
            )
            return


def _own_source(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for each in seen:
        if is_own_source(each):
            source = each.condition.facts.source
            said = f"{source}, on which the images were crafted, has the weights of the defense: no transfer"
            yield Flag("source-is-victim", said)
            return


def _together(rows: Rows, other: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the examples of both, in the second and in the first."""
    _, there, at = np.intersect1d(rows["index"], other["index"], assume_unique=True, return_indices=True)
    return at, there


def _won(rows: Rows, attacked: Rows, there: np.ndarray, at: np.ndarray) -> Mask:
    """Return which answers are what the attack wants, without a refusal."""
    asked = {name: rows[name][there] for name in ("label", "truth", "rejected")}
    wanted = goal_reached({**asked, "target": attacked["target"][at]})
    return np.asarray(wanted & ~asked["rejected"], np.bool_)


# --- the attack ----------------------------------------------------------------------------------------


def _flat(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for note, happened in (("flat", "vanished"), ("nonfinite", "was not finite")):
        noted = [each for each in seen if note in each.rows]
        count = sum(int((each.rows[note] > 0).sum()) for each in noted)
        if count > SHARE * _count(noted):
            yield Flag("flat-gradient", f"the gradient {happened} on {count} of {_count(noted)} examples")
            return
    count, known = _on_failed(seen, "zero_gradients", lambda rows: rows["zero_gradients"] >= 0.5)
    if count > SHARE * known:
        yield Flag(
            "flat-gradient",
            f"on {count} of the {known} examples that held, at least half of the gradients were zero or not "
            "finite",
        )


def _unasked(seen: Sequence[Evidence]) -> Iterable[Flag]:
    asking = [each for each in seen if each.condition.facts.access == "gradient"]
    count, known = _on_failed(asking, "backwards", lambda rows: rows["backwards"] == 0)
    if count > SHARE * known:
        yield Flag(
            "no-gradient-asked",
            f"the attack asked for no gradient of {count} of the {known} examples that held",
        )


def _short(seen: Sequence[Evidence]) -> Iterable[Flag]:
    fixed = [each for each in seen if each.condition.facts.kind == "fixed-budget"]
    count, known = _on_failed(fixed, "probed", lambda rows: (rows["probed"] < REACH) & ~_seemed_won(rows))
    if count > SHARE * known:
        yield Flag(
            "short-moves",
            f"on {count} of the {known} examples that held, the attack asked about no image farther than "
            f"{REACH:g} of the radius",
        )


def _rising(seen: Sequence[Evidence]) -> Iterable[Flag]:
    """Flag what was not done when it ended; one step is not meant to be."""
    fixed = [
        each
        for each in seen
        if each.condition.facts.kind == "fixed-budget"
        and (each.condition.facts.access != "gradient" or iterates(each))
    ]
    count, known = _on_failed(fixed, "end_pace", lambda rows: rows["end_pace"] > PACE)
    if known >= FEW and 2 * count > known:
        yield Flag(
            "still-rising",
            f"on {count} of the {known} examples that held, the margin rose at the attack's end more than "
            f"{PACE:g} times as fast as on the whole: more steps may break more",
            None if any(each.condition.facts.access == "gradient" for each in fixed) else "note",
        )


def _seemed_won(rows: Rows) -> Mask:
    """Return on which examples the attack saw a success: whoever has one may stop, however near it is.

    A random defense may answer otherwise to the referee, and a view that differs from the answer does.
    """
    won = np.zeros(len(rows["index"]), np.bool_)
    for name in ("view_margin", "lost_success"):
        if name in rows:
            won |= rows[name] > 0
    return won


def _lost(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if is_random(seen):
        return
    exact = [each for each in seen if each.condition.facts.exact]
    count, known = _on_failed(exact, "lost_success", lambda rows: rows["lost_success"] > 0)
    if count > SHARE * known:
        yield Flag(
            "lost-successes",
            f"on {count} of the {known} examples that held, the attack had a lawful success before its eyes "
            "and returned another image",
        )


def _grew(seen: Sequence[Evidence]) -> Iterable[Flag]:
    fixed = [each for each in seen if each.condition.facts.kind == "fixed-budget"]
    if is_random(seen):
        return
    before, after = "view_margin_clean", "view_margin"
    away, known = _on_failed(fixed, after, lambda rows: rows[after] < rows[before])
    near, _ = _on_failed(fixed, after, lambda rows: rows[after] > rows[before])
    if away > 3 * near and binomial_p(away, away + near, 0.5) < CHANCE:
        yield Flag(
            "margin-grew",
            f"on {away} of the {known} examples that held, the attack ended farther from a success than it "
            "began, on the view that it looked at",
        )


def _saturated(seen: Sequence[Evidence]) -> Iterable[Flag]:
    noted = [each for each in seen if "saturated" in each.rows]
    # Where the attack won all the same, its loss did.
    lost = [(each.rows["saturated"] > 0) & (each.rows["label"] == each.rows["truth"]) for each in noted]
    if (count := sum(int(each.sum()) for each in lost)) > SHARE * _count(noted):
        yield Flag(
            "saturated-loss",
            f"the truth led by more than the attack's float32 softmax tells on {count} of {_count(noted)} "
            "examples that held",
        )


def _raised(seen: Sequence[Evidence]) -> Iterable[Flag]:
    noted = [each for each in seen if "raised" in each.rows]
    if count := sum(int((each.rows["raised"] > 0).sum()) for each in noted):
        yield Flag("attack-raised", f"the attack broke down on {count} of {_count(noted)} examples")


def _member_raised(seen: Sequence[Evidence]) -> Iterable[Flag]:
    """Flag a sequence one of whose attacks raised; in worst mode that is said of the attack's own column."""
    counts: dict[str, int] = defaultdict(int)
    for each in seen:
        if each.condition.facts.member is None:
            for label, mask in standing.raised(each.rows).items():
                counts[label] += int(mask.sum())
    for label, count in counts.items():
        yield member_raised(label, count, _count(seen))


def member_raised(name: str, count: int, n: int) -> Flag:
    """Return the flag of one of several attacks that were run as one, which raised.

    Args:
        name: What it is called.
        count: The number of examples on which it raised.
        n: The number of examples of the row.
    """
    said = f"{name} raised on {count} of {n} examples: the worst case is one over the other attacks there"
    return Flag("attack-raised", said)


def _unbounded(seen: Sequence[Evidence]) -> Iterable[Flag]:
    free = [each for each in seen if _limitless(each.condition)]
    lost = 0
    for each in free:
        won = goal_reached(each.rows) & ~each.rows["rejected"]
        lost += int((~won & (each.rows["label"] >= 0)).sum())
    if lost:
        yield Flag("unbounded-fails", f"without any limit, {lost} of {_count(free)} attempts failed")


def _limitless(condition: Condition) -> bool:
    """Return whether an attack can move an image anywhere, so that only its own search can fail."""
    facts = condition.facts
    if facts.idle or not facts.exact or facts.source is not None:
        return False
    if facts.kind == "minimum-norm":
        # An attack without gradients that finds no start, or spends all its queries, reads as robustness.
        return True
    reaches_all = condition.norm == "linf" and condition.radius is not None and condition.radius >= 1
    return facts.access == "gradient" and reaches_all


_CHECKS: Sequence[Callable[[Sequence[Evidence]], Iterable[Flag]]] = (
    _invalid,
    _not_finite,
    _differs,
    _view_differs,
    _probabilities,
    _ties,
    _own_source,
    _flat,
    _unasked,
    _short,
    _rising,
    _lost,
    _grew,
    _saturated,
    _raised,
    _member_raised,
    _unbounded,
)
