"""Stored adversarial images in a check: which are kept, the jobs that show them, and what they say.

Each attack run keeps what it made of the first examples of its data set's order, which is stratified by
class, so that all attacks keep the same examples and a worst case can be shown again. Two kinds of jobs use
them: ``replay`` shows them as they are, and attacks that can begin at stored images do. Both are kept apart
from the paired test, which compares what was measured in the same way before and now.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from bench.errors import DamagedError, InputError
from bench.gate import statistics
from bench.gate.baseline import Baseline, StoredRun
from bench.gate.judge import Reader, flips_of, gone, subject_of, subjects_of, tier_of, worst_case_of
from bench.gate.measurements import (
    MAJORITY,
    Coordinates,
    Measured,
    Measurements,
    condition_of,
    place_of,
    row_of,
    worst_of,
)
from bench.gate.verdicts import Finding, Flip, Replayed, Subject, Verdict
from bench.registry import ATTACKS
from bench.results.metrics import PerExample, held_at, held_share
from bench.results.outcomes import arrays
from bench.results.replays import Replay
from bench.results.store import Store
from bench.suite.jobs import AttackRun, Craft, Evaluate, Starts
from bench.suite.planner import Plan, PlannedCondition
from bench.suite.policy import Policy
from bench.suite.resolve import Resolved

LIMIT = 8.0
"""Mebibytes that the images of a baseline may take, unless a limit is given."""


# --- what is kept ------------------------------------------------------------------------------------


def gathered(store: Store, measurements: Measurements) -> dict[str, Replay]:
    """Return what every attack run of a results folder left, all of it.

    Args:
        store: The results folder.
        measurements: Its conditions.

    Returns:
        The images by the key of the run; none of runs in which nothing is attacked, or without a radius.

    Raises:
        InputError: Crafted images are not kept in the folder.
    """
    found: dict[str, Replay] = {}
    for each in measurements.measured.values():
        key = each.condition.facts.attack_run
        # How far a stored image lies says nothing of the least distance today.
        if not each.condition.facts.idle and each.condition.radius is not None and key not in found:
            found[key] = _of_run(store, store.job("evaluate", each.condition.job)["crafts"])
    return found


def _of_run(store: Store, crafts: Sequence[str]) -> Replay:
    from safetensors.numpy import load_file

    try:
        shards = [load_file(store.artefact("craft", key)) for key in crafts]
    except DamagedError as error:
        raise InputError(
            f"{store.shown}: crafted images are not kept there ({error}); make them with bench run"
        ) from None
    index, moved, images = (
        np.concatenate([shard[name] for shard in shards]) for name in ("index", "moved", "images")
    )
    return Replay(index, moved.astype(np.bool_), images.astype(np.float32))


def sampled(runs: Mapping[str, Replay], limit: float) -> dict[str, Replay]:
    """Return as many of the first examples of every run as fit, equally many of each.

    Args:
        runs: All that each run left.
        limit: The most bytes that they may take, above 0.

    Returns:
        The images of the first examples; of runs that are shorter, all.
    """
    low, high = 0, max((len(each.index) for each in runs.values()), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(each.first(middle).size for each in runs.values()) <= limit:
            low = middle
        else:
            high = middle - 1
    return {key: each.first(low) for key, each in runs.items()} if low else {}


def stored_runs(runs: Mapping[str, Replay], measurements: Measurements) -> tuple[StoredRun, ...]:
    """Return what a baseline's index says of stored images.

    Args:
        runs: The images by the key of their run.
        measurements: The conditions, in the order of the baseline.
    """
    shown: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(measurements.measured.values()):
        shown[each.condition.facts.attack_run].append(number)
    return tuple(
        StoredRun(key, each.digest, len(each.index), tuple(shown[key])) for key, each in runs.items()
    )


# --- the jobs that show them -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A condition of the baseline whose images are shown to the weights of today."""

    before: Measured
    """The condition in the baseline."""
    again: Evaluate
    """The job that shows the stored images."""
    warm: Evaluate | None
    """The job whose attack begins at them; None where the attack cannot."""


