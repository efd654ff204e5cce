"""Flags: reasons to flag a number. Each has a code, a sentence, and advice in `docs/flags.md`.

The checks read the outcomes behind the cells of a table, whatever metric the table prints, and judge each
example by `metrics.is_correct`. Where a flag says that one attack does better than another, both were
compared on the same examples (`metrics.mcnemar_p`), and the probability that chance alone gives the
difference is below `CHANCE`.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np

from bench.results.conditions import Condition
from bench.results.metrics import Metric, PerExample, goal_reached, held_share, is_correct, mcnemar_p
from bench.results.outcomes import Rows

CHANCE = 0.01
"""Significance level of a comparison of two attacks: one-sided, not corrected for several comparisons."""

FLAT = 0.01
"""Share of the examples above which a vanished gradient, or a saturated loss, raises a flag."""

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
    "invalid-moves",
    "not-finite",
    "out-of-reach",
    "unequal-examples",
)
"""The codes of all flags; `docs/flags.md` has a section for each."""


@dataclass(frozen=True)
class Flag:
    """A reason to flag a number, or a whole table."""

    code: str
    """One of `CODES`."""
    message: str
    """What was found, in a sentence with its counts."""

    @property
    def advice(self) -> str:
        """Where the documentation says what it may mean, and what to do."""
        return f"docs/flags.md#{self.code}"


@dataclass(frozen=True)
class Evidence:
    """A condition whose evaluation is done, with its outcomes."""

    condition: Condition
    rows: Rows
    """The outcomes as they are stored."""
    validated: Rows
    """The outcomes as they read at the condition's radius."""
    clean: Rows | None
    """The answers of the same defense to the unmoved images; None where they are not needed or not there."""


def coordinates(condition: Condition, *without: str) -> tuple[tuple[str, Hashable], ...]:
    """Return the coordinates of a condition as a value to group by.

    Args:
        condition: The condition.
        without: Coordinates to leave out, with all below them (``inference`` and ``inference.cycles``).

    Returns:
        Names and values, in order of their names.
    """
    return tuple(
        (name, value)
        for name, value in sorted(condition.coordinates.items())
        if name.partition(".")[0] not in without
    )


def title(condition: Condition) -> str:
    """Return the name of a condition's attack with its view: ``pgd (e2e_last)``.

    Args:
        condition: The condition.

    Returns:
        The name; without a view, that of the attack alone.
    """
    return condition.attack if condition.view is None else f"{condition.attack} ({condition.view})"


# --- flags of one cell -------------------------------------------------------------------------------


def cell_flags(seen: Sequence[Evidence]) -> list[Flag]:
    """Return the flags that the outcomes behind one cell raise by themselves.

    Args:
        seen: The evidence of the cell's conditions.

    Returns:
        The flags, in the order of the checks.
    """
    found = [
        *_void(seen),
        *_not_finite(seen),
        *_differs(seen),
        *_flat(seen),
        *_saturated(seen),
        *_raised(seen),
        *_unbounded(seen),
    ]
    flags = dict.fromkeys(flag for each in seen for flag in each.condition.facts.flags)
    return [*found, *(Flag("out-of-reach", flag) for flag in flags)]


def _count(seen: Iterable[Evidence]) -> int:
    return sum(len(each.rows["index"]) for each in seen)


def invalid_moves(seen: Iterable[Evidence]) -> int:
    """Return the number of invalid moves.

    Args:
        seen: The evidence of some conditions.

    Returns:
        How many adversarial images were not lawful, so that the clean image was shown instead.
    """
    return sum(int(each.rows["invalid"].sum()) for each in seen)


