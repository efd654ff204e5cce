"""The kit for plug-in authors: its distances are exact, and it notices a defense that breaks its word."""

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from bench.protocols import Decision, Fitting, Images, Norm, Part, Shape, Split, View
from bench.registry import ATTACKS, DEFENSES, defense, view
from bench.testing import Halfspace, check_attack, check_defense

SHAPE = Shape(1, 3, 3, 2)


# --- the half-space ------------------------------------------------------------------------------------


def solved(plane: Halfspace, x: Images, norm: Norm) -> float:
    """Return the least distance of one image by general solvers."""
    weight = plane.weight.detach().double().flatten().numpy()
    start, margin = x.flatten().numpy(), float(plane.margin(x).detach())
    sign, size = np.sign(margin), len(weight)
    box = [(-each, 1 - each) for each in start]
    match norm:
        case "linf":
            # Minimise t, where -t <= move <= t and the margin is gone.
            wall = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
            rows = np.vstack([wall, np.append(sign * weight, 0)])
            limits = np.append(np.zeros(2 * size), -abs(margin))
            return float(linprog(np.append(np.zeros(size), 1), rows, limits, bounds=[*box, (0, None)]).fun)
        case "l1":
            both = np.concatenate([sign * weight, -sign * weight])[None]
            room = [(0, high) for _, high in box] + [(0, -low) for low, _ in box]
            return float(linprog(np.ones(2 * size), both, [-abs(margin)], bounds=room).fun)
        case "l2":
            found = minimize(
                lambda move: move @ move,
                -margin * weight / (weight @ weight),
                jac=lambda move: 2 * move,
                bounds=box,
                constraints={
                    "type": "eq",
                    "fun": lambda move: move @ weight + margin,
                    "jac": lambda _: weight,
                },
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            )
            assert found.success
            return float(found.fun**0.5)
        case "l0":
            gains = np.where(-sign * weight > 0, 1 - start, start) * abs(weight)
            counts = [
                bin(chosen).count("1")
                for chosen in range(2**size)
                if sum(gain for bit, gain in enumerate(gains) if chosen >> bit & 1) >= abs(margin)
            ]
            return float(min(counts))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("margin", [0.4, 1.5])
def test_least_distances_are_those_of_general_solvers(norm: Norm, margin: float) -> None:
    plane = Halfspace(SHAPE, seed=3)
    x, y = plane.examples(6, margin=margin)
    assert torch.equal(plane(x).argmax(1), y)
    assert ((x == 0) | (x == 1)).any()
    expected = [solved(plane, each[None], norm) for each in x]
    assert plane.least(x, norm).tolist() == pytest.approx(expected, rel=1e-5)


def test_far_from_the_box_the_least_distance_is_the_margin_over_the_dual_norm() -> None:
    plane = Halfspace(Shape(3, 8, 8, 2)).requires_grad_(False)
    x = 0.49 + 0.02 * plane.examples(5)[0]
    duals: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
    for norm, dual in duals.items():
        length = torch.linalg.vector_norm(plane.weight.double(), dual)
        assert torch.allclose(plane.least(x, norm), plane.margin(x).abs() / length)


