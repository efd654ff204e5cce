"""Executors are found by name, imported when they are asked for, and refuse what they cannot do."""

import subprocess
import sys
from typing import get_args

import pytest

from bench.errors import InputError
from bench.runner import executors
from bench.runner.executors import EXTRAS, OPTIONS
from bench.runner.executors.protocol import Asked


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("rays", Asked(), "unknown executor 'rays'; did you mean 'ray'"),
        ("process", Asked(workers=2), "--workers goes with --executor slurm or ray, not with process"),
        ("inline", Asked(slots=2), "--slots 2: inline has one slot"),
        ("ray", Asked(slots="auto"), "on Ray expected a number"),
        ("inline", Asked(ray_address="auto"), "--ray-address goes with --executor ray, not with inline"),
        ("ray", Asked(slurm=("partition=gpu",)), "--slurm goes with --executor slurm, not with ray"),
        ("inline", Asked(["cpu", "cpu"]), "--device cpu: it was named before"),
        ("inline", Asked(["cuda:77"]), "--device cuda:77: there is no such device here"),
        ("process", Asked(["cpu", "tpu"]), "--device tpu: there is no such device here"),
    ],
)
def test_what_an_executor_cannot_do_is_said_before_any_work(name: str, given: Asked, part: str) -> None:
    with pytest.raises(InputError, match=part):
        executors.ready(name, given)


def test_the_tables_name_executors_and_options_that_there_are() -> None:
    assert set(EXTRAS) < set(get_args(executors.Name))
    assert set(OPTIONS) < set(Asked._fields)
    assert {name for names in OPTIONS.values() for name in names} <= set(get_args(executors.Name))


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("bench.runner.executors", ("torch", "ray", "submitit")),
        ("bench.runner.executors.process", ("ray", "submitit")),
        # Each worker of an array imports it, to start a process that imports torch.
        ("bench.runner.executors.slurm", ("torch", "ray")),
    ],
)
def test_nothing_is_imported_before_it_is_needed(module: str, without: tuple[str, ...]) -> None:
    pytest.importorskip("submitit")
    code = f"import sys, {module}; sys.exit(' '.join(each for each in {without} if each in sys.modules) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
