"""What is wrong with a user's network, in a sentence that names where: asked when something has failed."""

import contextlib
import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError, InputError, disk_full
from bench.protocols import Images, Shape, View
from bench.suite.jobs import AttackRun, Train


def unusable(job: Train, error: Exception) -> InputError | None:
    """Return the refusal of a defense that learns nothing and failed when it was first asked.

    Args:
        job: The training, which for a network of the user's is its first few images.
        error: What it raised.

    Returns:
        The refusal, in a sentence; None where it is no fault of the user's code.
    """
    known = isinstance(error, BenchError | MemoryError) or disk_full(error)
    if known or job.defense.entry.learns or not job.foreign:
        return None
    return InputError(
        f"the network cannot be asked about images of {_text(job.data.shape)} in [0, 1]: it raised "
        f"{_told(error)}; mend the network, or give the data its form (resize:, shorter:, crop:, channels:)"
    )


def without_gradient(
    run: AttackRun, look: Callable[[], View], x: Images, error: BaseException
) -> InputError | None:
    """Return the refusal of a view that has no gradient, on which an attack that needs one failed.

    Args:
        run: The attack.
        look: Returns the view, before it is instrumented.
        x: Images (N, C, H, W) on the device of the view.
        error: What the attack raised.

    Returns:
        The refusal, in a sentence that names the view; None where the view has a gradient, or raises
        something else.
    """
    wanted = isinstance(error, Exception) and run.attack.entry.access == "gradient" and run.view is not None
    if not wanted or isinstance(error, BenchError):
        return None
    with contextlib.suppress(Exception), torch.enable_grad():
        z = x[:2].detach().clone().requires_grad_()
        if not look().logits(z).requires_grad:
            view = run.view.use if run.view else ""
            return InputError(
                f"the logits of view {view!r} have no gradient, which {run.attack.name} needs: the "
                "network runs under torch.no_grad, detaches, or leaves torch; mend that, or attack it by "
                "scores and decisions alone (square, spsa, nes, boundary), which go on"
            )
    return None


def _text(shape: Shape) -> str:
    return f"{shape.channels}x{shape.height}x{shape.width}"


def _told(error: Exception) -> str:
    """Return an exception with the last line of the user's code that it came through."""
    said = f"{type(error).__name__}{f': {error}' if str(error) else ''}".splitlines()[0]
    own = [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]
    if not own:
        return said
    at = own[-1]
    line = linecache.getline(at.filename, at.lineno or 0).strip()
    return f"{said} ({Path(at.filename).name}:{at.lineno}: {line})"


_OURS = Path(__file__).parents[2]


def _is_users(filename: str) -> bool:
    """Return whether a file is neither the harness's, nor ours, nor installed."""
    path = Path(filename)
    ours: tuple[Any, ...] = tuple(_OURS / name for name in ("bench", "attacks", "defenses"))
    return "site-packages" not in path.parts and not any(path.is_relative_to(each) for each in ours)
