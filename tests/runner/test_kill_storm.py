"""Kills of random processes of a run, at random moments, change no bit of what it ends with."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from test_cli import crash_suite, living, started

KILLS = int(os.environ.get("BENCH_KILLS", "3"))
"""How many; a storm of 50 takes some minutes: ``BENCH_KILLS=50``."""


def processes(parent: int) -> list[int]:
    """Return a run's process and its workers."""
    found = subprocess.run(
        ["pgrep", "-f", "spawn_main", "-P", str(parent)], capture_output=True, text=True, check=False
    )
    return [parent, *map(int, found.stdout.split())]


def storm(folder: Path, kills: int, draw: random.Random) -> None:
    """Run until all is done, through so many kills."""
    left = kills
    while True:
        process = started(folder)
        while left and process.poll() is None:
            time.sleep(draw.uniform(0.05, 2.5))
            if process.poll() is not None:
                break
            # Every third hits the run itself, the others its workers, where there are any.
            victims = processes(process.pid)
            victim = victims[0] if len(victims) == 1 or not draw.randrange(3) else draw.choice(victims[1:])
            if len(victims) == 1 and draw.randrange(10):
                # It has only just begun: seldom worth a kill.
                continue
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                left -= 1
        out, _ = process.communicate(timeout=300)
        assert process.returncode in (0, 4, -signal.SIGKILL), out
        assert not living(process.pid)
        if process.returncode == 0 and not left:
            return
        if process.returncode == 0:
            # Done before the storm was over: some of it once more.
            for each in draw.sample(sorted(folder.glob("results/suite/*/*/receipt.json")), 10):
                each.unlink()


def test_a_storm_of_kills_changes_no_bit(tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        folder.mkdir()
        crash_suite(folder)
    frozen = started(calm)
    out, _ = frozen.communicate(timeout=300)
    assert frozen.returncode == 0, out
    storm(rough, KILLS, random.Random(KILLS))
    results = [each for each in calm.glob("results/suite/*/*") if each.suffix in (".csv", ".md")]
    results += [
        each for each in calm.glob("results/suite/*/*/*") if each.suffix in (".parquet", ".safetensors")
    ]
    assert len(results) > 30
    for path in results:
        assert path.read_bytes() == (rough / path.relative_to(calm)).read_bytes(), path
    litter = {each.parent.name for each in rough.glob("results/suite/*/*") if each.name.startswith(".")}
    assert not litter
    assert not list(rough.glob("results/suite/scratch/*"))
    assert not list(rough.glob("results/suite/partial/*"))
