"""The first two images of a network of other people: what is wrong with it is said before it is attacked.

A sentence names the network; whatever it raised is its cause. Networks of Crossfire have tests of their own.
"""

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError, InputError, out_of_memory
from bench.protocols import Images, View
from bench.referee.answers import decided
from bench.registry import DefenseEntry
from bench.runner.titles import defense_title
from bench.suite.jobs import AttackRun, Train

FEW = 2
"""How many images are tried."""


@contextmanager
def blamed(train: Train, where: str) -> Iterator[None]:
    """Turn whatever code of other people raises in the block into a sentence that names the network.

    Args:
        train: The training of the network; code of Crossfire raises as it is.
        where: What is done in the block, such as ``while it is built``.

    Raises:
        InputError: The network raised.
    """
    try:
        yield
    except (BenchError, MemoryError):
        raise
    except Exception as error:
        if not train.foreign or out_of_memory(error):
            raise
        raise InputError(f"{defense_title(train)}: its code raises {where}: {_told(error)}") from error


def try_network(train: Train, model: Any, images: Images) -> None:
    """Give two images to every read-out and view of a network, with a gradient, and look at its mode.

    Args:
        train: Its training; one of Crossfire's own is not tried.
        model: The fitted defense in evaluation mode.
        images: Images (N, C, H, W) of its data set, on its device.

    Raises:
        InputError: It raises, or stays in training mode.
    """
    entry = train.defense.entry
    if not train.foreign or not isinstance(entry, DefenseEntry):
        return
    few = images[:FEW]
    shape = tuple(few.shape[1:])
    with blamed(train, f"where it is given {len(few)} images of shape {shape} in [0, 1]"):
        for readout in entry.readouts:
            decided(model, few, readout, few.device)
        for each in entry.views.values():
            if each.space == "pixel":
                getattr(model, each.method)().logits(few.clone().requires_grad_())
    if training := _in_training(model):
        raise InputError(
            f"{defense_title(train)}: it stays in training mode ({training}) after `eval()`: it would be "
            "scored with the statistics of each batch; leave `train` and `eval` as torch has them, and call "
            "neither in `forward`"
        )


def _in_training(model: nn.Module) -> str:
    """Return which modules of a network are in training mode; dropout is where a defense is random."""
    found = [
        name or type(each).__name__
        for name, each in model.named_modules()
        if each.training and not isinstance(each, nn.modules.dropout._DropoutNd)
    ]
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def try_gradient(run: AttackRun, view: View, images: Images) -> None:
    """Refuse an attack by gradients on a network of other people through which none flows.

    Args:
        run: The attack.
        view: The view that it looks through.
        images: Images (N, C, H, W), on the network's device.

    Raises:
        InputError: No gradient flows from the logits to the points of the view.
    """
    source = run.source
    if run.attack.entry.access != "gradient" or source is None or not source.train.foreign:
        return
    assert run.view is not None
    point = view.encode(images[:FEW].clone()).detach()
    if point.is_floating_point() and (reason := no_gradient(view.logits, point)) is not None:
        raise InputError(lacks_gradient(defense_title(source.train), run.view.use, reason, run.attack.called))


def no_gradient(logits: Callable[[Tensor], Tensor], point: Tensor) -> str | None:
    """Return why no gradient flows from logits to a point; None where one does.

    Args:
        logits: Answers points (n, ...).
        point: Where to ask, floating point (n, ...).

    Returns:
        What was raised, in brackets; an empty text where nothing was.
    """
    with torch.enable_grad():
        point = point.requires_grad_()
        try:
            # Times 1, so that it is no leaf: a network may write into its argument.
            answer = logits(point * 1)
            if (
                answer.requires_grad
                and torch.autograd.grad(answer.sum(), point, allow_unused=True)[0] is not None
            ):
                return None
        except (RuntimeError, TypeError) as error:
            if out_of_memory(error):
                raise
            return f" ({error})".replace("\n", " ")
    return ""


def lacks_gradient(network: str, view: str, reason: str, attack: str) -> str:
    """Return the sentence for an attack that needs a gradient where there is none.

    Args:
        network: What the network is called.
        view: The name of the view.
        reason: What `no_gradient` found.
        attack: The name of the attack.
    """
    return (
        f"{network}: no gradient flows from the logits of view {view!r} to the images{reason}, and {attack} "
        "needs one; attacks that need scores or answers alone can do without (bench list attacks)"
    )


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
