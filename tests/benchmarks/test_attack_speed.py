"""What PGD costs beside the passes that it cannot do without, and what dropping broken examples saves."""

from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from scenes import batch, draws, keeping
from torch import Tensor, autograd, nn
from torch.nn.functional import cross_entropy

from attacks.fgsm import fgsm
from attacks.pgd import pgd
from attacks.spsa import spsa
from bench.protocols import Images, Threat, View
from bench.referee.instruments import QueryCounter, instrument

STEPS = 40


def test_pgd_costs_its_forward_and_backward_passes_and_little_more(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 64)
    threat = Threat("linf", 1e-5)

    def bare() -> None:
        z = x.clone().requires_grad_()
        for _ in range(STEPS):
            autograd.grad(cross_entropy(net(z), y, reduction="sum"), z)

    def attack() -> Tensor:
        return pgd(View(net), x, y, threat, draws(x), steps=STEPS).images

    def instrumented() -> Tensor:
        view = instrument(
            View(net), QueryCounter.of(len(x), x.device), "gradient", target=None, exact=True, chunk=256
        )
        return pgd(view, x, y, threat, draws(x), steps=STEPS).images

    race(
        {"bare passes": bare, "attack": attack, "watched attack": instrumented},
        over={
            "PGD-40 over 40 bare forward and backward passes": ("attack", "bare passes"),
            "PGD-40 under the harness's watch over the same": ("watched attack", "bare passes"),
        },
    )
    assert torch.equal(net(instrumented()).argmax(1), y), "an example broke, so that there was less to do"


def test_pgd_on_examples_that_break_early_against_libraries(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 64)
    radius = 0.02
    step = 2.5 * radius / STEPS
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    other = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=False)
    library = torchattacks.PGD(net, eps=radius, alpha=step, steps=STEPS, random_start=False)
    threat, found = Threat("linf", radius), dict[str, Images]()
    race(
        keeping(
            found,
            {
                "ours": lambda: pgd(View(net), x, y, threat, draws(x), steps=STEPS, start="zero").images,
                "torchattacks": lambda: library(x, y),
                "foolbox": lambda: other(model, x, y, epsilons=radius)[1],
            },
        ),
        over={
            "torchattacks' PGD-40 over ours, most examples break early": ("torchattacks", "ours"),
            "foolbox' PGD-40 over ours, most examples break early": ("foolbox", "ours"),
        },
        rounds=3,
    )
    wins = {name: net(images).argmax(1) != y for name, images in found.items()}
    assert 0.8 < wins["ours"].double().mean() < 1
    for name in ("torchattacks", "foolbox"):
        assert (wins["ours"] | ~wins[name]).all(), f"{name} broke an example that we did not"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_where_nothing_breaks_against_libraries(norm: Any, net: nn.Module, race: Any) -> None:
    """Ours looks at its last iterate, a pass forward more; returned as it comes it is the libraries' own."""
    x, y = batch(net, 64)
    radius = 1e-5
    step = 2.5 * radius / STEPS
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    other = theirs(abs_stepsize=step, steps=STEPS, random_start=False)
    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    library = kind(net, eps=radius, alpha=step, steps=STEPS, random_start=False)
    threat = Threat(norm, radius)
    same: dict[str, Any] = {"steps": STEPS, "step_size": step, "start": "zero"}
    last: dict[str, Any] = {**same, "keep": "last", "drop": False}
    found: dict[str, Images] = {}
    race(
        keeping(
            found,
            {
                "ours": lambda: pgd(View(net), x, y, threat, draws(x), **same).images,
                "ours, the last": lambda: pgd(View(net), x, y, threat, draws(x), **last).images,
                "torchattacks": lambda: library(x, y),
                "foolbox": lambda: other(model, x, y, epsilons=radius)[1],
            },
        ),
        over={
            f"{who}' PGD-40 over ours{how}, {norm}, nothing breaks": (who, f"ours{how}")
            for who in ("torchattacks", "foolbox")
            for how in ("", ", the last")
        },
        rounds=9,
    )
    for name, images in found.items():
        assert torch.equal(net(images).argmax(1), y), f"{name} broke an example: there was less to do"


def test_fgsm_against_libraries(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 64)
    radius = 0.02
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    other, library = foolbox.attacks.LinfFastGradientAttack(), torchattacks.FGSM(net, eps=radius)
    found: dict[str, Images] = {}
    race(
        keeping(
            found,
            {
                "ours": lambda: fgsm(View(net), x, y, Threat("linf", radius), draws(x)).images,
                "torchattacks": lambda: library(x, y),
                "foolbox": lambda: other(model, x, y, epsilons=radius)[1],
            },
        ),
        over={
            "torchattacks' FGSM over ours": ("torchattacks", "ours"),
            "foolbox' FGSM over ours": ("foolbox", "ours"),
        },
        rounds=15,
    )
    for name in ("torchattacks", "foolbox"):
        torch.testing.assert_close(found[name], found["ours"])


def test_spsa_against_torchattacks(net: nn.Module, race: Any) -> None:
    """Nothing breaks, and both ask as many pairs; ours looks at each iterate besides."""
    x, y = batch(net, 16)
    other = torchattacks.SPSA(net, eps=1e-5, delta=0.01, lr=1e-6, nb_iter=3, nb_sample=128)

    def theirs() -> Images:
        with torch.random.fork_rng(devices=[]):
            images: Images = other(x, y)
        return images

    threat, found = Threat("linf", 1e-5), dict[str, Images]()
    given: dict[str, Any] = {"steps": 3, "samples": 128, "delta": 0.01, "lr": 1e-6}
    race(
        keeping(
            found,
            {
                "ours": lambda: spsa(View(net), x, y, threat, draws(x), **given).images,
                "torchattacks": theirs,
            },
        ),
        over={"torchattacks' SPSA over ours, 3 steps of 128 pairs": ("torchattacks", "ours")},
        rounds=3,
    )
    for name, images in found.items():
        assert torch.equal(net(images).argmax(1), y), f"{name} broke an example: there was less to do"


def test_spsa_costs_its_forward_passes_and_little_more(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 32)
    everyone = x.repeat(8, 1, 1, 1)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(2 * 2 * 64 // 8):
                net(everyone)

    def instrumented() -> None:
        view = instrument(
            View(net), QueryCounter.of(len(x), x.device), "score", target=None, exact=True, chunk=256
        )
        spsa(view, x, y, Threat("linf", 1e-5), draws(x), steps=2, samples=64)

    race(
        {"bare passes": bare, "SPSA": instrumented},
        over={"two steps of SPSA under watch over as many bare passes": ("SPSA", "bare passes")},
    )


def test_restarts_side_by_side(net: nn.Module, race: Any) -> None:
    """On a CPU a small batch gains little from company; on a GPU it is nearly free."""
    x, y = batch(net, 8)
    threat = Threat("linf", 1e-5)

    def together() -> None:
        pgd(View(net), x, y, threat, draws(x), steps=10, restarts=9)

    def apart() -> None:
        noise = draws(x)
        for _ in range(9):
            pgd(View(net), x, y, threat, noise, steps=10)

    race(
        {"side by side": together, "one after another": apart},
        over={
            "nine restarts of 8 images: one after another over side by side": (
                "one after another",
                "side by side",
            )
        },
    )
