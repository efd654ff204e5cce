"""A search in bfloat16 that float32 judges, and products of float32 that are float32's in every verdict."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bench
from bench.errors import DisturbedError, InputError
from bench.protocols import Threat, View, identity
from bench.referee.instruments import QueryCounter, instrument
from bench.referee.precision import Claims, check_bfloat16, copied, in_bfloat16, reduced
from bench.referee.settings import PRODUCTS
from bench.runner import craft
from bench.runner.context import settle

COARSE = "bf16-search"


# --- networks whose answers are known in closed form -----------------------------------------------------


class Narrow(nn.Module):
    """Logits (300, 299.95 + p + 40 q) of the two pixels of an image, p and q.

    Between 256 and 512 neighbours in bfloat16 lie 2 apart, so that with q = 0 both logits are 300 there and
    the first class wins the tie. The label is 1: bfloat16 takes every such example for broken, and float32
    only those with p < 0.05.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 40.0]]))
            self.linear.bias.copy_(torch.tensor([300.0, 299.95]))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(x.flatten(1))
        return answer


RADIUS = 0.1
# (p, q): broken within the radius; too far for it; far away in bfloat16, too.
IMAGES = torch.tensor([[0.1, 0.0], [0.12, 0.0], [0.5, 0.0], [0.9, 0.0], [0.1, 1.0]]).view(-1, 1, 1, 2)
LABELS = torch.ones(len(IMAGES), dtype=torch.int64)
BREAKABLE = [True, True, False, False, False]
ATTACK: dict[str, Any] = {"use": "pgd", "steps": 20}


def run(net: nn.Module, x: Tensor, y: Tensor, **attack: Any) -> Any:
    return bench.evaluate(net, x, y, attack={**ATTACK, **attack}, radius=RADIUS)


def test_the_network_is_what_it_is_said_to_be() -> None:
    settle(torch.device("cpu"))
    net = Narrow()
    exact, coarse = net(IMAGES), in_bfloat16(net)(IMAGES)
    assert exact.argmax(1).tolist() == [1] * 5
    assert coarse.dtype == torch.bfloat16
    assert coarse.argmax(1).tolist() == [0, 0, 0, 0, 1]


def test_a_wrong_success_of_bfloat16_costs_no_example() -> None:
    """Every example that float32 can break is broken, though bfloat16 dropped it at its clean image."""
    coarse, exact = (run(Narrow(), IMAGES, LABELS, precision=each) for each in (COARSE, "float32"))
    assert coarse.frame["broken"].tolist() == BREAKABLE
    for name in ("label", "broken", "linf"):
        assert coarse.frame[name].tolist() == exact.frame[name].tolist()
    # What was searched again is what a run in float32 finds, bit by bit.
    assert torch.equal(coarse.images[:4], exact.images[:4])


def test_without_the_second_search_examples_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The premise of the test above: what bfloat16 returns of these breaks nothing."""
    monkeypatch.setattr(craft, "_joined", lambda first, again, rows: first)
    assert not run(Narrow(), IMAGES, LABELS, precision=COARSE).frame["broken"].any()


def attacked(net: nn.Module, monkeypatch: pytest.MonkeyPatch, **attack: Any) -> dict[str, Any]:
    """Return the facts for the receipt of one shard."""
    found: list[dict[str, Any]] = []
    original = craft.attacked

    def watched(*arguments: Any) -> Any:
        tensors, facts = original(*arguments)
        found.append(facts)
        return tensors, facts

    monkeypatch.setattr("bench.api.direct.attacked", watched)
    run(net, IMAGES, LABELS, **attack)
    (facts,) = found
    return facts


def test_the_receipt_counts_what_was_disputed(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = attacked(Narrow(), monkeypatch, precision=COARSE)
    told = facts["precision"]
    assert told["search"] == "bfloat16"
    assert (told["claimed"], told["searched_again"], told["broken_unnoticed"]) == (4, 4, 0)
    passes = told["passes"]["forwards"]
    exact = attacked(Narrow(), monkeypatch)
    assert "precision" not in exact
    both = facts["queries_per_example"]["forwards"] * len(IMAGES)
    again = exact["queries_per_example"]["forwards"] * len(IMAGES)
    # Both searches are paid for; that of the fifth example, which stood, happened in bfloat16 alone.
    alone = run(Narrow(), IMAGES[4:], LABELS[4:]).frame["forwards"].sum()
    assert both == passes + again - alone
    with monkeypatch.context() as skipping:
        skipping.setattr(craft, "_joined", lambda first, again, rows: first)
        assert run(Narrow(), IMAGES, LABELS, precision=COARSE).frame["forwards"].sum() == passes


def test_notes_of_both_searches_stand_in_their_places() -> None:
    coarse, exact = (
        run(Narrow(), IMAGES, LABELS, use="apgd", steps=9, precision=each) for each in (COARSE, "float32")
    )
    for note in ("flat", "nonfinite"):
        assert coarse.frame[note].tolist() == exact.frame[note].tolist()


class Exact(nn.Module):
    """A linear network whose weights, and the products with images of few bits, are exact in bfloat16."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(pixels, classes, bias=False)
        with torch.no_grad():
            # One of -1, 0, 1 at few places: sums of at most four images' values of 1/16 each.
            weight = torch.zeros(classes, pixels)
            for row in weight:
                places = torch.randperm(pixels, generator=draw)[:4]
                row[places] = torch.randint(0, 2, (4,), generator=draw).float() * 2 - 1
            self.linear.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(x.flatten(1))
        return answer


