"""A check for programs, as JSON."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from json import dumps
from numbers import Integral, Real
from typing import Any

from bench.gate.verdicts import Check, Finding

FORMAT = 1
"""The version of the form. A new field leaves it; one that is gone or means something else raises it."""


def to_json(check: Check, status: int) -> str:
    """Write all that is known, under names that stay.

    ``format`` is the version of this form; ``suite``, ``before``, ``after``, ``tolerance``, ``alpha``,
    ``replay_only`` and ``notes`` are those of `Check`; ``verdict``, ``suspicious`` and ``status`` are what
    follows from its findings. ``findings`` keeps their order; each has the fields of `Finding`, its ``loss``
    also ``value`` and ``churn``, its ``floor`` also ``verdict``, and the ``line`` of the task file that asks
    for it. ``replayed`` has the fields of `Replayed`. Shares and losses lie in [-1, 1] and are not rounded;
    a number that is not finite is one of the texts ``inf``, ``-inf`` and ``nan``; what is unknown is null.

    Args:
        check: The check.
        status: The exit status, 0 to 5.

    Returns:
        The JSON, in ASCII, with a line end at its end.
    """
    document = {
        "format": FORMAT,
        "status": status,
        "verdict": check.verdict,
        "suspicious": check.suspicious,
        **{name: each for name, each in _lawful(check).items() if name not in {"findings", "lines"}},
        "findings": [_finding(each, check) for each in check.findings],
    }
    # ASCII, so that nothing that cannot be seen is in it.
    return dumps(document, indent=1, allow_nan=False) + "\n"


def _finding(finding: Finding, check: Check) -> dict[str, Any]:
    found: dict[str, Any] = _lawful(finding)
    if finding.loss is not None:
        found["loss"] |= {"value": _lawful(finding.loss.value), "churn": _lawful(finding.loss.churn)}
    if finding.floor is not None:
        found["floor"]["verdict"] = finding.floor.verdict
    return {**found, "line": (check.lines or {}).get(finding.subject.name)}


def _lawful(value: Any) -> Any:
    """Return a value that JSON knows: it knows no infinity, and no mapping but a dictionary."""
    if is_dataclass(value):
        return {each.name: _lawful(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _lawful(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_lawful(each) for each in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    return str(value)
