"""An attack made of attacks: what it breaks is what its members break alone, in any order."""

import errno
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.common.in_turn import Member, Run, in_turn
from attacks.sequence import sequence
from bench import Crafted, Images, InputError, Labels, Norm, Shape, Threat, Use, View, bound, labels_of
from bench.errors import OvertimeError
from bench.noise import Noise
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS, discover, needing
from bench.remarks import listening
from bench.testing import Halfspace

discover()

SEVERAL: list[dict[str, Any]] = [
    {"use": "fgsm"},
    {"use": "pgd", "steps": 2, "loss": "margin"},
    {"use": "square", "queries": 12},
    {"use": "fab-t", "steps": 3, "classes": 2},
]


def smooth(classes: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 5 * 4, classes)
        )
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    return net.double().eval().requires_grad_(False)


SMOOTH = smooth()


def NET(z: Images) -> Tensor:
    """Answer with many turns, so that each attack misses some that another one finds."""
    logits: Tensor = SMOOTH((9 * z).sin())
    return logits


X = torch.rand(40, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = NET(X).argmax(1)
LINF, L2 = Threat("linf", 0.02), Threat("l2", 0.1)


def draws(x: Images) -> Noise:
    return Noise("test", torch.arange(len(x)), dtype=x.dtype)


def watched(net: Any, n: int, *, exact: bool = True) -> tuple[View, QueryCounter]:
    counter = QueryCounter.of(n, torch.device("cpu"))
    return instrument(View(net), counter, "gradient", target=None, exact=exact), counter


def alone(use: dict[str, Any], threat: Threat, x: Images = X, y: Labels = Y, net: Any = NET) -> Tensor:
    """Return what an attack breaks by itself, with the draws that it has in a sequence: bool (N,)."""
    attack = bound(use)
    noise = draws(x).spawn(attack.stream)
    returned = attack(View(net), x, y, attack.entry.given(threat), noise)
    z = returned.images if isinstance(returned, Crafted) else returned
    broken: Tensor = (net(z).argmax(1) != y) & (threat.distance(x, z) <= threat.radius + 1e-6)
    return broken


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda threat: threat.norm)
def test_what_is_broken_is_what_the_members_break_alone_in_any_order(threat: Threat) -> None:
    apart = [alone(each, threat) for each in SEVERAL if threat.norm in ATTACKS[each["use"]].norms]
    of = [each for each in SEVERAL if threat.norm in ATTACKS[each["use"]].norms]
    union = torch.stack(apart).any(0)
    # They do not break the same, and in linf none of them breaks all that any does.
    assert 3 < union.sum() < len(X) - 3
    assert len({tuple(each.tolist()) for each in apart}) >= 3
    assert threat.norm != "linf" or union.sum() > max(each.sum() for each in apart)
    for order in permutations(of):
        crafted = sequence(View(NET), X, Y, threat, draws(X), of=list(order))  # type: ignore[arg-type]
        found_by = crafted.notes["found_by"]
        assert torch.equal(NET(crafted.images).argmax(1) != Y, union)
        assert torch.equal(found_by >= 0, union)
        assert (threat.distance(X, crafted.images) <= threat.radius + 1e-9).all()
        # Each is the first in the order that breaks the example alone.
        first = torch.stack([apart[of.index(each)] for each in order]).int().argmax(0)
        assert torch.equal(found_by[union], first[union])


def test_an_order_that_is_given_moves_no_place() -> None:
    written = sequence(View(NET), X, Y, LINF, draws(X), of=[SEVERAL[2], SEVERAL[0]])  # type: ignore[list-item]
    turned = sequence(
        View(NET), X, Y, LINF, draws(X), of=[SEVERAL[0], SEVERAL[2]], order=[1, 0]  # type: ignore[list-item]
    )  # fmt: skip
    assert torch.equal(written.images, turned.images)
    swapped = torch.tensor([1, 0, -1])[written.notes["found_by"]]
    assert torch.equal(swapped, turned.notes["found_by"])
    for name in ("forwards.fgsm", "forwards.square", "backwards.fgsm"):
        assert torch.equal(written.notes[name], turned.notes[name])


