"""Tests that attack: what others break where the gradient attack fails is not as robust as it reads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.doctor.chance import level_of
from bench.doctor.findings import Finding, Level
from bench.doctor.patient import DRAWS, STEPS, Patient, steps_away
from bench.protocols import Images

NOISES = 20
"""How often noise of the radius is drawn for each image."""

QUERIES = 300
"""Questions of Square for each survivor."""

LOSSES = ("margin", "dlr")
"""The losses that are compared with the cross-entropy."""


def climbs(patient: Patient) -> Iterator[Images]:
    """Yield the images of all short PGDs: cross-entropy as it is and scaled, margin, DLR.

    Args:
        patient: The defense.

    Yields:
        Images (N, C, H, W) on the CPU.
    """
    yield patient.climbed("ce")
    yield patient.climbed("ce", scale=_scale(patient))
    for loss in LOSSES:
        yield patient.climbed(loss)


def _scale(patient: Patient) -> float:
    """Return what makes the median lead of the view's logits 1."""
    assert patient.attacked is not None
    with patient.still("scale"):
        _, logits = patient.verdict(patient.attacked, patient.images)
    two = logits.double().topk(2, dim=1).values
    lead = float((two[:, 0] - two[:, 1]).nanmedian())
    return 1 / lead if lead > 0 and lead < float("inf") else 1.0


def survivors(patient: Patient) -> Tensor:
    """Return the examples that no short PGD breaks, rows int64 (n,).

    Args:
        patient: The defense.
    """
    lost = patient.broken(patient.images)
    for z in climbs(patient):
        lost |= patient.broken(z)
    return (~lost).nonzero().flatten()


def losses(patient: Patient) -> Iterator[Finding]:
    """Climb other losses than the cross-entropy, and the cross-entropy of logits of another scale.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    plain, *others = (patient.broken(z) for z in climbs(patient))
    names = ("ce of scaled logits", *LOSSES)
    left = ~plain
    n = int(left.sum())
    won = {name: int((left & each).sum()) for name, each in zip(names, others, strict=True)}
    most = max(won.values(), default=0)
    said = f"PGD-{STEPS} on the cross-entropy leaves {n} of {len(left)}; of these " + ", ".join(
        f"{name} breaks {k}" for name, k in won.items()
    )
    if n and most and level_of(most, n) != "note":
        yield Finding("losses", "note", said, "loss-matters")
    else:
        yield Finding("losses", "quiet", said)


def unlimited(patient: Patient) -> Iterator[Finding]:
    """Attack without a limit, through the view, and ask the read-out: refusals are failures.

    Any classifier answers the image of another class with another label, so that the attack must win.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    size = patient.images[0].numel()
    everywhere = patient.within(1.0 if patient.threat.norm == "linf" else size**0.5)
    lost, rows = patient.broken(patient.images), torch.arange(len(patient.labels))
    for loss in ("margin", "ce"):
        rows = (~lost).nonzero().flatten()
        if len(rows):
            use = {"use": "pgd", "steps": 2 * STEPS, "loss": loss}
            lost[rows] = patient.broken(patient.attack(use, rows=rows, threat=everywhere), rows)
    k, n = int((~lost).sum()), len(lost)
    said = f"{k} of {n} images are not broken by PGD without a limit, refusals being failures"
    level = level_of(k, n)
    if patient.knows and level != "quiet":
        # That gradients lead out of a refusal is more than that they lead to another class.
        level = "note"
    yield Finding("unlimited", level, said, None if level == "quiet" else "unlimited-fails", 0.01)


def noise(patient: Patient) -> Iterator[Finding]:
    """Try noise of the radius on what the gradient attacks left.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    rows = survivors(patient)
    lost = torch.zeros(len(rows), dtype=torch.bool)
    with patient.still("noise"):
        for draw in range(NOISES if len(rows) else 0):
            z = steps_away(patient.images, patient.threat, "noise", draw)[rows]
            lost |= patient.broken(z, rows)
    yield _beaten("noise", f"{NOISES} draws of noise break", lost, "noise-breaks")


def blind(patient: Patient) -> Iterator[Finding]:
    """Try Square on what the gradient attacks left; it sees the view's logits and no gradient.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    rows = survivors(patient)
    lost = torch.zeros(len(rows), dtype=torch.bool)
    if len(rows):
        z = patient.attack({"use": "square", "queries": QUERIES}, rows=rows)
        lost = patient.broken(z, rows)
    yield _beaten("blind", f"Square with {QUERIES} queries breaks", lost, "blind-breaks")


def _beaten(test: str, what: str, lost: Tensor, code: str) -> Finding:
    k, n = int(lost.sum()), len(lost)
    said = f"{what} {k} of {n} images that four PGD-{STEPS} left"
    level: Level = level_of(k, n) if n else "quiet"
    return Finding(test, level, said, None if level == "quiet" else code, 0.01)


def steps(patient: Patient) -> Iterator[Finding]:
    """Double steps and restarts on what the gradient attacks left.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    rows = survivors(patient)
    lost = torch.zeros(len(rows), dtype=torch.bool)
    if len(rows):
        use = {"use": "pgd", "steps": 2 * STEPS, "restarts": 2, "loss": "margin"}
        lost = patient.broken(patient.attack(use, rows=rows), rows)
    k, n = int(lost.sum()), len(rows)
    said = f"PGD-{2 * STEPS} from two starts breaks {k} of {n} images that four PGD-{STEPS} left"
    heavy = n > 0 and level_of(k, n) in ("doubt", "alarm")
    yield Finding("steps", "note" if heavy else "quiet", said, "more-steps-matter" if heavy else None)


def draws(patient: Patient) -> Iterator[Finding]:
    """Double the draws that the attack averages over; for random defenses alone.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    use = {"use": "pgd", "steps": STEPS, "loss": "margin"}
    twice = patient.attack(use, draws=2 * DRAWS)
    with patient.still("draws"):
        few, many = (
            torch.stack([patient.broken(z) for _ in range(5)]).double().mean(0)
            for z in (patient.climbed("margin"), twice)
        )
    k, n = int((many > few + 0.5).sum()), len(few)
    said = (
        f"averaging over {2 * DRAWS} draws instead of {DRAWS} the attack breaks {float(many.mean()):.0%} "
        f"instead of {float(few.mean()):.0%}"
    )
    heavy = level_of(k, n) in ("doubt", "alarm")
    yield Finding("draws", "note" if heavy else "quiet", said, "more-draws-matter" if heavy else None)


def stronger(patient: Patient) -> Iterator[Finding]:
    """Compare the examination's attacks with all that the row's own attacks left unbroken.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    if patient.held is None:
        yield Finding("stronger", "untested", "no attack of the task file is stored for these images")
        return
    left = torch.zeros(len(patient.labels), dtype=torch.bool)
    left[survivors(patient)] = True
    k, n = int((patient.held & ~left).sum()), int(patient.held.sum())
    said = f"four PGD-{STEPS} break {k} of {n} images that all attacks of the task file left"
    level: Level = level_of(k, n) if n else "quiet"
    yield Finding("stronger", level, said, None if level == "quiet" else "stronger-attack", 0.01)
