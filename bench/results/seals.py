"""Digests that JSON mappings carry of themselves, so that an altered one is found."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def seal(told: Mapping[str, Any], *bound: str) -> dict[str, Any]:
    """Return a JSON mapping with its own digest.

    The digests of sources are not covered: an altered one differs from that of the code, and is found by
    that.

    Args:
        told: The mapping; an old ``digest`` in it is replaced.
        *bound: Words that the digest covers too, such as the key of the job.

    Returns:
        The mapping with its ``digest``, a SHA-256.
    """
    content = {name: value for name, value in json.loads(json.dumps(told)).items() if name != "digest"}
    covered = {name: value for name, value in content.items() if name != "sources"}
    spelled = json.dumps([*bound, covered], sort_keys=True)
    return {**content, "digest": hashlib.sha256(spelled.encode()).hexdigest()}


def sealed_text(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of a sealed mapping, without holding all of it.

    A manifest of 50,000 conditions is 35 MB of text, and several times that as objects.

    Args:
        told: The mapping, with names that are texts; an old ``digest`` in it is replaced.

    Yields:
        The pieces of ``json.dumps(seal(told), indent=1)``.
    """
    digest = hashlib.sha256()
    for piece in _spelled({name: told[name] for name in sorted({*told} - {"digest", "sources"})}):
        digest.update(piece.encode())
    content = {name: value for name, value in told.items() if name != "digest"}
    yield from _object({**content, "digest": digest.hexdigest()})


def _spelled(covered: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the digest covers, list by list and element by element."""
    yield "[{"
    for number, (name, value) in enumerate(covered.items()):
        yield f"{', ' if number else ''}{json.dumps(name)}: "
        if isinstance(value, list):
            yield "["
            for position, each in enumerate(value):
                yield (", " if position else "") + _canonical(each)
            yield "]"
        else:
            yield _canonical(value)
    yield "}]"


def _canonical(value: Any) -> str:
    # Read back first, since keys are sorted as the texts that JSON makes of them.
    return json.dumps(json.loads(json.dumps(value)), sort_keys=True)


def _object(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a mapping that is not empty with an indent of 1, list by list and element by element."""
    for number, (name, value) in enumerate(content.items()):
        yield f"{',' if number else '{'}\n {json.dumps(name)}: "
        if isinstance(value, list) and value:
            for position, each in enumerate(value):
                yield f"{',' if position else '['}\n  " + json.dumps(each, indent=1).replace("\n", "\n  ")
            yield "\n ]"
        else:
            yield json.dumps(value, indent=1).replace("\n", "\n ")
    yield "\n}"
