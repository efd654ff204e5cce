"""Losses and success: against the formulas written out, one example at a time."""

import math
from collections.abc import Callable
from itertools import product

import mpmath
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


def test_dlr_of_as_many_classes_as_it_needs_is_no_plain_margin() -> None:
    z = torch.tensor([[4.0, 1.0, -2.0]], dtype=torch.float64)
    assert objective(view(), z, torch.tensor([0]), "dlr").item() == pytest.approx(-3 / 6)
    z = torch.tensor([[4.0, 1.0, -2.0, -3.0]], dtype=torch.float64)
    aimed = view(target=torch.tensor([1]))
    assert objective(aimed, z, torch.tensor([0]), "dlr").item() == pytest.approx(-3 / 6.5)


def test_dlr_without_a_gap_is_the_margin_and_so_is_its_gradient() -> None:
    """There is nothing to divide by between equal classes, nor above minus infinity."""
    low, tiny = -math.inf, 1e-13
    rows = [[1.0, 1, 1, 0], [1, 1 - tiny, 1 - 2 * tiny, 0], [3, 1, low, low], [1, 3, low, low]]
    y = torch.zeros(4, dtype=torch.int64)
    found = []
    for loss in ("dlr", "margin"):
        at = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        values = objective(view(), at, y, loss)
        (slope,) = torch.autograd.grad(values.sum(), at)
        found.append((values, slope))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][1:], found[1][1][1:])
    # Of equal classes any may be the best: one goes up and the truth goes down.
    for _, slope in found:
        assert slope[0, 0] == -1
        assert slope[0].sum() == 0


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


# --- in float32, against arbitrary precision -------------------------------------------------------------

SMALLEST, NORMAL, LARGEST = 2.0**-149, 2.0**-126, 3.4e38
Number = mpmath.mpf


def exact(row: list[float], goals: list[int], loss: Loss, *, named: bool) -> tuple[Number, list[Number]]:
    """Return a loss and its gradient; ``named``: what is named in `goals` is gone for, else the rest is."""
    z = [mpmath.mpf(value) for value in row]
    rest = [k for k in range(len(z)) if k not in goals]
    if loss == "ce":
        among, sign = (goals, 1) if named else (rest, -1)
        level = max(z)
        weight = [mpmath.exp(value - level) for value in z]
        inside = mpmath.fsum(weight[k] for k in among)
        outside = mpmath.fsum(weight[k] for k in range(len(z)) if k not in among)
        whole = inside + outside
        slopes = [w * (outside / inside if k in among else -1) / whole for k, w in enumerate(weight)]
        return -sign * mpmath.log1p(outside / inside), [sign * slope for slope in slopes]
    best, worst = (max(each, key=lambda k: z[k]) for each in (goals, rest))
    slopes = [mpmath.mpf((k == best) - (k == worst)) for k in range(len(z))]
    return z[best] - z[worst], slopes


def ratio(
    row: list[float], margin: tuple[Number, list[Number]], classes: int, targeted: bool
) -> tuple[Number, list[Number]]:
    """Return DLR and its gradient from those of the margin, among so many classes."""
    z = [mpmath.mpf(value) for value in row]
    order = sorted(range(classes), key=lambda k: -z[k])
    low, top = order[2:4] if targeted else order[2:3], max(range(len(z)), key=lambda k: z[k])
    gap = z[top] - mpmath.fsum(z[k] for k in low) / len(low)
    slopes = [mpmath.mpf(k == top) - mpmath.mpf(k in low) / len(low) for k in range(len(z))]
    value = margin[0] / gap
    return value, [(one - value * other) / gap for one, other in zip(margin[1], slopes, strict=True)]


def near(found: float, wanted: Number) -> bool:
    """Whether a float32 is as near as it must be, wherever float32 can hold what is wanted."""
    size = abs(wanted)
    if size < SMALLEST:
        return abs(found) <= SMALLEST
    if size < NORMAL:
        return found != 0 and abs(found - wanted) <= SMALLEST
    return size > LARGEST or abs(found - wanted) <= 1e-5 * size


