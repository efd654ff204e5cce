"""Attacks that know of a refusal: matching guides, and the least move that is accepted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refusal
from test_attacks import NET, apart
from test_attacks import X as IMAGES
from test_attacks import Y as LABELS
from test_sdim import GREY, QUICK, built, fitting, made
from torch import Tensor

from attacks.boundary import boundary
from attacks.cw_l2 import cw_l2
from attacks.feature_matching import feature_matching
from attacks.logit_matching import logit_matching
from attacks.pgd import pgd
from attacks.threshold_cw import leads, threshold_cw
from bench import Crafted, Described, Features, Images, InputError, Labels, Shape, Threat, View, view_of
from bench.noise import Noise
from bench.referee.instruments import QueryCounter, answers_only, instrument
from bench.registry import ATTACKS, bind
from defenses.sdim import Sdim

LINF, L2 = Threat("linf", 0.1), Threat("l2", 0.15)


def noise(x: Images) -> Noise:
    return Noise("test", torch.arange(len(x)), dtype=x.dtype)


# --- an encoder that changes nothing ------------------------------------------------------------------

CENTRES = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.7, 0.3, 0.5, 0.3], [0.3, 0.8, 0.3, 0.6]]).double()
GUIDES = CENTRES.view(3, 1, 2, 2) + 0.02
X = torch.tensor([[0.32, 0.35, 0.3, 0.28], [0.45, 0.3, 0.4, 0.3], [0.3, 0.5, 0.3, 0.4]]).double()
X = X.view(3, 1, 2, 2)
Y = torch.zeros(3, dtype=torch.int64)


def nearest(z: Images) -> Tensor:
    """Return logits: minus the squared distance to each class's centre."""
    return -(z.flatten(1)[:, None] - CENTRES).square().sum(2)


def in_pixels(logits: Callable[[Images], Tensor]) -> Callable[[Images], Described]:
    """Return what describes images by their pixels."""
    return lambda z: Described(logits(z), z.flatten(1))


def plain(**changes: Any) -> Features:
    """Return a view whose features are the pixels."""
    view = Features(nearest, described=in_pixels(nearest), centres=CENTRES, guides=GUIDES, exact=False)
    return replace(view, **changes)


@pytest.mark.parametrize("guide", ["image", "centre"])
@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("label", [1, 2])
def test_where_features_are_pixels_the_image_goes_straight_to_its_guide(
    guide: Any, threat: Threat, label: int
) -> None:
    """The nearest point of the ball: of the cube pixel by pixel, of the sphere on the line."""
    target = torch.full((3,), label)
    crafted = feature_matching(plain(target=target), X, Y, threat, noise(X), guide=guide)
    goal = (GUIDES if guide == "image" else CENTRES.view(3, 1, 2, 2))[label].expand_as(X)
    best = threat.project(X, goal)
    step = 4 * threat.radius / 200
    assert apart(crafted.images, best) <= step
    # Of these the ball holds none; the way to them is the whole radius.
    assert (threat.distance(X, goal) > threat.radius).all()
    assert torch.allclose(threat.distance(X, crafted.images), torch.full((3,), threat.radius).double())
    assert (crafted.notes["guide"] == label).all()
    assert not crafted.notes["flat"].any()


PEAKED = torch.tensor([[0.7, 0.3, 0.5, 0.3], [0.3, 0.8, 0.3, 0.6]]).double().view(2, 1, 2, 2)
"""Guides whose largest pixel is that of their class."""


def pixels(z: Images) -> Tensor:
    return z.flatten(1)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_logits_that_are_pixels_are_matched_as_pixels(threat: Threat) -> None:
    view = Features(pixels, guides=PEAKED, exact=False, target=torch.ones(3, dtype=torch.int64))
    found = logit_matching(replace(view, centred=False), X, Y, threat, noise(X)).images
    assert apart(found, threat.project(X, PEAKED[1].expand_as(X))) <= 4 * threat.radius / 200