@pytest.mark.parametrize(
    "attack",
    [
        # Steps of 1/16 from images of sixteenths, signs of gradients: every iterate is one, too.
        {"use": "pgd", "steps": 2, "step_size": 1 / 16, "start": "zero", "loss": "margin"},
        {"use": "pgd", "steps": 2, "step_size": 1 / 16, "start": "zero", "loss": "margin", "drop": False},
        {"use": "fgsm"},
    ],
    ids=lambda attack: "-".join(map(str, attack.values())),
)
def test_where_bfloat16_is_exact_the_search_is_that_of_float32(attack: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(4, 13, (24, 1, 4, 4), generator=draw).float() / 16
    net = Exact(16, 4)
    with torch.no_grad():
        y = net(x).argmax(1)
    radius = attack.get("steps", 1) / 16
    one, other = (
        bench.evaluate(net, x, y, attack={**attack, "precision": each}, radius=radius)
        for each in (COARSE, "float32")
    )
    assert 0 < one.frame["broken"].sum() < 24
    assert torch.equal(one.images, other.images)
    assert one.frame.equals(other.frame)


# --- what a search claims -----------------------------------------------------------------------------------


def claims(threat: Threat, n: int = 3, **settings: Any) -> Claims:
    view = View(identity, **settings)
    return Claims(view, torch.full((n, 1, 1, 2), 0.5), torch.zeros(n, dtype=torch.int64), threat, 1e-6, None)


WON, LOST = [0.0, 1.0], [1.0, 0.0]


def test_a_claim_within_the_threat_counts_and_stays() -> None:
    watch = claims(Threat("linf", 0.1))
    rows, near, far = torch.arange(3), torch.full((3, 1, 1, 2), 0.6), torch.full((3, 1, 1, 2), 0.7)
    watch.note(rows, near, torch.tensor([WON, LOST, LOST]))
    watch.note(rows, far, torch.tensor([LOST, WON, LOST]))
    assert watch.claimed.tolist() == [True, False, False]
    watch.note(rows, near, torch.tensor([LOST, LOST, LOST]))
    assert watch.claimed.tolist() == [True, False, False], "later answers take nothing back"


def test_a_claim_of_any_copy_and_of_any_place_counts() -> None:
    watch = claims(Threat("l2"))
    points = torch.zeros(4, 1, 1, 2)
    # Two copies of the examples 2 and 0, copy after copy.
    watch.note(torch.tensor([2, 0]), points, torch.tensor([LOST, LOST, WON, LOST]))
    assert watch.claimed.tolist() == [False, False, True]
    watch.note(torch.tensor([1, 0]), points[:3], torch.tensor([LOST, LOST, LOST]))
    assert watch.claimed.tolist() == [True, True, True], "whose row is whose is not known"


def test_a_refusal_claims_nothing() -> None:
    watch = claims(Threat("linf"), refusal=True)
    watch.note(torch.arange(3), torch.zeros(3, 1, 1, 2), torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    assert watch.claimed.tolist() == [False, True, False]


def test_answers_are_bfloat16s_and_gradients_float32s() -> None:
    seen: list[Tensor] = []

    def net(z: Tensor) -> Tensor:
        seen.append(z.flatten(1) @ torch.full((2, 2), 1 / 3))
        return seen[-1]

    watch = claims(Threat("linf"))
    counter = QueryCounter.of(3, torch.device("cpu"))
    view = instrument(View(net), counter, "gradient", target=None, exact=True, claims=watch)
    z = torch.rand(3, 1, 1, 2, requires_grad=True)
    answer = view.logits(z)
    assert seen[-1].dtype == torch.bfloat16
    assert answer.dtype == torch.float32
    (gradient,) = torch.autograd.grad(answer.sum(), z)
    assert gradient.dtype == torch.float32
    assert (counter.forwards.tolist(), counter.backwards.tolist()) == ([1] * 3, [1] * 3)


# --- where it cannot be ------------------------------------------------------------------------------


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    weight = torch.eye(2, dtype=dtype)
    return in_bfloat16(lambda z: z.flatten(1).to(dtype) @ weight)  # type: ignore[return-value]


def stubborn(z: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return z.flatten(1) @ torch.eye(2)


def inplace(z: Tensor) -> Tensor:
    return torch.eye(2).addmm_(z.flatten(1).float(), torch.eye(2).double())


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda z: z.flatten(1).double() @ torch.eye(2).double(), "products in float64, which it needs"),
        (stubborn, "it computes its products in float32, as it chooses itself"),
        (lambda z: z.flatten(1), "it has no matrix products"),
        (inplace, r"cannot be asked in bfloat16 \(RuntimeError"),
    ],
)
def test_a_network_that_bfloat16_is_not_for_is_refused(net: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(InputError, match=rf"precision: bf16-search: .*{said}.*precision: float32"):
        check_bfloat16(lambda: in_bfloat16(net)(torch.rand(2, 1, 1, 2)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(2, 2), nn.Sequential(nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 2, 1))]
)
def test_layers_that_autocast_knows_pass(layer: nn.Module) -> None:
    check_bfloat16(lambda: in_bfloat16(layer)(torch.rand(2, 2)))


