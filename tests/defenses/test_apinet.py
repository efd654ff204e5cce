"""API-Net against closed forms, a loop over classes as its code has it, and every base that will not do."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask, typed
from torch import Tensor, autograd, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from attacks.pgd import pgd
from bench import Images, InputError, Labels, Shape, Split, Threat, TrainingError, View, cli
from bench.noise import Noise
from bench.registry import DEFENSES, bind
from bench.report.checks import Evidence, cell_flags
from bench.results.conditions import conditions_of
from bench.runner.training import Trainer
from bench.suite.jobs import Train
from bench.testing import check_defense
from defenses.apinet import NOISE, ApiNet, flags
from defenses.nets.training import frozen
from suites import TASK, Ran, suite

GREY = Shape(1, 8, 8, 5)
CPU = torch.device("cpu")


class Smooth(nn.Module):
    """A small network with all that training mode changes, and no kinks."""

    def __init__(self, channels: int = 1, classes: int = 5, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(
            nn.LazyLinear(12), nn.Softplus(), nn.Dropout(dropout), nn.Linear(12, classes)
        )
        self(torch.zeros(2, channels, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return 4 * logits


class Plane(nn.Module):
    """A linear classifier, example by example: a row's logits do not depend on how many there are."""

    def __init__(self, classes: int = 2, size: int = 64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(classes, size, generator=draw) / size)
        self.bias = nn.Parameter(torch.randn(classes, generator=draw) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, None, :] * self.weight).sum(2) + self.bias


class Blind(Plane):
    """Answers without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()).detach()


class Raw(nn.Module):
    """Normalises the pixels themselves: its running statistics are those of the images that passed."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, momentum=momentum)
        self.plane = Plane(classes=5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.plane(self.norm(x))
        return 50 * logits


class _Once(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Rough(Plane):
    """Has one derivative."""

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = _Once.apply(x)
        return super().forward(once)


def own(network: str, shape: Shape = GREY, **arguments_: Any) -> nn.Module:
    """Return one of the networks above as a user brings it: by `module`."""
    entry = DEFENSES["module"]
    params = {"build": f"{__name__}:{network}", "arguments": arguments_}
    torch.manual_seed(0)
    made: nn.Module = entry.make(shape, **bind(entry, params))
    for name, value in made.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.2, 0.8)
    return made


def api(base: nn.Module | None = None, shape: Shape = GREY, **params: Any) -> ApiNet:
    """Build API-Net on a base as the harness does."""
    entry = DEFENSES["apinet"]
    base = own("Smooth", shape, channels=shape.channels, classes=shape.classes) if base is None else base
    made: ApiNet = entry.make(shape, **{**bind(entry, {**params, "base": "base"}), "base": base})
    return made


def asked(base: nn.Module | None = None, shape: Shape = GREY, **params: Any) -> ApiNet:
    """Return it as an attack meets it: evaluation mode, parameters fixed, in float64."""
    return api(base, shape, **params).double().eval().requires_grad_(False)


def images(n: int, shape: Shape = GREY, dtype: torch.dtype = torch.float64) -> Images:
    """Return images with some black and some white pixels."""
    draw = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape[:3], generator=draw, dtype=dtype).mul(1.2).sub(0.1).clamp(0, 1)


def l_of(model: ApiNet, x: Images) -> Tensor:
    logits = model.decide(x, "label").logits
    assert logits is not None
    return logits


def ascend(net: nn.Module, x: Images, c: int, model: ApiNet, eps: float) -> Images:
    """Return the z of one class, as section 1.6.2 writes it: the reference, one class at a time."""
    z = x + NOISE * torch.randn_like(x) if model.start == "noise" else x
    for _ in range(model.steps):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = autograd.grad(net(z).log_softmax(1)[:, c].sum(), z)
        z = z.detach() + model.step_size * gradient.sign()
        z = torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    return z.detach()


# --- inference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_without_a_radius_l_is_the_base(start: str) -> None:
    """T-api-1."""
    x = images(3, dtype=torch.float32)
    plane = own("Plane", classes=5)
    model = api(plane, eps_ap=0.0, start=start).eval()
    expected = plane(x).log_softmax(1)
    assert torch.equal(l_of(model, x), expected)
    assert (l_of(model, x).softmax(1) - plane(x).softmax(1)).abs().max() < 1e-7
    # A network whose sums depend on the size of a batch is the same where it is asked by as many rows.
    model = api(eps_ap=0.0, start=start).eval()
    every = model.base(x.repeat(5, 1, 1, 1)).log_softmax(1).view(5, 3, 5)
    assert torch.equal(l_of(model, x), torch.stack([every[c, :, c] for c in range(5)], 1))
    wide, x = model.double(), x.double()
    assert (l_of(wide, x).softmax(1) - wide.base(x).softmax(1)).abs().max() < 1e-12


