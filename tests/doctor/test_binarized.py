"""Heads on a network's own features: sound gradients find what is there, and masked ones do not."""

import copy
from collections.abc import Callable

import pytest
import torch
from plants import (
    MASKED,
    THREAT,
    Body,
    Plain,
    RoundedFeatures,
    ThermometerCode,
    digits,
    mlp,
    normalised,
    patient,
    small_net,
    trained,
    winners,
)
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.doctor import binarized as test
from bench.doctor.binarized import INNER, WITHIN, Heads, Reading, binarized, edge_points, inner_points
from bench.doctor.findings import Finding
from bench.doctor.patient import Patient
from bench.protocols import Images, Threat, View
from bench.registry import discover

L2 = Threat("l2", 1.0)


@pytest.fixture(autouse=True)
def attacks() -> None:
    discover()


def found(given: Patient) -> Finding:
    (finding,) = binarized(given)
    return finding


def untrained(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def heads_of(given: Patient) -> test.Trained:
    """Return the heads of a patient whose features are known to be there."""
    assert given.attacked is not None
    seen = given.bare(given.attacked)
    call = test.penultimate(given.model, seen.logits, given.images, given.classes)
    assert call is not None
    reading = View(Reading(seen.logits, call), centred=False)
    return test.trained(given, given.shown(reading, given.attacked))


# --- heads -------------------------------------------------------------------------------------------


def test_a_head_is_the_widest_margin_that_another_solver_finds() -> None:
    draw = torch.Generator().manual_seed(0)
    inner = torch.randn(5, 30, 40, generator=draw, dtype=torch.float64)
    edges = 2 * torch.randn(5, 40, generator=draw, dtype=torch.float64)
    made = Heads.of(inner, edges, close=0.9)
    assert made.there.all()
    for row, (points, edge) in enumerate(zip(inner, edges, strict=True)):
        solved = SVC(kernel="linear", C=1e9, tol=1e-9).fit(torch.cat([points, edge[None]]), [0] * 30 + [1])
        # Its sides are 2 apart, ours 1.
        torch.testing.assert_close(made.ways[row], torch.tensor(solved.coef_[0]) / 2, rtol=1e-5, atol=1e-7)
        scores = made.scores(points, torch.full((30,), row))
        assert float(scores.max()) == pytest.approx(-1 + 0.05)
        assert float(made.scores(edge[None], torch.tensor([row]))) == pytest.approx(0.05)


def test_a_point_among_the_inner_ones_has_no_head() -> None:
    inner = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(1))
    edges = torch.stack([inner[0].mean(0), inner[1, 4], inner[2].mean(0) + 10])
    assert Heads.of(inner, edges).there.tolist() == [False, False, True]


def test_features_that_are_all_the_same_or_not_finite_have_no_head() -> None:
    inner, edges = torch.ones(2, 5, 3), torch.ones(2, 3)
    edges[1] = float("nan")
    assert not Heads.of(inner, edges).there.any()


def test_heads_follow_their_examples() -> None:
    made = heads_of(patient(Plain()))
    z = edge_points(digits()[1].images[:48], THREAT)
    binary = test.Binary(made.features.logits, made.heads, torch.arange(48))
    whole = binary(z)
    rows = torch.tensor([7, 2, 40])
    assert torch.equal(
        binary.select(rows)(z[rows].repeat(2, 1, 1, 1)).argmax(1), whole[rows].argmax(1).repeat(2)
    )
    torch.testing.assert_close(binary.select(rows).select(torch.tensor([2]))(z[40:41]), whole[40:41])


# --- points ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [THREAT, L2], ids=lambda each: each.norm)
def test_points_are_in_their_balls_and_in_the_box(threat: Threat) -> None:
    x = digits()[1].images[:6]
    inner, edges = inner_points(x, threat), edge_points(x, threat)
    assert inner.shape[:2] == (6, INNER + 1)
    assert torch.equal(inner[:, 0], x)
    for place in range(1, INNER + 1):
        assert (threat.distance(x, inner[:, place]) <= WITHIN * threat.radius + 1e-6).all()
    assert (threat.distance(x, edges) <= threat.radius + 1e-6).all()
    for z in (inner, edges):
        assert ((z >= 0) & (z <= 1)).all()
    grey = torch.full_like(x, 0.5)
    torch.testing.assert_close(
        threat.distance(grey, edge_points(grey, threat)), torch.full((6,), threat.radius)
    )


