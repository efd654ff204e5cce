"""The errors that the harness raises.

BenchError
├── InputError             an input that cannot be used: one message, exit status 2, no traceback
│   └── OtherNetworkError  a network that was built again gives other answers than before
├── DamagedError           a stored file differs from its receipt: the work is done again
├── OvertimeError          a job exceeds its time limit: the job fails
├── DisturbedError         a job changes state that the whole process shares, or tries to end it: the job
fails
└── TrainingError          a training cannot continue (a loss that is not finite): the job fails

Any other exception comes from the code of an attack or a defense. It fails its job, leaves a hole in the
table, and its traceback is kept in the results folder.
"""

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches

from bench.vocabulary import ELSEWHERE, WORDS


class BenchError(Exception):
    """Base of the errors that the harness raises on purpose."""


class InputError(BenchError):
    """An input cannot be used; the message says where it is, what was found and what was expected."""


class OtherNetworkError(InputError):
    """A network that was built again gives other answers than before."""


class DamagedError(BenchError):
    """A stored file is cut short or altered."""


class OvertimeError(BenchError):
    """A job exceeds its time limit."""


class DisturbedError(BenchError):
    """A job changes state that the whole process shares, or tries to end the process."""


class TrainingError(BenchError):
    """A training cannot continue."""


RENAMED = {
    "budget": "kind",
    "doubts": "flags",
    "inner_step": "inner_step_size",
    "serve": "inference",
    "served": "inference",
    "step": "step_size",
    "void": "invalid",
}
"""Words of task files and of results that are others since layout 2, for those who bring older ones."""

EVERYWHERE = frozenset({"inference"})
"""Of these, words that belong to no parameter, so that no list of known ones has them."""


MANY = 30
"""More names than these are not listed in a message."""


def did_you_mean(
    name: object, known: Iterable[object], *, listed: str = "", most: int = 3, elsewhere: bool = True
) -> str:
    """Return the end of a message about an unknown name: its new name, the nearest, or all there are.

    Args:
        name: The unknown name.
        known: The known names.
        listed: The command that lists them all, for messages; empty: there is none.
        most: How many names are named at most, where none of many is near.
        elsewhere: Whether a word of other tools may be said in another place than here.

    Returns:
        ``; step is called step_size now`` for a word that was renamed (and which there are, where its new
        name is none of them); ``; alpha is called step_size here`` for a word of other tools, or where it is
        said here; ``; did you mean 'pgd'?`` where a known name is near, letters of either case being the
        same; else `` (known: ...)`` or `` (there are none)``.
    """
    names = sorted(str(each) for each in known)
    head, dot, rest = str(name).partition(".")
    now = RENAMED.get(head)
    if now is not None:
        # A word that only looks like it would be a false friend.
        here = now in EVERYWHERE or now in names
        return f"; {name} is called {now}{dot}{rest} now" + (
            "" if here else f", which is unknown here{_every(names, listed)}"
        )
    word = str(name).strip().casefold()
    if same := [each for each in names if each.casefold() == word]:
        return f"; did you mean {same[0]!r}?"
    if ours := [each for each in WORDS.get(word, ()) if each in names]:
        return f"; {name} is called {' or '.join(ours[:2])} here"
    placed = elsewhere and word in ELSEWHERE
    near = nearest(word, names, 0.85 if placed else 0.6)
    if placed and near is None:
        return f"; {ELSEWHERE[word]}"
    if near is not None:
        return f"; did you mean {near!r}?"
    if len(names) > MANY:
        close = get_close_matches(word, names, n=most, cutoff=0.3)
        where = f", which {listed} lists" if listed else ""
        return f" ({len(names)} are known{where}" + (f"; like it are {', '.join(close)})" if close else ")")
    return _every(names, listed)


def _every(names: list[str], listed: str) -> str:
    return f" (known: {', '.join(names)}{f'; {listed}' if listed else ''})" if names else " (there are none)"


def nearest(word: str, names: Iterable[str], cutoff: float) -> str | None:
    """Return the name that is nearest to a word, in letters of either case.

    Args:
        word: The word.
        names: The known names; those with a prefix are also known by what stands after it.
        cutoff: The least likeness that counts, from 0 to 1, as `difflib.get_close_matches` takes it.

    Returns:
        The name; None where none is near.
    """
    word, names = word.casefold(), list(names)
    folded: dict[str, str] = {}
    for each in names:
        folded.setdefault(each.casefold(), each)
    if "/" not in word:
        for each in names:
            # Of a plug-in or a library, by what stands after its prefix.
            folded.setdefault(each.rpartition("/")[2].casefold(), each)
    near = get_close_matches(word, folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def persons(error: BaseException) -> str | None:
    """Return the message for an error that the user can mend.

    Args:
        error: Any exception.

    Returns:
        The message (the exit status is 2), or None for an error in the code, which is shown with its
        traceback.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, DamagedError):
        return f"{error}; the next run makes it again"
    if getattr(error, "errno", None) == errno.EROFS or os.strerror(errno.EROFS) in str(error):
        name = getattr(error, "filename", None)
        return f"{name or 'somewhere'}: the disk is read-only; what is finished is kept"
    return "no space left on the disk; what is finished is kept" if disk_full(error) else None


def disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk is full.

    Args:
        error: Any exception.

    Returns:
        True for the error of the system, and for those of safetensors and pyarrow with the same text.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and pyarrow say it in words of their own.
    return full or "No space left on device" in str(error)


_FULL = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of the machine, is full.

    Args:
        error: Any exception.

    Returns:
        True for such an error.
    """
    # By its name: what needs no torch does not import it.
    named = any(each.__name__ == "OutOfMemoryError" for each in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(said in str(error) for said in _FULL)


def beyond_the_code(error: BaseException) -> BaseException | None:
    """Return what an error comes of, where that is no fault of the code that raised it.

    Such are an end that somebody asked for, the errors of the harness (a limit of time, an input that cannot
    be used), a memory that is full, and a disk that is full or read-only; also where code, as libraries do,
    has caught one of them and raised another error in its place.

    Args:
        error: What the code of an attack or of a defense raised.

    Returns:
        That exception: `error` itself, or one that it was raised from or raised while handling; None where
        the fault is the code's own.
    """
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or any(each is known for known in seen):
            continue
        seen.append(each)
        asked = isinstance(each, KeyboardInterrupt | BenchError)
        if asked or out_of_memory(each) or persons(each) is not None:
            return each
        todo += [each.__context__, each.__cause__]
    return None
