"""Networks and random states that stay as they are while somebody asks."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bench.errors import InputError
from bench.referee.precision import full_products
from bench.referee.snapshots import Snapshot


@contextmanager
def random_states(devices: Iterable[int]) -> Iterator[None]:
    """Restore the global random states of torch, numpy and Python after the block.

    Args:
        devices: Indices of the GPUs whose random states are restored too.

    Yields:
        Nothing.
    """
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed the global random states of torch, numpy and Python in the block, and restore them after it.

    Args:
        seed: The seed, any integer of 64 bits.
        *devices: Devices whose random states are seeded and restored; those that are no GPU change nothing.

    Yields:
        Nothing.
    """
    with random_states(sorted({each.index or 0 for each in devices if each.type == "cuda"})):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed every global source of random numbers: torch's, numpy's and Python's.

    Args:
        seed: The seed, any integer of 64 bits.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def frozen(*modules: nn.Module, seed: int, ask: Callable[[], object] | None = None) -> Iterator[None]:
    """Freeze networks in the block: evaluation mode, no gradients of parameters, seeded global random states.

    After the block modes, flags and random states are restored, and so is every weight or buffer that
    changed. A change is an error, since later numbers would belong to another network. With `ask`, replaced
    parameters, modules and hooks are found and put back as well; a network may replace its own.

    Args:
        *modules: The networks.
        seed: Seed of the global random states.
        ask: Asks the networks and does nothing else. It tells a network that changes itself from an attack
            that changes it. Without it, every change counts as the network's own.

    Yields:
        Nothing.

    Raises:
        InputError: A network changes its own weights or buffers whenever it is asked, or has weights that are
            not made yet.
        RuntimeError: The attack changed a network, or products of float32 numbers are reduced (TF32).
    """
    every = [module for each in modules for module in each.modules()]
    modes = [(module, module.training) for module in every]
    named = [pair for each in modules for pair in (*each.named_parameters(), *each.named_buffers())]
    if lazy := [name for name, tensor in named if is_lazy(tensor)]:
        raise InputError(
            f"the network has weights that are not made yet ({', '.join(lazy[:4])}); ask it once before"
        )
    tensors = [tensor for _, tensor in named]
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    # Values are compared, since a write through `.data` leaves no other trace.
    before = [(name, tensor, tensor.detach().clone()) for name, tensor in named]
    snapshots = Snapshot.of(modules) if ask is not None else []
    own: list[str] = []
    changed: list[str] = []
    with seeded(seed, *(tensor.device for tensor in tensors)):
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        for module in modules:
            module.eval()
        try:
            with full_products():
                yield
        finally:
            replaced = _restored(snapshots)
            own = changed = _put_back(before)
            if (changed or replaced) and ask is not None:
                # A network that cannot be asked does not answer for the change.
                with torch.no_grad(), contextlib.suppress(Exception):
                    ask()
                by_itself = _restored(snapshots)
                replaced = [each for each in replaced if each not in by_itself]
                own = _put_back(before)
            for module, mode in modes:
                module.training = mode
            for tensor, flag in flags:
                tensor.requires_grad_(flag)
                tensor.grad = None
    if own:
        raise InputError(
            f"the network changes its own weights or buffers ({', '.join(own[:4])}) whenever it is asked, so "
            "that its answers depend on what was asked before; they must stay as they are in evaluation mode"
        )
    if changed or replaced:
        what = "weights or buffers of the network" if changed else "the network"
        raise RuntimeError(f"the attack changed {what} it looked at ({', '.join((*changed, *replaced)[:4])})")


def _restored(snapshots: Sequence[Snapshot]) -> list[str]:
    """Put back what was replaced in networks; return a phrase for each difference."""
    return [phrase for each in snapshots for phrase in each.restore()]


def _put_back(before: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Undo changes of tensors; return the names of those that had changed."""
    changed = [(name, tensor, value) for name, tensor, value in before if not _equal(tensor, value)]
    for _, tensor, value in changed:
        # Other jobs of this process may use the same network.
        if tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device:
            tensor.data.copy_(value)
        else:
            tensor.data = value.clone()
    return [name for name, _, _ in changed]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
