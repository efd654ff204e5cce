"""Other people's networks for MNIST, from `BENCH_DATA`; tests that ask for one are skipped without it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench import ContentPath, Decision, Fitting, Images, Labels, Shape, Split, View, defense, view


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def weights(name: str) -> Path:
    """Return the file of a network's weights; skip the test where there is none."""
    path = Path(os.environ.get("BENCH_DATA", "")) / "nets" / f"{name}.safetensors"
    if not os.environ.get("BENCH_DATA") or not path.is_file():
        pytest.skip(f"no network {name} below BENCH_DATA")
    return path


def published(name: str, rows: slice) -> tuple[nn.Module, Images, Labels]:
    """Return a network of `BENCH_DATA`/nets and images of MNIST's test split; else skip the test."""
    net, path = _network(), weights(name)
    datasets: Any = pytest.importorskip("torchvision.datasets")
    net.load_state_dict(load_file(path))
    mnist = datasets.MNIST(path.parents[1] / "mnist", train=False)
    return net.eval().requires_grad_(False), (mnist.data[rows].float() / 255)[:, None], mnist.targets[rows]


@defense("toy/published", readouts=("label",), version=1, learns=False)
class Published(nn.Module):
    """One of these networks as a defense of a suite."""

    def __init__(self, shape: Shape, *, weights: ContentPath) -> None:
        super().__init__()
        self.net, self.path = _network(), weights

    def fit(self, train: Split, fitting: Fitting) -> None:
        self.net.load_state_dict(load_file(self.path))

    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(self.net)

    @torch.no_grad()
    def decide(self, x: Images, readout: str) -> Decision:
        return Decision.of(self.net(x))