def test_the_level_of_logits_is_not_matched_where_it_is_not_to_be_seen() -> None:
    target = torch.ones(3, dtype=torch.int64)

    def shifted(z: Images) -> Tensor:
        level = z.flatten(1).square().sum(1, keepdim=True)
        return pixels(z) + 3 * level

    found = []
    for logits in (pixels, shifted):
        view = Features(logits, guides=PEAKED, exact=False)
        seen = instrument(
            view, QueryCounter.of(3, torch.device("cpu")), "gradient", target=target, exact=False
        )
        found.append(logit_matching(seen, X, Y, LINF, noise(X)).images)
    assert apart(*found) < 1e-9

    def far(z: Images) -> Tensor:
        way = pixels(z - PEAKED[1])
        return (way - way.mean(1, keepdim=True)).square().sum(1)

    # It is convex: no better point is near.
    for seed in range(20):
        step = 0.02 * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed), dtype=X.dtype)
        assert (far(LINF.project(X, found[0] + step)) >= far(found[0]) - 1e-3).all()
    assert (far(found[0]) < 0.5 * far(X)).all()


def test_several_answers_are_matched_on_average() -> None:
    """Two answers, shifted to either side: the mean of both losses is least at the guide again."""
    shift = torch.tensor([0.02, -0.01, 0.03, 0.0]).double()
    view = Features(
        lambda z: torch.stack([pixels(z) + shift, pixels(z) - shift]),
        guides=PEAKED,
        exact=False,
        centred=False,
        target=torch.ones(3, dtype=torch.int64),
    )
    found = logit_matching(view, X, Y, LINF, noise(X)).images
    assert apart(found, LINF.project(X, PEAKED[1].expand_as(X))) <= 4 * LINF.radius / 200


# --- what is kept ---------------------------------------------------------------------------------------


def line(low: float, high: float, classes: int = 2) -> Any:
    """Return logits of one value: class 1 between `low` and `high`, else class 0."""

    def logits(z: Images) -> Tensor:
        a = z.flatten(1)[:, 0]
        one = torch.where((a > low) & (a < high), 1.0, -1.0).to(z.dtype)
        return torch.stack([0 * a, one, *[0 * a - 5] * (classes - 2)], 1)

    return logits


def spotted(logits: Callable[[Images], Tensor], guides: Images) -> Features:
    """Return a surrogate view whose features are the pixels."""
    return Features(logits, described=in_pixels(logits), guides=guides, exact=False)


POINT, TRUTH = torch.full((1, 1, 1, 1), 0.5).double(), torch.tensor([0])


def test_of_the_wrong_iterates_the_one_nearest_to_the_guide_is_kept_and_no_right_one() -> None:
    """On the way from 0.5 to the guide at 0.9, only (0.595, 0.695) is wrong."""
    guides = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).double()
    view = spotted(line(0.595, 0.695), guides)
    settings: dict[str, Any] = {"steps": 40, "step_size": 0.01}
    found = feature_matching(view, POINT, TRUTH, Threat("linf", 0.4), noise(POINT), **settings).images
    assert found.item() == pytest.approx(0.69)
    # Where nothing on the way is wrong, the nearest: the guide itself.
    view = spotted(line(2, 3), guides)
    found = feature_matching(view, POINT, TRUTH, Threat("linf", 0.4), noise(POINT), **settings).images
    assert found.item() == pytest.approx(0.9)
    # Where winning here is winning, the first.
    view = replace(spotted(line(0.595, 0.695), guides), exact=True)
    found = feature_matching(view, POINT, TRUTH, Threat("linf", 0.4), noise(POINT), **settings).images
    assert found.item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("second", "wrong", "ends", "guide"),
    [
        # The ball ends at 0.4 and 0.6. Wrong on either side: the guide that is nearer to its end.
        (0.3, (-1, 2), 0.4, 2),
        (0.1, (-1, 2), 0.6, 1),
        # Wrong towards guide 1 alone, although guide 2 is reached.
        (0.4, (0.55, 2), 0.6, 1),
    ],
)
def test_of_all_turns_the_best_is_kept(
    second: float, wrong: tuple[float, float], ends: float, guide: int
) -> None:
    guides = torch.tensor([0.5, 0.9, second]).view(3, 1, 1, 1).double()
    view = spotted(line(*wrong, 3), guides)
    crafted = feature_matching(view, POINT, TRUTH, LINF, noise(POINT), steps=20)
    assert crafted.images.item() == pytest.approx(ends)
    assert crafted.notes["guide"].item() == guide


