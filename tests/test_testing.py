"""The kit for plug-in authors: its distances are exact, and it notices a defense that breaks its word."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from bench.protocols import Decision, Images, Norm, Shape, View
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
        check_attack("toy/void", "linf")
    with pytest.raises(AssertionError, match="left the box"):
        check_attack("toy/void", "linf", how="box")
    with pytest.raises(AssertionError, match="left the budget"):
        check_attack("toy/void", "linf", how="budget")
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
    @view("logits", reads=("label",))
    def logits(self) -> View:
        return View(lambda z: self(z.detach()).detach())


class Unfaithful(Halfspace):
    @view("logits", reads=("label",))
    def logits(self) -> View:
        return View(lambda z: -self(z))


class Shifting(Halfspace):
    @view("logits", reads=("label",))
    def logits(self) -> View:
        return View(self, encode=lambda x: 2 * x - 1)


class Thin(Halfspace):
    @view("logits", reads=("label",))
    def logits(self) -> View:
        return View(self.margin)


class Infinite(Halfspace):
    @view("logits", reads=("label",))
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
    @view("logits", reads=("label",))
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
        (Halfspace, {"readouts": ("last",)}, r"reads \['label'\], which are no read-outs"),
        (Halfspace, {"served": ("cycles",)}, r"serves \['cycles'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defense_that_breaks_its_word_does_not_pass(
    cls: type[nn.Module], declared: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(cls, monkeypatch, **declared)
    with pytest.raises(AssertionError, match=complaint):
        check_defense("tried", Shape(1, 4, 4, 2))
