"""The state that all jobs of a process share, and how to restore it.

Networks, attacks and libraries may change settings that hold for the whole process. Each job begins with the
settings of the harness; after it, every difference is restored and reported, so that no job changes the
numbers of another. `ProcessState` compares `SETTINGS`, the functions that numbers are computed with, the
modes and hooks of torch, imported modules, the standard streams, and the processes that were started.
"""

import builtins
import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.utils.checkpoint
from torch.nn.modules import module as torch_module

from bench.errors import DisturbedError
from bench.referee.settings import PRODUCTS, Setting, flag
from bench.runner import child_processes

_ENTERED: list[torch.inference_mode] = []
"""Guards of inference mode. They hold as long as they live."""


def _set_inference_mode(value: bool) -> None:
    # A guard that was entered and never left cannot be removed; another guard on top of it can undo it.
    _ENTERED.append(torch.inference_mode(value))
    _ENTERED[-1].__enter__()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_COMPILER = ("TORCHINDUCTOR_", "TRITON_")
"""Beginnings of the variables that torch's compiler sets when the first optimiser is made."""


def _environment() -> dict[str, str]:
    return {name: each for name, each in os.environ.items() if not name.startswith(_COMPILER)}


def _set_environment(value: Mapping[str, str]) -> None:
    for name in _environment().keys() - value.keys():
        del os.environ[name]
    os.environ.update(value)


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def _flushes() -> bool:
    """Return whether denormal numbers are flushed to 0; torch has no function that says so."""
    return bool((torch.full((1,), 2e-38) * 0.1)[0] == 0)


_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE")
    if hasattr(signal, name)
)


def signal_handlers() -> dict[signal.Signals, Any]:
    """Return the handler of each signal that ends or interrupts a process.

    Returns:
        The handlers, by signal; None for one that was not set from Python.
    """
    return {each: signal.getsignal(each) for each in _SIGNALS}


