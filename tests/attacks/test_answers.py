"""What networks may answer with: classes that cannot be, and any floating dtype. No attack minds."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from test_attacks import ROWS
from torch import Tensor, nn

from attacks.common.candidates import candidate_labels
from attacks.pgd import pgd
from attacks.spsa import spsa
from bench.doctor.ground import Ground
from bench.noise import Noise
from bench.protocols import Crafted, Images, Inversion, Shape, Threat, View
from bench.referee.instruments import QueryCounter, instrument
from bench.registry import ATTACKS, bind
from bench.testing import Halfspace

SEEING = {(name, norm): params for name, norm, params in reversed(ROWS) if ATTACKS[name].access != "none"}
"""The first row of each attack and norm."""


class Answering(Halfspace):
    """A half-space whose other classes are at a given level, and which answers in a dtype of its own."""

    level = -20.0
    dtype: torch.dtype | None = None

    def forward(self, x: Images) -> Tensor:
        logits = super().forward(x)
        logits[:, 2:] = self.level
        return logits if self.dtype is None else logits.to(self.dtype)


class Tried(NamedTuple):
    """An attack on such a half-space."""

    ground: Ground
    enough: float
    """The radius that is enough."""
    within: float

    def run(self, **how: Any) -> Crafted:
        done = self.ground.run(self.enough, **how)
        assert not done.faults
        return done.crafted

    def crosses(self, crafted: Crafted) -> None:
        assert not self.ground.held(crafted.images).any()
        if self.ground.entry.kind == "minimum-norm":
            assert float(self.ground.farther(crafted.images).max()) <= self.within


def trial(name: str, norm: Any, params: dict[str, Any], classes: int, **answers: Any) -> Tried:
    own = dict(params)
    within, entry = own.pop("within", 1.2), ATTACKS[name]
    plane = Answering(Shape(3, 5, 4, max(classes, entry.least_classes)))
    for each, value in answers.items():
        setattr(plane, each, value)
    ground = Ground(entry, bind(entry, own), norm, plane, *plane.examples(8))
    enough = within * float(ground.least.max()) if entry.kind == "fixed-budget" else math.inf
    return Tried(ground, enough, within)


@pytest.mark.parametrize(("name", "norm"), SEEING, ids=lambda value: str(value))
@pytest.mark.parametrize("level", [-math.inf, -1e4])
def test_classes_that_cannot_be_are_in_no_attack_s_way(name: str, norm: Any, level: float) -> None:
    made = trial(name, norm, SEEING[name, norm], 5, level=level)
    crafted = made.run()
    if math.isfinite(made.within):
        made.crosses(crafted)
    for note in ("nonfinite", "failed"):
        assert not crafted.notes.get(note, torch.zeros(1)).any() or not math.isfinite(made.within)


@pytest.mark.parametrize(("name", "norm"), SEEING, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_may_answer_in_any_floating_dtype(name: str, norm: Any, dtype: torch.dtype) -> None:
    made = trial(name, norm, SEEING[name, norm], 2, dtype=dtype)
    entry = ATTACKS[name]
    if dtype == torch.bfloat16 and entry.access == "score" and entry.kind == "minimum-norm":
        # Two digits of a score do not say more exactly where the boundary is.
        made = made._replace(within=1.25 * made.within)
    crafted = made.run()
    if math.isfinite(made.within):
        made.crosses(crafted)
    # Towards a target and on a surrogate nothing else goes in.
    if entry.targeted:
        made.run(towards=True)
    made.run(exact=False)


def test_gradients_of_answers_in_half_precision_flow_and_logits_are_cast_once() -> None:
    net = nn.Linear(4, 3).half()
    counter = QueryCounter.of(2, torch.device("cpu"))
    seen = instrument(View(lambda z: net(z.half())), counter, "gradient", target=None, exact=True)
    z = torch.rand(2, 4, requires_grad=True)
    logits = seen.logits(z)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.amax(1), torch.zeros(2))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), z)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, net.weight[0].float().expand(2, 4))
    assert seen.select(torch.tensor([1])).logits(z[1:]).dtype == torch.float32


def test_a_class_that_cannot_be_is_never_gone_for() -> None:
    inf = math.inf
    logits = torch.tensor([[5.0, -inf, 3, 4], [5, -inf, -inf, 4], [-inf, 1, 2, -inf], [1, -inf, -inf, -inf]])
    y = torch.zeros(4, dtype=torch.int64)
    assert candidate_labels(View(lambda z: z), logits, y).tolist() == [
        [3, 2, 3],
        [3, 3, 3],
        [2, 1, 2],
        [1, 1, 1],
    ]
    assert candidate_labels(View(lambda z: z), logits, y, 2).tolist() == [[3, 2], [3, 3], [2, 1], [1, 1]]
    refusing = View(lambda z: z, refusal=True)
    assert candidate_labels(refusing, logits[:3], y[:3]).tolist() == [[2, 2], [1, 1], [2, 1]]
    given = View(lambda z: z, target=torch.tensor([1, 1, 1, 1]))
    assert candidate_labels(given, logits, y).tolist() == [[1], [1], [1], [1]]


# --- where the truth leads by more than float32 probabilities tell ----------------------------------------


def leading(scale: float) -> nn.Module:
    """Return a small network, and one with the same boundaries whose truth leads by as many times more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        net[3].weight *= scale
        net[3].bias *= scale
    return net.requires_grad_(False)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.04), ("l2", 0.25)])
