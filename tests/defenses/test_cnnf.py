"""CNN-F against the identities of its paper, a second implementation in loops, and finite differences."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from asking import typed
from numpy.typing import NDArray
from torch import Tensor, autograd, nn
from torch.nn.functional import cross_entropy, mse_loss

from bench import InputError, Shape, objective
from bench.registry import DEFENSES
from defenses.cnn import Cnn
from defenses.cnnf import CnnF
from defenses.nets.cnnf.convolutional import b2
from defenses.nets.cnnf.feedback import Network
from defenses.nets.cnnf.losses import adversarial_loss, standard_loss
from defenses.nets.cnnf.operators import (
    AdaPool,
    AdaReLU,
    AveragePool,
    Conv,
    FeedbackNorm,
    Flatten,
    Gate,
    Layer,
    Linear,
    Rule,
    State,
    normalise,
    unpool,
)
from defenses.nets.cnnf.wide_resnet import wrn_40_2

Array = NDArray[np.float64]

STILL = Rule(eta=0.0)
GREY, COLOUR = Shape(1, 8, 8, 5), Shape(3, 8, 8, 5)
NARROW: dict[str, dict[str, Any]] = {
    "b1": {"net": "b1", "width": 0.125, "hidden": (11,)},
    "b2": {"net": "b2", "width": 0.25, "hidden": (12, 7)},
    "wrn-40-2": {"net": "wrn-40-2", "width": 0.25},
}
PLACES = [("b1", 0), ("b1", 1), ("b2", 0), ("b2", 1), ("b2", 2), *(("wrn-40-2", ind) for ind in (0, 1, 5, 6))]


def narrow(net: str, ind: int, seed: int = 0, **params: Any) -> CnnF:
    """Build a narrow CNN-F in float64 whose biases are not zero."""
    torch.manual_seed(seed)
    model = CnnF(COLOUR, **NARROW[net], ind=ind, **params).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def images(count: int, shape: Shape = COLOUR, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape[:3], generator=generator, dtype=torch.float64)


# --- the generative model (T-cnnf-1, T-cnnf-10b) ------------------------------------------------------


class Shift(Layer):
    """A bias without normalisation, as the paper's lemma has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, 1, 1)


class PrintedReLU(AdaReLU):
    """The unit as printed: where feedback and pre-activation are both negative, it gives |f|."""

    def advance(self, x: Tensor, seen: Any, rule: Rule) -> tuple[Tensor, State]:
        out, gate = super().advance(x, seen, rule)
        return out.abs(), gate


def toy(pool: str, *, bias: bool, unit: type[AdaReLU] = AdaReLU) -> tuple[list[Layer], float]:
    """Return conv-relu-conv-pool-fc without normalisation, and alpha of lemma A.1."""
    torch.manual_seed(3)
    if pool == "average":
        tail: list[Layer] = [unit(), AveragePool(6, 6), Flatten(4, 1, 1), Linear(4, 5)]
    else:
        tail = [AdaPool(), Flatten(4, 3, 3), Linear(36, 5)]
    layers = [Conv(2, 3), Shift(3), unit(), Conv(3, 4), Shift(4), *tail]
    for layer in layers:
        layer.double().requires_grad_(False)
    if bias:
        assert isinstance(layers[-1], Linear)
        nn.init.normal_(layers[-1].bias)
    return layers, 36.0 if pool == "average" else 1.0


def up(layers: Sequence[Layer], x: Tensor, *, adaptive: bool) -> tuple[Tensor, list[State]]:
    """Run forward with first-pass masks, or with masks of arbitrary feedback."""
    generator = torch.Generator().manual_seed(4)
    states: list[State] = []
    for layer in layers:
        seen = None
        if adaptive and isinstance(layer, AdaReLU | AdaPool):
            out = layer(x)
            seen = torch.randn(out.shape, generator=generator, dtype=x.dtype)
        x, state = layer.advance(x, seen, STILL)
        states.append(state)
    return x, states


def down(layers: Sequence[Layer], states: Sequence[State], y: Tensor) -> tuple[Tensor, Tensor]:
    """Run the feedback; return g(0) and eta(y, z), the sum of <b, z g>."""
    u, eta = y, torch.zeros(len(y), dtype=y.dtype)
    for layer, state in zip(reversed(layers), reversed(states), strict=True):
        if isinstance(layer, Shift):
            eta = eta + (u * layer.bias.view(-1, 1, 1)).flatten(1).sum(1)
        u, _ = layer.feedback(u, state, STILL)
    return u, eta