def planned(baseline: Baseline, plan: Plan, now: Measurements) -> list[Shown]:
    """Return what shows the images of a baseline to the defenses of a plan.

    Args:
        baseline: The baseline, with its images.
        plan: The plan of today.
        now: The conditions of the plan, measured or not.

    Returns:
        A pair of jobs for each condition of the baseline that is still asked in the same way.
    """
    today = {place_of(condition_of(each)): each for each in plan.conditions}
    asked = now.asked
    every = list(baseline.measurements.measured.values())
    attack = ATTACKS["replay"]
    show = Resolved(attack, {}, {"use": attack.name, "version": attack.version, "params": {}})
    found = []
    for run in baseline.runs:
        starts = Starts(baseline.images.resolve(), run.key, run.digest)
        for number in run.conditions:
            before = every[number]
            place = place_of(before.condition)
            if place not in asked or asked[place][1] != before.question:
                continue
            if before.condition.radius is None:
                # A run that is kept for a radius serves a condition without one, too.
                continue
            job = today[place].job
            own = job.crafts[0].attack_run
            again = replace(
                own,
                attack=show,
                source=None,
                view=None,
                exact=True,
                target=None,
                starts=starts,
                time_limit=None,
                precision="float32",
            )
            warm = None
            if own.attack.entry.starts == "any":
                warm = _evaluate(job, replace(own, starts=starts), run.stop)
            found.append(Shown(before, _evaluate(job, again, run.stop), warm))
    return found


def _evaluate(job: Evaluate, attack_run: AttackRun, stop: int) -> Evaluate:
    """Return an evaluation as another, of another attack on the first examples."""
    step = attack_run.data.spec.shard
    crafts = tuple(Craft(attack_run, start, min(start + step, stop)) for start in range(0, stop, step))
    return Evaluate(job.victim, crafts, job.readout, job.draws)


def plan_of(shown: Iterable[Shown], plan: Plan, *, warm: bool) -> Plan:
    """Return a plan of the jobs that show stored images, for the scheduler.

    Args:
        shown: What is shown.
        plan: The plan of today.
        warm: Whether attacks begin at the images, too.
    """
    conditions = []
    for each in shown:
        coordinates, facts = dict(each.before.condition.coordinates), vars(each.before.condition.facts)
        named = {**coordinates, "attack": f"replay of {coordinates['attack']}"}
        conditions.append(PlannedCondition(named, each.again, facts))
        if warm and each.warm is not None:
            named = {**coordinates, "attack": f"{coordinates['attack']} from stored images"}
            conditions.append(PlannedCondition(named, each.warm, facts))
    return Plan(plan.suite, tuple(conditions), ())


# --- what they say -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What the weights of today say to stored images."""

    replayed: Replayed
    findings: tuple[Finding, ...]
    """What the images alone say of each worst case, of the replayed examples."""
    held: Mapping[Subject, Mapping[int, Mapping[int, float]]]
    """By worst case, seed and index, how often an example is held now against stored images and attacks begun
    at them, in [0, 1]."""


ImageValues: TypeAlias = Mapping[int, tuple[float, float]]
"""By the index of an example, whether it was held before, and whether no stored image breaks it now: 1 or 0,
of a random defense with several draws the share of them."""


@dataclass
class _Row:
    """The stored images of one worst case and one seed."""

    before: dict[int, float]
    """How often the baseline held each example against everything."""
    again: list[tuple[Measured, Measured]]
    """Each condition before, and as its images are answered now."""
    warm: list[Measured]


