"""The quick worst case: closed forms, the order of a linear network, directed starts, what is suspicious."""

import pytest
import torch
from published_nets import published
from torch import Tensor, nn

from attacks import fast_worst as parts
from attacks.fast_worst import directed_start, fast_worst, ranked
from bench import Images, Labels, Norm, Shape, Threat, View
from bench.noise import Noise
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS
from bench.testing import Halfspace, check_planted

DUAL = {"linf": 1.0, "l2": 2.0}


def draws(x: Images) -> Noise:
    return Noise("test", torch.arange(len(x)), dtype=x.dtype)


class Linear(nn.Module):
    """The largest of linear functions, with slopes of unequal lengths."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(classes, 30, generator=draw, dtype=torch.float64)
        self.weight *= torch.linspace(0.3, 3, classes, dtype=torch.float64)[:, None]

    def forward(self, z: Images) -> Tensor:
        logits: Tensor = (z.flatten(1) - 0.5) @ self.weight.T
        return logits

    def ways(self, x: Images, y: Labels, norm: Norm) -> Tensor:
        """Return how far each class's boundary is, infinite for the true one, (N, K)."""
        logits: Tensor = self(x)
        gap = logits.gather(1, y[:, None]) - logits
        length: Tensor = (self.weight[y][:, None] - self.weight).norm(p=DUAL[norm], dim=2)
        return (gap / length).scatter(1, y[:, None], torch.inf)


