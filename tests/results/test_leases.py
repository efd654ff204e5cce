"""Leases: one worker a job, nothing locked, no clock compared."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench.results import durable, leases
from bench.results.failures import TRIES, Failures
from bench.results.leases import LEASES, WORKERS, Leases
from bench.results.store import Store

FAR = "worker@elsewhere@7@00000000-1-abc"
"""A worker on a machine that cannot be asked."""

HOLD = """
import sys, time
from pathlib import Path
from bench.results.leases import Leases
with Leases(Path(sys.argv[1])) as own:
    print(own.take("job"), own.name, flush=True)
    time.sleep(600)
"""


def of_another_machine(root: Path, key: str, beat: int | None = 1) -> None:
    """Put a lease there that a worker on another machine holds, with its file if it beats."""
    for name in (LEASES, WORKERS):
        (root / name).mkdir(exist_ok=True, parents=True)
    (root / LEASES / key).write_text(FAR)
    if beat is not None:
        (root / WORKERS / FAR).write_text(json.dumps({"beat": beat}))


def test_one_of_two_has_a_job_until_it_gives_it_back(tmp_path: Path) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as two:
        assert one.take("job")
        assert not two.take("job")
        assert two.held("job")
        assert two.take("other")
        two.free("job")
        assert not two.take("job"), "nobody gives back what another one holds"
        one.free("job")
        assert not two.held("job")
        assert two.take("job")
        assert not two.inherited


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where", ["Leases._write", "threading.Thread.start", "os.write", "os.close", "_owner"]
)
def test_a_signal_at_the_edges_of_a_block_leaves_no_worker_and_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It may come in the middle of entering, taking or leaving, where no block protects anything."""
    own = Leases(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"bench.results.leases.{where}", _interrupted)
        with suppress(KeyboardInterrupt), own:
            assert own.take("job")
    own.close()
    assert not list((tmp_path / LEASES).iterdir())
    assert not list((tmp_path / WORKERS).iterdir())


def test_a_worker_that_closes_holds_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    with Leases(tmp_path) as one:
        assert one.take("job")
        assert [each.name for each in leases.workers(tmp_path)] == [one.name]
    assert not list((tmp_path / LEASES).iterdir())
    assert not list((tmp_path / WORKERS).iterdir())


@pytest.mark.parametrize("workers", [2, 8])
def test_of_many_that_reach_for_a_job_at_once_one_has_it(tmp_path: Path, workers: int) -> None:
    keys = [f"job{number}" for number in range(200)]
    taken: dict[str, list[str]] = {key: [] for key in keys}
    gate = threading.Barrier(workers)

    def reach(own: Leases) -> None:
        gate.wait()
        for key in keys:
            if own.take(key):
                taken[key].append(own.name)

    every = [Leases(tmp_path) for _ in range(workers)]
    for own in every:
        own.__enter__()
    threads = [threading.Thread(target=reach, args=(own,)) for own in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(names) for names in taken.values()} == {1}
    for own in every:
        own.__exit__()


def test_the_lease_of_a_killed_process_on_this_machine_is_free_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    got, name = process.stdout.readline().split()
    assert got == "True"
    with Leases(tmp_path) as own:
        assert not own.take("job")
        process.kill()
        process.wait()
        process.stdout.close()
        assert not own.held("job")
        assert own.take("job")
        assert own.inherited == {"job": f"process {process.pid} on {name.split('@')[1]}"}
    (left,) = leases.workers(tmp_path)
    assert left.dead


def test_who_died_between_its_job_and_its_lease_leaves_no_lease_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    dead = f"worker{durable.mark()}".replace(f"@{os.getpid()}@", "@999999999@")
    with Leases(tmp_path) as living:
        assert living.take("a0")
        for key in ("b0", "c0"):
            (tmp_path / LEASES / key).write_text(dead)
        of_another_machine(tmp_path, "d0")
        for key in ("a0", "b0", "d0"):
            folder = store.folder("craft", key)
            folder.mkdir(parents=True)
            (folder / "receipt.json").write_text("{}")
        store.open()
        # What is not done keeps the name of who died at it; nobody knows whether another machine lives.
        assert sorted(path.name for path in (tmp_path / LEASES).iterdir()) == ["a0", "c0", "d0"]


@pytest.mark.parametrize("beats", [True, False])
def test_a_silent_worker_elsewhere_loses_its_lease_and_a_beating_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    of_another_machine(tmp_path, "job")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    own = Leases(tmp_path, patience=60.0)
    for step in range(1, 30):
        assert own.held("job"), f"after {now[0] - 1000} s"
        if now[0] - 1000 >= 60:
            break
        now[0] += 10
        if beats:
            of_another_machine(tmp_path, "job", beat=1 + step)
    now[0] += 1
    assert own.held("job") is beats
    assert own.take("job") is not beats


