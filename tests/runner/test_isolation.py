"""What a job changes for its whole process: put back, said, and nobody else's number."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn

from bench.errors import DisturbedError, OtherNetworkError, OvertimeError
from bench.results import fingerprint
from bench.results.store import Store
from bench.runner import child_processes, executors, outstanding, process_state
from bench.runner.context import WorkerContext
from bench.runner.estimates import Estimates
from bench.runner.executors.inline import Inline
from bench.runner.executors.protocol import Asked, Pool
from bench.runner.isolation import building, isolated
from bench.suite import planner, resolve
from bench.suite.jobs import Evaluate, Job, Train
from suites import TASK, Ran, scheduled, suite

CLEAN = {"clean": {"use": "none"}}

# --- one change after another ------------------------------------------------------------------------

CHANGES: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "inference mode": lambda: KEPT.append(entered(torch.inference_mode())),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "denormals": lambda: torch.set_flush_denormal(True),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "warn only": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    **{
        # None of them says so before.
        each.name: partial(
            each.write, "bf16" if "mkldnn" in each.name else "ieee" if "cudnn" in each.name else "tf32"
        )
        for each in process_state.PRODUCTS
    },
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn off": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "numpy errors": lambda: np.seterr(all="raise"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "function": lambda: setattr(torch.nn.functional, "relu", lambda x: x),
    "torch's": lambda: setattr(torch, "sign", torch.abs),
    "method": lambda: setattr(torch.Tensor, "clamp", lambda x, *_: x),
    "inherited method": lambda: setattr(torch.Tensor, "sign", lambda x: x),
    "forward": lambda: setattr(nn.Linear, "forward", lambda self, x: x),
    "wrapped": lambda: setattr(torch, "relu", torch.no_grad()(torch.relu)),
    "numpy's": lambda: setattr(np, "argmax", lambda *_: 0),
    "builtin": lambda: setattr(sys.modules["builtins"], "max", min),
    "ours": lambda: setattr(sys.modules["bench.losses"], "succeeded", lambda *_: False),
    "an attack": lambda: setattr(sys.modules["attacks.pgd"], "pgd", None),
    "hashlib's": lambda: setattr(sys.modules["hashlib"], "sha256", None),
    "pyarrow's": lambda: setattr(sys.modules["pyarrow.parquet"], "write_table", None),
    "a module": lambda: sys.modules.update(json=None),  # type: ignore[call-overload]
    "hook": lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "function mode": lambda: KEPT.append(entered(torch.device("meta"))),
    "directory": lambda: os.chdir("/"),
    "closed stream": lambda: sys.stdout.close(),
    "closed descriptor": lambda: os.close(2),
    "other stream": lambda: setattr(sys, "stderr", None),
    "child": lambda: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000"),
    "grandchild": lambda: os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "sleep 1000 & sleep 1000"),
}
LENIENT = {
    "threads", "deterministic", "warn only", "matmul precision", "tf32", "cudnn", "cudnn off", "numpy errors",
    "anomaly", *(each.name for each in process_state.PRODUCTS),
}  # fmt: skip
KEPT: list[Any] = []


def entered(manager: Any) -> Any:
    """Return a context manager that was entered, and is never left."""
    manager.__enter__()
    return manager


def everything() -> list[Any]:
    """Return what must be as it was."""
    functions = {each.title: dict(each.had) for each in process_state._functions()}
    known = [functions[name]["relu"] for name in ("torch", "torch.nn.functional")]
    return [
        {each.name: each.read() for each in process_state.SETTINGS},
        known,
        torch.Tensor.sign,
        torch.Tensor.clamp,
        nn.Linear.forward,
        np.argmax,
        max,
        sys.modules["bench.losses"].succeeded,  # type: ignore[attr-defined]
        sys.modules["attacks.pgd"].pgd,  # type: ignore[attr-defined]
        {name: dict(hooks) for name, hooks in process_state._HOOKS.items()},
        process_state._mode_depths(),
        sys.stderr,
        sys.stdout.closed,
        os.fstat(2).st_ino,
        child_processes.running(),
        torch.sign,
    ]


@contextmanager
def own_stdout() -> Iterator[None]:
    """Give the block a stream of its own, that it may close."""
    before = sys.stdout
    with open(os.dup(1), "w") as file:
        sys.stdout = file
        try:
            yield
        finally:
            if sys.stdout is not file:
                sys.stdout.close()
            sys.stdout = before


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_put_back(name: str) -> None:
    with own_stdout():
        before = everything()
        with pytest.raises(DisturbedError, match="changed what the whole process shares"), isolated():
            CHANGES[name]()
        assert everything() == before
        # A job that fails for another reason has not disturbed the next one either.
        with pytest.raises(ZeroDivisionError), isolated():
            fails(CHANGES[name])
        assert everything() == before


def fails(first: Callable[[], Any]) -> None:
    first()
    raise ZeroDivisionError


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_lenient_is_put_back_before_anything_is_computed(name: str) -> None:
    with own_stdout():
        before = everything()
        if name in LENIENT:
            with isolated() as state:
                inside = everything()
                with building():
                    CHANGES[name]()
                assert everything() == inside
            assert len(state.notes) == 1
            assert "put back" in state.notes[0]
        else:
            with pytest.raises(DisturbedError), isolated(), building():
                CHANGES[name]()
        assert everything() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda: os.environ.update(OMP_NUM_THREADS="64"),
        lambda: signal.signal(signal.SIGALRM, lambda *_: None),
        lambda: sys.setrecursionlimit(5000),
        lambda: os.umask(0o077),
    ],
    ids=["environment", "signals", "recursion", "umask"],
)
def test_what_decides_no_number_is_put_back_and_said(change: Callable[[], Any]) -> None:
    before = everything()
    with isolated() as state:
        change()
    assert everything() == before
    assert len(state.notes) == 1


def test_what_cannot_be_put_back_keeps_nothing_else_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    relu = torch.nn.functional.relu

    def leave() -> None:
        os.chdir(tmp_path)
        gone.rmdir()
        torch.nn.functional.relu = torch.sign  # type: ignore[assignment]

    with pytest.raises(DisturbedError, match="cannot be put back"), isolated():
        leave()
    assert torch.nn.functional.relu is relu


def test_draws_and_libraries_are_no_change() -> None:
    draws = torch.get_rng_state()
    with isolated() as state:
        torch.manual_seed(5)
        np.random.seed(5)
        net = nn.Linear(2, 2)
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS):
            # The first optimiser of a kind makes torch wrap its step.
            kind(net.parameters(), lr=0.1)
    assert state.notes == []
    assert torch.equal(torch.get_rng_state(), draws)


def quit_() -> None:
    os._exit(0)


ENDS: dict[str, Callable[[], Any]] = {
    "sys.exit(0)": lambda: sys.exit(0),
    "exit with text": lambda: sys.exit("done"),
    "os._exit(0)": quit_,
    "os.abort": lambda: os.abort(),
    "KeyboardInterrupt": lambda: raised(KeyboardInterrupt()),
    "GeneratorExit": lambda: raised(GeneratorExit()),
    "BaseException": lambda: raised(BaseException("mine")),
}


def raised(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("name", ENDS)
def test_what_would_end_the_process_fails_the_job(name: str) -> None:
    real = os._exit
    with pytest.raises(DisturbedError, match="tried to end the process"), isolated():
        ENDS[name]()
    assert os._exit is real


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_ctrl_c_that_a_person_sent_ends_the_run(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), isolated():
        signal.raise_signal(number)


def test_a_fork_may_end_itself() -> None:
    with isolated():
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# --- a suite with hostile networks -------------------------------------------------------------------

GOOD = """
import torch
from torch import nn

