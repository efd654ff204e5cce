"""A check as a badge, for an endpoint of shields.io."""

from json import dumps

from bench.gate.render import phrases
from bench.gate.verdicts import Check, Verdict
from bench.report.render.words import MINUS

_COLORS: dict[Verdict, str] = {
    "held": "brightgreen",
    "regressed": "red",
    "undecided": "yellow",
    "not comparable": "lightgrey",
    "incomplete": "orange",
}


def to_badge(check: Check, *, fail_on_gain: bool = False) -> str:
    """Write the JSON of a badge (https://shields.io/badges/endpoint-badge).

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        The JSON, with a line end at its end: green where robustness is held, blue where that is said of
        replayed images alone, yellow where a gain is suspicious.
    """
    verdict = phrases.verdict(check, fail_on_gain=fail_on_gain)
    color = _COLORS[verdict]
    if verdict == "held" and check.suspicious:
        color = "yellow"
    elif verdict == "held" and check.replay_only:
        color = "blue"
    badge = {
        "schemaVersion": 1,
        "label": "robustness",
        "message": _message(check, verdict),
        "color": color,
        # No address may paint over a check that did not pass.
        "isError": verdict != "held",
    }
    return dumps(badge, ensure_ascii=False) + "\n"


def _message(check: Check, verdict: Verdict) -> str:
    critical = [each for each in check.findings if each.tier == "critical"]
    losses = [
        each for each in critical if each.loss is not None and each.verdict == verdict and each.loss.value > 0
    ]
    if verdict == "regressed" and losses:
        worst = max(losses, key=lambda each: each.loss.value if each.loss else 0)
        return f"regressed {MINUS}{phrases.loss_of(worst, check)[0]}"
    if verdict != check.verdict or (verdict == "held" and check.suspicious):
        return f"{verdict}, suspicious"
    if verdict != "held":
        return verdict
    if check.replay_only:
        return "replay held"
    after = [each.loss.after for each in critical if each.loss is not None]
    return f"held, worst {phrases.percent(min(after))} %" if after else verdict
