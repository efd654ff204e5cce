"""The devices of this machine that a user may name, and the slots on them."""

import torch

from bench.errors import InputError, did_you_mean
from bench.runner.context import free_cores
from bench.runner.executors.protocol import Asked
from bench.runner.occupancy import MOST


def devices(asked: Asked) -> tuple[str, ...]:
    """Return the devices that were asked for.

    Args:
        asked: What the user asked for.

    Returns:
        Their names, as torch has them, at least one.

    Raises:
        InputError: There is no such device on this machine, or one was named twice.
    """
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found: list[str] = []
    for named in asked.devices or there or ["cpu"]:
        name = "cuda:0" if named == "cuda" else named
        if name not in (*there, "cpu"):
            near = did_you_mean(named, [*there, "cpu"], elsewhere=False)
            raise InputError(f"--device {named}: there is no such device here{near}")
        if name in found:
            raise InputError(f"--device {named}: it was named before; --slots 2 lets two jobs share it")
        found.append(name)
    return tuple(found)


def slots(asked: Asked) -> tuple[str, ...]:
    """Return the device of each slot on this machine.

    Args:
        asked: What the user asked for.

    Returns:
        A device for each slot, at least one. Where the slots of a GPU follow from measurements, the most that
        it may get.

    Raises:
        InputError: There is no such device on this machine, or one was named twice.
    """
    found: list[str] = []
    for name in devices(asked):
        if isinstance(asked.slots, int):
            number = asked.slots
        elif name == "cpu":
            number = free_cores()
        else:
            number = MOST if asked.slots == "auto" else 1
        found += [name] * number
    return tuple(found)
