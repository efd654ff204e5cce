"""Everything that needs a GPU, in less than ten minutes: ``python tests/on_gpu/gpu_check.py --out FOLDER``.

The tests marked `gpu`; throughput, utilisation and memory with 1, 2, 4 and 8 processes on one GPU; whether
CPU and GPU agree, attack by attack; the search in bfloat16 against float32; how often the host waits in a
step of PGD; whether channels_last and torch.compile help; and `tasks.yaml` in the time that is left. Each
part has a share of the time, leaves out what does not fit, and says so. ``gpu_check.json`` and
``gpu_check.md`` are written after each part, so that a script that is ended early leaves what it has.
``--device cpu --tiny`` tries the script itself.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bench
from bench.referee.precision import in_bfloat16, reduced
from bench.runner.context import device_name, settle

REPOSITORY = Path(__file__).resolve().parents[2]
AGREEMENT = 0.99
"""The least share of verdicts in which a CPU and a GPU must agree, and bfloat16 and float32."""

ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {"use": "fgsm"},
    "pgd": {"use": "pgd", "steps": 20},
    "apgd": {"use": "apgd", "steps": 20},
    "apgd-t": {"use": "apgd-t", "steps": 10, "classes": 3},
    "fast-worst": {"use": "fast-worst"},
    "square": {"use": "square", "queries": 200},
    "spsa": {"use": "spsa", "steps": 5, "samples": 32},
    "cw-linf": {"use": "cw-linf"},
    "fab": {"use": "fab", "steps": 20},
    "deepfool": {"use": "deepfool"},
    "cw-l2": {"use": "cw-l2", "steps": 30},
    "boundary": {"use": "boundary", "steps": 150},
    "nes": {"use": "nes"},
    "jsma": {"use": "jsma"},
}
"""What is compared, the cheap and the usual first; settings are short, since verdicts are only compared."""

BY_DECISION = frozenset({"boundary"})
NORMS = {"deepfool": "l2", "cw-l2": "l2", "boundary": "l2", "nes": "l2", "jsma": "l0"}
RADII = {"linf": 0.1, "l2": 0.6, "l0": 2.0}


def note(text: str) -> None:
    """Say something on the terminal at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@dataclass
class Check:
    """The state of a run of this script."""

    device: torch.device
    out: Path
    tiny: bool
    end: float
    """When all must be over, by the monotonic clock."""
    found: dict[str, Any] = field(default_factory=dict)
    """What each part found, by its name."""

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - time.monotonic()

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize(self.device)


# --- networks and images ------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two convolutions and a linear layer, for digits of 8x8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        answer: Tensor = self.layers(x)
        return answer


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn: images (1797, 1, 8, 8) in [0, 1], and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target, dtype=torch.int64)


