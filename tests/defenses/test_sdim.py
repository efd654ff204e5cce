"""SDIM and its twin against closed forms, torch's distributions, loops, and what the papers count."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask
from safetensors.torch import save_file
from torch import Tensor, autograd, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import cross_entropy, relu

from bench import Features, InputError, Shape, Split, TrainingError, objective, view_of
from bench.registry import DEFENSES
from bench.runner.training import Trainer
from bench.testing import check_defense
from defenses.nets.sdim import encoder, infomax
from defenses.nets.sdim.best_epoch import Kept
from defenses.nets.sdim.infomax import Pairs, information_loss, margin_loss
from defenses.sdim import Sdim
from defenses.sdim_twin import SdimTwin

GREY, COLOUR = Shape(1, 32, 32, 3), Shape(3, 32, 32, 10)
SMALL: dict[str, Any] = {"width": 0.125, "features": 8}
QUICK = {**SMALL, "margin_gap": 2.0, "lr": 0.01}
LOG2 = math.log(2)


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(make: type[nn.Module], shape: Shape, seed: int = 0, **params: Any) -> Any:
    torch.manual_seed(seed)
    return make(shape, **params)


def made(count: int, seed: int = 0, noise: float = 0.15) -> Split:
    """Return images of three classes: a bright band at the top, in the middle or at the bottom."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = noise * torch.rand(count, 1, 32, 32, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top = 10 * label + int(torch.randint(3, (), generator=generator))
        image[:, top : top + 8] += 0.7
    return Split(images, labels, torch.arange(count), "made")


def fitting(split: Split, keep: Path | None = None, progress: Any = None) -> Trainer:
    return Trainer(split, "key", torch.device("cpu"), keep=keep, progress=progress)


@pytest.fixture(scope="module")
def trained() -> tuple[Sdim, Split]:
    """Return a small SDIM that was fitted, and the 3 x 120 images that it was fitted on."""
    split = made(360, noise=0.3)
    model = built(Sdim, GREY, **QUICK, epochs=8, batch=24)
    model.fit(split, fitting(split))
    return model, split


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "channels", "params", "count", "twin"),
    [
        (1, 1, {}, 1_465_120, 1_250_794),
        (3, 3, {}, 4_602_976, 4_388_650),
        (1, 1, {"critic": "concat"}, 1_414_177, 1_250_794),
        (3, 3, {"critic": "concat"}, 4_552_033, 4_388_650),
        (1, 1, {"critic": "concat", "head": "linear"}, 1_347_873, 1_184_490),
        (3, 3, {"critic": "concat", "head": "linear"}, 4_485_729, 4_322_346),
    ],
)
def test_parameters_are_as_many_as_counted(
    n: int, channels: int, params: dict[str, Any], count: int, twin: int
) -> None:  # T-sdim-6
    shape = Shape(channels, 32, 32, 10)
    with torch.device("meta"):
        model = Sdim(shape, n=n, **params)
        other = SdimTwin(shape, n=n, head=params.get("head", "two-layer"))
    assert sum(each.numel() for each in model.parameters()) == count
    assert sum(each.numel() for each in other.parameters()) == twin


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_encoder_has_8n_plus_2_layers(n: int) -> None:
    network = encoder.Encoder(3, 7, n=n, width=0.125, head="linear")
    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert len(layers) == 8 * n + 2
    maps = network.maps(torch.rand(2, 3, 32, 32))
    assert maps.second.shape == (2, 8, 16, 16)
    assert maps.last.shape == (2, 32, 4, 4)
    assert maps.code.shape == (2, 7)


def test_a_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    block = encoder.Block(4, 8, 2).eval()
    nn.init.zeros_(block.norm2.weight)  # Nothing but the shortcut is left.
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert not out[:, :2].any()
    assert not out[:, 6:].any()
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    plain = encoder.Block(4, 4, 1).eval()
    nn.init.zeros_(plain.norm2.weight)
    assert torch.equal(plain(x), x)


def test_a_block_is_what_it_is_defined_as() -> None:
    block = encoder.Block(4, 8, 2).double()
    x = drawn((5, 4, 6, 6))
    inner = torch.nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1)
    inner = (inner - inner.mean((0, 2, 3), True)) / (inner.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    inner = torch.nn.functional.conv2d(relu(inner), block.conv2.weight, padding=1)
    inner = (inner - inner.mean((0, 2, 3), True)) / (inner.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    inner[:, 2:6] += x[:, :, ::2, ::2]
    assert torch.allclose(block(x), relu(inner), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.3])
def test_any_width_can_be_built(width: float) -> None:
    network = encoder.Encoder(1, 5, n=2, width=width, head="two-layer").eval()
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_initial_weights_are_kaimings_in_the_encoder_alone() -> None:
    model = built(Sdim, COLOUR)
    for module in model.network.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.1)
    critic = model.network.critic
    for module in (critic.code, critic.local):
        shortcut = module.shortcut.weight.squeeze()
        diagonal = torch.eye(*shortcut.shape).bool()
        assert (shortcut[diagonal] == 1).all()
        assert shortcut[~diagonal].abs().max() <= 0.01
        assert shortcut[~diagonal].std().item() == pytest.approx(0.01 / 3**0.5, rel=0.1)
        # torch's own: uniform, up to 1 / sqrt(inputs).
        assert module.conv2.weight.abs().max() <= 256**-0.5
    assert model.network.gaussians.weight.std().item() == pytest.approx(1, rel=0.1)


