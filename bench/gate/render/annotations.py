"""A check as annotations at the lines of the task file, which GitHub shows beside the changes."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

from bench.escaping import shown
from bench.gate.render import phrases
from bench.gate.verdicts import Check, Finding

MOST = 10
"""How many errors, and how many warnings, of a step GitHub shows."""

_Level: TypeAlias = Literal["error", "warning"]


def to_annotations(check: Check, suite_file: str, *, fail_on_gain: bool = False) -> list[str]:
    """Write workflow commands of GitHub.

    What regressed or is incomplete is an error; what is undecided, not comparable, suspicious or advisory is
    a warning.

    Args:
        check: The check.
        suite_file: The path of the task file, relative to the repository.
        fail_on_gain: Whether a suspicious gain counts as a regression, and so is an error.

    Returns:
        The lines to print, errors first, at most 10 of each level, of which the last counts the rest.
    """
    lines: list[str] = []
    found = list(_said(check, fail_on_gain))
    for level in ("error", "warning"):
        ours = [each for each in found if each[0] == level]
        # The rest takes a place itself.
        some = ours if len(ours) <= MOST else ours[: MOST - 1]
        for _, finding, title, message in some:
            line = None if finding is None else (check.lines or {}).get(finding.subject.name)
            lines.append(_command(level, suite_file, line, title, message))
        if rest := len(ours) - len(some):
            message = f"{rest} more {level}s are in the report."
            lines.append(_command(level, suite_file, None, f"and {rest} more", message))
    return lines


def _said(check: Check, fail_on_gain: bool) -> Iterator[tuple[_Level, Finding | None, str, str]]:
    if not any(each.tier == "critical" for each in check.findings):
        yield "error", None, "incomplete", f"{phrases.NOTHING}, so nothing is known to be held."
    for each in phrases.ordered(check):
        name = phrases.brief(each.subject.name, 200)
        if each.verdict != "held":
            graver = each.tier == "critical" and each.verdict in {"regressed", "incomplete"}
            advisory = "advisory, " if each.tier == "advisory" else ""
            level: _Level = "error" if graver else "warning"
            yield level, each, f"{advisory}{each.verdict}: {name}", each.reason
        if each.suspicious:
            level = "error" if fail_on_gain and each.tier == "critical" else "warning"
            yield level, each, f"suspicious: {name}", " ".join(each.suspicious)


def _command(level: str, file: str, line: int | None, title: str, message: str) -> str:
    """Return a workflow command, escaped as @actions/core does (packages/core/src/command.ts)."""
    values = {"file": file, "line": None if line is None else str(line), "title": title}
    properties = ",".join(f"{key}={_property(each)}" for key, each in values.items() if each is not None)
    return f"::{level} {properties}::{_data(phrases.brief(message))}"


def _data(text: str) -> str:
    return shown(text, keep="\r\n").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