def apart(gap: float | None, offset: float, classes: int, seed: int) -> Tensor:
    """Return distinct float32 logits (8, classes), of which every second row's truth leads: `gap` apart, or
    (None) anything from a millionth to a million in one row.
    """
    draw = torch.Generator().manual_seed(seed)
    z = torch.rand(8, classes, generator=draw, dtype=torch.float64)
    z = 10 ** (12 * z - 6) * (torch.rand(z.shape, generator=draw) - 0.5).sign() if gap is None else gap * z
    z[::2, 0] = z[::2].amax(1) + (1e-6 if gap is None else gap)
    z[1::4, 1] += gap or 0.0
    z = (z + offset).float()
    # What an offset has made equal is no matter of losses: a maximum has two gradients there.
    rank, ulp = z.argsort(dim=1, stable=True).argsort(1), max(abs(offset), gap or 1e6) * 2**-22
    return z if all(len(row.unique()) == classes for row in z) else (z + ulp * rank).float()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_losses_and_their_gradients_are_exact_in_float32(
    loss: Loss, refusal: bool, targeted: bool, classes: int
) -> None:
    """Over logits from a millionth to a million apart, and as far from 0, however far a class leads."""
    y, t = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
    seen = view(refusal=refusal, target=t if targeted else None)
    goals = [1] if targeted else list(range(1, classes))
    scales = (1e-6, 1e-3, 1.0, 10.0, 20.0, 40.0, 90.0, 1e3, 1e6, None)
    lost = []
    with mpmath.workdps(120):
        for gap, offset in product(scales, (0.0, -3e2, 1e6)):
            z = apart(gap, offset, classes + refusal, seed=round(gap or 7)).requires_grad_()
            losses = objective(seen, z, y, loss)
            (gradient,) = torch.autograd.grad(losses.sum(), z)
            assert losses.dtype == gradient.dtype == torch.float32
            for row, value, slope in zip(z.tolist(), losses.tolist(), gradient.tolist(), strict=True):
                wanted = exact(row, goals, "ce" if loss == "ce" else "margin", named=targeted or refusal)
                if loss == "dlr" and classes >= (4 if targeted else 3):
                    wanted = ratio(row, wanted, classes, targeted)
                if not all(map(near, [value, *slope], [wanted[0], *wanted[1]])):
                    lost.append((gap, offset, row, value, slope))
    assert not lost, (len(lost), lost[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_draws_is_exact_in_float32(loss: Loss) -> None:
    """Draws whose losses are 40 orders of magnitude apart, each with a gradient of its own."""
    scales = (1e-3, 1.0, 20.0, 60.0)
    z = torch.stack([apart(gap, 0.0, 5, seed=3) for gap in scales]).requires_grad_()
    y = torch.zeros(8, dtype=torch.int64)
    losses = objective(view(), z, y, loss)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    with mpmath.workdps(120):
        for n in range(8):
            wanted = []
            for row in z[:, n].tolist():
                one = exact(row, [1, 2, 3, 4], "ce" if loss == "ce" else "margin", named=False)
                wanted.append(ratio(row, one, 5, False) if loss == "dlr" else one)
            assert near(losses[n].item(), mpmath.fsum(value for value, _ in wanted) / 4)
            for draw, (_, slopes) in enumerate(wanted):
                assert all(map(near, gradient[draw, n].tolist(), [slope / 4 for slope in slopes]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [3, 4, 7])
def test_a_class_at_minus_infinity_is_as_one_far_below(
    loss: Loss, refusal: bool, targeted: bool, classes: int
) -> None:
    """The same signs of the gradient, none that is not finite, and nothing to the class itself."""
    far, y = -1e30, torch.zeros(60, dtype=torch.int64)
    seen = view(refusal=refusal, target=y + 1 if targeted else None)
    for masked in range(2, classes):
        z = logits(60, classes + refusal, seed=masked).float()
        z[:, masked:classes] = far
        low = z.clone().requires_grad_()
        z = z.masked_fill(z == far, -math.inf).requires_grad_()
        (ours,) = torch.autograd.grad(objective(seen, z, y, loss).sum(), z)
        (theirs,) = torch.autograd.grad(
            objective(seen, low, y, "ce" if loss == "ce" else "margin").sum(), low
        )
        assert ours.isfinite().all()
        assert not ours[:, masked:classes].any()
        if loss != "dlr":
            assert torch.equal(ours.sign()[:, :masked], theirs.sign()[:, :masked])
        assert torch.equal(succeeded(seen, z, y), succeeded(seen, low, y))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_where_no_goal_can_be_reached_no_gradient_is_lost_to_infinity(
    loss: Loss, refusal: bool, targeted: bool
) -> None:
    y = torch.zeros(4, dtype=torch.int64)
    seen = view(refusal=refusal, target=y + 1 if targeted else None)
    for left in (0, 5):  # The truth alone, or the refusal alone, is above minus infinity.
        z = torch.full((4, 6), -math.inf).index_fill(1, torch.tensor([left]), 1.0).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(seen, z, y, loss).sum(), z)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_dlr_s_gap_counts_no_masked_class_and_is_never_zero(loss: Loss) -> None:
    ties = torch.tensor(
        [[1.0, 1, 1, 1], [1, 1, 1, 0], [2, 1, 1, 1], [0, 0, 0, 0], [1, 0, -math.inf, -math.inf]]
    )
    y = torch.zeros(5, dtype=torch.int64)
    for target in (None, torch.ones_like(y)):
        z = ties.clone().requires_grad_()
        losses = objective(view(target=target), z, y, loss)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        # The truth is not to go up (eq. 6 leaves it where the second and the third tie), and a goal is.
        assert (gradient[:, 0] <= 0).all()
        assert (gradient[:, 1] > 0).all()


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
