"""Adapters of torchattacks and foolbox: each fault on the raw library, and its repair; lawful all of them."""

import inspect
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from command import Answer, called_by
from PIL import Image
from torch import Tensor, nn

from attacks import foolbox as foolbox_adapter
from attacks import torchattacks as torchattacks_adapter
from attacks.common.library_adapter import Guard
from bench.errors import InputError, OvertimeError
from bench.noise import Noise
from bench.protocols import Crafted, Decision, Images, Labels, Threat, View
from bench.referee.freezing import frozen
from bench.referee.instruments import QueryCounter, answers_only, instrument
from bench.referee.validation import validate
from bench.registry import ATTACKS, AttackEntry, bind
from bench.results import fingerprint
from bench.results.store import Store
from bench.runner import outstanding, scheduler
from bench.runner.context import WorkerContext
from bench.runner.executors.process import Process
from bench.suite import listing, planner, resolve
from suites import TASK, Ran, scheduled, suite

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

ROOT = Path(__file__).parents[2]
ADAPTERS = [
    name for name in ATTACKS if ATTACKS[name].module in (torchattacks_adapter.__name__, "attacks.foolbox")
]
CLASSES, SIDE = 5, 6


# --- a defense to attack, and the way of a run -----------------------------------------------------------


class Linear(nn.Module):
    """Logits that are linear in the pixels: whatever has a gradient here gets to any label."""

    def __init__(
        self, channels: int = 1, classes: int = CLASSES, *, offset: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(classes, channels * SIDE * SIDE, generator=draw) / math.sqrt(channels)
        self.weight, self.offset = nn.Parameter(weight), offset

    def forward(self, x: Images) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.to(x.dtype).T + self.offset


def images(n: int = 4, channels: int = 1, *, seed: int = 0) -> Images:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, SIDE, SIDE, generator=draw) * 0.5 + 0.25


def refusing(model: nn.Module, level: float) -> Callable[[Images], Tensor]:
    """Return logits whose last column refuses every answer that is not surer than `level`."""

    def logits(z: Images) -> Tensor:
        answer = model(z)
        return torch.cat([answer, torch.full_like(answer[:, :1], level)], 1)

    return logits


class Run(NamedTuple):
    crafted: Crafted
    view: View
    counter: QueryCounter

    @property
    def images(self) -> Images:
        return self.crafted.images


def run(
    name: str,
    model: nn.Module | Callable[[Images], Tensor],
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    target: Labels | None = None,
    refusal: bool = False,
    exact: bool = True,
    seed: int = 0,
    **params: Any,
) -> Run:
    """Attack as a run does: through the referee's watch, with all states forked."""
    entry = ATTACKS[name]
    counter = QueryCounter.of(len(x), x.device)
    seen = View(model, refusal=refusal)
    if entry.access == "decision":
        classes = model(x).shape[1] - refusal

        def decide(z: Images) -> Decision:
            logits = model(z)
            decision = Decision.of(logits[:, :classes])
            return decision._replace(rejected=logits.argmax(1) == classes)

        seen = answers_only(decide, classes)
    view = instrument(seen, counter, entry.access, target=target, exact=exact)
    modules = [model] if isinstance(model, nn.Module) else []
    threat = Threat(threat.norm) if entry.kind == "minimum-norm" else threat
    with frozen(*modules, seed=seed):
        noise = Noise(("key", seed), torch.arange(len(x)), shard=("shard", seed))
        given = x.clone(), y.clone()
        crafted = entry.make(view, *given, threat, noise, **bind(entry, params))
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], y)
    return Run(crafted, view, counter)


def lawful(crafted: Crafted, x: Images, threat: Threat) -> None:
    """Expect what `bench.testing` expects of every attack."""
    z = crafted.images
    assert (z.shape, z.dtype, z.device) == (x.shape, x.dtype, x.device)
    assert not z.requires_grad
    assert z.isfinite().all()
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    far = threat.distance(x.double(), z.double()).max()
    # To the bit in linf; elsewhere as near as float32 goes.
    assert float(far) <= threat.radius * (1 if threat.norm == "linf" else 1 + 1e-6)
    assert not validate(x, crafted, threat).invalid.any()
    for column in crafted.notes.values():
        assert column.shape == (len(x),)
        assert column.dtype == torch.bool


FEW: dict[str, Any] = {
    "steps": 12,
    "max_iterations": 30,
    "binary_search_steps": 3,
    "initial_const": 10.0,
    "nb_iter": 30,
    "nb_sample": 64,
    "lr": 0.05,
    "c": 10.0,
    "alpha": 0.08,
    "n_queries": 200,
    "restarts": 3,
    "pixels": 3,
    "popsize": 60,
    "num_iter_set": 5,
    "repeats": 20,
    "directions": 5,
    "population": 8,
    "noise_sd": 0.05,
    "initial_stepsize": 0.1,
    "stepsize": 0.1,
    "rel_stepsize": 0.2,
    "initial_gradient_eval_steps": 20,
    "max_gradient_eval_steps": 40,
    "gamma": 0.5,
    "p_init": 0.3,
    "loss": "ce",
}
"""Settings that end soon."""


def few(name: str) -> dict[str, Any]:
    entry = ATTACKS[name]
    try:
        fields = entry.schema.model_fields
    except InputError as error:
        pytest.skip(str(error))  # numba is no part of our extras.
    own = {key: value for key, value in FEW.items() if key in fields}
    if entry.library == "foolbox":
        for key in ("gamma", "loss"):
            own.pop(key, None)  # Of the same name there, and something else.
    return own


RADII = {"linf": 0.3, "l2": 2.5, "l1": 12.0, "l0": 30.0}
ROWS = [
    (name, norm, channels)
    for name in ADAPTERS
    for place, norm in enumerate(sorted(ATTACKS[name].norms))
    for channels in ([ATTACKS[name].channels] if ATTACKS[name].channels else [1, 3][place > 0 :])
]
BLIND = {name for name in ADAPTERS if ATTACKS[name].access == "decision"} - {
    "foolbox/BoundaryAttack",
    "foolbox/HopSkipJumpAttack",
    "foolbox/PointwiseAttack",
    "foolbox/SaltAndPepperNoiseAttack",
}
"""They do not look where to go."""


