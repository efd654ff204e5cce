"""A check in Markdown, for the summary of a CI step and for a comment on a pull request."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from urllib.parse import quote

from bench.console import count
from bench.escaping import in_markdown
from bench.gate.render import phrases
from bench.gate.verdicts import Check, Finding, Flip
from bench.quantities import DASH
from bench.report.render.markdown import pipes

COMMENT = 60_000
"""Bytes that fit into a comment on GitHub, which takes 65,536 characters."""

SUMMARY = 1_000_000
"""Bytes that fit into the summary of a step on GitHub, which takes 1 MiB."""

_HEADS = ("subject", "n", "before -> after (%)", "loss (points)", "lost / gained", "p", "verdict")
_NAME = 200
_CUT = "This report was cut to fit; the JSON has all of it."


class _Page:
    """Parts of a page, of which the last ones are left out where they do not fit."""

    def __init__(self, room: int) -> None:
        self.parts: list[str] = []
        self.room = room
        self.cut = False

    def add(self, part: str) -> bool:
        """Add a part if it fits, and say whether it did."""
        size = len(part.encode()) + 2
        if size > self.room:
            self.cut = True
            return False
        self.parts.append(part)
        self.room -= size
        return True


def to_markdown(check: Check, *, fail_on_gain: bool = False, limit: int = COMMENT) -> str:
    """Write a check in Markdown; its first line is a marker that GitHub does not show.

    By the marker, which is the same for every check of one suite, a comment is found again and rewritten.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.
        limit: The number of bytes that it may have at most, at least 40,000; what is too much is left out,
            and a sentence says so.

    Returns:
        The Markdown, with a line end at its end.

    Raises:
        ValueError: The limit is too small.
    """
    if limit < 40_000:
        raise ValueError(f"a limit of {limit} bytes is too small, expected at least 40000")
    verdict = phrases.verdict(check, fail_on_gain=fail_on_gain)
    top = [
        marker(check),
        f"### {'Replay' if check.replay_only else 'Robustness'}: {verdict}",
        _text(f"{phrases.headline(check, fail_on_gain=fail_on_gain)}."),
        _text(phrases.setting(check)),
    ]
    if check.replay_only:
        top.append(f"**{phrases.REPLAY_ONLY}**")
    bottom = f"**{_text(phrases.next_step(check, fail_on_gain=fail_on_gain))}**"
    page = _Page(limit - len("\n\n".join([*top, bottom, _CUT]).encode()) - 10)
    findings = phrases.ordered(check)
    if findings:
        # A long table leaves room for what broke.
        _table(page, findings, check, page.room // 2)
    for part in _below(findings, check):
        if not page.add(part):
            break
    return "\n\n".join([*top, *page.parts, *([_CUT] if page.cut else []), bottom]) + "\n"


def marker(check: Check) -> str:
    """Return the first line of a check's Markdown.

    Args:
        check: The check.

    Returns:
        An HTML comment with the name of the suite, in which all that could end it is percent-encoded.
    """
    name = quote(check.suite, safe="/. ", errors="backslashreplace")
    return f"<!-- crossfire:{name[:1000]} -->"


def _text(text: str, most: int = 2000) -> str:
    # The space of no width keeps GitHub from calling people whose names an attack has.
    return in_markdown(phrases.brief(text, most)).replace("@", "@&#8203;")


def _table(page: _Page, findings: Sequence[Finding], check: Check, room: int) -> None:
    lines: list[list[str]] = []
    for finding in findings:
        line = _line(finding, check)
        room -= len(" | ".join(line).encode()) + 5
        if room < 0:
            page.cut = True
            break
        lines.append(line)
    page.add(pipes(_HEADS, 1, lines))
    if len(lines) < len(findings):
        page.add(f"and {len(findings) - len(lines)} more, none worse than the last one above")
    if any(each.loss is not None for each in findings):
        page.add(f"<sub>{_text(phrases.caption(check))}</sub>")


def _line(finding: Finding, check: Check) -> list[str]:
    if (loss := finding.loss) is None:
        cells = [DASH] * 5
    else:
        value, ends = phrases.loss_of(finding, check)
        least = phrases.detectable(finding)
        cells = [
            f"{loss.n}<br>{least}" if least else str(loss.n),
            f"{phrases.percent(loss.before)} -> {phrases.percent(loss.after)}",
            f"{value}<br>[{ends}]",
            f"{phrases.quantity(loss.lost)} / {phrases.quantity(loss.gained)}",
            in_markdown(phrases.probability(finding.p, check.alpha)),
        ]
    verdict = finding.verdict if finding.verdict == "held" else f"**{finding.verdict}**"
    marked = f"{verdict} (advisory)" if finding.tier == "advisory" else verdict
    return [_text(finding.subject.name, _NAME), *cells, marked]


def _below(findings: Sequence[Finding], check: Check) -> Iterator[str]:
    """Yield what stands below the table: what is short first, because the end is left out first."""
    warnings = (f"{finding.subject.name}: {each}" for finding, each in phrases.warnings(check))
    yield from _listed("Warnings: too good, or new flags", warnings)
    if check.replayed is not None:
        yield from _listed("Replay", phrases.replay(check.replayed))
        yield from _flips("replayed images", check.replayed.flips)
    for finding in findings:
        if finding.verdict != "held":
            name = f"**{finding.verdict}**: {_text(finding.subject.name)}"
            decides = filter(None, [phrases.decides(finding)])
            yield "<br>".join([name, _text(finding.reason), *decides])
            yield from _flips(finding.subject.name, finding.flips)
    floors = (
        f"{each.subject.name}: {phrases.floor(each.floor)}" for each in findings if each.floor is not None
    )
    yield from _listed("Floors", floors)
    yield from _listed("Notes", check.notes)


def _listed(heading: str, sentences: Iterable[str]) -> Iterator[str]:
    some, more = phrases.first(list(sentences))
    if some:
        items = "\n".join(f"- {each}" for each in (*(_text(each, 500) for each in some), more) if each)
        yield f"**{heading}**\n\n{items}"


def _flips(name: str, flips: Sequence[Flip]) -> Iterator[str]:
    if not flips:
        return
    some, more = phrases.first(flips)
    lines = [[_text(cell) for cell in phrases.flip_cells(flip)] for flip in some]
    # Inside a summary GitHub reads HTML and no Markdown.
    summary = escape(f"{count(len(flips), 'example')} broke: {phrases.brief(name, _NAME)}")
    parts = [f"<details><summary>{summary.replace('@', '@&#8203;')}</summary>"]
    parts += [pipes(phrases.FLIP_HEADS, 0, lines), *filter(None, [more]), "</details>"]
    yield "\n\n".join(parts)