def test_turns_go_by_logits_and_an_example_is_done_at_its_first_success() -> None:
    view = plain(exact=True)
    order = nearest(X)[:, 1:].argsort(1, descending=True) + 1
    assert order.tolist() == [[1, 2], [1, 2], [2, 1]]
    small = Threat("linf", 1e-3)
    tried = feature_matching(view, X, Y, small, noise(X), classes=1, steps=2).notes["guide"]
    assert torch.equal(tried, order[:, 0])
    counter = QueryCounter.of(len(X), torch.device("cpu"))
    seen = instrument(replace(view, exact=True), counter, "gradient", target=None, exact=True)
    feature_matching(seen, X, Y, small, noise(X), steps=5)
    # Logits to rank; then in each of two turns the guide, six iterates and the kept one.
    assert (counter.forwards == 1 + 2 * (1 + 6 + 1)).all()
    assert (counter.backwards == 2 * 5).all()
    wide = Threat("linf", 0.2)
    counter = QueryCounter.of(len(X), torch.device("cpu"))
    seen = instrument(view, counter, "gradient", target=None, exact=True)
    crafted = feature_matching(seen, X, Y, wide, noise(X), steps=20)
    assert (nearest(crafted.images).argmax(1) != Y).all()
    assert torch.equal(crafted.notes["guide"], order[:, 0])
    assert (counter.forwards < 1 + 1 + 2 * 21 + 2).all()
    # At the first wrong iterate: one step less is right.
    for i, label in enumerate(order[:, 0].tolist()):
        back = crafted.images[i] - 4 * wide.radius / 20 * (GUIDES[label] - X[i]).sign()
        assert nearest(back[None]).argmax(1).item() == 0


def test_what_is_wrong_already_is_left_alone_where_winning_is_winning() -> None:
    y = torch.tensor([1, 0, 0])
    crafted = feature_matching(plain(exact=True), X, y, LINF, noise(X), steps=5)
    assert torch.equal(crafted.images[0], X[0])
    pushed = feature_matching(plain(), X, y, LINF, noise(X), steps=50)
    assert not torch.equal(pushed.images[0], X[0])


def test_a_refusal_is_no_class_to_be_matched() -> None:
    def logits(z: Images) -> Tensor:
        return torch.cat([nearest(z), torch.full((len(z), 1), 9.0, dtype=z.dtype)], 1)

    crafted = feature_matching(
        plain(logits=logits, described=in_pixels(logits), refusal=True), X, Y, LINF, noise(X), steps=5
    )
    assert set(crafted.notes["guide"].tolist()) <= {1, 2}
    # And as all is refused, the nearest is kept, by guide.
    far = torch.stack([(LINF.project(X, g.expand_as(X)) - g).flatten(1).norm(dim=1) for g in GUIDES[1:]])
    assert torch.equal(crafted.notes["guide"], far.argmin(0) + 1)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_steps_are_four_radii_over_their_number_unless_given(threat: Threat) -> None:
    for attack in (feature_matching, logit_matching):
        view = plain(target=torch.ones(3, dtype=torch.int64))
        usual, same, other = (
            attack(view, X, Y, threat, noise(X), steps=3, step_size=step).images
            for step in (None, 4 * threat.radius / 3, threat.radius / 3)
        )
        assert torch.equal(usual, same)
        assert not torch.equal(usual, other)


# --- what is asked of the view and of the settings ------------------------------------------------------


def test_a_view_without_guides_says_so() -> None:
    for attack in (feature_matching, logit_matching):
        with pytest.raises(InputError, match="this view has no guides, images of each class"):
            attack(plain(guides=None), X, Y, LINF, noise(X))
    with pytest.raises(InputError, match="guide: centre: this view has no centres; guide: image needs none"):
        feature_matching(plain(centres=None), X, Y, LINF, noise(X), guide="centre")
    # Neither needs the other's.
    feature_matching(plain(guides=None), X, Y, LINF, noise(X), guide="centre", steps=1)
    feature_matching(plain(centres=None), X, Y, LINF, noise(X), steps=1)


