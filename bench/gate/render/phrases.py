"""What every format says of a check: the verdict in words, numbers in their units, flips, what to do next."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

from bench.console import count
from bench.escaping import shown
from bench.gate.verdicts import WORST_FIRST, Check, Finding, Flip, Floor, Replayed, Verdict
from bench.quantities import DASH
from bench.report.render.words import MINUS

MOST = 20
"""How many flips of one finding are listed for a reader; the JSON has all."""

FLIP_HEADS = ("index", "class", "found by", "seed", "answer")
"""The headings of `flip_cells`."""

REPLAY_ONLY = "Only stored adversarial images were asked: this says nothing about a new search."
"""What is said of a check that ran no attack."""

NOTHING = "nothing critical was compared"
"""What is said of a check without a critical finding, which is never green."""

_LEAST_P = 1e-4
_PATH = 300

_T = TypeVar("_T")


def brief(text: str, most: int = 2000) -> str:
    """Write a text of unknown origin on one line, and end it where it is too long to be read.

    Args:
        text: Any text.
        most: The number of characters after which it ends with dots, at least 4.

    Returns:
        The text, in which what cannot be seen is escaped.
    """
    # Escapes only lengthen a text.
    line = shown(text[: most + 1], keep="")
    return line if len(line) <= most else f"{line[: most - 3]}..."


def beside(value: float, mark: float, decimals: int = 1) -> str:
    """Write a number so that it can be told from the mark that it is judged by.

    A loss of 1.02 points is not printed as 1.0 where the tolerance is 1.

    Args:
        value: The number, in the unit in which it is printed.
        mark: The tolerance, the floor or the level, in the same unit.
        decimals: How many decimals are enough where the number is far from the mark.

    Returns:
        The number with a typographic minus sign, and with up to six more decimals near the mark.
    """
    side = (value > mark) - (value < mark)
    for more in range(7):
        text = f"{value:z.{decimals + more}f}"
        if (float(text) > mark) - (float(text) < mark) == side:
            break
    return text.replace("-", MINUS)


def percent(share: float) -> str:
    """Write a share as the tables do, in percent with one decimal, and without its sign.

    Args:
        share: A share in [0, 1].

    Returns:
        The number, such as ``61.2``.
    """
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """Write a setting, such as the tolerance, in points.

    Args:
        share: A share.

    Returns:
        ``1 point``, ``0.25 points``.
    """
    number = f"{100 * share:.6g}"
    return f"{number} point{'' if number == '1' else 's'}"


def loss_of(finding: Finding, check: Check) -> tuple[str, str]:
    """Write the loss of a finding and its interval, in points.

    Args:
        finding: A finding with a loss.
        check: Its check, for the tolerance.

    Returns:
        The loss, such as ``4.4``, and the ends of its interval, such as ``2.1 to 6.9``.
    """
    assert finding.loss is not None
    tolerance = 100 * check.tolerance
    value, low, high = (
        beside(100 * each, tolerance) for each in (finding.loss.value, finding.loss.low, finding.loss.high)
    )
    return value, f"{low} to {high}"


def probability(p: float | None, alpha: float) -> str:
    """Write a p-value.

    Args:
        p: The p-value in [0, 1]; None where nothing could be compared.
        alpha: The level that it is judged by, in (0, 1).

    Returns:
        Three decimals, more near the level and below 0.001, ``<0.0001`` far below it, and a dash for None.
    """
    if p is None:
        return DASH
    if p < (least := min(_LEAST_P, alpha / 10)):
        return f"<{least:.6g}"
    # Two digits, so that what is small is not printed as nothing.
    return beside(p, alpha, max(3, 1 - math.floor(math.log10(p))))


def quantity(examples: float) -> str:
    """Write a number of examples.

    Args:
        examples: The number; of several seeds a mean, which may be a fraction.

    Returns:
        A whole number as it is, any other with one decimal.
    """
    return f"{examples:.0f}" if examples == round(examples) else f"{examples:.1f}"


def ordered(check: Check) -> list[Finding]:
    """Return the findings in the order of reading.

    Args:
        check: The check.

    Returns:
        The worst verdict first, critical ones before advisory ones, then the greatest loss.
    """

    def place(finding: Finding) -> tuple[int, bool, float]:
        lost = 0.0 if finding.loss is None else finding.loss.value
        return WORST_FIRST.index(finding.verdict), finding.tier != "critical", -lost

    return sorted(check.findings, key=place)


def verdict(check: Check, *, fail_on_gain: bool = False) -> Verdict:
    """Return the verdict that the exit status stands for.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        The verdict.
    """
    return "regressed" if fail_on_gain and check.suspicious else check.verdict


def headline(check: Check, *, fail_on_gain: bool = False) -> str:
    """Write the verdict with its counts.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        Such as ``regressed: 1 of 14; undecided: 2; held: 11``.
    """
    critical = [each for each in check.findings if each.tier == "critical"]
    numbers = Counter(each.verdict for each in critical)
    said = [f"{each}: {numbers[each]}" for each in WORST_FIRST if numbers[each]]
    if said:
        said[0] += f" of {len(critical)}"
    else:
        said = [f"{check.verdict}: {NOTHING}"]
    if suspicious := sum(bool(each.suspicious) for each in critical):
        said.append(f"suspicious: {suspicious}")
        if fail_on_gain and check.verdict != "regressed":
            said.insert(0, "regressed: what is suspicious counts as a regression")
    if advisory := [each.verdict for each in check.findings if each.tier == "advisory"]:
        said.append(f"advisory: {sum(each != 'held' for each in advisory)} of {len(advisory)} not held")
    return f"{'replay alone: ' if check.replay_only else ''}{'; '.join(said)}"


def setting(check: Check) -> str:
    """Write what was compared with what, and by which rule.

    Args:
        check: The check.

    Returns:
        A sentence.
    """
    rule = f"tolerance {points(check.tolerance)}, level {check.alpha:g}"
    suite, before, after = (brief(each, _PATH) for each in (check.suite, check.before, check.after))
    return f"{f'{suite}: ' if suite else ''}{before} -> {after}; {rule}."


def caption(check: Check) -> str:
    """Write how the columns of the table of findings are read.

    Args:
        check: The check.

    Returns:
        Sentences.
    """
    said = (
        "Before, after: the share of the examples that is held, in percent. Loss: in points, with its paired "
        f"{100 * (1 - check.alpha):g} % interval; below 0 it is a gain. p: mid-p, adjusted over all findings "
        "(Holm)."
    )
    if any(each.detectable is not None for each in check.findings):
        said += " Below n: the least true loss, in points, that so many examples show in 8 of 10 checks."
    if any(each.verdict == "held" and _wide(each, check) for each in check.findings):
        said += (
            " Held though the interval is wider than the tolerance: the network is the baseline's to the "
            "last bit, and no outcome differs."
        )
    return said


def _wide(finding: Finding, check: Check) -> bool:
    return finding.loss is not None and not finding.replayed and finding.loss.high > check.tolerance


def detectable(finding: Finding) -> str:
    """Write the least loss that a finding's examples can show.

    Args:
        finding: The finding.

    Returns:
        The loss in points, rounded up, with a sign before it; an empty text where there is none.
    """
    if finding.detectable is None:
        return ""
    # Up, so that no more is promised; rounding to six digits first: 100 * 0.07 is a little above 7.
    return f"≥{math.ceil(round(1000 * finding.detectable, 6)) / 10:.1f}"


def facts(finding: Finding, check: Check) -> str:
    """Write the numbers of a finding on one line.

    Args:
        finding: The finding.
        check: Its check.

    Returns:
        Such as ``n = 500; 97.5 % -> 93.1 %; ...``; that nothing was compared where there is no loss.
    """
    if (loss := finding.loss) is None:
        said = ["no numbers: nothing could be compared"]
    else:
        value, ends = loss_of(finding, check)
        said = [
            f"n = {loss.n}",
            f"{percent(loss.before)} % -> {percent(loss.after)} %",
            f"loss {value} points ({100 * (1 - check.alpha):g} % interval {ends}), "
            f"tolerance {points(check.tolerance)}",
            f"lost {quantity(loss.lost)}, gained {quantity(loss.gained)}",
            f"adjusted p {probability(finding.p, check.alpha)}",
        ]
        if least := detectable(finding):
            said.append(f"a true loss of {least} points shows in 8 of 10 checks")
    if finding.floor is not None:
        said.append(floor(finding.floor))
    return "; ".join(said)


def floor(given: Floor) -> str:
    """Write a floor, and what is known of it.

    Args:
        given: The floor.

    Returns:
        Such as ``floor 60 %: undecided, the accuracy is between 58.1 % and 66.9 %``.
    """
    least = 100 * given.least
    low, high = beside(100 * given.low, least), beside(100 * given.high, least)
    said = {"held": "held", "regressed": "not reached"}.get(given.verdict, given.verdict)
    return f"floor {least:.6g} %: {said}, the accuracy is between {low} % and {high} %"


def decides(finding: Finding) -> str | None:
    """Write what would decide an undecided finding.

    Args:
        finding: The finding.

    Returns:
        A sentence; None where the verdict is another one.
    """
    if finding.verdict != "undecided":
        return None
    if finding.replayed:
        return "A check without --replay decides it."
    if finding.needed is None:
        return "No number of examples is known to decide it: the loss is too close to the tolerance."
    now = "" if finding.loss is None else f" (now {finding.loss.n})"
    return f"About {finding.needed} examples{now} would decide it, if loss and churn stay as they are."


def flip_cells(flip: Flip) -> tuple[str, ...]:
    """Write an example that broke, in the order of `FLIP_HEADS`.

    Args:
        flip: The example.

    Returns:
        Its index, class, attack, seed, and the old and the new answer; of several draws also how many of
        them held it.
    """
    before, after = map(_answer, (flip.before, flip.after), flip.refused)
    answer = f"{before} -> {after}"
    if flip.shares is not None:
        answer += f", held in {100 * flip.shares[0]:.4g} % -> {100 * flip.shares[1]:.4g} % of draws"
    return str(flip.index), str(flip.truth), brief(flip.attack, 200), str(flip.seed), answer


def _answer(label: int, refused: bool) -> str:
    return "refused" if refused else "not finite" if label < 0 else str(label)


def first(items: Sequence[_T], most: int = MOST) -> tuple[Sequence[_T], str]:
    """Return the first of many, and what is said of the others.

    Args:
        items: All of them.
        most: How many are listed at most.

    Returns:
        The first ones, and ``and 37 more``; an empty text where there are no others.
    """
    return items[:most], f"and {len(items) - most} more" if len(items) > most else ""


def replay(replayed: Replayed) -> list[str]:
    """Write what stored images say.

    Args:
        replayed: What was found.

    Returns:
        Sentences.
    """
    shown_again = (
        f"{count(replayed.images, 'image')} of {count(replayed.examples, 'example')}, "
        "as the baseline's attacks left them,"
    )
    said = [
        f"{shown_again} shown again: {replayed.still_broken} of the examples that were lost are still lost, "
        f"{replayed.mended} are not (a new search may break them again)."
    ]
    broken = len(replayed.flips)
    drawn = any(each.shares is not None for each in replayed.flips)
    certain = ", in most draws of a random defense." if drawn else ": exact evidence that needs no test."
    said.append(
        f"{count(broken, 'example')} that the baseline held against everything "
        f"{'is' if broken == 1 else 'are'} broken now" + (certain if broken else ".")
    )
    if replayed.beyond is not None:
        said.append(
            f"Stored images, and attacks that start from them, break {count(replayed.beyond, 'example')} "
            "that today's own attacks do not break; these count for floors alone."
        )
    return said


def warnings(check: Check) -> Iterator[tuple[Finding, str]]:
    """Yield what is suspicious.

    Args:
        check: The check.

    Yields:
        A finding, and a sentence about a gain or a flag of it.
    """
    for finding in ordered(check):
        for each in finding.suspicious:
            yield finding, each


def next_step(check: Check, *, fail_on_gain: bool = False) -> str:
    """Write what to do about the verdict.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        A sentence. It names commands only where there is a task file, and so a baseline.
    """
    suite, before = brief(check.suite, _PATH), brief(check.before, _PATH)
    commands = check.lines is not None
    if verdict(check, fail_on_gain=fail_on_gain) != check.verdict:
        return "Next: find out why the gain is so great before you trust it; a broken attack looks like this."
    match check.verdict:
        case "regressed":
            accept = ' bench baseline accept --reason "..." accepts a loss that is meant.' if commands else ""
            return f"Next: look at what broke, and mend it.{accept}"
        case "not comparable":
            save = f", or save a new baseline: bench baseline save {suite} --out {before}" if commands else ""
            return f"Next: ask the question that was asked before{save}."
        case "incomplete":
            if not any(each.tier == "critical" for each in check.findings):
                return (
                    "Next: see that both sides have tables with conditions that are critical to this check."
                )
            run = f": bench run {suite}" if commands else ""
            return f"Next: measure what is missing{run}, then compare again."
        case "undecided":
            return f"Next: {_more(check)}."
    if check.suspicious:
        return "Next: read the warnings before you trust a gain; a broken attack looks like one."
    if check.replay_only:
        return "Next: nothing to mend; a check without --replay says whether robustness is held."
    return "Next: nothing to do."


def _more(check: Check) -> str:
    if check.replay_only:
        return "a check without --replay decides"
    undecided = [each for each in check.findings if each.verdict == "undecided" and each.tier == "critical"]
    known = [each.needed for each in undecided if each.needed is not None]
    if not known:
        return "allow another tolerance, or look at what changed; more examples may not decide it"
    all_of = "it" if len(undecided) == 1 else "all" if len(known) == len(undecided) else f"{len(known)}"
    return f"ask more examples (about {max(known)} decide {all_of}), or allow a greater tolerance"
