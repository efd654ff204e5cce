"""ABS against closed forms, a loop over single images and classes, finite differences, and its own files."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from asking import ask, typed
from scipy.stats import multivariate_normal
from torch import Tensor, autograd, nn
from torch.nn.functional import cross_entropy, elu

from bench import InputError, Inversion, Prototypes, Shape, Split, TrainingError, View
from bench.registry import DEFENSES
from bench.runner.training import Trainer
from bench.testing import check_defense
from defenses import abs as absmodule
from defenses.abs import Abs, clipped, confidences, distances, latents
from defenses.nets.abs import architectures, autoencoders
from defenses.nets.abs.activations import Elu
from defenses.nets.abs.decoders import blocks
from defenses.nets.defensegan import dcgan

GREY = Shape(1, 28, 28, 3)
SMALL: dict[str, Any] = {"width": 0.125, "grid": 40, "steps": 6}


def small(seed: int = 0, shape: Shape = GREY, **params: Any) -> Abs:
    """Build a narrow ABS in float64, whose normalisations have something to do."""
    torch.manual_seed(seed)
    model = Abs(shape, **SMALL | params).double()
    for name, value in model.networks.decoder.state_dict().items():
        if name.startswith("norms") and not name.endswith("tracked"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("weight"):
            value.mul_(2)
    return model.eval().requires_grad_(False)


def images(count: int, shape: Shape = GREY, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape[:3], generator=generator, dtype=torch.float64)


def plain(model: Abs, number: int) -> nn.Sequential:
    """Return a class's decoder as a network of its own, by torch's layers."""
    stack = model.networks.decoder
    layers: list[nn.Module] = []
    for conv, norm, plan in stack.layers():
        weight = conv.weight.unflatten(0, (stack.classes, -1))[number]
        one = nn.ConvTranspose2d(len(weight), plan.outputs, plan.kernel, plan.stride, plan.padding).double()
        assert conv.bias is not None
        one.load_state_dict({"weight": weight, "bias": conv.bias.view(stack.classes, -1)[number]})
        layers.append(one)
        if norm is not None:
            two = nn.BatchNorm2d(plan.outputs).double()
            for name, value in norm.state_dict().items():
                if value.dim():
                    two.state_dict()[name].copy_(value.view(stack.classes, -1)[number])
            layers += [two, nn.ELU() if stack.activation == "elu" else nn.ReLU()]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def objective(drawn: Tensor, z: Tensor, x: Tensor, beta: float = 1.0) -> Tensor:
    return ((x - drawn).square().sum() + beta * z.square().sum() / 2) / x.numel()


def alone(model: Abs, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Explain one image by one class with torch's own layers and Adam: the code and the objective there."""
    decoder = plain(model, number)

    def value(z: Tensor) -> Tensor:
        return objective((model.networks.gain * decoder(z.view(1, -1, 1, 1))).sigmoid(), z, x)

    grid = latents(model.grid, model.latent)
    z = grid[torch.stack([value(each) for each in grid]).argmin()].clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=model.rate)
    for _ in range(model.steps):
        optimiser.zero_grad()
        value(z).backward()
        optimiser.step()
        with torch.no_grad():
            z.copy_(clipped(z, model.radius, model.clip))
    return z.detach(), value(z).detach()


# --- networks -----------------------------------------------------------------------------------------


def test_parameter_counts_of_the_official_architecture() -> None:
    model = Abs(Shape(1, 28, 28, 10))
    assert model.networks.encoder is not None
    encoder = sum(each.numel() for each in model.networks.encoder.parameters())
    decoder = sum(each.numel() for each in model.networks.decoder.parameters())
    convolutions = (832, 16416, 18496, 25616), (4128, 12816, 6416, 257)
    assert encoder == 10 * (sum(convolutions[0]) + 2 * (32 + 32 + 64)) == 616_160
    assert decoder == 10 * (sum(convolutions[1]) + 2 * (32 + 16 + 16)) == 237_450
    # With two running statistics and a count of batches this is what a released file holds: 348 kB.
    assert 340_000 < 4 * (encoder + decoder) // 10 < 348_000


@pytest.mark.parametrize("architecture", ["official", "supplement"])
def test_sides_of_every_layer(architecture: Literal["official", "supplement"]) -> None:
    side = architectures.FORMS[architecture].side
    width = 0.125 if architecture == "official" else 0.02
    model = Abs(Shape(3, side, side, 2), architecture=architecture, width=width)
    assert model.networks.encoder is not None
    both = slice(0, 2)
    assert model.networks.encoder(torch.rand(4, 2, 3, side, side), both).shape == (4, 2, 16, 1, 1)
    assert model.networks.decoder(torch.rand(4, 2, 8, 1, 1), both).shape == (4, 2, 3, side, side)
    sides, seen = {"official": [4, 11, 25, 28], "supplement": [4, 8, 16, 32]}[architecture], []
    h = torch.rand(2, 16, 1, 1)
    for conv, _, plan in model.networks.decoder.layers():
        h = nn.functional.conv_transpose2d(h, conv.weight, conv.bias, plan.stride, plan.padding, groups=2)
        seen.append(h.shape[-1])
    assert seen == sides


@pytest.mark.parametrize("architecture", ["official", "supplement"])
def test_a_group_is_a_network_of_its_own(architecture: Literal["official", "supplement"]) -> None:
    side = architectures.FORMS[architecture].side
    shape = Shape(3, side, side, 3)
    model = small(shape=shape, architecture=architecture, width=0.125 if side == 28 else 0.02)
    z = torch.randn(5, 3, 8, dtype=torch.float64)
    folded = model.networks.folded()(z, slice(0, 3))
    stacked = model.networks.decoder(z[..., None, None], slice(0, 3))
    assert torch.allclose(folded, (model.networks.gain * stacked).sigmoid(), rtol=0, atol=1e-12)
    for number in range(3):
        apart = plain(model, number)(z[:, number, :, None, None])
        one = slice(number, number + 1)
        expected = apart.sigmoid() if architecture == "official" else (apart.tanh() + 1) / 2
        assert torch.allclose(folded[:, number], expected, rtol=0, atol=1e-12)
        assert torch.allclose(model.networks.folded()(z[:, one], one), folded[:, one], rtol=0, atol=1e-12)