def set_signal_handlers(value: Mapping[signal.Signals, Any]) -> None:
    """Set signal handlers again. Outside the main thread, where Python forbids it, nothing happens.

    Args:
        value: Handlers as `signal_handlers` returned them.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in value.items():
            if handler is not None:
                signal.signal(number, handler)


_KINDS = ("cpu", "cuda")

SETTINGS = (
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, lambda _: torch.set_default_device(None)),
    Setting("inference mode", torch.is_inference_mode_enabled, _set_inference_mode),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting(
        "autocast",
        lambda: tuple(torch.is_autocast_enabled(each) for each in _KINDS),
        lambda value: [
            torch.set_autocast_enabled(*each) for each in zip(("cpu", "cuda"), value, strict=True)
        ],
    ),
    Setting("flushing of denormal numbers", _flushes, torch.set_flush_denormal),
    Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads, lenient="building"),
    Setting(
        "deterministic algorithms",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
        lenient="building",
    ),
    Setting(
        "the precision of float32 matrix products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        lenient="building",
    ),
    *(
        Setting(f"torch.backends.{path}.{name}", *flag(owner, name), lenient="building")
        for path, owner, names in (
            ("cudnn", torch.backends.cudnn, ("enabled", "deterministic", "benchmark", "allow_tf32")),
            (
                "cuda.matmul",
                torch.backends.cuda.matmul,
                ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
            ),
            ("mkldnn", torch.backends.mkldnn, ("enabled",)),
        )
        for name in names
    ),
    # After the older names for the same: writing those changes these.
    *PRODUCTS,
    Setting("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled, lenient="building"),
    Setting("numpy's error handling", np.geterr, lambda value: np.seterr(**value), lenient="building"),
    Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit, lenient="always"),
    Setting("the environment", _environment, _set_environment, lenient="always"),
    Setting("the file mode mask", _umask, os.umask, lenient="always"),
    Setting("the working directory", os.getcwd, os.chdir),
    Setting("signal handlers", signal_handlers, set_signal_handlers, lenient="always"),
)
"""The settings, in the order in which they are restored: grad mode after inference mode, which sets it."""


# --- functions that numbers are made of --------------------------------------------------------------

_HARNESS = ("bench", "attacks", "defenses")


@dataclass(frozen=True)
class _Owner:
    """A module or a class, with everything that it held when the job began."""

    title: str
    """Its name in messages."""
    owner: Any
    had: Mapping[str, Any]


def _owners() -> Iterator[tuple[str, Any]]:
    """Yield the names and the modules or classes whose functions decide numbers."""
    for owner in (torch, torch.nn.functional, torch.linalg, torch.special, torch.fft, torch.autograd):
        yield owner.__name__, owner
    for other in (torch.nn.init, torch.nn.utils, torch.random, torch.utils.checkpoint):
        yield other.__name__, other
    for plain in (np, np.random, np.linalg, random, math, builtins, hashlib, json, pickle, pa, pq):
        yield plain.__name__, plain
    yield "safetensors.torch", safetensors.torch
    yield "torch.Tensor", torch.Tensor
    for name, module in (("torch.nn", torch.nn), ("torch.optim", torch.optim)):
        for kind in vars(module).values():
            if isinstance(kind, type):
                yield f"{name}.{kind.__name__}", kind
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _HARNESS and isinstance(module, ModuleType):
            yield name, module
            for kind in list(vars(module).values()):
                if isinstance(kind, type) and kind.__module__ == name:
                    yield f"{name}.{kind.__qualname__}", kind


@lru_cache(maxsize=1)
def _known(_modules: int) -> tuple[tuple[str, Any], ...]:
    """Return the owners; they are looked for again when modules were imported since."""
    return tuple(_owners())


def _functions() -> tuple[_Owner, ...]:
    """Return every owner with what it holds now."""
    return tuple(_Owner(title, owner, dict(vars(owner))) for title, owner in _known(len(sys.modules)))


def _restore_functions(before: Iterable[_Owner]) -> Iterator[str]:
    """Undo the replacing and the hiding of functions; yield the names of those that were replaced or hidden.

    Only functions are compared: other values (counters, caches) change in normal use.
    """
    for each in before:
        now, had = dict(vars(each.owner)), each.had
        for name in [name for name, value in had.items() if now.get(name) is not value]:
            if _is_code(had[name]) and not _placed_by_torch(now.get(name)):
                setattr(each.owner, name, had[name])
                yield f"{each.title}.{name}"
        if isinstance(each.owner, type):
            # A new name of a class hides the function of that name of its base.
            for name in now.keys() - had.keys():
                hides = any(_is_code(vars(base).get(name)) for base in each.owner.__mro__[1:])
                if hides and not _placed_by_torch(now[name]):
                    delattr(each.owner, name)
                    yield f"{each.title}.{name}"


def _is_code(value: object) -> bool:
    """Return whether a value runs code when it is used: a function, a class, a method, a property."""
    return callable(value) or isinstance(value, classmethod | staticmethod | property)


def _placed_by_torch(value: object) -> bool:
    """Return whether torch itself put a function in the place of another.

    It does so at the first use of an optimiser or a compiler; the new function calls the old one.
    """
    code = getattr(value, "__code__", None)
    file = Path(code.co_filename) if code is not None else None
    home = Path(torch.__file__).parent
    if file is None or not file.is_relative_to(home):
        return False
    inside = file.relative_to(home)
    return inside.parts[0] in ("_dynamo", "_compile.py") or inside == Path("optim", "optimizer.py")


_HOOKS = {
    name: hooks
    for name, hooks in vars(torch_module).items()
    if name.startswith("_global") and name.endswith("hooks")
}


def _restore_hooks(before: Mapping[str, Mapping[Any, Any]]) -> Iterator[str]:
    for name, hooks in _HOOKS.items():
        if dict(hooks) != before[name]:
            hooks.clear()
            hooks.update(before[name])
            yield f"the {name.removeprefix('_global_').replace('_', ' ')} of all modules"


def _mode_depths() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _restore_modes(before: tuple[int, int]) -> Iterator[str]:
    """Leave the modes of torch that were entered and not left; they come between a call and its function."""
    pops = torch._C._pop_torch_function_stack, torch._C._pop_torch_dispatch_stack
    for depth, now, pop, name in zip(before, _mode_depths(), pops, ("function", "dispatch"), strict=True):
        for _ in range(now - depth):
            pop()
        if now > depth:
            yield f"a mode of torch ({name})"


# --- what torch computes, and what was imported ------------------------------------------------------


def _computed() -> dict[str, list[float]]:
    """Return what a few functions of torch compute from fixed numbers; their kernels may be replaced."""
    x = torch.tensor([[-1.5, 0.25, 2.0], [0.5, -0.75, 1.0]])
    weight = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.125, -0.5]])
    image = torch.cat([x, weight])[None, None]
    found = {
        "sign": x.sign(),
        "abs": x.abs(),
        "relu": x.relu(),
        "clamp": x.clamp(0, 1),
        "linear": torch.nn.functional.linear(x, weight),
        "matmul": x @ weight.T,
        "conv2d": torch.nn.functional.conv2d(image, weight[None, None]),
        "softmax": x.softmax(1),
        "logsumexp": x.logsumexp(1),
        "argmax": x.argmax(1),
        "where": torch.where(x > 0, x, weight),
        "sum": x.sum(1),
        "maximum": torch.maximum(x, weight),
    }
    return {name: values.flatten().tolist() for name, values in found.items()}


@lru_cache(maxsize=1)
def _first_computed() -> dict[str, list[float]]:
    """Return what they computed when the process began its first job."""
    return _computed()


def changed_kernels() -> list[str]:
    """Return the functions of torch whose results differ from those at the first call of this function.

    Returns:
        A phrase for each of them: ``what torch.sign computes``.
    """
    return [
        f"what torch.{name} computes"
        for name, values in _computed().items()
        if values != _first_computed()[name]
    ]


def _restore_modules(before: Mapping[str, ModuleType]) -> Iterator[str]:
    """Undo the replacing of modules, and forget modules of the user's own that the job imported."""
    for name, module in before.items():
        if sys.modules.get(name) is not module:
            sys.modules[name] = module
            yield f"the module {name}"
    for name in sys.modules.keys() - before.keys():
        if not installed(sys.modules[name]):
            del sys.modules[name]