# --- likelihoods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diagonal", "isotropic"])
def test_logits_are_the_log_densities_of_gaussians(covariance: Any) -> None:  # T-sdim-3
    model = built(Sdim, COLOUR, **SMALL, covariance=covariance).double().eval().requires_grad_(False)
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    code = model.network.encoder(x)
    table = model.network.gaussians.weight
    assert table.shape == (10, 16 if covariance == "diagonal" else 9)
    deviation = table[:, 8:].exp().expand(10, 8)
    expected = Independent(Normal(table[:, :8], deviation), 1).log_prob(code[:, None])
    logits = model.logits().logits(x)
    assert torch.allclose(logits, expected, rtol=1e-10, atol=0)
    # The answer is the likeliest class, whatever is added to all.
    for shift in (0.0, -400.0, 1e4):
        assert torch.equal((logits + shift).argmax(1), model.decide(x, "plain").label)


@pytest.mark.parametrize(("deviation", "residual"), [(-8.4, 0.0), (-8.9, 1.0)])
def test_logits_near_480_say_how_narrow_the_gaussians_are(deviation: float, residual: float) -> None:
    model = built(Sdim, COLOUR, width=0.125).double().requires_grad_(False)
    mean, spread = model.network.gaussians.weight.tensor_split(2, 1)
    spread.fill_(deviation)
    # In every dimension as far from the mean of class 3 as `residual` deviations.
    code = mean[3:4] + residual * math.exp(deviation)
    closed = 64 * (-0.5 * math.log(2 * math.pi) - deviation - 0.5 * residual**2)
    assert model.network.likelihoods(code)[0, 3].item() == pytest.approx(closed, rel=1e-6)
    assert closed == pytest.approx(480, abs=2)


# --- mutual information -------------------------------------------------------------------------------


def literal(scores: Tensor) -> float:
    """Return J_MI of scores (B, B, P), as it is written."""
    count, _, positions = scores.shape
    foreign, own = [], []
    for i, j, p in product(range(count), range(count), range(positions)):
        u = scores[i, j, p].item()
        low = math.log1p(math.exp(-abs(u))) + max(-u, 0)  # softplus(-u)
        (own if i == j else foreign).append(LOG2 - low if i == j else low + u - LOG2)
    return sum(foreign) / len(foreign) - sum(own) / len(own)


def paired(scores: Tensor) -> Pairs:
    return Pairs(torch.einsum("iip->ip", scores), infomax.off_diagonal(scores))


def test_scores_of_zero_tell_nothing() -> None:  # T-sdim-4
    zero = torch.zeros(5, 5, 3, dtype=torch.float64)
    assert information_loss(paired(zero)).item() == pytest.approx(0, abs=1e-15)


def test_the_bound_of_mutual_information_ends_at_twice_log_2() -> None:  # T-sdim-4
    scores = torch.full((5, 5, 3), -50.0, dtype=torch.float64)
    scores[range(5), range(5)] = 50
    assert information_loss(paired(scores)).item() == pytest.approx(-2 * LOG2, rel=1e-12)
    assert information_loss(paired(-scores)).item() == pytest.approx(100 - 2 * LOG2, rel=1e-12)
    assert information_loss(paired(20 * scores.float())).item() == pytest.approx(-2 * LOG2, rel=1e-6)


def test_the_order_of_a_batch_does_not_matter() -> None:  # T-sdim-4
    scores = 3 * drawn((6, 6, 4))
    value = information_loss(paired(scores)).item()
    assert value == pytest.approx(literal(scores), rel=1e-12)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert information_loss(paired(scores[order][:, order])).item() == pytest.approx(value, rel=1e-12)
    # Joint: with only one of the two permuted, own pairs are foreign.
    assert information_loss(paired(scores[order])).item() != pytest.approx(value, rel=1e-3)


def test_off_diagonal_leaves_out_the_diagonal_alone() -> None:
    scores = torch.arange(2 * 16).view(4, 4, 2)
    expected = [scores[i, j].tolist() for i, j in product(range(4), range(4)) if i != j]
    assert infomax.off_diagonal(scores).tolist() == expected


