"""A check on a terminal."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench.gate.render import phrases
from bench.gate.verdicts import Check, Finding, Flip, Verdict
from bench.quantities import DASH

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

_STYLES: dict[Verdict, str] = {
    "held": "green",
    "regressed": "bold red",
    "undecided": "yellow",
    "not comparable": "magenta",
    "incomplete": "bold red",
}

_NAME = 200
"""Characters of a name in the table; below it stands in full."""


def to_text(check: Check, *, fail_on_gain: bool = False) -> "Group":
    """Return what rich prints of a check on a terminal.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        The verdict, the findings, what broke, and what to do next; it fits into 80 columns.
    """
    from rich.console import Group
    from rich.text import Text

    verdict = phrases.verdict(check, fail_on_gain=fail_on_gain)
    parts: list[RenderableType] = [
        Text(phrases.headline(check, fail_on_gain=fail_on_gain), style=_STYLES[verdict]),
        Text(phrases.setting(check), style="dim"),
    ]
    if check.replay_only:
        parts.append(Text(phrases.REPLAY_ONLY, style="yellow"))
    findings = phrases.ordered(check)
    if findings:
        parts += [Text(), _table(findings, check)]
    if any(each.loss is not None for each in findings):
        parts.append(Text(phrases.caption(check), style="dim"))
    for finding in findings:
        if finding.verdict != "held":
            parts += _details(finding)
    if check.replayed is not None:
        said = " ".join(phrases.replay(check.replayed))
        parts += [Text(), _headed("Replay", said), *_flips(check.replayed.flips)]
    floors = [each for each in findings if each.floor is not None]
    if floors:
        parts += [Text(), Text("Floors", style="bold"), *map(_floor, floors)]
    warnings = [
        _indented(f"{phrases.brief(finding.subject.name)}: {phrases.brief(each)}", "yellow")
        for finding, each in phrases.warnings(check)
    ]
    if warnings:
        parts += [Text(), Text("Warnings: too good, or new flags", style="bold yellow"), *warnings]
    if check.notes:
        notes = (_indented(phrases.brief(each)) for each in check.notes)
        parts += [Text(), Text("Notes", style="bold"), *notes]
    parts += [Text(), Text(phrases.next_step(check, fail_on_gain=fail_on_gain), style="bold")]
    return Group(*parts)


def _table(findings: Sequence[Finding], check: Check) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(Text("subject"), overflow="fold")
    # What belongs together goes below each other: that leaves room for names.
    for heading in ("n", "before\n-> after", "loss", "lost\ngained", "p"):
        grid.add_column(Text(heading), justify="right", overflow="fold")
    grid.add_column(Text("verdict"), overflow="fold")
    for finding in findings:
        if (loss := finding.loss) is None:
            cells = [Text(DASH, style="dim")] * 5
        else:
            value, ends = phrases.loss_of(finding, check)
            cells = [
                Text.assemble(str(loss.n), (f"\n{phrases.detectable(finding)}", "dim")),
                Text(f"{phrases.percent(loss.before)}\n-> {phrases.percent(loss.after)}"),
                Text.assemble(value, (f"\n{ends}", "dim")),
                Text(f"{phrases.quantity(loss.lost)}\n{phrases.quantity(loss.gained)}"),
                Text(phrases.probability(finding.p, check.alpha)),
            ]
        verdict = finding.verdict.replace(" ", "\n")
        said = [
            (verdict, _STYLES[finding.verdict]),
            ("\nadvisory" if finding.tier == "advisory" else "", "dim"),
        ]
        grid.add_row(Text(phrases.brief(finding.subject.name, _NAME)), *cells, Text.assemble(*said))
    return grid


def _details(finding: Finding) -> Iterator["RenderableType"]:
    from rich.text import Text

    name = phrases.brief(finding.subject.name)
    verdict = f"{finding.verdict}, advisory" if finding.tier == "advisory" else finding.verdict
    yield Text()
    yield Text.assemble((verdict, _STYLES[finding.verdict]), f": {name}")
    yield _indented(phrases.brief(finding.reason))
    if decides := phrases.decides(finding):
        yield _indented(decides)
    yield from _flips(finding.flips)


def _flips(flips: Sequence[Flip]) -> Iterator["RenderableType"]:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not flips:
        return
    some, more = phrases.first(flips)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in phrases.FLIP_HEADS:
        side = "left" if heading in {"found by", "answer"} else "right"
        grid.add_column(Text(heading, style="dim"), justify=side, overflow="fold")  # type: ignore[arg-type]
    for flip in some:
        grid.add_row(*map(Text, phrases.flip_cells(flip)))
    yield Padding(grid, (0, 0, 0, 2), expand=False)
    if more:
        yield _indented(more, "dim")


def _floor(finding: Finding) -> "RenderableType":
    assert finding.floor is not None
    said = f"{phrases.brief(finding.subject.name)}: {phrases.floor(finding.floor)}"
    return _indented(said, "" if finding.floor.verdict == "held" else _STYLES[finding.floor.verdict])


def _headed(heading: str, said: str) -> "Text":
    from rich.text import Text

    return Text.assemble((f"{heading}: ", "bold"), said)


def _indented(said: str, style: str = "") -> "RenderableType":
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(said, style=style), (0, 0, 0, 2), expand=False)