@pytest.mark.parametrize(("name", "norm", "channels"), ROWS, ids=str)
def test_an_adapter_is_lawful_and_attacks(name: str, norm: Any, channels: int) -> None:
    entry, params, threat = ATTACKS[name], few(name), Threat(norm, RADII[norm])
    n = 2 if name == "foolbox/PointwiseAttack" else 4  # Pixel by pixel.
    model, x = Linear(channels), images(n, channels)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    ran = run(name, model, x, y, threat, **params)
    free = Threat(norm) if entry.kind == "minimum-norm" else threat
    lawful(ran.crafted, x, free)
    assert torch.equal(ran.images[0], x[0])  # It is wrong already.
    assert not ran.crafted.notes["failed"][0]
    assert not ran.crafted.notes["nonfinite"].any()
    assert float(ran.counter.forwards.min()) >= 1
    assert bool((ran.counter.backwards > 0).any()) == (entry.access == "gradient")
    won = model(ran.images).argmax(1) != y
    if entry.kind == "minimum-norm":
        # What is said is what is shown.
        assert torch.equal(won, ~ran.crafted.notes["failed"])
        assert torch.equal((ran.images != x).flatten(1).any(1), won & (torch.arange(n) > 0))
    if name not in BLIND:
        assert won[1:].any()
    if channels == 3:
        again = run(name, model, x, y, threat, **params)
        assert torch.equal(again.images, ran.images)
    if entry.targeted and name not in BLIND:
        ordered = model(x).argsort(1, descending=True)
        second = torch.where(ordered[:, 0] == y, ordered[:, 1], ordered[:, 0])
        towards = run(name, model, x, y, threat, target=second, **params)
        lawful(towards.crafted, x, free)
        assert (model(towards.images).argmax(1) == second)[1:].any()


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_refusal_is_a_success_through_an_adapter(name: str) -> None:
    entry, params = ATTACKS[name], few(name)
    channels = entry.channels or 1
    norm = sorted(entry.norms)[0]
    model, x = Linear(channels), images(3, channels, seed=1)
    # Sure of its answers here, and refusing what lies between two of them.
    y = model(x).argmax(1)
    logits = refusing(model, float(model(x).detach().amax(1).min()) - 0.3)
    ran = run(name, logits, x, y, Threat(norm, 2 * RADII[norm]), refusal=True, **params)
    answer = logits(ran.images).argmax(1)
    moved = (ran.images != x).flatten(1).any(1)
    if entry.kind == "minimum-norm":
        assert torch.equal(moved, ~ran.crafted.notes["failed"])
        assert ((answer[moved] != y[moved]) & (answer[moved] != CLASSES)).all()
    if entry.access == "gradient" and entry.kind == "fixed-budget" and name != "torchattacks/FFGSM":
        assert ((answer != y) & (answer != CLASSES)).any()


@pytest.mark.parametrize("name", ["torchattacks/PGD", "foolbox/LinfPGD", "foolbox/L2DeepFoolAttack"])
def test_one_image_and_none_are_batches_too(name: str) -> None:
    model, x = Linear(), images(1)
    y = model(x).argmax(1)
    threat = Threat(sorted(ATTACKS[name].norms)[0], 0.3)
    assert run(name, model, x, y, threat).images.shape == x.shape
    assert run(name, model, x[:0], y[:0], threat).images.shape == (0, *x.shape[1:])


def test_on_a_surrogate_the_last_try_is_kept_and_all_are_moved() -> None:
    model, x = Linear(), images()
    y = (model(x).argmax(1) + 1) % CLASSES
    there = run("torchattacks/PGD", model, x, y, Threat("linf", 0.1), exact=False).images
    assert (there != x).flatten(1).any(1).all()


def test_a_view_that_answers_several_times_is_asked_for_its_mean() -> None:
    model, other, x = Linear(), Linear(seed=1), images()
    y = model(x).argmax(1)

    def passes(z: Images) -> Tensor:
        return torch.stack([2 * model(z) - other(z), other(z)])

    for name in ("torchattacks/FGSM", "foolbox/FGSM"):
        one = run(name, model, x, y, Threat("linf", 0.05)).images
        two = run(name, passes, x, y, Threat("linf", 0.05)).images
        assert torch.equal(one, two)