def projection(net: infomax.Projection, x: Tensor) -> Tensor:
    """Return (N, positions, units), from the definition, in training."""
    inner = torch.einsum("ui,nihw->nuhw", net.conv1.weight[..., 0, 0], x)
    inner = (inner - inner.mean((0, 2, 3), True)) / (inner.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    out = torch.einsum("vu,nuhw->nvhw", net.conv2.weight[..., 0, 0], inner.clamp_min(0))
    out = out + net.conv2.bias.view(-1, 1, 1)
    out = out + torch.einsum("ui,nihw->nuhw", net.shortcut.weight[..., 0, 0], x)
    out = (out - out.mean(1, True)) / (out.var(1, False, keepdim=True) + 1e-5).sqrt()
    return out.flatten(2).transpose(1, 2)


def test_dot_scores_are_products_of_both_projections() -> None:
    model = built(Sdim, GREY, **SMALL).double()
    maps = model.network.encoder.maps(torch.rand(4, 1, 32, 32, dtype=torch.float64))
    critic = model.network.critic
    code, local = projection(critic.code, maps.code[..., None, None]), projection(critic.local, maps.second)
    scores = torch.zeros(4, 4, 256, dtype=torch.float64)
    for i, j, p in product(range(4), range(4), range(256)):
        scores[i, j, p] = code[i, 0] @ local[j, p]
    assert information_loss(critic(maps)).item() == pytest.approx(literal(scores), rel=1e-9)


def test_concat_scores_are_those_of_a_map_and_a_code_at_each_position() -> None:
    model = built(Sdim, GREY, **SMALL, critic="concat", negatives="all").double()
    maps = model.network.encoder.maps(torch.rand(3, 1, 32, 32, dtype=torch.float64))
    critic = model.network.critic
    first, _, second, _, third = critic.net
    scores = torch.zeros(3, 3, 16, dtype=torch.float64)
    for i, j, p in product(range(3), range(3), range(16)):
        h = torch.cat((maps.last[i, :, p // 4, p % 4], maps.code[j]))
        for layer in (first, second):
            h = relu(layer.weight[..., 0, 0] @ h + layer.bias)
        scores[i, j, p] = (third.weight[..., 0, 0] @ h + third.bias).item()
    assert information_loss(critic(maps)).item() == pytest.approx(literal(scores), rel=1e-9)


@pytest.mark.parametrize("name", ["dot", "concat"])
def test_a_shuffle_pairs_every_code_with_one_foreign_map(name: Any) -> None:  # D-48
    model = built(Sdim, GREY, **SMALL, critic=name, negatives="shuffle").double()
    maps = model.network.encoder.maps(torch.rand(4, 1, 32, 32, dtype=torch.float64))
    critic = model.network.critic
    critic.negatives = "all"
    own, foreign = critic(maps)
    critic.negatives = "shuffle"
    torch.manual_seed(5)
    found = critic(maps)
    torch.manual_seed(5)
    partner = infomax.others(4, torch.device("cpu"))
    assert torch.allclose(found.own, own, rtol=1e-9)
    whole = torch.zeros(4, 4, own.shape[1], dtype=torch.float64)
    for row, (i, j) in enumerate((i, j) for i, j in product(range(4), range(4)) if i != j):
        # `dot` has the code first, `concat` the map.
        whole[(i, j) if name == "dot" else (j, i)] = foreign[row]
    assert torch.allclose(found.foreign, whole[range(4), partner], rtol=1e-9)


def test_no_image_is_its_own_partner() -> None:
    torch.manual_seed(0)
    for count in (2, 3, 10):
        seen = set()
        for _ in range(50):
            partner = infomax.others(count, torch.device("cpu"))
            assert (partner != torch.arange(count)).all()
            assert sorted(partner.tolist()) == list(range(count))
            seen.add(tuple(partner.tolist()))
        assert len(seen) == {2: 1, 3: 2}.get(count, 50)


def test_critics_have_the_negatives_of_their_source_unless_told() -> None:
    asked = [("dot", None), ("concat", None), ("dot", "shuffle"), ("concat", "all")]
    found = [
        built(Sdim, GREY, **SMALL, critic=name, negatives=each).network.critic.negatives
        for name, each in asked
    ]
    assert found == ["all", "shuffle", "shuffle", "all"]


# --- supervised terms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
def test_both_margins_differ_by_a_factor_and_a_constant(classes: int) -> None:  # T-sdim-5
    likelihoods, y = 12 * drawn((40, classes)), torch.arange(40) % classes
    paper, code = (margin_loss(likelihoods, y, 10.0, form).item() for form in ("paper", "code"))
    assert code == pytest.approx((classes - 1) / classes * paper + 100 / classes, rel=1e-12)
    total = 0.0
    for row, label in zip(likelihoods.tolist(), y.tolist(), strict=True):
        for c in range(classes):
            total += max(row[c] + 10 - row[label], 0) ** 2 if c != label else 0
    assert paper == pytest.approx(total / 40 / (classes - 1), rel=1e-12)


def test_a_margin_that_is_held_costs_nothing_in_print_and_a_constant_in_code() -> None:  # T-sdim-5
    y = torch.arange(7)
    likelihoods = torch.zeros(7, 10).scatter_(1, y[:, None], 10.0)
    likelihoods[:, 8] = -300
    assert margin_loss(likelihoods, y, 10.0, "paper").item() == 0
    assert margin_loss(likelihoods, y, 10.0, "code").item() == pytest.approx(10)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    x, y = torch.rand(6, 1, 32, 32), torch.arange(6) % 3
    for scale, margin in product((True, False), ("paper", "code")):
        model = built(Sdim, GREY, **SMALL, margin=margin, scale_loss=scale)
        maps = model.network.encoder.maps(x)
        likelihoods = model.network.likelihoods(maps.code) / (8 if scale else 1)
        parts = [
            information_loss(model.network.critic(maps)),
            -likelihoods[range(6), y].mean(),
            margin_loss(likelihoods, y, 10.0, margin),
        ]
        assert model.loss(x, y).item() == pytest.approx(sum(parts).item(), rel=1e-5)
        for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 0.25)):
            model.mi_weight, model.nll_weight, model.margin_weight = weights
            expected = sum(weight * part for weight, part in zip(weights, parts, strict=True)).item()
            assert model.loss(x, y).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_the_loss_has_the_gradient_of_its_differences(critic: Any) -> None:
    model = built(Sdim, GREY, **SMALL, critic=critic).double()
    x, y = torch.rand(4, 1, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    parameters = list(model.network.parameters())

    def value() -> Tensor:
        torch.manual_seed(0)  # The same shuffle.
        found: Tensor = model.loss(x, y)
        return found

    gradients = autograd.grad(value(), parameters)
    ways = [drawn(tuple(each.shape), seed) for seed, each in enumerate(parameters)]
    step = 1e-6

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter += by * way
            return value().item()

    above = moved(step)
    below = moved(-2 * step)
    slope = sum((gradient * way).sum().item() for gradient, way in zip(gradients, ways, strict=True))
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-3)


# --- thresholds and refusal ---------------------------------------------------------------------------


def test_thresholds_refuse_the_share_that_they_are_made_for(trained: tuple[Sdim, Split]) -> None:
    model, split = trained  # T-sdim-1
    plain = model.decide(split.images, "plain")
    right = plain.label == split.labels
    assert plain.logits is not None
    for row, share in ((0, 0.01), (1, 0.02)):
        answer = model.decide(split.images, f"reject-{row + 1}")
        assert answer.logits is not None
        assert answer.thresholds is not None
        assert torch.equal(answer.thresholds, model.thresholds[row])
        for label in range(3):
            own = right & (split.labels == label)
            count = int(own.sum())
            assert count > 100  # Else neither percentile refuses anything.
            below = answer.logits[own, label] < model.thresholds[row, label]
            assert len(set(answer.logits[own, label].tolist())) == count  # No ties.
            assert below.sum() == int(share * count)
            assert (answer.rejected[own] == below).all()


def test_more_is_refused_at_a_higher_percentile(trained: tuple[Sdim, Split]) -> None:  # T-sdim-2
    model, split = trained
    assert (model.thresholds[0] <= model.thresholds[1]).all()
    likelihoods = model.decide(split.images, "plain").logits
    assert likelihoods is not None
    right = likelihoods.argmax(1) == split.labels
    best = likelihoods.amax(1)
    refused = []
    for share in (0.0, 0.01, 0.02, 0.1, 0.5, 0.99):
        floors = [floor for _, floor in infomax.thresholds(likelihoods, split.labels, share)]
        below = best < torch.stack([each for each in floors if each is not None])[likelihoods.argmax(1)]
        refused.append(below.float().mean().item())
        if share == 0:
            assert not below[right].any()
    assert refused == sorted(refused)
    assert refused[-1] > 0.8
    other = made(60, seed=1, noise=0.6)
    one, two = (model.decide(other.images, name).rejected for name in ("reject-1", "reject-2"))
    assert (two | ~one).all()


def test_thresholds_are_order_statistics_of_what_is_right() -> None:
    # Class 0: right answers 3, 1, 2 and a wrong one; class 1: one right; class 2: none; class 3: no image.
    likelihoods = torch.full((8, 4), -9.0)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    likelihoods[range(8), y] = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 4.0, 0.0, 0.0])
    likelihoods[[3, 5, 6, 7], [1, 0, 0, 1]] = 50

    def found(share: float) -> list[float | None]:
        each = infomax.thresholds(likelihoods, y, share)
        return [None if value is None else value.item() for _, value in each]

    assert found(0.0) == [1.0, 5.0, None, None]
    assert found(0.33) == [1.0, 5.0, None, None]
    assert found(0.34) == [2.0, 5.0, None, None]
    assert found(0.67) == [3.0, 5.0, None, None]