def test_inner_points_of_l2_fill_their_ball() -> None:
    # Far from the box: the radius to the power of the dimension is uniform, of those that are no corners.
    x = torch.full((200, 1, 2, 2), 0.5)
    threat = Threat("l2", 0.1)
    inner = inner_points(x, threat)
    share = torch.cat([threat.distance(x, inner[:, place]) for place in range(1, INNER, 2)]) / (WITHIN * 0.1)
    assert float((share**4).mean()) == pytest.approx(0.5, abs=0.02)
    assert float((share**4 < 0.25).double().mean()) == pytest.approx(0.25, abs=0.02)


# --- truth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [THREAT, L2], ids=lambda each: each.norm)
@pytest.mark.parametrize("hidden", [(), (nn.Linear(256, 80),)], ids=["pixels", "linear features"])
def test_linear_features_are_won_on_every_head(threat: Threat, hidden: tuple[nn.Module, ...]) -> None:
    size = hidden[0].out_features if hidden else 256
    net = untrained(nn.Flatten(), *hidden, nn.Linear(size, 10))  # type: ignore[arg-type]
    given = patient(Plain(net), threat=threat)
    made = heads_of(given)
    assert made.heads.there.all()
    # What is there, in closed form: in linf each pixel goes where its weight leads, as far as it may.
    jacobian = net[1].weight.double() if hidden else torch.eye(256, dtype=torch.float64)  # type: ignore[index]
    weights = made.heads.ways @ jacobian
    x = given.images.flatten(1).double()
    base = made.heads.scores(test.features_of(made.features, given.images), torch.arange(48))
    if threat.norm == "linf":
        up, down = ((x + way * threat.radius).clamp(0, 1) - x for way in (1, -1))
        most = base + torch.maximum(weights * up, weights * down).sum(1)
        tenth = base + 0.1 * threat.radius * weights.abs().sum(1)
        assert (most > 0).all()
        assert (tenth < 0).all(), "an attack of a tenth of the radius finds none"
    z = made.attacked()
    assert made.won(z).all()
    assert (threat.distance(given.images, z) <= threat.radius + 1e-5).all()
    assert found(given).level == "quiet"


@pytest.mark.parametrize("threat", [Threat("linf", 0.03), THREAT, L2], ids=str)
@pytest.mark.parametrize("make", [small_net, mlp, normalised], ids=lambda each: each.__name__)
def test_sound_networks_give_nothing_above_a_note(make: Callable[[], nn.Module], threat: Threat) -> None:
    for radius in (0.0, 0.1):
        given = found(patient(Plain(trained(make, radius=radius)), threat=threat))
        assert given.level in ("quiet", "note"), given


@pytest.mark.parametrize("make", MASKED, ids=lambda each: each.__name__)
def test_masked_features_are_noticed(make: Callable[[], nn.Module]) -> None:
    given = found(patient(make()))
    assert given.level in ("doubt", "alarm"), given
    assert given.code == "weak-on-features"


def test_k_winners_take_all_are_noticed() -> None:
    # In small balls: the longer the steps, the more jumps they pass.
    for radius in (0.03, 0.06):
        given = found(patient(Plain(trained(winners)), threat=Threat("linf", radius)))
        assert given.level in ("doubt", "alarm"), given


@pytest.mark.parametrize("make", [RoundedFeatures, ThermometerCode])
def test_masked_features_read_as_robust_under_an_attack_on_logits(make: Callable[[], Body]) -> None:
    given = patient(make())
    right = ~given.broken(given.images)
    assert not (given.broken(given.climbed("margin")) & right).any()
    assert found(given).level == "alarm"
    # Whoever looks at the network behind the mask breaks most of them.
    bare = patient(Plain())
    assert (given.broken(bare.climbed("margin")) & right).sum() > right.sum() / 2


def test_draws_that_find_as_much_as_the_attack_make_it_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test.Trained, "guessed", lambda self: torch.ones(24, dtype=torch.bool))
    assert found(patient(Plain())).level == "untested"
    assert found(patient(RoundedFeatures())).level == "alarm"


# --- where features are ------------------------------------------------------------------------------


