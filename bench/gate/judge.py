"""From two sets of measurements to findings: subjects are paired example by example, tested and judged.

An example's value is 1 where it is held and 0 where it is broken, and of several seeds, or draws of a random
defense, their mean: they are never pooled as more examples. In a row's worst case an example is held if it is
held against every attack; of several draws it is held as often as against the attack that breaks it most.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from bench.console import count
from bench.errors import InputError, did_you_mean
from bench.gate import statistics
from bench.gate.measurements import (
    MAJORITY,
    Coordinates,
    Measured,
    Measurements,
    clean_rows,
    distances,
    found_by,
    held,
    place_of,
    row_of,
)
from bench.gate.statistics import Loss
from bench.gate.verdicts import WORST_FIRST, Finding, Flip, Floor, Subject, Tier, Verdict
from bench.quantities import format_value, fraction
from bench.report import checks
from bench.results.conditions import QUESTION, Condition
from bench.results.metrics import METRICS, PerExample, common, settle
from bench.results.outcomes import BROKEN_SHARE
from bench.suite.layout import matches
from bench.suite.policy import Policy

_ACCURACY = METRICS["accuracy"]
"""Of its values the least is the worst."""


@dataclass(frozen=True)
class Pair:
    """The conditions of one subject and one seed, before and now."""

    before: tuple[Measured, ...]
    now: tuple[Measured, ...]


@dataclass(frozen=True)
class Subjects:
    """What is compared, and what cannot be."""

    pairs: Mapping[Subject, Mapping[int, Pair]]
    """By subject, the pair of each seed."""
    blocked: Mapping[Subject, tuple[Verdict, str]]
    """Subjects that are not compared, with the verdict and its reason."""
    new: int
    """How many conditions the baseline does not know."""


def subjects_of(before: Measurements, now: Measurements) -> Subjects:
    """Pair what the baseline measured with what is measured now.

    Args:
        before: The baseline.
        now: The measurements of today, those that are missing included.

    Returns:
        The subjects: a condition each, and the worst case of each row of several.
    """
    asked = {place: condition for place, (condition, _) in now.asked.items()}
    pairs: dict[Subject, dict[int, Pair]] = defaultdict(dict)
    blocked: dict[Subject, tuple[Verdict, str]] = {}
    rows: dict[Coordinates, dict[int, list[tuple[Measured, Measured]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    broken_rows: dict[Coordinates, tuple[Verdict, str]] = {}
    still = _attacked_rows(before)
    for place, one in before.measured.items():
        subject = subject_of(one.condition)
        other = now.measured.get(place)
        reason = _blocked(one, other, now, asked)
        belongs = still.get(victim_of_row(one.condition), ()) if one.condition.facts.idle else ()
        own = [row_of(one.condition)] if not one.condition.facts.idle else list(belongs)
        if reason is not None:
            blocked.setdefault(subject, reason)
            for row in own:
                broken_rows.setdefault(row, (reason[0], f"{subject.name}: {reason[1]}"))
            continue
        assert other is not None
        pairs[subject][one.condition.seed] = Pair((one,), (other,))
        for row in own:
            rows[row][one.condition.seed].append((one, other))
    for row, every in rows.items():
        # A seed without one of the attacks, or with clean images alone, would read as more robust.
        attacked = {
            seed: sum(not one.condition.facts.idle for one, _ in both) for seed, both in every.items()
        }
        seeds = {seed: every[seed] for seed, attacks in attacked.items() if attacks == max(attacked.values())}
        if max(attacked.values()) == 0 or max(map(len, seeds.values())) < 2:
            continue
        first = next(each for each, _ in next(iter(seeds.values())) if not each.condition.facts.idle)
        subject = worst_case_of(first.condition)
        if row in broken_rows:
            blocked[subject] = broken_rows[row]
            continue
        pairs[subject] = {
            seed: Pair(tuple(one for one, _ in both), tuple(other for _, other in both))
            for seed, both in seeds.items()
        }
    compared = {subject: seeds for subject, seeds in pairs.items() if subject not in blocked}
    return Subjects(compared, blocked, sum(place not in before.measured for place in asked))


def victim_of_row(condition: Condition) -> Coordinates:
    """Return who is asked about which data set, whatever the attack, the threat and the seed are."""
    return checks.coordinates(condition, "attack", "view", "target", "norm", "radius", "seed")


def _attacked_rows(measurements: Measurements) -> dict[Coordinates, list[Coordinates]]:
    """Return by who is asked the rows in which something is attacked: clean images belong to each of them."""
    found: dict[Coordinates, dict[Coordinates, None]] = defaultdict(dict)
    for each in measurements.measured.values():
        if not each.condition.facts.idle:
            found[victim_of_row(each.condition)][row_of(each.condition)] = None
    return {victim: list(rows) for victim, rows in found.items()}


def _blocked(
    one: Measured, other: Measured | None, now: Measurements, asked: Mapping[Coordinates, Condition]
) -> tuple[Verdict, str] | None:
    """Return why a condition of the baseline cannot be compared; None where it can."""
    place = place_of(one.condition)
    if other is None:
        if place not in now.missing:
            return "not comparable", gone(one.condition, asked.values())
        missing = now.missing[place]
        different = [] if missing.question is None else one.question.differences(missing.question)
        if different:
            return "not comparable", "; ".join(different)
        return "incomplete", f"not measured: {missing.reason}"
    if different := one.question.differences(other.question):
        return "not comparable", "; ".join(different)
    if not np.array_equal(one.rows["index"], other.rows["index"]):
        return "not comparable", "the outcomes are of other examples than the baseline's"
    for when, each in (("the baseline", one), ("today", other)):
        if invalid := int(each.rows["invalid"].sum()):
            n = len(each.rows["index"])
            return (
                "incomplete",
                f"{invalid} of {n} moves of {when} are invalid, so nothing was shown for them",
            )
    return None


def gone(condition: Condition, asked: Iterable[Condition]) -> str:
    """Return a sentence about a condition that is not asked for any more, with what is asked in its place.

    Args:
        condition: The condition of the baseline.
        asked: The conditions of today.
    """
    fixed = checks.coordinates(condition, *QUESTION)
    for other in asked:
        if checks.coordinates(other, *QUESTION) == fixed:
            different = [
                f"{name}: {format_value(condition.coordinates[name])} in the baseline, "
                f"{format_value(other.coordinates[name])} now"
                for name in QUESTION
                if condition.coordinates[name] != other.coordinates[name]
            ]
            return "; ".join(different)
    return "nothing asks for it any more"


def subject_of(condition: Condition) -> Subject:
    """Return a condition without its seed, as a subject."""
    coordinates = {name: value for name, value in condition.coordinates.items() if name != "seed"}
    attack = checks.title(condition)
    if condition.target is not None:
        attack += f", target {condition.target}"
    return Subject("condition", coordinates, f"{_who(condition)}, {attack}, {_threat(condition)}")


def worst_case_of(condition: Condition) -> Subject:
    """Return the worst case of a condition's row, as a subject."""
    free = ("seed", "attack", "view", "target")
    coordinates = {name: value for name, value in condition.coordinates.items() if name not in free}
    return Subject("worst case", coordinates, f"{_who(condition)}, worst case, {_threat(condition)}")


