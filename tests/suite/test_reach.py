"""Radii and steps in other units than those of images are refused, and steps that are no use are noted."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import Norm, Shape, evaluate
from bench.errors import InputError
from bench.protocols import distance
from bench.suite import planner, resolve
from bench.suite.planner import Plan
from bench.suite.reach import diameter
from suites import suite

LINEAR = {"linear": {"use": "toy/linear", "epochs": 1}}


def planned(folder: Path, threat: dict[str, Any], attack: dict[str, Any], **more: Any) -> Plan:
    task = {"data": "digits", "threat": threat, "readouts": ["plain"], "views": ["logits"]}
    return planner.make(resolve.load(suite(folder, LINEAR, {"attack": attack}, [task], **more)))


def said(plan: Plan) -> list[str]:
    """Return what is said of the settings of the only condition."""
    (cell,) = plan.conditions
    return list(cell.facts["flags"])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("form", [(1, 2, 2), (3, 1, 2), (2, 2, 1)])
def test_no_two_images_are_farther_apart_than_the_diameter_and_some_are_so_far(
    norm: Norm, form: tuple[int, int, int]
) -> None:
    """Distances are convex (in l0: greatest where all differs), so that corners of the box are enough."""
    size = form[0] * form[1] * form[2]
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size))).view(-1, *form)
    one, other = (each.flatten() for each in torch.meshgrid(*[torch.arange(2**size)] * 2, indexing="ij"))
    far = distance(corners[one], corners[other], norm)
    assert float(far.max()) == pytest.approx(diameter(norm, Shape(*form, 10)), rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "radius", "most", "meant"),
    [
        ("linf", 8, "1", "did you mean 8/255 = 0.03137?"),
        ("linf", 1.001, "1", "did you mean 1.001/255 = 0.003925?"),
        ("linf", 300, "1", ""),
        ("l2", 128, "8", "did you mean 128/255 = 0.502?"),
        ("l1", 65, "64", "did you mean 65/255 = 0.2549?"),
        ("l0", 65, "64", ""),
    ],
)
def test_a_radius_that_no_two_images_are_apart_is_refused_with_what_was_meant(
    norm: Norm, radius: float, most: str, meant: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        planned(tmp_path, {"norm": norm, "radius": radius}, {"use": "none"})
    expected = f"tasks[0].threat.radius: expected a radius of {most} or less in {norm}, which no two images"
    assert expected in str(error.value)
    assert str(error.value).startswith("suite.yaml:")
    assert str(error.value).endswith(meant or f"found {radius}")


def test_of_several_radii_the_wrong_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tasks\[0\]\.threat\.radius\[1\]: .* found 9"):
        planned(tmp_path, {"norm": "l2", "radius": [1, 9, 2]}, {"use": "pgd"})


@pytest.mark.parametrize(
    ("norm", "radius"), [("linf", 1), ("linf", "255/255"), ("l2", 8), ("l1", 64), ("l0", 64), ("l2", "inf")]
)
def test_radii_that_reach_every_image_are_right(norm: Norm, radius: float | str, tmp_path: Path) -> None:
    assert planned(tmp_path, {"norm": norm, "radius": radius}, {"use": "none"}).conditions


def test_a_call_refuses_the_same() -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"^radius: expected a radius of 1 or less in linf.*mean 8/255"):
        evaluate(torch.nn.Flatten(), x, y, radius=8)


@pytest.mark.parametrize("where", [{}, {"norm": "l2"}, {"data": ["digits"], "norm": ["linf", "l2"]}])
def test_a_table_reads_no_distance_at_a_radius_that_none_can_have(
    where: dict[str, Any], tmp_path: Path
) -> None:
    table = {"title": "x", "rows": ["defense"], "columns": ["radius"], "radii": [0, 8], "where": where}
    threat, search = {"norm": "l2"}, {"use": "deepfool"}
    assert planned(tmp_path, threat, search, tables={"T": table}).conditions
    with pytest.raises(
        InputError, match=r"suite\.yaml:\d+: tables\.T\.radii\[2\]: .* of 8 or less in l2.*76\.5/255"
    ):
        planned(tmp_path, threat, search, tables={"T": {**table, "radii": [0, 8, 76.5]}})


@pytest.mark.parametrize(
    ("attack", "threat", "most"),
    [
        ({"use": "pgd", "step_size": 2}, {"norm": "linf", "radius": 0.1}, "1"),
        ({"use": "pgd", "step_size": 8.5}, {"norm": "l2", "radius": 1}, "8"),
        ({"use": "torchattacks/PGD", "alpha": 2}, {"norm": "linf", "radius": 0.1}, "1"),
        (
            {"use": "sequence", "of": [{"use": "fgsm"}, {"use": "pgd", "step_size": 2}]},
            {"norm": "linf", "radius": 0.1},
            "1",
        ),
    ],
)
def test_a_step_that_crosses_the_whole_box_is_refused(
    attack: dict[str, Any], threat: dict[str, Any], most: str, tmp_path: Path
) -> None:
    sentence = rf"suite\.yaml:\d+: attacks\.attack: (step_size|alpha): expected a step of {most} or less in"
    with pytest.raises(InputError, match=sentence):
        planned(tmp_path, threat, attack)


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (None, None),
        (0.2, None),
        (0.05, None),
        (
            0.21,
            "a step (step_size) of 0.21 is longer than the ball is wide (0.2): each one ends at the border",
        ),
        (0.02, "3 steps of 0.02 reach 0.06, less than the radius 0.1"),
    ],
)
def test_steps_that_are_no_use_are_noted(step: float | None, found: str | None, tmp_path: Path) -> None:
    attack = {"use": "pgd", "steps": 3, "step_size": step}
    assert said(planned(tmp_path, {"norm": "linf", "radius": 0.1}, attack)) == [found] * (found is not None)


def test_what_an_attack_of_ones_own_does_not_say_of_its_steps_is_said(tmp_path: Path) -> None:
    attack = {"use": "toy/stepping", "steps": 4, "step_size": 0.01}
    threat = {"norm": "linf", "radius": 0.1}
    assert said(planned(tmp_path, threat, attack)) == ["4 steps of 0.01 reach 0.04, less than the radius 0.1"]
    assert said(planned(tmp_path, threat, {**attack, "steps": 10})) == []
