"""The trial of an attack with a suite's settings, where the nearest adversarial images are known.

There are a half-space, placed so that the radius is `WITHIN` times what is needed (`bench.doctor.halfspace`),
and planted adversarial examples at the radius (`bench.doctor.plants`). An attack is called as in a run.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.doctor.findings import Finding, Findings, Level
from bench.doctor.ground import Attempt, Ground, apart
from bench.doctor.halfspace import MARGIN, placed
from bench.doctor.plants import Heads, Planted, Unnarrowed
from bench.errors import InputError, OvertimeError
from bench.noise import Noise
from bench.protocols import Crafted, Features, Images, Labels, Norm, Shape, Threat, View
from bench.referee.freezing import seeded
from bench.referee.validation import ROUNDING
from bench.registry import Access, AttackEntry, bind, needing

WITHIN = 1.2
"""How many times the radius that is needed is given."""

LIMIT = 8.0
"""Seconds of processor time that a trial takes at most, unless another limit is said."""

TYPICAL: Mapping[Norm, float] = {"linf": 0.1, "l2": 0.03, "l1": 0.01, "l0": 0.02}
"""How far the plane is for an attack without a radius: in linf; in l2 over the root of the number of values;
in l1 over the number of values; in l0 over the number of pixels."""

TICK = 0.1
"""Seconds between two looks at the processor's time, at least."""

LARGEST = 4096
"""Values of an image beyond which an attack is tried on smaller ones, where it can be."""

SIDE = 32
"""Height and width of these smaller ones, at most."""

FEW = 6
"""How many examples are looked at in what is asked beside the main question."""

ALONE = 12
"""How many planted examples are shown to what can only be shown one at a time."""

MOST = 0.95
"""The share of images that a sound attack with gradients brings across the plane."""

WEAK = 0.625
"""The share of the way to the plane from which images that did not cross tell of a weak attack, and not of a
broken one: what uses half of its radius goes less far."""

GAINED = 0.02
"""The share of the way to the plane below which a search by scores went nowhere."""

NEAR, FAR = 1.25, 2.0
"""How many times as far as needed an attack without a radius goes in the median: beyond the first, a note;
beyond the second, a doubt."""

LOST = 0.1
"""The share of successes that may be seen and not returned."""

ITERATIVE = 10
"""Questions about an example from which an attack is expected to find plants."""

PLANTED, FEWEST = 0.5, 0.1
"""The shares of plants below which an iterative attack with gradients gets a note, and a doubt."""

WHERE: Mapping[str, str] = {
    "plane": "on a half-space",
    "again": "asked again",
    "plants": "on planted examples",
    "target": "towards a given label",
    "surrogate": "where it may not stop early",
    "company": "in other company",
    "nan": "where logits are NaN",
}
"""What each test asks, for sentences."""

EXAMPLES = ((200, 48), (1000, 24), (5000, 12))
"""How many examples there are for an attack of at most so many passes; `FEW` for one of more."""


# --- planted examples ------------------------------------------------------------------------------------


class _Asked:
    """The heads of planted examples as an attack is handed them: by its access, and watched."""

    def __init__(self, heads: Heads, rows: Tensor, access: Access, clock: "_Clock", watch: "_Watch") -> None:
        self._heads, self._rows, self._access = heads, rows, access
        self._clock, self._watch = clock, watch

    def select(self, rows: Tensor) -> "_Asked":
        heads = self._heads.select(rows)
        return _Asked(heads, self._rows[rows], self._access, self._clock, self._watch)

    def __call__(self, z: Images) -> Tensor:
        self._clock.tick()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._access == "gradient"):
            logits = self._heads(z)
        self._watch.asked(self._rows, z, logits.detach(), logits.detach())
        if self._access == "decision":
            return one_hot(logits.argmax(1), logits.shape[1] + 1).to(z.dtype)
        return logits


# --- the trial -------------------------------------------------------------------------------------------


class _OverError(BaseException):
    """The time of the trial is over: nothing that means to mend errors sees it."""


class _Clock:
    """Knows when time is over.

    Args:
        limit: Seconds of this thread's time on the processor.
    """

    def __init__(self, limit: float) -> None:
        self.begun = time.thread_time()
        self._end, self._looked = self.begun + limit, time.monotonic()

    def tick(self) -> None:
        # To ask for the processor's time may take as long as a question.
        if time.monotonic() > self._looked + TICK:
            if time.thread_time() > self._end:
                raise _OverError
            self._looked = time.monotonic()


