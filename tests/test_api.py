"""The door for Python: an attack on a network in hand, and refusals by the sentences of the command line."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bench
from bench import Images, InputError, Labels, Loaded, Randomness, Shape, Split, Threat, View, work
from bench.registry import ATTACKS
from bench.testing import Halfspace
from suites import TASK, Ran, suite

PLANE = Halfspace(Shape(3, 5, 4, 2))
X, Y = PLANE.examples(12)
X = X.float()


def attacked(model: nn.Module = PLANE, **settings: Any) -> bench.Result:
    """Attack the half-space at 0.01 in linf by three steps, unless something else is said."""
    return bench.evaluate(
        model, settings.pop("x", X), settings.pop("y", Y), **({"radius": 0.01, "steps": 3} | settings)
    )


# --- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.999, 1.001])
def test_a_plane_is_crossed_where_the_radius_is_enough_and_nowhere_else(share: float) -> None:
    least = PLANE.least(X, "linf")
    radius = share * float(least.median())
    result = attacked(radius=radius, steps=20)
    assert result.frame["broken"].tolist() == (least < radius).tolist()
    assert result.robust.value == pytest.approx(float((least >= radius).double().mean()))
    assert (result.clean.value, result.clean.n, result.robust.n) == (1, 12, 12)
    moved = (result.images.double() - X.double()).flatten(1).abs().amax(1)
    assert float(moved.max()) <= radius + 1e-7
    assert np.allclose(result.frame["distance"], moved)


def test_what_moves_as_little_as_it_can_is_read_at_the_radius() -> None:
    least = PLANE.least(X, "l2")
    radius = float(least.median())
    free = attacked(attack="deepfool", norm="l2", radius=None, steps=50)
    assert free.robust.value == 0
    assert math.isinf(free.radius)
    assert np.allclose(free.frame["distance"], least, rtol=0.05)
    read = attacked(attack="deepfool", norm="l2", radius=radius, steps=50)
    assert read.frame["broken"].tolist() == (free.frame["distance"] <= radius).tolist()
    assert torch.equal(read.images, free.images)


def test_rows_say_what_was_asked_and_what_it_cost() -> None:
    result = attacked(attack="pgd", restarts=1)
    rows = result.frame
    assert rows["index"].tolist() == list(range(12))
    assert rows["truth"].tolist() == rows["clean_label"].tolist() == Y.tolist()
    assert rows["label"].tolist() == PLANE(result.images).argmax(1).tolist()
    assert rows["backwards"].tolist() == [3.0] * 12
    assert not rows["void"].any()
    assert result.flags == ()
    assert str(result).startswith("pgd, linf 0.01: robust 100.0 % [")


def test_other_metrics_are_those_of_tables() -> None:
    result = attacked(radius=0.5, steps=20)
    found = result.score("success")
    assert found is not None
    assert found.value == 1
    assert result.score("detection") is not None
    with pytest.raises(InputError, match="unknown metric 'sucess'; did you mean 'success'"):
        result.score("sucess")
    with pytest.raises(InputError, match="metric: logit is of a class"):
        result.score("logit")


def test_settings_that_cannot_do_what_they_seem_to_are_flagged() -> None:
    said = "2 steps of 0.001 reach 0.002, less than the radius 0.01"
    assert attacked(steps=2, step=0.001).flags == (said,)


def test_a_move_that_is_not_allowed_is_void_and_counted() -> None:
    result = bench.evaluate(PLANE, X, Y, attack="toy/void", how="nan")
    assert result.frame["void"].tolist() == [True, False] * 6
    assert result.flags == ("6 of 12 moves are void: not finite",)
    assert torch.equal(result.images, X)


def sign(
    view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, times: float = 1.0
) -> Images:
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(view.logits(z), y, reduction="sum"), z)
    return threat.project(x, x + times * threat.radius * gradient.sign())


def test_a_function_that_nobody_registered_is_an_attack() -> None:
    radius = 1.001 * float(PLANE.least(X, "linf").max())
    assert bench.evaluate(PLANE, X, Y, attack=sign, radius=radius).robust.value == 0
    short = bench.evaluate(PLANE, X, Y, attack=sign, radius=radius, times=0.5)
    assert short.attack == "sign"
    assert short.robust.value == 1


def test_a_registered_function_is_the_registered_attack() -> None:
    pgd: Any = ATTACKS["pgd"].make
    one, other = attacked(attack=pgd), attacked(attack="pgd")
    assert torch.equal(one.images, other.images)
    assert one.frame.equals(other.frame)


def test_draws_depend_on_seed_and_index_and_on_nothing_else() -> None:
    # A step that is too short to leave the place where it began.
    drawn = {"start": "uniform", "steps": 1, "step": 0.0001}
    whole = attacked(**drawn)
    assert torch.equal(attacked(**drawn, batch=5).images, whole.images)
    rows = torch.tensor([7, 2, 9])
    part = attacked(x=X[rows], y=Y[rows], index=rows, **drawn)
    assert torch.equal(part.images, whole.images[rows])
    assert part.frame["index"].tolist() == [7, 2, 9]
    assert part.frame["broken"].tolist() == whole.frame["broken"].iloc[rows.tolist()].tolist()
    assert not torch.equal(attacked(**drawn, seed=1).images, whole.images)


def test_images_are_normalised_before_the_network_sees_them() -> None:
    class Back(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return PLANE(x * 0.5 + 0.25)

    result = bench.evaluate(Back(), X, Y, attack="none", mean=0.25, std=0.5)
    assert result.clean.value == 1
    assert np.allclose(np.stack(result.frame["logits"]), PLANE(X).detach(), atol=1e-5)


def test_a_network_and_the_process_are_left_as_they_were() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)
    )
    net.train()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones(2, 12)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad():
            first = attacked(net)
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [each.training for each in net] == [True, True, False, True, True]
    assert [each.requires_grad for each in net.parameters()] == [False, True, True, True, True, True]
    assert torch.equal(net[4].weight.grad, torch.ones(2, 12))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    # In evaluation mode there is no dropout, and batch normalisation has learned nothing from the images.
    assert torch.equal(attacked(net.eval()).images, first.images)


def test_what_does_not_fit_in_memory_is_computed_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logits: Tensor = PLANE(x)
            return logits

    small, whole = attacked(Small(), steps=5), attacked(steps=5)
    assert torch.equal(small.images, whole.images)
    assert small.frame["label"].equals(whole.frame["label"])


def test_a_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    attacked()
    assert capsys.readouterr() == ("", "")
    quiet = attacked(progress=True, batch=5)
    assert torch.equal(quiet.images, attacked().images)


# --- the same as a run -------------------------------------------------------------------------------

LINEAR = {"use": "toy/linear", "serve": {"threshold": 0.3}}


def test_a_call_gives_the_numbers_of_a_suite(tmp_path: Path) -> None:
    """Of every example: images and outcomes, for draws by image, by shard, and of the network itself."""
    attacks = {
        "pgd": {"use": "pgd", "steps": 4, "start": "uniform", "loss": "margin"},
        "common": {"use": "toy/common"},
        "minimal": {"use": "toy/minimal"},
        "boundary": {"use": "toy/answers"},
    }
    tasks = [
        {**TASK, "attacks": ["pgd", "common", "boundary"], "seeds": [1]},
        {"data": "digits", "threat": {"norm": "l2"}, "attacks": ["minimal"], "seeds": [1]},
    ]
    ran = Ran(suite(tmp_path, {"linear": LINEAR, "noisy": {"use": "toy/noisy"}}, attacks, tasks))
    assert not ran.failed
    seen = 0
    for cell in ran.plan.cells:
        victim, attempt = cell.job.victim, cell.job.crafts[0].attempt
        desk = work.Desk(ran.store.root, ran.plan.suite.folder, None, "cpu", {})
        split = work.load(attempt.data, desk)
        at = cell.coordinates
        result = bench.evaluate(
            Loaded(work.restored(victim, desk), victim),
            Split(split.images, split.labels, split.index, split.digest),
            attack=attacks[at["attack"]],
            norm=at["norm"],
            radius=at["radius"],
            view=None if attempt.view is None or at["view"].startswith("decision:") else at["view"],
            readout=at["readout"],
            seed=1,
            batch=25,
        )
        rows = ran.outcomes(**at)
        same = result.frame[[name for name in rows.columns if name != "parameters"]]
        assert same.astype(str).equals(rows[same.columns].astype(str)), at
        seen += 1
    assert seen >= 8