def answers(
    baseline: Baseline, shown: Sequence[Shown], store: Store, policy: Policy, *, warm: bool
) -> Answers:
    """Judge what today's weights say to the stored images.

    Args:
        baseline: The baseline.
        shown: What was shown.
        store: The results folder of today.
        policy: The rules.
        warm: Whether attacks began at the images, too.

    Returns:
        What is told of the images, and findings of them alone.
    """
    rows, missing = _rows(baseline, shown, store, warm=warm)
    flips: list[Flip] = []
    held: dict[Subject, dict[int, dict[int, float]]] = defaultdict(dict)
    values: dict[Subject, list[ImageValues]] = defaultdict(list)
    still = mended = examples = 0
    for (subject, seed), row in rows.items():
        now = _least([each for _, each in row.again])
        fallen = {index for index, value in now.items() if value <= MAJORITY}
        kept = {index: value for index, value in row.before.items() if index in now}
        was = {index for index, value in kept.items() if value > MAJORITY}
        examples += len(kept)
        still += len(fallen - was)
        mended += len(kept.keys() - was - fallen)
        flips += _flips(row, seed, kept)
        held[subject][seed] = _least([*(each for _, each in row.again), *row.warm])
        values[subject].append({index: (value, now[index]) for index, value in kept.items()})
    told = Replayed(
        images=sum(len(measured.rows["index"]) for row in rows.values() for _, measured in row.again),
        examples=examples,
        still_broken=still,
        mended=mended,
        flips=tuple(sorted(flips, key=lambda each: (each.index, each.seed, each.attack))),
    )
    incomplete = tuple(
        Finding(subject, "incomplete", reason, tier_of(subject, policy))
        for subject, reason in missing.items()
    )
    values = {subject: seeds for subject, seeds in values.items() if subject not in missing}
    return Answers(told, (*image_findings(values, policy), *incomplete), held)


def with_unasked(
    findings: Iterable[Finding], baseline: Baseline, now: Measurements, policy: Policy
) -> tuple[Finding, ...]:
    """Return findings of stored images, in which a worst case that lacks one of its attacks is not held.

    Args:
        findings: What the images that were shown say.
        baseline: The baseline.
        now: The conditions of today.
        policy: The rules.

    Returns:
        The findings; a worst case of which stored images are not asked for in the same way any more is not
        comparable, unless those that were shown break it already.
    """
    asked, every = now.asked, list(baseline.measurements.measured.values())
    found = {each.subject: each for each in findings}
    for number in (each for run in baseline.runs for each in run.conditions):
        before = every[number]
        condition, question = asked.get(place_of(before.condition), (None, None))
        if condition is None:
            reason = gone(before.condition, [each for each, _ in asked.values()])
        elif question is None or before.question == question:
            continue
        else:
            reason = "; ".join(before.question.differences(question))
        subject = worst_case_of(before.condition)
        if subject not in found or found[subject].verdict in ("held", "undecided"):
            reason = f"{subject_of(before.condition).name}: {reason}"
            found[subject] = Finding(subject, "not comparable", reason, tier_of(subject, policy))
    return tuple(found.values())


def _rows(
    baseline: Baseline, shown: Sequence[Shown], store: Store, *, warm: bool
) -> tuple[dict[tuple[Subject, int], _Row], dict[Subject, str]]:
    """Return the stored images by worst case and seed, of attacks whose outcomes are told at a radius.

    And the worst cases of which an answer is missing, with the reason.
    """
    before = _held_before(baseline)
    rows: dict[tuple[Subject, int], _Row] = {}
    missing: dict[Subject, str] = {}
    for each in shown:
        condition = each.before.condition
        name = (worst_case_of(condition), condition.seed)
        held_before = before.get((row_of(condition), condition.seed))
        if held_before is None:
            # Invalid in the baseline: the check itself calls it incomplete.
            continue
        jobs = (each.again, each.warm) if warm and each.warm is not None else (each.again,)
        reasons = [store.damage("evaluate", job.key) for job in jobs]
        if any(reasons):
            missing[name[0]] = (
                f"stored images of {condition.attack} have no answers; see {store.shown / 'failed'}"
            )
            continue
        row = rows.setdefault(name, _Row(held_before, [], []))
        row.again.append((each.before, _measured(each.before, each.again, store)))
        if warm and each.warm is not None:
            row.warm.append(_measured(each.before, each.warm, store))
    return rows, missing


