"""Expectation over transformation: what is averaged, what it costs, and how a suite asks for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attacks import LINF, NET, X, Y, apart, draws
from torch import Tensor, autograd
from torch.nn.functional import cross_entropy

from attacks.pgd import pgd
from bench import InputError, Shape, View, eot, objective, succeeded
from bench.noise import Noise
from bench.protocols import Labels, Threat
from bench.referee.instruments import QueryCounter, instrument
from bench.suite import planner, resolve
from defenses.defensegan import DefenseGan
from suites import TASK, Ran, suite

LOSSES = ("ce", "margin", "dlr")


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Masked:
    """The small network on images of which a random half is hidden; keeps the masks of every ask."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.masks.append(2.0 * torch.randint(2, z.shape, generator=self.generator, dtype=z.dtype))
        return self.under(self.masks[-1], z)

    def under(self, mask: Tensor, z: Tensor) -> Tensor:
        """Answer as under this mask."""
        logits: Tensor = NET(z * mask)
        return logits


def gradient(view: View, z: Tensor, y: Labels, loss: Any) -> Tensor:
    z = z.detach().clone().requires_grad_()
    (found,) = autograd.grad(objective(view, view.logits(z), y, loss).sum(), z)
    return found


# --- what is averaged -----------------------------------------------------------------------------------


def test_one_draw_is_the_view_itself() -> None:
    view = View(NET)
    assert eot(view, 1) is view


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_on_a_deterministic_network_draws_change_no_step_of_pgd(loss: Any, start: Any) -> None:
    settings: dict[str, Any] = {"steps": 12, "loss": loss, "start": start, "restarts": 3}
    plain = pgd(View(NET), X, Y, LINF, draws(X), **settings).images
    for m in (1, 3):
        found = pgd(eot(View(NET), m), X, Y, LINF, draws(X), **settings).images
        assert apart(found, plain) < 1e-9
    assert apart(plain, X) > LINF.radius / 2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_the_gradient_is_the_mean_of_the_gradients_and_not_that_of_the_mean_logits(
    loss: Any, targeted: bool
) -> None:
    defense = Masked()
    view = View(defense, target=(Y + 1) % 5 if targeted else None)
    found = gradient(eot(view, 6), X, Y, loss)
    assert len(defense.masks) == 6
    each = [replace(view, logits=lambda z, mask=mask: defense.under(mask, z)) for mask in defense.masks]
    mean = torch.stack([gradient(one, X, Y, loss) for one in each]).mean(0)
    assert apart(found, mean) < 1e-12
    together = View(lambda z: torch.stack([one.logits(z) for one in each]).mean(0), target=view.target)
    assert apart(found, gradient(together, X, Y, loss)) > 0.1 * float(mean.abs().max())


def test_the_cross_entropy_over_draws_is_pytorch_s_mean() -> None:
    logits = drawn(7, 12, 5)
    expected = torch.stack([cross_entropy(one, Y, reduction="none") for one in logits]).mean(0)
    assert torch.allclose(objective(View(NET), logits, Y, "ce"), expected)


def test_the_answer_over_draws_is_that_of_the_mean_logits() -> None:
    # Two of three answers say 1, but the third is surer of 0.
    logits = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[5.0, 0.0]]])
    assert not succeeded(View(NET), logits, torch.tensor([0])).item()
    assert succeeded(View(NET), logits, torch.tensor([1])).item()


def test_the_variance_of_the_gradient_falls_as_one_over_the_draws() -> None:
    """Logits are (w + noise) x, whose gradient has the variance of the noise."""
    generator = torch.Generator().manual_seed(1)
    weight = drawn(40, 2)

    def logits(z: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator, dtype=z.dtype)
        return z.flatten(1) @ (weight + noise)

    x, y = torch.full((1, 1, 5, 8), 0.5, dtype=torch.float64), torch.tensor([0])
    for m in (1, 4, 16):
        view = eot(View(logits), m)
        found = torch.stack([gradient(view, x, y, "margin").flatten() for _ in range(300)])
        truth = weight[:, 1] - weight[:, 0]
        # Of the difference of two noises, of variance 1 each; 300 x 40 numbers tell it to within 4 %.
        assert float((found - truth).square().mean()) == pytest.approx(2 / m, rel=0.06)
        assert apart(found.mean(0), truth) < 5 * (2 / m / 300) ** 0.5


