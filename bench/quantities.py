"""Numbers as a suite writes them, ``8/255``, and as a table prints them."""

import math
import re
from fractions import Fraction

DASH = "\N{EN DASH}"
"""What a table prints where there is nothing to print."""


def fraction(value: object) -> object:
    """Read ``8/255``, ``76.5/255``, ``1e-3``: YAML has no fractions, and takes ``1e-3`` for text."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}")  # noqa: TRY004 - for pydantic
    if isinstance(value, str):
        if value.strip().lower() in {"inf", ".inf", "infinity"}:
            return math.inf
        try:
            # Papers write 76.5/255, which is no `Fraction` by itself.
            above, *below = map(_decimal, value.split("/", 1))
            return float(above / below[0] if below else above)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"expected a number or a fraction like 8/255, found {value!r}") from None
    return value


def _decimal(text: str) -> Fraction:
    # A fraction is exact: 1e999999999 would be a number of a billion digits.
    if "/" in text or len(text) > 50 or re.search(r"[eE][-+]?[0-9_]{4}", text):
        raise ValueError(text)
    return Fraction(text.replace(" ", ""))


def format_value(value: object) -> str:
    """Write a coordinate's value: a float as a short decimal, or over 255 where it has no short one."""
    if value is None:
        return DASH
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    short = f"{value:.4g}"
    if float(short) == value:
        return short
    levels = value * 255
    if math.isclose(2 * levels, round(2 * levels), rel_tol=1e-9):
        return f"{levels:.4g}/255"
    return short