def _measured(before: Measured, job: Evaluate, store: Store) -> Measured:
    return Measured(before.condition, before.question, arrays(store.outcomes(job.key)))


def _held(shown: Measured) -> PerExample:
    """Return 1 where an image does not break today's defense within the radius, and 0 where it does.

    Of several draws it is the share of them. Whether the clean image is answered rightly today was not asked.
    """
    radius = shown.condition.radius
    if shown.condition.facts.kind == "minimum-norm" and radius is not None:
        return PerExample(shown.rows["index"], held_at(shown.rows, None, radius))
    return PerExample(shown.rows["index"], held_share(shown.rows))


def _least(shown: Sequence[Measured]) -> dict[int, float]:
    """Return by its index how often each example is held against the image that breaks it most."""
    worst = worst_of([_held(each) for each in shown])
    return dict(zip(worst.index.tolist(), worst.values.tolist(), strict=True))


def _held_before(baseline: Baseline) -> dict[tuple[Coordinates, int], dict[int, float]]:
    """Return how often the baseline held each example against all attacks of its row, and unmoved."""
    reader = Reader(baseline.measurements, baseline.measurements)
    found: dict[tuple[Coordinates, int], dict[int, float]] = {}
    pairs = subjects_of(baseline.measurements, baseline.measurements).pairs
    for seeds in pairs.values():
        for seed, pair in seeds.items():
            attacked = next((each for each in pair.before if not each.condition.facts.idle), None)
            if attacked is None or attacked.condition.radius is None:
                continue
            worst = worst_of([reader.of(each, 0, None) for each in pair.before])
            name = (row_of(attacked.condition), seed)
            known = found.setdefault(name, {})
            for index, value in zip(worst.index.tolist(), worst.values.tolist(), strict=True):
                known[index] = min(known.get(index, 1.0), value)
    return found


def _flips(row: _Row, seed: int, kept: Mapping[int, float]) -> list[Flip]:
    before, now = zip(*row.again, strict=True)
    index = np.array(sorted(kept), np.int64)
    was = PerExample(index, np.array([kept[each] for each in index.tolist()]))
    who = before[0].condition.coordinates
    # Flips of several defenses stand in one list.
    place = f" on {who['defense']}, {who['readout']}"
    flips = flips_of(was, seed, before, now, [_held(each) for each in now])
    return [replace(each, attack=each.attack + place) for each in flips]


def image_findings(values: Mapping[Subject, Sequence[ImageValues]], policy: Policy) -> tuple[Finding, ...]:
    """Return what stored images alone say of each worst case.

    Args:
        values: By worst case, the values of each seed.
        policy: The rules.

    Returns:
        ``held`` where no example flipped; ``regressed`` where so many did that those which no image breaks
        any more cannot make up for them; else ``undecided``.
    """
    losses = {}
    for subject, seeds in values.items():
        shared = sorted(set.intersection(*map(set, seeds)))
        if shared:
            pairs = np.array([[each[index] for index in shared] for each in seeds])  # (seeds, N, 2)
            before, now = pairs.mean(axis=0).T
            losses[subject] = statistics.paired_loss(before, now, alpha=policy.alpha)
    adjusted = statistics.holm([each.p for each in losses.values()])
    found = []
    for (subject, loss), p in zip(losses.items(), adjusted, strict=True):
        judged = statistics.verdict_of(loss, p, tolerance=policy.tolerance / 100, alpha=policy.alpha)
        of = f"of {loss.n} replayed examples {loss.lost:g} that the baseline held against everything"
        verdict: Verdict = "held" if loss.lost == 0 else "undecided"
        reason = f"{of} break now"
        if judged == "regressed":
            # What the images do not break any more counts as held, so that the loss is at least this.
            verdict = "regressed"
            reason = f"{of} break now, and at most {loss.gained:g} others are mended, p = {p:.2g}"
        found.append(Finding(subject, verdict, reason, tier_of(subject, policy), loss, p, replayed=True))
    return tuple(found)
