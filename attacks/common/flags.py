"""Sentences about settings that cannot do what they seem to; a plan shows them beside an attack's numbers."""

from bench import Threat


def unreachable(threat: Threat, steps: int, length: float) -> str | None:
    """Return what is odd about steps that cannot reach the radius.

    Args:
        threat: The threat model; its radius in units of [0, 1].
        steps: How many steps a walk has.
        length: How long each is at most, in the threat's norm and units.

    Returns:
        A sentence, or None where they reach it.
    """
    reach = steps * length
    if reach >= threat.radius:
        return None
    return f"{steps} steps of {length:g} reach {reach:g}, less than the radius {threat.radius:g}"


def of_ascent(
    threat: Threat,
    *,
    steps: int,
    step_size: float | None,
    restarts: int = 1,
    start: str = "uniform",
    **_: object,
) -> str | None:
    """Return what is odd about the settings of a projected ascent: steps too short, or restarts that are one.

    Args:
        threat: The threat model.
        steps: How many steps a walk has.
        step_size: Their length; None: one that reaches the radius.
        restarts: How many walks there are.
        start: Where they begin: ``"zero"`` is the image itself.
    """
    if step_size is not None and (sentence := unreachable(threat, steps, step_size)):
        return sentence
    if restarts > 1 and start == "zero":
        return f"{restarts} restarts from the image itself are one run, {restarts} times"
    return None