def test_members_spend_passes_on_what_stands_alone_and_the_sum_is_all_that_was_asked() -> None:
    view, counter = watched(NET, len(X))
    crafted = sequence(view, X, Y, LINF, draws(X), of=SEVERAL)  # type: ignore[arg-type]
    found_by, labels = crafted.notes["found_by"], labels_of(SEVERAL)
    for way, every in (("forwards", counter.forwards), ("backwards", counter.backwards)):
        spent = torch.stack([crafted.notes[f"{way}.{label}"] for label in labels])
        first_look = 1 if way == "forwards" else 0
        assert torch.allclose(spent.sum(0) + first_look, every)
        for place in range(len(SEVERAL)):
            fallen = (found_by >= 0) & (found_by < place)
            assert (spent[place][fallen] == 0).all()
            if way == "forwards":
                assert (spent[place][~fallen] > 0).all()
    assert "fab-t.failed" in crafted.notes
    assert crafted.notes["flat"].dtype == torch.bool


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_half_space_the_worst_case_is_that_of_the_closed_form(norm: Norm) -> None:
    plane = Halfspace(Shape(2, 5, 4, 3)).requires_grad_(False)
    x, y = plane.examples(24)
    x = torch.cat([x[:12], 0.5 + (x[12:] - 0.5) * torch.linspace(0.1, 1, 12)[:, None, None, None].double()])
    least = plane.least(x, norm)
    radius = float(least.median()) * 1.001
    assert ((least / radius - 1).abs() > 1e-4).all()
    of: list[Any] = [{"use": "pgd", "steps": 60}, {"use": "fab", "steps": 30}, {"use": "apgd", "steps": 40}]
    for order in ([0, 1, 2], [2, 1, 0]):
        crafted = sequence(View(plane), x, y, Threat(norm, radius), draws(x), of=of, order=order)
        assert torch.equal(plane(crafted.images).argmax(1) != y, least < radius)


def test_images_that_are_wrong_already_are_left_alone() -> None:
    y = Y.clone()
    y[:4] = (y[:4] + 1) % 5
    view, counter = watched(NET, len(X))
    crafted = sequence(view, X, y, LINF, draws(X), of=SEVERAL)  # type: ignore[arg-type]
    assert torch.equal(crafted.images[:4], X[:4])
    assert crafted.notes["found_by"][:4].tolist() == [-1] * 4
    assert counter.forwards[:4].tolist() == [1] * 4


def test_on_a_surrogate_nothing_falls_and_the_highest_margin_is_kept() -> None:
    of: list[Any] = [{"use": "fgsm"}, {"use": "pgd", "steps": 5, "loss": "margin"}]
    crafted = sequence(View(NET, exact=False), X, Y, LINF, draws(X), of=of)
    assert (crafted.notes["forwards.fgsm"] == crafted.notes["forwards.fgsm"][0]).all()
    assert (crafted.notes["forwards.pgd"] == 5 + 1 + 1).all()
    margins = []
    for use in of:
        attack = bound(use)
        returned = attack(View(NET, exact=False), X, Y, LINF, draws(X).spawn(attack.stream))
        logits = NET(returned.images if isinstance(returned, Crafted) else returned)
        true = logits.gather(1, Y[:, None]).squeeze(1)
        margins.append(logits.scatter(1, Y[:, None], -torch.inf).amax(1) - true)
    best = torch.stack(margins)
    assert torch.equal(crafted.notes["found_by"], best.argmax(0))
    logits = NET(crafted.images)
    kept = logits.scatter(1, Y[:, None], -torch.inf).amax(1) - logits.gather(1, Y[:, None]).squeeze(1)
    assert torch.allclose(kept, best.amax(0))


