"""What should make us doubt a number: each doubt has a code, a sentence, and advice in `docs/flags.md`.

The checks look at the outcomes behind squares, whatever metric a table prints, and judge by
`metrics.holds`. Where one attack is said to do better than another, the same examples were compared,
pairwise (`metrics.beats`), and chance would do it with a probability below `CHANCE`.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from bench.metrics import Metric, Scored, beats, holds, reached
from bench.outcomes import Rows

CHANCE = 0.01
"""Below it, a difference between two attacks is not noise (one-sided, for one comparison)."""

FLAT = 0.01
"""Share of examples without a gradient above which a gradient attack is doubted."""

CODES = (
    "blind-beats-seeing",
    "surrogate-beats-exact",
    "grows-with-radius",
    "unbounded-fails",
    "flat-gradient",
    "saturated-loss",
    "attack-raised",
    "answers-differ",
    "unluckiest-answer",
    "void-moves",
    "not-finite",
    "out-of-reach",
    "unequal-examples",
)
"""Every doubt that can be raised; `docs/flags.md` has a section for each."""

Cell: TypeAlias = Mapping[str, Any]
"""A cell of the manifest: its coordinates and what is known of its attack."""

FACTS = frozenset(
    {
        "job",
        "attempt",
        "use",
        "idle",
        "access",
        "budget",
        "source",
        "final",
        "n",
        "random",
        "doubts",
        "reason",
    }
)
"""What a cell says beside its coordinates."""


@dataclass(frozen=True)
class Flag:
    """A doubt."""

    code: str
    message: str

    @property
    def advice(self) -> str:
        """Where it is explained."""
        return f"docs/flags.md#{self.code}"


@dataclass(frozen=True)
class Seen:
    """A cell whose job is done."""

    cell: Cell
    rows: Rows
    """As they were stored."""
    judged: Rows
    """As they read at the cell's radius."""
    clean: Rows | None
    """What the same row answers to unmoved images."""


def coordinates(cell: Cell, *without: str) -> tuple[tuple[str, Hashable], ...]:
    """Return a cell's coordinates in a form to group by, less those named (and what is below them)."""
    return tuple(
        (name, value)
        for name, value in sorted(cell.items())
        if name not in FACTS and name.partition(".")[0] not in without
    )


def title(cell: Cell) -> str:
    """Name a cell's attack: ``pgd (e2e_last)``."""
    return f"{cell['attack']} ({cell['view']})" if cell.get("view") is not None else str(cell["attack"])


# --- doubts about one square -------------------------------------------------------------------------


def of_square(seen: Sequence[Seen]) -> list[Flag]:
    """Return what the outcomes of a square say against themselves."""
    found = [
        *_void(seen),
        *_not_finite(seen),
        *_differs(seen),
        *_flat(seen),
        *_saturated(seen),
        *_raised(seen),
        *_unbounded(seen),
    ]
    doubts = dict.fromkeys(doubt for each in seen for doubt in each.cell["doubts"])
    return [*found, *(Flag("out-of-reach", doubt) for doubt in doubts)]


def _count(seen: Iterable[Seen]) -> int:
    return sum(len(each.rows["index"]) for each in seen)


def voids(seen: Iterable[Seen]) -> int:
    """Return how many moves were void."""
    return sum(int(each.rows["void"].sum()) for each in seen)


def _void(seen: Sequence[Seen]) -> Iterable[Flag]:
    if count := voids(seen):
        yield Flag("void-moves", f"{count} of {_count(seen)} moves were void: the clean image was shown")


def _not_finite(seen: Sequence[Seen]) -> Iterable[Flag]:
    if count := sum(int((each.rows["label"] < 0).sum()) for each in seen):
        yield Flag("not-finite", f"{count} of {_count(seen)} answers were not finite, and count as broken")


def _differs(seen: Sequence[Seen]) -> Iterable[Flag]:
    count, asked = _differed([each.rows for each in seen])
    if count:
        yield Flag("answers-differ", f"{count} of {asked} answers differed when asked again")