def test_the_supplements_networks_are_those_of_its_gan() -> None:
    shape = Shape(3, 32, 32, 1)
    model = Abs(shape, architecture="supplement", latent=8, width=0.05).eval()
    assert model.networks.encoder is not None
    for stack, other in (
        (model.networks.decoder, dcgan.decoder(8, 3, 0.05)),
        (model.networks.encoder, dcgan.encoder(3, 16, 0.05)),
    ):
        theirs = dict(other.eval().named_parameters())
        mine = [
            each
            for conv, norm, _ in stack.layers()
            for each in (conv.weight, conv.bias, *(() if norm is None else (norm.weight, norm.bias)))
        ]
        assert len(mine) == len(theirs)
        with torch.no_grad():
            for one, two in zip(mine, theirs.values(), strict=True):
                nn.init.normal_(two, std=0.1)
                one.copy_(two.view_as(one))
        x = torch.rand(2, 8) if stack.transposed else torch.rand(2, 3, 32, 32)
        if stack.transposed:
            drawn = model.networks.folded()(x[:, None], slice(0, 1))[:, 0]
            assert torch.allclose(drawn, (other(x) + 1) / 2, atol=1e-6)
        else:
            assert torch.allclose(stack(x[:, None], slice(0, 1)).flatten(1), other(x), atol=1e-6)


def test_elu_is_elu_and_can_be_differentiated_twice() -> None:
    x = torch.cat((torch.linspace(-30, 30, 401), torch.tensor([-1e-9, 0.0, 1e-9])))
    # exp(x) - 1 is exact to half a unit of 1 in float32.
    assert torch.allclose(Elu.apply(x), elu(x), rtol=0, atol=6e-8)
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    assert autograd.gradcheck(Elu.apply, x)
    assert autograd.gradgradcheck(Elu.apply, x)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_decoders_gradients_are_those_of_their_layers(channels: int) -> None:
    """Also where an image's channels are several, and twice."""
    shape = Shape(channels, 28, 28, 2)
    model = small(shape=shape)
    codes = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    both = slice(0, 2)
    drawn = model.networks.folded()(codes, both)
    layers = model.networks.decoder(codes[..., None, None], both).sigmoid()
    assert torch.allclose(drawn, layers, rtol=0, atol=1e-12)
    weight = torch.randn(drawn.shape, dtype=drawn.dtype)
    found, expected = (
        autograd.grad((each * weight).sum(), codes, create_graph=True)[0] for each in (drawn, layers)
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    twice, expected = (autograd.grad(each.square().sum(), codes)[0] for each in (found, expected))
    assert torch.allclose(twice, expected, rtol=1e-9, atol=1e-12)


def test_blocks_cover_everything_once() -> None:
    for count, classes, rows in ((7, 3, 1), (7, 3, 5), (2, 10, 8), (40, 10, 32), (5, 4, 10**6), (0, 3, 8)):
        seen = torch.zeros(count, classes)
        seen = torch.zeros(count, classes)
        for block in blocks(count, classes, rows):
            seen[block] += 1
            assert seen[block].numel() <= rows
        assert (seen == 1).all()


# --- the grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 57, 8000])
def test_latents_are_those_of_the_released_rule(count: int) -> None:
    before = np.random.get_state()[1].sum()
    normal = multivariate_normal(np.zeros(8), np.eye(8))
    drawn = normal.rvs(size=int(count / (1.0 - 0.1)), random_state=np.random.RandomState(1234)).reshape(-1, 8)
    density = np.atleast_1d(normal.pdf(drawn))
    expected = drawn[density >= np.sort(density)[-count]]
    found = latents(count, 8)
    assert found.shape == (count, 8)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert np.random.get_state()[1].sum() == before
    if count == 8000:
        assert found.norm(dim=1).max().item() == pytest.approx(3.64, abs=0.005)


def test_distances_are_the_direct_sums() -> None:
    """T-abs-2."""
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.rand(each, 784, generator=generator) for each in (20, 50))
    direct = (x[:, None] - r).square().sum(2)
    assert torch.allclose(distances(x, r, r.square().sum(1)), direct, rtol=1e-5)


def test_no_steps_are_the_minimum_of_the_grid() -> None:
    """T-abs-1."""
    model = small(steps=0)
    # Decoders that draw much the same of all latents leave the choice to the latents' lengths.
    for conv in model.networks.decoder.convs:
        conv.weight.data.mul_(3)
    x = images(8)
    grid = latents(model.grid, 8)
    found = model.search(x)
    choices: dict[float, list[Tensor]] = {beta: [] for beta in (0.0, 0.5, 1.0, 2.0)}
    for number in range(3):
        drawn = plain(model, number)(grid[:, :, None, None]).sigmoid()
        for beta, chosen in choices.items():
            every = torch.stack(
                [torch.stack([objective(r, z, i, beta) for r, z in zip(drawn, grid, strict=True)]) for i in x]
            )
            chosen.append(every.argmin(1))
            if beta == 1:
                assert torch.allclose(found.losses[:, number], every.amin(1), rtol=1e-10)
                assert torch.equal(found.codes[:, number], grid[every.argmin(1)])
    right = torch.cat(choices.pop(1.0))
    # Both terms decide, and how they are weighed.
    assert not any(torch.equal(torch.cat(other), right) for other in choices.values())


