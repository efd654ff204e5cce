"""The example of an own attack: MI-FGSM is a projected ascent with another step."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn

from attacks.common.projected_ascent import ProjectedAscent, loss_of
from bench import Threat, View
from bench.noise import Noise
from bench.registry import ATTACKS, AttackEntry
from bench.testing import check_attack, check_planted

EXAMPLE = Path(__file__).parents[2] / "examples" / "mi_fgsm.py"
LINF = Threat("linf", 0.08)


@contextmanager
def opened() -> Iterator[Mapping[str, AttackEntry]]:
    """Let the closed registry take another attack for a while, as a plug-in's."""
    before = dict(ATTACKS._entries)
    ATTACKS._closed, ATTACKS._prefix = False, "mylab"
    try:
        yield ATTACKS._entries
    finally:
        ATTACKS._entries, ATTACKS._closed, ATTACKS._prefix = before, True, None


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The example, imported as a plug-in would be."""
    spec = importlib.util.spec_from_file_location("mi_fgsm_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    with opened():
        spec.loader.exec_module(found)
        yield found


@pytest.fixture(scope="module")
def net() -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 5 * 4, 4)).double()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 3
    return made


def images() -> Tensor:
    return torch.rand(6, 2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int, decay: float) -> list[Tensor]:
    """Return the iterates of algorithm 1, one image at a time, as the paper writes it."""
    ends = []
    for image, label in zip(x, y, strict=True):
        z, g, way = image[None], torch.zeros_like(image[None]), [image[None]]
        for _ in range(steps):
            z = z.detach().requires_grad_()
            (gradient,) = autograd.grad(nn.functional.cross_entropy(net(z), label[None]), z)
            g = decay * g + gradient / gradient.abs().sum()
            z = (z + radius / steps * g.sign()).clamp(image - radius, image + radius).clamp(0, 1)
            way.append(z.detach())
        ends.append(torch.cat(way))
    return ends


@pytest.mark.parametrize("decay", [0.0, 1.0, 0.5])
def test_it_is_the_paper_s_algorithm_with_the_best_iterate_kept(
    module: ModuleType, net: nn.Module, decay: float
) -> None:
    x = images()
    y = net(x).argmax(1)
    noise = Noise("test", torch.arange(len(x)), dtype=torch.float64)
    found = module.mi_fgsm(View(net, exact=False), x, y, LINF, noise, steps=9, decay=decay).images
    for image, label, way in zip(found, y, by_hand(net, x, y, 0.08, 9, decay), strict=True):
        losses = nn.functional.cross_entropy(net(way), label.expand(len(way)), reduction="none")
        assert torch.allclose(image, way[losses.argmax()], rtol=0, atol=1e-12)


def test_momentum_goes_elsewhere_than_the_gradient_alone(module: ModuleType, net: nn.Module) -> None:
    x = images()
    y = net(x).argmax(1)
    ends = [by_hand(net, x, y, 0.3, 9, decay) for decay in (0.0, 1.0)]
    assert any(float((a[-1] - b[-1]).abs().max()) > 0.01 for a, b in zip(*ends, strict=True))


def test_who_is_dropped_takes_its_memory_along(module: ModuleType, net: nn.Module) -> None:
    """Examples end where they end alone, whoever else is done before them."""
    x = images()
    y = net(x).argmax(1)
    threat = Threat("linf", 0.5)
    settings: dict[str, Any] = {"steps": 12, "restarts": 3, "decay": 1.0}
    every = torch.arange(len(x))
    whole = module.mi_fgsm(View(net), x, y, threat, Noise("t", every, dtype=x.dtype), **settings).images
    for row in every.split(1):
        noise = Noise("t", row, dtype=x.dtype)
        alone = module.mi_fgsm(View(net), x[row], y[row], threat, noise, **settings).images
        assert torch.allclose(alone, whole[row], rtol=0, atol=1e-12)
    done = net(whole).argmax(1) != y
    assert done.any()
    # Not all at once: somebody was dropped while others went on.
    assert len({int(count) for count in _steps_to_success(net, x, y, threat)}) > 1


def _steps_to_success(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> list[int]:
    ways = by_hand(net, x, y, threat.radius, 12, 1.0)
    return [int((net(way).argmax(1) != label).double().argmax()) for way, label in zip(ways, y, strict=True)]


def test_a_hook_sees_finite_gradients_and_its_own_memory(net: nn.Module) -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []

    def direction(gradient: Tensor, memory: Tensor | None, threat: Threat) -> tuple[Tensor, Tensor | None]:
        seen.append((gradient, memory))
        return gradient.sign(), torch.full_like(gradient, float(len(seen)))

    def logits(z: Tensor) -> Tensor:
        answer: Tensor = net(z)
        return torch.where(torch.arange(len(z))[:, None] == 0, answer * z[:, 0, 0, :1].sqrt(), answer)

    x = images()
    x[0, 0, 0, 0] = 0  # The root's slope is infinite there.
    ascent = ProjectedAscent(steps=3, length=0.01, restarts=2, start="zero", direction=direction)
    view = View(logits, exact=False)
    crafted = ascent.run(view, x, net(x).argmax(1), LINF, Noise("t", torch.arange(6)), loss_of("ce"))
    assert crafted.notes["nonfinite"].tolist() == [True] + [False] * 5
    assert [gradient.shape for gradient, _ in seen] == [(2, 6, 2, 7, 6)] * 3
    assert all(bool(gradient.isfinite().all()) for gradient, _ in seen)
    assert [None if memory is None else float(memory.mean()) for _, memory in seen] == [None, 1.0, 2.0]


def test_it_holds_what_an_attack_must(module: ModuleType) -> None:
    check_attack("mylab/mi-fgsm", "linf")
    check_attack("mylab/mi-fgsm", "linf", restarts=3)
    assert check_planted("mylab/mi-fgsm", "linf", steps=40, restarts=2) >= 0.95


def test_what_it_needs_is_declared_once(module: ModuleType) -> None:
    entry = ATTACKS["mylab/mi-fgsm"]
    assert entry.make is module.mi_fgsm
    assert (entry.norms, entry.access, entry.rng) == (frozenset({"linf"}), "gradient", "example")
    assert entry.passes({"steps": 10, "restarts": 3, "decay": 1.0}) == 30
    assert replace(entry, cost=lambda **_: 7).passes({}) == 7