def _differed(every: Sequence[Rows]) -> tuple[int, int]:
    """Return how many answers differed, and of how many that were asked again."""
    answers = np.concatenate([rows["differs"] for rows in every]) if every else np.empty(0)
    return int(np.nansum(answers)), int((~np.isnan(answers)).sum())


def _flat(seen: Sequence[Seen]) -> Iterable[Flag]:
    for note, happened in (("flat", "vanished"), ("nonfinite", "was not finite")):
        noted = [each for each in seen if note in each.rows]
        count = sum(int((each.rows[note] > 0).sum()) for each in noted)
        if count > FLAT * _count(noted):
            yield Flag("flat-gradient", f"the gradient {happened} on {count} of {_count(noted)} examples")


def _saturated(seen: Sequence[Seen]) -> Iterable[Flag]:
    noted = [each for each in seen if "saturated" in each.rows]
    # Where the attack won all the same, its loss did.
    lost = [(each.rows["saturated"] > 0) & (each.rows["label"] == each.rows["truth"]) for each in noted]
    if (count := sum(int(each.sum()) for each in lost)) > FLAT * _count(noted):
        yield Flag(
            "saturated-loss",
            f"the truth led by more than the attack's float32 softmax tells on {count} of {_count(noted)} "
            "examples that held",
        )


def _raised(seen: Sequence[Seen]) -> Iterable[Flag]:
    noted = [each for each in seen if "raised" in each.rows]
    if count := sum(int((each.rows["raised"] > 0).sum()) for each in noted):
        yield Flag("attack-raised", f"the attack broke down on {count} of {_count(noted)} examples")


def _unbounded(seen: Sequence[Seen]) -> Iterable[Flag]:
    free = [each for each in seen if _limitless(each.cell)]
    failed = 0
    for each in free:
        won = reached(each.rows) & ~each.rows["rejected"]
        failed += int((~won & (each.rows["label"] >= 0)).sum())
    if failed:
        yield Flag("unbounded-fails", f"without any limit, {failed} of {_count(free)} attempts failed")


def _limitless(cell: Cell) -> bool:
    """Return whether nothing but itself keeps an attack from winning."""
    if cell["access"] == "none" or not cell["final"] or cell["source"] is not None:
        return False
    if cell["budget"] == "distance":
        # A blind one that found no start, or ran out of queries, reads as robustness.
        return True
    if cell["access"] != "gradient":
        return False
    return cell["norm"] == "linf" and cell["radius"] is not None and cell["radius"] >= 1


# --- doubts about answers that are joined ------------------------------------------------------------


def of_union(unions: Sequence[Sequence[Seen]], metric: Metric) -> Iterable[Flag]:
    """Doubt a number in which an example's value is the worst of several answers that chance had a part in.

    `unions` are the cells that are settled example by example, one union for each seed and target that is
    averaged.
    """
    joined = [_answers(seen, metric) for seen in unions]
    most = max(map(len, joined), default=0)
    every = [rows for answers in joined for rows in answers]
    differed, asked = _differed(every)
    declared = any(each.cell.get("random") for seen in unions for each in seen)
    unasked = any(np.isnan(rows["differs"]).all() for rows in every)
    if most < 2 or not (differed or (declared and unasked)):
        return
    said = f"an example counts by the unluckiest of {most} answers"
    said += f", and {differed} of {asked} differed when asked again" if asked else " of a random defense"
    if metric.name in ("accuracy", "robust") and not unasked:
        points = 100 * float(np.mean([_luck(answers) for answers in joined]))
        if points < 0.05:
            return
        said += f": chance alone may take up to {points:.1f} points"
    yield Flag("unluckiest-answer", said)


def _answers(seen: Sequence[Seen], metric: Metric) -> list[Rows]:
    """Return the rows that are joined, each job's once: of attacks, and of unmoved images if they count."""
    found = {each.cell["job"]: each.judged for each in seen}
    if metric.clean != "unused":
        known = {id(each.rows) for each in seen}
        still = {id(each.clean): each.clean for each in seen if each.clean is not None}
        return [*found.values(), *(rows for name, rows in still.items() if name not in known)]
    return list(found.values())


