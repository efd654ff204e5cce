"""Other people's networks for MNIST, from `BENCH_DATA`; tests that ask for one are skipped without it."""

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from bench.protocols import Images, Labels


def published(name: str, rows: slice) -> tuple[nn.Module, Images, Labels]:
    """Return a network of `BENCH_DATA`/nets and images of MNIST's test split; else skip the test."""
    root = Path(os.environ.get("BENCH_DATA", ""))
    path = root / "nets" / f"{name}.safetensors"
    if not os.environ.get("BENCH_DATA") or not path.is_file():
        pytest.skip(f"no network {name} below BENCH_DATA")
    datasets: Any = pytest.importorskip("torchvision.datasets")
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    net.load_state_dict(load_file(path))
    mnist = datasets.MNIST(root / "mnist", train=False)
    return net.eval().requires_grad_(False), (mnist.data[rows].float() / 255)[:, None], mnist.targets[rows]
