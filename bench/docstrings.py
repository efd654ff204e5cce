"""What docstrings say of parameters: the one source of descriptions in lists, schema and docs."""

import inspect
import re

_SECTION = re.compile(r"^(\s*)(Args|Arguments|Parameters):\s*$")
_ITEM = re.compile(r"^(\s+)\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def arguments(text: str | None) -> dict[str, str]:
    """Return what a docstring in Google style says of each parameter.

    Args:
        text: The docstring, indented or not; None: there is none.

    Returns:
        By name the description on one line.
    """
    found: dict[str, list[str]] = {}
    inside: int | None = None
    deep: int | None = None
    current: list[str] | None = None
    for line in inspect.cleandoc(text or "").splitlines():
        if section := _SECTION.match(line):
            inside, deep, current = len(section[1]), None, None
            continue
        if inside is None or not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent <= inside:
            inside = None
        elif (item := _ITEM.match(line)) and (deep is None or indent <= deep):
            deep = indent
            current = found.setdefault(item[2], [])
            current.append(item[3])
        elif current is not None:
            current.append(line.strip())
    return {name: " ".join(" ".join(parts).split()) for name, parts in found.items()}


def without_arguments(text: str | None) -> str:
    """Return a docstring without its section about parameters.

    Args:
        text: The docstring; None: there is none.

    Returns:
        What is left of it, with no empty line at its ends.
    """
    kept, inside = [], None
    for line in inspect.cleandoc(text or "").splitlines():
        if section := _SECTION.match(line):
            inside = len(section[1])
        elif inside is not None and line.strip() and len(line) - len(line.lstrip()) <= inside:
            inside = None
        if inside is None:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
