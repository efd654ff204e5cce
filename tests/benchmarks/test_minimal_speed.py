"""Time to the same median distance: CW, DeepFool and JSMA against torchattacks and foolbox."""

from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from attacks.cw_l2 import cw_l2
from attacks.deepfool import deepfool
from attacks.jsma import jsma
from bench.noise import Noise
from bench.protocols import Crafted, Images, Labels, Threat, View

Scene = tuple[nn.Module, Images, Labels]


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Return a small convolutional net trained on the digits at 28x28, and test images it gets right: most of
    their pixels are exactly black.
    """
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    x, y = interpolate(x, size=28, mode="bilinear").clamp(0, 1), torch.tensor(digits.target).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10)),
        )
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(10):
            for rows in torch.randperm(1500).split(64):
                optimiser.zero_grad()
                cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
    net.eval().requires_grad_(False)
    right = (net(x[1500:]).argmax(1) == y[1500:]).nonzero().squeeze(1)[:16] + 1500
    return net, x[right], y[right]


def ours(attack: Any, scene: Scene, threat: Threat, target: Labels | None = None, **params: Any) -> Images:
    """Return what an attack finds."""
    net, x, y = scene
    crafted: Crafted = attack(
        View(net, target=target), x, y, threat, Noise("speed", torch.arange(len(x))), **params
    )
    return crafted.images


def median(
    scene: Scene, images: Images, norm: Any = "l2", target: Labels | None = None
) -> tuple[float, float]:
    """Return the share that is adversarial, and the median distance, infinite where it is not."""
    net, x, y = scene
    won = net(images).argmax(1) != y if target is None else net(images).argmax(1) == target
    distance = Threat(norm).distance(x, images)
    return float(won.double().mean()), float(torch.where(won, distance, torch.inf).median())


def test_cw_in_l2_to_the_same_median_distance(scene: Scene, race: Any) -> None:
    net, x, y = scene
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    found: dict[str, Images] = {}

    def native(name: str, **params: Any) -> Any:
        return lambda: found.update({name: ours(cw_l2, scene, Threat("l2"), **params)})

    def other(name: str, **params: Any) -> Any:
        library = foolbox.attacks.L2CarliniWagnerAttack(**params)
        return lambda: found.update({name: library(model, x, y, epsilons=None)[1]})

    def torchattacks_() -> None:
        found["torchattacks"] = torchattacks.CW(net, c=1, steps=300)(x, y)

    published: Any = {"variable": "tanh", "goal": "highest", "abort": False}
    race(
        {
            "foolbox": other("foolbox", steps=300),
            "ours": native("ours", steps=75),
            "the highest": native("the highest", steps=100, goal="highest"),
            "foolbox to the end": other("foolbox to the end", steps=100, abort_early=False),
            "as published": native("as published", steps=100, **published),
            "torchattacks": torchattacks_,
            "three": native("three", steps=50, searches=3, c=1.0),
        },
        over={
            "foolbox's CW, 300 steps, over ours, 75 steps, no larger median": ("foolbox", "ours"),
            "the same over ours towards the highest wrong logit, 100 steps": ("foolbox", "the highest"),
            "foolbox's CW over ours as published, 100 steps of either": (
                "foolbox to the end",
                "as published",
            ),
            "torchattacks' CW, one c, 300 steps, over ours, 3 searches of 50, no larger median": (
                "torchattacks",
                "three",
            ),
        },
        rounds=2,
    )
    medians = {name: median(scene, images) for name, images in found.items()}
    print(medians)  # noqa: T201
    assert medians["ours"][0] == medians["foolbox"][0] == 1
    assert medians["ours"][1] <= medians["foolbox"][1]
    assert medians["the highest"][1] <= medians["foolbox"][1] * 1.005
    assert medians["as published"][1] <= medians["foolbox to the end"][1] * 1.005
    assert medians["three"][1] <= medians["torchattacks"][1]


def test_deepfool_at_the_same_steps(scene: Scene, race: Any) -> None:
    net, x, y = scene
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    found: dict[str, Images] = {}

    def native() -> None:
        found["ours"] = ours(deepfool, scene, Threat("l2"), steps=50)

    def foolbox_() -> None:
        library = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=None)
        found["foolbox"] = library(model, x, y, epsilons=None)[0]

    def torchattacks_() -> None:
        found["torchattacks"] = torchattacks.DeepFool(net, steps=50)(x, y)

    race(
        {"ours": native, "foolbox": foolbox_, "torchattacks": torchattacks_},
        over={
            "foolbox's DeepFool, 50 steps, over ours": ("foolbox", "ours"),
            "torchattacks' DeepFool, 50 steps, over ours": ("torchattacks", "ours"),
        },
        rounds=2,
    )
    medians = {name: median(scene, images) for name, images in found.items()}
    print(medians)  # noqa: T201
    for name in ("foolbox", "torchattacks"):
        assert medians["ours"][0] >= medians[name][0]


def test_jsma_at_the_same_changes(scene: Scene, race: Any) -> None:
    net, x, y = scene
    target = (y + 1) % 10
    found: dict[str, Images] = {}

    def native(name: str, goal: Tensor | None, **params: Any) -> Any:
        return lambda: found.update({name: ours(jsma, scene, Threat("l0"), goal, gamma=0.1, **params)})

    def torchattacks_() -> None:
        found["torchattacks"] = torchattacks.JSMA(net, theta=1.0, gamma=0.1)(x, y)

    race(
        {
            "published": native("published", target, both=False),
            "every target": native("every target", None),
            "torchattacks": torchattacks_,
        },
        over={
            "torchattacks' JSMA over ours, the same target and share": ("torchattacks", "published"),
            "the same over ours, all nine targets, either way": ("torchattacks", "every target"),
        },
        rounds=2,
    )
    hits = {
        "published": median(scene, found["published"], "l0", target),
        "torchattacks": median(scene, found["torchattacks"], "l0", target),
        "every target": median(scene, found["every target"], "l0"),
    }
    print(hits)  # noqa: T201
    assert hits["published"][0] >= hits["torchattacks"][0]
    assert hits["every target"][0] >= hits["torchattacks"][0]
