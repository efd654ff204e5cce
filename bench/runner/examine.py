"""The jobs that say whether to believe others: trials of attacks, examinations of defenses."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bench.doctor.examination import ALONE, IMAGES, LIMIT, LOOK, LOOK_IMAGES, LOOK_LIMIT, examine
from bench.doctor.findings import Findings
from bench.doctor.patient import Patient, Sight
from bench.doctor.trial import try_attack
from bench.errors import InputError
from bench.protocols import Split
from bench.registry import DefenseEntry
from bench.runner.context import WorkerContext, load
from bench.runner.limits import limited
from bench.runner.train import restored
from bench.suite.jobs import Examination, Trial
from bench.suite.planner import draws

Write: TypeAlias = Callable[[Path], None]

TRIAL_LIMIT = 5.0
"""Seconds of processor time that the trial of an attack takes at most."""

PATIENCE = 20
"""What takes so many times its limit by the clock is ended: code hangs, or has hardly any of a core."""


def patience(job: Trial | Examination) -> float:
    """Return after how many seconds by the clock a trial or an examination is ended.

    Args:
        job: The job.
    """
    match job:
        case Trial():
            return PATIENCE * TRIAL_LIMIT
        case Examination():
            return PATIENCE * (LIMIT if job.whole else LOOK_LIMIT)


def trial(job: Trial) -> tuple[Write, dict[str, Any]]:
    """Try an attack where the answer is known.

    Args:
        job: The trial.

    Returns:
        What writes the findings, and entries of the receipt.

    Raises:
        OvertimeError: The attack hangs.
    """
    with limited(patience(job)):
        proof = try_attack(job.attack.entry, job.attack.params, job.threat, job.shape, limit=TRIAL_LIMIT)
    shares = {"crossed": proof.crossed, "planted": proof.planted}
    return kept(proof.findings, shares)


def examination(job: Examination, context: WorkerContext) -> tuple[Write, dict[str, Any]]:
    """Examine a fitted defense.

    Args:
        job: The examination.
        context: The surroundings of the job.

    Returns:
        What writes the findings, and entries of the receipt.

    Raises:
        InputError: Something that the defense reads changed, or its data set has no example.
        OvertimeError: The defense hangs.
    """
    images, limit = (IMAGES, LIMIT) if job.whole else (LOOK_IMAGES, LOOK_LIMIT)
    made = patient(job, context, images)
    with limited(patience(job)):
        found = examine(made, limit=limit, tests=ALONE if job.whole else LOOK)
    return kept(found, {"whole": job.whole})


def kept(found: Findings, also: Mapping[str, Any]) -> tuple[Write, dict[str, Any]]:
    """Return what is stored of findings.

    Args:
        found: The findings.
        also: What else is known, as JSON has it.

    Returns:
        What writes them whole, and an entry of the receipt, which reports read.
    """
    told = {**found.described(), **also}
    summary = {
        "worst": found.worst,
        "found": [[each.code, each.level, each.message] for each in found.found if each.code],
        "tests": len({each.test for each in found.found}),
        "untested": list(found.untested),
        "late": list(found.late),
        **also,
    }

    def write(path: Path) -> None:
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    return write, {"found": summary}


def sights(job: Examination) -> list[Sight]:
    """Return the views to examine: those that the suite looks through, those that are exact first.

    Args:
        job: The examination.

    Returns:
        The views; where none of them reads what is scored, those of the defense that do come first.
    """
    entry = _entry(job)
    used = [
        Sight(found, entry.view_params(each.use, each.params))
        for each in job.views
        if (found := entry.view(each.use)) is not None
    ]

    def exact(sight: Sight) -> bool:
        return job.readout in sight.entry.exact_for

    if not any(exact(each) and each.smooth for each in used):
        used += [Sight(each) for each in entry.views.values() if exact(Sight(each)) and Sight(each).smooth]
    return sorted(used, key=lambda each: not exact(each))


def patient(
    job: Examination, context: WorkerContext, images: int, held: tuple[bool, ...] | None = None
) -> Patient:
    """Build a defense from its stored weights, with the first examples of its data set.

    Args:
        job: The examination.
        context: The surroundings.
        images: How many examples, 1 or more.
        held: Which of the first examples all stored attacks left unbroken; None where that is not known.

    Returns:
        The defense, to be examined.

    Raises:
        InputError: Its data set has no example.
    """
    train = job.victim.train
    split = load(job.data, context)
    if not len(split):
        raise InputError(f"{job.data.spec.name}: it has no images to examine {train.defense.called} on")
    return Patient(
        model=restored(job.victim, context).requires_grad_(False).eval(),
        entry=_entry(job),
        sights=sights(job),
        readout=job.readout,
        images=split.images[:images],
        labels=split.labels[:images],
        threat=job.threat,
        classes=train.data.shape.classes,
        random=draws(train, dict(job.victim.inference)),
        train=_training_images(job, context),
        held=None if held is None else torch.tensor(held[: len(split)]),
    )


def _entry(job: Examination) -> DefenseEntry:
    entry = job.victim.train.defense.entry
    assert isinstance(entry, DefenseEntry)
    return entry


def _training_images(job: Examination, context: WorkerContext) -> Split | None:
    """Return the images that a defense was fitted to; None where it learned from none of them."""
    return load(job.victim.train.data, context) if _entry(job).learns else None