@pytest.mark.parametrize("start", ["noise", "zero"])
@pytest.mark.parametrize(("eps", "steps"), [(14 / 255, 8), (0.0005, 1), (0.3, 3)])
def test_every_point_stays_in_its_ball_and_in_the_box(start: str, eps: float, steps: int) -> None:
    """T-api-2; a radius below the noise included."""
    x = images(4, dtype=torch.float32)
    model = api(eps_ap=eps, inner_steps=steps, inner_step_size=0.05, start=start)
    z = model.solve(x)
    moved = (z - x.repeat(5, 1, 1, 1)).abs()
    assert moved.max() <= eps + 1e-6
    assert moved.max() > 0.9 * min(eps, 0.05 * steps)
    assert z.min() >= 0
    assert z.max() <= 1
    assert (x == 0).any()
    assert (x == 1).any()


def test_from_the_image_itself_l_depends_on_nothing_else() -> None:
    """T-api-3."""
    x, order = images(7), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    model = asked(start="zero")
    found = l_of(model, x)
    state = torch.get_rng_state()
    assert torch.equal(l_of(model, x), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(l_of(model, x[order]), found[order], rtol=0, atol=1e-12)
    assert torch.allclose(l_of(model, x[2:3]), found[2:3], rtol=0, atol=1e-12)
    noisy = asked(start="noise")
    assert not torch.equal(l_of(noisy, x), l_of(noisy, x))
    torch.manual_seed(3)
    once = l_of(noisy, x)
    torch.manual_seed(3)
    assert torch.equal(l_of(noisy, x), once)


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_a_linear_base_of_two_classes_has_a_closed_form(start: str) -> None:
    """T-api-4: the solver reaches the vertex x + eps sign(w_c - w_other)."""
    shape = GREY._replace(classes=2)
    plane = own("Plane", shape)
    model = asked(plane, shape, eps_ap=0.05, inner_steps=8, inner_step_size=0.01, start=start)
    x = images(5).mul(0.6).add(0.2)
    weight, bias = plane.network.weight, plane.network.bias
    found = l_of(model, x)
    for c, other in ((0, 1), (1, 0)):
        towards = weight[c] - weight[other]
        margin = x.flatten(1) @ towards + 0.05 * towards.abs().sum() + bias[c] - bias[other]
        assert torch.allclose(found[:, c], nn.functional.logsigmoid(margin), rtol=0, atol=1e-12)
    z = model.solve(x).view(2, 5, -1)
    vertex = x.flatten(1) + 0.05 * (weight[1] - weight[0]).sign()
    assert torch.allclose(z[1], vertex, rtol=0, atol=1e-12)


def test_more_classes_of_a_linear_base_only_gain() -> None:
    """T-api-4, for more than two classes."""
    plane = own("Plane", classes=5)
    x = images(6)
    model = asked(plane, start="zero")
    assert (l_of(model, x) > plane(x).log_softmax(1)).all()


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_one_batch_of_all_classes_is_a_loop_over_classes(start: str) -> None:
    x = images(4)
    model = asked(start=start)
    torch.manual_seed(2)
    found = l_of(model, x)
    torch.manual_seed(2)
    columns = []
    for c in range(5):
        z = ascend(model.base, x, c, model, 14 / 255)
        columns.append(model.base(z).log_softmax(1)[:, c])
    assert torch.allclose(found, torch.stack(columns, 1), rtol=0, atol=1e-12)
    assert (found - model.base(x).log_softmax(1)).min() > 0.01


@pytest.mark.parametrize("rows", [1, 7, 20, 256])
@pytest.mark.parametrize("start", ["noise", "zero"])
def test_the_size_of_chunks_changes_nothing(start: str, rows: int) -> None:
    x = images(4)
    model = asked(start=start, inner_steps=3)

    def everything() -> list[Tensor]:
        torch.manual_seed(2)
        found = [l_of(model, x)]
        for seen in (model.bpda(), model.unrolled()):
            torch.manual_seed(2)
            z = x.clone().requires_grad_()
            logits = seen.logits(z)
            found += [logits.detach(), *autograd.grad(cross_entropy(logits, torch.arange(4)), z)]
        return found

    whole = everything()
    model.rows = rows
    for one, other in zip(everything(), whole, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_what_is_scaled_and_what_is_served() -> None:
    assert api(inner_step_size=None).step_size == pytest.approx(0.007, rel=1e-12)
    assert api(inner_step_size=None, eps_ap=16 / 255).step_size == pytest.approx(0.008, rel=1e-12)
    assert api(inner_step_size=None, eps_ap=0.1, inner_steps=4).step_size == pytest.approx(1.02 * 0.1 / 4)
    trained = api(own("Smooth"), eps_ap=14 / 255)
    served = api(own("Smooth"), eps_ap=0.01, inner_steps=2, inner_step_size=0.02, start="zero")
    for each in served.parameters():
        each.data.add_(1)
    served.load_state_dict(trained.state_dict(), strict=True)
    x = images(2, dtype=torch.float32)
    assert torch.equal(served.eval().base(x), trained.eval().base(x))


@pytest.mark.parametrize(
    ("name", "params"), [("zero", {}), ("noise", {}), ("zero", {"inner_step_size": None})]
)
def test_it_is_what_it_declares(name: str, params: dict[str, Any]) -> None:
    check_defense("apinet", GREY, base=own("Smooth"), start=name, epochs=2, **params)


def test_it_stands_on_a_cnn() -> None:
    shape = Shape(1, 16, 16, 3)
    entry = DEFENSES["cnn"]
    base = entry.make(shape, **bind(entry, {"width": 0.125, "hidden": [9]}))
    check_defense("apinet", shape, base=base, start="zero", inner_steps=2, epochs=2)


# --- views -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_bpda_sums_the_classes_gradients(start: str) -> None:
    """T-api-5: sum over c of (softmax(l)_c - 1[c = y]) grad log p(c|z) at z_c."""
    x, y = images(4), torch.tensor([0, 3, 1, 4])
    model = asked(start=start)
    torch.manual_seed(2)
    z = model.solve(x).view(5, 4, 1, 8, 8)
    torch.manual_seed(2)
    moving = x.clone().requires_grad_()
    logits = model.bpda().logits(moving)
    (found,) = autograd.grad(cross_entropy(logits, y, reduction="sum"), moving)
    expected = torch.zeros_like(x)
    for c in range(5):
        point = z[c].clone().requires_grad_()
        value = model.base(point).log_softmax(1)[:, c]
        assert torch.allclose(logits[:, c], value, rtol=0, atol=1e-12)
        (gradient,) = autograd.grad(value.sum(), point)
        weight = logits.softmax(1)[:, c].detach() - (y == c).double()
        expected += weight[:, None, None, None] * gradient
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert found.abs().max() > 1e-3


def test_bpda_is_the_gradient_where_the_maxima_are_exact() -> None:
    """The envelope theorem, by finite differences of l itself."""
    shape = GREY._replace(classes=2)
    model = asked(own("Plane", shape), shape, start="zero", inner_step_size=0.01)
    x = images(2).mul(0.6).add(0.2).requires_grad_()
    assert autograd.gradcheck(model.bpda().logits, (x,), eps=1e-6, atol=1e-7)


def test_the_base_view_is_an_attack_on_the_base() -> None:
    """T-api-6."""
    model = asked()
    x, y = images(6), torch.arange(6) % 5

    def attacked(view: View) -> Images:
        noise = Noise("fbda", torch.arange(6), dtype=torch.float64)
        return pgd(view, x, y, Threat("linf", 0.1), noise, steps=5, keep="last", drop=False).images

    through, alone = attacked(model.base_view()), attacked(View(model.base))
    assert torch.equal(through, alone)
    assert not torch.equal(through, x)
    assert model.base_view().logits(x).equal(model.base(x))


def by_hand(plane: nn.Module, x: Images, c: int, length: float, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of l_c after one free step on logits Wx + b: (I + a S'(g) H) grad log p_c(z)."""
    weight, out = plane.network.weight, []
    for row in x.flatten(1):
        p = (weight @ row + plane.network.bias).softmax(0)
        gradient = weight[c] - p @ weight
        hessian = -weight.T @ (p.diag() - p.outer(p)) @ weight
        z = row + length * gradient.sign()
        q = (weight @ z + plane.network.bias).softmax(0)
        jacobian = torch.eye(len(row), dtype=row.dtype) + length * slope(gradient).diag() @ hessian
        out.append(jacobian.T @ (weight[c] - q @ weight))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    ("params", "slope"),
    [
        ({}, torch.ones_like),
        (
            {"surrogate": "tanh", "temperature": 0.02},
            lambda g: (1 - (g / 0.02).tanh().square()) / 0.02,
        ),
    ],
)
def test_one_unrolled_step_by_hand(params: dict[str, Any], slope: Callable[[Tensor], Tensor]) -> None:
    plane = own("Plane", classes=5)
    with torch.no_grad():
        plane.network.weight.mul_(20)
    model = asked(plane, start="zero", inner_steps=1, inner_step_size=0.05, eps_ap=0.1)
    x = images(3).mul(0.6).add(0.2)
    for c in range(5):
        moving = x.clone().requires_grad_()
        (found,) = autograd.grad(model.unrolled(**params).logits(moving)[:, c].sum(), moving)
        expected = by_hand(plane, x, c, 0.05, slope)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        (held,) = autograd.grad(model.bpda().logits(moving)[:, c].sum(), moving)
        assert (found - held).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_unrolling_is_autograd_through_the_written_out_steps(start: str) -> None:
    model = asked(start=start, inner_steps=4, inner_step_size=0.02, eps_ap=0.05)
    x, y = images(3), torch.tensor([4, 0, 2])
    temperature = 0.05

    def plain(x: Images) -> Tensor:
        columns = []
        for c in range(5):
            z = x + NOISE * torch.randn_like(x) if start == "noise" else x
            for _ in range(4):
                (g,) = autograd.grad(model.base(z).log_softmax(1)[:, c].sum(), z, create_graph=True)
                soft = (g / temperature).tanh()
                z = z + 0.02 * (soft + (g.sign() - soft).detach())
                z = z.clamp((x - 0.05).clamp(min=0), (x + 0.05).clamp(max=1))
            columns.append(model.base(z).log_softmax(1)[:, c])
        return torch.stack(columns, 1)

    results = []
    for logits in (plain, model.unrolled(surrogate="tanh", temperature=temperature).logits):
        torch.manual_seed(2)
        moving = x.clone().requires_grad_()
        answer = logits(moving)
        results.append((answer.detach(), *autograd.grad(cross_entropy(answer, y), moving)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_where_every_pixel_ends_at_the_edge_unrolling_is_bpda() -> None:
    """Only the last step counts, and it hides the others: z = x + or - eps."""
    model = asked(start="zero", eps_ap=0.001, inner_steps=3, inner_step_size=0.01)
    x = images(3).mul(0.6).add(0.2).requires_grad_()
    one, other = (
        autograd.grad(seen.logits(x)[:, 1].sum(), x)[0] for seen in (model.unrolled(), model.bpda())
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert (model.unrolled().logits(x) == l_of(model, x.detach())).all()


def test_asking_leaves_flags_gradients_and_grad_mode_alone() -> None:
    """T-api-7, also with a module that is in another mode than the rest, and after a failure."""
    model = api()
    model.train()
    norm = model.base.network.body[1]
    norm.eval()
    model.base.network.head[3].bias.requires_grad_(False)
    kept = torch.ones_like(model.base.network.head[3].weight)
    model.base.network.head[3].weight.grad = kept
    before = [(name, each.training) for name, each in model.named_modules()]
    flags = [each.requires_grad for each in model.parameters()]
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    x = images(2, dtype=torch.float32)
    with torch.no_grad():
        inside = l_of(model, x)
        assert not torch.is_grad_enabled()
    assert not inside.requires_grad
    z = x.clone().requires_grad_()
    for seen in (model.bpda(), model.unrolled()):
        autograd.grad(seen.logits(z).sum(), z)
    model.base.network.head[3] = nn.Linear(3, 5)
    with pytest.raises(RuntimeError):
        model.solve(x)
    assert [(name, each.training) for name, each in model.named_modules() if "head.3" not in name] == [
        each for each in before if "head.3" not in each[0]
    ]
    assert flags[:-2] == [each.requires_grad for each in model.parameters()][:-2]
    assert all(each.grad is None for each in model.parameters())
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(torch.equal(each, buffers[name]) for name, each in model.named_buffers())


def test_answers_are_those_of_evaluation_mode() -> None:
    model, x = api(start="zero"), images(3, dtype=torch.float32)
    trained = l_of(model.train(), x)
    assert torch.equal(trained, l_of(model.eval(), x))


# --- bases that will not do --------------------------------------------------------------------------


def linear(**params: Any) -> nn.Module:
    made: nn.Module = DEFENSES["toy/linear"].make(GREY, **params)
    return made


@pytest.mark.parametrize(
    ("through", "message"),
    [
        ("logit", "base, through: toy/linear has no view 'logit'; did you mean 'logits'?"),
        ("code", "through: expected a view of pixels, found 'code', one of codes"),
        ("reject", "through: expected a logit by class, found 'reject', which refuses"),
    ],
)
def test_views_that_will_not_do_are_refused_while_building(through: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        api(linear(), through=through)
    assert str(caught.value) == message


def test_a_view_whose_level_matters_is_refused() -> None:
    shape = Shape(1, 32, 32, 3)
    entry = DEFENSES["sdim"]
    base = entry.make(shape, **bind(entry, {"width": 0.125, "features": 8}))
    base.calibrated.fill_(True)
    assert api(base, shape, through="scaled").through == "scaled"
    with pytest.raises(InputError, match="through: expected logits that a softmax reads, found 'accept-1'"):
        api(base, shape, through="accept-1")


def test_what_is_no_defense_is_refused() -> None:
    with pytest.raises(InputError, match="base, through: Smooth is no registered defense"):
        api(Smooth())


def test_a_base_may_be_looked_at_through_another_view() -> None:
    model = api(linear(), through="scaled", eps_ap=0.0, start="zero")
    x = images(2, dtype=torch.float32)
    expected = (model.base.logits(x) / 2).log_softmax(1)
    assert torch.allclose(l_of(model, x), expected, atol=1e-6)


def split(n: int = 12, shape: Shape = GREY) -> Split:
    x = images(n, shape, torch.float32)
    return Split(x, torch.arange(n) % shape.classes, torch.arange(n), "split")


def trainer(keep: Path | None = None, progress: Any = None, n: int = 12) -> Trainer:
    return Trainer(split(n), "key", CPU, keep=keep, progress=progress)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("Blind", "through: view 'logits' of the base has no gradient"),
        ("Plane", r"through: expected logits \(2, 5\), found \(2, 2\) in view 'logits' of the base"),
    ],
)
def test_bases_that_will_not_do_are_refused_before_training(base: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        api(own(base, classes=5 if base == "Blind" else 2)).fit(split(), trainer())


def test_a_base_with_one_derivative_is_not_unrolled() -> None:
    model = api(own("Rough", classes=5))
    x = images(2, dtype=torch.float32).requires_grad_()
    autograd.grad(model.bpda().logits(x).sum(), x)
    with pytest.raises(InputError, match="view unrolled: the base cannot be differentiated twice through"):
        autograd.grad(model.unrolled().logits(x).sum(), x)
    with pytest.raises(InputError, match="temperature: expected a number above 0, found 0"):
        typed(DEFENSES["apinet"].views["unrolled"], temperature=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"inner_steps": 0}, "inner_steps: expected a number of 1 or more, found 0"),
        ({"eps_ap": -0.1}, "eps_ap: expected a number of 0 or more, found -0.1"),
        ({"eps_ap": 14}, "eps_ap: expected a number of 1 or less, found 14"),
        ({"inner_step_size": 0}, "inner_step_size: expected a number above 0, found 0"),
        ({"epochs": -1}, "epochs: expected a number of 0 or more, found -1"),
        ({"batch": 0}, "batch: expected a number of 1 or more, found 0"),
        ({"lr": 0}, "lr: expected a number above 0, found 0"),
        ({"radius": -0.1}, "radius: expected a number of 0 or more, found -0.1"),
    ],
)
def test_impossible_settings_are_refused_by_the_plan(params: dict[str, Any], message: str) -> None:
    ask("apinet", GREY, base="base", epochs=0)
    with pytest.raises(InputError, match=message):
        ask("apinet", GREY, base="base", **params)


def test_a_radius_out_of_reach_is_doubted() -> None:
    """D-21: 8 steps of 0.007 do not reach 16/255; 14/255 they do, and 8 of 0.01 reach 16/255."""

    def said(**params: Any) -> str | None:
        resolved = {"base": "base", "eps_ap": "16/255", **params}
        return flags(**DEFENSES["apinet"].schema(**resolved).model_dump(mode="json"))

    short = "8 inner steps of 0.007 reach 0.056, less than eps_ap 0.06275 (inner_step_size: null scales them)"
    assert said() == short
    for change in (
        {"eps_ap": "14/255"},
        {"inner_step_size": 0.01},
        {"inner_step_size": None},
        {"inner_steps": 9},
    ):
        assert said(**change) is None
    # Exactly enough, in fractions that are not exact.
    assert said(inner_step_size="2/255") is None
    # The attack in training has steps of its own; without training they do not matter.
    far = "7 training steps of 0.007 reach 0.049, less than radius 0.3"
    assert said(radius=0.3) == f"{short}; {far}"
    assert said(radius=0.3, inner_step_size=None) == far
    assert said(radius=0.3, inner_step_size=None, epochs=0) is None
    assert said(radius=0.3, inner_step_size=None, inner={"use": "pgd"}) is None


# --- training ----------------------------------------------------------------------------------------

FEW: dict[str, Any] = {
    "epochs": 3,
    "batch": 5,
    "inner_steps": 2,
    "inner": {"use": "pgd", "steps": 2, "step_size": 0.02, "keep": "last", "drop": False},
}


def literal_loss(net: nn.Module, clean: Images, attacked: Images, y: Labels, model: ApiNet) -> Tensor:
    """Return the loss of 1.6.4, a class at a time, with the forwards that have no weight."""
    with frozen(net):
        points = [ascend(net, attacked, c, model, 14 / 255) for c in range(5)]
    columns = [net(z).log_softmax(1)[:, c] for c, z in enumerate(points)]
    weightless = 0 * net(clean).sum() + 0 * net(attacked).sum()
    return cross_entropy(torch.stack(columns, 1), y) + weightless


def test_a_loss_is_that_of_the_released_steps() -> None:
    model = api(own("Smooth")).double().train()
    other = copy.deepcopy(model.base)
    clean, y = images(6), torch.arange(6) % 5
    attacked = (clean + 0.02).clamp(0, 1)
    losses = []
    for net, loss in (
        (model.base, lambda: model.loss(clean, attacked, y)),
        (other, lambda: literal_loss(other, clean, attacked, y, model)),
    ):
        torch.manual_seed(4)
        value = loss()
        value.backward()
        losses.append(value.item())
        assert net.training
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for one, two in zip(model.base.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, rtol=0, atol=1e-12)
    for (name, one), (_, two) in zip(model.base.named_buffers(), other.named_buffers(), strict=True):
        assert torch.allclose(one.double(), two.double(), rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    ("params", "updates"),
    [
        ({}, 7),
        ({"extra_forwards": False}, 5),
        ({"class_batches": False}, 3),
        ({"class_batches": False, "extra_forwards": False}, 1),
    ],
)
def test_batch_normalisation_is_updated_as_often_as_is_said(params: dict[str, Any], updates: int) -> None:
    """D-22: a time for each class, and twice for images that the loss does not see."""
    model = api(**params).train()
    x = images(6, dtype=torch.float32)
    counter = model.base.network.body[1].num_batches_tracked
    before = int(counter)
    loss = model.loss(x, x, torch.arange(6) % 5)
    assert int(counter) - before == updates
    assert loss.requires_grad


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("class_batches", [True, False])
def test_the_running_statistics_end_as_in_the_released_order(
    momentum: float | None, class_batches: bool
) -> None:
    """D-50: the classes' points, then the clean images, then the attacked ones; by hand, in float64."""
    inner = {"use": "pgd", "steps": 2, "step_size": 0.1, "start": "zero", "keep": "last", "drop": False}
    given = FEW | {"epochs": 1, "batch": 12, "inner": inner, "radius": 0.15, "start": "zero"}
    given |= {"eps_ap": 0.2, "inner_steps": 3, "inner_step_size": 0.1, "class_batches": class_batches}
    ended = {}
    for order in ("after", "before"):
        model = api(own("Raw", momentum=momentum), extra_order=order, **given)
        alone, seen = copy.deepcopy(model.base).eval().requires_grad_(False), []
        loss = model.loss

        def instrumented(
            clean: Images,
            attacked: Images,
            y: Labels,
            loss: Callable[..., Tensor] = loss,
            seen: list[Images] = seen,
        ) -> Tensor:
            seen += [clean.clone(), attacked.clone()]
            return loss(clean, attacked, y)

        model.loss = instrumented  # type: ignore[method-assign]
        model.fit(split(), trainer())
        clean, attacked = seen
        classes = [ascend(alone, attacked, c, model, 0.2) for c in range(5)]
        passes = classes if class_batches else [torch.cat(classes)]
        passes = [*passes, clean, attacked] if order == "after" else [clean, attacked, *passes]
        norm, own_ = alone.network.norm, model.base.network.norm
        mean, var = norm.running_mean.double(), norm.running_var.double()
        for number, batch in enumerate(passes, 1):
            weight = 1 / number if momentum is None else momentum
            mean = (1 - weight) * mean + weight * batch.double().mean()
            var = (1 - weight) * var + weight * batch.double().var()
        assert own_.num_batches_tracked == len(passes)
        assert torch.allclose(own_.running_mean.double(), mean, rtol=1e-6, atol=0)
        assert torch.allclose(own_.running_var.double(), var, rtol=1e-6, atol=0)
        ended[order] = (float(own_.running_mean), float(own_.running_var))
    if momentum is None:
        # A mean of all passes does not know their order.
        assert ended["after"] == pytest.approx(ended["before"], rel=1e-6)
    else:
        # A hundred times what the transcription may be off.
        assert abs(ended["after"][1] / ended["before"][1] - 1) > 1e-4


def test_training_mode_sees_a_class_s_points_or_all_as_a_batch() -> None:
    """Without dropout and with all points alike but for their class, only batch statistics differ."""
    losses = []
    x = images(6)
    for together in (True, False):
        model = asked(own("Smooth", dropout=0.0), start="zero", class_batches=together).train()
        losses.append(float(model.loss(x, x, torch.arange(6) % 5)))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_training_sees_images_attacked_on_the_base_in_evaluation_mode() -> None:
    inner = {"use": "pgd", "steps": 3, "step_size": 0.02, "start": "zero", "keep": "last", "drop": False}
    model = api(own("Smooth"), **FEW | {"epochs": 1, "batch": 12, "inner": inner, "radius": 0.05})
    alone, data = copy.deepcopy(model.base).eval().requires_grad_(False), split()
    loss, seen = model.loss, []

    def instrumented(clean: Images, attacked: Images, y: Labels) -> Tensor:
        assert model.training
        assert not attacked.requires_grad
        seen.append((clean.clone(), attacked.clone(), y))
        return loss(clean, attacked, y)

    model.loss = instrumented  # type: ignore[method-assign]
    model.fit(data, trainer())
    ((clean, attacked, y),) = seen
    noise = Noise("no draws", torch.arange(12))
    threat = Threat("linf", 0.05)
    view = View(alone, exact=False)
    expected = pgd(view, clean, y, threat, noise, **{k: v for k, v in inner.items() if k != "use"}).images
    assert torch.equal(attacked, expected)
    assert (attacked - clean).abs().amax().item() == pytest.approx(0.05, abs=1e-6)


def test_training_repeats_bit_for_bit_and_goes_on_exactly(tmp_path: Path) -> None:
    whole, again = (api(own("Smooth"), **FEW) for _ in range(2))
    start = copy.deepcopy(whole.state_dict())
    whole.fit(split(), trainer(tmp_path / "whole"))
    again.fit(split(), trainer())
    assert not whole.training
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, start[name]), name

    def stop(facts: Any) -> None:
        if facts["done"] == 2:
            raise KeyboardInterrupt

    halted = api(own("Smooth"), **FEW)
    with pytest.raises(KeyboardInterrupt):
        halted.fit(split(), trainer(tmp_path / "halted", stop))
    resumed = api(own("Smooth"), **FEW)
    last = trainer(tmp_path / "halted")
    resumed.fit(split(), last)
    assert last.resumed == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_training_learns() -> None:
    x = images(40, dtype=torch.float32).mul(0.4)
    y = torch.arange(40) % 5
    for each, label in zip(x, y, strict=True):
        each[0, label] += 0.5
    data = Split(x, y, torch.arange(40), "rows")
    model = api(own("Smooth"), **FEW | {"epochs": 12, "batch": 10, "lr": 0.02})
    before = (model.eval().decide(x, "label").label == y).float().mean()
    model.fit(data, Trainer(data, "key", CPU))
    assert (model.decide(x, "label").label == y).float().mean() > max(0.9, before)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    model = api(own("Smooth"), **FEW)
    with torch.no_grad():
        model.base.network.head[3].bias[0] = float("nan")
    with pytest.raises(TrainingError, match="the loss of epoch 1, step 1 is nan"):
        model.fit(split(), trainer())


def test_without_epochs_the_base_stays_as_it_is() -> None:
    model = api(own("Smooth").requires_grad_(False), epochs=0)
    before = copy.deepcopy(model.state_dict())
    model.train().fit(split(), trainer())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="base: it has no weights to train; epochs: 0 takes it as it is"):
        api(own("Smooth").requires_grad_(False)).fit(split(), trainer())


def test_single_images_train_a_base_without_batch_normalisation_alone() -> None:
    plane = own("Plane", classes=5)
    before = copy.deepcopy(plane.state_dict())
    api(plane, **FEW | {"epochs": 1, "batch": 1}).fit(split(), trainer())
    assert not torch.equal(plane.network.weight, before["network.weight"])
    with pytest.raises(InputError, match="no batch has the 2 images that batch normalisation needs"):
        api(own("Smooth"), **FEW | {"epochs": 1, "batch": 1}).fit(split(), trainer())


def test_weights_that_are_fixed_stay_fixed() -> None:
    base = own("Smooth")
    base.network.body.requires_grad_(False)
    before = copy.deepcopy(base.state_dict())
    model = api(base, **FEW | {"epochs": 1})
    model.fit(split(), trainer())
    after = base.state_dict()
    for name in ("network.body.0.weight", "network.body.1.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["network.head.0.weight"], before["network.head.0.weight"])


# --- in a suite --------------------------------------------------------------------------------------

MODELS = '''
"""A network of a user's, for 8x8 digits."""

import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "yours.py").write_text(MODELS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("yours", None)


SWEEP = {"eps_ap": ["8/255", "14/255", "16/255"], "start": "zero"}


def written(folder: Path, **params: Any) -> Path:
    defenses = {
        "yours": {"use": "module", "build": "yours:build"},
        "api": {"use": "apinet", "base": "yours", "inner_steps": 4, "inner_step_size": 0.014, **params},
    }
    attacks = {"clean": {"use": "none"}, "pgd": {"use": "pgd", "steps": 3}}
    table = {
        "title": "Accuracy against eps_ap",
        "rows": ["defense", "inference.eps_ap"],
        "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd", "view": "bpda"}},
    }
    views = ["base", "bpda", "unrolled"]
    task = {**TASK, "defenses": ["api"], "views": views, "limit": 20}
    return suite(folder, defenses, attacks, [task], tables={"5": table})


@pytest.mark.parametrize("epochs", [0, 1])
def test_on_a_network_of_the_user_s_a_sweep_trains_once(folder: Path, epochs: int) -> None:
    params = FEW | {"epochs": epochs, "inner_steps": 4, "batch": 600}
    ran = Ran(written(folder, **params, inference=SWEEP))
    assert not ran.failed, ran.failed
    jobs = list(ran.plan.graph())
    assert sum(isinstance(job, Train) for job in jobs) == 2  # The user's network, and API-Net on it.
    assert len(ran.plan.conditions) == 3 * (1 + 3)
    crafted = {
        (cell.coordinates["view"], cell.coordinates["inference.eps_ap"]): cell.job.crafts[0].key
        for cell in ran.plan.conditions
        if cell.coordinates["attack"] == "pgd"
    }
    count = {view: len({key for (seen, _), key in crafted.items() if seen == view}) for view, _ in crafted}
    assert count == {"base": 1, "bpda": 3, "unrolled": 3}
    for cell in ran.plan.conditions:
        assert len(ran.outcomes(**cell.coordinates)) == 20


def test_a_sweep_out_of_reach_is_shown_by_plan_and_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(folder, epochs=0, inference=SWEEP)
    ran = Ran(path)
    short = "4 inner steps of 0.014 reach 0.056, less than eps_ap 0.06275"
    said = f"api: {short} (inner_step_size: null scales them)"
    for cell in ran.plan.conditions:
        far = cell.coordinates["inference.eps_ap"] > 15 / 255
        assert cell.facts["flags"] == ([said] if far else [])
    (far, *_) = [each for each in conditions_of(ran.plan.manifest()) if each.facts.flags]
    rows = {name: column.to_numpy() for name, column in ran.outcomes(**far.coordinates).items()}
    flags = cell_flags([Evidence(far, rows, rows, None)])
    # Nobody has trained it.
    assert [flag.message for flag in flags if flag.code != "at-chance"] == [said]
    assert flags[-1].code == "out-of-reach"
    monkeypatch.chdir(folder)
    for words in (["plan"], ["run", "--executor", "inline"], ["report"]):
        monkeypatch.setattr(sys, "argv", ["bench", words[0], "suite.yaml", *words[1:]])
        with contextlib.suppress(SystemExit):
            cli.main()
        # The console folds lines.
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count(said) == 1, shown
        assert f"clean: {said}" not in shown