def test_a_refusal_reaches_the_caller() -> None:
    class Wide(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).double() @ self.linear.weight.double().T

    with pytest.raises(InputError, match="products in float64"):
        run(Wide(), IMAGES, LABELS, precision=COARSE)


def test_a_network_that_keeps_what_it_computed_answers_the_verdict_in_float32() -> None:
    """Its first product would serve all later ones; the search asks a copy."""

    class Keeps(Narrow):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            # By the number of images: all of them are shown to the search first.
            if len(x) not in self.kept:
                self.kept[len(x)] = (self.linear.weight @ torch.eye(2) * (1 / 3)).detach().float() * 3
            return x.flatten(1) @ self.kept[len(x)].T + self.linear.bias

    coarse, exact = (run(Keeps(), IMAGES, LABELS, precision=each) for each in (COARSE, "float32"))
    assert coarse.frame["broken"].tolist() == exact.frame["broken"].tolist() == BREAKABLE
    for one, other in zip(coarse.frame["logits"], exact.frame["logits"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    class Single(Narrow):
        def __deepcopy__(self, memo: Any) -> "Single":
            raise TypeError("there is one of me")

    with pytest.raises(InputError, match=r"cannot be copied \(there is one of me"):
        copied(Single())
    assert copied(Narrow()).state_dict().keys() == copy.copy(Narrow()).state_dict().keys()


# --- TF32 ---------------------------------------------------------------------------------------------------

BACKENDS = torch.backends
REDUCERS: dict[str, Callable[[], object]] = {
    "older, matmul": lambda: torch.set_float32_matmul_precision("high"),
    "older, cuda": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older, cudnn": lambda: setattr(BACKENDS.cudnn, "allow_tf32", True),
    **{
        each.name: lambda each=each: each.write("bf16" if "mkldnn" in each.name else "tf32")  # type: ignore[misc]
        for each in PRODUCTS
    },
}


@pytest.fixture
def settled() -> Any:
    settle(torch.device("cpu"))
    yield
    settle(torch.device("cpu"))


@pytest.mark.parametrize("name", REDUCERS)
def test_reduced_products_are_seen_and_settled(name: str, settled: Any) -> None:
    assert reduced() == []
    REDUCERS[name]()
    assert reduced() != []
    settle(torch.device("cpu"))
    assert reduced() == [], "no job begins with them"


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("coarse", [False, True])
def test_a_network_cannot_reduce_them_in_a_verdict(name: str, coarse: bool, settled: Any) -> None:
    class Reduces(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == len(IMAGES):
                REDUCERS[name]()
            return super().forward(x)

    with pytest.raises(DisturbedError, match="a verdict needs all of float32"):
        run(Reduces(), IMAGES, LABELS, precision=COARSE if coarse else "float32")


def test_the_search_in_bfloat16_reduces_nothing_else(settled: Any) -> None:
    seen: list[list[str]] = []

    class Looks(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(reduced())
            return super().forward(x)

    run(Looks(), IMAGES, LABELS, precision=COARSE)
    assert seen
    assert not any(seen)