class Own(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Changed(Plain):
    """Logits go through a function."""

    def __init__(self, change: Callable[[Tensor], Tensor], net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.change = change

    def scored(self, x: Images) -> Tensor:
        return self.change(self.plain(x))


class Twice(Body):
    """The last layer is called twice, and the second time is what counts."""

    def plain(self, x: Images) -> Tensor:
        first = self.last(self.body(x))
        logits: Tensor = self.last(self.body(x + 0.01 * first.mean()))
        return logits


def features(model: Plain) -> Tensor | None:
    """Return the features that are read of digits; None where there are none."""
    x = digits()[1].images[:8]
    call = test.penultimate(model, model.seen, x, 10)
    return None if call is None else Reading(model.seen, call)(x)


def body() -> nn.Sequential:
    return trained()[:-1]  # type: ignore[index,no-any-return]


@pytest.mark.parametrize(
    "change",
    [lambda v: v, lambda v: 3 * v, lambda v: v.log_softmax(1), lambda v: torch.cat([v, 0 * v[:, :1]], 1)],
    ids=["as they are", "scaled", "log-softmax", "with a refusal"],
)
def test_features_are_what_the_last_layer_is_given(change: Callable[[Tensor], Tensor]) -> None:
    given = features(Changed(change))
    assert given is not None
    assert torch.equal(given, body()(digits()[1].images[:8]))


def test_features_are_found_before_layers_of_other_kinds() -> None:
    x = digits()[1].images[:8]
    own = features(Plain(nn.Sequential(body(), Own())))
    assert own is not None
    assert torch.equal(own, body()(x))
    normed = features(Plain(nn.Sequential(body(), parametrizations.weight_norm(nn.Linear(64, 10)))))
    assert normed is not None
    assert torch.equal(normed, body()(x))
    pixel = nn.Sequential(body(), nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 10, 1), nn.Flatten())
    convolved = features(Plain(pixel))
    assert convolved is not None
    assert torch.equal(convolved, body()(x))


def test_of_several_calls_the_one_whose_output_is_the_answer_counts() -> None:
    x, model = digits()[1].images[:8], Twice()
    given = features(model)
    assert given is not None
    assert torch.equal(given, model.body(x + 0.01 * model.last(model.body(x)).mean()))
    assert not torch.equal(given, model.body(x))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Changed(torch.tanh),
        lambda: Changed(lambda v: -v),
        lambda: Changed(lambda v: v.roll(1, 1)),
        lambda: Changed(lambda v: torch.stack([v, v])),
        lambda: Changed(lambda v: v * float("nan")),
        lambda: Changed(lambda v: v + trained(mlp)(digits()[1].images[: len(v)])),
        lambda: Changed(lambda v: -torch.cdist(v, torch.eye(10))),
        lambda: Plain(nn.Sequential(body(), nn.Linear(64, 10), nn.Tanh())),
    ],
    ids=["tanh", "negative", "rolled", "several", "not finite", "a sum", "distances", "a layer behind"],
)
def test_without_a_last_layer_nothing_is_tested(model: Callable[[], Plain]) -> None:
    trained(mlp)
    assert features(model()) is None
    given = found(patient(model()))
    assert given.level == "untested"
    assert given.code is None
    assert "linear layer" in given.message


def test_a_network_that_is_no_part_of_the_defense_is_not_looked_into() -> None:
    model = Changed(lambda v: v)
    model.plain = trained(mlp).__call__  # type: ignore[method-assign]
    assert features(model) is None


def test_features_without_a_gradient_are_not_tested() -> None:
    class Detached(Body):
        def plain(self, x: Images) -> Tensor:
            logits: Tensor = self.last(self.body(x).detach())
            return logits + 0 * x.flatten(1)[:, :10]

    given = found(patient(Detached()))
    assert given.level == "untested"
    assert "no gradient" in given.message


def test_heads_of_few_images_say_nothing() -> None:
    class Constant(Body):
        def features(self, x: Images) -> Tensor:
            return 0 * super().features(x) + 1

    given = found(patient(Constant()))
    assert given.level == "untested"
    assert "0 of 24" in given.message


# --- no trace ----------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) for each in model.modules())


def test_watching_leaves_no_trace() -> None:
    model = copy.deepcopy(Body())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert found(patient(model)).level == "quiet"
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("most", [0, 1, 4])
def test_watching_leaves_no_trace_where_a_network_raises(most: int) -> None:
    class Fails(Body):
        asked = 0

        def features(self, x: Images) -> Tensor:
            self.asked += 1
            if self.asked > most:
                raise OSError("gone")
            return super().features(x)

    model = Fails()
    with pytest.raises(OSError, match="gone"):
        found(patient(model))
    assert hooks(model) == 0


def test_others_hooks_stay() -> None:
    model, calls = copy.deepcopy(Body()), []
    with model.last.register_forward_hook(lambda *_: calls.append(1)):
        found(patient(model))
        assert hooks(model) == 1
    assert calls