NET = Linear()
X = 0.5 + 0.05 * torch.randn(20, 1, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = NET(X).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_network_classes_are_ranked_by_their_distance(norm: Norm) -> None:
    order = ranked(View(NET), X, Y, norm)
    assert torch.equal(order, NET.ways(X, Y, norm).argsort(1)[:, :-1])
    # It is not the order of the logits.
    likeliest = NET(X).scatter(1, Y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    assert (order[:, 0] != likeliest[:, 0]).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_worst_case_of_a_linear_network_is_that_of_the_closed_form(norm: Norm) -> None:
    least = NET.ways(X, Y, norm).amin(1)
    radius = float(least.median()) * 1.001
    assert ((least / radius - 1).abs() > 5e-4).all()
    crafted = fast_worst(View(NET), X, Y, Threat(norm, radius), draws(X))
    assert torch.equal(NET(crafted.images).argmax(1) != Y, least < radius)
    assert torch.equal(crafted.notes["found_by"] >= 0, least < radius)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_half_space_with_its_box_it_is_that_of_the_closed_form(norm: Norm) -> None:
    plane = Halfspace(Shape(2, 5, 4, 3)).requires_grad_(False)
    x, y = plane.examples(10)
    least = plane.least(x, norm)
    for share, crosses in ((1.05, True), (0.95, False)):
        for i in range(4):
            one, label = x[i : i + 1], y[i : i + 1]
            found = fast_worst(View(plane), one, label, Threat(norm, share * float(least[i])), draws(one))
            assert bool(plane(found.images).argmax(1) != label) == crosses


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_planted_images_are_found(norm: Norm) -> None:
    assert check_planted("fast-worst", norm) >= 0.95


def test_a_start_is_the_corner_of_its_weighted_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a linear network steps of the radius end in the corner that the sum of slopes points to."""
    seen: list[Tensor] = []

    class Kept(Noise):
        def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
            seen.append(super().uniform(shape, low, high))
            return seen[-1]

    threat = Threat("linf", 0.02)
    start = directed_start(View(NET), X, Y, threat, Kept("a", torch.arange(len(X)), dtype=X.dtype))
    _, weights, true = seen  # The first is the random point.
    assert ((weights >= -1) & (weights <= 1)).all()
    assert ((true >= -0.5) & (true <= 0.1)).all()
    weights = weights.scatter(1, Y[:, None], true)
    corners = []
    for chosen in range(6):
        put = torch.full((len(X), 1), chosen)
        slope = weights.scatter(1, put, 0.8) @ NET.weight
        corners.append(threat.project(X, X + threat.radius * slope.sign().view_as(X)))
    matches = torch.stack([(start - corner).abs().flatten(1).amax(1) < 1e-12 for corner in corners])
    wrong = torch.nn.functional.one_hot(Y, 6).T == 0
    assert (matches & wrong).any(0).all()


def test_what_lies_behind_a_plateau_is_found_from_outside_the_ball() -> None:
    """A success needs 0.9 of the radius in one direction, and below that no loss has a slope.

    A random point of a sphere of s radii in 30 dimensions lies that far with the chance that a coordinate of
    s times the unit sphere is above 0.9: below 1e-9 for s = 1, 0.16 for 5 and 0.25 for 7, in five tries 0.67.
    """
    way = torch.randn(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    way /= way.norm()
    radius = 0.02

    def net(z: Images) -> Tensor:
        gain = ((z.flatten(1) - 0.5) @ way / radius - 0.9).clamp_min(0)
        return torch.stack([0 * gain + 1e-3, gain], 1)

    x, y = torch.full((200, 1, 5, 6), 0.5, dtype=torch.float64), torch.zeros(200, dtype=torch.int64)
    found = fast_worst(View(net), x, y, Threat("l2", radius), draws(x))
    broken = torch.bincount(found.notes["found_by"] + 1, minlength=8).tolist()
    # Of 200 the standard deviation is below 0.036.
    assert 0.67 - 4 * 0.036 < sum(broken[2:7]) / 200 < 0.67 + 4 * 0.036
    assert broken[1] == 0
    assert ((found.images - x).flatten(1).norm(dim=1) <= radius + 1e-9).all()
    assert torch.equal(net(found.images).argmax(1) == 1, found.notes["found_by"] >= 0)


def test_square_is_asked_only_where_gradients_or_logits_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four networks one is sound, one has no slope, one has a slope of NaN, one tells nothing apart."""

    def logits(z: Images, rows: Tensor) -> Tensor:
        a = z.flatten(1).mean(1) - 3
        a = torch.where(rows == 1, a.detach(), a)
        zero = torch.where(rows == 2, 0 * a, 1.0)
        pole = torch.where(zero == 0, 0 * zero, 1 / zero - 1)  # 0, but its gradient is 0 times infinity.
        a = torch.where(rows == 3, 1e-5, 1.0) * (a + pole)
        return torch.stack([-a, a, a - torch.where(rows == 3, 1e-5, 1.0)], 1)

    class ByRow:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __call__(self, z: Images) -> Tensor:
            return logits(z, self.rows.repeat(len(z) // len(self.rows)))

        def select(self, rows: Tensor) -> "ByRow":
            return ByRow(self.rows[rows])

    monkeypatch.setattr(parts, "QUERIES", 25)
    x, y = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    crafted = fast_worst(View(ByRow(torch.arange(4))), x, y, Threat("linf", 0.1), draws(x))
    assert crafted.notes["found_by"].tolist() == [-1] * 4
    # One look for the gradient, and one at the image; Square asks for the image and its queries beside.
    assert crafted.notes["forwards.search"].tolist() == [2, 28, 28, 28]
    assert crafted.notes["flat"].tolist()[:2] == [False, True]
    assert bool(crafted.notes["nonfinite"][2])


def test_stored_images_are_shown_first_and_cost_a_look() -> None:
    threat = Threat("linf", float(NET.ways(X, Y, "linf").amin(1).median()) * 1.001)
    cold = fast_worst(View(NET), X, Y, threat, draws(X))
    won = cold.notes["found_by"] >= 0
    assert 3 < won.sum() < len(X)
    counter = QueryCounter.of(len(X), torch.device("cpu"))
    view = instrument(View(NET), counter, "gradient", target=None, exact=True, starts=cold.images)
    warm = fast_worst(view, X, Y, threat, draws(X))
    assert torch.equal(warm.images[won], cold.images[won])
    assert (warm.notes["found_by"][won] == 0).all()
    assert (counter.forwards[won] == 2).all()


def test_it_asks_for_no_more_than_it_declares() -> None:
    declared = ATTACKS["fast-worst"].passes({})
    flat = torch.linspace(0, 1, 6, dtype=torch.float64)
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        counter = QueryCounter.of(2, torch.device("cpu"))
        view = instrument(
            View(lambda z: flat + 0 * z.flatten(1).sum(1, keepdim=True)),
            counter, "gradient", target=None, exact=True,
        )  # fmt: skip
        fast_worst(view, X[:2], torch.full((2,), 5), Threat(norm, 0.1), draws(X[:2]))
        assert counter.forwards.max() <= declared


# --- networks of other people ---------------------------------------------------------------------------


def test_no_certified_network_falls_below_its_certificate() -> None:
    """At most 5.8 % of all images can be wrong; of 400 at most 40 are, but for a chance below 1 in 1,000."""
    net, x, y = published("mnist-certified-0.1", slice(400))
    crafted = fast_worst(View(net), x, y, Threat("linf", 0.1), draws(x))
    wrong = int((net(crafted.images).argmax(1) != y).sum())
    clean = int((net(x).argmax(1) != y).sum())
    assert clean <= wrong <= 40
