"""What the referee sees of an attack in passing, on a half-space where everything is known."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, autograd

from bench.losses import objective, succeeded
from bench.protocols import Images, Shape, Threat, View
from bench.referee.instruments import QueryCounter, instrument
from bench.referee.watch import EVERY, Watch
from bench.results.outcomes import WATCHED
from bench.testing import Halfspace

PLANE = Halfspace(Shape(1, 4, 4, 2)).requires_grad_(False)
X, Y = PLANE.examples(4)
LEAST = PLANE.least(X, "linf")


def looked(radius: float, view: View | None = None) -> tuple[View, View, Watch]:
    """Return a view as the defense gives it, as an attack gets it, and the watch over it."""
    bare = view or View(PLANE)
    watch = Watch(X, Y, Threat("linf", radius), target=None, refusal=False)
    counter = QueryCounter.of(len(X), X.device)
    return bare, instrument(bare, counter, "gradient", target=None, exact=True, watch=watch), watch


def pushed(by: float) -> Images:
    """Return the images moved by so much towards the other side of the plane, which is on the way to it."""
    z = X.clone().requires_grad_()
    (slope,) = autograd.grad(objective(View(PLANE), PLANE(z), Y, "margin").sum(), z)
    return (X + by * slope.sign()).clamp(0, 1)


def test_what_is_seen_can_be_kept_also_where_nothing_is(tmp_path: Path) -> None:
    code = View(lambda z: PLANE(z.sigmoid()), encode=lambda x: x.logit(eps=1e-6), decode=torch.sigmoid)
    for bare in (View(PLANE), code):
        _, _, watch = looked(0.1, bare)
        columns = watch.columns(bare, X)
        assert tuple(columns) == ("zero_gradients", "probed", "lost_success", *WATCHED[3:])
        save_file(dict(columns), tmp_path / "columns.safetensors")
        assert columns["zero_gradients"].isnan().all()
        assert columns["probed"].isnan().all()
    assert columns["view_margin"].isnan().all(), "the points of a code are no images"


def test_the_view_s_own_verdicts_are_margins() -> None:
    bare, _, watch = looked(1.0)
    far = float(LEAST.max()) + 0.05
    columns = watch.columns(bare, pushed(far))
    assert (columns["view_margin_clean"] < 0).all()
    assert (columns["view_margin"] > 0).all()
    expected = objective(bare, PLANE(X), Y, "margin")
    assert torch.allclose(columns["view_margin_clean"], expected.double())


def test_the_verdict_on_several_answers_is_that_on_their_mean() -> None:
    """Two answers name two wrong classes, and their mean names the right one."""
    one, other = torch.tensor([0.0, 3.0, -9.0]), torch.tensor([0.0, -9.0, 3.0])

    def answers(z: Tensor) -> Tensor:
        return torch.stack([each.expand(len(z), 3) + 0 * z.flatten(1)[:, :1] for each in (one, other)])

    watch = Watch(X, torch.zeros_like(Y), Threat("linf", 0.1), target=None, refusal=False)
    view = View(answers)
    assert not succeeded(view, answers(X), torch.zeros_like(Y)).any()
    assert watch.columns(view, X)["view_margin"].tolist() == [-3.0] * len(X)


@pytest.mark.parametrize("share", [0.25, 1.0, 1.5])
def test_how_far_an_attack_looked_within_the_threat(share: float) -> None:
    radius = 0.02
    bare, view, watch = looked(radius)
    view.logits(pushed(share * radius))
    columns = watch.columns(bare, X)
    # What is beyond the threat is no lawful image.
    expected = share if share <= 1 else 0.0
    assert columns["probed"].tolist() == pytest.approx([expected] * len(X), abs=1e-4)


def test_a_success_that_is_not_returned_is_lost() -> None:
    radius = float(LEAST.max()) + 0.05
    bare, view, watch = looked(radius)
    won = pushed(radius)
    view.logits(won)
    assert watch.columns(bare, X)["lost_success"].tolist() == [1.0] * len(X)
    assert watch.columns(bare, won)["lost_success"].tolist() == [0.0] * len(X)
    # One that is not lawful is none.
    bare, view, watch = looked(float(LEAST.min()) / 2)
    view.logits(won)
    assert watch.columns(bare, X)["lost_success"].tolist() == [0.0] * len(X)


@pytest.mark.parametrize("copies", [1, 3])
def test_answers_that_are_probabilities_are_told_from_logits(copies: int) -> None:
    def half(z: Tensor) -> Tensor:
        shares = (torch.arange(len(z)) % len(X) < 2)[:, None]
        return torch.where(shares, PLANE(z).softmax(1), PLANE(z))

    def ask(view: View) -> list[float]:
        _, seen, watch = looked(0.1, view)
        seen.logits(X.repeat(copies, 1, 1, 1))
        return watch.columns(view, X)["probabilities"].tolist()

    assert ask(View(lambda z: PLANE(z).softmax(1))) == [1.0] * 4
    assert ask(View(lambda z: PLANE(z).bfloat16().softmax(1))) == [1.0] * 4
    assert ask(View(lambda z: PLANE(z).softmax(1).log())) == [0.0] * 4
    assert ask(View(lambda z: PLANE(z) - PLANE(z).mean(1, keepdim=True) + 0.5)) == [0.0] * 4
    assert ask(View(half)) == [1.0, 1.0, 0.0, 0.0]
    # Of several draws, all.
    assert ask(View(lambda z: torch.stack([PLANE(z).softmax(1), half(z)]))) == [1.0, 1.0, 0.0, 0.0]


def test_a_refusal_is_no_probability_of_a_class() -> None:
    def logits(z: Tensor) -> Tensor:
        return torch.cat([PLANE(z).softmax(1), torch.full((len(z), 1), 0.7)], 1)

    for refusal in (False, True):
        watch = Watch(X, Y, Threat("linf", 0.1), target=None, refusal=refusal)
        view, counter = View(logits, refusal=refusal), QueryCounter.of(len(X), X.device)
        seen = instrument(view, counter, "gradient", target=None, exact=True, watch=watch)
        seen.logits(X)
        assert watch.columns(view, X)["probabilities"].tolist() == [float(refusal)] * 4


def test_gradients_that_say_nothing_are_counted_by_example() -> None:
    def half(z: Tensor) -> Tensor:
        logits = PLANE(z)
        flat = torch.arange(len(z)) % 2 == 0
        return torch.where(flat[:, None], logits.detach() + 0 * logits, logits)

    _, view, watch = looked(0.1, View(half))
    for _ in range(2 * EVERY):
        z = X.clone().requires_grad_()
        autograd.grad(view.logits(z)[:, 0].sum(), z)
    columns = watch.columns(View(half), X)
    assert columns["zero_gradients"].tolist() == [1.0, 0.0, 1.0, 0.0]
    # Of some of the examples, in copies, by their places in the shard.
    _, view, watch = looked(0.1, View(half))
    part = view.select(torch.tensor([2]))
    z = X[[2, 2]].clone().requires_grad_()
    autograd.grad(part.logits(z)[:, 0].sum(), z)
    found = watch.columns(View(half), X)["zero_gradients"]
    assert found[2] == 0.5
    assert found[[0, 1, 3]].isnan().all()


def test_an_answer_is_the_same_with_and_without_a_watch() -> None:
    bare, view, _ = looked(math.inf)
    z = X.clone().requires_grad_()
    one, other = PLANE(z), view.logits(z)
    assert torch.equal(one - one.amax(1, keepdim=True), other)
    slopes = [autograd.grad(each[:, 0].sum(), z)[0] for each in (bare.logits(z), view.logits(z))]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("steps", [*range(5, 45), 100, 1000])
@pytest.mark.parametrize(("turn", "expected"), [(1.0, 1.0), (0.25, 0.0)])
def test_how_fast_the_margin_rose_at_the_end(steps: int, turn: float, expected: float) -> None:
    """On a half-space the margin rises as the way does: evenly to the last step, or up to a share of them."""
    radius = 0.01
    assert float(LEAST.min()) > radius
    bare, view, watch = looked(radius)
    for step in range(1, steps + 1):
        view.logits(pushed(radius * min(1.0, step / steps / turn)))
    found = watch.columns(bare, pushed(radius))["end_pace"].tolist()
    assert found == pytest.approx([expected] * len(X), abs=1e-6)


def test_the_pace_is_each_example_s_own_and_of_lawful_images() -> None:
    radius = 0.01
    bare, view, watch = looked(radius)
    evenly, at_once = torch.tensor([0, 2]), torch.tensor([1, 3])
    for step in range(1, 21):
        view.select(evenly).logits(pushed(radius * step / 20)[evenly])
        view.select(at_once).logits(pushed(radius)[at_once])
    found = watch.columns(bare, pushed(radius))["end_pace"]
    assert found.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], abs=1e-6)
    # Four steps are too few to tell. Beyond the threat nothing counts, and what never rose has no pace.
    bare, view, watch = looked(radius)
    for step in range(1, 5):
        view.logits(pushed(radius * step / 4))
    assert watch.columns(bare, pushed(radius))["end_pace"].isnan().all()
    bare, view, watch = looked(radius)
    for step in range(1, 21):
        view.logits(pushed(radius * (1 + step)))
    assert watch.columns(bare, X)["end_pace"].isnan().all()