def test_what_raises_on_every_image_leaves_no_number() -> None:
    def broken(z: Images) -> Tensor:
        if z.shape[0] < 9:
            raise KeyError("a bug of the network")
        return Linear()(z)

    x = images(9)
    y = Linear()(x).argmax(1)
    with pytest.raises(KeyError, match="a bug of the network"):
        run("torchattacks/DeepFool", broken, x, y, Threat("l2", 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_library_that_goes_too_far_is_brought_back(norm: Any) -> None:
    model, x = Linear(), images()
    y, threat = model(x).argmax(1), Threat(norm, RADII[norm] / 4)

    def far(seen: nn.Module, start: Images, *_: object) -> Tensor:
        return (start + 3 * torch.sign(start - 0.5)).double()

    noise = Noise("key", torch.arange(len(x)))
    crafted = Guard(access="score", kind="fixed-budget", lift=False).run(
        View(model), x, y, threat, noise, far
    )
    lawful(crafted, x, threat)
    # As far as it may, in its direction.
    assert float((threat.distance(x, crafted.images) / threat.radius).min()) > 0.99
    assert ((crafted.images - x) * (x - 0.5) >= 0).all()

    def short(seen: nn.Module, start: Images, *_: object) -> Tensor:
        return start[:, :, 1:]

    with pytest.raises(ValueError, match=r"returned \(1, 1, 5, 6\) for \(1, 1, 6, 6\)"):
        Guard(access="score", kind="fixed-budget", lift=False).run(View(model), x, y, threat, noise, short)


def test_a_time_limit_is_not_the_librarys_exception() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)

    def late(seen: nn.Module, start: Images, *_: object) -> Tensor:
        if len(start) > 1:
            raise OvertimeError("over")
        return start

    noise = Noise("key", torch.arange(len(x)))
    with pytest.raises(OvertimeError):
        Guard(access="score", kind="minimum-norm", lift=False).run(
            View(model), x, y, Threat("l2"), noise, late
        )


# --- torchattacks ----------------------------------------------------------------------------------------


def cracked(model: Callable[[Images], Tensor], z: Images, y: Labels) -> Tensor:
    return model(z).argmax(1) != y


def test_t1_margins_of_negative_logits_vanish() -> None:
    x = images()
    high, low = Linear(offset=50.0), Linear(offset=-50.0)
    y = high(x).argmax(1)
    settings: dict[str, Any] = {"c": 10, "steps": 50, "lr": 0.05}
    with torch.enable_grad():
        assert cracked(high, torchattacks.CW(high, **settings)(x, y), y).all()
        assert not cracked(low, torchattacks.CW(low, **settings)(x, y), y).any()
        # The referee takes off the maximum, after which none is above 0: that alone would not do.
        centred = Seen(lambda z: low(z) - low(z).amax(1, keepdim=True).detach())
        assert not cracked(low, torchattacks.CW(centred, **settings)(x, y), y).any()
    assert cracked(low, run("torchattacks/CW", low, x, y, Threat("l2"), **settings).images, y).all()
    upgd: dict[str, Any] = {"loss": "margin", "steps": 10, "alpha": 0.05}
    raw = torchattacks.UPGD(low, eps=0.3, **upgd)(x, y)
    assert not cracked(low, raw.nan_to_num(0.0), y).all()
    assert cracked(low, run("torchattacks/UPGD", low, x, y, Threat("linf", 0.3), **upgd).images, y).all()


class Seen(nn.Module):
    """A function as a module with a device."""

    def __init__(self, function: Callable[[Images], Tensor]) -> None:
        super().__init__()
        self.function, self.place = function, nn.Parameter(torch.empty(0))

    def forward(self, x: Images) -> Tensor:
        return self.function(x)


def test_t2_great_offsets_are_lost_in_float32() -> None:
    model, x = Linear(), images(12)
    y = model(x).argmax(1)

    def offset(z: Images) -> Tensor:
        return model(z.double()) - 1e8

    settings: dict[str, Any] = {"n_queries": 150}
    raw = torchattacks.Square(Seen(lambda z: offset(z).float()), eps=0.15, **settings)(x, y)
    there = run("torchattacks/Square", offset, x, y, Threat("linf", 0.15), **settings).images
    here = run("torchattacks/Square", model, x, y, Threat("linf", 0.15), **settings).images
    assert cracked(model, raw, y).sum() < cracked(model, there, y).sum()
    assert torch.equal(cracked(model, there, y), cracked(model, here, y))


def test_t3_pixels_at_the_sides_of_the_box_never_move() -> None:
    model, x = Linear(), images().round()
    y = model(x).argmax(1)
    settings: dict[str, Any] = {"c": 50, "steps": 100, "lr": 0.3}
    with torch.enable_grad():
        raw = torchattacks.CW(model, **settings)(x, y)
    # Its variable is infinite there: a pixel stays, or is no number.
    assert ((raw == x) | raw.isnan()).all()
    there = run("torchattacks/CW", model, x, y, Threat("l2"), **settings)
    assert cracked(model, there.images, y).all()
    lawful(there.crafted, x, Threat("l2"))


def test_t4_cw_searches_no_constant_and_its_early_stop_is_the_batchs() -> None:
    model, x = Linear(), images(6)
    y = model(x).argmax(1)
    with torch.enable_grad():
        attack = torchattacks.CW(model, c=3, steps=100, lr=0.3)
        together = attack(x, y)
        alone = torch.cat([attack(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert float((together - alone).abs().max()) > 1e-3
    # Not repaired but said: it is keyed by the shard, and not the name that a table would show as CW.
    entry = ATTACKS["torchattacks/CW"]
    assert entry.rng == "shard"
    assert "no search" in entry.summary
    assert ATTACKS["cw-l2"].rng == "example"


def test_t5_its_autoattack_is_not_the_official_one() -> None:
    model = Linear()
    raw = torchattacks.AutoAttack(model)
    parts = raw._autoattack.attacks
    assert [each.steps for each in parts[:3]] == [10, 10, 10]
    assert parts[0].seed != torchattacks.AutoAttack(model)._autoattack.attacks[0].seed  # By the clock.
    assert "torchattacks/AutoAttack" not in ATTACKS
    assert "10 steps" in ATTACKS["torchattacks/AutoAttack-10"].summary
    x = images()
    y = model(x).argmax(1)
    one, two = (run("torchattacks/AutoAttack-10", model, x, y, Threat("linf", 0.2)).images for _ in range(2))
    assert torch.equal(one, two)


def test_t6_few_classes_bring_it_down(tmp_path: Path) -> None:
    for classes, attack in (
        (3, torchattacks.APGDT),
        (3, torchattacks.JSMA),
        (2, partial(torchattacks.UPGD, loss="dlr")),
        (2, partial(torchattacks.APGD, loss="dlr")),
    ):
        model = Linear(classes=classes)
        x = images(20)
        with pytest.raises((IndexError, RuntimeError)):
            attack(model)(x, model(x).argmax(1))
    plan = two_classes(
        tmp_path,
        {
            "apgdt": {"use": "torchattacks/APGDT"},
            "upgd": {"use": "torchattacks/UPGD", "loss": "dlr"},
            "apgd": {"use": "torchattacks/APGD", "loss": "dlr"},
            "fine": {"use": "torchattacks/APGD"},
        },
    )
    assert {cell.coordinates["attack"] for cell in plan.conditions} == {"fine"}
    assert {skip.reason for skip in plan.skips} == {
        "torchattacks/APGDT needs 4 classes, there are 2",
        "torchattacks/UPGD: its loss dlr needs 4 classes, there are 2",
        "torchattacks/APGD: its loss dlr needs 3 classes, there are 2",
    }
    model, x = Linear(classes=2), images(20)
    y = model(x).argmax(1)
    lawful(run("torchattacks/JSMA", model, x, y, Threat("l0"), gamma=0.5).crafted, x, Threat("l0"))


def two_classes(folder: Path, attacks: dict[str, Any], *, width: int = 8, **task: Any) -> planner.Plan:
    """Plan attacks on grey images of two classes, 8 pixels high."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            place = folder / "pictures" / split / label
            place.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                Image.fromarray(np.full((8, width), 40 * number, np.uint8)).save(place / f"{number}.png")
    path = suite(folder, {"it": {"use": "standard"}}, attacks, [{**TASK, "data": "mine", **task}])
    document = yaml.safe_load(path.read_text())
    document["data"] = {"mine": {"name": "image-folder", "path": "pictures", "split": "test"}}
    path.write_text(yaml.safe_dump(document))
    return planner.make(resolve.load(path))


def test_t7_its_parts_reset_the_global_random_state() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    drawn = []
    for _ in range(2):
        torchattacks.APGD(model, eps=0.01)(x, y)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    before = torch.get_rng_state()
    starts = []
    for seed in (0, 1):
        asked: list[Tensor] = []

        def instrumented(z: Images, asked: list[Tensor] = asked) -> Tensor:
            asked.append(z.detach())
            return model(z)

        run("torchattacks/APGD", instrumented, x, y, Threat("linf", 0.01), seed=seed)
        starts.append(next(z for z in asked if not torch.equal(z, x)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*starts)


def test_t8_its_spsa_has_one_direction_for_all_and_one_step() -> None:
    model, x = Linear(), images(3)
    asked: list[Tensor] = []

    def instrumented(z: Images) -> Tensor:
        asked.append(z)
        return model(z)

    attack = torchattacks.SPSA(Seen(instrumented), eps=0.1, nb_sample=1)
    attack(x, model(x).argmax(1))
    moves = asked[0] - x
    assert torch.allclose(moves[0], moves[1], atol=1e-6)
    entry = ATTACKS["torchattacks/SPSA"]
    assert entry.rng == "shard"
    assert "one direction" in entry.summary
    assert entry.flags is not None
    flag = entry.flags(Threat("linf", 0.1), **bind(entry, {}))
    assert flag == "1 steps of 0.01 reach 0.01, less than the radius 0.1"


@pytest.mark.parametrize("name", ["SPSA", "PIFGSMPP"])
def test_t9_targets_are_advertised_and_forgotten(name: str) -> None:
    model, x = Linear(3), images(6, 3)
    y = model(x).argmax(1)
    target = model(x).argsort(1, descending=True)[:, 2]
    params = {"SPSA": {"nb_iter": 40, "lr": 0.05}, "PIFGSMPP": {"num_iter_set": 5}}[name]
    radius = {"eps": 0.25} if name == "SPSA" else {"max_epsilon": 0.25}
    attack = getattr(torchattacks, name)(model, **radius, **params)
    attack.set_mode_targeted_by_function(lambda *_: target, quiet=True)
    raw = (model(attack(x, y)).argmax(1) == target).sum()
    there = run(f"torchattacks/{name}", model, x, y, Threat("linf", 0.25), target=target, **params).images
    assert int(raw) == 0
    assert int((model(there).argmax(1) == target).sum()) >= 4


def nan_at_zero(x: Images) -> Tensor:
    """Return logits whose gradient is not a number where a pixel is 0."""
    root = x.flatten(1).mul(0.0).sqrt()
    return Linear()(x) + root.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "norm"), [("PGDL2", "l2"), ("DeepFool", "l2"), ("CW", "l2"), ("PGD", "linf")]
)
def test_t10_what_is_no_number_counts_as_success_or_as_robust(name: str, norm: Any) -> None:
    x = images()
    y = torch.full((4,), 1)
    x = torch.cat([draw for draw in images(60).split(1) if int(nan_at_zero(draw).argmax()) == 1][:4])
    with torch.enable_grad():
        raw = getattr(torchattacks, name)(Seen(nan_at_zero))(x, y)
    if name == "PGD":
        assert raw.isfinite().all()  # It stays where it began, and says nothing.
    else:
        assert raw.isnan().any()
        assert (nan_at_zero(raw).argmax(1) != y).any()
    ran = run(f"torchattacks/{name}", nan_at_zero, x, y, Threat(norm, 0.3))
    lawful(ran.crafted, x, Threat(norm))
    assert ran.crafted.notes["nonfinite"].all()
    if name != "PGD":
        assert torch.equal(ran.images, x)
        assert ran.crafted.notes["failed"].all()


@pytest.mark.parametrize("radius", [8 / 255, 0.1, 0.3])
def test_t11_it_leaves_the_ball_by_rounding(radius: float) -> None:
    model, x = Linear(3), images(16, 3)
    y = model(x).argmax(1)
    raw = torchattacks.PGD(model, eps=radius, alpha=radius)(x, y)
    assert float((raw.double() - x.double()).abs().max()) > radius
    there = run("torchattacks/PGD", model, x, y, Threat("linf", radius), alpha=radius).images
    assert float((there.double() - x.double()).abs().max()) <= radius


def test_t12_images_outside_the_box_are_clamped_without_a_word() -> None:
    model, x = Linear(), images() * 4 - 2
    y = model(x).argmax(1)
    raw = torchattacks.PGD(model, eps=0.03)(x, y)
    assert float((raw - x).abs().max()) > 0.5
    with pytest.raises(InputError, match=r"must be in \[0, 1\], these reach from -"):
        run("torchattacks/PGD", model, x, y, Threat("linf", 0.03))


def test_t13_normalisation_is_a_switch_inside() -> None:
    model, x = Linear(), images()
    attack = torchattacks.PGD(model, eps=0.1)
    attack.set_normalization_used(mean=[0.5], std=[0.2])
    raw = attack(x, model(x).argmax(1))
    assert float(raw.min()) < 0  # It took the images for normalised ones, and returns such.
    # No adapter has the switch; defenses normalise for themselves.
    assert "set_normalization_used" not in Path(torchattacks_adapter.__file__).read_text()
    assert not {"mean", "normalize", "preprocessing"} & {
        field for name in ADAPTERS if "Brendel" not in name for field in ATTACKS[name].schema.model_fields
    }


class Noisy(nn.Module):
    """A network with a part that was frozen in eval, and that may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen, self.fail = Linear(), nn.Dropout(0.5), False

    def forward(self, x: Images) -> Tensor:
        if self.fail:
            raise KeyError("asked to fail")
        logits: Tensor = self.linear(x)
        return logits


def test_t14_modes_do_not_come_back() -> None:
    model, x = Noisy(), images()
    y = model(x).argmax(1)

    def modes() -> list[bool]:
        return [module.training for module in model.modules()]

    model.train()
    model.frozen.eval()
    asked = modes()
    torchattacks.FGSM(model)(x, y)
    assert modes() != asked
    model.frozen.eval()
    model.fail = True
    with pytest.raises(KeyError):
        torchattacks.FGSM(model)(x, y)
    assert modes() != asked
    model.train()
    model.frozen.eval()
    with pytest.raises(KeyError):
        run("torchattacks/FGSM", model, x, y, Threat("linf", 0.1))
    assert modes() == asked
    model.fail = False
    run("torchattacks/FGSM", model, x, y, Threat("linf", 0.1))
    assert modes() == asked


@pytest.mark.parametrize("name", ["CW", "DeepFool"])
def test_t15_gradients_stay_on_parameters(name: str) -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    with torch.enable_grad():
        getattr(torchattacks, name)(model, steps=3)(x, y)
    assert model.weight.grad is not None
    model.weight.grad = None
    run(f"torchattacks/{name}", model, x, y, Threat("l2"), steps=3)
    assert model.weight.grad is None
    assert model.weight.requires_grad


def test_t16_some_know_no_radius() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    with torch.enable_grad():
        raw = torchattacks.SparseFool(model)(x, y)
    assert float((raw - x).abs().max()) > 0.3
    for name in ("DeepFool", "CW", "SparseFool", "OnePixel", "Pixle", "GN", "EADL1", "EADEN", "JSMA"):
        assert "eps" not in inspect.signature(getattr(torchattacks, name).__init__).parameters
        # Their distances are compared with the radius when they are counted.
        assert ATTACKS[f"torchattacks/{name}"].kind == "minimum-norm"


def test_t17_shapes_and_kinds_bring_it_down(tmp_path: Path) -> None:
    for name in ("TIFGSM", "PIFGSM", "PIFGSMPP"):
        model, x = Linear(1), images(2)
        with pytest.raises(RuntimeError):
            getattr(torchattacks, name)(model)(x, model(x).argmax(1))
    wide = torch.rand(2, 1, 5, 9)
    flat = Seen(lambda z: z.flatten(1) @ torch.eye(45, 5))
    with pytest.raises(RuntimeError):
        torchattacks.DIFGSM(flat, diversity_prob=1.0)(wide, torch.zeros(2, dtype=torch.int64))
    model, x = Linear(3), images(2, 3)
    y = model(x).argmax(1)
    for name in ("FAB", "TIFGSM"):
        with pytest.raises((RuntimeError, IndexError)):
            getattr(torchattacks, name)(model.double())(x.double(), y)
    model.float()
    with torch.enable_grad(), pytest.raises(ZeroDivisionError):
        torchattacks.EADL1(model, max_iterations=5)(x, y)
    names = ("TIFGSM", "PIFGSM", "PIFGSMPP")
    plan = two_classes(tmp_path, {name: {"use": f"torchattacks/{name}"} for name in names})
    assert {skip.reason for skip in plan.skips} == {
        f"torchattacks/{name} is made for 3 channels, these have 1" for name in names
    }
    plan = two_classes(tmp_path, {"difgsm": {"use": "torchattacks/DIFGSM"}}, width=6)
    assert {skip.reason for skip in plan.skips} == {"torchattacks/DIFGSM needs square images, these are 8x6"}
    assert all(ATTACKS[f"torchattacks/{name}"].square for name in ("TIFGSM", "Pixle"))
    for name in ("FAB", "TIFGSM"):
        wider = run(f"torchattacks/{name}", model, x.double(), y, Threat("linf", 0.2))
        lawful(wider.crafted, x.double(), Threat("linf", 0.2))
    with pytest.raises(InputError, match="max_iterations must be 10 or more"):
        two_classes(
            tmp_path,
            {"ead": {"use": "torchattacks/EADL1", "max_iterations": 5}},
            threat={"norm": "l1", "radius": 1.0},
        )


def test_t18_its_integers_are_cut_off() -> None:
    x = torch.tensor([0.9999, 100.6 / 255])
    assert torchattacks.PGD(Linear()).to_type(x, "int").tolist() == [254, 100]
    # What is stored is float32, to the bit.
    model, x = Linear(), images()
    there = run("torchattacks/FGSM", model, x, model(x).argmax(1), Threat("linf", 0.01)).images
    assert there.dtype == torch.float32
    assert ((there * 255) % 1 > 0.01).any()


def test_t19_it_goes_on_where_the_image_is_wrong_already() -> None:
    model, x = Linear(), images()
    y = (model(x).argmax(1) + 1) % CLASSES
    assert not torch.equal(torchattacks.PGD(model)(x, y), x)
    assert torch.equal(run("torchattacks/PGD", model, x, y, Threat("linf", 0.1)).images, x)


def test_t20_its_wheel_brings_a_package_called_robustbench() -> None:
    files = {str(each).partition("/")[0] for each in metadata.files("torchattacks") or []}
    assert "robustbench" in files
    # Nothing here imports it: whichever is installed, ours are not confused.
    torchattacks_adapter._class("PGD")
    assert "robustbench" not in sys.modules


def test_t21_it_pins_old_packages_so_that_it_is_an_extra() -> None:
    assert any(re.match(r"requests ?\(?~=2\.25", each) for each in metadata.requires("torchattacks") or [])
    ours = metadata.requires("crossfire-bench") or []
    brought = [each for each in ours if re.match(r"(torchattacks|foolbox)\b", each)]
    assert brought
    assert all("extra ==" in each for each in brought)


# --- foolbox -----------------------------------------------------------------------------------------------


def raw_foolbox(
    attack: Any, model: nn.Module | Callable[[Images], Tensor], x: Images, y: Labels, radius: Any = None
) -> tuple[Any, Any, Any]:
    module = model if isinstance(model, nn.Module) else Seen(model)
    answer: tuple[Any, Any, Any] = attack(
        foolbox.PyTorchModel(module.eval(), bounds=(0, 1), device="cpu"), x, y, epsilons=radius
    )
    return answer


def test_f1_it_cannot_be_imported_without_git() -> None:
    bare = {name: value for name, value in os.environ.items() if name != "GIT_PYTHON_REFRESH"}
    code = """
try:
    import foolbox
except ImportError as error:
    print(str(error).strip().partition("\\n")[0])
import attacks.foolbox
print(attacks.foolbox._library().attacks.LinfPGD.__name__)
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**bare, "PATH": ""}, check=False,
    )  # fmt: skip
    raw, adapted = said.stdout.splitlines()
    assert "git" in raw
    assert adapted == "LinfProjectedGradientDescentAttack"


def test_f2_it_asserts_the_box_to_the_last_bit() -> None:
    model, x = Linear(), images()
    x[0, 0, 0, 0] = 1.0000001
    assert x.max() > 1
    y = model(x).argmax(1)
    with pytest.raises(AssertionError):
        raw_foolbox(foolbox.attacks.LinfPGD(), model, x, y, 0.1)
    ran = run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.1))
    assert not ran.crafted.notes["raised"].any()
    assert not validate(x, ran.crafted, Threat("linf", 0.1)).invalid.any()


def test_f3_it_moves_the_model_to_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert foolbox.models.pytorch.get_device(None) == torch.device("cuda:0")
    given = []
    real = foolbox.PyTorchModel
    monkeypatch.setattr(
        foolbox, "PyTorchModel", lambda *args, **more: given.append(more["device"]) or real(*args, **more)
    )
    model, x = Linear(), images()
    run("foolbox/FGSM", model, x, model(x).argmax(1), Threat("linf", 0.1))
    assert set(given) == {torch.device("cpu")}


class Inner(nn.Module):
    """A network that searches with gradients of its own, before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear()

    def forward(self, x: Images) -> Tensor:
        z = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad((z - 0.5).square().sum(), z)
        logits: Tensor = self.linear(x - 0.01 * slope)
        return logits


def test_f4_it_asks_with_autograd_off() -> None:
    model, x = Inner(), images()
    y = model(x).argmax(1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        raw_foolbox(foolbox.attacks.LinfPGD(), model, x, y, 0.1)
    assert cracked(model, run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.3)).images, y).any()


def test_f5_it_knows_no_refusal() -> None:
    model, x = Linear(), images(8)
    y = model(x).argmax(1)
    # Between two labels all is refused: another label must be surer than any is on these images.
    logits = refusing(model, float(model(x).detach().amax()) + 0.5)

    class Accepted(foolbox.criteria.Criterion):  # type: ignore[misc]
        def __repr__(self) -> str:
            return "accepted and wrong"

        def __call__(self, perturbed: Any, outputs: Any) -> Any:
            return outputs

    with pytest.raises(ValueError, match="unsupported criterion"):
        raw_foolbox(foolbox.attacks.LinfPGD(), logits, x, Accepted(), 0.3)  # type: ignore[arg-type]
    # Told of all columns it is content with a refusal: everything counts as broken, and little is.
    _, raw, said = raw_foolbox(foolbox.attacks.L2DeepFoolAttack(), logits, x, y)
    assert said.all()
    assert (logits(raw).argmax(1) == CLASSES).any()
    wrong = {}
    for name, norm in (
        ("foolbox/L2DeepFoolAttack", "l2"),
        ("foolbox/LinfPGD", "linf"),
        ("torchattacks/PGD", "linf"),
    ):
        threat = Threat(norm, 0.3)  # type: ignore[arg-type]
        ran = run(name, logits, x, y, threat, refusal=True, steps=100)
        answer = logits(ran.images).argmax(1)
        wrong[name] = int(((answer != CLASSES) & (answer != y)).sum())
        if ATTACKS[name].kind == "minimum-norm":
            assert torch.equal((ran.images != x).flatten(1).any(1), ~ran.crafted.notes["failed"])
    assert wrong == dict.fromkeys(wrong, 8)


def test_f6_no_numbers_are_successes_and_failures_are_black() -> None:
    x = torch.cat([draw for draw in images(60).split(1) if int(nan_at_zero(draw).argmax()) == 1][:4])
    y = torch.ones(4, dtype=torch.int64)
    _, raw, said = raw_foolbox(foolbox.attacks.L2PGD(), nan_at_zero, x, y, 0.3)
    assert raw.isnan().any()
    assert said.any()
    ran = run("foolbox/L2PGD", nan_at_zero, x, y, Threat("l2", 0.3))
    assert torch.equal(ran.images, x)
    assert ran.crafted.notes["nonfinite"].all()
    assert ran.crafted.notes["failed"].all()
    model = Linear()
    y = model(x).argmax(1)
    weak: dict[str, Any] = {"steps": 2, "binary_search_steps": 1, "initial_const": 1e-6}
    _, raw, _ = raw_foolbox(foolbox.attacks.L2CarliniWagnerAttack(**weak), model, x, y)
    assert (raw == 0).all()
    ran = run("foolbox/L2CarliniWagnerAttack", model, x, y, Threat("l2"), **weak)
    assert torch.equal(ran.images, x)
    assert ran.crafted.notes["failed"].all()


def test_f7_one_image_brings_the_batch_down() -> None:
    def hard(z: Images) -> Tensor:
        # The first image is dark, and dark images have one answer.
        logits = Linear()(z)
        dark = z.flatten(1).mean(1, keepdim=True) < 0.999
        stuck = torch.zeros_like(logits).index_fill(1, torch.tensor([0]), 1.0)
        first = z[:, 0, 0, 0].view(-1, 1) == 0
        return torch.where(dark & first, stuck, logits)

    x = images(3)
    x[0, 0, 0, 0] = 0

    class Stuck(nn.Module):
        def forward(self, z: Images) -> Tensor:
            return hard(z)

    y = hard(x).argmax(1)
    assert not bool(y[0])

    def stubborn(z: Images) -> Tensor:
        """Answer 0 wherever the top left pixel of the row's company is the first image's."""
        return hard(z)

    calls = {"n": 0}
    real = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack.run

    def start(self: Any, model: Any, inputs: Any, criterion: Any, **more: Any) -> Any:
        calls["n"] += 1
        found = real(self, model, inputs, criterion, **more)
        raw = found.raw.clone()
        for row, image in enumerate(inputs.raw):
            if float(image[0, 0, 0]) == 0:
                raw[row] = image  # No other label was found for this one.
        return type(found)(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foolbox.attacks.LinearSearchBlendedUniformNoiseAttack, "run", start)
        with pytest.raises(ValueError, match="init_attack failed for 1"):
            raw_foolbox(foolbox.attacks.BoundaryAttack(steps=20), stubborn, x, y)
        ran = run("foolbox/BoundaryAttack", stubborn, x, y, Threat("l2"), steps=20)
    assert ran.crafted.notes["raised"].tolist() == [True, False, False]
    assert ran.crafted.notes["failed"].tolist() == [True, False, False]
    assert torch.equal(ran.images[0], x[0])
    assert cracked(stubborn, ran.images, y)[1:].all()


def test_f8_lists_of_radii_are_run_one_by_one() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    asked = [0]

    def counted(z: Images) -> Tensor:
        asked[0] += 1
        return model(z)

    attack = foolbox.attacks.LinfPGD(steps=5)
    counts = []
    for radii in ([0.1], [0.1, 0.2, 0.3]):
        asked[0] = 0
        raw_foolbox(attack, counted, x, y, radii)
        counts.append(asked[0])
    assert counts[1] == 3 * counts[0]
    # One radius at a time is all that an adapter passes; what minimises is crafted once for all of them.
    ran = run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.3), steps=5)
    assert float(ran.counter.forwards.max()) == counts[0] + 1
    assert ATTACKS["foolbox/L2FMNAttack"].kind == "minimum-norm"


def test_f9_it_has_no_seed() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    raw = [raw_foolbox(foolbox.attacks.LinfPGD(steps=1), model, x, y, 0.1)[1] for _ in range(2)]
    assert not torch.equal(*raw)
    there = [run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.1), steps=1).images for _ in range(2)]
    assert torch.equal(*there)
    assert not torch.equal(
        there[0], run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.1), steps=1, seed=1).images
    )


