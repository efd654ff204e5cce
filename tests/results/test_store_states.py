"""A results folder as a state machine: random damage between random interruptions ends in the same tables."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from test_damage import EDITS, HARMS, copied, flip, half_trained, small, table

from bench.results import durable, fingerprint
from bench.results.manifest import write
from bench.results.store import Store
from bench.runner import outstanding
from bench.runner.context import WorkerContext
from bench.runner.executors.inline import Inline
from bench.suite import planner, resolve
from suites import Ran, scheduled

SEEN: dict[str, int] = {}
"""How often there was something to be harmed."""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    path = small(tmp_path_factory.mktemp("undisturbed"))
    run = Ran(path)
    write(run.store, run.plan.manifest())
    return path, run.store.root, table(run)


def interrupted(path: Path, root: Path, jobs: int) -> None:
    """Run so many jobs, and stop."""
    crossed, store = planner.make(resolve.load(path)), Store(root)
    store.open()
    context = WorkerContext(
        store.root, crossed.suite.folder, None, "cpu", fingerprint.digests(crossed.modules())
    )
    pool = Inline(context, lambda slot, facts: None, "cpu")
    running = scheduled(outstanding.examine(crossed, store), store, pool)
    for _, done in zip(range(jobs), running, strict=False):
        assert done.error is None, done.error


def machine(path: Path, whole: Path, expected: str) -> type[RuleBasedStateMachine]:
    class Folder(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.root = Path(tempfile.mkdtemp()) / "results"

        def choose(self, what: str, number: int) -> Path | None:
            """Return one of the files (or folders) that a pattern names."""
            found = sorted(each for each in self.root.glob(what) if each.name != "store.json")
            SEEN[what] = SEEN.get(what, 0) + bool(found)
            return found[number % len(found)] if found else None

        @initialize(begun=st.sampled_from(["training", "finished", "half"]), epochs=st.integers(1, 9))
        def begin(self, begun: str, epochs: int) -> None:
            if begun == "training":
                self.stop_in_a_training(epochs)
                return
            copied(whole, self.root)
            if begun == "half":
                shutil.rmtree(self.root / "craft")
                shutil.rmtree(self.root / "evaluate")

        @rule(
            what=st.sampled_from(
                ["partial/*/*", "*/*/*", "*/*/receipt.json", "*/*/job.json", "evaluate/*/*"]
            ),
            number=st.integers(0, 1000),
            harm=st.sampled_from(sorted(HARMS)),
        )
        def damage(self, what: str, number: int, harm: str) -> None:
            file = self.choose(what, number)
            if file is not None and file.is_file():
                HARMS[harm](file)

        @rule(number=st.integers(0, 1000), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
        def bit(self, number: int, share: float, bit: int) -> None:
            file = self.choose("*/*/*", number)
            if file is not None and file.is_file() and file.stat().st_size:
                flip(file, share, 1 << bit)

        @rule(number=st.integers(0, 1000), edit=st.sampled_from(sorted(EDITS)))
        def edit(self, number: int, edit: str) -> None:
            import json

            file = self.choose("*/*/receipt.json", number)
            if file is not None and file.is_file():
                try:
                    receipt = json.loads(file.read_text())
                    EDITS[edit](receipt)
                except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                    return
                file.write_text(json.dumps(receipt))

        @rule(
            kind=st.sampled_from(["train", "craft", "evaluate", "partial"]),
            one=st.integers(0, 1000),
            other=st.integers(0, 1000),
        )
        def swap(self, kind: str, one: int, other: int) -> None:
            first, second = self.choose(f"{kind}/*", one), self.choose(f"{kind}/*", other)
            if first is not None and second is not None and first != second:
                first.rename(self.root / "aside")
                second.rename(first)
                (self.root / "aside").rename(second)

        @rule(
            what=st.sampled_from(["train/*", "craft/*", "evaluate/*", "partial/*", "*"]),
            number=st.integers(0, 1000),
            make=st.sampled_from(["file", "folder", "link", "nothing"]),
        )
        def replace(self, what: str, number: int, make: str) -> None:
            place = self.choose(what, number)
            if place is not None:
                durable.remove(place)
                if make == "file":
                    place.write_text("foreign")
                elif make == "folder":
                    (place / "foreign").mkdir(parents=True)
                elif make == "link":
                    place.symlink_to("nowhere")

        @rule(jobs=st.integers(0, 12))
        def stop_between_jobs(self, jobs: int) -> None:
            interrupted(path, self.root, jobs)

        @rule(epochs=st.integers(1, 9))
        def stop_in_a_training(self, epochs: int) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                half_trained(path, monkeypatch, store=self.root, epochs=epochs)

        @rule(epochs=st.integers(2, 9), number=st.integers(0, 1000), harm=st.sampled_from(sorted(HARMS)))
        def stop_in_a_training_and_damage_it(self, epochs: int, number: int, harm: str) -> None:
            for kind in ("train", "craft", "evaluate"):
                durable.remove(self.root / kind)
            self.stop_in_a_training(epochs)
            self.damage("partial/*/*", number, harm)

        @rule()
        def finish(self) -> None:
            run = Ran(path, self.root)
            assert not run.failed, run.failed
            assert table(run) == expected
            assert not Ran(path, self.root).done

        def teardown(self) -> None:
            self.finish()
            shutil.rmtree(self.root.parent)

    return Folder


def test_any_history_ends_in_the_tables_of_an_undisturbed_run(frozen: tuple[Path, Path, str]) -> None:
    run_state_machine_as_test(
        machine(*frozen),
        settings=settings(
            max_examples=30,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # It is no test of nothing: half-done trainings, receipts and results were there to be harmed.
    assert all(SEEN.get(what) for what in ("partial/*/*", "*/*/receipt.json", "train/*", "evaluate/*"))