def test_draws_break_what_one_draw_does_not() -> None:
    """Where each answer sees an eighth of the image, a single gradient leads nowhere in particular."""
    keep = 8.0

    def logits(z: Tensor) -> Tensor:
        seen = torch.randint(8, z.shape, generator=generator) == 0
        answer: Tensor = NET(keep * z * seen)
        return answer

    def failures(m: int) -> float:
        view = eot(View(logits, exact=False), m)
        found = pgd(view, X, Y, Threat("linf", 0.2), draws(X), steps=15, keep="last", loss="margin").images
        answers = torch.stack([logits(found) for _ in range(400)])
        return float(objective(View(NET), answers, Y, "margin").mean())

    generator = torch.Generator().manual_seed(2)
    assert failures(30) > failures(1) + 0.5


# --- what it costs --------------------------------------------------------------------------------------


def test_every_draw_is_a_pass_of_each_point() -> None:
    counter = QueryCounter.of(len(X), torch.device("cpu"))
    view = eot(instrument(View(Masked()), counter, "gradient", target=None, exact=False), 5)
    pgd(view, X, Y, LINF, draws(X), steps=4, keep="last", drop=False)
    assert (counter.forwards == 5 * 4).all()
    assert (counter.backwards == 5 * 4).all()


def test_examples_that_are_dropped_cost_no_more_draws() -> None:
    counter = QueryCounter.of(len(X), torch.device("cpu"))
    view = eot(instrument(View(NET), counter, "gradient", target=(Y + 1) % 5, exact=True), 3)
    rows = torch.tensor([7, 2])
    part = view.select(rows)
    assert part.target is not None
    assert torch.equal(part.target, view.target[rows])  # type: ignore[index]
    answers = part.logits(torch.cat([X[rows]] * 4).requires_grad_())
    assert answers.shape == (3, 8, 5)
    answers.sum().backward()
    spent = torch.zeros(len(X), dtype=torch.float64)
    spent[rows] = 12
    assert torch.equal(counter.forwards, spent)
    assert torch.equal(counter.backwards, spent)
    again = part.select(torch.tensor([1]))
    again.logits(X[2:3])
    spent[2] += 3
    assert torch.equal(counter.forwards, spent)


def test_a_callable_that_knows_no_rows_is_asked_as_it_is() -> None:
    view = eot(View(NET), 2).select(torch.tensor([3]))
    assert torch.equal(view.logits(X[3:4]), torch.stack([NET(X[3:4])] * 2))


def test_what_answers_several_times_of_itself_is_averaged_over_all_answers() -> None:
    passes = drawn(3, 12, 5)
    view = eot(View(lambda z: passes + 0 * z.sum()), 4)
    answers = view.logits(X)
    assert answers.shape == (12, 12, 5)
    assert torch.equal(answers, passes.repeat(4, 1, 1))
    assert torch.allclose(objective(view, answers, Y, "margin"), objective(view, passes, Y, "margin"))


def test_an_image_s_result_does_not_depend_on_its_company() -> None:
    whole = pgd(eot(View(NET), 3), X, Y, LINF, draws(X), steps=6).images
    rows = torch.tensor([8, 3, 4])
    noise = Noise("test", rows, dtype=X.dtype)
    assert apart(pgd(eot(View(NET), 3), X[rows], Y[rows], LINF, noise, steps=6).images, whole[rows]) < 1e-9


# --- the real case --------------------------------------------------------------------------------------


def test_a_projection_with_fresh_starts_is_averaged_over_its_starts() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 0.04, "latent": 8, "net": "E", "net_width": 0.1}
    model = DefenseGan(Shape(1, 28, 28, 10), **settings, restarts=2, steps=6, starts="fresh", spread="prior")
    model = model.double().eval().requires_grad_(False)
    for weight in model.generator.parameters():
        weight *= 3  # Untrained, it draws nearly the same image from any code.
    x, y = torch.rand(2, 1, 28, 28, dtype=torch.float64), torch.tensor([3, 4])
    torch.manual_seed(1)
    found = gradient(eot(model.bpda(), 4), x, y, "ce")
    torch.manual_seed(1)
    each = torch.stack([gradient(model.bpda(), x, y, "ce") for _ in range(4)])
    assert apart(each[0], each[1]) > 0.01 * float(each.abs().max())  # They do differ.
    assert apart(found, each.mean(0)) < 1e-12


