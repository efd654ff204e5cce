"""The gate from a task file to its verdict: what `bench baseline` and `bench check` do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.api.running import Project, Run
from bench.console import count, say
from bench.errors import InputError
from bench.gate import baseline, judge, replay
from bench.gate.baseline import Accepted, Baseline
from bench.gate.measurements import from_plan
from bench.gate.verdicts import Check
from bench.results import fingerprint, replays
from bench.results.origin import commit_of, versions
from bench.runner import outstanding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.api.running import Options
    from bench.gate.measurements import Measurements
    from bench.gate.replay import Answers, Shown


def save(project: Project, out: Path, *, limit: float = replay.LIMIT) -> tuple[Accepted, dict[str, int]]:
    """Write the results of a task file as its first baseline.

    Args:
        project: The task file, its plan and its results folder, where everything is done.
        out: The folder of the baseline.
        limit: Mebibytes that the stored images may take, 0 or more.

    Returns:
        What its history says, and the size of each file in bytes.

    Raises:
        InputError: There is a baseline already, or results are missing.
    """
    if (out / baseline.INDEX).exists():
        raise InputError(
            f"{out}: there is a baseline already; "
            f'new numbers are accepted with: bench baseline accept --baseline {out} --reason "..."'
        )
    return _write(project, out, (), "the first baseline", limit)


def accept(
    project: Project, out: Path, reason: str, *, limit: float = replay.LIMIT
) -> tuple[Accepted, dict[str, int]]:
    """Write the results of a task file as the new baseline, which keeps the history of the old one.

    Args:
        project: The task file, its plan and its results folder, where everything is done.
        out: The folder of the baseline.
        reason: Why the numbers may be others.
        limit: Mebibytes that the stored images may take, 0 or more.

    Returns:
        What its history says, and the size of each file in bytes.

    Raises:
        InputError: There is no baseline, or no reason, or results are missing.
    """
    if not reason.strip():
        raise InputError("--reason: expected why the numbers may be others, found an empty text")
    return _write(project, out, baseline.read(out).history, " ".join(reason.split()), limit)


def _write(
    project: Project, out: Path, history: Sequence[Accepted], reason: str, limit: float
) -> tuple[Accepted, dict[str, int]]:
    plan, store = project.plan, project.store
    if not plan.conditions:
        raise InputError(f"{plan.suite.path}: nothing is asked, so there is nothing to keep")
    left = len(outstanding.examine(plan, store).todo)
    measurements = from_plan(store.root, plan)
    if left or measurements.missing:
        raise InputError(
            f"{store.shown}: {count(left or len(measurements.missing), 'job')} to do before a baseline can "
            f"be saved: bench run {plan.suite.path}"
        )
    for each in measurements.measured.values():
        if invalid := int(each.rows["invalid"].sum()):
            name, moves = judge.subject_of(each.condition).name, count(invalid, "move")
            raise InputError(
                f"{store.shown}: {name}: {moves} could not be shown, since the attack left the box or the "
                "budget; a check would stay incomplete: mend the attack, or leave it out"
            )
    runs = replay.sampled(replay.gathered(store, measurements), limit * 2**20)
    first = next(iter(measurements.measured.values())).condition.job
    accepted = Accepted(
        when=baseline.now(),
        who=baseline.author(),
        reason=reason,
        commit=commit_of(plan.suite.folder),
        numbers=judge.rates(measurements),
    )
    baseline.write(
        out,
        measurements,
        suite=plan.suite.path.name,
        runs=replay.stored_runs(runs, measurements),
        images=replays.spelled(runs),
        history=(*history, accepted),
        versions=(store.receipt("evaluate", first) or {}).get("versions", {}),
    )
    names = (baseline.INDEX, baseline.OUTCOMES, baseline.REPLAY)
    return accepted, {name: (out / name).stat().st_size for name in names}


def check(project: Project, root: Path, options: Options, *, replay_only: bool = False) -> Check:
    """Do what is to do for a check, and compare with a baseline.

    Args:
        project: The task file, its plan and its results folder.
        root: The folder of the baseline.
        options: How jobs are run.
        replay_only: Whether the stored images alone are shown, and nothing is attacked.

    Returns:
        The report.

    Raises:
        InputError: The baseline cannot be used, or the rules of the task file speak of what there is not.
    """
    plan, store, policy = project.plan, project.store, project.plan.suite.model.check
    before = baseline.read(root, replays=replay_only or (root / baseline.REPLAY).is_file())
    now = from_plan(store.root, plan)
    judge.check_policy(policy, (condition for condition, _ in now.asked.values()), plan.suite.at)
    shown = replay.planned(before, plan, now) if before.images.is_file() else []
    if replay_only and not before.runs:
        raise InputError(f"{before.images}: holds no image; check without --replay")
    _show(project, shown, options, warm=not replay_only)
    if not replay_only:
        known = before.measurements.measured
        wanted = {
            condition.job
            for place, (condition, question) in now.asked.items()
            if place in known and known[place].question == question
        }
        Run(project, options, wanted=wanted).do()
        now = from_plan(store.root, plan)
    answers = (
        replay.answers(before, shown, store, policy, warm=not replay_only) if shown or replay_only else None
    )
    return _report(project, before, now, answers, replay_only=replay_only)


def _show(project: Project, shown: Sequence[Shown], options: Options, *, warm: bool) -> None:
    """Do the jobs that show stored images."""
    if not shown:
        return
    plan = replay.plan_of(shown, project.plan, warm=warm)
    manifest = {**project.manifest, "sources": fingerprint.digests(plan.modules())}
    say(options.console, f"stored images: {count(len(plan.conditions), 'condition')}")
    run = Run(Project(plan, project.store, manifest), options, record=False)
    run.do()


def _report(
    project: Project, before: Baseline, now: Measurements, answers: Answers | None, *, replay_only: bool
) -> Check:
    policy = project.plan.suite.model.check
    if replay_only:
        assert answers is not None
        findings = replay.with_unasked(answers.findings, before, now, policy)
    else:
        findings = judge.findings(before.measurements, now, policy, answers.held if answers else None)
    replayed = answers.replayed if answers else None
    if replayed is not None and answers is not None and not replay_only:
        replayed = replace(replayed, beyond=judge.beyond(now, answers.held))
    document = project.plan.suite.document
    lines = {}
    for finding in findings:
        coordinates = finding.subject.coordinates
        place = ("attacks", coordinates["attack"]) if "attack" in coordinates else None
        lines[finding.subject.name] = _line(document, place or ("defenses", coordinates["defense"]))
    return Check(
        suite=project.plan.suite.path.name,
        before=str(before.root),
        after=str(project.store.shown),
        tolerance=policy.tolerance / 100,
        alpha=policy.alpha,
        findings=findings,
        replayed=replayed,
        replay_only=replay_only,
        notes=tuple(_notes(before, now, answers)),
        lines=lines,
    )


def _line(document: Any, place: tuple[str, ...]) -> int:
    return int(document.line(*place).rpartition(":")[2])


def _notes(before: Baseline, now: Measurements, answers: Answers | None) -> Iterable[str]:
    """Yield sentences about what may matter beside the numbers."""
    yield from now.notes
    new = sum(place not in before.measurements.measured for place in now.asked)
    if new:
        yield f"{count(new, 'condition')} asked for now {'is' if new == 1 else 'are'} not in the baseline"
    today = versions()
    for name, version in before.versions.items():
        if today.get(name) != version:
            yield f"{name} {version} in the baseline, {today.get(name)} now"
    if answers is None:
        yield "the baseline has no images to show again"
