"""The errors that the harness raises itself.

BenchError
├── InputError      what a person gave cannot be used: one message, exit status 2, no traceback
│   └── OtherNetworkError  a network that was built again answers otherwise than it did
├── DamagedError    a stored file is not what its receipt says: the work is done again
├── OvertimeError   a job took longer than its limit: the job fails
├── DisturbedError  a job changed what the whole process shares, or tried to end it: the job fails
└── TrainingError   a training left the rails (a loss that is not finite): the job fails

Everything else that an attack or a defense raises is theirs: it fails its job, leaves a hole in
the table, and keeps its traceback in the store.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class BenchError(Exception):
    """Base of the errors that the harness raises on purpose."""


class InputError(BenchError):
    """What a person gave cannot be used; the message says where, what was found and what fits."""


class OtherNetworkError(InputError):
    """A network that was built again answers otherwise than it did."""


class DamagedError(BenchError):
    """A stored file is cut short or altered."""


class OvertimeError(BenchError):
    """A job took longer than its limit."""


class DisturbedError(BenchError):
    """A job changed what the whole process shares, or tried to end it."""


class TrainingError(BenchError):
    """A training cannot go on."""


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return ``; did you mean 'pgd'?`` with the nearest known name, or the list of all of them."""
    names = sorted(str(each) for each in known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f" (known: {', '.join(names)})" if names else " (there are none)"


def persons(error: BaseException) -> str | None:
    """Return the message of an error that a person can mend (exit status 2), None for a bug."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, DamagedError):
        return f"{error}; the next run makes it again"
    return "no space left on the disk; what is finished is kept" if disk_full(error) else None


def disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and pyarrow say it in words of their own.
    return full or "No space left on device" in str(error)