def test_the_grid_is_drawn_once_and_anew_with_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = small(0), small(1)
    x = images(2)
    first = model.search(x).losses
    kept = model._grid
    model.search(x)
    assert model._grid is kept
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.search(x).losses, other.search(x).losses)
    model.load_state_dict(small(0).state_dict())
    # A write that leaves no trace but the value.
    assert torch.equal(model.search(x).losses, first)
    # Classes that change places.
    for value in model.networks.decoder.state_dict().values():
        if value.dim():
            value.copy_(value.unflatten(0, (3, -1)).flip(0).flatten(0, 1).clone())
    assert torch.allclose(model.search(x).losses, first.flip(1), rtol=1e-12)
    model.load_state_dict(small(0).state_dict())
    model.networks.decoder.convs[0].weight.data[0, 0, 0, 0] += 1
    changed = model.search(x).losses
    model._grid = None
    assert torch.equal(model.search(x).losses, changed)
    model.grid = 7
    model.search(x)
    assert model._grid is not None
    assert len(model._grid.codes) == 7
    model.float().search(x.float())
    assert model._grid.images.dtype == torch.float32
    assert copy.deepcopy(model)._grid is None
    assert not any("grid" in name for name in model.state_dict())


# --- inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["fixed", "released"])
def test_all_images_and_classes_at_once_are_one_after_another(clip: Literal["fixed", "released"]) -> None:
    # A radius within the grid, so that the clip has something to do.
    model = small(clip=clip, radius=0.3, steps=9)
    x = images(3)
    found = model.search(x)
    assert (found.codes.norm(dim=2) > 0.3 - 1e-9).any()
    for image in range(3):
        for number in range(3):
            code, loss = alone(model, x[image], number)
            assert torch.allclose(found.codes[image, number], code, rtol=1e-7, atol=1e-9)
            assert found.losses[image, number].item() == pytest.approx(loss.item(), rel=1e-9)
    assert torch.equal(model.decide(x, "label").logits, -found.losses)


def test_logits_are_minus_the_objective_at_the_codes() -> None:
    """T-abs-1."""
    model = small()
    x = images(4)
    found = model.search(x)
    drawn = model.networks.folded()(found.codes, slice(0, 3))
    for image in range(4):
        for number in range(3):
            expected = objective(drawn[image, number], found.codes[image, number], x[image])
            logit = model.decide(x, "label").logits[image, number]
            assert logit.item() == pytest.approx(-expected.item(), rel=1e-10)


def test_the_best_code_only_gets_better_with_steps() -> None:
    """T-abs-1: with `keep` best; the last of all may be worse than one before it."""
    x = images(4)
    # Steps far too long, so that the last code is not the best.
    best, last = small(keep="best", rate=0.8), small(rate=0.8)
    before = best.search(x, steps=0)
    worse = 0
    for steps in range(1, 12):
        found, final = best.search(x, steps=steps), last.search(x, steps=steps)
        assert (found.losses <= before.losses).all()
        assert (found.losses <= final.losses).all()
        worse += int((found.losses < final.losses).sum())
        drawn = best.networks.folded()(found.codes, slice(0, 3))
        assert torch.allclose(best._objective(drawn, found.codes, x[:, None]), found.losses, rtol=1e-12)
        before = found
    assert worse > 0


@pytest.mark.parametrize("rows", [1, 4, 7, 10**6])
def test_how_much_is_decoded_at_once_changes_no_result(rows: int) -> None:
    x = images(5)
    whole, cut = small(steps=4), small(steps=4)
    cut.rows = rows
    assert torch.allclose(cut.search(x).codes, whole.search(x).codes, rtol=1e-9, atol=1e-11)
    for name in ("envelope", "backtrack"):
        gradients = []
        for model in (whole, cut):
            z = x.clone().requires_grad_()
            gradients.append(autograd.grad(getattr(model, name)().logits(z)[:, 0].sum(), z)[0])
        assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_the_search_is_bounded_in_memory_by_its_rows() -> None:
    model = small()
    model.rows = 4
    sizes = []
    network = model.networks.folded()

    def instrumented(codes: Tensor, classes: slice) -> Tensor:
        sizes.append(codes.shape[0] * codes.shape[1])
        return network(codes, classes)

    substitute(model, instrumented, network)
    model.decide(images(9), "label")
    assert max(sizes) == 4


def test_works_where_the_caller_wants_no_gradients() -> None:
    model = small()
    x = images(2)
    with torch.no_grad():
        there = model.decide(x, "label")
        assert not torch.is_grad_enabled()
    assert there.logits is not None
    assert torch.equal(there.logits, model.decide(x, "label").logits)
    assert not there.logits.requires_grad


def test_the_clip_keeps_the_direction() -> None:
    """T-abs-4, and the numbers of D-31."""
    codes = torch.tensor([[3.0, -6.0], [0.3, -0.6], [-30.0, 40.0], [0.0, 0.0]], dtype=torch.float64)
    fixed, lost = clipped(codes, 5.0), clipped(codes, 5.0, "released")
    assert torch.allclose(fixed[0], torch.tensor([2.24, -4.47]).double(), atol=0.005)
    assert torch.allclose(lost[0], torch.tensor([2.24, 4.47]).double(), atol=0.005)
    assert torch.equal(fixed[[1, 3]], codes[[1, 3]])
    assert torch.equal(lost[[1, 3]], codes[[1, 3]])
    assert torch.allclose(fixed[2], torch.tensor([-3.0, 4.0]).double())
    assert torch.allclose(nn.functional.cosine_similarity(fixed[:3], codes[:3]), torch.ones(3).double())


def test_the_objective_may_be_the_reconstruction_alone() -> None:
    """D-33."""
    model = small(objective="reconstruction")
    x = images(3)
    found = model.search(x)
    drawn = model.networks.folded()(found.codes, slice(0, 3))
    distance = (x[:, None] - drawn).square().flatten(2).mean(2)
    assert torch.allclose(found.losses, distance, rtol=1e-12)
    without = small(beta=0.0)
    assert torch.equal(without.search(x).losses, found.losses)
    assert not torch.allclose(small().search(x).codes, found.codes)


def test_confidence_is_uniform_where_nothing_explains_the_image() -> None:
    """T-abs-5."""
    assert torch.allclose(confidences(torch.full((1, 10), -50.0)), torch.full((1, 10), 0.1))
    shares = confidences(torch.tensor([[-0.01, -0.03, -0.2]]))[0]
    weights = [np.exp(440 * each) + 3.9e-5 for each in (-0.01, -0.03, -0.2)]
    assert shares.tolist() == pytest.approx([each / sum(weights) for each in weights], rel=1e-5)


