"""The devices of this machine that a user may name, and the slots on them."""

import torch

from bench.errors import InputError, did_you_mean
from bench.runner.context import free_cores


def slots(asked: list[str] | None, *, spread: bool) -> tuple[str, ...]:
    """Return the device of each slot on this machine.

    Args:
        asked: Names of devices that the user asked for (``cpu``, ``cuda``, ``cuda:1``), each as often as it
            shall have slots; None or empty for every GPU, or the CPU where there is none.
        spread: Whether one ``cpu`` stands for a slot on each core.

    Returns:
        A device for each slot, at least one.

    Raises:
        InputError: There is no such device on this machine.
    """
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not asked:
        asked = there or ["cpu"]
    found: list[str] = []
    for name in asked:
        if name == "cuda" and there:
            found.append("cuda:0")
        elif name in there:
            found.append(name)
        elif name == "cpu":
            # One slot for each core, unless the user gives their number by naming it several times.
            found += ["cpu"] * (free_cores() if asked.count("cpu") == 1 and spread else 1)
        else:
            raise InputError(
                f"--device {name}: there is no such device here{did_you_mean(name, [*there, 'cpu'])}"
            )
    return tuple(found)