class _Watch:
    """Sees what is asked, and knows where a lawful success was among it.

    Args:
        x: The clean images (N, C, H, W).
        y: Their labels (N,).
        threat: What is lawful.
    """

    def __init__(self, x: Images, y: Labels, threat: Threat) -> None:
        self.x, self.y, self.threat = x, y, threat
        self.won = torch.zeros(len(y), dtype=torch.bool)
        self.asks = torch.zeros(len(y), dtype=torch.int64)

    def through(self, rows: Tensor, z: Tensor) -> Tensor:
        return z

    def asked(self, rows: Tensor, z: Tensor, logits: Tensor, plain: Tensor) -> None:
        if z.shape[1:] != self.x.shape[1:] or len(z) % max(len(rows), 1):
            return
        self.asks[rows] += len(z) // len(rows)
        copied = rows.repeat(len(z) // len(rows))
        hit = (logits.argmax(1) != self.y[copied]).nonzero().flatten()
        if len(hit):
            z, copied = z.detach()[hit].double(), copied[hit]
            inside = ((z >= 0) & (z <= 1)).flatten(1).all(1)
            near = self.threat.distance(self.x[copied].double(), z) <= self.threat.radius + ROUNDING
            self.won[copied[inside & near]] = True


@dataclass(frozen=True)
class Proof:
    """What an attack did where the nearest adversarial images are known."""

    findings: Findings
    """What was found, test by test."""
    crossed: float | None
    """The share of the examples of the half-space that it brought across the plane, with `WITHIN` times the
    radius that is needed; None where it was not asked to, or there was no time."""
    planted: float | None
    """The share of the planted adversarial examples that it found; None where it was not tried."""

    def described(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {**self.findings.described(), "crossed": self.crossed, "planted": self.planted}


def try_attack(
    entry: AttackEntry, params: Mapping[str, Any], threat: Threat, shape: Shape, *, limit: float = LIMIT
) -> Proof:
    """Try an attack with a suite's settings where the nearest adversarial images are known.

    Args:
        entry: The attack.
        params: A value for every parameter, as plain JSON.
        threat: The norm and the radius that the suite gives it; infinite where it has none.
        shape: The form of the suite's images, and the number of classes. What is larger than `LARGEST`
            is tried in a smaller form, where the attack can be.
        limit: Seconds of this thread's time on the processor, above 0. What there was no time for is
            ``untested``.

    Returns:
        What was found. What the attack raises is a finding, too.

    Raises:
        OvertimeError: The limit of the job that calls this is over.
    """
    entry = needing(entry, params)
    return _Trial(entry, params, entry.given(threat), shape, limit).proof()


class _Trial:
    """An attack on trial, and what was found so far."""

    def __init__(
        self, entry: AttackEntry, params: Mapping[str, Any], threat: Threat, shape: Shape, limit: float
    ) -> None:
        self.entry, self.plain, self.threat, self.limit = entry, params, threat, limit
        self.shape = _smaller(entry, params, shape)
        self.clock = _Clock(limit)
        self.found: list[Finding] = []
        self.crossed: float | None = None
        self.planted: float | None = None
        self.main: Attempt | None = None
        # A library may keep a list of what is left, and not narrow the view: it is shown plants one by one.
        self.alone = entry.library is not None

    def proof(self) -> Proof:
        """Ask everything that there is time for."""
        if why := self._pointless():
            self.found.append(Finding("plane", "untested", why))
        else:
            self._stage("plane", self._plane)
            if self.main is not None and self.main.usable:
                for test, run in self._stages():
                    self._stage(test, run)
        return Proof(
            Findings.of(self.found, time.thread_time() - self.clock.begun), self.crossed, self.planted
        )

    def _pointless(self) -> str | None:
        if self.entry.starts == "stored":
            return "it shows stored images, and finds none"
        if self.entry.kind == "fixed-budget" and not 0 < self.threat.radius < math.inf:
            return f"nothing can be found at radius {self.threat.radius:g}"
        return None

    def _stages(self) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
        """Yield what is asked of an attack that returned images, in its order."""
        yield "again", self._again
        if not self.entry.blind:
            if self.entry.space == "pixel":
                yield "plants", self._plants
            if self.entry.targeted:
                yield "target", partial(self._beside, "target", towards=True)
            yield "surrogate", partial(self._beside, "surrogate", exact=False)
        if self.entry.rng == "example":
            yield "company", self._company
        if self.entry.access in ("gradient", "score"):
            yield "nan", partial(self._beside, "nan", nan=True)

    def _stage(self, test: str, run: Callable[[], Iterator[Finding]]) -> None:
        """Run a test, and take what it raises for a finding."""
        try:
            with seeded(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.found += (each for each in run() if each not in self.found)
        except (OvertimeError, MemoryError, torch.OutOfMemoryError):
            raise
        except _OverError:
            said = f"there was no time for it in {self.limit:g} s"
            self.found.append(Finding(test, "untested", said, late=True))
        except Exception as error:  # noqa: BLE001 - an attack of a user may raise anything
            said = f"{WHERE[test]} it raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            level: Level = "note" if test == "nan" else "doubt"
            self.found.append(Finding(test, level, said, "attack-raises"))

    # --- what it is tried on

    @cached_property
    def passes(self) -> int:
        """How many passes it makes over each example, at most."""
        return self.entry.passes(bind(self.entry, self.plain))

    @cached_property
    def n(self) -> int:
        """How many examples there are."""
        return next((n for most, n in EXAMPLES if self.passes <= most), FEW)

    @cached_property
    def confidence(self) -> float:
        """By how many logits a label must lead to be a success for it, where it has such a parameter."""
        given = (self.plain.get(name) for name in ("kappa", "confidence"))
        return max((float(each) for each in given if isinstance(each, int | float)), default=0.0)

    @property
    def distance(self) -> float:
        """How far images are from the plane."""
        norm, (channels, height, width, _) = self.threat.norm, self.shape
        if self.entry.kind == "fixed-budget":
            distance = self.threat.radius / WITHIN
        else:
            size = channels * height * width
            times: Mapping[Norm, float] = {"linf": 1, "l2": size**0.5, "l1": size, "l0": height * width}
            distance = TYPICAL[norm] * times[norm]
        return max(1.0, float(math.floor(distance))) if norm == "l0" else distance

    @cached_property
    def watch(self) -> _Watch:
        """Who sees what is asked on the half-space."""
        return _Watch(self.ground.x.float(), self.ground.y, self.threat)

    @cached_property
    def ground(self) -> Ground:
        """The attack on the half-space."""
        return self._ground()

    def _ground(self, *, smooth: bool = False) -> Ground:
        margin = max(MARGIN, 10 * self.confidence)
        ground = placed(self.shape, self.threat.norm, self.distance, self.n, margin=margin, smooth=smooth)
        return Ground(
            self.entry,
            bind(self.entry, self.plain),
            self.threat.norm,
            ground.plane.requires_grad_(False),
            ground.images,
            ground.labels,
            tick=self.clock.tick,
        )

    @cached_property
    def plants(self) -> Planted:
        """The planted examples."""
        radius = self.threat.radius if math.isfinite(self.threat.radius) else None
        cases = min(self.n, ALONE) if self.alone else self.n
        return Planted(
            self.threat.norm,
            cases,
            form=self.shape[:3],
            radius=radius,
            classes=self.shape.classes,
            scale=max(1.0, 20 * self.confidence),
        )

    # --- what is asked

    def _plane(self) -> Iterator[Finding]:
        """Ask it to cross the plane."""
        self.ground.watch = self.watch if self.entry.space == "pixel" else None
        self.main = self.ground.run(self.threat.radius)
        yield from self._faulty("plane", self.main)
        if self.entry.blind or not self.main.usable:
            return
        z = self.main.crafted.images
        held = self.ground.held(z)
        gained = self.ground.gained(z)
        n, k = len(held), int((~held).sum())
        self.crossed = k / n
        far = self.ground.farther(z)
        said = f"{k} of {n} images cross a plane" + (
            f" with {WITHIN:g} times the radius that is needed" if math.isfinite(self.threat.radius) else ""
        )
        if k < n:
            said += (
                f", the others went {round(float(gained[held].mean()), 2) + 0.0:.0%} of the way in the mean"
            )
        level = self._crossing(float(gained.mean()), float(gained[held].mean()), float(far[held].nanmedian()))
        if level in ("doubt", "alarm") and self._smooths():
            level, said = "note", f"{said}; they cross one whose weights have one sign in each quarter"
        yield Finding("plane", level, said, "does-not-cross" if level != "quiet" else None)
        if self.entry.kind == "minimum-norm" and k:
            yield self._distance(float(far[~held].median()), k)
        yield self._kept(int((held & self.watch.won).sum()), n, "images")

    def _crossing(self, gained: float, others: float, moved: float) -> Level:
        """Return how much it says that so many images crossed.

        The shares of the way that all of them and those that held have gone, and how far the latter moved, in
        units of what is needed.
        """
        assert self.crossed is not None
        if self.crossed >= MOST:
            return "quiet"
        if self.entry.access == "decision" or self.short or others >= WEAK:
            return "note"
        if self.entry.access == "score":
            if self.entry.kind == "minimum-norm":
                # What it returns where it found nothing is not what it tried.
                return "note"
            lame = moved < WITHIN / 2
            return "doubt" if lame and self.crossed else "alarm" if lame or gained < GAINED else "note"
        return "doubt" if self.crossed else "alarm"

    def _smooths(self) -> bool:
        """Return whether it crosses where gradients are alike in large parts, where smoothing is right."""
        if self.entry.access != "gradient" or self.entry.space != "pixel":
            return False
        ground = self._ground(smooth=True)
        done = ground.run(self.threat.radius)
        return done.usable and not ground.held(done.crafted.images).any()

    @cached_property
    def short(self) -> bool:
        """Whether it says itself that its settings cannot do it, which has a flag of its own."""
        return self.entry.said("flags", self.threat, **bind(self.entry, self.plain)) is not None

    def _distance(self, far: float, n: int) -> Finding:
        """Judge how far an attack went that moves as little as it can."""
        said = f"{n} images that cross went {far:.2f} times as far as they need to in the median"
        if far <= NEAR:
            return Finding("distance", "quiet", said)
        # In l0 all but exhaustive searches are greedy.
        doubtful = far > FAR and self.entry.access == "gradient" and self.threat.norm != "l0"
        return Finding("distance", "doubt" if doubtful else "note", said, "moves-too-far")

    def _kept(self, lost: int, n: int, what: str) -> Finding:
        """Judge how many successes were seen and not returned."""
        said = f"{lost} of {n} {what} were broken on the way and are returned unbroken"
        # Steps nearly as long as the radius lose plants again, which is a choice of settings; no plane.
        doubtful = what == "images" and lost > LOST * n
        level: Level = "quiet" if not lost else "doubt" if doubtful else "note"
        return Finding("kept", level, said, "drops-successes" if lost else None)

    def _again(self) -> Iterator[Finding]:
        """Ask it again with the same draws."""
        assert self.main is not None
        again = self.ground.run(self.threat.radius).crafted.images
        moved = float((again - self.main.crafted.images).abs().max())
        said = f"asked again with the same draws, images end elsewhere by {moved:.3g} at most"
        yield Finding("again", "doubt" if moved else "quiet", said, "moves-otherwise" if moved else None)

    def _beside(
        self, test: str, *, towards: bool = False, exact: bool = True, nan: bool = False
    ) -> Iterator[Finding]:
        """Ask it about a few images, towards a target, where success is none, or where nothing is known."""
        rows = torch.arange(min(FEW, self.n))
        done = self.ground.run(self.threat.radius, rows=rows, towards=towards, exact=exact, nan=nan)
        yield from self._faulty(test, done)
        if not nan and done.usable and self.crossed:
            z = done.crafted.images
            n, k = len(rows), int((~self.ground.held(z)).sum())
            said = f"{WHERE[test]} {k} of {n} images cross"
            weak = self.short or float(self.ground.gained(z).mean()) >= WEAK
            doubtful = not k and self.entry.access == "gradient" and not weak
            level: Level = "quiet" if k == n else "doubt" if doubtful else "note"
            code = "misses-targets" if towards else "does-not-cross"
            yield Finding(test, level, said, code if level != "quiet" else None)

    def _company(self) -> Iterator[Finding]:
        """Ask it about a few images in other company and order, in float64."""
        moved = self.ground.apart(self.threat.radius, min(FEW, self.n))
        if self.entry.space == "pixel" and not self.entry.blind and not self.alone:
            moved = max(moved, self._planted_apart())
        said = f"in other company or order, images end elsewhere by {moved:.3g} at most"
        mixed = moved > ROUNDING
        yield Finding("company", "doubt" if mixed else "quiet", said, "examples-interact" if mixed else None)

    def _plants(self) -> Iterator[Finding]:
        """Ask it to find what is planted."""
        n = len(self.plants.y)
        everyone = torch.arange(n)
        watch = _Watch(self.plants.x, self.plants.y, self.plants.threat)
        try:
            z = torch.cat([self._on_plants(rows, watch) for rows in everyone.split(1 if self.alone else n)])
        except Unnarrowed:
            self.alone = True
            z = torch.cat([self._on_plants(rows, watch) for rows in everyone.split(1)])
        won = self.plants.found(z, everyone, ROUNDING)
        self.planted = float(won.double().mean())
        said = f"{int(won.sum())} of {n} planted adversarial examples are found"
        iterative = float(watch.asks.double().median()) >= ITERATIVE
        poor = self.planted < PLANTED and self.entry.access == "gradient" and iterative
        # Where it is not even led across a plane, that has been said; what moves least may stay outside.
        fair = self.entry.kind == "fixed-budget" and not self.short and (self.crossed or 0) >= MOST
        level: Level = "quiet" if not poor else "doubt" if fair and self.planted < FEWEST else "note"
        yield Finding("plants", level, said, "finds-few-plants" if poor else None)
        yield self._kept(int((watch.won & ~won).sum()), n, "plants")

    def _on_plants(self, rows: Tensor, watch: _Watch, dtype: torch.dtype = torch.float32) -> Images:
        """Return what becomes of some of the planted examples."""
        asked = _Asked(Heads(self.plants, rows), rows, self.entry.access, self.clock, watch)
        blind = self.entry.access == "decision"
        view = Features(asked, refusal=True, centred=False) if blind else View(asked)
        noise = Noise("planted", rows, dtype=dtype, shard="planted" if self.entry.rng == "shard" else None)
        x = self.plants.x[rows].to(dtype)
        params = bind(self.entry, self.plain)
        with torch.enable_grad():
            returned = self.entry.make(view, x, self.plants.y[rows].clone(), self.threat, noise, **params)
        found: Images = returned.images if isinstance(returned, Crafted) else returned
        return found

    def _faulty(self, test: str, attempt: Attempt) -> Iterator[Finding]:
        """Yield the rules that an attack broke, each with its weight."""
        for rule, sentence in attempt.faults:
            if rule == "draws" and self.entry.rng == "shard":
                # A run seeds what its draws come from, for each shard.
                continue
            if rule in ("weights", "flags", "draws", "given"):
                heavy: Mapping[str, Level] = {"weights": "alarm", "draws": "doubt"}
                yield Finding(test, heavy.get(rule, "note"), sentence, "changes-others")
            else:
                yield Finding(test, "note" if test == "nan" else "alarm", sentence, "unlawful-images")

    def _planted_apart(self) -> float:
        """Return how far planted examples end from where they end in other company, or in another order."""
        watch = _Watch(self.plants.x, self.plants.y, self.plants.threat)
        n = min(FEW, len(self.plants.y))
        return apart(lambda rows: self._on_plants(rows, watch, torch.float64), n)


def _smaller(entry: AttackEntry, params: Mapping[str, Any], shape: Shape) -> Shape:
    """Return a smaller form where images are large, and the attack can be tried in it."""
    channels, height, width, classes = shape
    classes = max(classes, entry.least_classes)
    if channels * height * width <= LARGEST:
        return Shape(channels, height, width, classes)
    sides = (SIDE, SIDE) if height == width else (min(height, SIDE), min(width, SIDE))
    small = Shape(channels, *sides, classes)
    try:
        entry.check(params, small)
        fits = entry.said("unfit", params, small) is None
    except InputError:
        fits = False
    return small if fits else Shape(channels, height, width, classes)