def test_the_surest_class_is_the_best_one() -> None:
    """T-abs-6: above -0.05, and in float64 also below."""
    generator = torch.Generator().manual_seed(0)
    logits = -0.05 - 0.2 * torch.rand(500, 10, generator=generator)
    best = torch.rand(500, generator=generator) * 0.05
    logits[torch.arange(500), torch.arange(500) % 10] = -best
    assert torch.equal(confidences(logits).argmax(1), logits.argmax(1))
    low = logits.double() - 0.03
    assert low.amax(1).min() < -0.075
    assert torch.equal(confidences(low).argmax(1), low.argmax(1))


def test_a_decision_carries_the_confidence() -> None:
    model = small()
    answer = model.decide(images(4), "label")
    assert answer.logits is not None
    assert torch.equal(answer.score, confidences(answer.logits).amax(1))
    assert torch.equal(answer.label, answer.logits.argmax(1))
    assert not answer.rejected.any()


def test_binary_sees_black_and_white_and_weighs_ten_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """D-32; T-abs-6: a multiplier of 1 changes nothing."""
    ten = Shape(1, 28, 28, 10)
    x = images(3, ten)
    x[0, 0, 0, 0] = 0.5
    grey, binary = small(shape=ten, steps=1), small(shape=ten, steps=1, binary=True)
    rounded = (x >= 0.5).double()
    assert rounded[0, 0, 0, 0] == 1
    expected = grey.decide(rounded, "label").logits
    assert expected is not None
    weights = torch.tensor([1, 0.96, 1.001, 1.06, 0.98, 0.96, 1.03, 1, 1, 1], dtype=torch.float64)
    found = binary.decide(x, "label").logits
    assert torch.allclose(found, expected * weights, rtol=1e-12)
    monkeypatch.setattr(absmodule, "MULTIPLIERS", (1.0,) * 10)
    assert torch.equal(binary.decide(x, "label").logits, expected)
    three = small(binary=True)
    x = images(2)
    assert torch.equal(three.decide(x, "label").logits, small().decide((x >= 0.5).double(), "label").logits)


# --- views --------------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """Decoders that are linear: G_c(z) = W_c z + b_c."""

    weights: tuple[Tensor, ...]
    """(K, D, latent)."""
    biases: tuple[Tensor, ...]
    """(K, D)."""

    def __call__(self, codes: Tensor, classes: slice) -> Tensor:
        flat = torch.einsum("ngl,gdl->ngd", codes, self.weights[0][classes]) + self.biases[0][classes]
        return flat.view(*flat.shape[:2], 1, 28, 28)


class Substitute(NamedTuple):
    """Any function in the place of the decoders; the rest is as in `Folded`."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    call: Callable[[Tensor, slice], Tensor]

    def __call__(self, codes: Tensor, classes: slice) -> Tensor:
        return self.call(codes, classes)


def substitute(model: Abs, call: Callable[[Tensor, slice], Tensor], like: Any) -> None:
    model.networks.folded = lambda: Substitute(like.weights, like.biases, call)  # type: ignore[assignment, return-value]


def linear(latent: int = 4, **params: Any) -> tuple[Abs, Lines]:
    """Return an ABS on linear decoders, whose minima are ridge regressions."""
    model = small(latent=latent, **params)
    torch.manual_seed(5)
    lines = Lines(
        (torch.randn(3, 784, latent, dtype=torch.float64) / 10,),
        (torch.rand(3, 784, dtype=torch.float64),),
    )
    substitute(model, lines, lines)
    return model, lines


def ridge(lines: Lines, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the minimisers (N, K, latent) and the minima (N, K)."""
    codes, minima = [], []
    for weight, level in zip(lines.weights[0], lines.biases[0], strict=True):
        rest = x.flatten(1) - level
        gram = weight.T @ weight + beta / 2 * torch.eye(weight.shape[1], dtype=weight.dtype)
        z = torch.linalg.solve(gram, (rest @ weight).T).T
        codes.append(z)
        minima.append(((rest - z @ weight.T).square().sum(1) + beta / 2 * z.square().sum(1)) / 784)
    return torch.stack(codes, 1), torch.stack(minima, 1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_envelope_gradient_is_that_of_ridge_regression(beta: float) -> None:
    """T-abs-3."""
    model, lines = linear(beta=beta, steps=1200, rate=0.02)
    x = images(2)
    codes, minima = ridge(lines, x, beta)
    found = model.search(x)
    assert torch.allclose(found.codes, codes, atol=1e-6)
    assert torch.allclose(found.losses, minima, rtol=1e-9)
    z, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits, closed = model.envelope().logits(z), -ridge(lines, exact, beta)[1]
    for number in range(3):
        (gradient,) = autograd.grad(logits[:, number].sum(), z, retain_graph=True)
        (expected,) = autograd.grad(closed[:, number].sum(), exact, retain_graph=True)
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-9)
        # And by finite differences of the closed form, along the gradient and at random.
        for direction in (gradient, torch.randn(x.shape, dtype=x.dtype)):
            step = 1e-4 / direction.norm()
            above, below = (ridge(lines, x + s * direction, beta)[1] for s in (step, -step))
            slope = -(above - below)[:, number].sum() / (2 * step)
            assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_envelope_gradient_of_a_trained_search_and_a_longer_one() -> None:
    """A longer search of the attacker's comes nearer to the slope of the true minimum."""
    model, lines = linear(steps=8, rate=0.02)
    x = images(3)
    exact = x.clone().requires_grad_()
    (expected,) = autograd.grad(-ridge(lines, exact, 1.0)[1].sum(), exact)
    errors = []
    for steps in (None, 40, 800):
        z = x.clone().requires_grad_()
        logits = model.envelope(steps=steps).logits(z)
        # What it answers stays the defender's own answer.
        assert torch.equal(logits, model.decide(x, "label").logits)
        errors.append((autograd.grad(logits.sum(), z)[0] - expected).norm().item())
    assert errors[1] < errors[0] / 2
    assert errors[2] < 1e-5 * expected.norm().item() < errors[1]