def _luck(answers: Sequence[Rows]) -> float:
    """Return by how much joining answers may fall below the best choice of one of them for each example.

    With p_j the chance that answer j holds, that is the mean of min p_j - product of p_j. It is at most
    the sum of p_j (1 - p_j), which is how often an answer that held does not when it is asked again, and
    at most what the least of the means is above the product's.
    """
    index = reduce(np.intersect1d, [rows["index"] for rows in answers])
    held = np.stack([holds(rows)[np.searchsorted(rows["index"], index)] for rows in answers])
    fell = sum(float((holds(rows) * rows["differs"])[~np.isnan(rows["differs"])].mean()) for rows in answers)
    return min(fell, float(held.mean(1).min() - held.all(0).mean()))


# --- doubts from comparing squares -------------------------------------------------------------------


@dataclass(frozen=True)
class _Attack:
    """What one attack through one view did to one row, over seeds and targets."""

    seen: tuple[Seen, ...]

    @property
    def cell(self) -> Cell:
        return self.seen[0].cell

    @property
    def seeds(self) -> set[int]:
        return {each.cell["seed"] for each in self.seen}

    @property
    def asks(self) -> int:
        """How many answers an example is judged by: one for each target."""
        return max(Counter(each.cell["seed"] for each in self.seen).values())

    @property
    def drawn(self) -> bool:
        """Whether another answer could have come, by what is declared or was seen."""
        declared = any(each.cell.get("random") for each in self.seen)
        return declared or _differed([each.rows for each in self.seen])[0] > 0

    def broken(self, seeds: set[int]) -> Scored:
        """Return how often each example was broken: by any target, averaged over seeds."""
        by_seed = defaultdict(list)
        for each in self.seen:
            if each.cell["seed"] in seeds:
                by_seed[each.cell["seed"]].append(each.judged)
        every = [rows for parts in by_seed.values() for rows in parts]
        index = reduce(np.intersect1d, [rows["index"] for rows in every])
        worst = [
            np.max([~holds(rows)[np.searchsorted(rows["index"], index)] for rows in parts], axis=0)
            for parts in by_seed.values()
        ]
        return Scored(index, np.mean(worst, axis=0))


@dataclass(frozen=True)
class _Duel:
    """Two attacks on the examples and seeds that both had."""

    wins: int
    """Examples that the first broke more often."""
    losses: int
    n: int
    chance: float


def _duel(one: _Attack, other: _Attack) -> _Duel | None:
    seeds = one.seeds & other.seeds
    if not seeds:
        return None
    mine, theirs = one.broken(seeds), other.broken(seeds)
    _, here, there = np.intersect1d(mine.index, theirs.index, assume_unique=True, return_indices=True)
    a, b = mine.values[here], theirs.values[there]
    return _Duel(int((a > b).sum()), int((a < b).sum()), len(a), beats(a, b))


def _attacks(squares: Sequence[Sequence[Seen]], *without: str) -> dict[Hashable, dict[Hashable, _Attack]]:
    """Group the cells of squares by what they share, then by the coordinates `without` and the rest."""
    found: dict[Hashable, dict[Hashable, dict[Hashable, Seen]]] = defaultdict(lambda: defaultdict(dict))
    for seen in squares:
        for each in seen:
            if each.cell["use"] != "none":
                group = coordinates(each.cell, *without, "seed", "target")
                member = coordinates(each.cell, "seed", "target")
                found[group][member][coordinates(each.cell)] = each
    return {
        group: {name: _Attack(tuple(seen.values())) for name, seen in members.items()}
        for group, members in found.items()
    }


def _placed(squares: Sequence[Sequence[Seen]], flags: Mapping[Hashable, Sequence[Flag]]) -> list[list[Flag]]:
    """Return for each square the flags of the attacks that are in it."""
    members = [dict.fromkeys(coordinates(each.cell, "seed", "target") for each in seen) for seen in squares]
    return [[flag for name in names for flag in flags.get(name, ())] for names in members]


