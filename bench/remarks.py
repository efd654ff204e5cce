"""What the code of an attack has to say of its run: sentences for a person, which no number depends on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HEARD: ContextVar[list[str] | None] = ContextVar("heard", default=None)


def remark(sentence: str) -> None:
    """Say something of the run: it is told to who runs it, and kept in the receipt.

    Args:
        sentence: What a person should know; the same one counts once.
    """
    heard = _HEARD.get()
    if heard is not None and sentence not in heard:
        heard.append(sentence)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Hear what is remarked in the block.

    Yields:
        The sentences so far, which grow.
    """
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
