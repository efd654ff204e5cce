"""The grade of a row: how much stands behind its numbers, and what is missing for a better one."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from bench.console import duration
from bench.report.checks import Evidence, Flag
from bench.report.checks.evidence import iterates
from bench.report.remedies import BLIND, NEEDED, SETTLED, Pace, seconds
from bench.results.conditions import Facts

Letter: TypeAlias = Literal["A", "B", "C", "D"]

LETTERS: tuple[Letter, ...] = ("A", "B", "C", "D")
"""All grades, the best first."""

SPAN = 0.1
"""The widest interval of the lowest accuracy that an A may have, as a share of the examples."""

CROSSED, PLANTED = 0.9, 0.5
"""The shares that an iterative attack with gradients brings across the plane, and finds of plants."""

SHORT = 10.0
"""Seconds: of less it is said only that it is less."""

LEAST = 50
"""On so many examples an attack must have been run to be evidence, or on all where there are fewer."""

PGD = re.compile(r".*/(Linf|L2|L1)?(EOT)?(PGD|PGDL2|BIM|BasicIterativeAttack)")
"""What the libraries call PGD on the cross-entropy: beside ours it is no second attack."""

BELIEVED = ("quiet", "untested", "note")
"""Levels of findings that leave an attack or a defense believed."""


Kind: TypeAlias = Literal["flags", "attack", "trial", "blind", "examination", "second", "time", "examples"]
"""What may be missing."""


class Lack(NamedTuple):
    """What is missing for a better grade."""

    kind: Kind
    said: str
    """The same in words."""
    seconds: float | None = None
    """About how long the attacks take that `bench doctor --fix` adds for it; None: it adds none, or nobody
    knows.
    """

    @property
    def told(self) -> str:
        """What is missing, and about how long it takes to add it."""
        if self.seconds is None:
            return self.said
        time = f"about {duration(self.seconds)}" if self.seconds >= SHORT else f"less than {SHORT:.0f} s"
        return f"{self.said} (bench doctor --fix: {time})"


@dataclass(frozen=True)
class Grade:
    """How much stands behind a row."""

    letter: Letter
    """``D``: an alarm stands. ``C``: a doubt stands, or evidence is missing without which no number can be
    believed. ``B``: all of that is there. ``A``: and what makes a mistake unlikely."""
    missing: tuple[Lack, ...] = ()
    """What the next better grade needs; nothing for an ``A``."""

    @property
    def said(self) -> str:
        """What is missing, in a sentence without a full stop; empty for an ``A``."""
        return self._sentence(each.said for each in self.missing)

    @property
    def told(self) -> str:
        """The same with times, which the files of a run leave out: other machines would write other files."""
        return self._sentence(each.told for each in self.missing)

    def _sentence(self, missing: Iterable[str]) -> str:
        if self.letter == "A":
            return ""
        better = LETTERS[LETTERS.index(self.letter) - 1]
        return f"for a grade of {better}: {'; '.join(missing)}"


def grade(
    seen: Sequence[Evidence], flags: Iterable[Flag], span: float | None, pace: Pace = lambda _: None
) -> Grade | None:
    """Grade what stands behind a row.

    Evidence counts, and silence does not: without an attack that was tried where the answer is known, an
    iterative attack on what is scored, an attack without gradients and a whole examination of the defense, a
    row has a ``C`` at most. At several threats, the one with the least evidence decides.

    Args:
        seen: The evidence of all stored attacks on the defense of the row, at its threats.
        flags: All flags of the row and of its cells.
        span: The widest interval of the lowest accuracy of the row, in [0, 1]; None where there is none.
        pace: What attacks took, to say about how long it takes to add what is missing.

    Returns:
        The grade; None where nothing is attacked.
    """
    attacks = [each for each in seen if not each.condition.facts.idle]
    if not attacks:
        return None
    levels: dict[str, list[str]] = {"alarm": [], "doubt": [], "note": []}
    for flag in flags:
        levels[flag.level].append(flag.code)
    if levels["alarm"]:
        said = f"mend what these alarms name: {', '.join(dict.fromkeys(levels['alarm']))}"
        return Grade("D", _timed([Lack("flags", said)], attacks, levels, pace))
    missing: list[Lack] = []
    if levels["doubt"]:
        said = f"mend what these doubts name: {', '.join(dict.fromkeys(levels['doubt']))}"
        missing.append(Lack("flags", said))
    missing += dict.fromkeys(said for same in _by_threat(attacks) for said in _core(same))
    if missing:
        return Grade("C", _timed(missing, attacks, levels, pace))
    more = list(dict.fromkeys(said for same in _by_threat(attacks) for said in _more(same)))
    if span is None:
        more.append(Lack("examples", "a column with the accuracy under attack, and its interval"))
    elif span > SPAN:
        said = (
            f"more examples: the interval of the lowest accuracy spans {100 * span:.1f} points, and "
            f"{100 * SPAN:.0f} are allowed"
        )
        more.append(Lack("examples", said))
    return Grade("B", _timed(more, attacks, levels, pace)) if more else Grade("A")


def _timed(
    missing: Iterable[Lack], attacks: Sequence[Evidence], levels: Mapping[str, Sequence[str]], pace: Pace
) -> tuple[Lack, ...]:
    """Return what is missing with about how long it takes to add it."""
    # What no attack mends has no time, and an attack that several things need is run once.
    weak = SETTLED.issuperset([*levels["alarm"], *(levels["doubt"] if not levels["alarm"] else ())])
    found, counted = [], set[str]()
    for each in missing:
        names = set(NEEDED.get(each.kind, ()) if each.kind != "flags" or weak else ()) - counted
        counted |= names
        time = seconds(names, attacks, pace)
        found.append(each._replace(seconds=None if time is None else round(time, 1)))
    return tuple(found)


def _by_threat(attacks: Iterable[Evidence]) -> list[list[Evidence]]:
    found: dict[tuple[str, float | None], list[Evidence]] = {}
    for each in attacks:
        found.setdefault((each.condition.norm, each.condition.radius), []).append(each)
    return list(found.values())


def _core(attacks: Sequence[Evidence]) -> Iterator[Lack]:
    """Yield what is missing without which no number can be believed."""
    least = min(LEAST, max(each.condition.facts.n for each in attacks))
    exact = [each for each in attacks if _exact(each) and each.condition.facts.n >= least]
    if not exact:
        more = f" on {least} examples or more" if any(map(_exact, attacks)) else ""
        yield Lack("attack", f"an iterative attack with gradients of what is scored{more}")
    elif not any(_proven(each) for each in exact):
        yield Lack("trial", "a trial of its attack where the answer is known")
    blind = [each for each in attacks if _blind(each) and each.condition.facts.n >= least]
    if not blind:
        more = f" on {least} examples or more" if any(map(_blind, attacks)) else ""
        yield Lack("blind", f"an attack without gradients{more}")
    elif not any(_moves(each) for each in blind):
        if any(each.trial is None for each in blind):
            yield Lack("trial", "a trial of its attack without gradients")
        else:
            yield Lack("blind", "an attack without gradients that stands its trial")
    if not any(_examined(each) for each in attacks):
        yield Lack("examination", "a whole examination of the defense (bench doctor)")


def _more(attacks: Sequence[Evidence]) -> Iterator[Lack]:
    """Yield what makes a mistake unlikely, and is missing."""
    least = min(LEAST, max(each.condition.facts.n for each in attacks))
    proven = [each for each in attacks if _exact(each) and _proven(each) and each.condition.facts.n >= least]
    if len({_method(each.condition.facts) for each in proven}) < 2:
        yield Lack("second", "a second attack with gradients of what is scored, with another loss")
    if untested := {name for each in attacks for name in (each.examination or {}).get("late", ())}:
        yield Lack("time", f"more time for the examination: there was none for {', '.join(sorted(untested))}")


def _method(facts: Facts) -> tuple[str, str]:
    """Return what an attack is and what it climbs; of libraries, where nobody says so, the cross-entropy."""
    return "pgd" if PGD.fullmatch(facts.use) else facts.use, facts.loss or "ce"


def _exact(each: Evidence) -> bool:
    """Return whether an attack follows gradients of what is scored, in more than one step."""
    facts = each.condition.facts
    if facts.access != "gradient" or facts.source is not None or not facts.exact:
        return False
    if each.condition.target is not None:
        # Towards one label it may fail where another is near.
        return False
    return iterates(each)


def _proven(each: Evidence) -> bool:
    # What ran out of time, or says itself that it cannot reach, has shown nothing.
    found = each.trial
    if found is None or found["worst"] not in BELIEVED or found["crossed"] is None:
        return False
    if "plants" in found["late"]:
        return False
    return bool(found["crossed"] >= CROSSED and (found["planted"] is None or found["planted"] >= PLANTED))


def _examined(each: Evidence) -> bool:
    found = each.examination
    return found is not None and bool(found["whole"]) and 2 * len(found["untested"]) <= found["tests"]


def _blind(each: Evidence) -> bool:
    """Return whether an attack follows no gradient; a transfer is none."""
    # A transfer from a network that hardly learned says nothing: it is no evidence.
    facts = each.condition.facts
    return facts.access in BLIND and facts.source is None


def _moves(each: Evidence) -> bool:
    """Return whether an attack without gradients was tried, and crosses a plane now and then."""
    found = each.trial
    return found is not None and found["worst"] in BELIEVED and found["crossed"] != 0
