"""What a job must find in its process, and must leave behind: global settings, functions, streams, children.

A network, an attack or a library may set things that hold for the whole process. Each job begins with the
settings of the harness; after it, whatever differs is put back and said, so that no job computes another
one's number. What is looked at: `SETTINGS`, the functions that numbers are made of, torch's
modes and hooks, the standard streams, and processes that were started and not ended.
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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.utils.checkpoint
from torch.nn.modules import module as torch_module

from bench.errors import DisturbedError


@dataclass(frozen=True)
class Setting:
    """Something that holds for the whole process."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    lenient: Literal["never", "building", "always"] = "never"
    """When code that is not ours may set it: it is put back and said, and the job goes on. While a network is
    built nothing was computed yet. Any other change fails the job."""


_ENTERED: list[torch.inference_mode] = []
"""Guards that hold as long as they live."""


def _set_inference_mode(value: bool) -> None:
    # A guard that was entered and never left cannot be taken off; another one on top of it can undo it.
    _ENTERED.append(torch.inference_mode(value))
    _ENTERED[-1].__enter__()


def _deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_LIBRARIES = ("TORCHINDUCTOR_", "TRITON_", "KMP_")
"""What begins so is noted in the environment by OpenMP, and by torch's compiler at the first optimiser."""


def _environment() -> dict[str, str]:
    return {
        name: each for name, each in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "TRITON_"))
    }


def _set_environment(value: Mapping[str, str]) -> None:
    for name in _environment().keys() - value.keys():
        del os.environ[name]
    os.environ.update(value)


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def _flushes() -> bool:
    """Return whether numbers too small for a full mantissa are taken for 0 (no function tells)."""
    return bool((torch.full((1,), 2e-38) * 0.1)[0] == 0)


_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE")
    if hasattr(signal, name)
)


def _handlers() -> dict[signal.Signals, Any]:
    return {each: signal.getsignal(each) for each in _SIGNALS}


def _handle(value: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in value.items():
            if handler is not None:
                signal.signal(number, handler)


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


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
        _deterministic,
        lenient="building",
    ),
    Setting(
        "the precision of float32 matrix products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        lenient="building",
    ),
    *(
        Setting(f"torch.backends.{path}.{name}", *_flag(owner, name), lenient="building")
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
    Setting("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled, lenient="building"),
    Setting("numpy's error handling", np.geterr, lambda value: np.seterr(**value), lenient="building"),
    Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit, lenient="always"),
    Setting("the environment", _environment, _set_environment, lenient="always"),
    Setting("the file mode mask", _umask, os.umask, lenient="always"),
    Setting("the working directory", os.getcwd, os.chdir),
    Setting("signal handlers", _handlers, _handle, lenient="always"),
)
"""In the order in which they are put back: grad mode comes after inference mode, which sets it."""


# --- functions that numbers are made of --------------------------------------------------------------

_PACKAGES = ("bench", "attacks", "defenses")


@dataclass(frozen=True)
class _Owner:
    """A module or a class, what messages call it, and all that it had."""

    title: str
    owner: Any
    had: Mapping[str, Any]


def _owners() -> Iterator[tuple[str, Any]]:
    """Yield the modules and classes whose functions decide numbers, with what messages call them."""
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
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType):
            yield name, module
            for kind in list(vars(module).values()):
                if isinstance(kind, type) and kind.__module__ == name:
                    yield f"{name}.{kind.__qualname__}", kind


@lru_cache(maxsize=1)
def _known(_modules: int) -> tuple[tuple[str, Any], ...]:
    return tuple(_owners())


def _functions() -> tuple[_Owner, ...]:
    """Return every owner with all that it has now."""
    return tuple(_Owner(title, owner, dict(vars(owner))) for title, owner in _known(len(sys.modules)))


def _put_functions_back(before: Iterable[_Owner]) -> Iterator[str]:
    """Undo what replaced or hid a function since; yield the names of those that were.

    Other values (counters, caches) change in the course of things.
    """
    for each in before:
        now, had = dict(vars(each.owner)), each.had
        for name in [name for name, value in had.items() if now.get(name) is not value]:
            if _runs(had[name]) and not _torchs_own(now.get(name)):
                setattr(each.owner, name, had[name])
                yield f"{each.title}.{name}"
        if isinstance(each.owner, type):
            # What a class has from its bases is hidden by a name of its own.
            for name in now.keys() - had.keys():
                hides = any(_runs(vars(base).get(name)) for base in each.owner.__mro__[1:])
                if hides and not _torchs_own(now[name]):
                    delattr(each.owner, name)
                    yield f"{each.title}.{name}"


def _runs(value: object) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod | property)