def test_an_answer_at_its_threshold_is_accepted(trained: tuple[Sdim, Split]) -> None:
    model, split = trained
    x = split.images[:1]
    before = states(model)
    try:
        answer = model.decide(x, "plain")
        for level, refused in (
            (answer.score, False),
            (answer.score.nextafter(torch.tensor(torch.inf)), True),
        ):
            model.thresholds[1, answer.label] = level
            found = model.decide(x, "reject-2")
            assert found.rejected.item() is refused
            assert torch.equal(found.label, answer.label)
            seen = model.reject_2().logits(x).argmax(1)
            assert seen.item() == (3 if refused else answer.label.item())
    finally:
        model.load_state_dict(before)


def test_scores_let_thresholds_be_redrawn(trained: tuple[Sdim, Split]) -> None:
    model, _ = trained
    x = made(30, seed=3, noise=0.6).images
    plain, one, two = (model.decide(x, name) for name in ("plain", "reject-1", "reject-2"))
    assert plain.logits is not None
    assert torch.equal(plain.score, plain.logits.amax(1))
    assert not plain.rejected.any()
    assert plain.thresholds is None
    for answer in (one, two):
        assert answer.thresholds is not None
        assert torch.equal(answer.rejected, answer.score < 0)
        assert torch.equal(answer.score, plain.score - answer.thresholds[plain.label])
        assert torch.equal(answer.label, plain.label)