def test_f10_its_cw_stops_by_the_loss_of_the_batch() -> None:
    model, x = Linear(), images(6)
    y = model(x).argmax(1)
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        steps=100, binary_search_steps=3, initial_const=1.0, stepsize=0.3
    )
    together = raw_foolbox(attack, model, x, y)[0]
    alone = torch.cat([raw_foolbox(attack, model, x[i : i + 1], y[i : i + 1])[0] for i in range(len(x))])
    assert float((together - alone).abs().max()) > 1e-3
    entry = ATTACKS["foolbox/L2CarliniWagnerAttack"]
    assert entry.rng == "shard"
    assert "cw-l2" in entry.summary


def test_f11_it_leaves_the_ball_or_the_box_by_rounding() -> None:
    model, x = Linear(3), images(16, 3)
    y = model(x).argmax(1)
    radius = 0.3
    raw = raw_foolbox(foolbox.attacks.LinfPGD(), model, x, y, radius)[1]
    assert float((raw.double() - x.double()).abs().max()) > radius
    there = run("foolbox/LinfPGD", model, x, y, Threat("linf", radius)).images
    lawful(Crafted(there, {}), x, Threat("linf", radius))


def test_f12_it_only_warns_of_training_mode_and_leaves_gradients() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = foolbox.PyTorchModel(model.train(), bounds=(0, 1), device="cpu")
    assert "training mode" in str(said[0].message)
    foolbox.attacks.LinfPGD()(seen, x, y, epsilons=0.1)
    assert model.training
    assert model.weight.grad is not None
    model.weight.grad = None
    asked: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: asked.append(module.training))
    run("foolbox/LinfPGD", model, x, y, Threat("linf", 0.1))
    assert not any(asked)
    assert model.training
    assert model.weight.grad is None