def test_what_the_box_keeps_out_of_reach_is_infinitely_far() -> None:
    plane = Halfspace(SHAPE)
    plane.bias.data += 100
    for norm in ("linf", "l2", "l1", "l0"):
        assert plane.least(torch.rand(2, 1, 3, 3), norm).isinf().all()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_half_space_is_a_sound_defense(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    register(Halfspace, monkeypatch)
    check_defense("tried", Shape(3, 5, 4, classes), seed=2)


# --- what passes, and what does not --------------------------------------------------------------------


def test_attacks_of_every_access_and_space_can_be_checked() -> None:
    check_attack("toy/minimal", "l2")
    check_attack("toy/code", "linf")
    with pytest.raises(AssertionError, match=r"'toy/answers' left \d of 8 images"):
        check_attack("toy/answers", "linf", tries=1)
    with pytest.raises(AssertionError, match="not finite"):
        check_attack("toy/invalid", "linf")
    with pytest.raises(AssertionError, match="left the box"):
        check_attack("toy/invalid", "linf", how="box")
    with pytest.raises(AssertionError, match="left the budget"):
        check_attack("toy/invalid", "linf", how="kind")
    with pytest.raises(PermissionError):
        check_attack("toy/blind", "linf")
    with pytest.raises(RuntimeError):
        check_attack("toy/peek", "linf")
    with pytest.raises(AssertionError, match="'toy/minimal' is made for \\['l2'\\], not for 'linf'"):
        check_attack("toy/minimal", "linf")


def test_an_attack_without_a_radius_must_not_go_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def far(view: View, x: Images, y: Tensor, threat: Any, noise: Any) -> Images:
        return x + 1.5 * (ATTACKS["toy/minimal"].make(view, x, y, threat, noise).images - x)

    monkeypatch.setitem(ATTACKS._entries, "far", replace(ATTACKS["toy/minimal"], name="far", make=far))
    with pytest.raises(AssertionError, match=r"went 1\.5 times as far as it needed to"):
        check_attack("far", "l2")


def test_defenses_with_refusal_inversion_and_chance_can_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_defense("toy/linear", Shape(1, 4, 4, 3), threshold=0.35)
    register(Drawing, monkeypatch, random=True)
    check_defense("tried", Shape(1, 4, 4, 2))


def test_a_defense_may_be_readied_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unready(Halfspace):
        ready = False

        def decide(self, x: Images, readout: str, /) -> Decision:
            if not self.ready:
                raise ValueError("not yet")
            return super().decide(x, readout)

    register(Unready, monkeypatch)
    with pytest.raises(ValueError, match="not yet"):
        check_defense("tried", Shape(1, 4, 4, 2))

    def prepare(model: Unready) -> None:
        assert not any(each.requires_grad or each.grad is not None for each in model.parameters())
        # Of the class: `restored` builds another, which its weights alone cannot ready.
        monkeypatch.setattr(Unready, "ready", True)

    check_defense("tried", Shape(1, 4, 4, 2), prepare=prepare)


def test_a_part_is_given_as_a_module() -> None:
    base = DEFENSES["toy/linear"].make(Shape(1, 4, 4, 3))
    check_defense("toy/stacked", Shape(1, 4, 4, 3), base=base)


class Trained(Halfspace):
    """Learns by a step an epoch; what is kept, and what else is learned, is its children's."""

    def __init__(self, shape: Shape, *, seed: int = 0, epochs: int = 5) -> None:
        super().__init__(shape, seed=seed)
        self.epochs = epochs
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Images) -> Tensor:
        return super().forward(x) * self.scale

    def given(self, optimiser: Any, schedule: Any) -> list[Any]:
        return [optimiser, schedule]

    def scheduled(self, optimiser: Any) -> Any:
        return lr_scheduler.MultiStepLR(optimiser, [1])

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        optimiser = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = self.scheduled(optimiser)
        for epoch in fitting.epochs(self.epochs, self, *self.given(optimiser, schedule)):
            for x, y, _ in epoch.batches(4):
                loss = cross_entropy(self(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                epoch.report(loss)
            schedule.step()
        self.learn(train)

    def learn(self, train: Split) -> None:
        self.scale.fill_(0.5 + random.random() / 2)


class Unscheduled(Trained):
    """Keeps the optimiser alone, whose rate the schedule knows only from its own count."""

    def given(self, optimiser: Any, schedule: Any) -> list[Any]:
        return [optimiser]


class LateSchedule(Unscheduled):
    def scheduled(self, optimiser: Any) -> Any:
        return lr_scheduler.StepLR(optimiser, 4)


class Unoptimised(Trained):
    def given(self, optimiser: Any, schedule: Any) -> list[Any]:
        return [schedule]


class Meaning(Trained):
    """Keeps a mean of its weights, which it becomes, to itself."""

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        mean = self.weight.detach().clone()
        optimiser = torch.optim.SGD(self.parameters(), lr=0.1)
        for epoch in fitting.epochs(self.epochs, self, optimiser):
            for x, y, _ in epoch.batches(4):
                optimiser.zero_grad()
                cross_entropy(self(x), y).backward()
                optimiser.step()
                mean.lerp_(self.weight.detach(), 0.5)
        self.weight.data.copy_(mean)


class Entropic(Trained):
    """Draws where no seed reaches, after its training."""

    def learn(self, train: Split) -> None:
        self.scale.fill_(0.5 + np.random.default_rng().random() / 2)


class Attributed(Trained):
    """Learns a number that is no buffer."""

    temperature = 1.0

    def learn(self, train: Split) -> None:
        self.temperature = 2.0 + float(train.images.mean())

    def forward(self, x: Images) -> Tensor:
        return super().forward(x) * self.temperature


class Offset(Trained):
    """Learns a tensor that is no buffer, and shows it to attackers alone."""

    def learn(self, train: Split) -> None:
        self.offset = torch.stack([train.images[train.labels == label].mean() for label in range(2)])

    @view("shifted")
    def shifted(self) -> View:
        return View(lambda x: self(x) + getattr(self, "offset", 0.0))


class Chosen(Trained):
    """Draws a plain attribute in its constructor, where no seed reaches."""

    def __init__(self, shape: Shape, *, seed: int = 0, epochs: int = 5) -> None:
        super().__init__(shape, seed=seed, epochs=epochs)
        self.bias.data += np.random.default_rng().random()


class Borrowing(Trained):
    """Contains a part that it does not register, so that its weights are nobody's."""

    def __init__(self, shape: Shape, *, base: Part, seed: int = 0, epochs: int = 5) -> None:
        super().__init__(shape, seed=seed, epochs=epochs)
        self.parts = [base]

    def forward(self, x: Images) -> Tensor:
        return super().forward(x) + self.parts[0](x)


class Diverging(Trained):
    def learn(self, train: Split) -> None:
        self.scale.fill_(float("nan"))


class Seeded(Trained):
    """Draws from every global generator, while it is made and while it learns: which is right."""

    def __init__(self, shape: Shape, *, seed: int = 0, epochs: int = 5) -> None:
        super().__init__(shape, seed=seed, epochs=epochs)
        self.bias.data += random.random() + np.random.random() + torch.rand(())

    def forward(self, x: Images) -> Tensor:
        if self.training:
            x = x + 0.1 * random.random() + 0.1 * np.random.random() + 0.1 * torch.rand(())
        return super().forward(x)


class Failing(Trained):
    """Mends whatever is raised while it learns: a kill is not."""

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        with suppress(Exception):
            super().fit(train, fitting)


@pytest.mark.parametrize("cls", [Trained, Seeded, Failing])
@pytest.mark.parametrize("epochs", [1, 2, 6])
def test_a_defense_that_keeps_all_that_it_needs_passes(
    cls: type[nn.Module], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(cls, monkeypatch)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    check_defense("tried", Shape(1, 4, 4, 2), epochs=epochs)
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


RESUMED = "a fit that was broken off and gone on with ends with another"
ALONE = "fitted, its weights and buffers alone answer otherwise"


@pytest.mark.parametrize(
    ("cls", "params", "complaint"),
    [
        (Unscheduled, {}, RESUMED),
        (LateSchedule, {"epochs": 6}, RESUMED),
        (Unoptimised, {}, RESUMED),
        (Meaning, {}, f"{RESUMED} weight"),
        (Entropic, {}, f"{RESUMED} scale"),
        (Attributed, {}, f"read-out 'label': {ALONE}"),
        (Offset, {}, f"view 'shifted': {ALONE}"),
        (Chosen, {}, "built twice with the same seeds, it is not the same"),
        (Borrowing, {"base": Halfspace(Shape(1, 4, 4, 2))}, "saved and restored weights answer otherwise"),
        (Diverging, {}, "fitted, its scale is not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defense_that_does_not_keep_what_it_learns_does_not_pass(
    cls: type[nn.Module], params: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(cls, monkeypatch)
    with pytest.raises(AssertionError, match=complaint):
        check_defense("tried", Shape(1, 4, 4, 2), **params)


def test_a_defense_that_cannot_be_fitted_here_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    register(Unscheduled, monkeypatch)
    check_defense("tried", Shape(1, 4, 4, 2), unfitted="it is not what is tested")


def register(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch, **declared: Any) -> None:
    """Register a class as ``tried``, for one test."""
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    monkeypatch.setattr(DEFENSES, "_closed", False)
    defense("tried", **{"readouts": ("label",), "version": 1} | declared)(cls)


class Flat(Halfspace):
    @view("logits")
    def logits(self) -> View:
        return View(lambda z: self(z.round() + 0 * z))


class Detached(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(lambda z: self(z.detach()).detach())


class Unfaithful(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(lambda z: -self(z))


class Shifting(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(self, encode=lambda x: 2 * x - 1)


class Thin(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(self.margin)


class Infinite(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        return View(lambda z: self(z) / 0)


class Mode(Halfspace):
    def decide(self, x: Images, readout: str, /) -> Decision:
        self.train()
        return super().decide(x, readout)


class Drawing(Halfspace):
    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self(x) + torch.randn(len(x), 2))


class Writing(Halfspace):
    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self(x.mul_(0.5)))


class Remembering(Halfspace):
    """Answers by what it was asked before."""

    def decide(self, x: Images, readout: str, /) -> Decision:
        self.asked = getattr(self, "asked", 0) + 1
        return Decision.of(self(x) * self.asked)


class Sociable(Halfspace):
    """Normalises by the batch."""

    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self(x - x.mean(0, keepdim=True)))


class Loose(Halfspace):
    """Keeps something that it learns outside its state."""

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(shape, seed=seed)
        self.temperature = float(torch.rand(()))

    def decide(self, x: Images, readout: str, /) -> Decision:
        return Decision.of(self(x) * self.temperature)


class Whole(Halfspace):
    def decide(self, x: Images, readout: str, /) -> Decision:
        return super().decide(x, readout)._replace(label=self(x).argmax(1).int())


class Refusing(Halfspace):
    """Marks a refusal by a label of its own, instead of by `rejected`."""

    def decide(self, x: Images, readout: str, /) -> Decision:
        return super().decide(x, readout)._replace(label=torch.full((len(x),), 2), logits=None)


class Learning(Halfspace):
    @view("logits", exact_for=("label",))
    def logits(self) -> View:
        def look(z: Tensor) -> Tensor:
            self.weight.data.mul_(1.001)
            return self(z)

        return View(look)


@pytest.mark.parametrize(
    ("cls", "declared", "complaint"),
    [
        (Flat, {}, "gradient of zero for 6 of 6 images"),
        (Detached, {}, "declared to have a gradient, and has none"),
        (Unfaithful, {}, "declared to read 'label'"),
        (Shifting, {}, "is in pixels, but its encode or decode changes the image"),
        (Thin, {}, r"answers \(6,\), not \(6, 2\)"),
        (Infinite, {}, "not finite"),
        (Mode, {}, "training or evaluation mode"),
        (Drawing, {}, "torch's global random state"),
        (Writing, {}, "changed the images"),
        (Remembering, {}, "answers otherwise when asked twice"),
        (Sociable, {}, "in another order or company"),
        (Loose, {}, "saved and restored weights answer otherwise"),
        (Whole, {}, "label is torch.int32"),
        (Refusing, {}, "a label is none of the 2 classes"),
        (Learning, {}, "weights or buffers"),
        (Halfspace, {"aliases": {"e2e": "first"}}, "another name of 'first', which is no view"),
        (Halfspace, {"readouts": ("last",)}, r"is exact for \['label'\], which are no read-outs"),
        (Halfspace, {"inference": ("cycles",)}, r"declares inference=\['cycles'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defense_that_breaks_its_word_does_not_pass(
    cls: type[nn.Module], declared: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(cls, monkeypatch, **declared)
    with pytest.raises(AssertionError, match=complaint):
        check_defense("tried", Shape(1, 4, 4, 2))