def test_thresholds_do_not_depend_on_how_many_images_are_asked_at_once(trained: tuple[Sdim, Split]) -> None:
    model, split = trained
    whole, rows = model.thresholds.clone(), model.rows
    model.rows = 7
    model.calibrate(split.images, split.labels)
    assert torch.allclose(model.thresholds, whole, rtol=1e-4, atol=1e-3)
    model.rows = rows
    model.calibrate(split.images, split.labels)
    assert torch.equal(model.thresholds, whole)


def test_thresholds_of_a_class_need_a_right_answer_in_it() -> None:
    model = built(Sdim, GREY, **SMALL).eval().requires_grad_(False)
    x = torch.rand(12, 1, 32, 32)
    model.network.gaussians.weight[1, :8] = 100.0  # Nobody's class.
    labels = torch.arange(12) % 3
    labels[labels == 0] = 2
    with pytest.raises(InputError, match="class 0 has no threshold: there is no training image of it"):
        model.calibrate(x, labels)
    guesses = model.decide(x, "plain").label
    assert not (guesses == 1).any()
    labels = torch.where(torch.arange(12) < 4, 1, guesses)
    labels[4:6] = torch.tensor([0, 2])
    model.network.gaussians.weight[0] = model.network.gaussians.weight[2]
    guesses = model.decide(x, "plain").label  # A tie of classes 0 and 2: the first.
    assert (guesses == 0).all()
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2])
    with pytest.raises(InputError, match=r"class 1 .*: none of its 4 training images .*train longer"):
        model.calibrate(x, labels)
    assert not model.calibrated


def test_a_class_without_images_is_told_before_the_training() -> None:
    split = made(24)
    model = built(Sdim, GREY, **SMALL, epochs=1)
    model.loss = lambda *_: pytest.fail("trained")
    lacking = Split(split.images, split.labels.clamp(max=1), split.index, "lacking")
    with pytest.raises(InputError, match="class 2 has no threshold: there is no training image of it"):
        model.fit(lacking, fitting(lacking))


def test_nothing_can_be_refused_without_thresholds() -> None:
    model = built(Sdim, GREY, **SMALL).eval().requires_grad_(False)
    x = torch.rand(2, 1, 32, 32)
    assert not model.decide(x, "plain").rejected.any()
    sentence = "these weights of sdim have no thresholds"
    for readout in ("reject-1", "reject-2"):
        with pytest.raises(InputError, match=sentence):
            model.decide(x, readout)
        with pytest.raises(InputError, match=sentence):
            view_of(model, readout)
    for name in ("accept-1", "accept-2", "reject", "accept"):
        with pytest.raises(InputError, match=sentence):
            view_of(model, name)


# --- views --------------------------------------------------------------------------------------------


def test_views_show_what_they_say(trained: tuple[Sdim, Split]) -> None:
    model, split = trained
    x = split.images[:5]
    likelihoods = model.network(x)
    assert torch.equal(view_of(model, "logits").logits(x), likelihoods)
    assert torch.equal(view_of(model, "plain").logits(x), likelihoods)
    assert torch.equal(view_of(model, "scaled").logits(x), likelihoods / 8)
    features = view_of(model, "features")
    assert isinstance(features, Features)
    assert torch.equal(features.logits(x), likelihoods)
    found = features.described(x)
    assert torch.equal(found.features, model.network.encoder(x))
    assert torch.equal(found.logits, features.logits(x))
    for row, suffix in ((0, ""), (0, "-1"), (1, "-2")):
        floor = model.thresholds[row]
        reject, accept = view_of(model, f"reject{suffix}"), view_of(model, f"accept{suffix}")
        assert reject.refusal
        assert torch.equal(reject.logits(x)[:, :3], likelihoods)
        assert torch.equal(reject.logits(x)[:, 3], floor[likelihoods.argmax(1)])
        assert not accept.refusal
        assert not accept.centred
        assert torch.equal(accept.logits(x), likelihoods - floor)