def test_f13_what_it_says_of_success_is_not_what_it_returns() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    draw = torch.Generator().manual_seed(0)

    def fickle(z: Images) -> Tensor:
        return model(z) + 6 * torch.randn(CLASSES, generator=draw)

    raw, said = [], []
    for _ in range(5):
        _, images_, success = raw_foolbox(foolbox.attacks.L2AdditiveGaussianNoiseAttack(), fickle, x, y, 1e-3)
        raw.append(cracked(model, images_, y))
        said.append(success)
    assert (torch.stack(said) != torch.stack(raw)).any()
    # Nothing is taken from its word: what an adapter says agrees with what its view answers when asked.
    ran = run("foolbox/L2FMNAttack", model, x, y, Threat("l2"), steps=3)
    assert torch.equal(cracked(model, ran.images, y), ~ran.crafted.notes["failed"])
    assert "success" not in inspect.getsource(foolbox_adapter._prepare)


# --- the command line, and what is not installed -----------------------------------------------------------


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Answer]:
    monkeypatch.chdir(tmp_path)

    return called_by(monkeypatch, capsys)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Let adapters look for their libraries anew, before and after."""

    def forget() -> None:
        foolbox_adapter._library.cache_clear()
        for name in ADAPTERS:
            ATTACKS[name].__dict__.pop("schema", None)

    forget()
    yield
    forget()


@pytest.fixture
def bare(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide both libraries."""
    for name in ("torchattacks", "foolbox"):
        monkeypatch.setitem(sys.modules, name, None)
    real = metadata.version

    def version(name: str) -> str:
        if name in ("torchattacks", "foolbox"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


CNN = {"cnn": {"use": "cnn", "training": "standard", "epochs": 1, "net": "b2", "width": 0.25}}


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2
    assert "Traceback" not in answer.err + answer.out
    said = " ".join(answer.err.split())
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ({"use": "torchattacks/PGDD"}, ["did you mean 'torchattacks/PGD'"]),
        ({"use": "foolbox/LinfPDG"}, ["did you mean 'foolbox/LinfPGD'"]),
        ({"use": "torchattacks/AutoAttack"}, ["did you mean 'torchattacks/AutoAttack-10'"]),
        ({"use": "torchattacks/PGD", "step_size": 5}, ["suite.yaml", "step_size", "did you mean 'steps'"]),
        ({"use": "torchattacks/PGD", "eps": 0.1}, ["suite.yaml", "eps"]),
        ({"use": "torchattacks/PGD", "steps": "many"}, ["suite.yaml", "steps", "'many'"]),
        (
            {"use": "torchattacks/PGD", "steps": 0},
            ["steps", "expected a number of 1 or more, found 0"],
        ),
        ({"use": "torchattacks/PGD", "alpha": math.nan}, ["suite.yaml", "alpha", "found .nan"]),
        (
            {"use": "torchattacks/EADL1", "kappa": -1},
            ["kappa", "expected a number of 0 or more, found -1"],
        ),
        (
            {"use": "foolbox/EADAttack", "confidence": -1},
            ["suite.yaml", "confidence", "expected a number of 0 or more, found -1"],
        ),
        ({"use": "torchattacks/UPGD", "loss": "dlrr"}, ["suite.yaml", "loss", "'dlrr'"]),
        ({"use": "foolbox/LinfPGD", "rel_stepsiez": 0.1}, ["did you mean 'rel_stepsize'"]),
        ({"use": "foolbox/LinfPGD", "random_start": 3}, ["suite.yaml", "random_start", "3"]),
    ],
    ids=str,
)
def test_wrong_words_for_an_adapter(
    bench: Callable[..., Answer], tmp_path: Path, use: dict[str, Any], words: list[str]
) -> None:
    suite(tmp_path, CNN, {"it": use}, [TASK])
    refused(bench("plan", "suite.yaml"), *words)


