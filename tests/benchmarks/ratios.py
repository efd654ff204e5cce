"""Compare measured ratios with recorded ones: ``ratios.py MEASURED.json [--record]``.

Seconds differ from machine to machine and from minute to minute; a ratio inside one run does so much less.
How much, its rounds tell: what is committed is the range over rounds, and a ratio fails where today's median
lies beyond that range by more than `FACTOR`. So a slow moment passes, and work done twice does not.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FACTOR = 1.25
"""How far beyond the recorded range a median may lie."""

RECORDED = Path(__file__).with_name("ratios.json")
"""By name, under ``costs`` (less is better) and ``gains`` (more is better), the least and greatest round."""

_ROUNDS = ", rounds"


def measured(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the rounds of every ratio.

    Args:
        document: What pytest-benchmark wrote.
    """
    return {
        name.removesuffix(_ROUNDS): rounds
        for benchmark in document["benchmarks"]
        for name, rounds in benchmark["extra_info"].items()
        if name.endswith(_ROUNDS)
    }


def verdicts(
    recorded: Mapping[str, Mapping[str, list[float]]], found: Mapping[str, list[float]]
) -> Iterator[tuple[bool, str]]:
    """Yield for each recorded ratio whether it passes, and a sentence.

    Args:
        recorded: What is committed.
        found: The rounds of today; what is not there fails, for nothing was measured.
    """
    for kind, ranges in recorded.items():
        for name, (low, high) in ranges.items():
            rounds = found.get(name) or [math.nan]
            middle = statistics.median(rounds)
            bound = high * FACTOR if kind == "costs" else low / FACTOR
            # Not a number passes no comparison.
            passes = middle <= bound if kind == "costs" else middle >= bound
            side = "at most" if kind == "costs" else "at least"
            yield passes, f"{middle:7.3f}, {side} {bound:.3f} (recorded {low:.3f} to {high:.3f})  {name}"


def main(path: str, *options: str) -> int:
    """Compare or record; return the exit status: 0 passes, 1 slower, 2 a wrong use."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = measured(json.loads(Path(path).read_text(encoding="utf-8")))
    if options == ("--record",):
        ranges = {
            kind: {name: [min(found[name]), max(found[name])] for name in names}
            for kind, names in recorded.items()
        }
        RECORDED.write_text(json.dumps(ranges, indent=1) + "\n", encoding="utf-8")
        return 0
    if options:
        sys.stderr.write(f"unknown option {options[0]}\n")
        return 2
    every = list(verdicts(recorded, found))
    for passes, said in every:
        sys.stdout.write(f"{'held  ' if passes else 'SLOWER'} {said}\n")
    if not every:
        sys.stderr.write("nothing is recorded\n")
    return 0 if every and all(passes for passes, _ in every) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