def residual(layers: Sequence[Layer], alpha: float, y: Tensor, *, adaptive: bool) -> Tensor:
    """Return alpha y.v - (g(0).x + eta'), which lemma A.1 says is 0."""
    x = torch.randn(len(y), 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    v, states = up(layers, x, adaptive=adaptive)
    g, eta = down(layers, states, y)
    assert isinstance(layers[-1], Linear)
    eta = eta + alpha * y @ layers[-1].bias
    return alpha * (y * v).sum(1) - (g * x).flatten(1).sum(1) - eta


@pytest.mark.parametrize("pool", ["adaptive", "average"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_lemma_a1_holds_for_any_label_and_any_masks(
    pool: str, bias: bool, adaptive: bool, dense: bool
) -> None:
    layers, alpha = toy(pool, bias=bias)
    y = torch.randn(5, 5, dtype=torch.float64) if dense else torch.eye(5, dtype=torch.float64)
    assert residual(layers, alpha, y, adaptive=adaptive).abs().max() < 1e-9


@pytest.mark.parametrize("pool", ["adaptive", "average"])
def test_lemma_a1_fails_with_the_printed_unit(pool: str) -> None:
    layers, alpha = toy(pool, bias=True, unit=PrintedReLU)
    y = torch.eye(5, dtype=torch.float64)
    assert residual(layers, alpha, y, adaptive=True).abs().max() > 1
    # With first-pass masks both forms are the same.
    assert residual(layers, alpha, y, adaptive=False).abs().max() < 1e-9


@pytest.mark.parametrize("adaptive", [False, True])
def test_softmax_is_the_posterior_of_the_generative_model(adaptive: bool) -> None:
    layers, _ = toy("adaptive", bias=False)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    v, states = up(layers, x.expand(5, -1, -1, -1), adaptive=False)
    if adaptive:
        v, states = up(layers, x, adaptive=True)
        states = [_repeated(state, 5) for state in states]
    g, eta = down(layers, states, torch.eye(5, dtype=torch.float64))
    energy = (g * x).flatten(1).sum(1) + eta
    assert torch.allclose(energy.softmax(0), v[0].softmax(0), rtol=1e-10, atol=0)


def _repeated(state: State, times: int) -> Any:
    if state is None:
        return None
    return type(state)(*(each if each is None else each.repeat(times, 1, 1, 1) for each in state))


# --- operators (T-cnnf-2, 4, 5, 6) --------------------------------------------------------------------


def test_adarelu_follows_its_table() -> None:
    unit = AdaReLU()
    f = torch.tensor([1.0, -1.0, 0.0])
    out, gate = unit.advance(f, None, Rule())
    assert isinstance(gate, Gate)
    assert out.tolist() == [1, 0, 0]
    assert gate.open.tolist() == [1, 0, 0]

    f = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0, -3.0, 0.0])
    g = torch.tensor([2.0, -2.0, -2.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    out, _ = unit.advance(f, g, STILL)
    assert out.tolist() == [1, -1, 0, 0, 0, 0, 0, 0]

    f = torch.tensor([1.0, 1.0, -1.0, -0.05, 2.0, 0.0], dtype=torch.float64)
    g = torch.tensor([1.0, -0.5, -1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    out, gate = unit.advance(f, g, Rule(eta=0.1))
    assert out.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.055, 0.0, 0.1], abs=1e-12)
    u = torch.arange(1.0, 7.0, dtype=torch.float64)
    back, seen = unit.feedback(u, gate, Rule())
    assert back.tolist() == [1, 0, 3, 4, 0, 6]
    assert seen is u


def test_adapool_follows_its_table() -> None:
    pool = AdaPool()
    cell = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).view(1, 1, 2, 2)
    u = torch.full((1, 1, 1, 1), 4.0)
    at_maximum, at_minimum = [[0, 0], [4, 0]], [[0, 4], [0, 0]]
    out, choice = pool.advance(cell, None, Rule())
    assert out.item() == 3
    assert pool.feedback(u, choice, Rule())[0].squeeze().tolist() == at_maximum
    for g, value, where in ((1.0, 3, at_maximum), (-1.0, -2, at_minimum), (0.0, 0, [[0, 0], [0, 0]])):
        out, choice = pool.advance(cell, torch.full((1, 1, 1, 1), g), Rule())
        assert out.item() == value
        back, seen = pool.feedback(u, choice, Rule())
        assert back.squeeze().tolist() == where
        assert seen is u


def test_unpooling_places_one_value_in_each_cell() -> None:
    x = torch.randn(2, 3, 6, 8)
    _, place = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    back = unpool(torch.ones(2, 3, 3, 4), place)
    cells = back.view(2, 3, 3, 2, 4, 2)
    assert (cells.sum((3, 5)) == 1).all()
    assert ((back == 0) | (back == 1)).all()


@pytest.mark.parametrize("net", NARROW)
def test_feedback_to_pixels_has_the_shape_of_images(net: str) -> None:
    model = narrow(net, 0, cycles=1)
    x = images(2)
    first, second = model.network.cycles(x, 1, model.rule)
    assert torch.equal(first.taps[0], 2 * x - 1)
    assert second.taps[0].shape == x.shape


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_feedback_of_a_convolution_is_its_adjoint(kernel: int, stride: int) -> None:
    conv = Conv(3, 4, kernel, stride).double().requires_grad_(False)
    a, b = torch.randn(2, 3, 6, 8, dtype=torch.float64), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    b = b[:, :, : 6 // stride, : 8 // stride]
    back, _ = conv.feedback(b, None, Rule())
    assert back.shape == a.shape
    assert (conv(a) * b).sum().item() == pytest.approx((a * back).sum().item(), rel=1e-12)


def test_normalisation_leaves_the_direction_and_a_unit_mean_square() -> None:
    u = 30 * torch.randn(2, 3, 5, 7, dtype=torch.float64)
    square = normalise(u).square().mean((2, 3))
    assert torch.allclose(square, torch.ones_like(square), rtol=1e-9, atol=0)
    assert torch.allclose(normalise(7 * u), normalise(u), rtol=1e-9, atol=0)
    assert torch.equal(normalise(torch.zeros(1, 2, 3, 3)), torch.zeros(1, 2, 3, 3))


def test_normalisation_has_the_right_gradient() -> None:
    u = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert autograd.gradcheck(normalise, (u,))
    assert autograd.gradgradcheck(normalise, (u,))
    norm = b2(GREY, width=0.125, hidden=(3,)).layers[1].double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert autograd.gradcheck(norm, (x,))
    assert autograd.gradgradcheck(norm, (x,))
    assert autograd.gradcheck(lambda bias: torch.func.functional_call(norm, {"bias": bias}, x), norm.bias)


# --- inference: a second implementation, in loops -----------------------------------------------------


def conv_loops(x: Array, weight: Array) -> Array:
    """Convolve (C, H, W) with (O, C, k, k), padded to keep the size."""
    outputs, channels, kernel, _ = weight.shape
    _, height, width = x.shape
    out = np.zeros((outputs, height, width))
    for o, i, j in product(range(outputs), range(height), range(width)):
        for a, b in product(range(kernel), range(kernel)):
            row, column = i + a - kernel // 2, j + b - kernel // 2
            if 0 <= row < height and 0 <= column < width:
                for c in range(channels):
                    out[o, i, j] += weight[o, c, a, b] * x[c, row, column]
    return out


def conv_back_loops(u: Array, weight: Array) -> Array:
    """Scatter each output's feedback to the inputs it was made from."""
    outputs, channels, kernel, _ = weight.shape
    _, height, width = u.shape
    out = np.zeros((channels, height, width))
    for o, i, j in product(range(outputs), range(height), range(width)):
        for a, b in product(range(kernel), range(kernel)):
            row, column = i + a - kernel // 2, j + b - kernel // 2
            if 0 <= row < height and 0 <= column < width:
                for c in range(channels):
                    out[c, row, column] += weight[o, c, a, b] * u[o, i, j]
    return out


def norm_loops(u: Array) -> Array:
    return np.stack([plane / math.sqrt((plane**2).sum() / plane.size + 1e-8) for plane in u])


class LiteralB2:
    """Net B.2's inference for one image, with its states on itself, from the definitions of the paper."""

    def __init__(self, model: CnnF, ind: int, eta: float) -> None:
        values = [each.detach().numpy() for each in model.parameters()]
        self.weights, self.biases = values[0::2], values[1::2]
        self.ind, self.eta = ind, eta
        self.relu_seen: list[Array | None] = [None] * 6
        self.relu_open: list[Array | None] = [None] * 6
        self.pool_seen: list[Array | None] = [None] * 2
        self.pool_sign: list[Array | None] = [None] * 2
        self.pool_place: list[dict[tuple[int, int, int], tuple[int, int]]] = [{}, {}]

    def unit(self, number: int, f: Array) -> Array:
        g = self.relu_seen[number]
        if g is None:
            self.relu_open[number] = np.where(f > 0, 1.0, 0.0)
        else:
            f = f + self.eta * (g - f)
            self.relu_open[number] = np.where(f * g > 0, 1.0, 0.0)
        return f * self.relu_open[number]

    def unit_back(self, number: int, u: Array) -> Array:
        self.relu_seen[number] = u
        opened = self.relu_open[number]
        assert opened is not None
        return u * opened

    def pool(self, number: int, x: Array) -> Array:
        channels, height, width = x.shape
        g = self.pool_seen[number]
        out = np.zeros((channels, height // 2, width // 2))
        sign = np.ones_like(out) if g is None else np.sign(g)
        for c, i, j in product(*map(range, out.shape)):
            cell = [(2 * i + a, 2 * j + b) for a, b in product(range(2), range(2))]
            if sign[c, i, j] > 0:
                best = max(cell, key=lambda at: x[c, at[0], at[1]])
            else:
                best = min(cell, key=lambda at: x[c, at[0], at[1]])
            self.pool_place[number][c, i, j] = best
            out[c, i, j] = x[c, best[0], best[1]] if sign[c, i, j] else 0.0
        self.pool_sign[number] = sign
        return out

    def pool_back(self, number: int, u: Array) -> Array:
        self.pool_seen[number] = u
        sign = self.pool_sign[number]
        assert sign is not None
        out = np.zeros((u.shape[0], 2 * u.shape[1], 2 * u.shape[2]))
        for (c, i, j), (row, column) in self.pool_place[number].items():
            if sign[c, i, j] != 0:
                out[c, row, column] = u[c, i, j]
        return out

    def forward(self, x: Array, first: bool) -> Array:
        """Run the net, from the features at `ind` if not first; note h_0 and the taps of the first pass."""
        if self.ind == 0 and first:
            self.features = [x]
        if first or self.ind == 0:
            x = self.unit(0, self.block(0, x))
        if self.ind == 1 and first:
            self.features = [x]
        if first or self.ind <= 1:
            x = self.unit(1, self.block(1, x))
        if self.ind == 2 and first:
            self.features = [x]
        x = self.unit(2, self.block(2, x))
        if first:
            self.features.append(x)
        x = self.unit(3, self.block(3, self.pool(0, x)))
        if first:
            self.features.append(x)
        x = self.pool(1, x).reshape(-1)
        x = self.unit(4, self.weights[4] @ x + self.biases[4])
        x = self.unit(5, self.weights[5] @ x + self.biases[5])
        out: Array = self.weights[6] @ x + self.biases[6]
        return out

    def block(self, number: int, x: Array) -> Array:
        return norm_loops(conv_loops(x, self.weights[number])) + self.biases[number][:, None, None]

    def back(self, v: Array) -> list[Array]:
        """Return g(k) and the taps."""
        u = self.unit_back(5, self.weights[6].T @ v)
        u = self.unit_back(4, self.weights[5].T @ u)
        u = (self.weights[4].T @ u).reshape(self.weights[3].shape[0], 2, 2)
        second = self.unit_back(3, self.pool_back(1, norm_loops(u)))
        u = norm_loops(conv_back_loops(second, self.weights[3]))
        first = self.unit_back(2, self.pool_back(0, u))
        u = conv_back_loops(first, self.weights[2])
        if self.ind <= 1:
            u = conv_back_loops(self.unit_back(1, norm_loops(u)), self.weights[1])
        if self.ind == 0:
            u = conv_back_loops(self.unit_back(0, norm_loops(u)), self.weights[0])
        return [u, first, second]


@pytest.mark.parametrize("ind", [0, 1, 2])
def test_net_b2_equals_its_literal_form(ind: int) -> None:
    model = narrow("b2", ind, eta=0.2)
    x = images(1)
    found = list(model.network.cycles(x, 3, model.rule))

    literal = LiteralB2(model, ind, 0.2)
    v = literal.forward(2 * x[0].numpy() - 1, first=True)
    h = literal.features[0]
    expected = [(v, literal.features)]
    for _ in range(3):
        taps = literal.back(v)
        h = h + 0.2 * (taps[0] - h)
        v = literal.forward(h, first=False)
        expected.append((v, taps))
    for pass_, (logits, taps) in zip(found, expected, strict=True):
        assert np.allclose(pass_.logits[0], logits, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(pass_.taps, taps, strict=True):
            assert np.allclose(mine[0], theirs, rtol=1e-9, atol=1e-12)
    # The check says something only if passes differ, and if units were closed, open and negative.
    assert not np.allclose(expected[1][0], expected[0][0], rtol=1e-2)


def literal_wrn(
    model: CnnF, x: Tensor, ind: int, cycles: int, eta: float
) -> list[tuple[Tensor, list[Tensor]]]:
    """Return logits and taps of every pass of WRN-40-2, from the paper's and the code's definitions."""
    named = {name.removeprefix("network.layers."): each for name, each in model.named_parameters()}
    conv, conv_t = torch.nn.functional.conv2d, torch.nn.functional.conv_transpose2d
    seen: dict[str, Tensor] = {}
    opened: dict[str, Tensor] = {}

    def norm(u: Tensor) -> Tensor:
        return u / ((u**2).mean((2, 3), keepdim=True) + 1e-8).sqrt()

    def unit(name: str, x: Tensor, bias: Tensor) -> Tensor:
        f = norm(x) + bias[None, :, None, None]
        if name in seen:
            f = f + eta * (seen[name] - f)
        opened[name] = (f * seen.get(name, torch.ones_like(f)) > 0).to(f.dtype)
        return f * opened[name]

    def unit_back(name: str, u: Tensor) -> Tensor:
        seen[name] = u
        return u * opened[name]

    def stride(block: int) -> int:
        return 2 if block in (7, 13) else 1

    def block(n: int, x: Tensor) -> Tensor:
        a = unit(f"{n}a", x, named[f"{n}.norm1.bias"])
        h = conv(a, named[f"{n}.conv1.weight"], stride=stride(n), padding=1)
        h = conv(unit(f"{n}b", h, named[f"{n}.norm2.bias"]), named[f"{n}.conv2.weight"], padding=1)
        shortcut = named.get(f"{n}.shortcut.weight")
        return h + (x if shortcut is None else conv(a, shortcut, stride=stride(n)))

    def block_back(n: int, u: Tensor) -> Tensor:
        s = stride(n)
        r = unit_back(f"{n}b", norm(conv_t(u, named[f"{n}.conv2.weight"], padding=1)))
        r = norm(conv_t(r, named[f"{n}.conv1.weight"], stride=s, padding=1, output_padding=s - 1))
        shortcut = named.get(f"{n}.shortcut.weight")
        if shortcut is None:
            return u + unit_back(f"{n}a", r)
        return unit_back(f"{n}a", r + conv_t(u, shortcut, stride=s, output_padding=s - 1))

    def head(x: Tensor) -> Tensor:
        pooled = unit("head", x, named["19.bias"]).mean((2, 3))
        return pooled @ named["24.weight"].T + named["24.bias"]

    def climb(x: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        groups = []
        for n in range(start, 19):
            x = block(n, x)
            if n in (6, 12, 18):
                groups.append(x)
        return head(x), groups

    passes = []
    h = x = 2 * x - 1
    if ind:
        h = conv(x, named["0.weight"], padding=1)
        for n in range(1, ind + 1):
            h = block(n, h)
        v, groups = climb(h, ind + 1)
        groups = groups if ind < 6 else [h, *groups]
    else:
        v, groups = climb(conv(x, named["0.weight"], padding=1), 1)
    passes.append((v, [h, *groups]))
    for _ in range(cycles):
        plane = x.shape[2] // 4
        u = (v @ named["24.weight"])[:, :, None, None].repeat(1, 1, plane, plane)
        u = unit_back("head", norm(u))
        groups = [u]
        for n in range(18, ind, -1):
            u = block_back(n, u)
            if n in (13, 7):
                groups.append(u)
        u = u if ind else conv_t(u, named["0.weight"], padding=1)
        h = h + eta * (u - h)
        v, _ = climb(h if ind else conv(h, named["0.weight"], padding=1), ind + 1 if ind else 1)
        passes.append((v, [u, *reversed(groups)]))
    return passes


@pytest.mark.parametrize("ind", [0, 1, 5, 6])
def test_wrn_equals_its_literal_form(ind: int) -> None:
    model = narrow("wrn-40-2", ind, eta=0.2)
    x = images(2)
    expected = literal_wrn(model, x, ind, 2, 0.2)
    for pass_, (logits, taps) in zip(model.network.cycles(x, 2, model.rule), expected, strict=True):
        assert torch.allclose(pass_.logits, logits, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(pass_.taps, taps, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected[1][0], expected[0][0], rtol=1e-2)


# --- inference: properties (T-cnnf-3, 7, 8, 11) -------------------------------------------------------


@pytest.mark.parametrize(("net", "ind"), PLACES)
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_without_cycles_it_is_the_plain_network_bit_for_bit(net: str, ind: int, eta: float) -> None:
    torch.manual_seed(0)
    model = CnnF(COLOUR, **NARROW[net], ind=ind, eta=eta, cycles=0).requires_grad_(False)
    plain = Cnn(COLOUR, **NARROW[net]).requires_grad_(False)
    plain.load_state_dict(model.state_dict(), strict=True)
    x = images(3).float()
    last, avg, twin = model.decide(x, "last"), model.decide(x, "avg"), plain.decide(x, "last")
    assert last.logits is not None
    assert avg.logits is not None
    assert twin.logits is not None
    assert torch.equal(last.logits, avg.logits)
    assert torch.equal(last.logits, twin.logits)
    assert torch.equal(last.logits, model.first().logits(x))
    # The first of several passes is the same too.
    started = next(model.network.cycles(x, 1, model.rule))
    assert torch.equal(started.logits, last.logits)


@pytest.mark.parametrize("net", NARROW)
def test_without_cycles_all_views_give_the_same_gradient(net: str) -> None:
    model = CnnF(COLOUR, **NARROW[net], ind=0, cycles=0).requires_grad_(False)
    y = torch.tensor([0, 1, 4])
    found = []
    for view in (model.first(), model.e2e_last(), model.e2e_avg(), model.sum(), model.bpda()):
        z = images(3).float().requires_grad_()
        (gradient,) = autograd.grad(objective(view, view.logits(z), y).sum(), z)
        found.append(gradient)
    assert all(torch.equal(each, found[0]) for each in found)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("ind", [0, 2])
@pytest.mark.parametrize("net", ["b2", "wrn-40-2"])
def test_feedback_does_not_see_the_scale_of_the_logits(net: str, ind: int) -> None:
    build = b2 if net == "b2" else wrn_40_2
    for epsilon, scale, tolerance in ((0.0, 0.2, 1e-9), (1e-8, 50.0, 1e-3)):
        torch.manual_seed(1)
        network = (
            build(Shape(3, 16, 16, 5), ind=ind, width=0.5, epsilon=epsilon).double().requires_grad_(False)
        )
        h = network.enter(images(2, Shape(3, 16, 16, 5)))
        up = network.ascend(h, None, Rule())
        v = scale * up.logits / up.logits.abs().amax(1, keepdim=True)
        one, ten = (network.descend(factor * v, up.states, Rule()).features for factor in (1, 10))
        assert one.isfinite().all()
        assert (one - ten).norm() < tolerance * one.norm()


@pytest.mark.parametrize(("net", "ind"), PLACES)
def test_a_step_of_one_replaces_the_features(net: str, ind: int) -> None:
    model = narrow(net, ind, cycles=1, eta=1.0)
    x = images(2)
    up = model.network.ascend(model.network.enter(x), None, model.rule)
    down = model.network.descend(up.logits, up.states, model.rule)
    greedy = model.network.ascend(down.features, down.seen, model.rule).logits
    assert torch.allclose(model.e2e_last().logits(x), greedy, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("net", "ind"), PLACES)
def test_answers_do_not_depend_on_what_was_asked_before_or_beside(net: str, ind: int) -> None:
    model = narrow(net, ind, cycles=2)
    x = images(5)
    once = model.e2e_last().logits(x)
    model.decide(images(3, seed=9), "avg")
    assert torch.equal(model.e2e_last().logits(x), once)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(model.e2e_last().logits(x[order]), once[order], rtol=0, atol=1e-9)
    alone = torch.cat([model.e2e_last().logits(each[None]) for each in x])
    assert torch.allclose(alone, once, rtol=0, atol=1e-9)


def test_readouts_are_the_last_pass_and_the_mean() -> None:
    model = narrow("b2", 2, cycles=3)
    x = images(4)
    passes = [each.logits for each in model.network.cycles(x, 3, model.rule)]
    last, avg = model.decide(x, "last"), model.decide(x, "avg")
    assert last.logits is not None
    assert avg.logits is not None
    assert torch.equal(last.logits, passes[3])
    assert torch.allclose(avg.logits, (passes[0] + passes[1] + passes[2] + passes[3]) / 4, rtol=1e-12)
    assert torch.equal(model.e2e_last().logits(x), last.logits)
    assert torch.equal(model.e2e_avg().logits(x), avg.logits)
    assert torch.equal(model.sum().logits(x), torch.stack(passes))
    assert torch.equal(avg.label, avg.logits.argmax(1))


def test_no_step_with_cycles_is_not_the_plain_network() -> None:
    model = narrow("b2", 2, cycles=1, eta=0.0)
    x = images(4)
    assert not torch.allclose(model.e2e_last().logits(x), model.first().logits(x), rtol=1e-2)


def test_the_first_view_builds_no_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    model = narrow("b2", 2)

    def refuse(*_: object) -> None:
        raise AssertionError("a feedback was prepared")

    for name in ("ascend", "descend", "cycles"):
        monkeypatch.setattr(Network, name, refuse)
    for layer in (AdaReLU, AdaPool, Conv, Linear, FeedbackNorm):
        monkeypatch.setattr(layer, "advance", refuse)
        monkeypatch.setattr(layer, "feedback", refuse)
    z = images(2).requires_grad_()
    (gradient,) = autograd.grad(model.first().logits(z).sum(), z)
    assert gradient.abs().max() > 0


# --- gradients (T-cnnf-9) -----------------------------------------------------------------------------


def answer(model: CnnF, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a weighted sum of the last logits, and every mask and every place of every pass."""
    network, rule = model.network, model.rule
    h = network.enter(x)
    up = network.ascend(h, None, rule)
    every = _discrete(up.states)
    for _ in range(model.cycles):
        down = network.descend(up.logits, up.states, rule)
        h = torch.lerp(h, down.features, rule.eta)
        up = network.ascend(h, down.seen, rule)
        every += _discrete(up.states)
    return (weight * up.logits).sum(), every


def _discrete(states: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for state in states:
        if isinstance(state, Tensor):
            found.append(state)
        elif isinstance(state, tuple):
            found += _discrete(state)
    return found


@pytest.mark.parametrize(("net", "ind"), PLACES)
def test_gradients_through_all_passes_equal_finite_differences(net: str, ind: int) -> None:
    model = narrow(net, ind, cycles=2)
    weight = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    x = images(2).requires_grad_()
    value, _ = answer(model, x, weight)
    view = model.e2e_last()
    assert torch.equal((weight * view.logits(x)).sum(), value)
    (gradient,) = autograd.grad((weight * view.logits(x)).sum(), x)
    generator = torch.Generator().manual_seed(8)
    step, checked = 1e-7, 0
    with torch.no_grad():
        for _ in range(20):
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            direction /= direction.norm()
            above, masks_above = answer(model, x + step * direction, weight)
            below, masks_below = answer(model, x - step * direction, weight)
            if not all(map(torch.equal, masks_above, masks_below)):
                continue  # A flipped mask makes the output jump: another direction.
            quotient = ((above - below) / (2 * step)).item()
            assert quotient == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
            checked += 1
            if checked == 4:
                break
    assert checked == 4


@pytest.mark.parametrize(("net", "ind"), PLACES)
def test_bpda_answers_exactly_and_differs_backwards(net: str, ind: int) -> None:
    model = narrow(net, ind, cycles=2)
    z = images(3).requires_grad_()
    exact = model.e2e_last().logits(z)
    heads = ("max", "tanh") if net == "wrn-40-2" else ("max",)
    for head in heads:
        smooth = model.bpda(temperature=0.5, head=head).logits(z)
        assert torch.equal(smooth, exact)
        (mine,) = autograd.grad(smooth[:, 0].sum(), z)
        (plain,) = autograd.grad(exact[:, 0].sum(), z, retain_graph=True)
        assert mine.isfinite().all()
        assert not torch.allclose(mine, plain, rtol=0.1)


def test_bpda_of_a_unit_is_the_gradient_of_its_sigmoid() -> None:
    torch.manual_seed(2)
    f, g = torch.randn(2, 40, dtype=torch.float64).requires_grad_()
    rule = Rule(eta=0.1, temperature=0.3)

    def smooth(f: Tensor, g: Tensor) -> Tensor:
        moved = f + 0.1 * (g - f)
        return moved * torch.sigmoid(moved * g / 0.3)

    out, gate = AdaReLU().advance(f, g, rule)
    assert torch.equal(out, AdaReLU().advance(f, g, rule._replace(temperature=None))[0])
    weight = torch.randn(40, dtype=torch.float64)
    found = autograd.grad((weight * out).sum(), (f, g), retain_graph=True)
    step = 1e-6
    for number, gradient in enumerate(found):
        shift = [step * (number == each) for each in range(2)]
        above, below = smooth(f + shift[0], g + shift[1]), smooth(f - shift[0], g - shift[1])
        assert torch.allclose(gradient, weight * (above - below) / (2 * step), rtol=1e-6, atol=1e-8)

    u = torch.randn(40, dtype=torch.float64, requires_grad=True)
    back, _ = AdaReLU().feedback(u, gate, rule)
    assert isinstance(gate, Gate)
    assert torch.equal(back, u * gate.open)
    (gradient,) = autograd.grad(back.sum(), u)
    moved = (f + 0.1 * (g - f)).detach()
    assert torch.allclose(gradient, torch.sigmoid(moved * g.detach() / 0.3))


def test_bpda_of_a_pool_weighs_both_ends_of_a_cell() -> None:
    cell = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).double().view(1, 1, 2, 2).requires_grad_()
    g = torch.full((1, 1, 1, 1), -0.2, dtype=torch.float64).requires_grad_()
    out, choice = AdaPool().advance(cell, g, Rule(temperature=0.5))
    assert out.item() == -2

    def smooth(highest: float, lowest: float, g: float) -> float:
        chance = 1 / (1 + math.exp(-g * (highest - lowest) / 0.5))
        return chance * highest + (1 - chance) * lowest

    to_cell, to_g = autograd.grad(out.sum(), (cell, g), retain_graph=True)
    step = 1e-6
    slopes = [
        (smooth(*(at + step * (n == k) for n, at in enumerate((3.0, -2.0, -0.2)))) - smooth(3.0, -2.0, -0.2))
        / step
        for k in range(3)
    ]
    assert to_cell.flatten().tolist() == pytest.approx([0, slopes[1], slopes[0], 0], rel=1e-4)
    assert to_g.item() == pytest.approx(slopes[2], rel=1e-4)

    u = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64, requires_grad=True)
    back, _ = AdaPool().feedback(u, choice, Rule(temperature=0.5))
    assert back.squeeze().tolist() == [[0, 4], [0, 0]]
    (to_u,) = autograd.grad((back * torch.tensor([[0.0, 10.0], [1.0, 0.0]])).sum(), u)
    chance = 1 / (1 + math.exp(0.2 * 5 / 0.5))
    assert to_u.item() == pytest.approx(chance + 10 * (1 - chance))


@pytest.mark.parametrize("head", ["max", "tanh"])
def test_bpda_of_the_head_is_the_gradient_of_its_stand_in(head: Literal["max", "tanh"]) -> None:
    u = torch.tensor([2.0, -0.05, 0.1], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
    out, _ = FeedbackNorm(constant=True).feedback(
        u.expand(1, 3, 4, 4), None, Rule(temperature=0.1, head=head)
    )
    assert torch.equal(out, normalise(u.expand(1, 3, 4, 4)))
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    (found,) = autograd.grad((weight * out)[..., :1, :1].sum(), u)
    stand_in = torch.tanh(u / 0.1) if head == "tanh" else u / u[:, :1].abs()
    (expected,) = autograd.grad((weight * stand_in).sum(), u)
    assert torch.allclose(found, expected)


def test_sum_averages_losses_and_not_logits() -> None:
    model = narrow("b2", 2, cycles=2)
    y = torch.tensor([0, 3, 1])
    z = images(3).requires_grad_()
    view = model.sum()
    logits = view.logits(z)
    assert logits.shape == (3, 3, 5)
    (found,) = autograd.grad(objective(view, logits, y).sum(), z)
    passes = [each.logits for each in model.network.cycles(z, 2, model.rule)]
    (expected,) = autograd.grad(sum(cross_entropy(each, y, reduction="sum") for each in passes) / 3, z)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(InputError, match="temperature: expected a number above 0, found 0"):
        typed(DEFENSES["cnnf"].views["bpda"], temperature=0.0)


# --- losses (T-cnnf-10) -------------------------------------------------------------------------------


def test_loss_without_cycles_is_half_the_attacked_cross_entropy() -> None:
    model = narrow("b2", 2, cycles=0, clean_weight=0.0, reconstruction=0.0)
    x, z, y = images(4), images(4, seed=2), torch.tensor([0, 1, 2, 3])
    attacked = cross_entropy(model.first().logits(z), y)
    assert model.loss(x, z, y).item() == pytest.approx(attacked.item() / 2, rel=1e-12)
    model.reconstruction = 0.1  # Weighs nothing without a feedback.
    assert model.loss(x, z, y).item() == pytest.approx(attacked.item() / 2, rel=1e-12)
    model.clean = False
    assert model.loss(x, z, y).item() == pytest.approx(attacked.item(), rel=1e-12)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("cycles", [1, 2])
def test_adversarial_loss_is_the_sum_it_is_defined_as(clean: bool, cycles: int) -> None:
    model = narrow("wrn-40-2", 5, cycles=cycles, clean=clean, clean_weight=0.05, reconstruction=0.1)
    x, z, y = images(4), images(4, seed=2), torch.tensor([0, 1, 2, 3])
    # As the released trainer has it: both kinds of images in one batch.
    both = list(model.network.cycles(torch.cat((x, z)), cycles, model.rule))
    expected = torch.zeros((), dtype=torch.float64)
    for each in both:
        if clean:
            expected += 0.05 * cross_entropy(each.logits[:4], y) / (2 * (cycles + 1))
            expected += cross_entropy(each.logits[4:], y) / (2 * (cycles + 1))
        else:
            expected += cross_entropy(each.logits[4:], y) / (cycles + 1)
    for each in both[1:]:
        assert len(each.taps) == 4
        for feature, back in zip(both[0].taps, each.taps, strict=True):
            expected += 0.1 / (4 * cycles) * mse_loss(back[4:], feature[:4])
    assert model.loss(x, z, y).item() == pytest.approx(expected.item(), rel=1e-9)


def test_gradients_flow_into_the_clean_features_too() -> None:
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    back = torch.randn(2, 3, 4, 4, requires_grad=True)
    v, y = torch.zeros(2, 5), torch.tensor([0, 1])
    loss = adversarial_loss([], [v, v], y, [feature], [[back]], clean_weight=0, reconstruction=0.1)
    to_feature, to_back = autograd.grad(loss, (feature, back))
    assert torch.allclose(to_back, 0.1 * 2 * (back - feature).detach() / feature.numel())
    assert torch.equal(to_feature, -to_back)


def test_standard_loss_is_the_mean_over_passes() -> None:
    model = narrow("b1", 0, cycles=2, training="standard")
    x, y = images(3), torch.tensor([0, 1, 2])
    first, second, third = model.network.cycles(x, 2, model.rule)
    expected = sum(cross_entropy(each.logits, y) for each in (first, second, third)) / 3
    expected += 0.1 * (mse_loss(second.taps[0], 2 * x - 1) + mse_loss(third.taps[0], 2 * x - 1)) / 2
    assert model.loss(x, None, y).item() == pytest.approx(expected.item(), rel=1e-9)
    alone = standard_loss([first.logits], y, first.taps, [], reconstruction=0.1)
    assert alone.item() == pytest.approx(cross_entropy(first.logits, y).item(), rel=1e-12)


def test_taps_may_be_the_input_alone() -> None:
    model = narrow("b2", 1, cycles=1, taps="input", clean=False)
    x, z, y = images(4), images(4, seed=2), torch.tensor([0, 1, 2, 3])
    clean, attacked = (list(model.network.cycles(each, 1, model.rule)) for each in (x, z))
    expected = (cross_entropy(attacked[0].logits, y) + cross_entropy(attacked[1].logits, y)) / 2
    expected += 0.1 * mse_loss(attacked[1].taps[0], clean[0].taps[0])
    assert model.loss(x, z, y).item() == pytest.approx(expected.item(), rel=1e-9)