def _torchs_own(value: object) -> bool:
    """Return whether torch put a function in another's place itself, as it does at the first use of an
    optimiser or a compiler: what stands there now calls what stood there before.
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


def _put_hooks_back(before: Mapping[str, Mapping[Any, Any]]) -> Iterator[str]:
    for name, hooks in _HOOKS.items():
        if dict(hooks) != before[name]:
            hooks.clear()
            hooks.update(before[name])
            yield f"the {name.removeprefix('_global_').replace('_', ' ')} of all modules"


def _depths() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _put_modes_back(before: tuple[int, int]) -> Iterator[str]:
    """Leave the modes of torch that were entered and not left; they come between a call and its function."""
    pops = torch._C._pop_torch_function_stack, torch._C._pop_torch_dispatch_stack
    for depth, now, pop, name in zip(before, _depths(), pops, ("function", "dispatch"), strict=True):
        for _ in range(now - depth):
            pop()
        if now > depth:
            yield f"a mode of torch ({name})"


# --- what torch computes, and what was imported ------------------------------------------------------


def _computed() -> dict[str, list[float]]:
    """Return what a few functions of torch make of a few numbers: kernels may be replaced below them."""
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
def _at_first() -> dict[str, list[float]]:
    """Return what they made of them when the process began its first job."""
    return _computed()


def _otherwise() -> list[str]:
    """Return the functions of torch that compute otherwise than they did."""
    return [
        f"what torch.{name} computes" for name, values in _computed().items() if values != _at_first()[name]
    ]


def _put_modules_back(before: Mapping[str, ModuleType]) -> Iterator[str]:
    """Undo what replaced a module, and forget what was imported of the user's own: jobs begin anew."""
    for name, module in before.items():
        if sys.modules.get(name) is not module:
            sys.modules[name] = module
            yield f"the module {name}"
    for name in sys.modules.keys() - before.keys():
        if not installed(sys.modules[name]):
            del sys.modules[name]


def installed(module: object) -> bool:
    """Return whether a module came with Python or with a package, is compiled, or is one of ours."""
    file = getattr(module, "__file__", None)
    ours = getattr(module, "__name__", "").partition(".")[0] in _PACKAGES
    if ours or file is None or not file.endswith(".py"):
        return True
    return any(Path(file).is_relative_to(each) for each in (sys.prefix, sys.base_prefix))


# --- streams and processes ---------------------------------------------------------------------------


class _Streams:
    """The standard streams, with copies of what lies below them."""

    def __init__(self) -> None:
        self.files = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
        self.copies: dict[int, int] = {}
        for number in range(3):
            with contextlib.suppress(OSError):
                self.copies[number] = os.dup(number)

    def put_back(self) -> Iterator[str]:
        for number, copy in self.copies.items():
            if not _same_file(number, copy):
                os.dup2(copy, number)
                yield f"file descriptor {number}"
        for name, file in self.files.items():
            number = ("stdin", "stdout", "stderr").index(name)
            if file is not None and getattr(file, "closed", False) and number in self.copies:
                mode = "r" if name == "stdin" else "w"
                # Line by line, as a person sees it: the old one's buffer is gone with it.
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


_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch._inductor")
"""Processes that Python and torch keep for themselves; they end with ours."""


def children() -> set[psutil.Process]:
    """Return the processes below this one, less those that Python and torch keep for themselves."""
    found: set[psutil.Process] = set()
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(each.cmdline())
            if each.status() != psutil.STATUS_ZOMBIE and not any(name in line for name in _HELPERS):
                found.add(each)
    return found


def end(processes: Iterable[psutil.Process]) -> list[str]:
    """Kill processes; return their names."""
    names = []
    for each in (alive := list(processes)):
        with contextlib.suppress(psutil.Error):
            name = each.name()
            each.kill()
            names.append(name)
    psutil.wait_procs(alive, timeout=3)
    return sorted(names)


def adopt_orphans(wanted: bool) -> None:
    """Make this process the parent of what its children leave behind, so that it can end it (Linux); or not.

    Whoever adopts must end them: one that is not waited for stays in the list of processes.
    """
    import ctypes

    subreaper = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(subreaper, int(wanted), 0, 0, 0)


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """Adopt orphans in the block; a worker, which ends them when it ends, does so always."""
    if parent_process() is not None:
        yield
        return
    adopt_orphans(True)
    try:
        yield
    finally:
        adopt_orphans(False)


# --- a job -------------------------------------------------------------------------------------------


