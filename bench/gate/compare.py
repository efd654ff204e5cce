"""Two results folders, compared by the statistics of the gate; reads what is stored, and needs no torch."""

from pathlib import Path

from bench.gate import judge
from bench.gate.measurements import from_results
from bench.gate.verdicts import Check
from bench.suite.policy import Policy


def compare(before: Path, after: Path, policy: Policy) -> Check:
    """Compare two results folders by the statistics of the gate.

    Args:
        before: The results folder that is compared with.
        after: The other one.
        policy: The rules.

    Returns:
        The report.

    Raises:
        InputError: One of them has no manifest.
    """
    one, other = (from_results(root, Path(f"{root.resolve().name}.yaml")) for root in (before, after))
    findings = judge.findings(one, other, policy)
    missing = [
        f"{before}: {each.condition.attack} on {each.condition.coordinates['defense']}: {each.reason}"
        for each in one.missing.values()
    ]
    return Check(
        suite="",
        before=str(before),
        after=str(after),
        tolerance=policy.tolerance / 100,
        alpha=policy.alpha,
        findings=findings,
        notes=tuple(dict.fromkeys((*one.notes, *other.notes, *missing))),
    )