def test_sdim_without_thresholds_has_no_guides() -> None:
    model = built(Sdim, GREY, **QUICK).eval().requires_grad_(False)
    x, y = torch.rand(2, 1, 32, 32), torch.tensor([0, 1])
    view = view_of(model, "features")
    assert isinstance(view, Features)
    with pytest.raises(InputError, match="they are kept when a defense is fitted with its thresholds"):
        feature_matching(view, x, y, LINF, noise(x))


@pytest.mark.parametrize("name", ["feature-matching", "logit-matching"])
@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ({"step_size": 0.0}, "step_size: expected a number above 0, found 0.0"),
        ({"step_size": -0.1}, "step_size: expected a number above 0, found -0.1"),
        ({"classes": 0}, "classes: expected a number of 1 or more, found 0"),
        ({"classes": 5}, "classes must be 1 to 4, the others than the true one, not 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, params: dict[str, Any], sentence: str) -> None:
    assert refusal(name, {}, Shape(1, 8, 8, 5)) is None
    assert refusal(name, {"classes": 4}, Shape(1, 8, 8, 5)) is None
    assert refusal(name, params, Shape(1, 8, 8, 5)) == sentence


@pytest.mark.parametrize("name", ["feature-matching", "logit-matching"])
def test_steps_that_cannot_reach_the_radius_are_doubted(name: str) -> None:
    entry = ATTACKS[name]
    assert entry.flags is not None
    assert entry.flags(Threat("linf", 0.3), **bind(entry, {})) is None
    said = entry.flags(Threat("linf", 0.3), **bind(entry, {"steps": 10, "step_size": 0.02}))
    assert said == "10 steps of 0.02 reach 0.2, less than the radius 0.3"


# --- against SDIM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdim() -> tuple[Sdim, Images, Labels]:
    """Return a small SDIM that was fitted, and 21 other images of its classes."""
    split, other = made(150, noise=0.3), made(21, seed=5, noise=0.3)
    model: Sdim = built(Sdim, GREY, **QUICK, epochs=8, batch=25)
    model.fit(split, fitting(split))
    return model.eval().requires_grad_(False), other.images, other.labels


def verdict(model: Sdim, crafted: Crafted, y: Labels) -> tuple[Tensor, Tensor]:
    """Return which answers are wrong, and which of all are accepted."""
    decision = model.decide(crafted.images, "reject-1")
    return decision.label != y, ~decision.rejected


def seen(model: Sdim, name: str, n: int, *, exact: bool) -> Any:
    return instrument(
        view_of(model, name), QueryCounter.of(n, torch.device("cpu")), "gradient", target=None, exact=exact
    )


@pytest.mark.parametrize("guide", ["image", "centre"])
def test_matched_features_are_accepted_where_a_wide_margin_is_not(
    sdim: tuple[Sdim, Images, Labels], guide: Any
) -> None:
    model, x, y = sdim
    threat = Threat("linf", 0.03)
    rates = []
    attacks: list[tuple[Any, str, dict[str, Any]]] = [
        (feature_matching, "features", {"guide": guide}),
        (pgd, "logits", {"loss": "margin"}),
    ]
    for attack, name, settings in attacks:
        view = seen(model, name, len(x), exact=False)
        wrong, accepted = verdict(model, attack(view, x, y, threat, noise(x), steps=30, **settings), y)
        assert wrong.float().mean() >= 0.9
        rates.append(float(accepted[wrong].float().mean()))
    assert rates[0] >= rates[1] + 0.3


def test_matched_logits_are_accepted_more_often_than_a_wide_margin(sdim: tuple[Sdim, Images, Labels]) -> None:
    model, x, y = sdim
    threat = Threat("linf", 0.05)
    rates = []
    for attack, name, settings in ((logit_matching, "features", {}), (pgd, "logits", {"loss": "margin"})):
        view = seen(model, name, len(x), exact=False)
        wrong, accepted = verdict(model, attack(view, x, y, threat, noise(x), steps=30, **settings), y)
        assert wrong.float().mean() >= 0.9
        rates.append(float(accepted[wrong].float().mean()))
    assert rates[0] >= rates[1] + 0.2


# --- the least move that is accepted --------------------------------------------------------------------

BRIEF: dict[str, Any] = {"searches": 4, "steps": 40, "c": 0.1}


class Spied:
    """The small network of the other tests, and all points that it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, z: Images) -> Tensor:
        self.asked.append(z.detach().clone())
        logits: Tensor = NET(z)
        return logits


@pytest.mark.parametrize("goal", ["nearest", "highest"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("variable", "kappa"), [("box", 0.0), ("tanh", 0.3)])
def test_without_a_threshold_it_is_cw_iterate_by_iterate(
    goal: Any, targeted: bool, variable: Any, kappa: float
) -> None:
    """No refusal is a threshold of minus infinity; so, nearly, is one that nothing is ever below."""
    target = (LABELS + 1) % 5 if targeted else None
    settings: dict[str, Any] = {**BRIEF, "goal": goal, "variable": variable, "kappa": kappa, "abort": True}
    asked = []
    for attack in (cw_l2, threshold_cw):
        spied = Spied()
        found = attack(View(spied, target=target), IMAGES, LABELS, Threat("l2"), noise(IMAGES), **settings)
        asked.append([*spied.asked, found.images])
    assert len(asked[0]) == len(asked[1])
    assert all(torch.equal(*pair) for pair in zip(*asked, strict=True))
    assert not torch.equal(asked[0][-1], IMAGES)

    def low(z: Images) -> Tensor:
        logits: Tensor = NET(z)
        return torch.cat([logits, torch.full_like(logits[:, :1], -1e9)], 1)

    view = View(low, target=target, refusal=True)
    found = threshold_cw(view, IMAGES, LABELS, Threat("l2"), noise(IMAGES), **settings)
    assert apart(found.images, asked[0][-1]) < 1e-9


def test_both_brackets_are_those_of_the_formula() -> None:
    logits = 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, t = torch.arange(40) % 5, (torch.arange(40) + 2) % 5
    for target in (None, t):
        view = View(lambda z: z, refusal=True, target=target)
        over_classes, over_threshold = leads(view, logits, y)
        for i, row in enumerate(logits.tolist()):
            goals = [int(t[i])] if target is not None else [k for k in range(5) if k != y[i]]
            best = max(row[k] for k in goals)
            others = max(row[k] for k in range(5) if k not in goals)
            assert over_classes[0, i].item() == pytest.approx(best - others)
            assert over_threshold[0, i].item() == pytest.approx(best - row[5])
        # Of several answers each has its own.
        twice = leads(view, torch.stack([logits, logits.flip(1)]), y)
        assert [each.shape for each in twice] == [(2, 40), (2, 40)]
        assert torch.equal(twice[0][0], over_classes[0])
        assert torch.equal(twice[1][0], over_threshold[0])


def corner(z: Images) -> Tensor:
    """Return logits of two pixels: class 1 leads where the first is above 0.6, and is refused where the
    second is below 0.7; class 0 is never refused.
    """
    a, b = z.flatten(1).unbind(1)
    zero = torch.zeros_like(a)
    one = 4 * (a - 0.6)
    threshold = torch.where(one > 0, one - 4 * (b - 0.7), zero - 9)
    return torch.stack([zero, one, threshold], 1)


def test_the_least_move_goes_where_it_is_wrong_and_accepted() -> None:
    """From (0.3, 0.3) class 1 is nearest at (0.6, 0.3), where it is accepted at (0.6, 0.7)."""
    x, y = torch.full((1, 1, 1, 2), 0.3).double(), torch.tensor([0])
    brief: dict[str, Any] = {"searches": 6, "steps": 150, "c": 0.1}
    crafted = threshold_cw(View(corner, refusal=True), x, y, Threat("l2"), noise(x), **brief)
    assert crafted.images.flatten().tolist() == pytest.approx([0.6, 0.7], abs=0.01)
    assert Threat("l2").distance(x, crafted.images).item() == pytest.approx(0.5, rel=0.01)
    # 0.05 further in each for 0.2 of confidence, and of room.
    for settings, ends in (({"kappa": 0.2}, [0.65, 0.7]), ({"room": 0.2}, [0.6, 0.75])):
        view = View(corner, refusal=True)
        found = threshold_cw(view, x, y, Threat("l2"), noise(x), **brief, **settings).images
        assert found.flatten().tolist() == pytest.approx(ends, abs=0.01)
    # Out of reach: given back, and said.
    far = threshold_cw(View(corner, refusal=True), x, y, Threat("l2"), noise(x), **BRIEF, room=2.0)
    assert far.notes["failed"].item()
    assert torch.equal(far.images, x)


def test_what_is_wrong_but_refused_moves_and_what_is_accepted_does_not() -> None:
    x = torch.tensor([[0.8, 0.4], [0.8, 0.9]]).double().view(2, 1, 1, 2)
    y = torch.zeros(2, dtype=torch.int64)
    settings: dict[str, Any] = {"searches": 5, "steps": 100, "c": 0.1}
    crafted = threshold_cw(View(corner, refusal=True), x, y, Threat("l2"), noise(x), **settings)
    assert crafted.images[0].flatten().tolist() == pytest.approx([0.8, 0.7], abs=0.01)
    assert torch.equal(crafted.images[1], x[1])
    assert not crafted.notes["failed"].any()


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"room": -1.0}, "room: expected a number of 0 or more, found -1.0"),
        ({"room": float("nan")}, "room: expected a finite number, found nan"),
        ({"kappa": -1.0}, "kappa: expected a number of 0 or more, found -1.0"),
        ({"searches": 0}, "searches: expected a number of 1 or more, found 0"),
    ],
)
def test_settings_of_the_least_move_that_cannot_be_are_refused(params: dict[str, Any], sentence: str) -> None:
    assert refusal("threshold-cw", params, Shape(1, 8, 8, 5)) == sentence


def test_with_the_threshold_sdim_accepts_far_more_at_equal_success(
    sdim: tuple[Sdim, Images, Labels],
) -> None:
    model, x, y = sdim
    x, y = x[:12], y[:12]
    settings: dict[str, Any] = {"searches": 3, "steps": 40, "c": 0.01, "abort": True}
    rates = []
    for attack, name in ((threshold_cw, "reject-1"), (cw_l2, "logits")):
        view = seen(model, name, len(x), exact=name == "reject-1")
        wrong, accepted = verdict(model, attack(view, x, y, Threat("l2"), noise(x), **settings), y)
        assert wrong.all()
        rates.append(float(accepted.float().mean()))
    assert rates[0] == 1
    assert rates[1] <= 0.75


# --- decisions alone ------------------------------------------------------------------------------------


def test_a_walk_along_sdim_s_boundary_wants_to_be_accepted_where_answers_may_be_refused(
    sdim: tuple[Sdim, Images, Labels],
) -> None:
    model, x, y = sdim
    x, y = x[:6], y[:6]
    settings: dict[str, Any] = {"steps": 40, "spherical_step": 0.05, "source_step": 0.05, "starts": 100}
    found = {}
    for readout in ("plain", "reject-1"):
        asked = answers_only(lambda z, readout=readout: model.decide(z, readout), 3)
        view = instrument(
            asked, QueryCounter.of(len(x), torch.device("cpu")), "decision", target=None, exact=True
        )
        walk = boundary(view, x, y, Threat("l2"), noise(x), **settings)
        wrong, accepted = verdict(model, walk, y)
        assert torch.equal(wrong & (accepted | (readout == "plain")), ~walk.notes["failed"])
        assert torch.equal(walk.images[walk.notes["failed"]], x[walk.notes["failed"]])
        found[readout] = float(accepted[wrong].float().mean())
    assert found["reject-1"] == 1
    assert found["plain"] < 0.5
