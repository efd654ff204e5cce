"""Workers on Ray: a node that goes, a disk that is not shared, and what is said where nothing can be done."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_sharing import OWN, ended, outcomes, project, start

from bench.api import running
from bench.errors import InputError
from bench.results import travel
from bench.results.store import Store
from bench.runner import executors
from bench.runner.context import WorkerContext
from bench.runner.executors.protocol import Asked
from bench.suite.jobs import Train

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")

MEMORY = 100 * 2**20
"""Bytes of the object store of a node; Ray needs 75 MiB at least."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    project(folder)
    ended(start(folder, "run", "suite.yaml", "--executor", "inline", "--results", "r"))
    return outcomes(folder / "r")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two cores; each test may add nodes and removes them."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    yield made
    made.shutdown()


def node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=MEMORY)


def finished(root: Path) -> int:
    return len(list(root.glob("*/*/receipt.json")))


def test_a_node_that_goes_loses_nothing_and_one_that_comes_helps(
    tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]
) -> None:
    project(tmp_path)
    gone, stays = node(cluster), node(cluster)
    run = start(
        tmp_path, "run", "suite.yaml", "--results", "r", "--executor", "ray", "--ray-address", cluster.address
    )
    end = time.monotonic() + 100
    while finished(tmp_path / "r") < 5 and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert run.poll() is None
    cluster.remove_node(gone, allow_graceful=False)
    comes = node(cluster)
    try:
        out = ended(run)
    finally:
        cluster.remove_node(stays)
        cluster.remove_node(comes)
    assert outcomes(tmp_path / "r") == undisturbed, out
    assert "is gone; another takes its place" in out
    assert "failed" not in out
    assert not list((tmp_path / "r" / "leases").iterdir())


def test_results_travel_where_no_disk_is_shared(
    tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = running.planned(project(tmp_path), tmp_path / "r", None)
    made.store.open()
    there = node(cluster)
    begin = executors.ready("ray", Asked(ray_address=cluster.address))
    run = running.Run(made, running.Options(partial(begin, shared=False)))  # type: ignore[call-arg]
    try:
        run.do()
    finally:
        cluster.remove_node(there)
    assert not run.failures
    assert outcomes(tmp_path / "r") == undisturbed
    assert all(made.store.damage(job.kind, job.key) is None for job in made.plan.graph())


def context(root: Path, **changes: Any) -> WorkerContext:
    return replace(WorkerContext(root, root, None, "cpu", {}), **changes)


def test_slots_share_gpus_by_fractions(tmp_path: Path, cluster: Any) -> None:
    """Ray counts GPUs that it is told of; none is used."""
    there = cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=MEMORY)
    start_pool = executors.ready("ray", Asked(ray_address=cluster.address, slots=2))
    pool = start_pool(context(tmp_path), lambda *_: None)
    try:
        assert pool.devices == ("cuda:0",) * 4
        end = time.monotonic() + 50
        while ray.available_resources().get("GPU", 0) > 0:
            assert time.monotonic() < end, "four halves of a GPU each are two GPUs"
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == 1, "they need no core"
    finally:
        pool.stop()
        cluster.remove_node(there)


@pytest.mark.parametrize("address", ["local", None])
def test_a_cluster_of_this_machine_that_does_not_start_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def fails(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs")  # noqa: TRY002 - as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    start_pool = executors.ready("ray", Asked(ray_address=address))
    said = (
        r"^--executor ray: no cluster starts on this machine \(The current node timed out during startup\.\)$"
    )
    with pytest.raises(InputError, match=said):
        start_pool(context(tmp_path), lambda *_: None)


def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path: Path, cluster: Any) -> None:
    waits = "\n    import os, pathlib, time\n    flag = pathlib.Path(__file__).with_name('flag')\n"
    waits += "    pathlib.Path(__file__).with_name('begun').touch()\n"
    waits += "    if flag.exists():\n        while True:\n            time.sleep(1)\n"
    own = OWN.replace("def build():", "def build():" + waits)
    made = running.planned(project(tmp_path, own), tmp_path / "r", None)
    made.store.open()
    (job, *_) = [each for each in made.plan.graph() if isinstance(each, Train)]
    there = node(cluster)
    pool = executors.ready("ray", Asked(ray_address=cluster.address))(
        context(tmp_path / "r", folder=tmp_path, sources=made.manifest["sources"]), lambda *_: None
    )

    def begun() -> "Future[dict[str, Any]]":
        (tmp_path / "begun").unlink(missing_ok=True)
        (tmp_path / "flag").touch()
        future = pool.submit(0, job)
        end = time.monotonic() + 50
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (tmp_path / "flag").unlink()
        return future

    try:
        hung = begun()
        assert pool.warm(0, job)
        pool.kill(0)
        with pytest.raises(BrokenExecutor, match="went"):
            hung.result(50)
        assert not pool.warm(0, job)
        assert any("is gone; another takes its place" in each for each in pool.watch())
        assert pool.submit(0, job).result(50)["answers"]
    finally:
        pool.stop()
        cluster.remove_node(there)