def test_cross_entropy_breaks_what_the_margin_breaks_however_far_the_truth_leads(
    norm: Any, radius: float
) -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = leading(1.0)(x).argmax(1)
    for scale in (1.0, 1000.0):
        net = leading(scale)
        broken = {}
        for loss in ("ce", "margin"):
            draws = Noise("test", torch.arange(40))
            z = pgd(View(net), x, y, Threat(norm, radius), draws, loss=loss, start="zero").images  # type: ignore[arg-type]
            broken[loss] = net(z).argmax(1) != y
        lead = net(x).sort(1).values.diff(dim=1)[:, -1]
        assert scale == 1 or (lead > 16.7).float().mean() > 0.7
        assert 5 < broken["margin"].sum() < 40
        assert (broken["ce"] != broken["margin"]).sum() <= 2


def test_estimates_by_cross_entropy_move_however_far_the_truth_leads() -> None:
    """Adam adds 1e-8 to its steps' denominators, beside which a gradient of 1e-20 is nothing."""
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    net = leading(1000.0)
    y = net(x).argmax(1)
    lead = net(x).sort(1).values.diff(dim=1)[:, -1]
    behind = (lead > 20) & (lead < 80)
    draws = Noise("test", torch.arange(12))
    z = spsa(View(net), x, y, Threat("linf", 0.1), draws, steps=20, samples=16, loss="ce").images
    assert behind.sum() > 3
    assert ((z - x).flatten(1).abs().mean(1)[behind] > 0.01).all()


# --- where all logits lie far from zero -------------------------------------------------------------------


LEVEL = -3e7
"""A level of log-likelihoods of images: there, float32 holds even whole numbers alone."""


def raised(level: float) -> nn.Module:
    """Return a small network in float64 with all of its logits raised to a level."""
    net = leading(1.0).double()
    with torch.no_grad():
        net[3].bias += level
    return net


@pytest.mark.parametrize("access", ["gradient", "score"])
def test_the_level_of_logits_is_taken_off_before_they_lose_their_digits(access: Any) -> None:
    z = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    code = torch.rand(6, 3)
    seen = {}
    for level in (0.0, LEVEL):
        net = raised(level)
        view = Inversion(lambda z, net=net: net(z.double()), classify=lambda _, x, net=net: net(x.double()))
        counter = QueryCounter.of(6, torch.device("cpu"))
        instrumented = instrument(view, counter, access, target=None, exact=True)
        rows = torch.tensor([4, 1])
        seen[level] = [
            instrumented.logits(z),
            instrumented.classify(code, z),
            instrumented.select(rows).logits(z[rows]),
        ]
    for low, high in zip(seen[0.0], seen[LEVEL], strict=True):
        assert low.dtype == high.dtype == torch.float32
        assert low.amin(1).max() < -0.1
        assert torch.allclose(low, high, atol=1e-6)
        assert torch.equal(high.amax(1), torch.zeros(len(high)))


def test_the_level_stays_where_a_view_says_that_it_matters() -> None:
    z = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    net = raised(2.0)
    view = View(lambda z: net(z.double()), centred=False)
    seen = instrument(view, QueryCounter.of(6, torch.device("cpu")), "score", target=None, exact=True)
    assert torch.equal(seen.logits(z), net(z.double()).float())


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_an_attack_under_watch_does_the_same_at_any_level(loss: Any) -> None:
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = leading(1.0)(x).argmax(1)
    made = {}
    for level in (0.0, LEVEL):
        net = raised(level)
        counter = QueryCounter.of(30, torch.device("cpu"))
        seen = instrument(
            View(lambda z, net=net: net(z.double())), counter, "gradient", target=None, exact=True
        )
        draws = Noise("test", torch.arange(30))
        made[level] = pgd(seen, x, y, Threat("linf", 0.04), draws, loss=loss, steps=10).images
        broken = raised(0.0)(made[level].double()).argmax(1) != y
        assert 5 < broken.sum() < 30
    # Rounding of one part in 1e8 turns the sign of a few gradients that are nearly zero.
    assert ((made[0.0] - made[LEVEL]).abs().flatten(1).amax(1) < 1e-6).float().mean() > 0.8