def test_the_cross_entropy_saturates_where_the_margin_does_not() -> None:  # T-sdim-7
    model = built(Sdim, GREY, width=0.125).eval().requires_grad_(False)
    model.network.gaussians.weight[:, 64:] = -2.0
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = model.decide(x, "plain").label
    best = model.network(x).topk(2, dim=1).values
    assert ((best[:, 0] - best[:, 1]) > 200).all()

    def gradient(name: str, loss: Any, kind: torch.dtype = torch.float32) -> Tensor:
        z = x.to(kind, copy=True).requires_grad_()
        view = view_of(model.to(kind), name)
        (found,) = autograd.grad(objective(view, view.logits(z), y, loss).sum(), z)
        model.float()
        return found.flatten(1).norm(dim=1)

    assert (gradient("logits", "ce") == 0).all()
    assert (gradient("logits", "margin") > 0).all()
    assert (gradient("scaled", "ce") > 0).all()


@pytest.mark.parametrize(("gap", "alive"), [(103, True), (104, False), (200, False)])
def test_float32_has_no_gradient_beyond_a_gap_of_104_nats(gap: int, alive: bool) -> None:  # T-sdim-7
    y = torch.tensor([0])
    for kind, expected in ((torch.float32, alive), (torch.float64, True)):
        logits = torch.tensor([[float(gap), 0.0, -500.0]], dtype=kind, requires_grad=True)
        (found,) = autograd.grad(cross_entropy(logits, y), logits)
        assert bool(found[0, 1] > 0) is expected
        (found,) = autograd.grad((logits[:, 1] - logits[:, 0]).sum(), logits)
        assert found.tolist() == [[-1, 1, 0]]


# --- what is declared ---------------------------------------------------------------------------------


def refusing_half(model: Sdim) -> None:
    """Set thresholds that some of the kit's images are below, and some above."""
    x = torch.empty(6, 3, 32, 32).uniform_(generator=torch.Generator().manual_seed(0))
    best = model.decide(x, "plain").score.sort().values
    model.thresholds[0] = (best[1] + best[2]) / 2
    model.thresholds[1] = (best[3] + best[4]) / 2
    model.calibrated.fill_(True)
    assert int(model.decide(x, "reject-1").rejected.sum()) == 2
    assert int(model.decide(x, "reject-2").rejected.sum()) == 4


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"critic": "concat", "head": "linear", "n": 2},
        {"covariance": "isotropic", "margin": "paper", "scale_loss": False},
    ],
)
def test_sdim_is_what_it_declares(params: dict[str, Any]) -> None:
    unfitted = "ten classes that are told apart, so that each has its thresholds, take thousands of steps"
    check_defense("sdim", COLOUR, prepare=refusing_half, unfitted=unfitted, **SMALL, **params)
    two = Shape(3, 32, 32, 2)
    check_defense("sdim", two, prepare=refusing_half, **QUICK, epochs=8, batch=4, **params)


@pytest.mark.parametrize("head", ["two-layer", "linear"])
def test_the_twin_is_what_it_declares(head: str) -> None:
    check_defense("sdim-twin", COLOUR, width=0.125, head=head, epochs=2)


def asked(name: str, shape: Shape = COLOUR, **params: Any) -> None:
    """Do what a plan does with the parameters."""
    ask(name, shape, **params)


