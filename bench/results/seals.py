"""Digests that JSON mappings carry of themselves, so that an altered one is found."""

import hashlib
import json
from collections.abc import Mapping
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
