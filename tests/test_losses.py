"""Losses and success: against the formulas written out, one example at a time."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from bench.losses import Loss, objective, succeeded
from bench.protocols import View, answered, identity

LOSSES: tuple[Loss, ...] = ("ce", "margin", "dlr")


def view(*, refusal: bool = False, target: Tensor | None = None) -> View:
    return View(identity, refusal=refusal, target=target)


def logits(n: int = 50, classes: int = 6, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int = 50, classes: int = 6, *, seed: int = 1) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


Z, Y = logits(), labels()
T = (Y + 1 + labels(classes=4, seed=2)) % 5  # A label that may be the truth's neighbour, never a refusal.


def by_hand(formula: Callable[[list[float], int, int], float], z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    rows = zip(z.tolist(), y.tolist(), t.tolist(), strict=True)
    return torch.tensor([formula(*row) for row in rows], dtype=torch.float64)


def probability(row: list[float], which: list[int]) -> float:
    return sum(math.exp(row[k]) for k in which) / sum(math.exp(value) for value in row)


def margin(row: list[float], goals: list[int]) -> float:
    return max(row[k] for k in goals) - max(row[k] for k in range(len(row)) if k not in goals)


def test_cross_entropy_is_minus_the_log_of_the_truth_s_probability() -> None:
    expected = by_hand(lambda row, y, _: -math.log(probability(row, [y])), Z, Y, T)
    assert torch.allclose(objective(view(), Z, Y, "ce"), expected)


def test_cross_entropy_with_a_target_is_the_log_of_its_probability() -> None:
    expected = by_hand(lambda row, _, t: math.log(probability(row, [t])), Z, Y, T)
    for refusal in (False, True):
        assert torch.allclose(objective(view(target=T, refusal=refusal), Z, Y, "ce"), expected)


def test_cross_entropy_with_a_refusal_is_the_log_of_the_chance_of_an_accepted_error() -> None:
    y = Y % 5
    expected = by_hand(
        lambda row, truth, _: math.log(probability(row, [k for k in range(5) if k != truth])), Z, y, T
    )
    assert torch.allclose(objective(view(refusal=True), Z, y, "ce"), expected)


@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_margin_is_the_best_goal_s_lead_over_the_best_of_the_others(
    refusal: bool, targeted: bool
) -> None:
    y = Y % 5
    everything = range(5 if refusal else 6)

    def formula(row: list[float], truth: int, target: int) -> float:
        return margin(row, [target] if targeted else [k for k in everything if k != truth])

    seen = view(refusal=refusal, target=T if targeted else None)
    assert torch.allclose(objective(seen, Z, y, "margin"), by_hand(formula, Z, y, T))


def test_dlr_is_equation_6_and_with_a_target_equation_7() -> None:
    """Croce and Hein (2020), written out; of eq. 7 where the truth still leads."""

    def sixth(row: list[float], y: int, _: int) -> float:
        order = sorted(row, reverse=True)
        return -(row[y] - max(value for k, value in enumerate(row) if k != y)) / (order[0] - order[2])

    def seventh(row: list[float], y: int, t: int) -> float:
        order = sorted(row, reverse=True)
        return -(row[y] - row[t]) / (order[0] - (order[2] + order[3]) / 2)

    assert torch.allclose(objective(view(), Z, Y, "dlr"), by_hand(sixth, Z, Y, T))
    y = Z.argmax(1)
    t = (y + 1 + labels(classes=5, seed=3)) % 6
    assert torch.allclose(objective(view(target=t), Z, y, "dlr"), by_hand(seventh, Z, y, t))


@pytest.mark.parametrize(("classes", "targeted"), [(2, False), (2, True), (3, True)])
def test_dlr_is_the_margin_where_there_are_too_few_classes(classes: int, targeted: bool) -> None:
    z, y = logits(classes=classes), labels(classes=classes)
    seen = view(target=(y + 1) % classes if targeted else None)
    assert torch.equal(objective(seen, z, y, "dlr"), objective(seen, z, y, "margin"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("classes", "refusal"), [(2, False), (3, False), (4, False), (3, True), (6, True)])
def test_no_loss_is_flat_before_success(loss: Loss, targeted: bool, classes: int, refusal: bool) -> None:
    """Moving the goal's logits up always raises the loss, whatever comes first, second and third."""
    z, accepted = logits(400, classes), classes - refusal
    y = labels(400, accepted)
    t = (y + 1) % accepted
    seen = view(refusal=refusal, target=t if targeted else None)
    if targeted:
        goals = torch.nn.functional.one_hot(t, classes).double()
    else:
        goals = 1 - torch.nn.functional.one_hot(y, classes).double()
        goals[:, accepted:] = 0
    z = z.requires_grad_()
    losses = objective(seen, z, y, loss)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    held = ~succeeded(seen, z.detach(), y)
    assert held.any()
    assert ((gradient * goals).sum(1)[held] > 1e-12).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_gradients_equal_finite_differences(loss: Loss, refusal: bool, targeted: bool) -> None:
    seen = view(refusal=refusal, target=T[:8] if targeted else None)
    assert torch.autograd.gradcheck(
        lambda z: objective(seen, z, Y[:8] % 5, loss), (Z[:8].clone().requires_grad_(),)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_added_to_all_logits_changes_nothing_and_a_scale_nothing_for_dlr(loss: Loss) -> None:
    assert torch.allclose(objective(view(), Z - 300, Y, loss), objective(view(), Z, Y, loss))
    assert torch.equal(succeeded(view(), Z - 300, Y), succeeded(view(), Z, Y))
    if loss == "dlr":
        assert torch.allclose(objective(view(), 64 * Z, Y, loss), objective(view(), Z, Y, loss))


@given(
    row=some.lists(some.floats(-50, 50), min_size=3, max_size=7, unique=True),
    truth=some.integers(0, 1),
    refusal=some.booleans(),
    targeted=some.booleans(),
)
@settings(max_examples=150, deadline=None, database=None)
def test_margin_and_dlr_are_positive_exactly_on_success(
    row: list[float], truth: int, refusal: bool, targeted: bool
) -> None:
    z, y = torch.tensor([row], dtype=torch.float64), torch.tensor([truth])
    seen = view(refusal=refusal, target=1 - y if targeted else None)
    label = max(range(len(row)), key=row.__getitem__)
    refused = refusal and label == len(row) - 1
    won = not refused and (label == 1 - truth if targeted else label != truth)
    assert succeeded(seen, z, y).item() == won
    for loss in ("margin", "dlr"):
        assert (objective(seen, z, y, loss).item() > 0) == won


def test_a_class_may_be_minus_infinity_and_nothing_else_may_be_infinite() -> None:
    inf, nan = math.inf, math.nan
    lawful = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, -inf], [-inf, 0.0, -inf], [0.0, -inf, -inf]])
    lawless = torch.tensor([[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [-inf, nan, 0.0]])
    assert answered(lawful).all()
    assert not answered(lawless).any()
    y = torch.zeros(4, dtype=torch.int64)
    assert succeeded(view(), lawful, y).tolist() == [True, True, True, False]
    assert not succeeded(view(), lawless, y).any()
    # Of several answers the mean decides; one draw's NaN is the example's.
    draws = torch.stack([lawful, lawful.flip(1)])
    assert succeeded(view(), draws, y).tolist() == answered(draws.mean(0)).tolist()
    draws[1, 0, 0] = nan
    assert not succeeded(view(), draws, y)[0]


def test_one_example_s_nan_is_nobody_else_s() -> None:
    z = Z.clone()
    z[3] = math.nan
    z.requires_grad_()
    for loss in LOSSES:
        (gradient,) = torch.autograd.grad(objective(view(), z, Y, loss).sum(), z)
        others = torch.arange(len(z)) != 3
        assert gradient[others].isfinite().all()
        assert gradient[others].abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_copies_of_points_find_their_labels(loss: Loss, targeted: bool) -> None:
    copies = torch.stack([logits(seed=seed) for seed in range(3)])
    seen = view(target=T if targeted else None)
    flat = copies.flatten(0, 1)
    losses = torch.stack([objective(seen, each, Y, loss) for each in copies])
    wins = torch.stack([succeeded(seen, each, Y) for each in copies])
    assert torch.equal(objective(seen, flat, Y, loss), losses.flatten())
    assert torch.equal(succeeded(seen, flat, Y), wins.flatten())


@pytest.mark.parametrize("loss", LOSSES)
def test_of_several_answers_losses_are_averaged_and_the_mean_decides(loss: Loss) -> None:
    answers = torch.stack([logits(seed=seed) for seed in range(4)])
    losses = torch.stack([objective(view(), each, Y, loss) for each in answers])
    assert torch.allclose(objective(view(), answers, Y, loss), losses.mean(0))
    assert torch.equal(succeeded(view(), answers, Y), succeeded(view(), answers.mean(0), Y))
    # With two copies of each example besides.
    twice = torch.cat([answers, answers + 1], 1)
    assert torch.allclose(objective(view(), twice, Y, loss), losses.mean(0).repeat(2))
