"""Defense-GAN against closed forms of a linear generator, plain loops, and PyTorch's own optimiser."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask, typed
from torch import Tensor, autograd, nn
from torch.nn.functional import conv_transpose2d, cross_entropy

from bench import InputError, Inversion, Shape, Split, TrainingError
from bench.registry import DEFENSES
from bench.runner.training import Trainer
from bench.testing import check_defense
from defenses import defensegan
from defenses.cnn import Cnn
from defenses.defensegan import DefenseGan
from defenses.nets.defensegan import classifiers, dcgan, gan
from defenses.nets.defensegan.deconvolution import Deconvolution
from defenses.nets.defensegan.projection import Descent, backtrack, curvature, project

GREY, COLOUR = Shape(1, 28, 28, 10), Shape(3, 32, 32, 5)
TINY: dict[str, Any] = {"width": 0.04, "latent": 8, "net": "E", "net_width": 0.1, "restarts": 3, "steps": 12}
CPU = torch.device("cpu")


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count: int, shape: Shape = GREY, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape[:3], generator=generator, dtype=torch.float64)


def tiny(shape: Shape = GREY, seed: int = 0, **params: Any) -> DefenseGan:
    """Build a small Defense-GAN in float64, ready to be asked."""
    torch.manual_seed(seed)
    return DefenseGan(shape, **{**TINY, "starts": "fixed", **params}).double().eval().requires_grad_(False)


class LinearGenerator(nn.Module):
    """G(z) = W z, of which everything is known."""

    def __init__(self, matrix: Tensor, shape: Shape = GREY) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.shape = shape

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.matrix.t()).view(-1, *self.shape[:3])


def linear(latent: int, *, scale: float | None = None, **params: Any) -> tuple[DefenseGan, Tensor]:
    """Return a Defense-GAN with a linear generator of full column rank, and its matrix (784, latent)."""
    matrix = drawn(784, latent, seed=3) * (128**-0.5 if scale is None else scale)
    model = tiny(latent=latent, **{"steps": 200, **params})
    model.generator = LinearGenerator(matrix)  # type: ignore[assignment]
    return model, matrix


# --- networks -----------------------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def test_networks_at_full_width_have_the_tables_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert count(dcgan.decoder(128, 1)) == 12_592_385
        assert count(dcgan.encoder(1, 1)) == 12_589_057
        assert count(dcgan.encoder(3, 8)) == 12_589_057 + 2 * 256 * 16 + 7 * 129
    assert count(gan.generator("released", 1, latent=128, width=1)) == 1_554_177
    assert count(gan.critic("released", 1, width=1)) == 1_030_145
    expected = {"A": 1_285_194, "B": 710_218, "C": 1_387_210, "D": 199_210, "E": 199_210, "F": 710_218}
    nets: tuple[classifiers.Letter, ...] = ("A", "B", "C", "D", "E", "F")
    assert {net: count(classifiers.build(net, GREY)) for net in nets} == expected


@pytest.mark.parametrize("net", ["A", "B", "C", "D", "E", "F"])
def test_classifiers_take_either_size_and_drop_as_the_paper_says(net: classifiers.Letter) -> None:
    rates = {"A": [0.25, 0.5], "B": [0.2, 0.5], "C": [0.25, 0.5], "D": [0.5], "E": [], "F": []}
    for shape in (GREY, COLOUR):
        network = classifiers.build(net, shape, width=0.1)
        assert network(images(2, shape).float()).shape == (2, shape.classes)
        assert [each.p for each in network if isinstance(each, nn.Dropout)] == rates[net]
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                norms = layer.weight.flatten(1).norm(dim=1)
                assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)
                assert layer.bias is not None
                assert not layer.bias.any()


@pytest.mark.parametrize("kernel", [4, 5])
def test_drawing_by_parities_is_the_transposed_convolution(kernel: int) -> None:
    layer = Deconvolution(6, 3, kernel).double()
    x = drawn(2, 6, 5, 4).requires_grad_()
    plain = conv_transpose2d(
        x, layer.weight, layer.bias, stride=2, padding=kernel - 3, output_padding=kernel - 4
    )
    assert plain.shape == (2, 3, 10, 8)
    wanted = [x, layer.weight, layer.bias]
    u = drawn(*plain.shape, seed=1)
    ours = layer(x)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    for one, other in zip(
        autograd.grad((ours * u).sum(), wanted), autograd.grad((plain * u).sum(), wanted), strict=True
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_the_released_generator_is_the_one_that_cuts_a_row_and_a_column() -> None:
    torch.manual_seed(0)
    network = gan.generator("released", 2, latent=6, width=0.05).double()
    linear, first, second, last = (network[place] for place in (0, 3, 5, 7))
    for each in (linear, first, second, last):
        nn.init.normal_(each.bias)
    z = drawn(3, 6)
    h = linear(z).relu().view(3, -1, 4, 4)
    for layer, cut in ((first, 7), (second, 14), (last, 28)):
        h = conv_transpose2d(h, layer.weight, layer.bias, stride=2, padding=2, output_padding=1)
        h = h[:, :, :cut, :cut]
        h = h.sigmoid() if layer is last else h.relu()
    assert h.shape == (3, 2, 28, 28)
    assert torch.allclose(network(z), h, rtol=0, atol=1e-12)


def test_released_networks_start_as_the_released_code_draws_them() -> None:
    torch.manual_seed(0)
    wanted = {
        # fan in + fan out, of a transposed convolution with the former over 4, of a convolution the latter.
        "generator": [2 / (128 + 4096), 4 / (256 * 25 / 4 + 128 * 25), 4 / (128 * 25 / 4 + 64 * 25)],
        "critic": [4 / (25 + 64 * 25 / 4), 4 / (64 * 25 + 128 * 25 / 4), 4 / (128 * 25 + 256 * 25 / 4)],
    }
    generator = gan.generator("released", 1, latent=128, width=1)
    found = {"generator": [generator[0], generator[3], generator[5]]}
    critic = gan.critic("released", 1, width=1)
    found["critic"] = [critic[0], critic[2], critic[4]]
    for part, layers in found.items():
        for layer, variance in zip(layers, wanted[part], strict=True):
            weight = layer.weight.detach()
            # A uniform distribution's fourth moment is 1.8 times its squared variance.
            assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / weight.numel()))
            assert weight.abs().max().item() <= math.sqrt(3 * variance)
            assert not layer.bias.any()


@pytest.mark.parametrize(("architecture", "shape"), [("released", GREY), ("supplement", COLOUR)])
def test_a_fused_generator_is_the_same_map(architecture: gan.Architecture, shape: Shape) -> None:
    torch.manual_seed(0)
    network = gan.generator(architecture, shape.channels, latent=6, width=0.02).double()
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert isinstance(values, Tensor)
                values.data.uniform_(0.5, 1.5)
    network.eval()
    z = drawn(4, 6)
    fused = gan.fused(network)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in fused)  # type: ignore[arg-type]
    assert torch.allclose(fused(z), network(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("architecture", "shape"), [("released", GREY), ("supplement", COLOUR)])
def test_what_is_drawn_lies_in_the_box_and_uses_all_of_it(
    architecture: gan.Architecture, shape: Shape
) -> None:
    # T-dgan-5: sigmoid and tanh reach any value of [0, 1] and none outside.
    network = tiny(shape, architecture=architecture).generator
    (last,) = (each for each in network if isinstance(each, Deconvolution))
    last.weight.data *= 1e4
    out = network(100 * drawn(50, 8))
    assert 0 <= out.min() < 1e-6
    assert 1 - 1e-6 < out.max() <= 1


# --- the GAN's training -------------------------------------------------------------------------------


def test_gradient_penalty_of_a_linear_critic_is_known() -> None:
    # T-dgan-4.
    direction = drawn(GREY.channels * 784, seed=2) / 20

    def validate(x: Tensor) -> Tensor:
        return x.flatten(1) @ direction[:, None]

    real, fake = images(5), images(5, seed=2)
    found = gan.penalty(validate, real, fake, drawn(5, 1, 1, 1))  # type: ignore[arg-type]
    assert found.item() == pytest.approx((direction.norm().item() - 1) ** 2, rel=1e-12)


def test_gradient_penalty_is_of_each_images_full_gradient_between_the_two() -> None:
    # D-26. Of D(x) = |x|^2 / 2 the gradient is x itself.
    real, fake, along = images(4), images(4, seed=2), torch.rand(4, 1, 1, 1, dtype=torch.float64)
    found = gan.penalty(
        lambda x: x.flatten(1).square().sum(1, keepdim=True) / 2,  # type: ignore[arg-type]
        real,
        fake,
        along,
    )
    loop = [(((1 - a) * r + a * f).norm() - 1).square() for r, f, a in zip(real, fake, along, strict=True)]
    assert found.item() == pytest.approx(torch.stack(loop).mean().item(), rel=1e-12)


def test_critic_loss_is_what_it_is_defined_as() -> None:
    torch.manual_seed(0)
    critic = gan.critic("released", 1, width=0.05).double()
    real, fake, along = images(4), images(4, seed=2), torch.rand(4, 1, 1, 1, dtype=torch.float64)
    found = gan.critic_loss(critic, real, fake, along, 10.0)
    between = [(1 - a) * r + a * f for r, f, a in zip(real, fake, along, strict=True)]
    norms = [
        autograd.functional.jacobian(lambda x: critic(x[None])[0, 0], each, create_graph=True).norm()
        for each in between
    ]
    expected = sum((critic(f[None]) - critic(r[None])).squeeze() / 4 for r, f in zip(real, fake, strict=True))
    expected = expected + 10 * sum((each - 1) ** 2 for each in norms) / 4
    weights = list(critic.parameters())
    assert isinstance(expected, Tensor)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    for one, other in zip(
        autograd.grad(found, weights[:-1]), autograd.grad(expected, weights[:-1]), strict=True
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def split(n: int = 24, shape: Shape = GREY) -> Split:
    labels = torch.arange(n) % shape.classes
    pictures = images(n, shape).float() * 0.3 + 0.7 * (labels / shape.classes).view(-1, 1, 1, 1)
    return Split(pictures, labels, torch.arange(n), "digest")


def small(shape: Shape = GREY, **params: Any) -> DefenseGan:
    """Build a Defense-GAN that trains in no time: 8 steps of the generator, 3 batches an epoch."""
    torch.manual_seed(0)
    short = {
        "iterations": 8,
        "critic_steps": 2,
        "batch": 8,
        "classifier_epochs": 2,
        "restarts": 2,
        "steps": 5,
    }
    return DefenseGan(shape, **{**TINY, "width": 0.02, **short, **params})


@pytest.mark.parametrize("iterations", [6, 7])
def test_every_step_of_the_generator_comes_before_its_steps_of_the_critic(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[int] = []
    descend = defensegan._descend

    def noted(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        stepped.append(sum(each.numel() for group in optimiser.param_groups for each in group["params"]))
        descend(optimiser, loss)

    seen: list[Tensor] = []
    of_critic = gan.critic_loss

    def looked(validate: nn.Module, real: Tensor, *rest: Any) -> Tensor:
        seen.append(real)
        return of_critic(validate, real, *rest)

    monkeypatch.setattr(defensegan, "_descend", noted)
    monkeypatch.setattr(gan, "critic_loss", looked)
    model = small(iterations=iterations, critic_steps=5, classifier_epochs=1)
    model.fit(split(26), Trainer(split(26), "key", CPU))
    generator, critic = count(model.generator), count(gan.critic("released", 1, width=0.02))
    network = count(model.classifier)
    # 26 images are 3 batches of 8, and for the classifier 4: the epochs end within the critic's steps.
    assert stepped == [generator, *[critic] * 5] * iterations + [network] * 4
    # Each step of the critic sees images of its own, until all have been seen.
    assert len({each[0, 0, 0, 0].item() for each in torch.cat(seen[:3]).split(1)}) == 24


def fitted(model: DefenseGan, data: Split, keep: Path | None = None) -> dict[str, Tensor]:
    model.fit(data, Trainer(data, "key", CPU, keep=keep))
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("architecture", "shape"), [("released", GREY), ("supplement", COLOUR)], ids=["released", "supplement"]
)
def test_training_repeats_and_goes_on_after_a_kill_bit_for_bit(
    architecture: gan.Architecture, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = split(shape=shape)

    def model() -> DefenseGan:
        return small(shape, architecture=architecture, trained_on="reconstructions")

    whole = fitted(model(), data)
    assert whole.keys() == model().state_dict().keys()
    again = fitted(model(), data)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    save = Trainer._save
    for number, (phase, done) in enumerate([(0, 2), (0, 6), (1, 3), (2, 1)]):
        # 8 * 2 steps of the critic in epochs of 3 are 6 epochs; then 12 portions of 2, then 2 epochs.
        def dies(self: Trainer, *args: Any, at: tuple[int, int] = (phase, done)) -> None:
            save(self, *args)
            if (self._phase, args[0]) == at:
                raise KeyboardInterrupt

        keep = tmp_path / str(number)
        monkeypatch.setattr(Trainer, "_save", dies)
        with pytest.raises(KeyboardInterrupt):
            fitted(model(), data, keep)
        monkeypatch.undo()
        resumed = fitted(model(), data, keep)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), (phase, done)


def test_training_on_reconstructions_sees_what_the_generator_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    data = split(10)
    seen: list[Tensor] = []
    shuffled = defensegan._shuffled

    def looked(pictures: Tensor, *rest: Any) -> Any:
        seen.append(pictures)
        yield from shuffled(pictures, *rest)

    monkeypatch.setattr(defensegan, "_shuffled", looked)
    model = small(starts="fixed", trained_on="reconstructions")
    fitted(model, data)
    model.requires_grad_(False)
    expected = model.generator(model.project(data.images).latent)
    assert len(seen) == 2
    assert torch.allclose(seen[-1], expected, rtol=0, atol=1e-5)
    for pictures, labels in shuffled(data.images, data.labels, 4):
        # There is one image of each label, in this order.
        assert torch.equal(pictures, data.images[labels])


def test_the_net_is_trained_as_it_is_defined() -> None:
    data = split(20)
    model = small(iterations=1, classifier_epochs=100, classifier_lr=0.003, net_width=0.3)
    fitted(model, data)
    with torch.no_grad():
        assert cross_entropy(model.classifier(data.images), data.labels).item() < 0.5


@pytest.mark.parametrize("params", [{"gan_lr": 1e30}, {"classifier_lr": 1e30, "net": "D"}])
def test_training_stops_where_a_loss_is_not_finite(params: Mapping[str, Any]) -> None:
    with pytest.raises(TrainingError, match="loss of epoch"):
        fitted(small(**params), split())


# --- the projection -----------------------------------------------------------------------------------


def test_projection_finds_the_least_squares_solution_of_a_linear_generator() -> None:
    # T-dgan-1: lr (2 / D) s^2 lies between 0.05 and 0.35, below 3.4.
    model, matrix = linear(128, restarts=2)
    curvatures = 10 * 2 / 784 * torch.linalg.svdvals(matrix).square()
    assert 0.05 < curvatures.min() < curvatures.max() < 0.35
    x = images(3)
    found = model.project(x)
    expected = x.flatten(1) @ torch.linalg.pinv(matrix).t()
    assert torch.allclose(found.latent, expected, rtol=0, atol=1e-6)
    left = x.flatten(1) - expected @ matrix.t()
    assert torch.allclose(found.error, left.square().mean(1), rtol=1e-9)
    assert not found.diverged.any()


@pytest.mark.parametrize("keep", ["best", "released"])
def test_a_start_that_draws_the_image_itself_stays(keep: Any) -> None:
    # T-dgan-1, of a linear generator and of one that is not.
    for model in (linear(8)[0], tiny(latent=8)):
        starts = drawn(4, 1, 8, seed=5)
        x = model.generator(starts[:, 0])
        found = project(model.generator, x, starts, Descent(30, keep=keep))
        assert torch.allclose(found.latent, starts[:, 0], rtol=0, atol=1e-12)
        assert found.error.max() < 1e-24
        assert not found.diverged.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", ["best", "released"])
def test_a_descent_that_diverges_is_reported_and_gives_no_nan(keep: Any, dtype: torch.dtype) -> None:
    # T-dgan-1: entries N(0, 1) make lr (2 / D) s^2 about 7 to 50.
    model, _ = linear(128, scale=1.0, restarts=2, keep=keep)
    model.to(dtype)
    x = images(2).to(dtype)
    with pytest.warns(RuntimeWarning, match="lr 10 is too large"):
        found = model.project(x)
    assert found.diverged.all()
    assert found.latent.isfinite().all()
    # The best point is about the start.
    start = (model.generator(model._starts(x)[:, 0]) - x).square().flatten(1).mean(1)
    assert (found.error <= start + 1e-6).all() if keep == "best" else found.error.isfinite().all()


def test_a_restart_that_diverges_leaves_the_others_alone() -> None:
    # 2 is a fixed point of this generator's error, far out there is nothing but overflow.
    class Cliff(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.where(z.abs() < 5, z, z.pow(40)).sum(1).view(-1, 1, 1, 1)

    x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    starts = torch.tensor([[[1.0], [50.0], [0.0]]], dtype=torch.float64)
    for keep in ("best", "released"):
        found = project(Cliff(), x, starts, Descent(60, 0.1, 0.5, keep=keep))  # type: ignore[arg-type]
        assert found.diverged.tolist() == [[False, True, False]]
        assert found.latent.item() == pytest.approx(0.5, abs=1e-6)


def one_at_a_time(generator: nn.Module, x: Tensor, starts: Tensor, descent: Descent) -> tuple[Tensor, Tensor]:
    """Project image by image and restart by restart with PyTorch's own SGD; latents and errors."""
    latents, errors = [], []
    for image, row in zip(x, starts, strict=True):
        candidates: list[tuple[float, Tensor]] = []
        for start in row:
            z = start.clone().requires_grad_()
            optimiser = torch.optim.SGD([z], lr=descent.lr, momentum=descent.momentum)
            passed = []
            for step in range(descent.steps):
                if descent.decay and step == math.ceil(0.8 * descent.steps):
                    optimiser.param_groups[0]["lr"] *= 0.1
                loss = (generator(z[None])[0] - image).square().mean()
                passed.append((loss.item(), z.detach().clone()))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            if descent.keep == "released":
                candidates.append(passed[-1])
            else:
                loss = (generator(z[None])[0] - image).square().mean()
                candidates += [*passed, (loss.item(), z.detach().clone())]
        error, latent = min(candidates, key=lambda each: each[0])
        latents.append(latent)
        errors.append(error)
    return torch.stack(latents), torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize(
    "descent",
    [
        Descent(12, 10.0, 0.7),
        Descent(12, 10.0, 0.7, keep="released"),
        Descent(12, 300.0, 0.9),
        Descent(12, 300.0, 0.9, keep="released"),
        Descent(10, 100.0, 0.0, decay=True),
        Descent(1, 10.0, keep="released"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("architecture", "shape"), [("released", GREY), ("supplement", COLOUR)])
def test_projection_is_what_a_loop_over_images_and_restarts_finds(
    architecture: gan.Architecture, shape: Shape, descent: Descent
) -> None:
    model = tiny(shape, architecture=architecture)
    x, starts = images(3, shape), drawn(3, 4, 8, seed=7)
    with torch.no_grad():
        found = project(gan.fused(model.generator), x, starts, descent)
    latent, error = one_at_a_time(model.generator, x, starts, descent)
    assert torch.allclose(found.latent, latent, rtol=0, atol=1e-8)
    assert torch.allclose(found.error, error, rtol=0, atol=1e-10)


def test_more_restarts_and_more_steps_never_end_worse() -> None:
    # T-dgan-2: with one seed, the starts of fewer restarts are among those of more.
    x = images(5)
    errors = [tiny(restarts=count).project(x).error for count in (1, 2, 3, 5, 8)]
    assert all((more <= less).all() for less, more in pairwise(errors))
    assert (errors[-1] < errors[0]).any()
    errors = [tiny(steps=count, lr=200.0).project(x).error for count in (1, 2, 5, 10, 30)]
    assert all((more <= less).all() for less, more in pairwise(errors))
    assert (errors[-1] < errors[0]).all()


def test_small_steps_end_lower_than_they_began() -> None:
    # T-dgan-2. As released, the point is the last but one, whatever was passed before.
    model = tiny(restarts=1, lr=0.5, momentum=0.0, keep="released", steps=20)
    x = images(5)
    start = (model.generator(model._starts(x)[:, 0]) - x).square().flatten(1).mean(1)
    found = model.project(x)
    assert (found.error < start).all()
    assert not found.diverged.any()


def test_a_linear_generator_projects_on_its_range() -> None:
    # T-dgan-2b: the Jacobian of G(z*(x)) is W W^+; G(z*) is affine in x, so that differences are exact.
    latent = 5
    matrix = drawn(12, latent, seed=3)
    matrix = matrix * (12 / torch.linalg.svdvals(matrix).square().max() / 20).sqrt()
    generator = LinearGenerator(matrix, Shape(1, 3, 4, 3))
    basis = torch.eye(12, dtype=torch.float64).view(12, 1, 3, 4)
    points = torch.cat((torch.zeros_like(basis[:1]), basis))
    starts = drawn(1, 1, latent).expand(13, -1, -1)
    out = generator(project(generator, points, starts, Descent(2000, momentum=0.5)).latent).flatten(1)
    jacobian = (out[1:] - out[0]).t()
    assert torch.allclose(jacobian, matrix @ torch.linalg.pinv(matrix), rtol=0, atol=1e-8)
    assert torch.allclose(jacobian, jacobian.t(), rtol=0, atol=1e-8)
    assert torch.allclose(jacobian @ jacobian, jacobian, rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank(jacobian, atol=1e-6).item() == latent


@pytest.mark.parametrize(("architecture", "shape"), [("released", GREY), ("supplement", COLOUR)])
def test_projection_does_not_depend_on_company_or_chunks(
    architecture: gan.Architecture, shape: Shape
) -> None:
    # T-dgan-3.
    model = tiny(shape, architecture=architecture, steps=40)
    x = images(7, shape)
    whole = model.project(x)
    for rows in (torch.arange(7).flip(0), torch.tensor([2]), torch.tensor([5, 0, 3])):
        part = model.project(x[rows])
        assert torch.allclose(part.latent, whole.latent[rows], rtol=0, atol=1e-9)
    for rows in (1, 2, 4, 1000):
        # Of 3 restarts an image: chunks need not end where images do.
        model.rows = rows
        part = model.project(x)
        assert torch.allclose(part.latent, whole.latent, rtol=0, atol=1e-9), rows
        assert torch.allclose(part.error, whole.error, rtol=0, atol=1e-12), rows
        assert torch.equal(part.diverged, whole.diverged)


def test_starts_that_are_passed_in_belong_to_their_images() -> None:
    # T-dgan-3.
    model = tiny()
    x, starts = images(6), drawn(6, 2, 8)
    whole = project(model.generator, x, starts, Descent(20))
    rows = torch.tensor([4, 1])
    part = project(model.generator, x[rows], starts[rows], Descent(20))
    assert torch.allclose(part.latent, whole.latent[rows], rtol=0, atol=1e-10)


def test_no_more_points_than_the_chunk_pass_the_generator_at_once() -> None:
    model = tiny()
    sizes: list[int] = []
    model.generator.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    project(model.generator, images(5), drawn(5, 3, 8), Descent(2), rows=4)
    assert sizes == [4] * 9 + [3] * 3


def test_fresh_starts_are_drawn_at_each_question_and_fixed_ones_never() -> None:
    x = images(2)
    model = tiny(starts="fresh")
    torch.manual_seed(3)
    one, two = model._starts(x), model._starts(x)
    torch.manual_seed(3)
    assert torch.equal(model._starts(x), one)
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    fixed = tiny(restarts=4)
    before = torch.get_rng_state()
    assert torch.equal(fixed._starts(x), fixed._starts(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fixed._starts(x)[0], fixed._starts(x)[1])
    assert not torch.equal(fixed._starts(x), tiny(restarts=4, seed=1)._starts(x))


@pytest.mark.parametrize(("spread", "expected"), [("released", 0.25), ("prior", 1.0)])
def test_starts_spread_as_told(spread: str, expected: float) -> None:
    # D-27: sqrt(1 / 16) or 1.
    starts = tiny(latent=16, spread=spread, restarts=400)._starts(images(1))
    assert starts.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * starts.numel()))
    assert abs(starts.mean().item()) < 5 * expected / math.sqrt(starts.numel())


# --- views --------------------------------------------------------------------------------------------


def gradient(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the logits, weighed 1, 2, 3, ..."""
    x = x.clone().requires_grad_()
    out = logits(x)
    (found,) = autograd.grad((out * torch.arange(1.0, 1 + out.shape[1])).sum(), x)
    return found


def flat(model: DefenseGan) -> Tensor:
    """Make the classifier linear; return the gradient of its weighed logits, (784)."""
    matrix = drawn(10, 784, seed=9)
    layer = nn.Linear(784, 10, dtype=torch.float64)
    layer.weight.data, layer.bias.data = matrix, drawn(10)
    model.classifier = nn.Sequential(nn.Flatten(), layer).requires_grad_(False)
    return torch.arange(1.0, 11, dtype=torch.float64) @ matrix


def test_bpda_takes_the_projection_for_the_identity() -> None:
    # T-dgan-2b.
    model, matrix = linear(6)
    slope = flat(model)
    x = images(2)
    assert torch.allclose(gradient(model.bpda().logits, x).flatten(1), slope.expand(2, -1))
    projected = x.flatten(1) @ (matrix @ torch.linalg.pinv(matrix)).t()
    logits = model.classifier(projected.view_as(x))
    assert torch.allclose(model.bpda().logits(x), logits, rtol=0, atol=1e-6)
    answer = model.decide(x, "label")
    assert answer.logits is not None
    assert torch.equal(answer.logits, model.bpda().logits(x))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_backtracking_gives_the_first_terms_of_the_implicit_derivative(steps: int) -> None:
    # D-37: dz*/dx = sum over t of A^t B, with A = I - rate H, H = 2 W^T W and B = 2 rate W^T.
    model, matrix = linear(6)
    slope = flat(model)
    hessian = 2 * matrix.t() @ matrix
    rate = 0.5 / torch.linalg.eigvalsh(hessian).max().item()
    shrunk = torch.eye(6, dtype=torch.float64) - rate * hessian
    series = sum(torch.linalg.matrix_power(shrunk, t) for t in range(steps)) @ (2 * rate * matrix.t())
    found = gradient(model.backtrack(steps=steps, rate=rate).logits, images(3)).flatten(1)
    assert torch.allclose(found, (slope @ matrix @ series).expand(3, -1), rtol=0, atol=1e-9)


def test_many_steps_back_give_the_projector_on_the_range() -> None:
    model, matrix = linear(6)
    slope = flat(model)
    found = gradient(model.backtrack(steps=60).logits, images(2)).flatten(1)
    expected = slope @ (matrix @ torch.linalg.pinv(matrix))
    assert torch.allclose(found, expected.expand(2, -1), rtol=0, atol=1e-6)


def test_curvature_is_the_hessians_largest_eigenvalue() -> None:
    model = tiny(latent=8)
    z, x = drawn(4, 8), images(4)
    found = curvature(model.generator, z, x, turns=200)

    def energy(point: Tensor, image: Tensor) -> Tensor:
        return (model.generator(point[None]) - image).square().sum()

    for row in range(4):
        hessian = autograd.functional.hessian(partial(energy, image=x[row]), z[row])
        largest = torch.linalg.eigvalsh(hessian).abs().max().item()
        assert found[row].item() == pytest.approx(largest, rel=1e-6)
        # As it is asked: never above, and far from the factor of two that would not be stable.
        short = curvature(model.generator, z, x)[row].item()
        assert 0.7 * largest < short <= largest * (1 + 1e-9)


def test_backtracking_is_the_derivative_of_its_own_steps() -> None:
    model = tiny(latent=8)
    z, x = drawn(2, 8), images(2)
    rate = torch.full((2,), 0.01, dtype=torch.float64)
    direction = drawn(*x.shape, seed=4)
    u = drawn(2, 8, seed=6)

    def end(x: Tensor) -> Tensor:
        return (backtrack(model.generator, z, x, steps=3, rate=rate) * u).sum()

    (found,) = autograd.grad(end(x.requires_grad_()), x)
    with torch.no_grad():
        difference = (end(x + 1e-6 * direction) - end(x - 1e-6 * direction)) / 2e-6
    assert (found * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_the_surfaces_of_the_projection_agree() -> None:
    model = tiny()
    x = images(3)
    seen, latent = model.inversion(), model.latent_()
    assert isinstance(seen, Inversion)
    z = seen.invert(x)
    assert torch.equal(z, seen.encode(x))
    assert torch.equal(z, latent.encode(x))
    assert torch.equal(z, model.project(x).latent)
    # D-38: the squared norm, which is D times the projection's own error.
    assert torch.allclose(seen.energy(z, x), 784 * model.project(x).error)
    for logits in (seen.classify(z, x), seen.logits(z), latent.logits(z)):
        assert torch.equal(logits, model.classifier(latent.decode(z)))
    assert torch.equal(latent.decode(z), seen.decode(z))
    assert torch.equal(model.alone().logits(x), model.classifier(x))


ROWS = [
    {"architecture": architecture, "starts": starts, **more}
    for architecture in ("released", "supplement")
    for starts in ("fixed", "fresh")
    for more in ({}, {"keep": "released", "decay": True, "spread": "prior", "net": "B"})
]


@pytest.mark.parametrize("params", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_it_is_a_defense(params: Mapping[str, Any]) -> None:
    shape = GREY if params["architecture"] == "released" else COLOUR
    again = None if params["starts"] == "fixed" else "it is trained as the one with fixed starts is"
    check_defense("defensegan", shape, unfitted=again, **{**TINY, **params})


def test_parts_are_taken_as_they_are() -> None:
    other = tiny()
    classifier = Cnn(GREY, net="b1", width=0.1, hidden=(7,)).double().eval()
    check_defense(
        "defensegan", GREY, **{**TINY, "generator": other.float(), "classifier": classifier.float()}
    )
    model = tiny(generator=other.double(), classifier=classifier.double())
    x = images(2)
    assert torch.equal(model.alone().logits(x), classifier.first().logits(x))
    assert model.generator is other.generator
    # Nothing is left to train.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = fitted(model, split(4))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_load_whatever_is_served() -> None:
    weights = tiny().state_dict()
    other = tiny(seed=1, restarts=7, steps=3, starts="fresh", spread="prior", keep="released")
    other.load_state_dict(weights, strict=True)
    entry = DEFENSES["defensegan"]
    assert entry.draws({"starts": "fresh"})
    assert not entry.draws({"starts": "fixed"})


# --- what cannot be -----------------------------------------------------------------------------------


BAD = [
    ({"restarts": 0}, "restarts: expected a number of 1 or more, found 0"),
    ({"steps": 0}, "steps: expected a number of 1 or more, found 0"),
    ({"iterations": 0}, "iterations: expected a number of 1 or more"),
    ({"critic_steps": 0}, "critic_steps: expected a number of 1 or more"),
    ({"batch": 0}, "batch: expected a number of 1 or more"),
    ({"latent": 0}, "latent: expected a number of 1 or more"),
    ({"width": 0.0}, "width: expected a number above 0"),
    ({"net_width": 0.0}, "net_width: expected a number above 0"),
    ({"lr": 0.0}, "lr: expected a number above 0"),
    ({"gan_lr": -1.0}, "gan_lr: expected a number above 0"),
    ({"momentum": 1.0}, "momentum must be at least 0 and below 1, found 1"),
    ({"penalty": -1.0}, "penalty: expected a number of 0 or more"),
    ({"classifier": "other", "trained_on": "reconstructions"}, "trained_on: reconstructions is for"),
]


@pytest.mark.parametrize(("params", "sentence"), BAD, ids=[str(params) for params, _ in BAD])
def test_what_cannot_be_is_refused_by_the_plan(params: dict[str, Any], sentence: str) -> None:
    ask("defensegan", GREY)
    with pytest.raises(InputError, match=sentence):
        ask("defensegan", GREY, **params)


def test_a_generator_whose_size_is_not_the_datas_is_refused_by_the_plan() -> None:
    with pytest.raises(InputError, match="draws images of 28x28, the data's are 8x8; set resize: 28"):
        ask("defensegan", Shape(1, 8, 8, 10))
    with pytest.raises(InputError, match=r"28x28, .* 32x32; .* or architecture: supplement"):
        ask("defensegan", COLOUR)
    with pytest.raises(InputError, match="supplement generator draws images of 32x32, the data's are 28x28"):
        ask("defensegan", GREY, architecture="supplement")


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"width is 0.04, but that of the generator's own defense is 0.08"):
        tiny(generator=tiny(width=0.08))
    with pytest.raises(InputError, match="latent is 8, but"):
        tiny(generator=tiny(latent=4))
    with pytest.raises(InputError, match="architecture is supplement, but"):
        tiny(COLOUR, architecture="supplement", generator=tiny())
    with pytest.raises(InputError, match=r"expected one of images \(1, 28, 28\), found \(3, 28, 28\)"):
        tiny(generator=tiny(Shape(3, 28, 28, 10)))
    classifier = Cnn(GREY, net="b1", width=0.1, hidden=(7,))
    with pytest.raises(InputError, match="expected another defensegan, found a Cnn"):
        tiny(generator=classifier)
    with pytest.raises(InputError, match="no view 'lagits'"):
        tiny(classifier=classifier, through="lagits")
    for codes in ("inversion", "latent"):
        with pytest.raises(InputError, match=f"expected a view of pixels, found '{codes}'"):
            tiny(classifier=tiny(), through=codes)
    for params in ({"steps": 0}, {"rate": 0.0}):
        with pytest.raises(InputError, match=r"(steps|rate): expected a number (of 1 or more|above 0)"):
            typed(DEFENSES["defensegan"].views["backtrack"], **params)