def build(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
"""

HOSTILE = {
    "exits": "sys.exit(0)",
    "ends": "os._exit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "dtype": "torch.set_default_dtype(torch.bfloat16)",
    "nograd": "torch.set_grad_enabled(False)",
    "inference": "KEPT.append(torch.inference_mode()); KEPT[-1].__enter__()",
    "patches": "torch.nn.functional.relu = torch.sign = lambda x, *_, **__: x * 0",
    "moves": "os.chdir('/'); sys.stdout.close()",
    "spawns": "os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', '1000'); os.system('setsid sleep 1000 &')",
    "late": "LATE.append(True)",
}
"""What `build` does in ten modules; the last one changes settings when it is asked."""

MODULE = """
import os, subprocess, sys
import torch
from torch import nn

KEPT, LATE = [], []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if LATE:
            torch.set_float32_matmul_precision("medium")
            torch.set_default_dtype(torch.float64)
        return self.net(x).float()

def build():
    net = Net()
    {line}
    return net
"""


def hostile(folder: Path, *, with_them: bool) -> Path:
    """Write a suite of three good networks, and of ten hostile ones."""
    folder.mkdir()
    (folder / "good.py").write_text(GOOD)
    defenses: dict[str, Any] = {
        f"good{seed}": {"use": "module", "build": "good:build", "arguments": {"seed": seed}}
        for seed in range(3)
    }
    for name, line in HOSTILE.items() if with_them else ():
        (folder / f"{name}.py").write_text(textwrap.dedent(MODULE).replace("{line}", line))
        defenses[name] = {"use": "module", "build": f"{name}:build"}
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}}
    columns = {"columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}}}
    tables = {"t": {"title": "Hostile", "rows": ["defense"], **columns}}
    path = suite(folder, defenses, attacks, [TASK], tables=tables)
    document = yaml.safe_load(path.read_text())
    document["data"]["digits"] |= {"size": 40, "shard": 40}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


class Backwards(Estimates):
    """Takes short jobs for long ones, so that they go first."""

    def seconds(self, job: Job, device: str | None = None) -> float:
        return 1e6 / (1 + super().seconds(job, device))


def outcomes(path: Path, executor: str, costs: Estimates) -> tuple[dict[str, Any], int]:
    """Run a suite; return the rows of the good networks' cells, and how many jobs failed."""
    made = planner.make(resolve.load(path))
    store = Store(path.parent / f"{executor}-{type(costs).__name__}")
    store.open()
    code = {**fingerprint.digests(made.modules()), **made.manifest()["sources"]}
    context = WorkerContext(store.root, path.parent, None, "cpu", code)
    asked = Asked(["cpu"], None if executor == "inline" else 2)
    pool: Pool = executors.ready(executor, asked)(context, lambda *_: None)
    with own_stdout():
        try:
            done = list(scheduled(outstanding.examine(made, store), store, pool, costs))
        finally:
            pool.stop()
    return good_rows(made, store), sum(each.error is not None for each in done)


def good_rows(made: planner.Plan, store: Store) -> dict[str, Any]:
    return {
        f"{cell.coordinates['defense']} {cell.coordinates['attack']}": pq.read_table(
            store.artefact("evaluate", cell.job.key)
        ).to_pydict()
        for cell in made.conditions
        if str(cell.coordinates["defense"]).startswith("good")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the rows of the good networks where no hostile one is in the suite."""
    path = hostile(tmp_path_factory.mktemp("good") / "suite", with_them=False)
    rows, failed = outcomes(path, "inline", Estimates())
    assert failed == 0
    assert len(rows) == 6
    return rows


@pytest.mark.parametrize(
    ("executor", "costs"), [("inline", Estimates()), ("inline", Backwards()), ("process", Backwards())]
)
def test_hostile_networks_move_nobody_elses_number_in_any_order(
    tmp_path: Path, alone: dict[str, Any], executor: str, costs: Estimates
) -> None:
    here = os.getcwd()
    beside, failed = outcomes(hostile(tmp_path / "together", with_them=True), executor, costs)
    assert beside == alone
    assert failed >= len(HOSTILE)
    assert os.getcwd() == here
    assert not [each for each in psutil.Process().children(recursive=True) if each.name() == "sleep"]


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_run_with_hostile_networks_ends_with_4_and_its_tables(
    tmp_path: Path, alone: dict[str, Any], executor: str
) -> None:
    path = hostile(tmp_path / "suite", with_them=True)
    command = [sys.executable, "-m", "bench.cli", "run", path.name, "--executor", executor, "--results", "r"]
    ended = subprocess.run(
        command,
        cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 4, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert good_rows(planner.make(resolve.load(path)), Store(path.parent / "r")) == alone
    table = (path.parent / "r" / "tables" / "table-t.md").read_text()
    assert table.count("not run") == 2 * len(HOSTILE)


@pytest.mark.parametrize(
    "body",
    ["while True: pass", "import time; time.sleep(1000)", "[None for _ in iter(int, 1)]"],
    ids=["loop", "sleep", "generator"],
)
@pytest.mark.parametrize("where", ["build", "forward"])
def test_a_job_that_does_not_end_is_stopped_at_the_suites_limit(
    tmp_path: Path, body: str, where: str
) -> None:
    module = MODULE.replace("{line}", body if where == "build" else "pass")
    if where == "forward":
        module = module.replace("if LATE:", f"if len(x) > 8:\n            {body}\n        if LATE:")
    (tmp_path / "endless.py").write_text(module)
    endless = {"endless": {"use": "module", "build": "endless:build"}}
    path = suite(tmp_path, endless, {"clean": {"use": "none"}}, [TASK], time_limit=2)
    made = planner.make(resolve.load(path))
    assert made.suite.model.time_limit == 2
    store = Store(tmp_path / "r")
    store.open()
    context = WorkerContext(store.root, tmp_path, None, "cpu", made.manifest()["sources"], time_limit=2)
    begun = time.monotonic()
    pool = Inline(context, lambda *_: None, "cpu")
    done = list(scheduled(outstanding.examine(made, store), store, pool))
    (failed,) = [each for each in done if each.error is not None]
    assert isinstance(failed.job, Train if where == "build" else Evaluate)
    assert isinstance(failed.error, OvertimeError)
    for each in done:
        assert not (each.receipt or {}).get("notes")
    assert time.monotonic() - begun < 30


# --- the order of jobs -------------------------------------------------------------------------------

REMEMBERS = """
import torch
from torch import nn

SEEN = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.first = None

    def forward(self, x):
        {remember}
        return z

def build():
    return Net()
"""
SEEING = {
    "in the instance": "z = self.net(x) if self.first is None else self.net(x) + 0.5 * self.first",
    "in the module": "SEEN.append(0); z = self.net(x) + 0.1 * len(SEEN) * x.flatten(1)[:, :10]",
    "in the class": (
        "Net.count = getattr(Net, 'count', 0) + 1; z = self.net(x) + 0.1 * Net.count * x.flatten(1)[:, :10]"
    ),
}
"""Where a network may remember what it was asked."""


@pytest.mark.parametrize("way", SEEING)
def test_a_network_that_remembers_what_it_was_asked_has_no_number(tmp_path: Path, way: str) -> None:
    line = SEEING[way] + "; self.first = z[:1].detach()"
    (tmp_path / "remembers.py").write_text(REMEMBERS.format(remember=line))
    ran = Ran(suite(tmp_path, {"net": {"use": "module", "build": "remembers:build"}}, CLEAN, [TASK]))
    (failed,) = ran.failed
    assert isinstance(failed.error, OtherNetworkError)
    assert "remembers" in str(failed.error)


class Recorded(Inline):
    """Notes the order in which jobs come."""

    def submit(self, slot: int, job: Any) -> "Future[dict[str, Any]]":
        self.order.append(job.key)
        return super().submit(slot, job)

    order: list[str]


@pytest.mark.parametrize("way", SEEING)
def test_what_a_network_remembers_does_not_go_from_job_to_job(tmp_path: Path, way: str) -> None:
    # Of small batches it remembers nothing, so that few questions do not tell.
    line = f"z = self.net(x)\n        if len(x) > 8: {SEEING[way]}; self.first = z[:1].detach()"
    (tmp_path / "remembers.py").write_text(REMEMBERS.format(remember=line))
    defenses = {"net": {"use": "module", "build": "remembers:build"}}
    attacks = {"clean": {"use": "none"}, **{f"pgd{n}": {"use": "pgd", "steps": n} for n in (1, 2, 3)}}
    path = suite(tmp_path, defenses, attacks, [TASK])
    found, orders = [], []
    for number, costs in enumerate((Estimates(), Backwards())):
        made = planner.make(resolve.load(path))
        store = Store(tmp_path / f"r{number}")
        store.open()
        pool = Recorded(
            WorkerContext(store.root, tmp_path, None, "cpu", made.manifest()["sources"]),
            lambda *_: None,
            "cpu",
        )
        pool.order = []
        done = list(scheduled(outstanding.examine(made, store), store, pool, costs))
        assert not [each.error for each in done if each.error]
        orders.append(pool.order)
        found.append(
            [pq.read_table(store.artefact("evaluate", cell.job.key)).to_pydict() for cell in made.conditions]
        )
        # It remembers within a job, too: asked again, it answers otherwise.
        assert all(any(rows["differs"]) for rows in found[-1])
    assert orders[0] != orders[1]
    assert found[0] == found[1]


def test_jobs_of_one_run_and_of_many_agree(tmp_path: Path) -> None:
    """Our own networks are shared by the jobs of a process: what one is asked is nothing to the next."""
    defenses = {"cnnf": {"use": "cnnf", "net": "b2", "width": 0.25, "hidden": [16], "epochs": 1, "cycles": 1}}
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 2}}
    path = suite(tmp_path, defenses, attacks, [{**TASK, "limit": 30}])
    together = Ran(path, tmp_path / "one")
    assert not together.failed
    for cell in together.plan.conditions:
        Ran(path, tmp_path / "many", wanted={cell.job.key})
    for cell in together.plan.conditions:
        one, many = (
            pq.read_table(Store(tmp_path / name).artefact("evaluate", cell.job.key)).to_pydict()
            for name in ("one", "many")
        )
        assert one == many


SPOILT = """
import torch
from bench.runner import isolation
from bench.errors import DisturbedError

def job(line=None):
    try:
        with isolation.isolated():
            if line is not None:
                global kept
                kept = torch.library.Library("aten", "IMPL")
                kept.impl("sign", lambda x: x.abs(), "CPU")
    except DisturbedError as error:
        return str(error)

print(job())
print(job("spoil"))
print(job())
"""


def test_a_kernel_that_is_replaced_below_torch_spoils_the_process_and_is_said() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SPOILT]
    first, second, third = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert first == "None"
    assert "what torch.sign computes" in second
    assert "an earlier job changed what torch.sign computes" in third
