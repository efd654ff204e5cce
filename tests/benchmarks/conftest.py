"""Speed as ratios inside one run: contenders take turns, so that a slow moment of the machine hits all.

Sizes are counted, not timed.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from bench.protocols import Shape
from bench.registry import DEFENSES
from bench.runner.context import keep_buffers

Race = Callable[..., dict[str, float]]

LINES = pytest.StashKey[list[str]]()


def interleaved(
    contenders: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Run every contender once and return the seconds of each."""
    seconds = {}
    for name, run in contenders.items():
        begun = clock()
        run()
        seconds[name] = clock() - begun
    return seconds


@pytest.fixture(scope="session", autouse=True)
def _as_a_run_does() -> None:
    """Keep freed buffers, for all contenders: otherwise memory that is cleared anew decides many a race."""
    keep_buffers()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Return net B.2 with fresh weights: its passes cost what a trained one's cost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DEFENSES["cnn"].make(Shape(1, 28, 28, 10))
    network: nn.Module = model.network.eval().requires_grad_(False)
    return network


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Race:
    """Return a function that races contenders and returns the ratios that were asked for.

    ``race(contenders, rounds=5, over={"ratio's name": ("numerator", "denominator")})``: each ratio is the
    median over rounds of a round's own ratio. They are kept in `extra_info` and printed at the end.
    """

    def run(
        contenders: Mapping[str, Callable[[], object]],
        *,
        over: Mapping[str, tuple[str, str]],
        rounds: int = 5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, float]:
        turns: list[dict[str, float]] = []
        benchmark.pedantic(
            lambda: turns.append(interleaved(contenders, clock)), rounds=rounds, iterations=1, warmup_rounds=1
        )
        turns = turns[1:]  # The first was the warm-up.
        ratios = {
            name: statistics.median(turn[above] / turn[below] for turn in turns)
            for name, (above, below) in over.items()
        }
        for name, ratio in ratios.items():
            spread = sorted(turn[over[name][0]] / turn[over[name][1]] for turn in turns)
            benchmark.extra_info[name] = round(ratio, 3)
            benchmark.extra_info[f"{name}, rounds"] = [round(each, 3) for each in spread]
            line = f"{ratio:7.3f}  ({spread[0]:.3f} to {spread[-1]:.3f})  {name}"
            request.config.stash.setdefault(LINES, []).append(line)
        for name in contenders:
            benchmark.extra_info[f"{name}, seconds"] = round(
                statistics.median(turn[name] for turn in turns), 4
            )
        return ratios

    return run


@pytest.fixture
def memory(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that keeps and prints sizes: ``memory({"what": bytes})``."""

    def note(sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            benchmark.extra_info[f"{name}, MiB"] = round(size / 2**20, 1)
            line = f"{size / 2**20:7.1f} MiB  {name}"
            request.config.stash.setdefault(LINES, []).append(line)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(LINES, []):
        terminalreporter.section("ratios: median of rounds (least to most); sizes")
        for line in lines:
            terminalreporter.write_line(line)
