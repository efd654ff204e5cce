"""A start that is light: what is imported and planned lives as long as the process, and is no garbage.

Looking for cycles among it again and again takes a sixth of the time of a plan. The program alone stops
that, and no process of somebody who imports `bench`.
"""

import gc

SELDOM = 100_000
"""How many objects more there must be before garbage is looked for; 700 is usual."""

_usual: list[tuple[int, int, int]] = []


def begin() -> None:
    """Look for garbage seldom until the plan is made (`end`)."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(SELDOM, *_usual[0][1:])


def end() -> None:
    """Look for garbage as usual, and not among what is there already; after `begin` alone."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
