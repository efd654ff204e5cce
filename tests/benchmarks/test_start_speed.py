"""What a start costs, over what it costs to import torch, which no attack does without."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from suites import suite

ATTACKS: dict[str, Any] = {
    "clean": {"use": "none"},
    "fgsm": {"use": "fgsm"},
    "pgd": {"use": "pgd", "steps": 2},
}
TASK: dict[str, Any] = {"data": "digits", "threat": {"norm": "linf", "radius": 0.1}}
NET: dict[str, Any] = {"net": {"use": "standard", "net": "b2", "epochs": 1, "batch": 30, "augment": False}}
TABLE: dict[str, Any] = {"title": "T", "rows": ["defense"], "columns": ["attack"]}


def cpu(*words: str, cwd: Path) -> float:
    """Return the CPU seconds of a process, the least of three."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, *words], cwd=cwd, check=True, capture_output=True, timeout=600)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_start_with_nothing_to_do_costs_little_more_than_torch(
    benchmark: Any, tmp_path: Path, command: str
) -> None:
    """2 s of CPU where torch alone takes 1.2; measured 1.4 to 1.6 times torch."""
    path = suite(tmp_path, NET, ATTACKS, [TASK], tables={"t": TABLE})
    given = ("-m", "bench", command, path.name)
    subprocess.run([sys.executable, "-m", "bench", "run", path.name], cwd=tmp_path, check=True, timeout=600)
    torch = cpu("-c", "import torch", cwd=tmp_path)
    whole = benchmark.pedantic(lambda: cpu(*given, cwd=tmp_path), rounds=1)
    benchmark.extra_info["ratio"] = whole / torch
    assert whole / torch < 1.7
