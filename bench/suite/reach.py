"""Lengths that cannot be: radii and steps in other units than those of images, and steps that are no use."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bench.protocols import Norm, Shape, Threat
from bench.quantities import format_value
from bench.registry import AttackEntry

STEPS = ("step_size", "alpha", "abs_stepsize")
"""What attacks, ours and those of libraries, call the length of a step, in the units of the radius."""


def diameter(norm: Norm, shape: Shape) -> float:
    """Return the largest distance between two images, all of whose values lie in [0, 1].

    Args:
        norm: The norm.
        shape: The form of the images.
    """
    pixels = shape.height * shape.width
    values = shape.channels * pixels
    return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values), "l0": float(pixels)}[norm]


def too_long(what: str, length: float, most: float, norm: Norm) -> str | None:
    """Return what is wrong with a length that is greater than any distance between two images.

    Args:
        what: What has this length, such as ``radius``.
        length: The length; an infinite one is no limit, and right.
        most: The largest distance between two images.
        norm: The norm of both.

    Returns:
        What was expected and found, with what was probably meant; None where nothing is wrong.
    """
    if length <= most or math.isinf(length):
        return None
    units = "one pixel" if norm == "l0" else "[0, 1]"
    said = (
        f"expected a {what} of {format_value(most)} or less in {norm}, which no two images are farther apart "
        f"than (units of {units}), found {format_value(length)}"
    )
    if norm != "l0" and length / 255 <= most:
        said += f"; did you mean {length:.6g}/255 = {length / 255:.4g}?"
    return said


def steps_too_long(attacks: Iterable[Mapping[str, Any]], norm: Norm, shape: Shape) -> str | None:
    """Return what is wrong with the steps of an attack, or of an attack that it is made of.

    Args:
        attacks: The parameters of each.
        norm: The norm that they attack in.
        shape: The form of the images.

    Returns:
        A sentence that begins with the parameter; None where nothing is wrong.
    """
    most = diameter(norm, shape)
    for params in attacks:
        for name, length in _lengths(params):
            if (said := too_long("step", length, most, norm)) is not None:
                return f"{name}: {said}"
    return None


def odd_steps(entry: AttackEntry, params: Mapping[str, Any], threat: Threat) -> Iterator[str]:
    """Yield what is odd about the length of an attack's steps beside the radius.

    Args:
        entry: The attack.
        params: Its parameters.
        threat: The norm and the radius.

    Yields:
        A sentence for each: steps that leave the ball from any point of it; and steps that all together do
        not reach the radius, where the attack does not say so itself (`AttackEntry.flags`).
    """
    if entry.kind != "fixed-budget" or math.isinf(threat.radius):
        return
    for name, length in _lengths(params):
        if length > 2 * threat.radius:
            wide = f"the ball is wide ({2 * threat.radius:g})"
            yield f"a step ({name}) of {length:g} is longer than {wide}: each one ends at the border"
        steps = params.get("steps")
        if entry.flags is None and isinstance(steps, int) and steps * length < threat.radius:
            reach = f"reach {steps * length:g}, less than the radius {threat.radius:g}"
            yield f"{steps} steps of {length:g} {reach}"


def _lengths(params: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and values of the parameters that are lengths of steps."""
    for name in STEPS:
        value = params.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