@pytest.mark.parametrize("name", ["envelope", "backtrack"])
@pytest.mark.parametrize("clip", ["fixed", "released"])
def test_views_answer_as_the_readout_with_and_without_gradients(
    name: str, clip: Literal["fixed", "released"]
) -> None:
    model = small(clip=clip, radius=0.3, steps=9)
    x = images(3)
    expected = model.decide(x, "label").logits
    assert expected is not None
    for params in ({}, {"steps": 3}, {"steps": 25}, {"scale": 784.0}):
        logits = getattr(model, name)(**params).logits
        with torch.no_grad():
            silent = logits(x)
        traced = logits(x.clone().requires_grad_())
        assert traced.requires_grad
        assert torch.equal(traced, silent)
        assert torch.equal(silent, expected * params.get("scale", 1.0))


def test_an_attacker_of_the_released_clip_searches_with_the_right_one() -> None:
    x = images(3)
    released, fixed = (small(clip=clip, radius=0.3, steps=5) for clip in ("released", "fixed"))
    assert not torch.allclose(released.search(x).losses, fixed.search(x).losses)
    for steps in (3, 5, 30):
        gradients = []
        for model in (released, fixed):
            z = x.clone().requires_grad_()
            gradients.append(autograd.grad(model.envelope(steps=steps).logits(z).sum(), z)[0])
        assert torch.equal(*gradients)


def test_scale_multiplies_gradients() -> None:
    model = small()
    x = images(2)
    for name in ("envelope", "backtrack"):
        one, many = (x.clone().requires_grad_() for _ in range(2))
        (first,) = autograd.grad(getattr(model, name)().logits(one)[:, 1].sum(), one)
        (second,) = autograd.grad(getattr(model, name)(scale=784.0).logits(many)[:, 1].sum(), many)
        assert torch.allclose(784 * first, second, rtol=1e-12)


def test_a_gradient_is_the_sum_over_classes_that_is_asked_for() -> None:
    model = small()
    x, y = images(3).requires_grad_(), torch.tensor([0, 2, 1])
    (found,) = autograd.grad(cross_entropy(model.envelope(scale=440.0).logits(x), y), x)
    logits = 440 * model.decide(x.detach(), "label").logits
    drawn = model.prototypes().explained(x.detach()).prototypes
    weights = (logits.softmax(1) - nn.functional.one_hot(y, 3)) / 3
    slopes = -2 * 440 / 784 * (x.detach()[:, None] - drawn)
    assert torch.allclose(found, (weights[..., None, None, None] * slopes).sum(1), rtol=1e-10)


def test_backtracking_no_steps_is_the_envelope() -> None:
    model = small(binary=True)
    x = images(3)
    gradients = []
    for seen in (model.envelope(), model.backtrack(steps=0)):
        z = x.clone().requires_grad_()
        gradients.append(autograd.grad(seen.logits(z)[:, 1].sum(), z)[0])
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 5])
def test_backtracking_differentiates_through_its_steps(steps: int) -> None:
    model, lines = linear(steps=3)
    x = images(2)
    start = model.search(x).codes
    rate = 2.0
    for number in range(3):
        z = x.clone().requires_grad_()
        (found,) = autograd.grad(model.backtrack(steps=steps, rate=rate).logits(z)[:, number].sum(), z)
        # By hand: the objective is quadratic, and its gradient is linear in code and image.
        weight, level = lines.weights[0][number], lines.biases[0][number]
        free = x.clone().requires_grad_()
        code = start[:, number]
        for _ in range(steps):
            rest = free.flatten(1) - level - code @ weight.T
            code = code - rate * (code - 2 * rest @ weight) / 784
        rest = free.flatten(1) - level - code @ weight.T
        value = (rest.square().sum() + code.square().sum() / 2) / 784
        (expected,) = autograd.grad(-value, free)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_backtracking_corrects_what_the_search_left() -> None:
    model, lines = linear(steps=8, rate=0.02)
    x = images(3)
    exact = x.clone().requires_grad_()
    (expected,) = autograd.grad(-ridge(lines, exact, 1.0)[1].sum(), exact)
    errors = []
    for steps in (0, 1, 5, 60):
        z = x.clone().requires_grad_()
        (found,) = autograd.grad(model.backtrack(steps=steps).logits(z).sum(), z)
        errors.append((found - expected).norm().item())
    assert all(after < before / 2 for before, after in pairwise(errors))
    assert errors[-1] < 1e-6 * expected.norm().item()


def test_the_rate_of_backtracking_follows_the_curvature() -> None:
    model, lines = linear()
    codes = torch.randn(2, 3, 4, dtype=torch.float64)
    for gaps, least in (((9.0, 4.0, 2.0, 1.0), 1 - 1e-9), ((9.0, 8.9, 8.8, 1.0), 0.95)):
        # Columns of these lengths, at right angles, turned.
        turns = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0]
        columns = torch.linalg.qr(lines.weights[0])[0] * torch.tensor(gaps).double().sqrt()
        weights = columns @ turns
        paces = model._paces(Lines((weights,), lines.biases), codes, slice(0, 3))  # type: ignore[arg-type]
        for number in range(3):
            hessian = (2 * weights[number].T @ weights[number] + torch.eye(4).double()) / 784
            largest = torch.linalg.eigvalsh(hessian)[-1].item()
            # Power iteration comes from below; 0.9 leaves room for what it lacks.
            for pace in paces[:, number].flatten().tolist():
                assert least <= 0.9 / largest / pace <= 1 + 1e-9
    flat = Lines((torch.zeros(3, 784, 4, dtype=torch.float64),), lines.biases)
    assert not model._paces(flat, codes, slice(0, 3)).any()  # type: ignore[arg-type]