def _void(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if count := invalid_moves(seen):
        yield Flag(
            "invalid-moves", f"{count} of {_count(seen)} moves were invalid: the clean image was shown"
        )


def _not_finite(seen: Sequence[Evidence]) -> Iterable[Flag]:
    if count := sum(int((each.rows["label"] < 0).sum()) for each in seen):
        yield Flag("not-finite", f"{count} of {_count(seen)} answers were not finite, and count as broken")


def _differs(seen: Sequence[Evidence]) -> Iterable[Flag]:
    count, asked = _differed([each.rows for each in seen])
    if count:
        yield Flag("answers-differ", f"{count} of {asked} answers differed when asked again")


def _differed(every: Sequence[Rows]) -> tuple[int, int]:
    """Return how many answers differed, and of how many that were asked again."""
    answers = np.concatenate([rows["differs"] for rows in every]) if every else np.empty(0)
    return int(np.nansum(answers)), int((~np.isnan(answers)).sum())


def _flat(seen: Sequence[Evidence]) -> Iterable[Flag]:
    for note, happened in (("flat", "vanished"), ("nonfinite", "was not finite")):
        noted = [each for each in seen if note in each.rows]
        count = sum(int((each.rows[note] > 0).sum()) for each in noted)
        if count > FLAT * _count(noted):
            yield Flag("flat-gradient", f"the gradient {happened} on {count} of {_count(noted)} examples")


def _saturated(seen: Sequence[Evidence]) -> Iterable[Flag]:
    noted = [each for each in seen if "saturated" in each.rows]
    # Where the attack won all the same, its loss did.
    lost = [(each.rows["saturated"] > 0) & (each.rows["label"] == each.rows["truth"]) for each in noted]
    if (count := sum(int(each.sum()) for each in lost)) > FLAT * _count(noted):
        yield Flag(
            "saturated-loss",
            f"the truth led by more than the attack's float32 softmax tells on {count} of {_count(noted)} "
            "examples that held",
        )


def _raised(seen: Sequence[Evidence]) -> Iterable[Flag]:
    noted = [each for each in seen if "raised" in each.rows]
    if count := sum(int((each.rows["raised"] > 0).sum()) for each in noted):
        yield Flag("attack-raised", f"the attack broke down on {count} of {_count(noted)} examples")


def _unbounded(seen: Sequence[Evidence]) -> Iterable[Flag]:
    free = [each for each in seen if _limitless(each.condition)]
    failed = 0
    for each in free:
        won = goal_reached(each.rows) & ~each.rows["rejected"]
        failed += int((~won & (each.rows["label"] >= 0)).sum())
    if failed:
        yield Flag("unbounded-fails", f"without any limit, {failed} of {_count(free)} attempts failed")


def _limitless(condition: Condition) -> bool:
    """Return whether an attack can move an image anywhere, so that only its own search can fail."""
    facts = condition.facts
    if facts.idle or not facts.exact or facts.source is not None:
        return False
    if facts.kind == "minimum-norm":
        # An attack without gradients that finds no start, or spends all its queries, reads as robustness.
        return True
    reaches_all = condition.norm == "linf" and condition.radius is not None and condition.radius >= 1
    return facts.access == "gradient" and reaches_all


# --- flags of a worst case over several answers ------------------------------------------------------


def union_flags(unions: Sequence[Sequence[Evidence]], metric: Metric) -> Iterable[Flag]:
    """Return the flag of a number that is the worst of several answers of a random defense.

    Args:
        unions: The evidence that is settled example by example: one union for each seed, and for each target
            where targets are averaged.
        metric: What is counted.

    Returns:
        One flag (``unluckiest-answer``), or none.
    """
    joined = [_answers(seen, metric) for seen in unions]
    most = max(map(len, joined), default=0)
    every = [rows for answers in joined for rows in answers]
    differed, asked = _differed(every)
    declared = any(each.condition.facts.random for seen in unions for each in seen)
    unasked = any(np.isnan(rows["differs"]).all() for rows in every)
    if most < 2 or not (differed or (declared and unasked)):
        return
    draws = min(each.condition.facts.draws for seen in unions for each in seen)
    each_of = "answers" if draws == 1 else f"means over {draws} draws"
    said = f"an example counts by the unluckiest of {most} {each_of}"
    said += f", and {differed} of {asked} differed when asked again" if asked else " of a random defense"
    if metric.name in ("accuracy", "robust") and (draws > 1 or not unasked):
        points = 100 * float(np.mean([_luck(answers, draws) for answers in joined]))
        if points < 0.05:
            return
        said += f": chance alone may take up to {points:.1f} points"
    yield Flag("unluckiest-answer", said)


def _answers(seen: Sequence[Evidence], metric: Metric) -> list[Rows]:
    """Return the rows that the worst is taken over: of each attack, and of unmoved images if they count."""
    found = {each.condition.job: each.validated for each in seen}
    if metric.clean != "unused":
        known = {id(each.rows) for each in seen}
        still = {id(each.clean): each.clean for each in seen if each.clean is not None}
        return [*found.values(), *(rows for name, rows in still.items() if name not in known)]
    return list(found.values())


def _luck(answers: Sequence[Rows], draws: int) -> float:
    """Return an upper bound of the share of examples that the worst of several answers loses to chance.

    Let p_j be the probability that answer j is right. The loss is the mean over examples of
    min_j p_j - prod_j p_j. It is at most the mean of sum_j p_j (1 - p_j), which is estimated by how often a
    right answer was wrong when asked again, and at most the least mean less the mean of the worst.

    Of means m_j over K draws the loss of an example is E max_j (p_j - m_j), and at most the root of the sum
    of their variances; the mean of roots is at most the root of the mean. m_j (1 - m_j) / (K - 1) estimates
    a variance without bias.
    """
    index = reduce(np.intersect1d, [rows["index"] for rows in answers])
    held = np.stack([held_share(rows)[np.searchsorted(rows["index"], index)] for rows in answers])
    if draws == 1:
        fell = sum(
            float((is_correct(rows) * rows["differs"])[~np.isnan(rows["differs"])].mean()) for rows in answers
        )
    else:
        fell = float(np.sqrt((held * (1 - held)).sum(0).mean() / (draws - 1)))
    return min(fell, float(held.mean(1).min() - held.min(0).mean()))


# --- flags from comparing cells ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Attack:
    """One attack through one view on one defense, over seeds and targets."""

    seen: tuple[Evidence, ...]

    @property
    def condition(self) -> Condition:
        return self.seen[0].condition

    @property
    def seeds(self) -> set[int]:
        return {each.condition.seed for each in self.seen}

    @property
    def asks(self) -> int:
        """Number of answers that an example is judged by: one for each target."""
        return max(Counter(each.condition.seed for each in self.seen).values())

    @property
    def drawn(self) -> bool:
        """Whether the defense is random, by its declaration or by what was seen."""
        declared = any(each.condition.facts.random for each in self.seen)
        return declared or _differed([each.rows for each in self.seen])[0] > 0

    def broken(self, seeds: set[int]) -> PerExample:
        """Return for each example whether any target broke it, averaged over seeds (and draws)."""
        by_seed = defaultdict(list)
        for each in self.seen:
            if each.condition.seed in seeds:
                by_seed[each.condition.seed].append(each.validated)
        every = [rows for parts in by_seed.values() for rows in parts]
        index = reduce(np.intersect1d, [rows["index"] for rows in every])
        worst = [
            np.max([1 - held_share(rows)[np.searchsorted(rows["index"], index)] for rows in parts], axis=0)
            for parts in by_seed.values()
        ]
        return PerExample(index, np.mean(worst, axis=0))


@dataclass(frozen=True)
class PairedComparison:
    """Two attacks, compared on the examples and seeds that both had."""

    wins: int
    """Examples that the first attack broke in more seeds."""
    losses: int
    """Examples that the second attack broke in more seeds."""
    n: int
    """Examples that both attacked."""
    chance: float
    """The p-value of a one-sided exact McNemar test that the first breaks more."""


def _compared(one: _Attack, other: _Attack) -> PairedComparison | None:
    seeds = one.seeds & other.seeds
    if not seeds:
        return None
    mine, theirs = one.broken(seeds), other.broken(seeds)
    _, here, there = np.intersect1d(mine.index, theirs.index, assume_unique=True, return_indices=True)
    a, b = mine.values[here], theirs.values[there]
    return PairedComparison(int((a > b).sum()), int((a < b).sum()), len(a), mcnemar_p(a, b))


def _attacks(cells: Sequence[Sequence[Evidence]], *without: str) -> dict[Hashable, dict[Hashable, _Attack]]:
    """Group the conditions of cells by what they share, then by the coordinates `without` and the rest."""
    found: dict[Hashable, dict[Hashable, dict[Hashable, Evidence]]] = defaultdict(lambda: defaultdict(dict))
    for seen in cells:
        for each in seen:
            if not each.condition.facts.idle:
                group = coordinates(each.condition, *without, "seed", "target")
                member = coordinates(each.condition, "seed", "target")
                found[group][member][coordinates(each.condition)] = each
    return {
        group: {name: _Attack(tuple(seen.values())) for name, seen in members.items()}
        for group, members in found.items()
    }


def _placed(
    cells: Sequence[Sequence[Evidence]], flags: Mapping[Hashable, Sequence[Flag]]
) -> list[list[Flag]]:
    """Return for each cell the flags of the attacks that are in it."""
    members = [
        dict.fromkeys(coordinates(each.condition, "seed", "target") for each in seen) for seen in cells
    ]
    return [[flag for name in names for flag in flags.get(name, ())] for names in members]


def row_flags(cells: Sequence[Sequence[Evidence]]) -> list[list[Flag]]:
    """Return the flags that comparing the attacks of a row raises.

    Args:
        cells: The evidence behind each cell of the row.

    Returns:
        The flags of each cell.
    """
    flags: dict[Hashable, list[Flag]] = defaultdict(list)
    for attacks in _attacks(cells, "attack", "view").values():
        seeing = [each for each in attacks.values() if not _blind(each.condition)]
        for name, attack in attacks.items():
            if _blind(attack.condition):
                flags[name] += _blind_beats(attack, seeing)
            elif not attack.condition.facts.exact:
                same = [each for each in seeing if each.condition.attack == attack.condition.attack]
                exact = [each for each in same if each.condition.facts.exact]
                flags[name] += _surrogate_beats(attack, exact)
    return _placed(cells, flags)


def _blind(condition: Condition) -> bool:
    """Return whether an attack does not see gradients of the defense that it is judged on."""
    return condition.facts.access != "gradient" or condition.facts.source is not None


def _blind_beats(attack: _Attack, seeing: Sequence[_Attack]) -> Iterable[Flag]:
    # On a random defense, more answers break more examples by chance alone.
    fair = [each for each in seeing if attack.asks <= each.asks or not attack.drawn]
    compared = [(pair, each) for each in fair if (pair := _compared(attack, each)) is not None]
    if not compared:
        return
    # Against the strongest of them, on the examples that both saw.
    pair, strongest = min(compared, key=lambda each: (each[0].wins - each[0].losses) / max(each[0].n, 1))
    if pair.chance < CHANCE:
        yield Flag("blind-beats-seeing", _sentence(attack, "sees no gradient", strongest, pair))


def _surrogate_beats(attack: _Attack, exact: Sequence[_Attack]) -> Iterable[Flag]:
    for other in exact:
        pair = _compared(attack, other)
        if pair is not None and pair.chance < CHANCE:
            yield Flag("surrogate-beats-exact", _sentence(attack, "looks at a surrogate", other, pair))


def _sentence(one: _Attack, handicap: str, other: _Attack, pair: PairedComparison) -> str:
    return (
        f"{title(one.condition)} {handicap}, and breaks {pair.wins} of {pair.n} examples that "
        f"{title(other.condition)} does not; the other way round {pair.losses} (p = {pair.chance:.1g})"
    )


def table_flags(cells: Sequence[Sequence[Evidence]]) -> list[list[Flag]]:
    """Return the flags that comparing the radii of a table raises.

    Args:
        cells: The evidence behind each cell of the table, row by row.

    Returns:
        The flags of each cell.
    """
    flags: dict[Hashable, list[Flag]] = defaultdict(list)
    for attacks in _attacks(cells, "radius").values():
        ladder = [
            (each.condition.radius, name, each)
            for name, each in attacks.items()
            if each.condition.radius is not None and each.condition.facts.kind == "fixed-budget"
        ]
        ladder.sort(key=lambda step_size: float(step_size[0]))
        for (low, _, near), (high, name, far) in pairwise(ladder):
            pair = _compared(near, far)
            if pair is not None and pair.chance < CHANCE:
                flags[name].append(
                    Flag(
                        "grows-with-radius",
                        f"{title(far.condition)} breaks fewer examples at radius {high:.4g} than at "
                        f"{low:.4g}: "
                        f"{pair.wins} of {pair.n} only at the smaller, {pair.losses} only at the larger "
                        f"(p = {pair.chance:.1g})",
                    )
                )
    return _placed(cells, flags)


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