def _who(condition: Condition) -> str:
    served = {
        name.removeprefix("inference."): value
        for name, value in condition.coordinates.items()
        if name.startswith("inference.")
    }
    said = ", ".join(f"{name} {format_value(value)}" for name, value in served.items())
    defense, readout = condition.coordinates["defense"], condition.coordinates["readout"]
    return f"{defense} ({said}), {readout}" if said else f"{defense}, {readout}"


def _threat(condition: Condition) -> str:
    if condition.radius is None:
        return f"{condition.data}, {condition.norm}"
    said = format_value(condition.radius)
    # No two subjects may share a name because a radius was rounded in it.
    whole = math.isclose(float(str(fraction(said))), condition.radius, rel_tol=1e-9)
    return f"{condition.data}, {condition.norm} {said if whole else repr(condition.radius)}"


# --- values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """What is known of each example, before and now, as means over seeds."""

    index: Any
    """Places in the data set (N,), ascending."""
    before: Any
    """Values in [0, 1], (N,)."""
    seeds: Mapping[int, Any]
    """The values of today by seed, each (N,)."""
    radius: float | None
    """The radius at which distances are read, where they are."""

    @property
    def now(self) -> Any:
        """The values of today in [0, 1], (N,)."""
        return np.mean(list(self.seeds.values()), axis=0)