def test_what_misses_ball_or_box_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four unlawful moves that the network answers wrongly, and one that is lawful up to rounding."""

    def net(z: Images) -> Tensor:
        most = z.flatten(1)[:, 0] - 0.5
        return torch.stack([-most, most], 1)

    x, y = torch.full((5, 1, 1, 2), 0.4), torch.zeros(5, dtype=torch.int64)
    moves = torch.tensor([[0.7, 0.4], [0.55, -0.2], [0.55, 1.2], [0.55, torch.nan], [0.5500005, 0.4]])

    def jump(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
        return moves.view(5, 1, 1, 2)

    entry = ATTACKS["fgsm"]
    monkeypatch.setitem(
        ATTACKS._entries, "fgsm", type(entry)(name="fgsm", make=jump, version=1, norms={"linf"})
    )
    crafted = sequence(View(net), x, y, Threat("linf", 0.15), draws(x), of=[Use("fgsm")])
    assert crafted.notes["found_by"].tolist() == [-1, -1, -1, -1, 0]
    assert torch.equal(crafted.images[:4], x[:4])
    assert float(crafted.images[4, 0, 0, 0]) == pytest.approx(0.55, abs=1e-7)


# --- a member that raises ---------------------------------------------------------------------------------


def members_of(runs: dict[str, Run], *, may_raise: bool = True) -> list[Member]:
    return [Member(name, name, run, may_raise) for name, run in runs.items()]


def moved(
    view: View, x: Images, y: Labels, threat: Threat, noise: Any, *, steps: int = 1
) -> Images | Crafted:
    return bound({"use": "pgd", "steps": steps, "loss": "margin"})(view, x, y, threat, noise)


def looks_and_raises(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    torch.set_grad_enabled(False)
    view.logits(x)
    raise ValueError("nothing works\nbut the first line")


def no_images(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
    return x[:, :1]


def no_notes(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Crafted:
    return Crafted(1 - x, {"steps": torch.zeros(3)})


def nothing(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Any:
    return None


@pytest.mark.parametrize("bad", [looks_and_raises, no_images, no_notes, nothing])
def test_what_raises_leaves_what_it_saw_unmoved_and_the_others_do_what_they_do_without_it(bad: Run) -> None:
    good: dict[str, Run] = {"one": moved, "three": partial(moved, steps=3)}
    without = in_turn(members_of(good), range(2), View(NET), X, Y, LINF, draws(X))
    runs: dict[str, Run] = {"bad": bad, **good}
    for order in permutations(range(3)):
        view, counter = watched(NET, len(X))
        with listening() as remarks:
            found = in_turn(members_of(runs), order, view, X, Y, LINF, draws(X))
        kept = torch.stack([found.notes["found_by"] - 1, torch.full_like(Y, -1)]).amax(0)
        if order.index(1) < order.index(2):
            assert torch.equal(found.images, without.images)
            assert torch.equal(kept, without.notes["found_by"])
        assert torch.equal(NET(found.images).argmax(1) != Y, NET(without.images).argmax(1) != Y)
        # It saw what stood when its turn came, and every look at the network is somebody's.
        before = [place for place in order[: order.index(0)]]
        stood = ~torch.isin(found.notes["found_by"], torch.tensor(before, dtype=torch.int64))
        assert torch.equal(found.notes["raised.bad"], stood)
        assert torch.equal(found.notes["forwards.bad"] > 0, stood)
        assert not found.notes["raised.one"].any()
        spent = sum(found.notes[f"forwards.{name}"] for name in runs)
        assert torch.allclose(spent + 1, counter.forwards)
        (said,) = remarks
        assert said.startswith(f"bad raised, and {int(stood.sum())} examples stay as they were before it: ")
        assert "\n" not in said
    assert torch.is_grad_enabled()


def test_on_a_surrogate_the_image_of_what_raised_is_nobody_s() -> None:
    runs: dict[str, Run] = {"bad": looks_and_raises, "three": partial(moved, steps=3)}
    view = View(NET, exact=False)
    found = in_turn(members_of(runs), (0, 1), view, X, Y, LINF, draws(X))
    assert found.notes["raised.bad"].all()
    assert (found.notes["found_by"] == 1).all()


def test_where_each_that_was_run_raises_nothing_is_returned() -> None:
    runs: dict[str, Run] = {"bad": looks_and_raises, "worse": no_images}
    with pytest.raises(ValueError, match="worse returned images of the shape"):
        in_turn(members_of(runs), (0, 1), View(NET), X, Y, LINF, draws(X))
    # Nobody was run where every image is wrong already.
    found = in_turn(members_of(runs), (0, 1), View(NET), X, (Y + 1) % 5, LINF, draws(X))
    assert torch.equal(found.images, X)


@pytest.mark.parametrize(
    "error",
    [
        InputError("no such file"),
        OvertimeError("too long"),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("no room"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "in another one"])
def test_what_is_no_fault_of_a_member_ends_all_and_is_what_is_raised(
    error: BaseException, wrapped: bool
) -> None:
    def bad(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
        if not wrapped:
            raise error
        try:
            raise error
        except BaseException:  # noqa: BLE001 - as a library does
            raise ValueError("the library failed") from None

    with pytest.raises(type(error)) as found:
        in_turn(members_of({"bad": bad, "one": moved}), (0, 1), View(NET), X, Y, LINF, draws(X))
    assert found.value is error


def test_a_network_that_answers_no_more_ends_all() -> None:
    lost = []

    def net(z: Images) -> Tensor:
        if lost:
            raise RuntimeError("the device is lost")
        return NET(z)

    def loses(view: View, x: Images, y: Labels, threat: Threat, noise: Any) -> Images:
        lost.append(True)
        return view.logits(x)

    with pytest.raises(RuntimeError, match="the device is lost"):
        in_turn(members_of({"one": moved, "bad": loses}), (0, 1), View(net), X, Y, LINF, draws(X))


def test_a_part_of_one_attack_fails_the_whole() -> None:
    parts = members_of({"one": moved, "bad": looks_and_raises}, may_raise=False)
    with pytest.raises(ValueError, match="nothing works"):
        in_turn(parts, (0, 1), View(NET), X, Y, LINF, draws(X))
    found = in_turn(parts[:1], (0,), View(NET), X, Y, LINF, draws(X))
    assert not any(name.startswith("raised.") for name in found.notes)


# --- what it needs, and what is refused ------------------------------------------------------------------


def test_needs_are_those_of_the_members() -> None:
    entry = needing(ATTACKS["sequence"], {"of": [{"use": "square"}, {"use": "nes"}]})
    assert entry.access == "score"
    assert entry.norms == ATTACKS["square"].norms & ATTACKS["nes"].norms
    entry = needing(ATTACKS["sequence"], {"of": [{"use": "pgd"}, {"use": "torchattacks/FGSM"}]})
    assert (entry.access, entry.rng, entry.norms) == ("gradient", "shard", frozenset({"linf"}))


def test_the_cost_is_that_of_the_members_and_a_look_at_each_image() -> None:
    of = [{"use": "pgd", "steps": 7, "restarts": 2}, {"use": "square", "queries": 9}]
    assert ATTACKS["sequence"].passes({"of": of}) == 1 + (14 + 1) + (10 + 1)


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ([{"use": "sequence", "of": [{"use": "pgd"}]}], "a sequence within a sequence"),
        ([{"use": "replay"}], "replay shows a baseline's images"),
        ([{"use": "none"}], "none of its attacks looks at anything"),
        ([{"use": "boundary"}, {"use": "pgd"}], "boundary and the others look through views of different"),
        ([{"use": "jsma"}, {"use": "fgsm"}], "no norm that all of jsma, fgsm know"),
        ([{"use": "on-manifold"}], "on-manifold searches latent space"),
        ([{"use": "pdg"}], "unknown attack 'pdg'; did you mean 'pgd'"),
    ],
)
def test_members_that_no_view_can_serve_are_refused(of: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        needing(ATTACKS["sequence"], {"of": of})


def test_an_attack_that_stands_twice_and_an_order_that_is_none_are_refused() -> None:
    shape = Shape(1, 8, 8, 10)
    entry = ATTACKS["sequence"]
    same = {"of": [{"use": "pgd"}, {"use": "fgsm"}, {"use": "pgd", "steps": 40}]}
    with pytest.raises(InputError, match="pgd stands twice with the same settings"):
        entry.check(same, shape)
    for order in ([0], [0, 0], [1, 2], [0, 1, 2]):
        with pytest.raises(InputError, match="order: expected each of 0 to 1 once"):
            entry.check({"of": same["of"][:2], "order": order}, shape)
    entry.check({"of": [{"use": "pgd"}, {"use": "pgd", "steps": 41}], "order": [1, 0]}, shape)


def test_names_of_members_are_apart() -> None:
    assert labels_of([{"use": "pgd"}, Use("pgd-2"), {"use": "pgd"}, Use("pgd")]) == [
        "pgd",
        "pgd-2",
        "pgd-3",
        "pgd-4",
    ]
