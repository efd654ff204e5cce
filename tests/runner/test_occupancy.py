"""How many jobs share a GPU, on simulated devices: `Placement` and `Occupancy` as a run uses them."""

import heapq
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench.errors import InputError
from bench.runner.executors import devices
from bench.runner.executors.protocol import Asked, slots_asked
from bench.runner.occupancy import BUSY, FULL, MOST, Load, Occupancy
from bench.runner.placement import Placement


@dataclass(frozen=True)
class Toy:
    key: str


class Same:
    learned = 0

    def seconds(self, job: Any, device: str | None = None) -> float:
        return 1.0


@dataclass
class Gpu:
    """A device on which each job computes for a share of its time and takes a share of the memory."""

    busy: float
    memory: float
    running: int = 0
    peak: int = 0
    seen: list[Load] = field(default_factory=list)

    def load(self) -> Load:
        return Load(min(self.busy * self.running, 1.0), min(self.memory * self.running, 1.0))

    def seconds(self) -> float:
        """Return what a job takes beside the others: they share the device's time."""
        return max(self.busy * self.running, 1.0)


class Meter:
    def __init__(self, gpus: dict[str, Gpu]) -> None:
        self.gpus, self.closed = gpus, False

    def load(self, device: str) -> Load | None:
        seen, self.gpus[device].seen = self.gpus[device].seen, []
        if not seen:
            return None
        return Load(sum(each.busy for each in seen) / len(seen), max(each.memory for each in seen))

    def begin(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def played(gpus: dict[str, Gpu], jobs: int = 200) -> tuple[Occupancy, float]:
    """Run so many equal jobs; return what was decided, and the seconds that all took."""
    devices = [name for name in gpus for _ in range(MOST)]
    now, running, number = 0.0, [], 0
    todo = {Toy(f"j{number:04}"): () for number in range(jobs)}
    placement = Placement(todo, Same(), devices, clock=lambda: now)
    occupancy = Occupancy(devices, Meter(gpus))
    placement.close(occupancy.closed())
    for job in todo:
        placement.push(job)
    while True:
        while (chosen := placement.pop()) is not None:
            gpu = gpus[devices[chosen[1]]]
            gpu.running += 1
            gpu.peak = max(gpu.peak, gpu.running)
            number += 1
            short = gpu.memory * gpu.running > 1.0
            heapq.heappush(running, (now + gpu.seconds(), number, chosen[1], short))
        if not running:
            return occupancy, now
        ended, _, slot, short = heapq.heappop(running)
        for each in gpus.values():
            # As the thread that measures does: at equal distances of time.
            each.seen += [each.load()] * round((ended - now) / 0.05)
        now, gpu = ended, gpus[devices[slot]]
        gpu.running -= 1
        placement.free(slot)
        if occupancy.ended(slot, {"chunk": 64 if short else None}, None):
            placement.close(occupancy.closed())


def opened(occupancy: Occupancy, slots: int) -> int:
    return slots - len(occupancy.closed())


@pytest.mark.parametrize(
    ("busy", "memory", "slots"),
    [
        # 0.1 of the time each: memory and the upper bound decide.
        (0.1, 0.01, MOST),
        (0.1, 0.2, 4),  # 5 would take all of the memory
        (0.1, 0.5, 1),
        # Slots are added until the device is busy: the first number with busy * n >= BUSY.
        (0.3, 0.01, 3),
        (0.5, 0.01, 2),
        (0.9, 0.01, 1),
    ],
)
def test_a_device_gets_as_many_slots_as_it_has_time_and_memory_for(
    busy: float, memory: float, slots: int
) -> None:
    gpu = Gpu(busy, memory)
    # At the end there is less work than slots, so that it is not looked at how many are open then.
    played({"cuda:0": gpu})
    assert gpu.peak == slots
    assert slots == 1 or busy * (slots - 1) < BUSY
    assert memory * slots <= FULL


def test_devices_are_judged_apart() -> None:
    gpus = {"cuda:0": Gpu(0.1, 0.01), "cuda:1": Gpu(0.9, 0.01)}
    played(gpus)
    assert (gpus["cuda:0"].peak, gpus["cuda:1"].peak) == (MOST, 1)


def test_small_networks_gain_what_the_device_has_left() -> None:
    one, _ = 200 * 1.0, None
    _, seconds = played({"cuda:0": Gpu(0.1, 0.01)})
    # Eight at once, after a few jobs with fewer.
    assert one / MOST < seconds < one / MOST + 15


def test_a_job_that_ran_short_of_memory_takes_a_slot_away_for_good() -> None:
    class Surprise(Gpu):
        """Looks small for thirty jobs, and is large afterwards."""

        count = 0

        def seconds(self) -> float:
            self.count += 1
            self.memory = 0.05 if self.count < 150 else 0.3
            return super().seconds()

    gpu = Surprise(0.05, 0.05)
    occupancy, _ = played({"cuda:0": gpu}, 400)
    assert gpu.peak == MOST
    assert opened(occupancy, MOST) <= 3
    before = opened(occupancy, MOST)
    for _ in range(50):
        occupancy.ended(0, {}, None)
    assert opened(occupancy, MOST) == before


def test_an_error_of_memory_counts_and_any_other_does_not() -> None:
    gpu = Gpu(0.05, 0.01)
    occupancy, _ = played({"cuda:0": gpu})
    assert opened(occupancy, MOST) == MOST
    assert not occupancy.ended(0, None, ValueError("no way"))
    assert occupancy.ended(0, None, RuntimeError("CUDA error: out of memory"))
    assert opened(occupancy, MOST) == MOST - 1
    for _ in range(2 * MOST):
        occupancy.ended(0, None, MemoryError())
    assert opened(occupancy, MOST) == 1, "one slot is always left"


def test_nothing_is_decided_where_nothing_was_measured() -> None:
    occupancy = Occupancy(["cuda:0"] * MOST, Meter({"cuda:0": Gpu(0.1, 0.1)}))
    for _ in range(10):
        assert not occupancy.ended(0, {}, None)
    assert opened(occupancy, MOST) == 1


# --- what a user asks for ------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "slots"), [(None, None), ("auto", "auto"), ("1", 1), ("256", 256)])
def test_a_number_of_slots_is_read(text: str | None, slots: Any) -> None:
    assert slots_asked(text) == slots


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "", "257", "²", "1e2"])
def test_what_is_no_number_of_slots_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected auto, or a whole number from 1 to 256"):
        slots_asked(text)


def test_each_device_has_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "free_cores", lambda: 3)
    assert devices.slots(Asked()) == ("cuda:0", "cuda:1")
    assert devices.slots(Asked(None, 2)) == ("cuda:0", "cuda:0", "cuda:1", "cuda:1")
    assert devices.slots(Asked(["cuda:1", "cpu"])) == ("cuda:1", "cpu", "cpu", "cpu")
    assert devices.slots(Asked(["cuda"], "auto")) == ("cuda:0",) * MOST
    with pytest.raises(InputError, match="named before; --slots 2 lets two jobs share it"):
        devices.slots(Asked(["cuda:0", "cuda"]))
    with pytest.raises(InputError, match="cuda:9: there is no such device here"):
        devices.slots(Asked(["cuda:9"]))


def test_the_cores_of_a_processor_are_counted_and_not_measured() -> None:
    gpu = Gpu(0.1, 0.01)
    occupancy = Occupancy(["cpu", "cpu", *["cuda:0"] * MOST], Meter({"cuda:0": gpu}))
    assert occupancy.closed() == list(range(3, 2 + MOST))
    assert not occupancy.ended(0, None, MemoryError())
    assert occupancy.closed() == list(range(3, 2 + MOST))