def test_a_library_that_is_not_installed_says_what_to_install(
    bare: None, bench: Callable[..., Answer], tmp_path: Path
) -> None:
    for use in ("torchattacks/PGD", "foolbox/LinfPGD"):
        suite(tmp_path, CNN, {"it": {"use": use}}, [TASK])
        refused(bench("plan", "suite.yaml"), "suite.yaml", "pip install 'crossfire-bench[libraries]'")
    within = {"it": {"use": "madry", "inner": {"use": "torchattacks/PGD"}}}
    suite(tmp_path, within, {"it": {"use": "pgd"}}, [TASK])
    refused(bench("plan", "suite.yaml"), "suite.yaml", "defenses.it.inner.use: torchattacks is not installed")
    suite(tmp_path, CNN, {"it": {"use": "pgd"}}, [TASK])
    assert bench("plan", "suite.yaml").code == 0
    listed = " ".join(bench("list", "torchattacks/PGD").out.split())
    assert "library: torchattacks not installed" in listed
    assert "pip install 'crossfire-bench[libraries]'" in listed
    titles = {each["title"] for each in listing.suite_schema()["$defs"]["AttackUse"]["oneOf"]}
    assert set(ADAPTERS) <= titles


def test_an_attack_that_needs_numba_says_so(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foolbox_adapter, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs numba, which is not installed: pip install numba"):
        _ = ATTACKS["foolbox/L2BrendelBethgeAttack"].schema


def test_the_list_says_what_an_adapter_needs(bench: Callable[..., Answer]) -> None:
    out = bench("list", "torchattacks/TIFGSM").out
    words = " ".join(out.split())
    for word in ("norms: linf", "access: gradient", "3 channels, square images", "time limit: 3600 s"):
        assert word in words
    assert f"library: torchattacks {metadata.version('torchattacks')}" in words
    assert "alpha: number, 0 or more; default 2/255" in words


def test_every_attack_of_the_libraries_is_adapted_or_left_out_on_purpose() -> None:
    mine = {
        name.partition("/")[2].removesuffix("-10") for name in ADAPTERS if name.startswith("torchattacks/")
    }
    assert mine == set(torchattacks.__all__) - {"VANILA", "MultiAttack", "LGV"}
    module = foolbox.attacks
    classes = {
        name: each
        for name, each in vars(module).items()
        if inspect.isclass(each) and issubclass(each, module.Attack) and each is not module.Attack
    }
    adapted = {classes[name.partition("/")[2]] for name in ADAPTERS if name.startswith("foolbox/")}
    left = {each.__name__ for each in set(classes.values()) - adapted}
    assert left == {"DatasetAttack", "BinarizationRefinementAttack", "SpatialAttack"}


def test_targets_are_not_asked_of_what_has_none(tmp_path: Path) -> None:
    suite(tmp_path, CNN, {"it": {"use": "torchattacks/APGD", "targets": "next"}}, [TASK])
    plan = planner.make(resolve.load(tmp_path / "suite.yaml"))
    assert not plan.conditions
    assert {skip.reason for skip in plan.skips} == {"torchattacks/APGD reaches for no target"}


def test_the_version_of_the_library_enters_keys(tmp_path: Path) -> None:
    suite(tmp_path, CNN, {"it": {"use": "torchattacks/FGSM"}}, [TASK])
    resolved = resolve.load(tmp_path / "suite.yaml").attacks["it"]
    assert resolved.identity["library"] == f"torchattacks=={metadata.version('torchattacks')}"


def test_an_attack_that_hangs_leaves_a_hole_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(self: Any, *_: object) -> None:
        while True:
            torch.ones(10).sum()

    monkeypatch.setattr(torchattacks.FGSM, "forward", hang)
    attacks = {
        "hangs": {"use": "torchattacks/FGSM", "time_limit": 0.5},
        "fine": {"use": "foolbox/FGSM"},
    }
    path = suite(tmp_path, CNN, attacks, [{**TASK, "views": ["first"], "limit": 20}])
    ran = Ran(path)
    (failed,) = ran.failed
    assert isinstance(failed.error, OvertimeError)
    assert "longer than its limit of 0.5 s" in str(failed.error)
    assert len(ran.outcomes(attack="fine")) == 20


DEAF = """
import signal, time
from torch import nn

class Deaf(nn.Sequential):
    tried = False

    def forward(self, x):
        # The first gradient is that of the preflight.
        if x.requires_grad and self.tried:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        self.tried |= x.requires_grad
        return super().forward(x)

def build():
    return Deaf(nn.Flatten(), nn.Linear(64, 10))
"""


def test_an_attack_that_no_signal_wakes_is_killed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    attacks = {
        "hangs": {"use": "torchattacks/FGSM", "time_limit": 1},
        "fine": {"use": "foolbox/LinfAdditiveUniformNoiseAttack"},
    }
    defenses = {"mine": {"use": "module", "build": "deaf:build"}}
    plan = planner.make(resolve.load(suite(tmp_path, defenses, attacks, [{**TASK, "limit": 20}])))
    store = Store(tmp_path / "results")
    store.open()
    context = WorkerContext(store.root, plan.suite.folder, None, "cpu", fingerprint.digests(plan.modules()))
    pool = Process(context, lambda slot, facts: None, ("cpu",))
    monkeypatch.setattr(scheduler, "GRACE", 3.0)
    try:
        done = list(scheduled(outstanding.examine(plan, store), store, pool))
    finally:
        pool.stop()
    (failed,) = [each for each in done if each.error is not None]
    assert isinstance(failed.error, OvertimeError)
    assert "its process was killed" in str(failed.error)
    finished = {
        each.coordinates["attack"] for each in plan.conditions if store.receipt("evaluate", each.job.key)
    }
    assert finished == {"fine"}


def test_every_fault_has_its_line_in_the_document_and_its_test_here() -> None:
    text = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    for name in [f"T{number}" for number in range(1, 22)] + [f"F{number}" for number in range(1, 14)]:
        assert re.search(rf"^\| {name} \|", text, re.MULTILINE), name
        assert f"def test_{name.lower()}_" in here, name


def test_the_document_says_what_each_attack_needs() -> None:
    text = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    for name in ADAPTERS:
        entry = ATTACKS[name]
        assert isinstance(entry, AttackEntry)
        (row,) = [
            line
            for line in text.partition(f"## `{entry.library}/NAME`")[2].partition("\n## ")[0].splitlines()
            if line.startswith(f"| `{name.partition('/')[2]}` |")
        ]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == ", ".join(sorted(entry.norms)), row
        assert cells[2:4] == [entry.access, entry.kind], row


# --- masked classes, saturated softmaxes, ways that end on the boundary (T22 to T24, F14 to F17) ----------


def test_t22_f14_a_class_at_minus_infinity_is_as_one_far_below() -> None:
    model = Linear(seed=3)
    x = images()
    y = model(x)[:, :3].argmax(1)

    def masked(level: float) -> Callable[[Images], Tensor]:
        return lambda z: torch.cat([model(z)[:, :3], torch.full((len(z), 2), level)], 1)

    assert torchattacks.CW(Plain(model)).f(masked(-math.inf)(x), y).isnan().all()
    for name, threat in (
        ("torchattacks/CW", Threat("l2")),
        ("torchattacks/PGD", Threat("linf", 0.2)),
        ("foolbox/L2FMNAttack", Threat("l2")),
        ("foolbox/LinfPGD", Threat("linf", 0.2)),
    ):
        one, other = (run(name, masked(level), x, y, threat) for level in (-math.inf, -1e4))
        assert torch.allclose(one.images, other.images, atol=1e-5)
        assert not one.crafted.notes["nonfinite"].any()


class Plain(nn.Module):
    def __init__(self, logits: Callable[[Images], Tensor]) -> None:
        super().__init__()
        self.logits, self.place = logits, nn.Parameter(torch.empty(0))

    def forward(self, x: Images) -> Tensor:
        return self.logits(x)


@pytest.mark.parametrize(
    ("name", "params", "noted"),
    [
        ("torchattacks/PGD", {}, True),
        ("torchattacks/APGD", {}, True),
        ("torchattacks/APGD", {"loss": "dlr"}, False),
        ("foolbox/LinfPGD", {}, True),
        ("foolbox/LinfDeepFoolAttack", {}, False),
        ("foolbox/LinfDeepFoolAttack", {"loss": "crossentropy"}, True),
    ],
)
def test_t23_f15_where_the_truth_leads_by_more_than_a_softmax_tells_is_noted(
    name: str, params: dict[str, Any], noted: bool
) -> None:
    model = Linear(seed=1)
    x = images(12)
    y = model(x).argmax(1)
    lead = model(x).detach().topk(2).values.diff(dim=1).neg().squeeze(1)
    scale = 16.64 / float(lead.median())
    found = run(name, lambda z: scale * model(z), x, y, Threat("linf", 0.01), **params).crafted.notes
    assert ("saturated" in found) == noted
    if noted:
        assert torch.equal(found["saturated"], scale * lead > 24 * math.log(2))
        assert 0 < found["saturated"].sum() < 12
        if ATTACKS[name].targeted:
            goal = run(
                name, lambda z: scale * model(z), x, y, Threat("linf", 0.01), target=(y + 1) % 5, **params
            )
            assert not goal.crafted.notes["saturated"].any()


@pytest.mark.parametrize("name", ["torchattacks/DeepFool", "foolbox/L2DeepFoolAttack"])
def test_t24_f16_what_ends_on_the_boundary_to_the_last_bit_is_pushed_on(name: str) -> None:
    """Half of the pixels are black, as on digits: there steps lose a part, and more than their overshoot."""
    model = Linear(classes=2, seed=2)
    x = images(12)
    x[:, :, ::2] = 0
    y = model(x).argmax(1)
    if name.startswith("torch"):
        raw = torchattacks.DeepFool(Plain(model))(x.clone(), y)
        assert (model(raw).argmax(1) == y).any()
    made = run(name, model, x, y, Threat("l2"))
    assert not made.crafted.notes["failed"].any()
    assert (model(made.images).argmax(1) != y).all()


def test_f17_a_pixel_of_three_channels_counts_as_one() -> None:
    model = Linear(3, seed=0)
    x = images(4, 3)
    y = model(x).argmax(1)
    made = run("foolbox/InversionAttack", model, x, y, Threat("l0"))
    assert not made.crafted.notes["failed"].all()
    pixels = (made.images != x).any(1).flatten(1).sum(1)
    assert torch.equal(Threat("l0").distance(x, made.images).long(), pixels)
    assert ((made.images != x).flatten(1).sum(1) > pixels).any()
