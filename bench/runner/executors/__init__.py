"""Where jobs run: one file for each executor, which is imported when it is asked for.

An executor's file has `ready`, which checks what the user asked for and returns what starts the pool.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Literal, get_args

from bench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from bench.runner.executors.protocol import Asked, Start

Name = Literal["process", "inline", "slurm", "ray"]
"""A process for each slot, everything in this one, or workers on a cluster."""

EXTRAS = {"slurm": "submitit", "ray": "ray"}
"""For each executor that needs a library of an extra, that library; the extra has the executor's name."""

OPTIONS = {"workers": ("slurm", "ray"), "slurm": ("slurm",), "ray_address": ("ray",)}
"""The executors for which a part of `Asked` means something; the others mean something for all."""


def ready(name: str, asked: "Asked") -> "Start":
    """Check what was asked of an executor before any work.

    Args:
        name: One of `Name`.
        asked: What the user asked for.

    Returns:
        What starts the executor.

    Raises:
        InputError: There is no such executor, its extra is not installed, or it cannot do what was asked.
    """
    if name not in get_args(Name):
        raise InputError(f"executor: unknown executor {name!r}{did_you_mean(name, get_args(Name))}")
    for part, known in OPTIONS.items():
        if getattr(asked, part) and name not in known:
            option = part.replace("_", "-")
            raise InputError(f"--{option} goes with --executor {' or '.join(known)}, not with {name}")
    try:
        module = import_module(f"bench.runner.executors.{name}")
    except ModuleNotFoundError as error:
        if error.name != EXTRAS.get(name):
            raise
        raise InputError(
            f"--executor {name} needs {error.name}, which is not installed: "
            f"pip install crossfire-bench[{name}]"
        ) from None
    start: Start = module.ready(asked)
    return start
