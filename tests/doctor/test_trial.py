"""The trial of an attack: what it is tried on is exact, sound attacks pass, and broken ones do not."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import planted
import pytest
import second_author
import torch
from test_testing import solved
from torch import Tensor, autograd
from torch.nn.functional import avg_pool2d

from bench import Images, Labels, Randomness, Shape, Threat, View, objective
from bench.doctor.findings import LEVELS, Level
from bench.doctor.halfspace import FARTHEST, MARGIN, Halfspace, placed
from bench.doctor.plants import Planted
from bench.doctor.trial import Proof, try_attack
from bench.errors import OvertimeError
from bench.noise import Noise
from bench.protocols import Norm
from bench.registry import ATTACKS, AttackEntry

DIGITS = Shape(1, 16, 16, 10)
GREY, COLOUR = Shape(1, 28, 28, 10), Shape(3, 32, 32, 10)


# --- the half-space at a distance ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "norm", "distance"),
    [
        (GREY, "linf", 0.25),
        (COLOUR, "linf", 8 / 255 / 1.2),
        (Shape(3, 5, 4, 2), "linf", 1e-3),
        (GREY, "l2", 1.7),
        (COLOUR, "l2", 0.4),
        (GREY, "l1", 8.0),
        (DIGITS, "l1", 3.0),
        (GREY, "l0", 16.0),
        (COLOUR, "l0", 1.0),
    ],
    ids=str,
)
def test_images_are_as_far_from_the_plane_as_they_should_be(
    shape: Shape, norm: Norm, distance: float
) -> None:
    found = placed(shape, norm, distance, 20)
    found.plane.requires_grad_(False)
    x = found.images
    assert x.shape == (20, *shape[:3])
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.equal(found.plane(x.float()).argmax(1), found.labels)
    assert found.labels.tolist() == [0, 1] * 10
    assert found.least.tolist() == pytest.approx([distance] * 20, rel=1e-3)
    assert float(found.plane.margin(x).abs().mean()) == pytest.approx(MARGIN)
    assert float(found.plane.margin(x).abs().max()) < 2 * MARGIN
    assert torch.equal(found.least, found.plane.least(x, norm))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_their_distances_are_those_of_general_solvers(norm: Norm) -> None:
    distance = {"linf": 0.2, "l2": 0.4, "l1": 0.9, "l0": 2.0}[norm]
    found = placed(Shape(1, 3, 3, 2), norm, distance, 6)
    assert found.plane.margin(found.images).detach().abs().min() > 0.5
    expected = [solved(found.plane, each[None], norm) for each in found.images]
    assert found.least.tolist() == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx([distance] * 6, rel=1e-3)


def test_in_linf_no_move_of_less_crosses_and_one_of_more_does() -> None:
    found = placed(GREY, "linf", 0.2, 10)
    weight, margin = found.plane.weight.double(), found.plane.margin(found.images)
    way = -weight.sign() * margin.sign()[:, None, None, None]
    for share, crosses in ((1 - 1e-5, False), (1 + 1e-5, True)):
        z = (found.images + share * found.least[:, None, None, None] * way).clamp(0, 1)
        assert ((found.plane.margin(z) * margin < 0) == crosses).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_no_image_is_farther_than_the_box_allows(norm: Norm) -> None:
    found = placed(DIGITS, norm, 1000.0, 4)
    corner = (found.plane.weight.double().sign()[None] + 1) / 2
    most = FARTHEST * float(found.plane.least(corner, norm))
    assert float(found.least.max()) <= most + 1e-3
    assert float(found.least.min()) >= 0.9 * most - 1


def test_a_scaled_half_space_is_as_far_away() -> None:
    plane = Halfspace(Shape(1, 3, 3, 2))
    x, _ = plane.examples(5)
    for norm in ("linf", "l2", "l1", "l0"):
        before = plane.least(x, norm)
        with torch.no_grad():
            plane.weight *= 7
            plane.bias *= 7
        assert torch.allclose(plane.least(x, norm), before)


# --- plants at a radius ----------------------------------------------------------------------------------

FORMS: list[tuple[Norm, tuple[int, int, int], float]] = [
    ("linf", (1, 28, 28), 0.3),
    ("linf", (3, 32, 32), 8 / 255),
    ("l2", (1, 28, 28), 1.5),
    ("l2", (3, 32, 32), 0.5),
    ("l1", (1, 16, 16), 6.0),
    ("l0", (3, 16, 16), 4.0),
]


@pytest.mark.parametrize(("norm", "form", "radius"), FORMS, ids=str)
def test_one_point_is_planted_on_the_surface_in_any_form(
    norm: Norm, form: tuple[int, int, int], radius: float
) -> None:
    made, every = Planted(norm, 12, form=form, radius=radius, classes=10), torch.arange(12)
    assert made.x.shape == (12, *form)
    assert made.threat == Threat(norm, radius)
    assert (made.logits(made.x, every).argmax(1) == made.y).all()
    for place, points in enumerate(made.points.unbind(1)):
        score = -1.0 if place else 0.15
        assert torch.allclose(made.score(points, every), torch.full((12,), score).double(), atol=1e-8)
        assert torch.equal(made.found(points, every, 1e-6), torch.full((12,), place == 0))
        distance = made.threat.distance(made.x.double(), points.double())
        assert torch.allclose(distance, torch.full_like(distance, radius), rtol=1e-5)
        assert 0 <= float(points.min()) <= float(points.max()) <= 1


@pytest.mark.parametrize(("norm", "form", "radius"), FORMS[:4], ids=str)
def test_pgd_finds_them_and_fewer_steps_or_half_the_radius_do_not(
    norm: Norm, form: tuple[int, int, int], radius: float
) -> None:
    made, every = Planted(norm, 20, form=form, radius=radius), torch.arange(20)
    view, draws = made.view(), Noise("test", every)
    for share, params, low, high in (
        (1.0, {}, 0.95, 1.0),
        (0.5, {}, 0.0, 0.0),
        (1.0, {"steps": 1}, 0.0, 0.5),
    ):
        threat = Threat(norm, share * radius)
        z = ATTACKS["pgd"].make(view, made.x.clone(), made.y, threat, draws, **params).images
        assert low <= float(made.found(z, every, 1e-6).double().mean()) <= high


def test_a_smaller_ball_in_a_larger_image_is_the_same_problem() -> None:
    small, large = Planted("linf", 6), Planted("linf", 6, form=(3, 24, 16), radius=0.03)
    assert torch.allclose(small.features(small.x), large.features(large.x), atol=1e-5)
    for one, other in zip(small.points.unbind(1), large.points.unbind(1), strict=True):
        assert torch.allclose(small.features(one), large.features(other), atol=1e-5)


def test_nothing_is_planted_where_one_pixel_may_change() -> None:
    with pytest.raises(ValueError, match="fewer than 2 pixels"):
        Planted("l0", radius=1.5)


# --- sound attacks ---------------------------------------------------------------------------------------


def tried(name: str, threat: Threat, shape: Shape = DIGITS, *, limit: float = 60.0, **params: Any) -> Proof:
    entry = ATTACKS[name]
    plain = entry.schema.model_validate(params).model_dump(mode="json", by_alias=True)
    return try_attack(entry, plain, threat, shape, limit=limit)


@pytest.mark.parametrize(
    ("name", "threat", "shape", "params", "planted_least"),
    [
        ("pgd", Threat("linf", 0.1), DIGITS, {}, 0.95),
        ("pgd", Threat("linf", 8 / 255), COLOUR, {"steps": 10, "step_size": "2/255"}, 0.9),
        ("pgd", Threat("l2", 1.5), GREY, {"loss": "margin", "steps": 20}, 0.9),
        ("fgsm", Threat("linf", 0.3), GREY, {}, 0.0),
        ("deepfool", Threat("l2"), GREY, {}, 0.9),
        ("jsma", Threat("l0", 12), DIGITS, {}, 0.5),
        ("square", Threat("linf", 0.1), DIGITS, {"queries": 50}, 0.0),
    ],
    ids=str,
)
def test_a_sound_attack_gives_no_doubt(
    name: str, threat: Threat, shape: Shape, params: dict[str, Any], planted_least: float
) -> None:
    proof = tried(name, threat, shape, **params)
    assert proof.findings.worst in ("quiet", "note"), proof.findings
    assert not proof.findings.untested
    assert proof.planted is not None
    assert proof.planted >= planted_least
    assert proof.crossed is not None
    if name != "square":
        assert proof.crossed == 1


def test_the_sound_attack_of_the_second_author_gives_none() -> None:
    proof = tried("toy/second-sound", Threat("linf", 0.1))
    assert proof.findings.worst == "quiet"
    assert (proof.crossed, proof.planted) == (1, 1)


def test_what_sees_nothing_is_not_asked_to_find_anything() -> None:
    proof = tried("none", Threat("linf"), GREY)
    assert proof.findings.worst == "quiet"
    assert proof.crossed is proof.planted is None
    proof = tried("replay", Threat("linf", 0.1))
    assert proof.findings.untested == ("plane",)


def test_the_same_is_found_again() -> None:
    one, other = (tried("pgd", Threat("linf", 0.1), steps=5).described() for _ in range(2))
    assert one.pop("seconds") >= 0
    del other["seconds"]
    assert one == other
    assert json.loads(json.dumps(one)) == one
    assert {"crossed", "planted", "worst", "findings"} == set(one)


def test_large_images_are_tried_in_a_small_form() -> None:
    proof = tried("pgd", Threat("linf", 4 / 255), Shape(3, 224, 224, 1000), steps=5)
    assert proof.crossed == 1
    assert proof.planted is not None


# --- broken ones -----------------------------------------------------------------------------------------

BROKEN = [*planted.ATTACKS, *(f"toy/second-{name}" for name in (*second_author.STEPS, *second_author.ENDS))]


@pytest.mark.parametrize("name", BROKEN)
def test_every_attack_that_is_broken_on_purpose_is_doubted(name: str) -> None:
    proof = tried(name, Threat("linf", 0.1))
    assert proof.findings.worst in ("doubt", "alarm"), proof.findings


def made(function: Callable[..., Any], **declared: Any) -> AttackEntry:
    return AttackEntry(name="mine", make=function, version=1, **{"norms": {"linf"}, **declared})


def judged(function: Callable[..., Any], threat: Threat | None = None, **declared: Any) -> dict[str, Level]:
    proof = try_attack(made(function, **declared), {}, threat or Threat("linf", 0.1), DIGITS)
    found = sorted(proof.findings.found, key=lambda each: LEVELS.index(each.level))
    return {each.code: each.level for each in found if each.code}


def step(view: View, z: Images, y: Labels, x: Images, threat: Threat, share: float = 0.25) -> Images:
    z = z.detach().requires_grad_()
    (slope,) = autograd.grad(objective(view, view.logits(z), y, "margin").sum(), z)
    return threat.project(x, z + share * threat.radius * slope.sign()).detach()


def climb(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    z = x
    for _ in range(12):
        z = step(view, z, y, x, threat)
    return z


def test_a_plain_climb_is_not_doubted() -> None:
    assert judged(climb) == {}


def test_what_an_attack_raises_is_a_finding() -> None:
    def fails(*_: Any) -> Images:
        raise KeyError("no such layer")

    assert judged(fails) == {"attack-raises": "doubt"}
    assert judged(lambda *_: None) == {"unlawful-images": "alarm"}

    def late(*_: Any) -> Images:
        raise OvertimeError("over")

    with pytest.raises(OvertimeError):
        judged(late)


def test_what_peeks_is_found_out() -> None:
    assert judged(climb, access="score") == {"attack-raises": "doubt"}
    assert judged(climb, access="none") == {"attack-raises": "doubt"}


def test_nan_logits_may_not_stop_it_in_a_shard() -> None:
    def strict(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        if view.logits(x).isnan().any():
            raise FloatingPointError("NaN")
        return climb(view, x, y, threat, noise)

    assert judged(strict) == {"attack-raises": "note"}


def test_what_is_not_its_own_is_left_alone() -> None:
    def draws(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        return climb(view, threat.project(x, x + 0.01 * torch.randn_like(x)), y, threat, noise)

    assert judged(draws)["changes-others"] == "doubt"
    assert "changes-others" not in judged(draws, rng="shard")

    def writes(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        return x.copy_(climb(view, x.clone(), y, threat, noise))

    assert judged(writes) == {"changes-others": "note"}


def test_autograd_stays_on_for_those_who_come_after() -> None:
    def turns_off(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        z = climb(view, x, y, threat, noise)
        torch.set_grad_enabled(False)
        return z

    assert judged(turns_off) == {"changes-others": "note"}
    assert torch.is_grad_enabled()


def test_what_differs_every_time_cannot_be_repeated() -> None:
    calls: list[int] = []

    def counting(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        calls.append(1)
        z = climb(view, x, y, threat, noise)
        return x + (1 - 1e-3 * (len(calls) % 2)) * (z - x)

    assert judged(counting)["moves-otherwise"] == "doubt"


def test_successes_that_are_dropped_are_seen() -> None:
    def goes_on(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        climb(view, x, y, threat, noise)
        return x

    assert judged(goes_on)["drops-successes"] == "doubt"


def test_a_target_that_is_passed_by_is_seen() -> None:
    def aimless(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        if view.target is not None:
            return x
        return climb(view, x, y, threat, noise)

    assert judged(aimless) == {"misses-targets": "doubt"}
    assert judged(aimless, targeted=False) == {}


def test_steps_along_the_first_gradient_find_no_plants() -> None:
    def stale(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        way = step(view, x, y, x, threat) - x
        for _ in range(12):
            view.logits(x + way)
        return threat.project(x, x + 8 * way)

    assert judged(stale) == {"finds-few-plants": "doubt"}


def test_confidence_is_asked_for_in_logits_that_have_it() -> None:
    proof = tried("cw-l2", Threat("l2"), kappa=200.0, steps=60, searches=5)
    assert proof.findings.worst == "quiet"
    assert proof.crossed == 1


def test_one_that_goes_too_far_without_a_radius_is_seen() -> None:
    def far(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        return climb(view, x, y, Threat("linf", 0.4), noise)

    assert judged(far, Threat("linf"), kind="minimum-norm")["moves-too-far"] == "doubt"


def test_what_takes_too_long_is_cut_off() -> None:
    def endless(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        while True:
            try:
                view.logits(x)
            except Exception:  # noqa: BLE001 - as some libraries do
                continue

    proof = try_attack(made(endless), {}, Threat("linf", 0.1), DIGITS, limit=0.2)
    assert proof.findings.untested == ("plane",)
    assert proof.crossed is proof.planted is None


def test_no_radius_to_try_is_no_finding() -> None:
    proof = try_attack(made(climb), {}, Threat("linf", 0.0), DIGITS)
    assert proof.findings.worst == "untested"
    assert try_attack(made(climb), {}, Threat("linf"), DIGITS).findings.worst == "untested"


def test_one_that_looks_at_some_of_a_batch_is_told_to_narrow() -> None:
    """It keeps a list of its own, as libraries do: it is shown plants one by one."""

    def lists(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        z = climb(view, x, y, threat, noise)
        view.logits(z[: max(1, len(z) // 2) + (len(z) > 1)])
        return z

    proof = try_attack(made(lists), {}, Threat("linf", 0.1), DIGITS)
    assert proof.planted == 1
    assert proof.findings.worst == "quiet"


def test_what_says_that_it_cannot_reach_has_a_note() -> None:
    def short(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        return step(view, x, y, x, threat, 0.3)

    assert judged(short)["does-not-cross"] == "alarm"
    assert judged(short, flags=lambda threat: "it is short")["does-not-cross"] == "note"


def test_what_smooths_its_gradients_has_a_note_and_what_turns_them_an_alarm() -> None:
    """Over 7x7 pixels, as attacks do that mean to transfer; transposed, quarters are exchanged."""

    def climbs(change: Callable[[Tensor], Tensor]) -> Callable[..., Images]:
        def attack(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
            z = x
            for _ in range(12):
                way = change(step(view, z, y, x, Threat("linf", 1.0), 1e-3) - z)
                z = threat.project(x, z + threat.radius / 4 * way.sign()).detach()
            return z

        return attack

    smooth = climbs(lambda way: avg_pool2d(way, 7, stride=1, padding=3))
    assert judged(smooth)["does-not-cross"] == "note"
    assert judged(climbs(lambda way: way.transpose(2, 3)))["does-not-cross"] == "alarm"
    assert judged(climbs(lambda way: way)) == {}


def test_a_search_by_scores_that_goes_nowhere_is_an_alarm_and_a_short_one_a_note() -> None:
    def blends(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, share: float) -> Images:
        z = x
        for _ in range(30):
            tried = threat.project(x, z + share * threat.radius * noise.signs(tuple(x.shape[1:])))
            better = objective(view, view.logits(tried), y, "margin") > objective(
                view, view.logits(z), y, "margin"
            )
            z = torch.where(better[:, None, None, None], tried, z)
        return z

    def nowhere(*given: Any) -> Tensor:
        return blends(*given, share=1e-3)

    def somewhere(*given: Any) -> Tensor:
        return blends(*given, share=0.5)

    assert judged(nowhere, access="score")["does-not-cross"] == "alarm"
    assert judged(somewhere, access="score")["does-not-cross"] == "note"


def test_an_entry_whose_needs_depend_on_parameters_is_asked() -> None:
    proof = tried("sequence", Threat("linf", 0.1), of=[{"use": "fgsm"}, {"use": "pgd", "steps": 10}])
    assert proof.crossed == 1
    assert proof.planted is not None
    assert proof.planted >= 0.9
    assert math.isfinite(proof.findings.seconds)
    assert replace(proof, crossed=None).described()["crossed"] is None
