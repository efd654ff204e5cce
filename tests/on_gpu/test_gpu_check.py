"""The script for a machine with a GPU is tried on a CPU, at a tiny size."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch

SCRIPT = Path(gpu_check.__file__)


def ran(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment, check=False)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("gpu")
    return ran(folder, "--device", "cpu", "--tiny", "--minutes", "12"), folder


def test_all_parts_run_and_leave_what_they_found(tried: Any) -> None:
    done, folder = tried
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((folder / "gpu_check.json").read_text())
    assert list(found) == list(gpu_check.PARTS)
    assert not [part for part, told in found.items() if "error" in told]
    assert found["machine"]["reduced"] == []
    assert "passed" in found["tests"]["summary"] or "skipped" in found["tests"]["summary"]
    assert found["slots"]["slots"]["1"]["images_per_second"] > 0
    # A CPU agrees with itself.
    rows = found["verdicts"]["attacks"]
    assert list(rows) == list(gpu_check.ATTACKS)[:3]
    assert {row["agree"] for row in rows.values()} == {1.0}
    assert found["bfloat16"]["times"]["float32 over bf16-search"]["median"] > 0
    assert found["suite"]["finished"]
    assert found["suite"]["done"] == {"train": 1, "craft": 2, "evaluate": 2}


def test_the_report_is_markdown_with_all_parts(tried: Any) -> None:
    done, folder = tried
    text = (folder / "gpu_check.md").read_text()
    assert text == done.stdout
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu_check.PARTS)
    for line in ("| pgd | 8 |", "| fgsm | 8 |"):
        assert line in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for head, rule in pairwise(tables):
        if rule.startswith("| :--"):
            assert head.count("|") == rule.count("|")


def test_what_must_not_be_is_said() -> None:
    row = {"agree": 0.98, "holds": False}
    found = {
        "slots": {"error": "RuntimeError: no"},
        "tests": {"failures": ["FAILED tests/x.py::y"]},
        "verdicts": {"attacks": {"pgd": row, "fgsm": {"agree": 1.0, "holds": True}}},
        "suite": {"failed": 2, "status": 1},
    }
    assert gpu_check.wrong(found) == [
        "slots: RuntimeError: no",
        "tests: 1 failed",
        "verdicts: pgd agrees on 0.98",
        "suite: 2 jobs failed",
        "suite: it ended with status 1",
    ]
    assert gpu_check.wrong({"suite": {"failed": 0, "status": gpu_check.STOPPED}}) == []


def test_every_attack_is_compared_within_a_radius_that_some_stand(tmp_path: Path) -> None:
    """Where everything or nothing breaks, CPU and GPU agree whatever they compute."""
    net, x, y = gpu_check.trained(tiny=False)
    frame = gpu_check.evaluated(net, x[:100], y[:100], "pgd").frame
    assert 20 <= frame["broken"].sum() <= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = ran(tmp_path)
    assert done.returncode == 2
    assert "torch finds no GPU here" in done.stderr
