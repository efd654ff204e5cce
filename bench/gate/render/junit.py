"""A check as JUnit XML, which GitHub, GitLab, Jenkins and Azure read."""

from xml.etree import ElementTree

from bench.escaping import shown
from bench.gate.render import phrases
from bench.gate.verdicts import Check, Finding, Subject
from bench.quantities import format_value


def to_junit(check: Check, *, fail_on_gain: bool = False) -> str:
    """Write a test suite with a test case for each finding.

    A regressed or undecided finding is a failure, an incomplete one an error, one that is not comparable is
    skipped, as is an advisory one that is not held. GitLab shows no properties, so the numbers are in the
    messages.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        The XML. Where nothing critical was compared it has an error that says so.
    """
    # XML cannot hold control characters, not even escaped.
    name = f"crossfire {shown(check.suite, keep='')}{' (replay)' if check.replay_only else ''}"
    suite = ElementTree.Element("testsuite", name=name)
    for finding in phrases.ordered(check):
        _case(suite, finding, check, fail_on_gain)
    if not any(each.tier == "critical" for each in check.findings):
        case = ElementTree.SubElement(suite, "testcase", classname="crossfire", name="critical findings")
        ElementTree.SubElement(case, "error", type="incomplete", message=f"incomplete: {phrases.NOTHING}")
    said = [phrases.headline(check, fail_on_gain=fail_on_gain), phrases.setting(check)]
    said += [phrases.REPLAY_ONLY] if check.replay_only else []
    said += phrases.replay(check.replayed) if check.replayed is not None else []
    said += [*map(phrases.brief, check.notes), phrases.next_step(check, fail_on_gain=fail_on_gain)]
    ElementTree.SubElement(suite, "system-out").text = "\n".join(said)
    counts = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": len(suite.findall("testcase/skipped")),
    }
    suite.attrib.update({key: str(value) for key, value in counts.items()})
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return f"{text.decode()}\n"


def _case(suite: ElementTree.Element, finding: Finding, check: Check, fail_on_gain: bool) -> None:
    classname, name = (shown(each, keep="") for each in names(finding))
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
    facts = phrases.facts(finding, check)
    kind, tag = _outcome(finding, fail_on_gain)
    if tag is not None:
        reason = finding.reason if finding.verdict != "held" else "; ".join(finding.suspicious)
        message = f"{kind}: {phrases.brief(reason)} ({facts})"
        told = {"message": message} if tag == "skipped" else {"type": kind, "message": message}
        ElementTree.SubElement(case, tag, told).text = body(finding, facts)
    said = [facts] if tag is None else []
    said += [f"suspicious: {phrases.brief(each)}" for each in finding.suspicious]
    if said:
        ElementTree.SubElement(case, "system-out").text = "\n".join(said)


def _outcome(finding: Finding, fail_on_gain: bool) -> tuple[str, str | None]:
    """Return the word for what was found, and the element that says so; None for a test that passed."""
    if finding.tier == "advisory":
        return f"advisory: {finding.verdict}", None if finding.verdict == "held" else "skipped"
    match finding.verdict:
        case "regressed" | "undecided":
            return finding.verdict, "failure"
        case "incomplete":
            return finding.verdict, "error"
        case "not comparable":
            return finding.verdict, "skipped"
    return ("suspicious", "failure") if fail_on_gain and finding.suspicious else ("held", None)


def body(finding: Finding, facts: str) -> str:
    """Write what is known of a finding that is not held, over several lines.

    Args:
        finding: The finding.
        facts: Its numbers (`phrases.facts`).

    Returns:
        Its name, its numbers, what would decide it, and the first examples that broke.
    """
    some, more = phrases.first(finding.flips)
    lines = [phrases.brief(finding.subject.name), facts]
    lines += filter(None, [phrases.decides(finding)])
    if some:
        lines.append(" | ".join(phrases.FLIP_HEADS))
        lines += [" | ".join(phrases.flip_cells(each)) for each in some]
    return "\n".join([*lines, *filter(None, [more])])


def names(finding: Finding) -> tuple[str, str]:
    """Return the two names of a test case.

    Args:
        finding: The finding.

    Returns:
        The defense, marked where the finding is of a worst case; and the attack with its view, the threat,
        and all other coordinates by their names, such as
        ``pgd (e2e_last)@linf 0.1, data=digits, readout=last``.
    """
    subject = finding.subject
    left = {key: each for key, each in subject.coordinates.items() if each is not None}
    defense = str(left.pop("defense", "crossfire"))
    attack, view = str(left.pop("attack", subject.kind)), left.pop("view", None)
    threat = _threat(subject)
    for each in ("norm", "radius"):
        left.pop(each, None)
    rest = "".join(f", {key}={format_value(each)}" for key, each in left.items())
    worst = " (worst case)" if subject.kind == "worst case" else ""
    return f"{defense}{worst}", f"{attack}{f' ({view})' if view else ''}{threat}{rest}"


def _threat(subject: Subject) -> str:
    norm, radius = subject.coordinates.get("norm"), subject.coordinates.get("radius")
    if norm is None:
        return ""
    # A minimum-norm attack has no radius of its own, and is read at several.
    radius = subject.radius if radius is None else radius
    return f"@{norm}{'' if radius is None else f' {format_value(radius)}'}"
