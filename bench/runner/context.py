"""The process and the machine in which a job runs; no result may depend on them."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from bench.data import spec as datasets
from bench.errors import InputError
from bench.protocols import Split
from bench.referee.answers import CHUNK
from bench.referee.settings import PRODUCTS
from bench.results import fingerprint
from bench.results.origin import processor
from bench.suite.jobs import Data


@dataclass(frozen=True)
class WorkerContext:
    """The surroundings of a job in one process: folders, digests of the code, device and time limit."""

    store: Path
    """The results folder."""
    folder: Path
    """The folder of the task file, in which modules of the user's own are found."""
    data_root: Path | None
    """The folder of the data sets; None for the default."""
    device: str
    """The device, as torch names it: ``cpu``, ``cuda:0``."""
    sources: Mapping[str, str] = field(hash=False)
    """Digests of the code that the run was planned with, by module. Code that runs must have the same
    digests.
    """
    commit: str | None = None
    """The commit of the working copy; None outside one."""
    time_limit: float | None = None
    """Limit of each job in seconds, above 0; None for no limit."""


def prepare(context: WorkerContext) -> None:
    """Set this process up for jobs, once: the settings of torch, modules of the task file's folder, memory.

    Args:
        context: The surroundings of the jobs.
    """
    fingerprint.importable(context.folder)
    settle(torch.device(context.device))
    if torch.device(context.device).type == "cpu":
        keep_buffers()


def settle(device: torch.device) -> None:
    """Set everything that holds for the whole process and decides numbers; called before each job.

    Args:
        device: The device of the job.
    """
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    for kind in CHUNK:
        # The caller's, where jobs run in its process. What a network casts by itself is its own.
        torch.set_autocast_enabled(kind, False)
    for product in PRODUCTS:
        product.write("none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # TF32 has ten bits of mantissa, too few for margins of a hundredth, and no key would tell.
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        # Sums must not depend on the number of cores.
        torch.set_num_threads(1)


@cache
def keep_buffers() -> bool:
    """Tell glibc to keep the memory of freed tensors, which each step would map and clear again otherwise.

    Returns:
        Whether glibc could be told; False with another C library.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_threshold, ceiling = -1, -2, -3, 1 << 30
    mallopt = ctypes.CDLL(None).mallopt
    # 32 MiB is the largest threshold that glibc accepts.
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (trim_threshold, ceiling),
            (top_pad, 64 << 20),
            (mmap_threshold, 32 << 20),
        )
    )


def device_name(device: str) -> str:
    """Return the name of a device, as receipts record it.

    Args:
        device: The device, as torch names it.

    Returns:
        The model of the GPU or of the processor; of a GPU where this machine has none, as torch names it.
    """
    if torch.device(device).type != "cuda":
        return processor()
    # A driver without a GPU may have workers on machines with some.
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else device


def load(data: Data, context: WorkerContext, most: int | None = None) -> Split:
    """Load the examples of a data set.

    Args:
        data: The data set as the run was planned with it.
        context: The surroundings of the job.
        most: How many of the first examples are needed; there may be more of them. None: all.

    Returns:
        The examples, on the CPU.

    Raises:
        InputError: The files of the data set changed since the run was planned.
    """
    split = datasets.load(data.spec, context.data_root, context.folder, most)
    if split.digest != data.digest:
        raise InputError(f"the files of {data.spec.name} changed since the run was planned; start it again")
    return split


def free_cores() -> int:
    """Return the number of processor cores that this process may use.

    Returns:
        1 or more.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
