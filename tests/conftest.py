"""Shared by all tests: one thread, the registries filled, and real data where a machine has it."""

import os
import signal
from pathlib import Path

import planted  # noqa: F401 - registers itself before the registries close
import published_nets  # noqa: F401 - as does this
import pytest
import second_author  # noqa: F401 - so does this
import torch
import toys  # noqa: F401 - and this

from bench.registry import discover

# A shell that runs the tests in the background makes them, and all that they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
discover()

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return a folder with real data sets; skip where there is none."""
    for place in (os.environ.get("BENCH_DATA"), REPOSITORY.parent / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no data here: set BENCH_DATA to a folder with mnist/, cifar10-jpeg/, fashion-sprite/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