@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_clocks_an_hour_apart_change_nothing(tmp_path: Path, shift: float) -> None:
    of_another_machine(tmp_path, "job")
    stamp = time.time() + shift
    for path in (tmp_path / LEASES / "job", tmp_path / WORKERS / FAR):
        os.utime(path, (stamp, stamp))
    with Leases(tmp_path) as own:
        assert own.held("job")
        assert not own.take("job")


@pytest.mark.parametrize("content", ["", "x", "worker@a@b@c", "\0", "worker@elsewhere@7@0-1-2/../../x"])
def test_a_lease_that_says_nothing_of_use_is_waited_for_and_then_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    of_another_machine(tmp_path, "job", None)
    (tmp_path / LEASES / "job").write_text(content)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    own = Leases(tmp_path)
    assert not own.take("job")
    now[0] = leases.PATIENCE + 1
    assert own.take("job")


def test_a_lease_that_another_took_over_first_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both see a dead worker's lease; the second renames away the one that the first has just made.
    of_another_machine(tmp_path, "job")
    first, second = Leases(tmp_path), Leases(tmp_path)
    place = tmp_path / LEASES / "job"
    monkeypatch.setattr(Leases, "_dead", lambda self, owner, key: owner == FAR)
    assert first.take("job")
    assert not second._remove(place, FAR)
    assert place.read_text() == first.name
    assert not second.take("job")


def test_a_worker_whose_lease_was_taken_over_does_not_free_the_new_one(tmp_path: Path) -> None:
    with Leases(tmp_path) as late, Leases(tmp_path) as new:
        assert late.take("job")
        (tmp_path / LEASES / "job").write_text(new.name)
        late.free("job")
        assert (tmp_path / LEASES / "job").read_text() == new.name


def test_a_file_beats_and_says_what_its_worker_says(tmp_path: Path) -> None:
    with Leases(tmp_path, lambda: {"now": "pgd"}, beat=0.01) as own:
        seen = set()
        end = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < end:
            (worker,) = leases.workers(tmp_path)
            seen.add(worker.said.get("beat"))
            assert worker.said.get("now") == "pgd"
            assert (worker.name, worker.dead) == (own.name, False)
        assert len(seen) == 3


def test_a_request_to_stop_reaches_those_at_work_and_none_that_begin_later(tmp_path: Path) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as two:
        assert not one.stopping
        leases.ask_to_stop(tmp_path)
        assert one.stopping
        assert two.stopping
        with Leases(tmp_path) as later:
            assert not later.stopping
            leases.ask_to_stop(tmp_path)
            assert later.stopping


def test_a_worker_s_name_tells_whether_its_process_has_ended() -> None:
    assert durable.ended(f"worker{durable.mark()}") is False
    assert durable.ended(FAR) is None
    assert durable.ended("job") is None
    ended = subprocess.run(
        [sys.executable, "-c", "from bench.results import durable; print('x' + durable.mark())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert durable.ended(ended.stdout.strip()) is True


# --- failures ----------------------------------------------------------------------------------------


def test_a_failure_is_final_for_all_who_were_there_and_for_those_who_help(tmp_path: Path) -> None:
    here, there = Failures(tmp_path, "a", "w1"), Failures(tmp_path, "b", "w2")
    here.fail("job", {"kind": "craft"}, ValueError("no way"))
    for each in (here, there, Failures(tmp_path, "a", "w3")):
        record = each.final("job")
        assert record is not None
        assert (record["type"], record["message"]) == ("ValueError", "no way")
        assert "ValueError" in record["traceback"]
    assert Failures(tmp_path, "c", "w4").final("job") is None, "a new run tries again"


def test_lost_processes_are_counted_over_all_workers_and_anew_in_a_new_run(tmp_path: Path) -> None:
    every = [Failures(tmp_path, "a", f"w{number}") for number in range(TRIES)]
    for number, each in enumerate(every, start=1):
        assert each.died("job", {}, "gone") == number
        assert each.final("job") is None
    every[0].fail("job", {}, RuntimeError("too often"))
    record = every[1].final("job")
    assert record is not None
    assert [each["worker"] for each in record["tries"]] == ["w0", "w1", "w2"]
    assert Failures(tmp_path, "b", "w").died("job", {}, "gone") == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"tries": 3, "final": false}'])
def test_a_damaged_history_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "failed").mkdir()
    there = Failures(tmp_path, "a", "w")
    (tmp_path / "failed" / "job.json").write_text(content)
    assert there.final("job") is None
    assert there.died("job", {}, "gone") == 1


# --- when something goes wrong -------------------------------------------------------------------------


def test_a_lease_that_a_full_disk_cannot_name_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Leases(tmp_path) as own:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                own.take("job")
        assert not (tmp_path / LEASES / "job").exists()
        assert own.take("job")


def test_the_heart_beats_whatever_cannot_be_told(tmp_path: Path) -> None:
    def broken() -> dict[str, str]:
        raise ValueError("no way")

    with Leases(tmp_path, broken, beat=0.01):
        seen, end = set(), time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < end:
            (worker,) = leases.workers(tmp_path)
            seen.add(worker.said.get("beat"))
        assert len(seen) == 3