def test_a_cluster_on_which_nothing_can_start_is_said(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.runner.executors import ray as executor

    here = ModuleType("only_here")
    here.Own = type("Own", (), {"__module__": "only_here", "__qualname__": "Own"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", here)
    there = node(cluster)
    try:
        with pytest.raises(InputError, match=r"a node of the Ray cluster cannot work: .*only_here"):
            executor.Ray(context(tmp_path, data_root=here.Own()), lambda *_: None, address=cluster.address)
    finally:
        cluster.remove_node(there)
    monkeypatch.setattr(executor, "ROOM", 1.0)
    with pytest.raises(InputError, match=r"started no worker in 1 s; each needs 1 cpu"):
        executor.Ray(context(tmp_path), lambda *_: None, address=cluster.address)
    with pytest.raises(InputError, match=r"no node of the Ray cluster at .* has a GPU"):
        executor.Ray(context(tmp_path), lambda *_: None, address=cluster.address, device="cuda")
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_what_travels_is_checked_where_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "PIECE", 1000)
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    for each in (here, there):
        each.open()
    content = bytes(range(256)) * 20
    here.keep("craft", "k" * 8, {"a": 1}, {"seconds": 1.0}, lambda path: path.write_bytes(content) and None)
    pieces = list(travel.pieces(here, "craft", "k" * 8))
    assert [len(data) for name, data in pieces if name == "images.safetensors"] == [1000] * 5 + [120]
    travel.receive(there, "craft", "k" * 8, pieces)
    assert there.artefact("craft", "k" * 8).read_bytes() == content
    assert there.receipt("craft", "k" * 8) == here.receipt("craft", "k" * 8)
    there.clear("craft", "k" * 8)
    flipped = [(name, data[:-1] + b"?" if name == "images.safetensors" else data) for name, data in pieces]
    for wrong in (pieces[:-1], [*pieces, pieces[-1]], flipped, [("../harm", b""), *pieces]):
        with pytest.raises(travel.DamagedError):
            travel.receive(there, "craft", "k" * 8, wrong)
        assert there.receipt("craft", "k" * 8) is None
    with pytest.raises(travel.DamagedError, match="it arrived damaged"):
        travel.receive(there, "craft", "other", pieces)


def test_a_run_on_a_cluster_of_its_own_stops_at_sigterm_and_goes_on(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    project(tmp_path)
    words = ("run", "suite.yaml", "--results", "r", "--executor", "ray", "--workers", "2")
    run = start(tmp_path, *words)
    end = time.monotonic() + 100
    while finished(tmp_path / "r") < 3 and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert "Go on with" in ended(run, 143)
    assert not list((tmp_path / "r" / "leases").iterdir())
    ended(start(tmp_path, *words[:4], "--executor", "inline"))
    assert outcomes(tmp_path / "r") == undisturbed


@pytest.mark.parametrize("silent", [False, True])
def test_an_address_where_no_cluster_answers_is_named_with_the_seconds(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens there, or something that never says a word."""
    from bench.runner.executors import ray as executor

    monkeypatch.setattr(executor, "ANSWER", 2.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if silent:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError) as raised:
            executor._connect(address, None)
    found = re.fullmatch(
        rf"--ray-address {address}: no Ray cluster answered there in ([\d.]+) s \(.+\)", str(raised.value)
    )
    assert found is not None
    assert float(found[1]) >= (2.0 if silent else 0.0)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (Asked(["cuda", "cuda"]), "--slots N puts N jobs on each GPU"),
        (Asked(["cuda:1"]), "on Ray expected cpu or cuda"),
        (Asked(ray_address="ray://head:10001"), "expected HOST:PORT"),
        (Asked(["cpu"], 4), "--slots 4: on Ray it shares GPUs"),
    ],
)
def test_what_ray_cannot_be_asked_is_said_in_a_sentence(given: Asked, part: str) -> None:
    with pytest.raises(InputError, match=part):
        executors.ready("ray", given)


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_an_extra_that_is_not_installed_is_said_with_what_to_install(tmp_path: Path, name: str) -> None:
    library = executors.EXTRAS[name]
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        f"from bench import cli\nsys.argv = 'bench run suite.yaml --executor {name}'.split()\ncli.main()"
    )
    project(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    said = " ".join(found.stderr.split())
    assert f"needs {library}, which is not installed: pip install crossfire-bench[{name}]" in said
    assert "Traceback" not in said
