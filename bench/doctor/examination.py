"""The examination: runs the tests in their order, within a limit of time."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from bench.console import duration
from bench.doctor import answers, attacking, gradients
from bench.doctor.binarized import binarized
from bench.doctor.findings import Finding, Findings
from bench.doctor.gradients import steepness
from bench.doctor.patient import DRAWS, Patient
from bench.errors import InputError, OvertimeError

IMAGES = 48
"""How many images are looked at, unless another number is said."""

LOOK_IMAGES = 24
"""How many images are looked at where a defense is only looked at, and not attacked."""

LOOK_LIMIT = 6.0
"""How many seconds that takes at most."""

LEAST = 12
"""Of a slow defense at least so many images are looked at."""

LIMIT = 40.0
"""How many seconds an examination takes at most, unless another limit is said."""


class Test(NamedTuple):
    """A test of an examination."""

    name: str
    run: Callable[[Patient], Iterable[Finding]]
    passes: int
    """Passes over each image, a backward pass being one more; it decides whether there is time."""
    gradient: bool = False
    """Whether it needs a view of images with gradients."""
    part: Literal["look", "attack", "run"] = "look"
    """Whether it asks and compares gradients, attacks, or needs another process or what a run has stored."""


TESTS = (
    Test("clean", answers.clean, 1),
    Test("split", answers.split, 3),
    Test("uphill", gradients.uphill, 8, gradient=True),
    Test("view", answers.view, 6),
    Test("autograd", answers.autograd, 4),
    Test("company", answers.company, 10),
    Test("process", answers.process, 4, part="run"),
    Test("refusals", answers.refusals, 4),
    Test("precision", answers.precision, 4),
    Test("path", gradients.path, 34, gradient=True),
    Test("jump", gradients.jump, 18, gradient=True),
    Test("view-attacked", answers.attacked_view, 42, gradient=True, part="attack"),
    Test("losses", attacking.losses, 120, gradient=True, part="attack"),
    Test("stronger", attacking.stronger, 4, gradient=True, part="run"),
    Test("noise", attacking.noise, 24, gradient=True, part="attack"),
    Test("unlimited", attacking.unlimited, 80, gradient=True, part="attack"),
    Test("draws", attacking.draws, 100, gradient=True, part="attack"),
    Test("blind", attacking.blind, 200, gradient=True, part="attack"),
    Test("steps", attacking.steps, 160, gradient=True, part="attack"),
    Test("binarized", binarized, 100, gradient=True, part="attack"),
    Test("afterwards", answers.afterwards, 1),
)
"""All tests, those that cost least and tell most first."""


LOOK = tuple(test for test in TESTS if test.part == "look")
"""The tests of answers and gradients."""

ALONE = tuple(test for test in TESTS if test.part != "run")
"""The tests that need nothing but the defense."""


def examine(patient: Patient, *, limit: float = LIMIT, tests: Sequence[Test] = TESTS) -> Findings:
    """Examine a defense.

    Args:
        patient: The defense, with the images to examine it on: `IMAGES` of them say enough.
        limit: How many seconds it may take, of the processor's time or of the GPU's, above 0. A test for
            which there is no time left is ``untested``; of a slow defense fewer images are looked at.
        tests: The tests to run: `TESTS`, `ALONE` or `LOOK`.

    Returns:
        What was found, test by test.
    """
    # Other work on this machine decides nothing: on the CPU its own time counts.
    clock = time.process_time if patient.device.type == "cpu" else time.monotonic
    begun = clock()
    found: list[Finding] = []
    try:
        with patient.still("examination"):
            each = _pass(patient, clock)
            patient = _affordable(patient, each, limit, tests)
            for test in tests:
                found += _looked(test, patient, each, limit - (clock() - begun))
    except InputError as error:
        # Weights or buffers were changed by questions alone; they are put back.
        found.append(Finding("afterwards", "alarm", str(error), "depends-on-company", 0.0))
    return Findings.of(found, clock() - begun)


def _looked(test: Test, patient: Patient, each: float, left: float) -> Iterator[Finding]:
    """Run a test if there is time for it, and anything that it could look at."""
    needed = test.passes * each * len(patient.labels) * (DRAWS if patient.random else 1)
    if test.name == "draws" and not patient.random:
        return
    if test.gradient and patient.attacked is None:
        yield Finding(test.name, "untested", "no view of images with gradients is there")
    elif needed > left:
        said = f"it would take {duration(needed)} more; raise --limit"
        yield Finding(test.name, "untested", said, late=True)
    else:
        yield from _tried(test, patient)


def _tried(test: Test, patient: Patient) -> Iterator[Finding]:
    """Run a test; one that raises could not look."""
    try:
        yield from test.run(patient)
    except OvertimeError:
        raise
    except Exception as error:  # noqa: BLE001 - code of a user may raise anything, and other tests may still look
        said = f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        yield Finding(test.name, "untested", said)


def _pass(patient: Patient, clock: Callable[[], float]) -> float:
    """Return the seconds of a pass over one image, half of one there and back."""
    few = patient.few(min(16, len(patient.labels)))
    taken = 0.0
    # What it raises, the tests will say.
    with suppress(Exception):
        for _ in range(2):
            # The first one loads what is needed.
            begun = clock()
            if few.attacked is None:
                few.answers(few.images)
            else:
                view = few.view(few.attacked, draws=1)
                steepness(view, few.images.to(few.device), few.labels.to(few.device))
            taken = clock() - begun
    return taken / len(few.labels) / (1 if patient.attacked is None else 2)


def _affordable(patient: Patient, each: float, limit: float, tests: Sequence[Test]) -> Patient:
    """Return the patient with as many images as can be seen by most tests: all, or half, and so on."""
    needed = sum(test.passes for test in tests) * each * (DRAWS if patient.random else 1)
    n = len(patient.labels)
    # Examples that are broken cost no more passes, so that half of this is what is needed.
    while n > LEAST and needed * n > 2 * limit:
        n //= 2
    return patient if n == len(patient.labels) else patient.few(n)
