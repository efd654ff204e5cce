"""How many jobs share a GPU, by what is measured while they run.

Small networks leave a GPU at a few percent of its time. A device begins with one slot, and gets one more
whenever it was idle for a part of the time and has the memory for it; a job that ran short of memory takes
one away for good.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bench.errors import InputError, out_of_memory

MOST = 8
"""The most slots of a device. More processes spend their time on switching; each also holds the memory of a
CUDA context.
"""

BUSY = 0.85
"""The share of time above which a device counts as busy, so that one more slot would gain little."""

FULL = 0.9
"""The share of a device's memory that all slots together may take."""

SAMPLE = 0.25
"""Seconds between two looks at a device; NVML's own periods are between a sixth of a second and one."""


class Load(NamedTuple):
    """What was seen of a device since it was last asked about."""

    busy: float
    """The mean share of time in which it computed, in [0, 1]."""
    memory: float
    """The highest share of its memory that was taken, in [0, 1]."""


class Meter(Protocol):
    """Measures devices."""

    def load(self, device: str) -> Load | None:
        """Return what was seen of a device since the last call.

        Args:
            device: Its name, as torch has it: ``cuda:0``.

        Returns:
            The load; None where nothing was seen.
        """
        ...

    def begin(self) -> None:
        """Begin to measure."""
        ...

    def close(self) -> None:
        """End the measuring; it may begin again."""
        ...


@dataclass
class _Device:
    slots: list[int]
    open: int = 1
    limit: int = MOST
    ended: int = 0
    """Jobs that ended since the number of slots changed."""


class Occupancy:
    """Decides which slots are open.

    Args:
        devices: The device of each slot. All slots of a GPU but the first begin closed; those of the CPU stay
            open.
        meter: Measures the devices.
    """

    def __init__(self, devices: Sequence[str], meter: Meter) -> None:
        self._meter = meter
        self._devices: dict[str, _Device] = {}
        self._device_of = tuple(devices)
        for slot, device in enumerate(devices):
            self._devices.setdefault(device, _Device([])).slots.append(slot)
        for name, found in self._devices.items():
            if name == "cpu":
                # The cores of a processor are counted, not measured.
                found.open = found.limit = len(found.slots)

    def closed(self) -> list[int]:
        """Return the slots that are closed now."""
        return [slot for device in self._devices.values() for slot in device.slots[device.open :]]

    def ended(self, slot: int, receipt: Mapping[str, Any] | None, error: BaseException | None) -> bool:
        """Learn from a job that ended.

        Args:
            slot: The slot in which it ran.
            receipt: Its receipt; None where it failed.
            error: What it raised; None where it succeeded.

        Returns:
            Whether other slots are open than before.
        """
        device = self._devices[self._device_of[slot]]
        if self._device_of[slot] == "cpu":
            return False
        device.ended += 1
        if _short_of_memory(receipt, error):
            # It would have had the memory with fewer beside it.
            return self._set(slot, device.open - 1, for_good=True)
        if device.ended < device.open:
            # Each slot shall have ended a job under this number, so that the load is that of this number.
            return False
        load = self._meter.load(self._device_of[slot])
        if load is None or load.busy >= BUSY:
            return False
        one = load.memory / device.open
        return load.memory + one <= FULL and self._set(slot, device.open + 1)

    def begin(self) -> None:
        """Begin to measure."""
        self._meter.begin()

    def close(self) -> None:
        """End the measuring; it may begin again, and what was learned stays."""
        self._meter.close()

    def _set(self, slot: int, number: int, *, for_good: bool = False) -> bool:
        device = self._devices[self._device_of[slot]]
        number = max(min(number, device.limit, len(device.slots)), 1)
        if for_good:
            device.limit = number
        changed, device.open, device.ended = number != device.open, number, 0
        # What was seen so far was under another number.
        self._meter.load(self._device_of[slot])
        return changed


def _short_of_memory(receipt: Mapping[str, Any] | None, error: BaseException | None) -> bool:
    """Return whether a job ran short of memory, or had to work in smaller pieces because of it."""
    if isinstance(error, Exception):
        return out_of_memory(error)
    return bool((receipt or {}).get("chunk"))


class Nvml:
    """Measures NVIDIA GPUs by their driver's own library, in a thread; no CUDA context is made.

    Args:
        devices: Names of GPUs: ``cuda:0``, ...

    Raises:
        InputError: The library cannot be loaded, or does not know a device.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        import pynvml  # type: ignore[import-untyped]
        import torch

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = {
                # NVML ignores CUDA_VISIBLE_DEVICES, which torch follows.
                name: pynvml.nvmlDeviceGetHandleByUUID(
                    f"GPU-{torch.cuda.get_device_properties(torch.device(name)).uuid}".encode()
                )
                for name in set(devices)
            }
        except pynvml.NVMLError as error:
            raise InputError(
                f"--slots auto: the GPU cannot be measured ({error}); give a number: --slots 4"
            ) from None
        self._seen: dict[str, list[Load]] = {name: [] for name in self._handles}
        self._lock = threading.Lock()
        self._over: threading.Event | None = None

    def load(self, device: str) -> Load | None:
        """Return what was seen of a GPU since the last call.

        Args:
            device: Its name.

        Returns:
            The load; None where nothing was seen.
        """
        with self._lock:
            seen, self._seen[device] = self._seen[device], []
        if not seen:
            return None
        return Load(sum(each.busy for each in seen) / len(seen), max(each.memory for each in seen))

    def begin(self) -> None:
        """Begin to measure."""
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), daemon=True).start()

    def close(self) -> None:
        """End the measuring; it may begin again."""
        if self._over is not None:
            self._over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(SAMPLE):
            for name, handle in self._handles.items():
                with suppress(self._nvml.NVMLError):
                    busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                    memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                    with self._lock:
                        self._seen[name].append(Load(busy, memory.used / memory.total))