# --- in a suite -----------------------------------------------------------------------------------------


def planned(folder: Path, defense: dict[str, Any], *views: Any, **attack: Any) -> planner.Plan:
    attacks = {"attack": {"use": "pgd", "steps": 4, **attack}}
    path = suite(folder, {"net": defense}, attacks, [{**TASK, "views": list(views)}])
    return planner.make(resolve.load(path))


def crafts(made: planner.Plan) -> dict[str, str]:
    return {cell.coordinates["view"]: cell.job.crafts[0].key for cell in made.conditions}


def test_a_view_with_draws_is_another_craft_and_one_draw_is_the_same(tmp_path: Path) -> None:
    use = {"use": "toy/noisy"}
    views = [{"use": "logits", "draws": 3}, {"use": "logits", "draws": 7}]
    found = crafts(planned(tmp_path, use, "logits", *views))
    assert list(found) == ["logits", "logits(draws=3)", "logits(draws=7)"]
    assert len(set(found.values())) == 3
    assert crafts(planned(tmp_path, use, {"use": "logits", "draws": 1})) == {"logits": found["logits"]}


def test_draws_stand_beside_a_view_s_own_parameters(tmp_path: Path) -> None:
    view = {"use": "scaled", "temperature": 3.0, "draws": 2}
    assert list(crafts(planned(tmp_path, {"use": "toy/linear"}, view))) == [
        "scaled(temperature=3.0, draws=2)"
    ]


def test_draws_of_a_defense_that_does_not_draw_are_doubted(tmp_path: Path) -> None:
    view = {"use": "logits", "draws": 9}
    for use, random in (("toy/linear", False), ("toy/noisy", True)):
        (flags,) = {tuple(cell.facts["flags"]) for cell in planned(tmp_path, {"use": use}, view).conditions}
        sentence = "9 draws of net, whose answers do not differ, are one"
        assert flags == (() if random else (sentence,))


@pytest.mark.parametrize(
    ("use", "view", "space"),
    [
        ("toy/linear", "code", "inversion"),
        ("sdim", "features", "features"),
        ("abs", "prototypes", "prototypes"),
    ],
)
def test_draws_are_refused_where_more_than_logits_is_asked_for(
    use: str, view: str, space: str, tmp_path: Path
) -> None:
    sentence = (
        rf"suite\.yaml:\d+: tasks\[0\]\.views.*: draws: view '{view}' is looked at in {space} space, where "
        "attacks ask for more than logits; averaged are views in latent and pixel space"
    )
    with pytest.raises(InputError, match=sentence):
        planned(tmp_path, {"use": use}, {"use": view, "draws": 2})
    assert planned(tmp_path, {"use": "toy/linear"}, {"use": "code", "draws": 1})


@pytest.mark.parametrize("count", [0, -1, 1.5, "many"])
def test_draws_are_a_whole_number_from_1(count: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suite\.yaml:\d+: tasks\[0\]\.views\[0\].*draws"):
        planned(tmp_path, {"use": "toy/noisy"}, {"use": "logits", "draws": count})


def test_a_suite_attacks_a_random_defense_through_the_mean_of_its_draws(tmp_path: Path) -> None:
    """A pixel moves where one of the draws saw it: with a chance of 1 - (1 - kept) ** draws."""
    views = ["logits", {"use": "logits", "draws": 10}]
    attack = {"use": "pgd", "steps": 1, "loss": "margin", "keep": "last", "drop": False, "start": "zero"}
    path = suite(
        tmp_path, {"net": {"use": "toy/noisy", "kept": 0.5}}, {"pgd": attack}, [{**TASK, "views": views}]
    )
    made = Ran(path)
    assert not made.failed
    one, ten = (made.outcomes(view=label) for label in ("logits", "logits(draws=10)"))
    assert (one["forwards"] == 1).all()
    assert (ten["forwards"] == 10).all()
    assert (ten["backwards"] == 10).all()
    # About 2,500 pixels have room for a step: a standard deviation of 0.01.
    assert ten["l0"].sum() > 1500
    assert abs(one["l0"].sum() / ten["l0"].sum() - 0.5) < 0.06
