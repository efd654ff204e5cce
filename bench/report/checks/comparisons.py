"""Flags that comparisons raise: of a row's attacks, of a table's radii, of attacked and clean images.

Two attacks are compared on the examples and seeds that both had. All comparisons of a table are judged
together (Holm 1979): the probability that chance alone raises any of these flags in a table is at most
`CHANCE`.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from bench.report.checks.evidence import ITERATES, Evidence, coordinates, is_own_source, is_random, title
from bench.report.checks.flags import Flag, Level
from bench.results.conditions import Condition
from bench.results.metrics import PerExample, Values, binomial_p, common, held_share, mcnemar_p
from bench.results.outcomes import Rows

CHANCE = 0.01
"""Probability that chance alone raises a flag of a comparison somewhere in a table."""

SURVIVORS = 0.01
"""Share of the survivors of one attack that another one may break before a flag is raised."""

Name = Hashable
"""An attack with its view on one defense at one threat: coordinates without seed and target."""


@dataclass(frozen=True)
class _Attack:
    """One attack through one view on one defense, over seeds and targets."""

    seen: tuple[Evidence, ...]

    @property
    def condition(self) -> Condition:
        return self.seen[0].condition

    @property
    def seeds(self) -> frozenset[int]:
        return frozenset(each.condition.seed for each in self.seen)

    @property
    def asks(self) -> int:
        """Number of answers that an example is judged by: one for each target."""
        return max(Counter(each.condition.seed for each in self.seen).values())

    @cached_property
    def drawn(self) -> bool:
        """Whether the defense is random, by its declaration or by what was seen."""
        return is_random(self.seen)

    @property
    def blind(self) -> bool:
        """Whether it does not see gradients of the defense that it is judged on."""
        transfers = self.condition.facts.source is not None and not any(map(is_own_source, self.seen))
        return transfers or self.condition.facts.access != "gradient"

    @cached_property
    def steps(self) -> float | None:
        """Gradients at points, for an example on average; None where passes were not counted."""
        # One step that is averaged over twenty draws is one step, and twenty passes.
        counted = [
            each.rows["backwards"] / each.condition.facts.averaged
            for each in self.seen
            if "backwards" in each.rows
        ]
        return float(np.concatenate(counted).mean()) if counted else None

    @cached_property
    def _broken(self) -> dict[frozenset[int], PerExample]:
        return {}

    def broken(self, seeds: frozenset[int]) -> PerExample:
        """Return for each example whether any target broke it, averaged over seeds (and draws)."""
        if seeds not in self._broken:
            self._broken[seeds] = self._settled(seeds)
        return self._broken[seeds]

    def _settled(self, seeds: frozenset[int]) -> PerExample:
        by_seed = defaultdict(list)
        for each in self.seen:
            if each.condition.seed in seeds:
                by_seed[each.condition.seed].append(each.validated)
        every = [rows for parts in by_seed.values() for rows in parts]
        index = common([rows["index"] for rows in every])
        worst = [
            np.max([_at(PerExample(rows["index"], 1 - held_share(rows)), index) for rows in parts], axis=0)
            for parts in by_seed.values()
        ]
        return PerExample(index, np.mean(worst, axis=0))


@dataclass(frozen=True)
class Comparison:
    """A comparison, and the flags that it raises where chance does not explain it."""

    chance: float
    """The p-value."""
    flags: Mapping[Name, Flag] = field(default_factory=dict)
    """The flag of each attack that it is about."""


def compared(
    table: Sequence[Sequence[Sequence[Evidence]]], beside: Sequence[Sequence[Evidence]] = ()
) -> list[list[list[Flag]]]:
    """Return the flags that comparisons raise in a table.

    Args:
        table: The evidence behind each cell, row by row.
        beside: For each row what is known of attacks that the table does not show; they are compared too.

    Returns:
        The flags of each cell, row by row.
    """
    made: list[Comparison] = []
    for row, hidden in zip(table, beside or [()] * len(table), strict=True):
        cells = [*row, tuple(hidden)]
        for attacks in _attacks(cells, "attack", "view").values():
            made += _of_row(attacks)
        made += [each for attacks in _attacks(cells).values() for each in _above_clean(attacks)]
    everything = [cell for row in table for cell in row]
    for attacks in _attacks(everything, "radius").values():
        made += _of_radii(attacks)
    flags: dict[Name, list[Flag]] = defaultdict(list)
    for comparison in _significant(made):
        for name, flag in comparison.flags.items():
            flags[name].append(flag)
    return [[_placed(cell, flags) for cell in row] for row in table]


def _significant(made: Iterable[Comparison]) -> list[Comparison]:
    """Return the comparisons that chance does not explain, by Holm's procedure."""
    ordered = sorted(made, key=lambda each: each.chance)
    found = []
    for place, each in enumerate(ordered):
        if each.chance > CHANCE / (len(ordered) - place):
            break
        found.append(each)
    return found


