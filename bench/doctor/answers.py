"""Tests of what a defense answers: of clean images, through its views, in company, in float64, to noise."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.doctor.chance import MOST, at_least, fewer, level_of, surely
from bench.doctor.findings import Finding, Level
from bench.doctor.patient import Columns, Patient, Sight, steps_away
from bench.errors import InputError, OvertimeError
from bench.protocols import Images
from bench.referee.answers import DRIFT, ROUNDING, ask, changed, moved
from bench.results.metrics import mcnemar_p

RARE = 1e-3
"""The probability by chance below which a comparison of random answers, or of two splits, is a finding."""

ALONE = 8
"""How many images are asked alone."""


def clean(patient: Patient) -> Iterator[Finding]:
    """Ask about the clean images: labels against the most frequent one, and refusals.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    answers, n = patient.first, len(patient.labels)
    right = int((answers["label"] == patient.labels).sum())
    most = int(patient.labels.bincount().max())
    chance = at_least(right, n, most / n)
    said = f"{right} of {n} clean images are labelled as they are; the most frequent class has {most}"
    if chance > 0.01:
        yield Finding("clean", "alarm", said, "at-chance", 0.01)
    else:
        yield Finding("clean", "quiet", said)
    refused = int(answers["rejected"].sum())
    if refused:
        low = surely(refused, n)
        # Many defenses refuse some by design: a table says how many.
        level: Level = "alarm" if low > 2 * MOST else "doubt" if low > MOST else "note"
        yield Finding("clean", level, f"{refused} of {n} clean images are refused", "refuses-clean", 0.01)


def afterwards(patient: Patient) -> Iterator[Finding]:
    """Ask about the clean images once more, after all other questions.

    Args:
        patient: The defense.

    Yields:
        What was found; nothing for a random defense.
    """
    if patient.random:
        return
    with patient.still("clean"):
        now = patient.answers(patient.images)
    k, n = int(changed(patient.first, now).sum()), len(patient.labels)
    said = f"{k} of {n} answers are others than before the examination"
    if k:
        yield Finding("afterwards", "alarm", said, "depends-on-company", 0.0)
    else:
        yield Finding("afterwards", "quiet", said)


def split(patient: Patient) -> Iterator[Finding]:
    """Compare the test images with those that the defense was fitted to.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    if patient.train is None or not len(patient.train):
        yield Finding("split", "untested", "no training images are there")
        return
    n = len(patient.labels)
    rows = torch.randperm(len(patient.train), generator=torch.Generator().manual_seed(0))[: 2 * n]
    known = {each.numpy().tobytes() for each in patient.train.images}
    again = sum(each.numpy().tobytes() in known for each in patient.images)
    if again:
        said = f"{again} of {n} test images are training images, to the bit"
        yield Finding("split", level_of(again, n), said, "test-images-in-training")
    test, train = patient.answers(patient.images), patient.answers(patient.train.images[rows])
    there = ~test["rejected"] & (test["label"] == patient.labels)
    fitted = ~train["rejected"] & (train["label"] == patient.train.labels[rows])
    table = [[int(each.sum()), int((~each).sum())] for each in (there, fitted)]
    chance = fewer(table)
    said = (
        f"{table[0][0]} of {n} test images are accepted and right, and {table[1][0]} of {len(rows)} "
        "training images"
    )
    if chance < RARE:
        yield Finding("split", "alarm", said, "knows-test-images", RARE)
    elif not again:
        yield Finding("split", "quiet", said)


def view(patient: Patient) -> Iterator[Finding]:
    """Compare what each exact view says with what is scored, on clean and noisy images.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    exact = [each for each in patient.sights if patient.is_exact(each) and each.entry.space == "pixel"]
    if not exact:
        names = ", ".join(each.entry.name for each in patient.sights) or "none"
        said = f"no view is declared to read {patient.readout!r} (views: {names})"
        yield Finding("view", "doubt", said, "no-exact-view")
        return
    z = torch.cat([patient.images, steps_away(patient.images, patient.threat, "view")])
    for sight in exact:
        with patient.still("view", sight.entry.name):
            yield from _compared(patient, sight, z, "clean and noisy")