def test_binary_gradients_go_straight_through_the_threshold() -> None:
    model = small(binary=True)
    x = images(2).requires_grad_()
    (found,) = autograd.grad(model.envelope().logits(x)[:, 0].sum(), x)
    drawn = model.prototypes().explained(x.detach()).prototypes
    assert torch.allclose(found, -2 / 784 * ((x.detach() >= 0.5).double() - drawn[:, 0]), rtol=1e-10)
    seen = model.inversion()
    assert isinstance(seen, Inversion)
    codes = seen.invert(x)
    (other,) = autograd.grad(seen.classify(codes, x)[:, 0].sum(), x)
    assert torch.allclose(found, other, rtol=1e-10)


def test_inversion_shows_codes_energies_and_their_logits() -> None:
    model = small()
    x = images(3)
    seen = model.inversion(scale=784.0)
    assert isinstance(seen, Inversion)
    codes = seen.invert(x)
    found = model.search(x)
    assert torch.equal(codes, found.codes)
    assert not codes.requires_grad
    assert torch.allclose(seen.classify(codes, x), -784 * found.losses, rtol=1e-10)
    assert torch.allclose(seen.energy(codes, x), found.losses.sum(1), rtol=1e-10)
    z, free = codes[:1].clone().requires_grad_(), x[:1].clone().requires_grad_()
    assert autograd.gradcheck(lambda each: seen.energy(each, x[:1]), z, atol=1e-6)
    (slope,) = autograd.grad(seen.energy(z, free).sum(), z, create_graph=True)
    (mixed,) = autograd.grad(slope.square().sum(), free)
    way = torch.randn(mixed.shape, dtype=mixed.dtype)

    def length(image: Tensor) -> Tensor:
        return autograd.grad(seen.energy(z, image).sum(), z)[0].square().sum()

    slopes = (length(x[:1] + 1e-5 * way) - length(x[:1] - 1e-5 * way)) / 2e-5
    assert slopes.item() == pytest.approx((mixed * way).sum().item(), rel=1e-6)


def test_prototypes_are_what_the_codes_draw() -> None:
    model = small()
    x = images(5)
    seen = model.prototypes()
    assert isinstance(seen, Prototypes)
    logits, drawn = seen.explained(x)
    assert drawn.shape == (5, 3, 1, 28, 28)
    assert not drawn.requires_grad
    assert 0 <= drawn.min() < drawn.max() <= 1
    expected = model.networks.folded()(model.search(x).codes, slice(0, 3))
    assert torch.allclose(drawn, expected, rtol=1e-12)
    assert torch.equal(seen.logits(x), model.decide(x, "label").logits)
    assert torch.equal(seen.logits(x), logits)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("envelope", {"steps": -1}, "steps: expected a number of 0 or more, found -1"),
        ("backtrack", {"steps": -2}, "steps: expected a number of 0 or more, found -2"),
        ("backtrack", {"rate": 0.0}, "rate: expected a number above 0, found 0.0"),
    ],
)
def test_parameters_of_a_view_have_bounds(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        typed(DEFENSES["abs"].views[name], **params)


# --- training -----------------------------------------------------------------------------------------


def drawings(each: Sequence[int] = (24, 24, 24), seed: int = 3) -> Split:
    """Return bars, frames and blobs that move about."""
    generator = torch.Generator().manual_seed(seed)
    x, y = [], []
    for number, count in enumerate(each):
        for _ in range(count):
            top, left = (torch.randint(4, 12, (2,), generator=generator)).tolist()
            image = torch.zeros(1, 28, 28)
            if number == 0:
                image[:, top : top + 4] = 0.9
            elif number == 1:
                image[:, top : top + 12, left : left + 12] = 0.8
                image[:, top + 3 : top + 9, left + 3 : left + 9] = 0
            else:
                image[:, :, left : left + 4] = 0.9
            x.append(image)
            y.append(number)
    order = torch.randperm(len(y), generator=generator)
    return Split(torch.stack(x)[order], torch.tensor(y)[order], torch.arange(len(y)), "drawings")


def trained(split: Split, keep: Path | None = None, stop: int | None = None, **params: Any) -> Abs:
    torch.manual_seed(0)
    model = Abs(GREY, **{"width": 0.25, "grid": 60, "steps": 5, "epochs": 3, "batch": 8} | params)

    def progress(facts: Any) -> None:
        if facts["done"] == stop:
            raise KeyboardInterrupt

    trainer = Trainer(split, "key", torch.device("cpu"), keep=keep, progress=progress)
    try:
        model.fit(split, trainer)
    except KeyboardInterrupt:
        assert stop is not None
    return model


def test_it_learns() -> None:
    model = trained(drawings(), epochs=30, lr=3e-3)
    assert not any(each.training for each in model.modules())
    test = drawings(seed=4)
    answer = model.decide(test.images, "label")
    assert (answer.label == test.labels).double().mean() > 0.95


def test_training_repeats_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    split = drawings((9, 14, 20))
    whole = trained(split).state_dict()
    again = trained(split).state_dict()
    trained(split, keep=tmp_path, stop=2)
    resumed = trained(split, keep=tmp_path).state_dict()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, resumed[name]), name


def test_each_class_learns_from_its_own_images_alone() -> None:
    """Another class's images change nothing: neither weights nor running statistics."""
    one, other = drawings((10, 10, 10)), drawings((10, 10, 10))
    rows = other.labels == 2
    other.images[rows] = torch.rand(10, 1, 28, 28)
    first, second = (trained(each, batch=10).networks for each in (one, other))
    for half in ("encoder", "decoder"):
        mine, theirs = getattr(first, half), getattr(second, half)
        for name, value in mine.state_dict().items():
            if value.dim() == 0:
                continue
            apart, changed = (each.unflatten(0, (3, -1)) for each in (value, theirs.state_dict()[name]))
            assert torch.allclose(apart[:2], changed[:2], rtol=1e-5, atol=1e-6), name
            assert not torch.allclose(apart[2], changed[2], rtol=1e-5, atol=1e-6), name