def installed(module: object) -> bool:
    """Return whether a module came with Python or with a package, is compiled, or belongs to Crossfire.

    Args:
        module: A module.

    Returns:
        False for a module of the user's own, such as a file in the suite's folder.
    """
    file = getattr(module, "__file__", None)
    ours = getattr(module, "__name__", "").partition(".")[0] in _HARNESS
    if ours or file is None or not file.endswith(".py"):
        return True
    return any(Path(file).is_relative_to(each) for each in (sys.prefix, sys.base_prefix))


# --- streams -----------------------------------------------------------------------------------------


class _Streams:
    """The standard streams, with copies of the file descriptors below them."""

    def __init__(self) -> None:
        self.files = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
        self.copies: dict[int, int] = {}
        for number in range(3):
            with contextlib.suppress(OSError):
                self.copies[number] = os.dup(number)

    def restore(self) -> Iterator[str]:
        for number, copy in self.copies.items():
            if not _same_file(number, copy):
                os.dup2(copy, number)
                yield f"file descriptor {number}"
        for name, file in self.files.items():
            number = ("stdin", "stdout", "stderr").index(name)
            if file is not None and getattr(file, "closed", False) and number in self.copies:
                mode = "r" if name == "stdin" else "w"
                # Flushed at each line. What the closed stream had not written is lost.
                self.files[name] = os.fdopen(os.dup(self.copies[number]), mode, buffering=1)
                setattr(sys, name, self.files[name])
                yield f"sys.{name}"
            elif getattr(sys, name) is not file:
                setattr(sys, name, file)
                yield f"sys.{name}"

    def close(self) -> None:
        for copy in self.copies.values():
            os.close(copy)


def _same_file(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


# --- the whole process -------------------------------------------------------------------------------


class ProcessState:
    """The state of this process at the construction of the object, to which `restore` returns."""

    def __init__(self) -> None:
        self.settings = {each.name: each.read() for each in SETTINGS}
        self.functions = _functions()
        self.hooks = {name: dict(hooks) for name, hooks in _HOOKS.items()}
        self.depths = _mode_depths()
        self.streams = _Streams()
        self.children = child_processes.running()
        self.modules = dict(sys.modules)
        self.path = list(sys.path)
        self.notes: list[str] = []

    def restore(self, *, building: bool = False) -> None:
        """Restore everything that differs; processes that were started since are ended.

        Args:
            building: True while a network is constructed: settings that are lenient then are restored and
                noted, and imported modules stay.

        Raises:
            DisturbedError: A difference may have decided a number.
        """
        # A mode that is still on would come between the calls that restore the rest.
        grave = list(_restore_modes(self.depths))
        wrong, mild = self._restore_settings(building=building)
        grave += wrong
        grave += _restore_functions(self.functions)
        grave += _restore_hooks(self.hooks)
        grave += self.streams.restore()
        if not building:
            grave += _restore_modules(self.modules)
            # Code may extend the import path, to find a repository of its own. The next job begins anew.
            sys.path[:] = self.path
        grave += changed_kernels()
        if names := self._end_children():
            grave.append(f"processes left running ({', '.join(names)})")
        if mild:
            self.notes.append(f"changed what the whole process shares, which was put back: {'; '.join(mild)}")
        if grave:
            shown = "; ".join(grave[:6]) + (f"; and {len(grave) - 6} more" if len(grave) > 6 else "")
            raise DisturbedError(f"changed what the whole process shares: {shown}; no result was kept")

    def _restore_settings(self, *, building: bool) -> tuple[list[str], list[str]]:
        """Restore every setting; return those whose change fails the job, and those whose change is noted."""
        grave: list[str] = []
        mild: list[str] = []
        for each in SETTINGS:
            before = self.settings[each.name]
            try:
                now = each.read()
                same = bool(now == before)
            except Exception:  # noqa: BLE001 - any reason that keeps a setting from being read
                now, same = "unreadable", False
            if same:
                continue
            said = f"{each.name}{_difference(before, now)}"
            try:
                each.write(before)
            except Exception as error:  # noqa: BLE001 - the settings after it must be restored all the same
                grave.append(f"{said}, which cannot be put back ({error})")
                continue
            lenient = each.lenient == "always" or (building and each.lenient == "building")
            (mild if lenient else grave).append(said)
        return grave, mild

    def _end_children(self) -> list[str]:
        """Kill the processes that were started since; return their names."""
        names: list[str] = []
        # Again until none is left: a process may start another before it is killed.
        while left := child_processes.running() - self.children:
            names += child_processes.end(left)
        return names


def _difference(before: Any, now: Any) -> str:
    """Return ``(float32 -> float64)`` for a message, or the names of the entries that differ in a mapping."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({str(key) for key in {**before, **now} if before.get(key) != now.get(key)})
        return f" ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
    return f" ({before} -> {now})"