class Ground:
    """The process as a job finds it; knows how to put back what was changed."""

    def __init__(self) -> None:
        self.settings = {each.name: each.read() for each in SETTINGS}
        self.functions = _functions()
        self.hooks = {name: dict(hooks) for name, hooks in _HOOKS.items()}
        self.depths = _depths()
        self.streams = _Streams()
        self.children = children()
        self.modules = dict(sys.modules)
        self.path = list(sys.path)
        self.notes: list[str] = []

    def put_back(self, *, building: bool = False) -> None:
        """Put back what differs; raise `DisturbedError` where it may have decided a number.

        While a network is built, what is lenient is put back and noted: nothing was computed yet.
        """
        # A mode that is on would come between the calls that put things back.
        grave = list(_put_modes_back(self.depths))
        mild: list[str] = []
        for each in SETTINGS:
            try:
                now = each.read()
                same = bool(now == self.settings[each.name])
            except Exception:  # noqa: BLE001 - a directory that is gone, a flag that is contradicted
                now, same = "unreadable", False
            if not same:
                said = f"{each.name}{_difference(self.settings[each.name], now)}"
                try:
                    each.write(self.settings[each.name])
                except Exception as error:  # noqa: BLE001 - what comes after it must be put back all the same
                    grave.append(f"{said}, which cannot be put back ({error})")
                    continue
                lenient = each.lenient == "always" or (building and each.lenient == "building")
                (mild if lenient else grave).append(said)
        grave += _put_functions_back(self.functions)
        grave += _put_hooks_back(self.hooks)
        grave += self.streams.put_back()
        if not building:
            grave += _put_modules_back(self.modules)
            # Lawful: a vendored repository is found so. The next job's code is looked for anew.
            sys.path[:] = self.path
        grave += _otherwise()
        names: list[str] = []
        # Until none is left: one may have started another before it was killed.
        while left := children() - self.children:
            names += end(left)
        if names:
            grave.append(f"processes left running ({', '.join(names)})")
        if mild:
            self.notes.append(f"changed what the whole process shares, which was put back: {'; '.join(mild)}")
        if grave:
            shown = "; ".join(grave[:6]) + (f"; and {len(grave) - 6} more" if len(grave) > 6 else "")
            raise DisturbedError(f"changed what the whole process shares: {shown}; no result was kept")


def _difference(before: Any, now: Any) -> str:
    """Return ``: float32 -> float64`` where both are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({str(key) for key in {**before, **now} if before.get(key) != now.get(key)})
        return f" ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
    return f" ({before} -> {now})"


_GROUNDS: list[Ground] = []
"""Of the jobs that are running in this process: one, or none."""


@contextmanager
def building() -> Iterator[None]:
    """See that what is built leaves the process of a job as it was."""
    yield
    for ground in _GROUNDS[-1:]:
        ground.put_back(building=True)


@contextmanager
def isolated() -> Iterator[Ground]:
    """Run a job: what it changed for the whole process is put back, whether it ends well or not.

    What would end the process (`sys.exit`, `os._exit`, a KeyboardInterrupt that nobody sent) is an error of
    the job. Random states are put back too, and are no change: drawing is lawful.
    """
    _at_first()
    if spoilt := _otherwise():
        raise DisturbedError(
            f"an earlier job changed {', '.join(spoilt)} in this process; start the run again"
        )
    ground = Ground()
    with ExitStack() as stack:
        stack.callback(ground.streams.close)
        stack.enter_context(orphans_adopted())
        # Of GPUs that are in use alone: asking for a state would start the others.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(random_states(devices))
        stack.enter_context(warnings.catch_warnings())
        sent = stack.enter_context(_interrupts())
        stack.enter_context(_no_exit())
        ground.settings["signal handlers"] = _handlers()
        _GROUNDS.append(ground)
        stack.callback(_GROUNDS.pop)
        try:
            yield ground
        except BaseException as error:
            _quietly(ground)
            if isinstance(error, Exception) or sent.is_set():
                raise
            said = f": {error}" if str(error) else ""
            raise DisturbedError(f"tried to end the process ({type(error).__name__}{said})") from error
        else:
            ground.put_back()


def _quietly(ground: Ground) -> None:
    """Put back; what failed the job already is the reason to give."""
    with contextlib.suppress(DisturbedError):
        ground.put_back()


@contextmanager
def random_states(devices: Iterable[int]) -> Iterator[None]:
    """Put the global random states (torch's, of these GPUs too, numpy's, Python's) back after the block."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Tell a Ctrl-C that a person sent (or SIGTERM) from a KeyboardInterrupt that code raised."""
    sent = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield sent
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: Any) -> None:
        sent.set()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, interrupt)
    try:
        yield sent
    finally:
        _handle(before)


@contextmanager
def _no_exit() -> Iterator[None]:
    """Make `os._exit` and `os.abort` raise in this process; in its forks, which need them, they end."""
    owner, real = os.getpid(), {name: getattr(os, name) for name in ("_exit", "abort")}

    def refuse(name: str) -> Callable[..., None]:
        def ended(*arguments: Any) -> None:
            if os.getpid() != owner:
                real[name](*arguments)
            raise SystemExit(f"os.{name}{arguments}")

        return ended

    for name in real:
        setattr(os, name, refuse(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