def test_classes_one_after_another_learn_the_same() -> None:
    results = []
    for rows in (1, 16, 10**6):
        torch.manual_seed(0)
        model = Abs(GREY, width=0.25).double().train()
        model.rows = rows
        torch.manual_seed(1)
        x, noise = torch.rand(8, 3, 1, 28, 28).double(), torch.randn(8, 3, 8).double()
        loss = model._learn(x, noise)
        gradients = [each.grad for each in model.parameters()]
        results.append([loss, *gradients, *model.buffers()])
    for one, two, three in zip(*results, strict=True):
        assert torch.allclose(one, three, rtol=1e-9, atol=1e-12)
        assert torch.allclose(two, three, rtol=1e-9, atol=1e-12)


def test_the_loss_is_minus_the_evidence_bound() -> None:
    torch.manual_seed(0)
    networks = autoencoders.Autoencoders(GREY, "official", latent=8, width=0.25, encode=True).double().eval()
    x, noise = images(6).view(2, 3, 1, 28, 28), torch.randn(2, 3, 8, dtype=torch.float64)
    everyone = slice(0, 3)
    losses = networks.losses(x, noise, everyone, beta=0.7)
    assert networks.encoder is not None
    mean, log_variance = networks.encoder(x, everyone).flatten(2).chunk(2, 2)
    deviation = log_variance.mul(0.5).exp()
    code = torch.distributions.Normal(mean, deviation)
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = torch.distributions.kl_divergence(code, prior).sum(2)
    drawn = networks.folded()(mean + deviation * noise, everyone)
    expected = (drawn - x).square().flatten(2).sum(2) + 0.7 * divergence
    assert torch.allclose(losses, expected, rtol=1e-10)


