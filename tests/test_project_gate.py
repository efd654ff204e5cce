"""The project's own gates: which outcomes of a check stop a change, and which ratios of speed do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("status", "passes"),
    [(0, True), (5, True), (1, False), (2, False), (3, False), (4, False), (130, False), (137, False)],
)
def test_the_guard_lets_held_and_undecided_pass_and_says_why(tmp_path, status, passes):
    bench = tmp_path / "bench"
    bench.write_text(f'#!/bin/sh\necho "$@"\nexit {status}\n')
    bench.chmod(0o755)
    ran = subprocess.run(
        [ROOT / ".ci" / "guard", "--results", "elsewhere"],
        env={**os.environ, "BENCH": str(bench)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == (0 if passes else status)
    assert ran.stdout.startswith("check tasks.yaml --baseline results/baseline --results elsewhere\n")
    assert "guard: " in (ran.stdout if passes else ran.stderr)


def test_the_guard_fails_where_there_is_no_program():
    ran = subprocess.run(
        [ROOT / ".ci" / "guard"], env={**os.environ, "BENCH": "/none/bench"}, capture_output=True
    )
    assert ran.returncode == 127


@pytest.fixture
def ratios(tmp_path):
    """Return a function that compares planted rounds with planted records."""
    script = Path(shutil.copy(ROOT / "tests" / "benchmarks" / "ratios.py", tmp_path))
    recorded = {"costs": {"ours over bare": [1.0, 1.2]}, "gains": {"theirs over ours": [3.0, 4.0]}}
    (tmp_path / "ratios.json").write_text(json.dumps(recorded))

    def compare(rounds, *options):
        benchmarks = [
            {"extra_info": {name: 0, f"{name}, rounds": each, "ours, seconds": 1e9}}
            for name, each in rounds.items()
        ]
        (tmp_path / "measured.json").write_text(json.dumps({"benchmarks": benchmarks}))
        return subprocess.run(
            [sys.executable, script, tmp_path / "measured.json", *options], capture_output=True, text=True
        )

    return compare


# Bounds: 1.2 * 1.25 = 1.5 and 3 / 1.25 = 2.4, of the median.
@pytest.mark.parametrize(
    ("cost", "gain", "status", "slower"),
    [
        ([1.0, 1.1, 1.2], [3.0, 3.5, 4.0], 0, 0),
        ([1.0, 1.499, 9.0], [0.1, 2.401, 9.0], 0, 0),
        ([1.0, 1.501, 1.6], [3.0, 3.5, 4.0], 1, 1),
        ([1.0, 1.1, 1.2], [1.0, 2.399, 9.0], 1, 1),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 1, 2),
        ([0.1, 0.1, 0.1], [99.0, 99.0, 99.0], 0, 0),
        ([], [3.0], 1, 1),
    ],
)
def test_a_ratio_beyond_its_recorded_range_stops_a_change(ratios, cost, gain, status, slower):
    ran = ratios({"ours over bare": cost, "theirs over ours": gain})
    assert (ran.returncode, ran.stdout.count("SLOWER")) == (status, slower)


def test_a_ratio_that_was_not_measured_stops_a_change(ratios):
    ran = ratios({"ours over bare": [1.0]})
    assert (ran.returncode, ran.stdout.count("SLOWER")) == (1, 1)
    assert ratios({}).returncode == 1


def test_recording_keeps_the_names_and_writes_the_rounds(ratios, tmp_path):
    rounds = {"ours over bare": [1.3, 1.1, 1.2], "theirs over ours": [2.0], "something else": [7.0]}
    assert ratios(rounds, "--record").returncode == 0
    told = json.loads((tmp_path / "ratios.json").read_text())
    assert told == {"costs": {"ours over bare": [1.1, 1.3]}, "gains": {"theirs over ours": [2.0, 2.0]}}


def test_every_recorded_ratio_is_a_positive_range_of_a_benchmark():
    told = json.loads((ROOT / "tests" / "benchmarks" / "ratios.json").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("test_*.py"))
    assert set(told) == {"costs", "gains"}
    for ranges in told.values():
        for name, (low, high) in ranges.items():
            assert f'"{name}"' in sources
            assert 0 < low <= high
