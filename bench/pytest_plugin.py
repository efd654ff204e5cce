"""A plugin of pytest: with ``--robustness-baseline`` every subject of a baseline is a test.

It is loaded wherever pytest runs beside Crossfire, and imports nothing heavy unless it is asked for. One
check answers all its tests: the first one runs it, and the others read what it found, in other processes
of pytest-xdist, too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from bench.gate.baseline import Baseline
    from bench.gate.verdicts import Check, Finding

Outcome: TypeAlias = Literal["passed", "failed", "error", "advisory"]
"""What becomes of a test: ``error`` where nothing is known, ``advisory`` where the loss decides nothing."""

_OTHERS = ("suite", "results", "data_root", "replay", "fail_on_gain")
_FOLDER = "robustness_folder"
_UNKNOWN = "not comparable: the check says nothing of it"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options.

    Args:
        parser: That of pytest.
    """
    group = parser.getgroup("robustness", "robustness, by Crossfire")
    group.addoption("--robustness-baseline", metavar="DIR", help="check robustness against this baseline")
    group.addoption(
        "--robustness-suite", metavar="FILE", help="the task file (default: of the name in the baseline)"
    )
    group.addoption(
        "--robustness-results",
        metavar="DIR",
        help="the results folder (the task file's `results:`, else results/<suite>)",
    )
    group.addoption("--robustness-data-root", metavar="DIR", help="where data sets lie")
    group.addoption(
        "--robustness-replay", action="store_true", help="show the stored images alone: no attack"
    )
    group.addoption(
        "--robustness-fail-on-gain", action="store_true", help="a gain that is too good fails its test"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin where a baseline is given.

    Args:
        config: The configuration of pytest.

    Raises:
        UsageError: The baseline cannot be used, there is no task file, or other options stand alone.
    """
    if config.getoption("robustness_baseline") is not None:
        config.pluginmanager.register(Gate(config), "crossfire-gate")
    elif alone := [each for each in _OTHERS if config.getoption(f"robustness_{each}")]:
        named = f"--robustness-{alone[0].replace('_', '-')}"
        raise pytest.UsageError(f"{named}: checks nothing without a baseline: --robustness-baseline DIR")


class Answers(NamedTuple):
    """What a check found, as its tests read it."""

    tests: dict[str, tuple[Outcome, str]]
    """By the name of a subject, what becomes of its test, and what is said."""
    summary: list[str]
    """Lines for the end of the report."""
    error: str | None
    """Why there was no check; None where there was one."""


class Gate:
    """The check of one run of pytest.

    Args:
        config: The configuration of pytest.
    """

    def __init__(self, config: pytest.Config) -> None:
        here = config.invocation_params.dir

        def path(name: str) -> Path | None:
            value = config.getoption(f"robustness_{name}")
            return None if value is None else here / value

        root = path("baseline")
        assert root is not None
        self.root, self.data_root = root, path("data_root")
        self.replay = bool(config.getoption("robustness_replay"))
        self.fail_on_gain = bool(config.getoption("robustness_fail_on_gain"))
        baseline = self._read()
        self.index = root / "baseline.json"
        self.names = list(dict.fromkeys(_names(baseline, replay=self.replay)))
        self.suite = path("suite") or here / baseline.suite
        self.results = path("results")
        if not self.names:
            raise pytest.UsageError(f"{root}: no stored image in it; check without --robustness-replay")
        if not self.suite.is_file():
            raise pytest.UsageError(f"{self.suite}: no such file; name the task file by --robustness-suite")
        # A worker of pytest-xdist shares the folder of the process that started it.
        given = getattr(config, "workerinput", {}).get(_FOLDER)
        self.worker = given is not None
        self.folder = Path(given or tempfile.mkdtemp(prefix="crossfire-"))
        asked = [(here / each.partition("::")[0]).resolve() for each in config.args]
        if self.index.resolve() not in asked:
            config.args.append(str(self.index))

    def _read(self) -> Baseline:
        from bench.errors import InputError
        from bench.gate import baseline

        try:
            return baseline.read(self.root, replays=self.replay)
        except InputError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist where the answers lie.

        Args:
            node: The worker.
        """
        node.workerinput[_FOLDER] = str(self.folder)

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Collect the index of the baseline.

        Args:
            file_path: Any file that pytest looks at.
            parent: The collector of its folder.

        Returns:
            The collector of the subjects; None for any other file.
        """
        if file_path.resolve() != self.index.resolve():
            return None
        made: pytest.Collector = Subjects.from_parent(parent, path=file_path, gate=self)
        return made

    def answers(self) -> Answers:
        """Return what the check found, which the first to ask runs.

        Returns:
            The answers.
        """
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "answers.json"
        with FileLock(self.folder / "lock"):
            if not kept.exists():
                kept.write_text(json.dumps(self._checked()), encoding="utf-8")
        return Answers(*json.loads(kept.read_text(encoding="utf-8")))

    def _checked(self) -> Answers:
        from bench.errors import BenchError

        try:
            check = self._check()
        except (BenchError, OSError) as error:
            return Answers({}, [f"no check: {error}"], str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, every test has to say so
            story = "".join(traceback.format_exception(error))
            return Answers({}, [f"no check: {type(error).__name__}: {error}"], story)
        return heard(answers_of(check, fail_on_gain=self.fail_on_gain), self.names)

    def _check(self) -> Check:
        from bench.api import as_a_program, checking, running
        from bench.runner import executors
        from bench.runner.executors.protocol import Asked

        results = None if self.results is None else _near(self.results)
        project = running.planned(_near(self.suite), results, self.data_root)
        project.store.open()
        options = running.Options(executors.ready("process", Asked()), data_root=self.data_root)
        with as_a_program():
            return checking.check(project, _near(self.root), options, replay_only=self.replay)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what the check found.

        Args:
            terminalreporter: That of pytest.
        """
        kept = self.folder / "answers.json"
        if kept.is_file():
            terminalreporter.section("robustness")
            for line in Answers(*json.loads(kept.read_text(encoding="utf-8"))).summary:
                terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        """Remove what the processes of this run shared."""
        if not self.worker:
            shutil.rmtree(self.folder, ignore_errors=True)


class Subjects(pytest.File):
    """A baseline, whose tests are its subjects.

    Args:
        gate: The check.
        **rest: What any collector of a file takes.
    """

    def __init__(self, *, gate: Gate, **rest: Any) -> None:
        super().__init__(**rest)
        self.gate = gate

    def collect(self) -> Iterable[pytest.Item]:
        """Yield the tests, in the order of the baseline.

        Yields:
            A test for each subject.
        """
        for name in self.gate.names:
            item = Held.from_parent(self, name=name, gate=self.gate)
            if self.config.pluginmanager.hasplugin("xdist"):
                # With --dist loadgroup the other workers need not wait for the check.
                item.add_marker(pytest.mark.xdist_group("robustness"))
            yield item


class Held(pytest.Item):
    """The test that a subject is held.

    Args:
        gate: The check.
        **rest: What any item takes.
    """

    def __init__(self, *, gate: Gate, **rest: Any) -> None:
        super().__init__(**rest)
        self.gate = gate
        self.answer: tuple[Outcome, str] = ("error", _UNKNOWN)

    def setup(self) -> None:
        """Learn what the check found; nothing known is an error, which is no failure of the model.

        Raises:
            _Said: There was no check, or nothing could be compared.
        """
        found = self.gate.answers()
        if found.error is not None:
            raise _Said(found.error)
        self.answer = found.tests.get(self.name, self.answer)
        if self.answer[0] == "error":
            raise _Said(self.answer[1])

    def runtest(self) -> None:
        """Fail where the subject is not held.

        Raises:
            _Said: It is not.
        """
        outcome, said = self.answer
        if outcome == "advisory":
            # With --runxfail this returns, and the test fails like any other.
            pytest.xfail(said.partition("\n")[0])
        if outcome != "passed":
            raise _Said(said)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Write what was found, without a traceback.

        Args:
            excinfo: The error.
            style: That of tracebacks, for any other error.

        Returns:
            The text.
        """
        if isinstance(excinfo.value, _Said):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return the baseline and the subject, for the heading of a failure.

        Returns:
            The file, no line, and the heading.
        """
        # Not the name alone, in which pytest would take the radius's point for one between names.
        return self.path, None, f"robustness of {self.name}"


class _Said(Exception):
    """What was found of a subject that is not held."""


def _near(path: Path) -> Path:
    """Return a path as a person in this folder would write it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _names(baseline: Baseline, *, replay: bool) -> Iterator[str]:
    """Yield the names of what a check of a baseline has findings of."""
    from bench.gate.judge import subjects_of, worst_case_of

    measurements = baseline.measurements
    if not replay:
        found = subjects_of(measurements, measurements)
        for subject in (*found.pairs, *found.blocked):
            yield subject.name
        return
    every = [each.condition for each in measurements.measured.values()]
    for run in baseline.runs:
        for number in run.conditions:
            # How far a stored image lies says nothing of the least distance today.
            if every[number].radius is not None:
                yield worst_case_of(every[number]).name


def answers_of(check: Check, *, fail_on_gain: bool = False) -> Answers:
    """Return what becomes of each test.

    Args:
        check: The check.
        fail_on_gain: Whether a suspicious gain counts as a regression.

    Returns:
        The answers. Where nothing critical was compared every test is an error, so that none is green.
    """
    from bench.gate.render import phrases
    from bench.gate.render.junit import body

    critical = any(each.tier == "critical" for each in check.findings)
    tests: dict[str, tuple[Outcome, str]] = {}
    for finding in check.findings:
        outcome = _outcome(finding, fail_on_gain=fail_on_gain) if critical else "error"
        reason = finding.reason if finding.verdict != "held" else "; ".join(finding.suspicious)
        head = f"{finding.verdict}: {phrases.brief(reason)}" if critical else f"incomplete: {phrases.NOTHING}"
        said = f"{head}\n{body(finding, phrases.facts(finding, check))}"
        known = tests.get(finding.subject.name)
        # Names in words may run together: then one test answers for both, by the worse.
        if known is None or _WORST.index(outcome) < _WORST.index(known[0]):
            tests[finding.subject.name] = (outcome, said)
    summary = [phrases.headline(check, fail_on_gain=fail_on_gain), phrases.setting(check)]
    summary += [phrases.REPLAY_ONLY] if check.replay_only else []
    if check.replayed is not None:
        summary += phrases.replay(check.replayed)
        some, more = phrases.first(check.replayed.flips)
        lines = [phrases.FLIP_HEADS, *map(phrases.flip_cells, some)] if some else []
        summary += [*(f"  {' | '.join(each)}" for each in lines), *filter(None, [more])]
    summary += [
        f"warning: {phrases.brief(finding.subject.name)}: {phrases.brief(each)}"
        for finding, each in phrases.warnings(check)
    ]
    summary += [*map(phrases.brief, check.notes), phrases.next_step(check, fail_on_gain=fail_on_gain)]
    return Answers(tests, summary, None)


def heard(found: Answers, names: Collection[str]) -> Answers:
    """Return answers of which no bad one goes unheard, because no test has its name.

    Args:
        found: The answers.
        names: The names of the tests.

    Returns:
        The answers; where a finding that no test stands for is not held, every test that would pass is an
        error that says so.
    """
    bad = [
        said for name, (outcome, said) in found.tests.items() if name not in names and outcome in _WORST[:2]
    ]
    if not bad:
        return found
    error: tuple[Outcome, str] = ("error", bad[0])
    tests = {name: error if each[0] == "passed" else each for name, each in found.tests.items()}
    return found._replace(tests=tests)


_WORST: tuple[Outcome, ...] = ("failed", "error", "advisory", "passed")


def _outcome(finding: Finding, *, fail_on_gain: bool) -> Outcome:
    if finding.verdict == "held":
        failed = fail_on_gain and finding.suspicious and finding.tier == "critical"
        return "failed" if failed else "passed"
    if finding.tier == "advisory":
        return "advisory"
    return "failed" if finding.verdict in ("regressed", "undecided") else "error"