def _attacks(cells: Sequence[Sequence[Evidence]], *without: str) -> dict[Hashable, dict[Name, _Attack]]:
    """Group the conditions of cells by what they share, then by the coordinates `without` and the rest."""
    found: dict[Hashable, dict[Name, dict[Hashable, Evidence]]] = defaultdict(lambda: defaultdict(dict))
    for seen in cells:
        for each in seen:
            # Of those that were run as one each saw what the others had left: there is nothing to compare.
            if not each.condition.facts.idle and each.condition.facts.member is None:
                group = coordinates(each.condition, *without, "seed", "target")
                found[group][_name(each)][coordinates(each.condition)] = each
    return {
        group: {name: _Attack(tuple(seen.values())) for name, seen in members.items()}
        for group, members in found.items()
    }


def _name(evidence: Evidence) -> Name:
    return coordinates(evidence.condition, "seed", "target")


def _placed(cell: Sequence[Evidence], flags: Mapping[Name, Sequence[Flag]]) -> list[Flag]:
    """Return the flags of the attacks that are in a cell."""
    return [flag for name in dict.fromkeys(map(_name, cell)) for flag in flags.get(name, ())]


# --- the attacks of a row ------------------------------------------------------------------------------


def _of_row(attacks: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    exact = {name: each for name, each in attacks.items() if not each.blind and each.condition.facts.exact}
    steps = {name: each.steps for name, each in exact.items()}
    # An attack of one step is easily beaten; where passes were not counted it is taken for one of many.
    many = {name: each for name, each in exact.items() if (count := steps[name]) is None or count > ITERATES}
    for name, attack in attacks.items():
        same = {
            other: each
            for other, each in exact.items()
            if each.condition.attack == attack.condition.attack and other != name
        }
        if attack.blind:
            yield from _blind_beats(name, attack, many or exact)
        elif not attack.condition.facts.exact:
            yield from _surrogate_beats(name, attack, same)
        elif (count := steps[name]) is not None and count <= ITERATES:
            yield from _one_beats_many(name, attack, many)


def _blind_beats(name: Name, attack: _Attack, seeing: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    """Compare an attack without gradients with each that has them, and with all of these together."""
    # On a random defense, more answers break more examples by chance alone.
    fair = {other: each for other, each in seeing.items() if attack.asks <= each.asks or not attack.drawn}
    pairs = {other: pair for other, each in fair.items() if (pair := _pair(attack, [each])) is not None}
    together = _pair(attack, list(fair.values())) if fair else None
    if together is None:
        return
    # What others of the row break is no reason to doubt the row, only the column.
    alone = _beats(together, attack.drawn)
    for other, pair in pairs.items():
        said = _sentence(attack, "sees no gradient", fair[other], pair)
        level: Level | None = None if alone < CHANCE else "note"
        flag = Flag("blind-beats-seeing", said, level)
        both = {other: flag} if level else {name: flag, other: flag}
        yield Comparison(_beats(pair, attack.drawn), both)


def _surrogate_beats(name: Name, attack: _Attack, exact: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    for other, each in exact.items():
        if (pair := _pair(attack, [each])) is not None:
            flag = Flag("surrogate-beats-exact", _sentence(attack, "looks at a surrogate", each, pair))
            yield Comparison(pair.stronger, {name: flag, other: flag})


def _one_beats_many(name: Name, attack: _Attack, many: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    facts = attack.condition.facts
    for other, each in many.items():
        # A search for the least move goes no farther than it must, and may end beyond the radius.
        alike = facts.kind == each.condition.facts.kind == "fixed-budget"
        if alike and attack.asks <= each.asks and (pair := _pair(attack, [each])) is not None:
            flag = Flag("one-step-beats-many", _sentence(attack, "takes one step", each, pair))
            yield Comparison(pair.stronger, {name: flag, other: flag})


def _beats(pair: "PairedComparison", drawn: bool) -> float:
    """Return the p-value of the share of survivors; of a random defense that of the difference.

    Where answers differ by chance, every attack breaks some of what another one left.
    """
    return pair.stronger if drawn else pair.share


@dataclass(frozen=True)
class PairedComparison:
    """Two attacks, compared on the examples and seeds that both had."""

    wins: int
    """Examples that the first attack broke in more seeds."""
    losses: int
    """Examples that the second attack broke in more seeds."""
    survivors: int
    """Examples that the second attack did not break in all seeds."""
    n: int
    """Examples that both attacked."""
    stronger: float
    """The p-value of a one-sided exact McNemar test that the first breaks more."""

    @property
    def share(self) -> float:
        """The p-value of a one-sided exact test that the first breaks more than `SURVIVORS` of what stood."""
        return binomial_p(self.wins, self.survivors, SURVIVORS)


def _pair(one: _Attack, others: Sequence[_Attack]) -> PairedComparison | None:
    """Compare an attack with the worst of others; None where there is no seed that all have."""
    seeds = one.seeds.intersection(*(each.seeds for each in others))
    if not seeds:
        return None
    every = [each.broken(seeds) for each in (one, *others)]
    index = common([each.index for each in every])
    a, *b = (_at(each, index) for each in every)
    worst = np.max(b, axis=0)
    wins, losses, stood = (int(each.sum()) for each in (a > worst, a < worst, worst < 1))
    return PairedComparison(wins, losses, stood, len(index), mcnemar_p(a, worst))


def _at(values: PerExample, index: NDArray[np.int64]) -> Values:
    """Return the values of the examples of an index, all of which there are."""
    same = len(values.index) == len(index)
    return values.values if same else values.values[np.searchsorted(values.index, index)]


def _sentence(one: _Attack, handicap: str, other: _Attack, pair: PairedComparison) -> str:
    return (
        f"{title(one.condition)} {handicap}, and breaks {pair.wins} of the {pair.survivors} examples that "
        f"{title(other.condition)} leaves; the other way round {pair.losses} (n = {pair.n})"
    )


# --- attacked and clean images -------------------------------------------------------------------------


def _above_clean(attacks: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    for name, attack in attacks.items():
        if attack.drawn or any(each.clean is None for each in attack.seen):
            continue
        labelled, still = (
            _Attack(tuple(_by_label(each, rows) for each in attack.seen if (rows := look(each)) is not None))
            for look in (attrgetter("validated"), attrgetter("clean"))
        )
        pair = _pair(still, [labelled])
        if pair is not None:
            said = (
                f"{title(attack.condition)} makes {pair.wins} of {pair.n} wrong answers right, and "
                f"{pair.losses} right ones wrong"
            )
            yield Comparison(pair.stronger, {name: Flag("above-clean", said)})


def _by_label(evidence: Evidence, rows: Rows) -> Evidence:
    """Return evidence by the label alone: a refusal counts otherwise where an image was moved."""
    rows = {**rows, "rejected": np.zeros(len(rows["rejected"]), np.bool_)}
    return Evidence(evidence.condition, rows, rows, None)


# --- radii ---------------------------------------------------------------------------------------------


def _of_radii(attacks: Mapping[Name, _Attack]) -> Iterable[Comparison]:
    ladder = [
        (float(each.condition.radius), name, each)
        for name, each in attacks.items()
        if each.condition.radius is not None and each.condition.facts.kind == "fixed-budget"
    ]
    ladder.sort(key=lambda step: step[0])
    for (low, _, near), (high, name, far) in pairwise(ladder):
        if (pair := _pair(near, [far])) is not None:
            said = (
                f"{title(far.condition)} breaks fewer examples at radius {high:.4g} than at {low:.4g}: "
                f"{pair.wins} of {pair.n} only at the smaller, {pair.losses} only at the larger"
            )
            yield Comparison(pair.stronger, {name: Flag("grows-with-radius", said)})


def unequal(columns: Mapping[str, int]) -> Iterable[Flag]:
    """Return the flag of a table whose columns count different numbers of examples.

    Args:
        columns: The number of examples of each column, by its heading.

    Returns:
        One flag (``unequal-examples``), or none.
    """
    by_n: dict[int, list[str]] = defaultdict(list)
    for heading, n in columns.items():
        by_n[n].append(heading)
    if len(by_n) > 1:
        parts = (f"{n} ({', '.join(names)})" for n, names in sorted(by_n.items(), reverse=True))
        yield Flag("unequal-examples", f"columns stand on different examples: n = {'; '.join(parts)}")
