"""Worst mode: the attacks of a row become one, in which each sees only what stood against those before it.

A row's attacks are put in the order of what they break per second, as far as receipts tell. The order is no
part of a key: it changes which attack breaks an example first, and never whether it is broken, since each
attack draws what it draws alone (`docs/decisions/0023-the-order-of-a-worst-case-is-in-no-key.md`).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.registry import ATTACKS, AttackEntry, labels_of
from bench.suite.jobs import AttackRun
from bench.suite.resolve import Resolved, inner, resolve

SEQUENCE = "sequence"
"""The registered attack that is made of others, each on what stands."""


def joins(run: AttackRun, radius: float | None) -> bool:
    """Return whether a run may be one of several in which the later ones see only what stands.

    An example falls only where winning on the view is winning, within a radius, and for any wrong label: to
    drop it elsewhere would change what a table counts.

    Args:
        run: The run of an attack.
        radius: The radius by which its images are judged; None: there is none.
    """
    judged = run.view is not None and run.exact and radius is not None
    plain = run.target is None and run.attack.entry.space == "pixel" and not inner(run.attack)
    return judged and plain


@dataclass(frozen=True)
class Row:
    """Several attacks of one row as one."""

    attack: Resolved[AttackEntry]
    """The sequence; its members stand in the order of their identities."""
    places: Mapping[str, int]
    """The place of a member, by `_told` of its identity."""

    @classmethod
    def of(cls, attacks: Iterable[Resolved[AttackEntry]], folder: Path) -> "Row":
        """Put attacks into one; those with the same settings are one member.

        Args:
            attacks: The attacks.
            folder: Where relative paths start.
        """
        members = {_told(each): each for each in attacks}
        names = sorted(members)
        of = [{"use": members[name].name, **members[name].params} for name in names]
        attack = replace(
            resolve(ATTACKS[SEQUENCE], {"of": of}, folder),
            label=" + ".join(each.called for each in members.values()),
        )
        return cls(attack, {name: place for place, name in enumerate(names)})

    def member(self, attack: Resolved[AttackEntry]) -> dict[str, Any]:
        """Return what a manifest says of one of its attacks (`bench.results.conditions.Member`)."""
        place, labels = self.places[_told(attack)], labels_of(self.attack.params["of"])
        return {"label": labels[place], "place": place, "of": labels}

    def ordered(self, order: Sequence[int]) -> Resolved[AttackEntry]:
        """Return the attack whose members run in an order; its identity, and so its key, says none.

        Args:
            order: The places of the members.
        """
        return replace(self.attack, params={**self.attack.params, "order": list(order)})


def _told(attack: Resolved[AttackEntry]) -> str:
    return json.dumps(attack.identity, sort_keys=True)


class Rates:
    """What attacks break per second of a device, by what receipts say of their evaluations."""

    def __init__(self) -> None:
        self._kills: dict[tuple[str, ...], float] = defaultdict(float)
        self._seconds: dict[tuple[str, ...], float] = defaultdict(float)

    def learn(self, run: AttackRun, receipt: Mapping[str, Any] | None) -> None:
        """Take note of a run that was evaluated.

        Args:
            run: The run of an attack, or of one that is made of several.
            receipt: The receipt of its evaluation; None, or an older one without kills, tells nothing.
        """
        if receipt is None or "kills" not in receipt:
            return
        seconds = float((receipt.get("crafting") or {}).get("seconds") or 0)
        if not run.members:
            self._add(run, receipt["kills"], seconds)
            return
        told = receipt["members"]
        # A pass of one member takes as long as one of another.
        passes = sum(each["passes"] for each in told.values()) or 1
        for label, member in zip(labels_of(run.attack.params["of"]), run.members, strict=True):
            # What raised was not done with what it would have broken.
            if not told[label].get("raised"):
                self._add(member, told[label]["kills"], seconds * told[label]["passes"] / passes)

    def _add(self, run: AttackRun, kills: float, seconds: float) -> None:
        for name in _names(run):
            self._kills[name] += kills
            self._seconds[name] += seconds

    def _rate(self, run: AttackRun) -> float | None:
        """Return kills per second: on this defense, else on any; None where nothing was measured."""
        for name in _names(run):
            if self._seconds.get(name, 0) > 0:
                return self._kills[name] / self._seconds[name]
        return None

    def order(self, runs: Sequence[AttackRun]) -> list[int]:
        """Return in which order attacks run: by their rates, or those with the fewest passes first.

        Rates decide where every attack has one. What draws from a shard's stream comes last in either case,
        in the order of the key: what it breaks may depend on what it sees.

        Args:
            runs: The runs of the members alone.

        Returns:
            Their places.
        """
        rates = [self._rate(run) for run in runs]
        known = [each for each in rates if each is not None]

        def rank(place: int) -> tuple[bool, float, int, int]:
            entry, params = runs[place].attack.entry, runs[place].attack.params
            if entry.rng == "shard":
                return True, 0.0, 0, place
            rate = known[place] if len(known) == len(runs) else 0.0
            return False, -rate, entry.passes(params), place

        return sorted(range(len(runs)), key=rank)


def _names(run: AttackRun) -> list[tuple[str, ...]]:
    """Return what a run is like, the closest first."""
    attack = _told(run.attack)
    source = run.source.train.defense.identity if run.source else {}
    return [(attack, json.dumps(source, sort_keys=True)), (attack,)]