def attacked_view(patient: Patient) -> Iterator[Finding]:
    """Compare what each exact view says with what is scored, on images of a short PGD.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    z = patient.climbed("margin")
    for sight in patient.sights:
        if patient.is_exact(sight) and sight.entry.space == "pixel":
            with patient.still("view", sight.entry.name):
                yield from _compared(patient, sight, z, "attacked")


def _compared(patient: Patient, sight: Sight, z: Images, what: str) -> Iterator[Finding]:
    answers, (verdict, logits) = patient.answers(z), patient.verdict(sight, z)
    n, name = len(z), sight.entry.name
    sees = logits.shape[1] > patient.classes
    read = torch.where(answers["rejected"], patient.classes, answers["label"]) if sees else answers["label"]
    differ = (verdict != read) & (read >= 0)
    lead = logits.amax(1) - logits.gather(1, read.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    differ &= lead > ROUNDING * (logits.amax(1) - logits.amin(1)).clamp_min(1e-30)
    said = (
        f"view {name!r} and read-out {patient.readout!r} differ on {int(differ.sum())} of {n} {what} images"
    )
    if patient.random:
        again = patient.answers(z)
        other = (again["label"] != answers["label"]) | (again["rejected"] != answers["rejected"])
        chance = mcnemar_p(differ.numpy().astype(float), other.numpy().astype(float))
        said += f", and the read-out from itself on {int(other.sum())}"
        level: Level = "doubt" if chance < RARE else "quiet"
        yield Finding("view", level, said, "view-differs" if level == "doubt" else None, RARE)
    elif differ.any():
        heavy = level_of(int(differ.sum()), n)
        yield Finding("view", "alarm" if heavy != "note" else "doubt", said, "view-differs", 0.0)
    else:
        yield Finding("view", "quiet", said)
    unseen = answers["rejected"] & (verdict != patient.labels.repeat(n // len(patient.labels)))
    if not sees and unseen.any():
        k = int(unseen.sum())
        said = f"{k} of {n} images that win on view {name!r} are refused, of which it does not know"
        yield Finding("view", level_of(k, n), said, "unseen-refusal")


def autograd(patient: Patient) -> Iterator[Finding]:
    """Ask with and without gradients.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    if patient.random:
        yield Finding("autograd", "untested", "random answers differ anyway")
        return
    z, n = patient.images, len(patient.labels)
    with patient.still("autograd"):
        plain = patient.answers(z)
        apart = torch.zeros(n, dtype=torch.bool)
        try:
            with torch.enable_grad():
                # Times 1, so that it is no leaf: a network may write into its argument.
                traced = _asked(patient, z.clone().requires_grad_() * 1)
            apart |= changed(plain, traced)
        except (RuntimeError, TypeError, ValueError):
            # Numpy, say, takes no tensor with gradients.
            pass
        for sight in filter(lambda each: each.smooth, patient.sights):
            view = patient.view(sight, n)
            _, before = patient.verdict(sight, z)
            with torch.enable_grad():
                points = view.encode(z.to(patient.device)).detach().requires_grad_()
                logits = view.logits(points).detach().cpu()
            logits = logits.mean(0) if logits.dim() == 3 else logits
            apart |= moved(before, logits) > DRIFT
    k = int(apart.sum())
    said = f"with gradients {k} of {n} answers are others than without"
    if k:
        yield Finding("autograd", "alarm", said, "autograd-differs", 0.0)
    else:
        yield Finding("autograd", "quiet", said)


def _asked(patient: Patient, z: Images) -> Columns:
    return ask(patient.model, z, patient.readout, patient.device)