class Reader:
    """Reads the values of subjects from both sides.

    Args:
        before: The baseline.
        now: The measurements of today.
    """

    def __init__(self, before: Measurements, now: Measurements) -> None:
        self._clean = clean_rows(before.measured.values()), clean_rows(now.measured.values())

    def values(self, seeds: Mapping[int, Pair]) -> Values:
        """Return the values of a subject, of the examples that all its attacks saw with all its seeds.

        Args:
            seeds: Its conditions, by seed.
        """
        radius = self.radius(seeds)
        sides = [
            [
                settle(_ACCURACY, [self.of(each, 0, radius) for each in pair.before])
                for pair in seeds.values()
            ],
            [settle(_ACCURACY, [self.of(each, 1, radius) for each in pair.now]) for pair in seeds.values()],
        ]
        index = common([each.index for side in sides for each in side])
        before, now = ([each.values[np.searchsorted(each.index, index)] for each in side] for side in sides)
        return Values(index, np.mean(before, axis=0), dict(zip(seeds, now, strict=True)), radius)

    def of(self, measured: Measured, side: int, radius: float | None) -> PerExample:
        """Return the values of one condition on one side (0: the baseline, 1: today)."""
        facts, own = measured.condition.facts, measured.condition.radius
        if facts.idle or facts.kind == "fixed-budget":
            return held(measured, self._clean[side], None)
        return held(measured, self._clean[side], radius if own is None else own)

    def radius(self, seeds: Mapping[int, Pair]) -> float | None:
        """Return the radius at which the distances of minimum-norm attacks are read.

        It is the median of the baseline's least distances: half of its examples are held there, so that a
        change either way shows. Infinite where fewer than half were broken at all.
        """
        least = []
        for pair in seeds.values():
            free = [each for each in pair.before if _free(each)]
            if not free:
                return None
            least.append(settle(_ACCURACY, [distances(each, self._clean[0]) for each in free]).values)
        # An order statistic, so that it is the distance of an example whatever else is infinite.
        every = np.sort(np.concatenate(least))
        return float(every[(len(every) - 1) // 2])


def _free(measured: Measured) -> bool:
    """Return whether a condition's outcomes are distances, for no radius was asked."""
    facts = measured.condition.facts
    return facts.kind == "minimum-norm" and not facts.idle and measured.condition.radius is None


# --- findings ----------------------------------------------------------------------------------------


def findings(
    before: Measurements,
    now: Measurements,
    policy: Policy,
    extra: Mapping[Subject, Mapping[int, Mapping[int, float]]] | None = None,
) -> tuple[Finding, ...]:
    """Return what is known of every subject of the baseline.

    Args:
        before: The baseline.
        now: The measurements of today.
        policy: The rules.
        extra: By subject, seed and index, how often an example is held now against stored images and attacks
            begun at them, in [0, 1]. Floors are judged with them; the paired test is not, since the baseline
            has no such.

    Returns:
        The findings: conditions and worst cases in the order of the baseline.
    """
    found, reader = subjects_of(before, now), Reader(before, now)
    blocked, read = dict(found.blocked), dict[Subject, Values]()
    for subject, seeds in found.pairs.items():
        values = reader.values(seeds)
        if len(values.index):
            read[subject] = values
        else:
            blocked[subject] = (
                "not comparable",
                "no example was shown to all its attacks, with all its seeds",
            )
    losses = {
        subject: statistics.paired_loss(values.before, values.now, alpha=policy.alpha)
        for subject, values in read.items()
    }
    adjusted = dict(zip(losses, statistics.holm([each.p for each in losses.values()]), strict=True))
    made = [
        Finding(subject, verdict, reason, tier_of(subject, policy))
        for subject, (verdict, reason) in blocked.items()
    ]
    for subject, loss in losses.items():
        finding = _judged(subject, loss, adjusted[subject], policy, len(losses))
        seeds = found.pairs[subject]
        if loss.churn == 0 and _same_network(seeds):
            # Nothing is left to chance: one network, and every answer is what it was.
            reason = f"the network is the baseline's to the last bit, and so are all {loss.n} outcomes"
            finding = replace(finding, verdict="held", reason=reason, needed=None)
        gained = _gained(seeds, reader, read[subject].radius) if finding.suspicious else ()
        finding = replace(
            finding,
            subject=replace(subject, radius=read[subject].radius),
            flips=tuple(_flips(seeds, reader, read[subject].radius)),
            suspicious=(*finding.suspicious, *gained, *_new_flags(seeds)),
        )
        if _bears_floor(subject, seeds, found):
            alone = subject.kind == "condition"
            row = worst_case_of(seeds[min(seeds)].before[0].condition) if alone else subject
            finding = _floored(finding, read[subject], policy, (extra or {}).get(row, {}))
        made.append(finding)
    made += _floors_unjudged(made, policy)
    order = {subject: number for number, subject in enumerate(_order(before))}
    return tuple(sorted(made, key=lambda each: order.get(each.subject, len(order))))


def rates(measurements: Measurements) -> dict[str, tuple[float, int]]:
    """Return the accuracy of every worst case, or of what is measured where nothing is one.

    Args:
        measurements: A baseline, or the measurements of today.

    Returns:
        By the name of the subject, the share that is held and the number of examples.
    """
    reader, found = Reader(measurements, measurements), subjects_of(measurements, measurements)
    worst = {subject: seeds for subject, seeds in found.pairs.items() if subject.kind == "worst case"}
    numbers = {}
    for subject, seeds in (worst or found.pairs).items():
        values = reader.values(seeds)
        # At the median of its own distances half is held, whatever the defense.
        if len(values.index) and values.radius is None:
            numbers[subject.name] = (float(values.now.mean()), len(values.index))
    return numbers


def beyond(measurements: Measurements, extra: Mapping[Subject, Mapping[int, Mapping[int, float]]]) -> int:
    """Return how many examples are broken that a worst case holds, counted for each subject and seed.

    Args:
        measurements: What was measured.
        extra: By worst case, seed and index, how often an example is held against something else, in [0, 1].
    """
    reader, found = Reader(measurements, measurements), 0
    for subject, seeds in subjects_of(measurements, measurements).pairs.items():
        if subject in extra and len((values := reader.values(seeds)).index):
            for seed, each in values.seeds.items():
                less = _lowered(values.index, each, extra[subject].get(seed, {}))
                found += int(((each > MAJORITY) & (less <= MAJORITY)).sum())
    return found


def _lowered(index: Any, values: Any, extra: Mapping[int, float]) -> Any:
    """Return how often examples are held, where `extra` may hold some of them less often."""
    return np.minimum(values, [extra.get(each, 1.0) for each in index.tolist()])


def _judged(subject: Subject, loss: Loss, p: float, policy: Policy, subjects: int) -> Finding:
    """Return the finding of a paired loss alone, one of several `subjects` that are tested."""
    alpha, tolerance = policy.alpha, policy.tolerance / 100
    verdict = statistics.verdict_of(loss, p, tolerance=tolerance, alpha=alpha)
    needed = None
    if verdict == "undecided":
        needed = statistics.needed_examples(loss, tolerance=tolerance, alpha=alpha, subjects=subjects)
    both_ways = loss.churn - abs(loss.value)
    gain = statistics.is_gain(loss, p, tolerance=tolerance, alpha=alpha)
    points = f"{-100 * loss.value:.1f} points"
    too_good = (
        (f"{points} more are held than in the baseline, which is rarely a better defense",) if gain else ()
    )
    return Finding(
        subject=subject,
        verdict=verdict,
        reason=_reason(loss, p, verdict),
        tier=tier_of(subject, policy),
        loss=loss,
        p=p,
        needed=needed,
        detectable=statistics.detectable_loss(
            loss.n, both_ways, tolerance=tolerance, alpha=alpha, subjects=subjects
        ),
        suspicious=too_good,
    )


def _reason(loss: Loss, p: float, verdict: Verdict) -> str:
    changed = f"{loss.lost:g} lost and {loss.gained:g} gained of {count(loss.n, 'example')}, p = {p:.2g}"
    if verdict == "regressed":
        return f"lost {100 * loss.value:.1f} points ({changed})"
    if verdict == "held":
        return f"lost at most {max(100 * loss.high, 0):.1f} points ({changed})"
    return f"the loss may be anything from {100 * loss.low:.1f} to {100 * loss.high:.1f} points ({changed})"


def _bears_floor(subject: Subject, seeds: Mapping[int, Pair], found: Subjects) -> bool:
    """Return whether a floor is judged on a subject: on a worst case, or on the one attack of its row."""
    if subject.kind == "worst case":
        return True
    condition = seeds[min(seeds)].before[0].condition
    row = worst_case_of(condition)
    return not condition.facts.idle and row not in found.pairs and row not in found.blocked


def _floors_unjudged(made: Sequence[Finding], policy: Policy) -> list[Finding]:
    """Return a finding for each floor that was judged on nothing: what is required is never passed over."""
    judged = {str(each.subject.coordinates["defense"]) for each in made if each.floor is not None}
    return [
        Finding(
            Subject("worst case", {"defense": defense}, f"{defense}, floor of {least:g} %"),
            "incomplete",
            "no accuracy within a radius was compared that the floor could be judged on",
        )
        for defense, least in policy.floors.items()
        if defense not in judged
    ]


def _floored(
    finding: Finding, values: Values, policy: Policy, extra: Mapping[int, Mapping[int, float]]
) -> Finding:
    """Return a finding that knows of the floor of its defense, if there is one and it has an accuracy.

    A floor that is not held decides the status, whatever the tier: it was asked for by name.
    """
    least = policy.floors.get(str(finding.subject.coordinates["defense"]))
    if least is None or values.radius is not None:
        return finding
    now = [_lowered(values.index, each, extra.get(seed, {})) for seed, each in values.seeds.items()]
    total, n = float(np.mean(now, axis=0).sum()), len(values.index)
    low, high = statistics.clopper_pearson(total, n, 1 - policy.alpha)
    floor = Floor(least / 100, low, high)
    verdict = min(finding.verdict, floor.verdict, key=WORST_FIRST.index)
    if floor.verdict == "held":
        return replace(finding, floor=floor)
    rate = f"{100 * total / n:.1f} % [{100 * low:.1f} to {100 * high:.1f}]"
    how = "is below" if floor.verdict == "regressed" else "may be below"
    reason = f"{finding.reason}; the accuracy, {rate}, {how} the floor of {least:g} %"
    return replace(finding, floor=floor, verdict=verdict, reason=reason, tier="critical")


def _new_flags(seeds: Mapping[int, Pair]) -> Iterable[str]:
    """Yield a sentence for each kind of flag that the baseline does not have."""
    known = {code for pair in seeds.values() for each in pair.before for code in each.codes}
    for message, code in dict.fromkeys(
        flag for pair in seeds.values() for each in pair.now for flag in each.flags
    ):
        if code not in known:
            yield f"new flag {code}: {message}"


def _gained(seeds: Mapping[int, Pair], reader: Reader, radius: float | None) -> Iterable[str]:
    """Yield a sentence about what the failures that are gone had been found by, where it was of several."""
    told: Counter[str] = Counter()
    for pair in seeds.values():
        then, now = (
            found_by(side, [reader.of(each, number, radius) for each in side])
            for number, side in enumerate((pair.before, pair.now))
        )
        gone = then.number[np.isin(then.index, now.index[now.number < 0]) & (then.number >= 0)]
        told.update(checks.title(pair.before[at].condition) for at in gone.tolist())
    several = any(len(pair.before) > 1 for pair in seeds.values())
    if several and told:
        said = ", ".join(f"{attack} {number}" for attack, number in told.most_common())
        yield f"what is held again had been found by: {said}"


def _flips(seeds: Mapping[int, Pair], reader: Reader, radius: float | None) -> Iterable[Flip]:
    """Return the examples that were held and are broken now, in order, with the attack that breaks each."""
    found: list[Flip] = []
    for seed, pair in seeds.items():
        was = settle(_ACCURACY, [reader.of(each, 0, radius) for each in pair.before])
        found += flips_of(was, seed, pair.before, pair.now, [reader.of(each, 1, radius) for each in pair.now])
    return sorted(found, key=attrgetter("index", "seed"))


def flips_of(
    was: PerExample,
    seed: int,
    before: Sequence[Measured],
    now: Sequence[Measured],
    values: Sequence[PerExample],
) -> list[Flip]:
    """Return what is told of the examples that were held in a worst case and are broken now.

    Args:
        was: How often each example was held in the baseline.
        seed: The seed.
        before: The conditions in the baseline.
        now: Those of today, in the same order.
        values: How often each of them holds each example.

    Returns:
        A flip for each, attack by attack.
    """
    finders, found = found_by(now, values), list[Flip]()
    shared, here, there = np.intersect1d(was.index, finders.index, assume_unique=True, return_indices=True)
    number = np.where(was.values[here] > MAJORITY, finders.number[there], -1)
    for at, (one, other) in enumerate(zip(before, now, strict=True)):
        mine = number == at
        shares = was.values[here][mine], finders.held[there][mine]
        found += _told_flips(shared[mine], seed, one, other, shares)
    return found


def _told_flips(
    index: Any, seed: int, before: Measured, now: Measured, shares: tuple[Any, Any]
) -> list[Flip]:
    """Return a flip for each of the examples at `index`, which one condition breaks now."""
    old, new = (
        {name: each.rows[name][np.searchsorted(each.rows["index"], index)].tolist() for name in _TOLD}
        for each in (before, now)
    )
    attack = checks.title(now.condition)
    answers = zip(index.tolist(), new["truth"], old["label"], new["label"], strict=True)
    refused = zip(old["rejected"], new["rejected"], strict=True)
    # Without draws the answers say it all.
    held_in = zip(*(each.tolist() for each in shares), strict=True)
    often = held_in if BROKEN_SHARE in now.rows else [None] * len(index)
    return [
        Flip(place, truth, attack, seed, label, after, both, share)
        for (place, truth, label, after), both, share in zip(answers, refused, often, strict=True)
    ]


_TOLD = ("truth", "label", "rejected")
"""What a flip tells of both answers."""


# --- policy ------------------------------------------------------------------------------------------


def tier_of(subject: Subject, policy: Policy) -> Tier:
    """Return whether a subject decides the exit status.

    Args:
        subject: A condition or a worst case; a selection that names an attack selects no worst case.
        policy: The rules.
    """

    def selected(choices: Sequence[Mapping[str, Any]]) -> bool:
        return any(
            all(
                name in subject.coordinates and matches(value, subject.coordinates[name])
                for name, value in each.items()
            )
            for each in choices
        )

    if selected(policy.tiers.advisory):
        return "advisory"
    return "critical" if policy.tiers.critical is None or selected(policy.tiers.critical) else "advisory"


def check_policy(policy: Policy, conditions: Iterable[Condition], at: Any) -> None:
    """Refuse rules that speak of what there is not.

    Args:
        policy: The rules of the task file.
        conditions: The conditions of the suite.
        at: Returns file, line and place of a way to a value.

    Raises:
        InputError: A floor is of no defense, or a selection of no condition.
    """
    every = list(conditions)
    defenses = list(dict.fromkeys(str(each.coordinates["defense"]) for each in every))
    for name in policy.floors:
        if name not in defenses:
            raise InputError(
                f"{at('check', 'floors', name)}: unknown defense {name!r}{did_you_mean(name, defenses)}"
            )
    known = list(dict.fromkeys(name for each in every for name in each.coordinates))
    for tier, choices in (("critical", policy.tiers.critical or ()), ("advisory", policy.tiers.advisory)):
        for number, choice in enumerate(choices):
            where = at("check", "tiers", tier, number)
            for name, value in choice.items():
                if name not in known:
                    raise InputError(f"{where}: unknown coordinate {name!r}{did_you_mean(name, known)}")
                if not any(matches(value, each.coordinates.get(name)) for each in every):
                    values = dict.fromkeys(format_value(each.coordinates.get(name)) for each in every)
                    raise InputError(
                        f"{where}: {name}: no condition has {value!r}{did_you_mean(value, values)}"
                    )


def _same_network(seeds: Mapping[int, Pair]) -> bool:
    """Return whether the networks of a subject are those of the baseline."""
    return all(
        one.network is not None and one.network == other.network
        for pair in seeds.values()
        for one, other in zip(pair.before, pair.now, strict=True)
    )


def _order(before: Measurements) -> list[Subject]:
    keys = []
    for each in before.measured.values():
        keys += [worst_case_of(each.condition), subject_of(each.condition)]
    return list(dict.fromkeys(keys))