def test_an_epoch_shows_every_image_and_small_classes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    split = drawings((5, 11, 20))
    marked = split.images.clone()
    marked[:, 0, 0, 0] = torch.arange(36) / 100
    seen: list[Tensor] = []
    learn = Abs._learn

    def instrumented(self: Abs, x: Tensor, noise: Tensor) -> Tensor:
        seen.append((x[:, :, 0, 0, 0] * 100).round().long())
        return learn(self, x, noise)

    monkeypatch.setattr(Abs, "_learn", instrumented)
    trained(Split(marked, split.labels, split.index, "marked"), epochs=1, batch=8)
    assert [len(each) for each in seen] == [8, 8, 8]
    shown = torch.cat(seen)
    for number, count in enumerate((5, 11, 20)):
        mine = (split.labels == number).nonzero().flatten()
        times = torch.bincount(shown[:, number], minlength=36)[mine]
        assert times.sum() == 24
        assert times.min() >= 24 // count
        assert times.max() <= -(-24 // count)


def test_training_stops_where_the_loss_is_no_number() -> None:
    split = drawings((8, 8, 8))
    with pytest.raises(TrainingError, match="the loss of epoch 2, step 1 is nan"):
        trained(split, lr=1e30)


def test_a_class_without_images_is_named() -> None:
    split = drawings((8, 0, 8))
    with pytest.raises(InputError, match="class 1 has no training image"):
        trained(split)


# --- the authors' files -------------------------------------------------------------------------------


def release(file: Path, seed: int, *, first: int = 0, encoder: bool = True, **changed: Any) -> Path:
    """Write a file as the authors' are: a state dict of an encoder and a decoder, counted from `first`."""
    torch.manual_seed(seed)
    state: dict[str, Any] = {}
    halves = {"Decoder": ((8, 32, 4), (32, 16, 5), (16, 16, 5), (16, 1, 4))}
    if encoder:
        halves["Encoder"] = ((1, 32, 5), (32, 32, 4), (32, 64, 3), (64, 16, 5))
    for half, layers in halves.items():
        for place, (inputs, outputs, kernel) in enumerate(layers):
            planes = (inputs, outputs) if half == "Decoder" else (outputs, inputs)
            name = f"{half}.conv_{place + first}"
            state[f"{name}.weight"] = torch.randn(*planes, kernel, kernel) / 10
            state[f"{name}.bias"] = torch.randn(outputs) / 10
            if place < 3:
                for part in ("weight", "bias", "running_mean", "running_var"):
                    state[f"{half}.bn_{place + first}.{part}"] = torch.rand(outputs) + 0.5
                state[f"{half}.bn_{place + first}.num_batches_tracked"] = torch.tensor(29000)
    for name, value in changed.items():
        full = name.replace("__", ".")
        if value is None:
            del state[full]
        else:
            state[full] = value
    torch.save(state, file)
    return file


def given(files: Sequence[Path], **params: Any) -> dict[str, Any]:
    return {"decoders": tuple(str(each) for each in files), "grid": 30, "steps": 3} | params


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("encoder", [False, True])
def test_released_decoders_load_in_the_order_of_the_classes(
    tmp_path: Path, first: int, encoder: bool
) -> None:
    files = [release(tmp_path / f"class{each}.net", each, first=first, encoder=encoder) for each in (2, 0, 1)]
    check("abs", GREY, **given(files))
    model = Abs(GREY, **given(files))
    split = drawings((1, 0, 0))
    model.fit(split, Trainer(split, "key", torch.device("cpu")))
    assert not model.training
    assert model.networks.encoder is None
    model.double()
    z = torch.randn(4, 3, 8, dtype=torch.float64)
    drawn = model.networks.folded()(z, slice(0, 3))
    for number, file in enumerate(files):
        state = torch.load(file, weights_only=True)
        h = z[:, number, :, None, None]
        for place in range(4):
            name = f"Decoder.conv_{place + first}"
            weight, bias = (state[f"{name}.{each}"].double() for each in ("weight", "bias"))
            h = nn.functional.conv_transpose2d(h, weight, bias, stride=1 if place in (0, 3) else 2)
            if place < 3:
                name = f"Decoder.bn_{place + first}"
                parts = ("running_mean", "running_var", "weight", "bias")
                h = nn.functional.batch_norm(h, *(state[f"{name}.{each}"].double() for each in parts))
                h = elu(h)
        assert torch.allclose(drawn[:, number], h.sigmoid(), atol=1e-12)
    again = Abs(GREY, **given(files))
    again.load_state_dict(model.float().state_dict(), strict=True)
    x = split.images
    assert torch.equal(again.eval().decide(x, "label").logits, model.decide(x, "label").logits)


def test_decoders_in_other_floats_are_converted_and_said(tmp_path: Path) -> None:
    half = torch.ones(1, dtype=torch.float16)
    files = [release(tmp_path / f"{each}.net", each, Decoder__conv_3__bias=half) for each in range(3)]
    trainer = Trainer(drawings((1, 0, 0)), "key", torch.device("cpu"))
    model = Abs(GREY, **given(files))
    model.fit(drawings((1, 0, 0)), trainer)
    assert trainer.notes == [
        f"weights: {each}.net: converted from float16 to float32: convs.3.bias" for each in range(3)
    ]


def check(name: str, shape: Shape, **params: Any) -> None:
    """Ask what the plan asks about parameters."""
    ask(name, shape, **params)


def test_files_that_are_no_decoders(tmp_path: Path) -> None:
    good = [release(tmp_path / f"{each}.net", each) for each in range(2)]

    def said(file: Path) -> str:
        with pytest.raises(InputError) as raised:
            check("abs", GREY, **given([*good, file]))
        text = str(raised.value)
        assert "\n" not in text
        assert str(file) in text
        return text

    wide = release(tmp_path / "wide.net", 0, Decoder__conv_1__weight=torch.zeros(32, 17, 5, 5))
    assert "convs.1.weight has the shape (32, 17, 5, 5)" in said(wide)
    assert "it has (32, 16, 5, 5)" in said(wide)
    cut = release(tmp_path / "cut.net", 0, Decoder__bn_2__running_var=None)
    assert "no counterpart of norms.2.running_var" in said(cut)
    deep = release(tmp_path / "deep.net", 0, Decoder__conv_4__weight=torch.zeros(1))
    assert "no counterpart of convs.4.weight" in said(deep)
    odd = release(tmp_path / "odd.net", 0, Decoder__fc__weight=torch.zeros(1))
    assert "no counterpart of Decoder.fc.weight" in said(odd)
    other = tmp_path / "other.net"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    assert "expected the state dict of a released ABS autoencoder" in said(other)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        cast = release(tmp_path / "cast.net", 0, Decoder__conv_3__bias=torch.zeros(1, dtype=dtype))
        assert "expected float32" in said(cast)
    endless = release(tmp_path / "endless.net", 0, Decoder__conv_3__bias=torch.tensor([torch.inf]))
    assert "convs.3.bias is not finite" in said(endless)
    tensor = tmp_path / "tensor.net"
    torch.save(torch.zeros(2), tensor)
    assert "expected a state dict" in said(tensor)
    network = tmp_path / "network.net"
    torch.save(nn.Linear(2, 2), network)
    assert "may run any code when it is read" in said(network)
    text = tmp_path / "text.net"
    text.write_text("404: not found")
    assert "neither safetensors nor a checkpoint" in said(text)
    assert "no such file" in said(tmp_path / "none.net")


@pytest.mark.parametrize(
    ("params", "shape", "said"),
    [
        ({}, (1, 32, 32, 10), "official decoders draw 28x28, the data is 32x32; set resize: 28"),
        ({"architecture": "supplement"}, (1, 28, 28, 10), "draw 32x32, the data is 28x28; set resize: 32"),
        ({"grid": 0}, GREY, "grid: expected a number of 1 or more, found 0"),
        ({"batch": 0}, GREY, "batch: expected a number of 1 or more, found 0"),
        ({"steps": -1}, GREY, "steps: expected a number of 0 or more, found -1"),
        ({"beta": -0.5}, GREY, "beta: expected a number of 0 or more, found -0.5"),
        ({"radius": 0.0}, GREY, "radius: expected a number above 0, found 0.0"),
        ({"lr": 0.0}, GREY, "lr: expected a number above 0, found 0.0"),
        ({"decoders": ["a", "b"]}, GREY, "a file for each of 3 classes, in their order, found 2"),
        ({"decoders": ["a"], "latent": 9}, GREY, "the released files need latent: 8, found 9"),
        ({"decoders": ["a"], "width": 0.5}, GREY, "the released files need width: 1, found 0.5"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    params: dict[str, Any], shape: tuple[int, int, int, int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check("abs", Shape(*shape), **params)


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        (GREY, {}),
        (GREY, {"binary": True}),
        (GREY, {"clip": "released", "keep": "best", "objective": "reconstruction"}),
        (Shape(3, 32, 32, 2), {"architecture": "supplement", "width": 0.02}),
    ],
)
def test_it_is_what_it_declares(shape: Shape, params: dict[str, Any]) -> None:
    check_defense("abs", shape, epochs=2, **SMALL | params)


def test_what_is_served_needs_no_training() -> None:
    fitted = small()
    served = DEFENSES["abs"].inference
    others: dict[str, Any] = {
        "grid": 9, "steps": 2, "rate": 0.1, "radius": 2.0, "clip": "released", "keep": "best",
        "objective": "reconstruction", "binary": True,
    }  # fmt: skip
    assert served == set(others)
    model = small(1, **others)
    model.load_state_dict(fitted.state_dict(), strict=True)
    for name, value in others.items():
        setattr(fitted, name, value)
    x = images(2)
    assert torch.equal(fitted.decide(x, "label").logits, model.decide(x, "label").logits)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["official", "supplement"])
def test_a_gpu_answers_like_a_cpu(architecture: Literal["official", "supplement"]) -> None:
    side = architectures.FORMS[architecture].side
    model = small(shape=Shape(1, side, side, 3), architecture=architecture, width=0.05)
    x = images(3, Shape(1, side, side, 3))
    here = model.decide(x, "label").logits
    there = model.to("cuda").decide(x.to("cuda"), "label").logits
    assert here is not None
    assert there is not None
    assert torch.allclose(here, there.cpu(), rtol=1e-6)


def test_every_view_is_a_view() -> None:
    model = small()
    for entry in DEFENSES["abs"].views.values():
        assert isinstance(getattr(model, entry.method)(), View)
        assert entry.exact_for == {"label"}
