"""The referee: budget, box, finiteness, access, counting, and everything as it was found (X-1, X-6)."""

import contextlib
import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.errors import InputError
from bench.protocols import Decision, Features, Inversion, Threat, View, lengths
from bench.referee.freezing import frozen
from bench.referee.instruments import (
    GUIDES,
    QueryCounter,
    answers_only,
    centred,
    guides,
    instrument,
    no_access_view,
)
from bench.referee.validation import validate

X = torch.full((4, 1, 2, 2), 0.5)


@pytest.mark.parametrize(("norm", "order"), [("linf", math.inf), ("l2", 2), ("l1", 1), ("l0", 0)])
def test_lengths_are_those_of_numpy(norm: Any, order: float) -> None:
    moves = torch.randn(6, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moves[0], moves[1, 0], moves[2, 1, 2, 3], moves[3, 1, 1, 1], moves[4, :, 1] = 0, 0, math.inf, math.nan, 0
    # To l0 the channels of a pixel are one.
    flat = (moves != 0).any(1).double() if norm == "l0" else moves
    expected = np.linalg.norm(flat.flatten(1).numpy(), order, axis=1)
    np.testing.assert_allclose(lengths(moves, norm).numpy(), expected, rtol=1e-14)
    assert len(lengths(moves[:0], norm)) == 0


def test_a_lawful_move_is_shown_as_it_is() -> None:
    z = X.clone()
    z[0] += 0.05
    validated = validate(X, z, Threat("linf", 0.1))
    assert torch.equal(validated.images, z)
    assert not validated.invalid.any()


@pytest.mark.parametrize(
    ("norm", "radius", "step_size"), [("linf", 0.1, 0.11), ("l2", 0.1, 0.06), ("l1", 0.1, 0.03)]
)
def test_a_move_out_of_the_budget_is_void_for_its_example_alone(
    norm: str, radius: float, step_size: float
) -> None:
    z = X.clone()
    z[1] += step_size
    validated = validate(X, z, Threat(norm, radius))  # type: ignore[arg-type]
    assert validated.invalid.tolist() == [False, True, False, False]
    assert torch.equal(validated.images, X)


def test_l0_counts_a_pixel_once_and_of_what_is_no_image_values() -> None:
    x = torch.zeros(3, 3, 2, 2)
    z = x.clone()
    z[0, :, 0, 0], z[1, 1, 0, 0], z[2, 0], z[2, 2, 1, 1] = 1, 0.5, 1, 1
    assert Threat("l0").distance(x, z).tolist() == [1, 1, 4]
    assert lengths((z - x).flatten(1), "l0").tolist() == [3, 1, 5]
    assert validate(x, z, Threat("l0", 1)).invalid.tolist() == [False, False, True]


def test_l0_knows_no_rounding() -> None:
    z = X.clone()
    z[0, 0, 0, 0] = 1
    z[1, 0, 0] = 1
    validated = validate(X, z, Threat("l0", 1))
    assert validated.invalid.tolist() == [False, True, False, False]
    # A pixel may go as far as it likes.
    assert torch.equal(validated.images[[0, 2, 3]], z[[0, 2, 3]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_what_is_no_image_is_void(value: float) -> None:
    z = X.clone()
    z[2, 0, 0, 0] = value
    validated = validate(X, z, Threat("linf"))
    assert validated.invalid.tolist() == [False, False, True, False]
    assert torch.equal(validated.images, X)


@pytest.mark.parametrize(("more", "invalid"), [(5e-7, False), (1.5e-6, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_linf_overshoot_of_rounding_is_cut_from_its_value_alone(
    sign: int, more: float, invalid: bool
) -> None:
    x = X[:1].double()
    z = x.clone()
    z[0, 0, 0, 0] += sign * (0.1 + more)
    z[0, 0, 1, 1] += 0.05
    validated = validate(x, z, Threat("linf", 0.1))
    assert validated.invalid.tolist() == [invalid]
    kept = validated.images - x
    assert kept.flatten().tolist() == pytest.approx(
        [0, 0, 0, 0] if invalid else [sign * 0.1, 0, 0, 0.05], abs=1e-15
    )


@pytest.mark.parametrize("radius", [0.1, math.inf])
def test_rounding_out_of_the_box_is_brought_back_into_it(radius: float) -> None:
    x = torch.tensor([0.0, 1.0, 0.05, 0.95], dtype=torch.float64).view(4, 1, 1, 1)
    z = x + torch.tensor([-5e-7, 5e-7, -0.05 - 5e-7, 0.05 + 5e-7], dtype=torch.float64).view(4, 1, 1, 1)
    validated = validate(x, z, Threat("linf", radius))
    assert not validated.invalid.any()
    assert validated.images.flatten().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rounding_is_projected_back_in_float64(norm: str) -> None:
    threat = Threat(norm, 0.1)  # type: ignore[arg-type]
    step_size = 0.1 if norm == "linf" else 0.05
    validated = validate(X, X + step_size + 9e-7, threat)
    assert not validated.invalid.any()
    far = threat.distance(X.double(), validated.images.double())
    assert (far <= 0.1 + 6e-8).all()
    assert (far > 0.1 - 1e-6).all()


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (X[:2], "shape (2, 1, 2, 2), not (4, 1, 2, 2)"),
        (X.flatten(1), "shape (4, 4), not (4, 1, 2, 2)"),
        (X.double() + 0.01, "torch.float64, not torch.float32"),
        ((X * 255).byte(), "torch.uint8, not torch.float32"),
    ],
)
def test_images_of_another_shape_or_dtype_are_void_all_of_them(returned: Tensor, error: str) -> None:
    validated = validate(X, returned, Threat("linf", 0.1))
    assert torch.equal(validated.images, X)
    assert validated.images.dtype == X.dtype
    assert validated.invalid.tolist() == [True] * 4
    assert validated.invalid.dtype == torch.bool
    assert validated.because == {error: 4}


def test_void_moves_are_counted_by_their_reason_once() -> None:
    z = X.clone()
    z[0] = math.nan
    z[1, 0, 0, 0] = 2
    z[2] += 0.2
    validated = validate(X, z, Threat("linf", 0.1))
    assert validated.because == {"not finite": 1, "out of the box": 1, "out of the budget": 1}
    # By the worst of each: 2 is 1 beyond white, and 0.2 is 0.1 beyond the radius.
    assert validated.by == pytest.approx({"out of the box": 1.0, "out of the budget": 0.1}, abs=1e-6)
    assert validate(X, X, Threat("linf", 0.1)).because == validate(X, X, Threat("linf", 0.1)).by == {}


def test_what_leaves_the_box_is_void_within_the_budget_too() -> None:
    x = torch.tensor([0.95, 0.95, 0.95]).view(3, 1, 1, 1)
    z = x + torch.tensor([0.08, 0.01, 0.2]).view(3, 1, 1, 1)
    validated = validate(x, z, Threat("linf", 0.1))
    assert validated.invalid.tolist() == [True, False, True]
    assert validated.because == {"out of the box": 2}
    assert validated.by == pytest.approx({"out of the box": 0.15}, abs=1e-6)


@pytest.mark.parametrize("returned", [None, X.tolist()])
def test_what_is_no_tensor_fails(returned: object) -> None:
    with pytest.raises(TypeError, match=type(returned).__name__):
        validate(X, returned, Threat("linf", 0.1))


def test_logits_are_centred_and_keep_their_differences() -> None:
    small = torch.tensor([[0.25, 0.0, -1.5]])
    assert torch.equal(centred(small - 4096.0), small - 0.25)
    assert torch.isclose(centred(small - 1e6), small - 0.25, atol=0.07).all()


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_every_row_of_logits_is_centred_by_its_own_maximum(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9
    expected = rows.double() - rows.double().amax(-1, keepdim=True)
    assert torch.equal(centred(rows), expected.float())
    assert torch.equal(centred(rows, torch.float64), expected)


def test_centring_is_a_constant_to_autograd() -> None:
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((centred(z) * weights).sum(), z)
    assert torch.equal(gradient, weights)


def look(view: View, n: int, **options: object) -> tuple[View, QueryCounter]:
    counter = QueryCounter.of(n, torch.device("cpu"))
    settings = {"access": "gradient", "target": None, "exact": True, **options}
    return instrument(view, counter, **settings), counter  # type: ignore[arg-type]


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ torch.eye(4)


def test_passes_are_counted_by_example_through_narrowing_and_copies() -> None:
    view, counter = look(View(linear), 4)
    z = X.clone().requires_grad_()
    view.logits(z).sum().backward()
    some = view.select(torch.tensor([1, 3]))
    some.logits(X[:2].repeat(5, 1, 1, 1))
    some.select(torch.tensor([1])).logits(X[:1])
    assert counter.forwards.tolist() == [1, 6, 1, 7]
    assert counter.backwards.tolist() == [1, 1, 1, 1]


def test_maps_between_images_and_codes_are_passes_too() -> None:
    # Codes of three axes must not be taken for logits of several draws.
    view = Inversion(
        lambda z: z.flatten(1)[:, :2],
        encode=lambda x: x.flatten(2),
        decode=lambda z: z.view(-1, 1, 2, 2),
        invert=lambda x: x.flatten(2),
        energy=lambda z, x: z.flatten(1).sum(1),
        classify=lambda z, x: z.flatten(1)[:, :2],
    )
    counter = QueryCounter.of(4, torch.device("cpu"))
    seen = instrument(view, counter, "gradient", target=None, exact=True, chunk=2)
    assert isinstance(seen, Inversion)
    z = seen.invert(X)
    assert torch.equal(z, X.flatten(2))
    some = seen.select(torch.tensor([3, 1]))
    some.encode(X[:2])
    some.decode(z[:2])
    assert counter.forwards.tolist() == [1, 3, 1, 3]
    plain = instrument(View(lambda z: z.flatten(1)), counter, "score", target=None, exact=True)
    assert plain.encode(X) is X
    assert counter.forwards.tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize("centre", [True, False])
def test_logits_of_points_are_centred_and_energies_are_not(centre: bool) -> None:
    z = torch.arange(12.0).view(4, 3)
    view = Inversion(
        lambda z: z + 1,
        invert=lambda x: x,
        decode=lambda z: z,
        energy=lambda z, x: z.sum(1),
        classify=lambda z, x: z + x,
        centred=centre,
    )
    seen, _ = look(view, 4)
    assert isinstance(seen, Inversion)
    row = [-2.0, -1.0, 0.0]
    assert seen.logits(z).tolist() == ([row] * 4 if centre else (z + 1).tolist())
    assert seen.classify(z, z).tolist() == ([[-4.0, -2.0, 0.0]] * 4 if centre else (2 * z).tolist())
    assert torch.equal(seen.energy(z, z), z.sum(1))
    assert torch.equal(seen.decode(z), z)
    assert torch.equal(seen.invert(z), z)


def test_a_chunk_is_the_most_that_is_asked_at_once_and_maps_are_not_cut() -> None:
    sizes: dict[str, list[int]] = {"logits": [], "encode": [], "decode": []}

    def noted(name: str) -> Any:
        def ask(z: Tensor) -> Tensor:
            sizes[name].append(len(z))
            return z.flatten(1)

        return ask

    view, _ = look(View(**{name: noted(name) for name in sizes}), 7, chunk=3)
    x = torch.rand(7, 1, 2, 2)
    assert torch.equal(view.encode(x), x.flatten(1))
    view.logits(x)
    view.decode(x)
    assert sizes == {"logits": [3, 3, 1], "encode": [7], "decode": [7]}


def test_rows_that_nobody_can_name_are_shared_out() -> None:
    view, counter = look(View(linear), 4)
    view.logits(X[:2])
    assert counter.forwards.tolist() == [0.5] * 4
    view.logits(X[:3])
    assert counter.forwards.tolist() == [1.25] * 4
    assert counter.forwards.dtype == counter.backwards.dtype == torch.float64


def test_a_score_attack_gets_no_gradient() -> None:
    view, _ = look(View(linear), 4, access="score")
    assert not view.logits(X.clone().requires_grad_()).requires_grad


def test_an_attack_without_access_cannot_ask() -> None:
    view = no_access_view(QueryCounter.of(4, torch.device("cpu")))
    with pytest.raises(PermissionError, match='an attack declared access="none" asked for logits'):
        view.logits(X)


def test_answers_come_in_the_dtype_of_the_points_but_never_as_whole_numbers() -> None:
    """Points may be entries of a code book, whose logits are no whole numbers."""
    book = torch.tensor([[0.5, 1.25, 0.0], [2.5, 0.0, -1.5]])
    for centre in (True, False):
        view, _ = look(View(lambda z: book[z.flatten().long()], centred=centre), 2)
        for dtype in (torch.float64, torch.float32, torch.int64):
            answer = view.logits(torch.tensor([[0], [1]], dtype=dtype))
            assert answer.dtype == (torch.float32 if dtype == torch.int64 else dtype)
            wanted = book - book.amax(1, keepdim=True) if centre else book
            assert torch.equal(answer, wanted.to(answer.dtype))
    view, _ = look(View(linear, encode=lambda x: x.flatten(1).long()), 4)
    assert view.encode(X).dtype == torch.int64


@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_change_neither_logits_nor_gradients_nor_counts(recompute: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.rand(7, 1, 2, 2, dtype=torch.float64)
    found = []
    for options in ({}, {"chunk": 3, "recompute": recompute}):
        view, counter = look(View(net), 7, **options)
        z = x.clone().requires_grad_()
        logits = view.logits(z)
        (gradient,) = torch.autograd.grad(logits.square().sum(), z)
        found.append((logits.detach(), gradient))
        assert counter.forwards.tolist() == [1] * 7
        assert counter.backwards.tolist() == [1] * 7
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12, rtol=0)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_computed_again_only_where_asked_for(recompute: bool) -> None:
    asked = []

    def ask(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x.flatten(1).square()

    view, _ = look(View(ask), 4, recompute=recompute)
    view.logits(X.clone().requires_grad_()).sum().backward()
    assert asked == ([4, 4] if recompute else [4])


def test_logits_of_several_draws_are_cut_along_the_examples() -> None:
    view, _ = look(View(lambda x: torch.stack([linear(x), 2 * linear(x)])), 4, chunk=3)
    assert view.logits(X).shape == (2, 4, 4)


def test_targets_are_narrowed_with_the_examples() -> None:
    view, _ = look(View(linear), 4, target=torch.tensor([3, 2, 1, 0]), exact=False)
    some = view.select(torch.tensor([2, 0]))
    assert some.target is not None
    assert some.target.tolist() == [1, 3]
    assert not some.exact


def test_everything_is_left_as_it_was_found() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net.train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with frozen(net, seed=1):
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        torch.rand(10)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in net] == [True, False, True]
    assert [parameter.requires_grad for parameter in net[0].parameters()] == [True, False]


def test_no_gradient_of_a_parameter_stays() -> None:
    net = nn.Linear(2, 2)
    with frozen(net, seed=1):
        net.weight.grad = torch.ones(2, 2)
    assert net.weight.grad is None


def test_flags_are_put_back_after_a_crash_too() -> None:
    net = nn.Linear(2, 2).train()
    with pytest.raises(KeyError), frozen(net, seed=1):
        raise KeyError
    assert net.training
    assert net.weight.requires_grad


@pytest.mark.parametrize("way", ["weight", "data"])
def test_an_attack_that_changes_a_weight_fails(way: str) -> None:
    net = nn.Linear(2, 2)
    before = net.weight.detach().clone()
    looks = frozen(net, seed=1, ask=lambda: net(torch.ones(1, 2)))
    with pytest.raises(RuntimeError, match=r"attack changed weights .*\(weight\)"), looks:
        (net.weight if way == "weight" else net.weight.data).add_(1)
    assert torch.equal(net.weight, before)


class Counting(nn.Module):
    """Counts how often it was asked, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        return x


@pytest.mark.parametrize("network", [Counting(), nn.BatchNorm1d(2)], ids=["counts", "statistics"])
@pytest.mark.parametrize("attacked", [True, False])
def test_a_network_that_changes_its_own_buffers_is_not_called_an_attack(
    network: nn.Module, attacked: bool
) -> None:
    x = torch.rand(3, 2)

    def ask() -> None:
        network.train(isinstance(network, nn.BatchNorm1d))
        network(x)

    before = [each.clone() for each in network.buffers()]
    looks = frozen(network, seed=1, ask=ask if attacked else None)
    with pytest.raises(InputError, match="the network changes its own weights or buffers"), looks:
        ask()
    assert all(map(torch.equal, network.buffers(), before))


def test_a_network_is_asked_only_where_something_changed() -> None:
    net, asked = nn.Linear(2, 2), []
    with frozen(net, seed=1, ask=lambda: asked.append(1)):
        net(torch.ones(1, 2))
    assert not asked


def test_what_is_no_number_equals_itself() -> None:
    net = Counting()
    net.asked.fill_(float("nan"))
    with frozen(net, seed=1):
        pass


@pytest.mark.parametrize(("before", "after"), [(0.0, math.nan), (math.nan, 0.0)])
def test_a_number_that_is_lost_is_a_change(before: float, after: float) -> None:
    net = Counting()
    net.asked.fill_(before)
    with pytest.raises(RuntimeError, match="asked"), frozen(net, seed=1, ask=lambda: None):
        net.asked.fill_(after)
    assert str(net.asked.item()) == str(before)


def test_the_seed_decides_every_librarys_draws_inside() -> None:
    drawn = []
    for seed in (-1, -1, 2, 4, 2**40):
        with frozen(seed=seed):
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1]
    for one, other in combinations(drawn[1:], 2):
        assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))


def test_every_librarys_draws_go_on_outside_as_if_nothing_had_been() -> None:
    def draw() -> tuple[object, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    plain = draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with frozen(seed=1), contextlib.suppress(KeyError):
        draw()
        raise KeyError
    assert draw() == plain


def test_guides_are_the_first_images_of_their_classes_that_are_right_and_accepted() -> None:
    images = torch.linspace(0, 1, 10).view(10, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])

    def decide(z: Tensor) -> Decision:
        # Right from 0.2 on, and nothing of label 2; refused below 0.4.
        label = torch.where(z.flatten() < 0.2, 2, torch.where(z.flatten() < 0.3, 0, 1))
        return Decision(label, z.flatten() < 0.4, z.flatten())

    found = guides(decide, images, labels, 4)
    assert found.flatten().tolist() == pytest.approx([0, 4 / 9, 0, 0])
    seen = answers_only(decide, 4, found)
    assert isinstance(seen, Features)
    assert torch.equal(seen.guides, found)
    instrumented = instrument(
        seen, QueryCounter.of(2, torch.device("cpu")), "decision", target=None, exact=True
    )
    assert isinstance(instrumented, Features)
    assert torch.equal(instrumented.guides, found)


def test_a_guide_is_sought_among_the_first_images_of_its_class() -> None:
    images = torch.arange(1.0, 2 * GUIDES + 1).view(-1, 1, 1, 1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for first, expected in ((GUIDES, GUIDES), (GUIDES + 1, 0)):

        def decide(z: Tensor, first: int = first) -> Decision:
            return Decision(z.flatten().long() * 0, z.flatten() < first, z.flatten())

        assert guides(decide, images, labels, 1).item() == expected


def test_answers_are_one_column_each_and_a_refusal_is_the_last() -> None:
    def decide(z: Tensor) -> Decision:
        label = z.flatten().long()
        return Decision(label, label == 1, z.flatten())

    seen = answers_only(decide, 3)
    z = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    answer = seen.logits(z)
    assert answer.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert answer.dtype == torch.float64
    assert not answer.requires_grad
    assert seen.logits(z[:1]).tolist() == [[1, 0, 0, 0]]
    assert seen.refusal
    # Centred they would be -1 and 0: the referee shows them as they are.
    assert not seen.centred
