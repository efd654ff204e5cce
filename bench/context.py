"""What a job needs of the process and the machine that it runs in, and its result must not depend on."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from bench import data as datasets
from bench import sources
from bench.errors import InputError
from bench.jobs import Data
from bench.protocols import Split

CHUNK = {"cpu": 256, "cuda": 4096}
"""Images that are computed at once: what fits a processor's cache, and what fills a GPU."""


@dataclass(frozen=True)
class Desk:
    """Where work is done: what a job needs and its result must not depend on."""

    store: Path
    folder: Path
    """The suite's folder, on the import path."""
    data_root: Path | None
    device: str
    sources: Mapping[str, str] = field(hash=False)
    """Digests of the code that the plan was made with: what runs must be the same."""
    commit: str | None = None
    time_limit: float | None = None
    """Seconds that any job may take; None: any time."""


def prepare(desk: Desk) -> None:
    """Set up this process: settings of torch, the suite's folder on the import path, big buffers kept."""
    sources.importable(desk.folder)
    settle(desk)
    if torch.device(desk.device).type == "cpu":
        keep_buffers()


def settle(desk: Desk) -> None:
    """Set what holds for the whole process and decides numbers, before each job."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Ten bits of mantissa are too few where margins are a hundredth, and no key would tell.
    torch.backends.cudnn.allow_tf32 = False
    if torch.device(desk.device).type == "cpu":
        # Sums must not depend on how many cores the machine has.
        torch.set_num_threads(1)


@cache
def keep_buffers() -> bool:
    """Tell glibc to keep freed buffers: else every step maps and clears its pages anew.

    Returns whether it could be told.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_threshold, ceiling = -1, -2, -3, 1 << 30
    mallopt = ctypes.CDLL(None).mallopt
    # 32 MiB is the largest threshold that glibc accepts; without maps there is none.
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (trim_threshold, ceiling),
            (top_pad, 64 << 20),
            (mmap_threshold, 32 << 20),
        )
    )


def device_name(desk: Desk) -> str:
    """Return the name of the device that a desk computes on."""
    device = torch.device(desk.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


@cache
def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("crossfire-bench", "torch", "torchvision", "numpy")},
    }


def load(data: Data, desk: Desk) -> Split:
    """Return a data set's examples; its digest must be the one that the plan knew."""
    split = datasets.load(data.spec, desk.data_root, desk.folder)
    if split.digest != data.digest:
        raise InputError(f"the files of {data.spec.name} changed since the run was planned; start it again")
    return split


def free_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