def company(patient: Patient) -> Iterator[Finding]:
    """Ask in other company, and see that asking changes no weight and no buffer.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    try:
        yield from _company(patient)
    except InputError as error:
        yield Finding("company", "alarm", str(error), "depends-on-company", 0.0)


def _company(patient: Patient) -> Iterator[Finding]:
    """Ask about the images alone, twice in a batch, in other batches, in other orders, after other images."""
    x, n = patient.images, len(patient.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    others = x.flip(0).flip(3)
    few = min(ALONE, n)

    def after(z: Images) -> Columns:
        patient.answers(others)
        return patient.answers(z)

    ways: list[tuple[str, Tensor, Callable[[], Columns]]] = [
        ("again", torch.arange(n), lambda: patient.answers(x)),
        ("in another order", order, lambda: patient.answers(x[order])),
        ("doubled", torch.arange(n).repeat(2), lambda: patient.answers(torch.cat([x, x]))),
        ("in halves", torch.arange(n), lambda: _joined(patient, x.split(max(n // 2 - 1, 1)))),
        ("alone", torch.arange(few), lambda: _joined(patient, x[:few].split(1))),
        ("after other images", torch.arange(n), lambda: after(x)),
    ]
    with patient.still("company"):
        first = patient.answers(x)
        found = {
            way: _others({name: values[rows] for name, values in first.items()}, ask)
            for way, rows, ask in ways
        }
        sight = patient.exact
        if sight is not None and not patient.random:
            whole = {"label": first["label"][:few], "rejected": first["rejected"][:few]}
            whole["logits"] = patient.verdict(sight, x)[1][:few]

            def lone() -> Columns:
                seen = torch.cat([patient.verdict(sight, each)[1] for each in x[:few].split(1)])
                return {**whole, "logits": seen}

            found["alone, through the view"] = _others(whole, lone)
    total = sum(found.values())
    if patient.random:
        yield from _random_company(patient, found)
        return
    if total == 0:
        said = f"{n} answers are the same again, in other orders, batches and after other images"
        yield Finding("company", "quiet", said)
        return
    said = ", ".join(f"{k} {way}" for way, k in found.items() if k)
    yield Finding("company", "alarm", f"of {n} answers others are given: {said}", "depends-on-company", 0.0)


def _others(before: Columns, ask: Callable[[], Columns]) -> int:
    """Return how many answers are others; all, where there is none."""
    try:
        return int(changed(before, ask()).sum())
    except OvertimeError:
        raise
    except Exception:  # noqa: BLE001 - a network that fails in other company depends on it
        return len(before["label"])


def _random_company(patient: Patient, found: dict[str, int]) -> Iterator[Finding]:
    """Compare how often answers differ in other company with how often they do in the same."""
    n = len(patient.labels)
    same, other = found["again"], found["in another order"]
    chance = fewer([[other, n - other], [same, n - same]])
    said = f"of {n} random answers {same} are others again, {other} in another order"
    if chance < RARE:
        yield Finding("company", "doubt", said, "depends-on-company", RARE)
    else:
        yield Finding("company", "quiet", said)


def _joined(patient: Patient, parts: tuple[Images, ...]) -> Columns:
    answers = [patient.answers(each) for each in parts]
    return {name: torch.cat([each[name] for each in answers]) for name in answers[0]}


def process(patient: Patient) -> Iterator[Finding]:
    """Ask about the images in another process, in another order.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    if patient.elsewhere is None or patient.random:
        why = "random answers differ anyway" if patient.random else "there is no other process to ask"
        yield Finding("process", "untested", why)
        return
    z = process_images(patient)
    with patient.still("process"):
        here = patient.answers(z)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(2))
    there = patient.elsewhere(z[order])
    k = int(changed({name: values[order] for name, values in here.items()}, there).sum())
    said = f"in another process {k} of {len(z)} answers are others"
    if k:
        yield Finding("process", "alarm", said, "depends-on-process", 0.0)
    else:
        yield Finding("process", "quiet", said)


def process_images(patient: Patient) -> Images:
    """Return what `process` asks about: the clean images, and as many with noise.

    Args:
        patient: The defense.
    """
    return torch.cat([patient.images, steps_away(patient.images, patient.threat, "process")])


def refusals(patient: Patient) -> Iterator[Finding]:
    """Ask about accepted images after 8-bit rounding, tiny noise, and noise of the radius.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    with patient.still("refusals"):
        accepted = ~patient.answers(patient.images)["rejected"]
        x, n = patient.images[accepted], int(accepted.sum())
        if n == 0:
            yield Finding("refusals", "untested", "no clean image is accepted")
            return
        tiny = patient.threat.radius / 64
        rounded, dusted, noisy = (
            int(patient.answers(z)["rejected"].sum())
            for z in (
                (x * 255).round() / 255,
                steps_away(x, patient.within(tiny), "dust"),
                steps_away(x, patient.threat, "noise"),
            )
        )
    harmless = max(rounded, dusted)
    said = (
        f"of {n} accepted images {rounded} are refused after 8-bit rounding, {dusted} with noise of "
        f"{tiny:.2g}, {noisy} with noise of {patient.threat.radius:.3g}"
    )
    if (level := level_of(harmless, n)) in ("doubt", "alarm"):
        yield Finding("refusals", level, said, "refuses-rounding", 0.01)
    elif noisy:
        # An attacker who knows of the refusal goes round it: noise that is refused says little then.
        level = "note" if patient.knows else level_of(noisy, n)
        yield Finding("refusals", level, said, "refuses-noise", None if patient.knows else 0.01)
    else:
        yield Finding("refusals", "quiet", said)


def precision(patient: Patient) -> Iterator[Finding]:
    """Ask a copy of the defense in float64.

    Args:
        patient: The defense.

    Yields:
        What was found.
    """
    if patient.random:
        yield Finding("precision", "untested", "random answers differ anyway")
        return
    z = torch.cat([patient.images, steps_away(patient.images, patient.threat, "precision")])
    with patient.still("precision"):
        narrow = patient.answers(z)
        try:
            wide = copy.deepcopy(patient.model).double()
            with torch.no_grad():
                label = wide.decide(z.double().to(patient.device), patient.readout).label.cpu()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - a network may be made for float32 alone
            yield Finding("precision", "untested", f"it does not answer in float64 ({type(error).__name__})")
            return
    apart = (label != narrow["label"]) & (narrow["label"] >= 0)
    k, n = int(apart.sum()), len(z)
    said = f"in float64 {k} of {n} labels are others"
    if k:
        yield Finding("precision", level_of(k, n), said, "depends-on-precision", 0.01)
    else:
        yield Finding("precision", "quiet", said)