def of_row(squares: Sequence[Sequence[Seen]]) -> list[list[Flag]]:
    """Return for each square of a row the doubts that comparing its attacks raises."""
    flags: dict[Hashable, list[Flag]] = defaultdict(list)
    for attacks in _attacks(squares, "attack", "view").values():
        seeing = [each for each in attacks.values() if not _blind(each.cell)]
        for name, attack in attacks.items():
            if _blind(attack.cell):
                flags[name] += _blind_beats(attack, seeing)
            elif not attack.cell["final"]:
                same = attack.cell["attack"]
                exact = [each for each in seeing if each.cell["final"] and each.cell["attack"] == same]
                flags[name] += _surrogate_beats(attack, exact)
    return _placed(squares, flags)


def _blind(cell: Cell) -> bool:
    """Return whether an attack does not see the gradients of what it attacks."""
    return cell["access"] != "gradient" or cell["source"] is not None


def _blind_beats(attack: _Attack, seeing: Sequence[_Attack]) -> Iterable[Flag]:
    # Where answers are drawn, more of them break more examples by themselves.
    fair = [each for each in seeing if attack.asks <= each.asks or not attack.drawn]
    duels = [(duel, each) for each in fair if (duel := _duel(attack, each)) is not None]
    if not duels:
        return
    # Against the strongest of them, on the examples that both saw.
    duel, strongest = min(duels, key=lambda each: (each[0].wins - each[0].losses) / max(each[0].n, 1))
    if duel.chance < CHANCE:
        yield Flag("blind-beats-seeing", _sentence(attack, "sees no gradient", strongest, duel))


def _surrogate_beats(attack: _Attack, exact: Sequence[_Attack]) -> Iterable[Flag]:
    for other in exact:
        duel = _duel(attack, other)
        if duel is not None and duel.chance < CHANCE:
            yield Flag("surrogate-beats-exact", _sentence(attack, "looks at a surrogate", other, duel))


def _sentence(one: _Attack, handicap: str, other: _Attack, duel: _Duel) -> str:
    return (
        f"{title(one.cell)} {handicap}, and breaks {duel.wins} of {duel.n} examples that "
        f"{title(other.cell)} does not; the other way round {duel.losses} (p = {duel.chance:.1g})"
    )


def of_grid(squares: Sequence[Sequence[Seen]]) -> list[list[Flag]]:
    """Return for each square of a table the doubts that comparing radii raises."""
    flags: dict[Hashable, list[Flag]] = defaultdict(list)
    for attacks in _attacks(squares, "radius").values():
        ladder = sorted(
            (
                (each.cell["radius"], name, each)
                for name, each in attacks.items()
                if each.cell["radius"] is not None and each.cell["budget"] == "radius"
            ),
            key=lambda step: float(step[0]),
        )
        for (low, _, near), (high, name, far) in pairwise(ladder):
            duel = _duel(near, far)
            if duel is not None and duel.chance < CHANCE:
                flags[name].append(
                    Flag(
                        "grows-with-radius",
                        f"{title(far.cell)} breaks fewer examples at radius {high:.4g} than at {low:.4g}: "
                        f"{duel.wins} of {duel.n} only at the smaller, {duel.losses} only at the larger "
                        f"(p = {duel.chance:.1g})",
                    )
                )
    return _placed(squares, flags)


def unequal(columns: Mapping[str, int]) -> Iterable[Flag]:
    """Doubt a table whose columns stand on different numbers of examples."""
    by_n: dict[int, list[str]] = defaultdict(list)
    for heading, n in columns.items():
        by_n[n].append(heading)
    if len(by_n) > 1:
        parts = (f"{n} ({', '.join(names)})" for n, names in sorted(by_n.items(), reverse=True))
        yield Flag("unequal-examples", f"columns stand on different examples: n = {'; '.join(parts)}")
