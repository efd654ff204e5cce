"""What attacks by scores and answers cost beside the same attacks of the libraries, at equal queries."""

from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from scenes import batch, draws
from torch import Tensor, nn

from attacks.boundary import boundary
from attacks.localsearch import localsearch
from attacks.nes import nes
from attacks.square import square
from bench.protocols import Images, Threat, View


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.02), ("l2", 0.5)])
@pytest.mark.parametrize("breaks", [False, True], ids=["nothing breaks", "most break"])
def test_square_against_torchattacks(
    net: nn.Module, race: Any, norm: Any, radius: float, breaks: bool
) -> None:
    x, y = batch(net, 32)
    radius = radius if breaks else radius / 1000
    queries = 150 if breaks else 40
    name = {"linf": "Linf", "l2": "L2"}[norm]
    # After its first point it asks for as many as it is told.
    library = torchattacks.Square(net, norm=name, eps=radius, n_queries=queries - 1)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = square(View(net), x, y, Threat(norm, radius), draws(x), queries=queries).images

    def torchattacks_() -> None:
        found["torchattacks"] = library(x, y)

    what = f"{queries} queries, {norm}, {'most examples break' if breaks else 'nothing breaks'}"
    race(
        {"ours": ours, "torchattacks": torchattacks_},
        over={f"torchattacks' Square over ours, {what}": ("torchattacks", "ours")},
        rounds=3,
    )
    wins = {name: int((net(images).argmax(1) != y).sum()) for name, images in found.items()}
    assert (wins["ours"] > 8) == breaks
    # Random searches: as many, but for chance.
    assert wins["ours"] >= wins["torchattacks"] - 6


def test_boundary_against_foolbox(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 32)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    library = foolbox.attacks.BoundaryAttack(steps=60)
    found: dict[str, Tensor] = {}

    def answers(z: Images) -> Tensor:
        return nn.functional.one_hot(net(z).argmax(1), 10).to(z.dtype)

    def ours() -> None:
        view = View(answers, centred=False)
        found["ours"] = boundary(view, x, y, Threat("l2"), draws(x), steps=60).images

    def foolbox_() -> None:
        found["foolbox"] = library.run(model, x, foolbox.criteria.Misclassification(y))

    race(
        {"ours": ours, "foolbox": foolbox_},
        over={"foolbox's BoundaryAttack over ours, 60 steps": ("foolbox", "ours")},
        rounds=3,
    )
    assert all((net(images).argmax(1) != y).all() for images in found.values())
    far = {name: float(Threat("l2").distance(x, images).median()) for name, images in found.items()}
    # Their starts are drawn anew each time: the medians of 32 of them are this far apart by chance.
    assert far["ours"] <= 1.3 * far["foolbox"]


def test_searches_by_scores_cost_their_forward_passes_and_little_more(net: nn.Module, race: Any) -> None:
    x, y = batch(net, 8)
    asked: list[Images] = []

    def asking(z: Images) -> Tensor:
        asked.append(z)
        return View(net).logits(z)

    def estimated() -> None:
        nes(View(asking), x, y, Threat("l2"), draws(x), samples=50, steps=3, searches=1, step_size=1e-5)

    def searched() -> None:
        localsearch(View(asking), x, y, Threat("l0"), draws(x), rounds=2)

    contenders: dict[str, Any] = {}
    for name, attack in (("NES", estimated), ("LocalSearch", searched)):
        asked.clear()
        attack()
        points = list(asked)

        def bare(points: list[Images] = points) -> None:
            with torch.no_grad():
                for z in points:
                    net(z)

        def alone(attack: Any = attack) -> None:
            asked.clear()
            attack()

        contenders |= {name: alone, f"bare passes of {name}": bare}
    race(
        contenders,
        over={
            "three steps of NES over as many bare passes": ("NES", "bare passes of NES"),
            "two rounds of LocalSearch over as many bare passes": (
                "LocalSearch",
                "bare passes of LocalSearch",
            ),
        },
    )