def trained(tiny: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network that was trained on the CPU for seconds, and test images with their labels."""
    x, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Small(4 if tiny else 16)
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(2 if tiny else 12):
            for rows in torch.randperm(1200).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
    return net.eval(), x[1200:], y[1200:]


def wide(tiny: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a ResNet-18 for 32x32 images with fresh weights, images, and its own answers as labels."""
    from bench.protocols import Shape
    from defenses.nets.resnet import ResNet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ResNet18(Shape(3, 32, 32, 10), width=0.125 if tiny else 1.0).eval()
        x = torch.rand(4 if tiny else 512, 3, 32, 32)
    with torch.no_grad():
        y = torch.cat([net(part).argmax(1) for part in x[:32].split(16)])
    # Where nothing is dropped, labels decide no time.
    return net, x, y.repeat(-(-len(x) // len(y)))[: len(x)]


def evaluated(net: nn.Module, x: Tensor, y: Tensor, name: str, **more: Any) -> Any:
    """Attack a network on its device with one of `ATTACKS`."""
    norm: Any = NORMS.get(name, "linf")
    view = "decision:label" if name in BY_DECISION else None
    attack = {**ATTACKS[name], **more}
    return bench.evaluate(net, x, y, attack=attack, norm=norm, radius=RADII[norm], view=view, batch=4096)


# --- parts --------------------------------------------------------------------------------------------------


def machine(check: Check, limit: float) -> dict[str, Any]:
    """Return what everything runs on, and whether products of float32 are in full."""
    settle(check.device)
    found: dict[str, Any] = {
        "device": device_name(str(check.device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "reduced": reduced(),
    }
    if check.gpu:
        found["memory_gib"] = round(torch.cuda.get_device_properties(check.device).total_memory / 2**30, 1)
    if found["reduced"]:
        raise AssertionError(f"float32 is reduced: {found['reduced']}")
    return found


def tests(check: Check, limit: float) -> dict[str, Any]:
    """Run the tests that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n0", "--no-header", "-rfE"]
    # Each of them is skipped without a GPU.
    command += ["tests/test_noise.py"] if check.tiny else ["tests"]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {
        "status": done.returncode,
        "summary": lines[-1] if lines else done.stderr[-500:],
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(time.monotonic() - begun, 1),
    }


@contextmanager
def metered(check: Check) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield what tells utilisation and memory of the GPU since it was last called; nothing on a CPU."""
    if not check.gpu:
        yield dict
        return
    from bench.runner.occupancy import Nvml

    name = str(check.device)
    meter = Nvml([name])
    meter.begin()
    try:

        def told() -> dict[str, Any]:
            load = meter.load(name)
            return {} if load is None else {"busy": round(load.busy, 3), "memory": round(load.memory, 4)}

        yield told
    finally:
        meter.close()


def serve(device: str, tiny: bool, started: Any, go: Any, results: Any, seconds: float) -> None:
    """Attack the same images again and again in a process of its own, as a slot does; count them."""
    net, x, y = trained(tiny)
    net, n = net.to(device), 32 if tiny else len(x)
    x, y = x[:n].to(device), y[:n].to(device)
    evaluated(net, x, y, "pgd", drop=False)
    started.put(os.getpid())
    go.wait()
    begun, images = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        evaluated(net, x, y, "pgd", drop=False)
        images += n
    results.put(images / (time.monotonic() - begun))


def slots(check: Check, limit: float) -> dict[str, Any]:
    """Measure throughput, utilisation and memory with several processes on the device."""
    spawn, begun = multiprocessing.get_context("spawn"), time.monotonic()
    seconds = 0.5 if check.tiny else 7.0
    found: dict[str, Any] = {"what": "20 steps of PGD, nothing dropped, small network of digits", "slots": {}}
    took = 0.0
    for count in (1, 2) if check.tiny else (1, 2, 4, 8):
        if time.monotonic() - begun + 1.3 * took > limit:
            found["left_out"] = f"{count} slots and more: no time"
            break
        turn = time.monotonic()
        started, results, go = spawn.Queue(), spawn.Queue(), spawn.Event()
        arguments = (str(check.device), check.tiny, started, go, results, seconds)
        workers = [spawn.Process(target=serve, args=arguments, daemon=True) for _ in range(count)]
        try:
            for each in workers:
                each.start()
            for _ in workers:
                started.get(timeout=max(limit - (time.monotonic() - begun), 1))
            with metered(check) as told:
                go.set()
                rates = [results.get(timeout=seconds + 30) for _ in workers]
                load = told()
        except queue.Empty:
            found["left_out"] = f"{count} slots and more: they did not start in time"
            break
        finally:
            for each in workers:
                each.join(timeout=5)
                if each.is_alive():
                    each.kill()
        found["slots"][str(count)] = {"images_per_second": round(sum(rates), 1), **load}
        took = time.monotonic() - turn
    return found


def verdicts(check: Check, limit: float) -> dict[str, Any]:
    """Compare the verdicts of the CPU with those of the device, attack by attack."""
    begun = time.monotonic()
    net, x, y = trained(check.tiny)
    n = 8 if check.tiny else 200
    x, y = x[:n], y[:n]
    other, rows, left = copy.deepcopy(net).to(check.device), {}, []
    for name in list(ATTACKS)[:3] if check.tiny else ATTACKS:
        if time.monotonic() - begun > limit:
            left.append(name)
            continue
        turn = time.monotonic()
        here = evaluated(net, x, y, name).frame
        middle = time.monotonic()
        there = evaluated(other, x.to(check.device), y.to(check.device), name).frame
        same = float((here["broken"] == there["broken"]).mean())
        rows[name] = {
            "n": n,
            "broken_cpu": int(here["broken"].sum()),
            "broken_device": int(there["broken"].sum()),
            "agree": round(same, 4),
            "holds": same >= AGREEMENT,
            "seconds_cpu": round(middle - turn, 2),
            "seconds_device": round(time.monotonic() - middle, 2),
        }
    return {"attacks": rows, "left_out": left}


def bfloat16(check: Check, limit: float) -> dict[str, Any]:
    """Compare a search in bfloat16 with one in float32: verdicts of a small network, times of a large one."""
    begun = time.monotonic()
    net, x, y = trained(check.tiny)
    n = 8 if check.tiny else len(x)
    net, x, y = net.to(check.device), x[:n].to(check.device), y[:n].to(check.device)
    found: dict[str, Any] = {"attacks": {}, "times": {}}
    for name in list(ATTACKS)[:2] if check.tiny else [each for each in ATTACKS if each not in BY_DECISION]:
        if time.monotonic() - begun > limit / 2:
            found.setdefault("left_out", []).append(name)
            continue
        row: dict[str, Any] = {"n": n}
        frames = {}
        for precision in ("float32", "bf16-search"):
            turn = time.monotonic()
            frames[precision] = evaluated(net, x, y, name, precision=precision).frame
            row[f"seconds {precision}"] = round(time.monotonic() - turn, 2)
            row[f"broken {precision}"] = int(frames[precision]["broken"].sum())
        same = float((frames["float32"]["broken"] == frames["bf16-search"]["broken"]).mean())
        found["attacks"][name] = {**row, "agree": round(same, 4), "holds": same >= AGREEMENT}
    large, x, y = wide(check.tiny)
    large, x, y = large.to(check.device), x.to(check.device), y.to(check.device)
    pairs = []
    for turn_number in range(2 if check.tiny else 5):
        if turn_number > 1 and time.monotonic() - begun > limit:
            break
        seconds = {}
        for precision in ("float32", "bf16-search"):
            check.wait()
            turn = time.monotonic()
            evaluated(large, x, y, "pgd", drop=False, steps=2 if check.tiny else 20, precision=precision)
            seconds[precision] = time.monotonic() - turn
        pairs.append(seconds)
    # The first is the warm-up.
    ratios = [each["float32"] / each["bf16-search"] for each in pairs[1:]]
    found["times"] = {"network": "ResNet-18, 32x32", "n": len(x), "float32 over bf16-search": spread(ratios)}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of values, the least and the greatest."""
    return {
        name: round(value, 3)
        for name, value in (
            ("median", statistics.median(values)),
            ("least", min(values)),
            ("greatest", max(values)),
        )
    }


def waits(check: Check, limit: float) -> dict[str, Any]:
    """Count how often the host waits for the device in a step of PGD."""
    net, x, y = trained(check.tiny)
    n = 8 if check.tiny else 256
    net, x, y = net.to(check.device), x[:n].to(check.device), y[:n].to(check.device)
    found: dict[str, Any] = {}
    for drop in (True, False):
        for precision in ("float32", "bf16-search"):
            counts = {}
            for steps in (10, 20):
                # What happens once must have happened.
                evaluated(net, x, y, "pgd", steps=steps, drop=drop, precision=precision)
                counts[steps] = waited(
                    check,
                    lambda steps=steps, drop=drop, precision=precision: evaluated(  # type: ignore[misc]
                        net, x, y, "pgd", steps=steps, drop=drop, precision=precision
                    ),
                )
            name = f"{precision}, {'drop' if drop else 'no drop'}"
            per_step = None if counts[10] is None else (counts[20] - counts[10]) / 10
            found[name] = {"waits_in_all": counts[20], "waits_per_step": per_step}
    if not check.gpu:
        found["note"] = "on a CPU the host is the device"
    return found


def waited(check: Check, run: Callable[[], object]) -> Any:
    """Return how often the host waited for the GPU in a call; None on a CPU."""
    if not check.gpu:
        run()
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in said)


def layouts(check: Check, limit: float) -> dict[str, Any]:
    """Measure whether channels_last, torch.compile and bfloat16 make a step faster."""
    begun, found = time.monotonic(), {}
    for title, (net, x, _) in {"small": trained(check.tiny), "ResNet-18": wide(check.tiny)}.items():
        net, x = net.to(check.device).requires_grad_(False), x[: 4 if check.tiny else 512].to(check.device)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        changed: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
            "channels_last": (last, x.contiguous(memory_format=torch.channels_last)),
            "bfloat16": (in_bfloat16(net), x),
            "bfloat16, channels_last": (
                in_bfloat16(last),
                x.contiguous(memory_format=torch.channels_last),
            ),
        }
        if not check.tiny:
            changed["compile"] = (torch.compile(copy.deepcopy(net)), x)
        for how, (ask, shown) in changed.items():
            if time.monotonic() - begun > limit:
                found[f"{title}, {how}"] = "left out: no time"
                continue
            ratios = []
            for _ in range(2 if check.tiny else 20):
                seconds = [
                    timed(check, each, z) for each, z in ((net, x), (ask, shown), (ask, shown), (net, x))
                ]
                ratios.append((seconds[1] + seconds[2]) / (seconds[0] + seconds[3]))
            found[f"{title}, {how}"] = spread(ratios[1:])
    return {"time over that of the plain network": found}


def timed(check: Check, ask: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the seconds of a forward pass and its gradient."""
    check.wait()
    begun = time.perf_counter()
    z = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.autograd.grad(ask(z).float().square().sum(), z)
    check.wait()
    return time.perf_counter() - begun


TINY_SUITE = """
data: {digits: {name: digits, split: test, size: 20, resize: 16}}
defenses: {small: {use: standard, net: smallcnn, width: 0.125, epochs: 1, augment: false}}
attacks: {clean: {use: none}, pgd: {use: pgd, steps: 2, precision: bf16-search}}
tasks: [{data: digits, threat: {norm: linf, radius: 0.1}}]
tables: {t: {title: T, rows: [defense], columns: [attack]}}
"""


def suite(check: Check, limit: float) -> dict[str, Any]:
    """Run `tasks.yaml` on the device until the time is over."""
    folder, tasks = check.out / "tasks", REPOSITORY / "tasks.yaml"
    if check.tiny:
        tasks = check.out / "tiny.yaml"
        tasks.write_text(TINY_SUITE, encoding="utf-8")
    command = [sys.executable, "-m", "bench", "run", str(tasks), "--device", str(check.device)]
    command += ["--results", str(folder), *(["--slots", "auto"] if check.gpu else [])]
    log, begun = check.out / "tasks.log", time.monotonic()
    with open(log, "w", encoding="utf-8") as file, metered(check) as told:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        load = told()
    done = {kind: len(list(folder.glob(f"{kind}/*/receipt.json"))) for kind in ("train", "craft", "evaluate")}
    return {
        "status": process.returncode,
        "finished": process.returncode == 0,
        "seconds": round(time.monotonic() - begun, 1),
        "done": done,
        "failed": len(list(folder.glob("failed/*"))),
        **load,
        "last_lines": log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:],
    }


PARTS: dict[str, tuple[Callable[[Check, float], dict[str, Any]], float]] = {
    "machine": (machine, 20),
    "tests": (tests, 110),
    "slots": (slots, 100),
    "verdicts": (verdicts, 80),
    "bfloat16": (bfloat16, 60),
    "waits": (waits, 20),
    "layouts": (layouts, 50),
    "suite": (suite, 600),
}
"""The parts in their order, and how many seconds each may take; the last takes what is left."""

STOPPED = 130
"""The exit status of a run that an interrupt ended."""

RESERVE = 25
"""Seconds that are kept for ending a suite and writing."""


# --- the report ---------------------------------------------------------------------------------------------


def written(value: object) -> str:
    """Return a value for a cell of a table."""
    if isinstance(value, Mapping):
        if value.keys() == {"median", "least", "greatest"}:
            return f"{value['median']:.3f} ({value['least']:.3f} to {value['greatest']:.3f})"
        return ", ".join(f"{name}: {written(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool) or value is None:
        return "" if value is None else "yes" if value else "**no**"
    return str(value)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table with a line for each row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "| :-- |" + " --: |" * len(names)]
    for title, row in rows.items():
        lines.append(f"| {title} | " + " | ".join(written(row.get(name)) for name in names) + " |")
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report: a section for each part."""
    lines = ["# What a machine with a GPU found", ""]
    for part, told in found.items():
        lines += [f"## {part}", ""]
        for name, value in told.items():
            if (
                isinstance(value, Mapping)
                and value
                and all(isinstance(each, Mapping) for each in value.values())
            ):
                lines += [f"{name}:", "", *table(value), ""]
            else:
                lines += [f"- {name}: {written(value)}"]
        lines.append("")
    return "\n".join(lines)


def keep(check: Check) -> None:
    """Write what was found so far."""
    document = json.dumps(check.found, indent=1, default=str)
    (check.out / "gpu_check.json").write_text(document + "\n", encoding="utf-8")
    (check.out / "gpu_check.md").write_text(markdown(check.found), encoding="utf-8")


def wrong(found: Mapping[str, Any]) -> list[str]:
    """Return what a run found that must not be."""
    said = [f"{part}: {told['error']}" for part, told in found.items() if "error" in told]
    if failures := found.get("tests", {}).get("failures"):
        said.append(f"tests: {len(failures)} failed")
    for part in ("verdicts", "bfloat16"):
        rows = found.get(part, {}).get("attacks", {})
        said += [f"{part}: {name} agrees on {row['agree']}" for name, row in rows.items() if not row["holds"]]
    ran = found.get("suite", {})
    if ran.get("failed"):
        said.append(f"suite: {ran['failed']} jobs failed")
    if ran.get("status", 0) not in (0, STOPPED):
        said.append(f"suite: it ended with status {ran['status']}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 0 where nothing was wrong, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cpu, cuda:0, ... (default: cuda:0)")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for what is found")
    parser.add_argument("--minutes", type=float, default=9.5, help="when all must be over (default: 9.5)")
    parser.add_argument("--tiny", action="store_true", help="try the script itself at a tiny size")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: torch finds no GPU here")
    check = Check(device, asked.out.resolve(), asked.tiny, time.monotonic() + 60 * asked.minutes)
    settle(check.device)
    for name, (part, share) in PARTS.items():
        if asked.part and name not in asked.part:
            continue
        limit = min(share, check.left - RESERVE)
        if limit < 5:
            check.found[name] = {"left_out": "no time"}
            continue
        note(f"{name}: at most {limit:.0f} s")
        begun = time.monotonic()
        try:
            check.found[name] = part(check, limit)
        except Exception as error:  # noqa: BLE001 - the other parts shall run, whatever one met
            check.found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        check.found[name]["took"] = round(time.monotonic() - begun, 1)
        keep(check)
    keep(check)
    sys.stdout.write(markdown(check.found))
    problems = wrong(check.found)
    note("\n".join(problems) or "nothing was wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