@pytest.mark.parametrize("name", ["sdim", "sdim-twin"])
@pytest.mark.parametrize(
    ("side", "last"), [((28, 28), "4x4"), ((8, 8), "1x1"), ((64, 64), "8x8"), ((32, 48), "4x6")]
)
def test_maps_must_be_those_of_32x32_images(name: str, side: tuple[int, int], last: str) -> None:
    asked(name)
    with pytest.raises(InputError, match=f"at last {last}; set resize: 32 on the data"):
        asked(name, Shape(1, *side, 10))
    with pytest.raises(InputError, match="resize: 32"):
        DEFENSES[name].make(Shape(1, *side, 10))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"n": 0}, "n: expected a number of 1 or more, found 0"),
        ({"width": 0.0}, "width: expected a number above 0, found 0.0"),
        ({"epochs": 0}, "epochs: .* 1 or more"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
    ],
)
@pytest.mark.parametrize("name", ["sdim", "sdim-twin"])
def test_wrong_parameters_are_told(name: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        asked(name, **params)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"features": 0}, "features: expected a number of 1 or more"),
        ({"margin_gap": -1.0}, "margin_gap: expected a number of 0 or more, found -1"),
        ({"mi_weight": float("inf")}, "mi_weight: expected a finite number, found inf"),
        ({"thresholds": "weights"}, "thresholds: those of weights: are asked for, and there are no weights"),
        ({"weights": "nowhere.safetensors"}, "weights: no such file"),
    ],
)
def test_wrong_parameters_of_sdim_are_told(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        asked("sdim", **params)


# --- weights that others made -------------------------------------------------------------------------


def test_weights_are_loaded_and_given_thresholds(trained: tuple[Sdim, Split], tmp_path: Path) -> None:
    model, split = trained
    for name, part in (("whole", model), ("network", model.network)):
        file = str(tmp_path / f"{name}.safetensors")
        save_file(states(part), file)
        asked("sdim", GREY, **SMALL, weights=file, epochs=0)
        other = built(Sdim, GREY, 9, **SMALL, weights=file, epochs=0)
        other.fit(split, fitting(split))
        assert same(states(model), states(other))


def test_thresholds_may_be_those_of_the_weights(trained: tuple[Sdim, Split], tmp_path: Path) -> None:
    model, _ = trained
    file = str(tmp_path / "weights.safetensors")
    save_file(states(model), file)
    params = {**SMALL, "weights": file, "epochs": 0, "thresholds": "weights"}
    asked("sdim", GREY, **params)
    other = built(Sdim, GREY, 9, **params)
    others = made(9, seed=4)  # On which no class has its thresholds.
    other.fit(others, fitting(others))
    assert same(states(model), states(other))
    with pytest.raises(InputError, match="for epochs: 0, found 2: trained on, they are another network's"):
        asked("sdim", GREY, **{**params, "epochs": 2})
    with pytest.raises(InputError, match=r"finite thresholds of shape \(2, 10\), found shape \(2, 3\)"):
        asked("sdim", COLOUR, **params)


@pytest.mark.parametrize("how", ["never saved", "never taken"])
def test_thresholds_asked_of_weights_that_have_none(how: str, tmp_path: Path) -> None:
    model = built(Sdim, GREY, **SMALL)
    file = str(tmp_path / "weights.safetensors")
    save_file(states(model.network if how == "never saved" else model), file)
    params = {**SMALL, "weights": file, "epochs": 0, "thresholds": "weights"}
    with pytest.raises(InputError, match="has no thresholds; thresholds: fit takes them from the training"):
        asked("sdim", GREY, **params)


def test_weights_of_another_network_are_refused(trained: tuple[Sdim, Split], tmp_path: Path) -> None:
    model, split = trained
    file = str(tmp_path / "weights.safetensors")
    save_file(states(model), file)
    wider = built(Sdim, GREY, width=0.25, features=8, weights=file, epochs=0)
    with pytest.raises(InputError, match=r"encoder\.conv\.weight has the shape"):
        wider.fit(split, fitting(split))


def test_training_goes_on_from_weights(trained: tuple[Sdim, Split], tmp_path: Path) -> None:
    file = str(tmp_path / "weights.safetensors")
    save_file(states(trained[0]), file)
    split = made(48, noise=0.3)
    found, losses = [], []
    for seed, weights in ((8, file), (9, file), (9, None)):
        model = built(Sdim, GREY, seed, **QUICK, weights=weights, epochs=1, batch=24)
        model.calibrate = lambda *_: None  # The thresholds are not what this is about.
        model.fit(split, fitting(split, progress=lambda said: losses.append(said["loss"])))
        found.append(states(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    assert losses[0] == losses[1] < losses[2]


# --- training -----------------------------------------------------------------------------------------

MAKERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (Sdim, QUICK),
    (Sdim, {**QUICK, "critic": "concat"}),
    (SdimTwin, {"width": 0.125, "lr": 0.01}),
]


@pytest.mark.parametrize(("make", "params"), MAKERS)
def test_training_learns(make: type[nn.Module], params: dict[str, Any]) -> None:
    split, other = made(96), made(60, seed=1)
    losses: list[float] = []
    model = built(make, GREY, **params, epochs=8, batch=16)
    model.fit(split, fitting(split, progress=lambda said: losses.append(said["loss"])))
    assert losses[-1] < losses[0] - 0.2
    readout = "plain" if make is Sdim else "label"
    answer = model.decide(other.images, readout)
    assert (answer.label == other.labels).float().mean() > 0.9
    assert not any(each.training for each in model.modules())
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(("make", "params"), MAKERS)
def test_training_repeats_and_goes_on_after_a_kill(
    make: type[nn.Module], params: dict[str, Any], keep: str, tmp_path: Path
) -> None:
    split = made(42)
    params = {**params, "epochs": 3, "batch": 16, "keep": keep, "augment": True}

    def fitted(folder: Path | None, killed_at: int | None = None) -> dict[str, Tensor]:
        def progress(said: Any) -> None:
            if said["done"] == killed_at:
                raise KeyboardInterrupt

        model = built(make, GREY, **params)
        if make is Sdim:
            model.calibrate = lambda *_: None  # Three epochs may leave a class without.
        model.fit(split, fitting(split, folder, progress))
        return states(model)

    whole = fitted(None)
    assert same(whole, fitted(None))
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, killed_at=2)
    assert same(whole, fitted(tmp_path))
    # And when nothing is left to do but the thresholds.
    assert same(whole, fitted(tmp_path))


def test_the_best_epoch_is_kept() -> None:
    split = made(48)
    losses: list[float] = []
    params = {"width": 0.125, "batch": 8, "lr": 0.3}
    best = built(SdimTwin, GREY, **params, epochs=5)
    best.fit(split, fitting(split, progress=lambda said: losses.append(said["loss"])))
    least = losses.index(min(losses))
    assert 0 < least < 4  # Neither the first nor the last.
    for epochs, alike in ((least + 1, True), (5, False)):
        last = built(SdimTwin, GREY, **params, epochs=epochs, keep="last")
        last.fit(split, fitting(split))
        assert same(states(best), states(last)) is alike


def test_a_network_is_kept_with_its_buffers() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    kept = Kept(network)
    found: list[dict[str, Tensor]] = []
    for loss in (3.0, float("nan"), 1.0, 1.0, 2.0):
        with torch.no_grad():
            network[0].weight += 1
        network(torch.rand(4, 2))
        kept.offer(torch.tensor(loss))
        found.append(states(network))
    kept.settle()
    assert same(states(network), found[2])
    assert network[1].num_batches_tracked == 3


@pytest.mark.parametrize("make", [Sdim, SdimTwin])
def test_a_last_batch_of_one_image_is_left_out(make: type[nn.Module]) -> None:
    split = made(9)
    params = {"width": 0.125, "epochs": 1, "batch": 4, "keep": "last"}
    model = built(make, GREY, **params)
    steps: list[int] = []
    loss = model.loss
    model.loss = lambda x, y: steps.append(len(x)) or loss(x, y)
    if make is Sdim:
        model.calibrate = lambda *_: None
    model.fit(split, fitting(split))
    assert steps == [4, 4]
    alone = Split(split.images[:1], split.labels[:1], split.index[:1], "alone")
    model = built(make, GREY, **params)
    model._expect_every_class = lambda *_: None
    with pytest.raises(InputError, match="at least 2 training images"):
        model.fit(alone, fitting(alone))


def test_a_loss_without_a_bound_below_stops_where_it_is_no_number() -> None:
    split = made(24)
    # J_NLL falls with the deviations: a huge rate takes it to infinity at once.
    model = built(Sdim, GREY, **SMALL, epochs=3, batch=12, lr=1e3)
    with pytest.raises(TrainingError, match="the loss of epoch 1, step 2 is"):
        model.fit(split, fitting(split))
    twin = built(SdimTwin, GREY, width=0.125, epochs=3, batch=12, lr=1e30)
    with pytest.raises(TrainingError, match="the loss of epoch"):
        twin.fit(split, fitting(split))


def test_augmentation_is_for_training_alone() -> None:
    split = made(42)

    def fitted(augment: bool) -> dict[str, Tensor]:
        model = built(SdimTwin, GREY, width=0.125, epochs=1, batch=16, augment=augment)
        model.fit(split, fitting(split))
        return states(model)

    assert not same(fitted(True), fitted(False))


@pytest.mark.gpu
@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_a_gpu_answers_like_a_cpu(critic: Any) -> None:
    split = made(24)
    x, y = split.images.double(), split.labels
    found = []
    for device in ("cpu", "cuda"):
        model = built(Sdim, GREY, **SMALL, critic=critic).double().to(device)
        torch.manual_seed(0)
        loss = model.loss(x.to(device), y.to(device)).item()
        model.eval()
        guess = model.decide(x.to(device), "plain")
        assert guess.logits is not None
        found.append((loss, guess.logits.cpu()))
    (loss, logits), (other, others) = found
    assert other == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(others, logits, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_gpu_trains_repeatably_and_goes_on_after_a_kill(keep: str, tmp_path: Path) -> None:
    split = made(96)

    def fitted(folder: Path | None, killed_at: int | None = None) -> dict[str, Tensor]:
        def progress(said: Any) -> None:
            if said["done"] == killed_at:
                raise KeyboardInterrupt

        model = built(Sdim, GREY, **QUICK, epochs=8, batch=16, keep=keep).cuda()
        model.fit(split, Trainer(split, "key", torch.device("cuda"), keep=folder, progress=progress))
        assert model.calibrated
        return states(model.cpu())

    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # As a run sets it.
    try:
        whole = fitted(None)
        assert same(whole, fitted(None))
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path, killed_at=5)
        assert same(whole, fitted(tmp_path))
    finally:
        torch.backends.cudnn.deterministic = deterministic


def test_the_guides_are_the_likeliest_right_images_of_their_classes(trained: tuple[Sdim, Split]) -> None:
    model, split = trained
    features = view_of(model, "features")
    assert isinstance(features, Features)
    assert torch.equal(features.centres, model.network.gaussians.weight[:, : model.network.features])
    answers = model.decide(features.guides, "reject-2")
    assert torch.equal(answers.label, torch.arange(3))
    assert not answers.rejected.any()
    likelihoods = model.network(split.images)
    for label, guide in enumerate(features.guides):
        right = (likelihoods.argmax(1) == split.labels) & (split.labels == label)
        best = likelihoods[:, label].masked_fill(~right, -math.inf).argmax()
        assert torch.equal(guide, split.images[best])
    unfitted = view_of(built(Sdim, GREY, **SMALL), "features")
    assert isinstance(unfitted, Features)
    assert unfitted.guides is None
