"""Calls of `bench.evaluate` that are odd: their numbers are right, or they are refused with a sentence."""

import functools
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import bench
from bench import Crafted, Images, InputError, Labels, Randomness, Shape, Split, Threat, View
from bench.registry import DEFENSES
from bench.runner.context import settle

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


Y = plain()(X).argmax(1)


def attacked(model: nn.Module | None = None, x: Any = X, y: Any = Y, **said: Any) -> bench.Result:
    """Attack a linear network by one step of PGD, unless something else is said."""
    model = plain() if model is None else model
    return bench.evaluate(model, x, y, **({"attack": {"use": "pgd", "steps": 1}} | said))


def still(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, by: float = 0.0) -> Images:
    return threat.project(x, x + by * threat.radius)


# --- what is said is done ----------------------------------------------------------------------------


def test_targets_of_a_mapping_are_aimed_at() -> None:
    beside = attacked(attack="pgd", steps=1, targets="next")
    within = attacked(attack={"use": "pgd", "steps": 1, "targets": "next"})
    assert within.frame["target"].tolist() == ((Y + 1) % 3).tolist()
    assert within.frame.equals(beside.frame)
    assert attacked().frame["target"].isna().all()


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"attack": "pgd", "use": "fgsm"}, "use"),
        ({"attack": still, "use": "fgsm"}, "use"),
        ({"attack": {"use": "pgd", "steps": 1}, "steps": 9}, "steps"),
        ({"attack": {"use": "pgd", "targets": "next"}, "targets": "none"}, "targets"),
    ],
)
def test_what_is_said_twice_is_refused(said: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: said twice, by the attack and beside it$"):
        attacked(**said)


@pytest.mark.parametrize("name", ["mean", "seed", "batch", "model", "targets", "time_limit", "planned"])
def test_a_parameter_that_would_never_arrive_is_refused(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def own(view, x, y, threat, noise, *, {name}: float = 0.0):\n    return x", scope)
    with pytest.raises(InputError, match=rf"^attack: own: a parameter '{name}' would never be given"):
        attacked(attack=scope["own"])


@pytest.mark.parametrize("radius", [[0.1, 0.2], (0.1, 0.2)])
def test_several_radii_are_refused_by_their_name(radius: Any) -> None:
    with pytest.raises(InputError, match=r"^radius: "):
        attacked(radius=radius)


class Callable:
    """An attack that is an object."""

    def __call__(
        self, view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, by: float = 0.0
    ) -> Images:
        return still(view, x, y, threat, noise, by=by)


@pytest.mark.parametrize("attack", [Callable(), functools.partial(still, by=0.5), Callable().__call__])
def test_whatever_can_be_called_is_an_attack(attack: Any) -> None:
    expected = attacked(attack=still, by=0.25).images
    assert torch.equal(attacked(attack=attack, by=0.25).images, expected)
    assert torch.equal(attacked(attack=functools.partial(still, by=0.25)).images, expected)


def test_what_has_no_signature_is_refused() -> None:
    with pytest.raises(InputError, match=r"^attack: expected a function of"):
        attacked(attack=torch.relu)


# --- images and normalisation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (
            Split(X * 3 - 1, Y, torch.arange(6), ""),
            r"x\.images: image 0: expected values in \[0, 1\], found ",
        ),
        (
            Split(X, Y[:4], torch.arange(6), ""),
            r"x\.labels: expected whole numbers \(6,\), found torch.int64",
        ),
        (Split(X, Y, torch.arange(4), ""), r"x\.index: expected whole numbers \(6,\), found torch.int64"),
        (Split(X, Y, torch.zeros(6).long(), ""), r"x\.index: an example stands twice"),
        (
            Split(X.to("meta"), Y, torch.arange(6), ""),
            r"x\.images: a tensor on the device 'meta' has no values",
        ),
    ],
)
def test_a_split_is_checked_as_tensors_are(split: Split, sentence: str) -> None:
    with pytest.raises(InputError, match="^" + sentence):
        attacked(x=split, y=None)


def test_a_split_of_float64_is_one_of_float32() -> None:
    one, other = (attacked(x=Split(each, Y, torch.arange(6), "d"), y=None) for each in (X, X.double()))
    assert one.frame.equals(other.frame)


@pytest.mark.parametrize(
    "mean",
    [
        0.5, "0.5", "1/2", np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.full((1, 1, 1), 0.5),
        np.array([0.5]), ["1/2"], (0.5,), [torch.tensor(0.5)],
    ],
)  # fmt: skip
def test_a_mean_may_be_written_in_many_ways(mean: Any) -> None:
    assert attacked(mean=mean).frame.equals(attacked(mean=[0.5]).frame)


@pytest.mark.parametrize(
    ("mean", "sentence"),
    [
        (None, "mean: expected a number, or one for each channel, found None"),
        ({"a": 1}, "mean: expected a number, or one for each channel, found a value of type dict"),
        ([None], "mean: expected a number, or one for each channel, found None"),
        (True, "mean: expected a number, found true"),
        ("half", "mean: expected a number or a fraction like 8/255, found 'half'"),
        (["8/255"] * 3, "mean: expected a number, or one for each of 1 channels, found [0.03"),
        (np.array([True]), "mean: expected a number, found true"),
    ],
)
def test_a_mean_that_is_none_is_refused(mean: Any, sentence: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(sentence)):
        attacked(mean=mean)


def test_a_registered_defense_takes_no_mean_of_any_kind() -> None:
    model = DEFENSES["toy/linear"].make(Shape(1, 4, 4, 3))
    with pytest.raises(InputError, match=r"^mean: a registered defense normalises for itself$"):
        attacked(model, mean=torch.zeros(3), readout="plain", view="logits")


# --- networks ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network that answers in a way of its own."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.inner, self.how = plain(), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.inner, x)


def refusing(net: nn.Module, x: Tensor) -> Tensor:
    raise AssertionError("only 224 x 224")


def without(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = net(x)
    return answer


HARD: list[tuple[Any, str]] = [
    (lambda net, x: net(x).detach(), "model: no gradient flows from the logits of view 'logits'"),
    (without, "model: no gradient flows from the logits of view 'logits'"),
    (lambda net, x: torch.from_numpy(net(x).detach().numpy()), "model: no gradient flows"),
    (lambda net, x: torch.from_numpy(x.numpy()).flatten(1)[:, :3], "model: no gradient flows"),
    (lambda net, x: one_hot(net(x).argmax(1), 3).float(), "model: no gradient flows"),
]


@pytest.mark.parametrize(("how", "sentence"), HARD)
def test_a_network_without_a_gradient_is_told_so_and_attacked_by_scores(how: Any, sentence: str) -> None:
    with pytest.raises(InputError, match="^" + sentence) as refused:
        attacked(Net(how))
    assert "pgd needs one; attacks that need scores or answers alone can do without" in str(refused.value)
    assert attacked(Net(how), attack={"use": "square", "queries": 2}).robust.n == 6


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            refusing,
            "model: the network does not take images of shape (1, 4, 4): AssertionError: only 224 x 224",
        ),
        (lambda net, x: (net(x),) if x.requires_grad else net(x), "model: expected logits of shape (2, 3)"),
        (lambda net, x: (net(x),) if len(x) > 2 else net(x), "model: expected logits of shape (6, 3) for 6 "),
        (
            lambda net, x: net(x)[:, : 2 + (len(x) == 2)],
            "model: expected logits of shape (6, 3) for 6 images",
        ),
    ],
)
def test_a_network_that_answers_in_another_form_is_refused(how: Any, sentence: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(sentence)):
        attacked(Net(how))


def test_a_network_whose_weights_are_not_made_is_refused() -> None:
    with pytest.raises(InputError, match="the network has weights that are not made yet"):
        attacked(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    with pytest.raises(InputError, match=r"^model: expected a network on cpu or cuda, found it on meta"):
        attacked(plain().to("meta"))
    with torch.inference_mode():
        net = plain()
    with pytest.raises(InputError, match=r"^model: its weights were made under torch\.inference_mode"):
        attacked(net)


@pytest.mark.parametrize("what", ["weight", "module", "hook"])
def test_an_own_attack_that_replaces_part_of_the_network_is_caught(what: str) -> None:
    net = plain()
    before = net(X).detach()

    def own(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        if what == "weight":
            net[1].weight = nn.Parameter(torch.zeros(3, 16))
        elif what == "module":
            net[1] = nn.Linear(16, 3)
        else:
            net.register_forward_hook(lambda *_: torch.zeros(len(x), 3))
        return x

    with pytest.raises(RuntimeError, match=r"^the attack changed the network it looked at"):
        attacked(net, attack=own)
    assert torch.equal(net(X), before)


class Drawn(nn.Module):
    """The plain network on noisy images."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.net, self.sigma = plain(), sigma

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.net(x + self.sigma * torch.randn_like(x))
        return answer


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_an_attack_stops_at_a_success_unless_the_network_draws(sigma: float) -> None:
    """A radius of 1 breaks every example at once; each answer is a pass."""
    found = attacked(Drawn(sigma), attack={"use": "pgd", "steps": 20}, radius=1.0)
    passes = found.frame["forwards"]
    assert (passes >= 21).all() if sigma else (passes < 10).all()


# --- where it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_change_the_last_bits_of_logits_at_most(batch: int) -> None:
    attack = {"use": "pgd", "steps": 4, "drop": False}
    one, other = (attacked(attack=attack, batch=each, radius=0.1) for each in (500, batch))
    assert torch.equal(one.images, other.images)
    loose = ["logits", "score", "differs", "view_margin", "view_margin_clean", "end_pace"]
    assert one.frame.drop(columns=loose).equals(other.frame.drop(columns=loose))
    for name in ("logits", "score"):
        np.testing.assert_allclose(np.stack(one.frame[name]), np.stack(other.frame[name]), rtol=0, atol=1e-5)


def test_autocast_of_the_caller_decides_no_number() -> None:
    expected = attacked()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attacked().frame.equals(expected.frame)
        assert torch.is_autocast_enabled("cpu")
        settle(torch.device("cpu"))
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_modes_of_the_caller_decide_no_number(mode: Any) -> None:
    expected, net = attacked(), plain()
    with mode():
        device = torch.get_default_device()
        # In inference mode these are tensors that autograd refuses.
        found = attacked(
            net, X + torch.zeros((), device="cpu"), Y + torch.zeros((), dtype=Y.dtype, device="cpu")
        )
        assert torch.get_default_device() == device
    assert torch.get_default_device() == torch.device("cpu")
    assert found.frame.equals(expected.frame)


def test_threads_wait_for_each_other() -> None:
    class Watched(nn.Module):
        """Notes how many calls are inside at once."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.inside, self.most = plain(), 0, 0
            self.both = threading.Barrier(2)

    watched = Watched()

    def own(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
        watched.inside += 1
        watched.most = max(watched.most, watched.inside)
        # Long enough for another call to come in, if it could.
        threading.Event().wait(0.2)
        watched.inside -= 1
        return x

    def call() -> None:
        watched.both.wait()
        bench.evaluate(watched.inner, X, Y, attack=own)

    watched.inner.train()
    threads = [threading.Thread(target=call) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert watched.most == 1
    assert watched.inner.training
    assert all(each.requires_grad for each in watched.inner.parameters())


# --- notes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "note", "sentence"),
    [
        ("broken", torch.zeros(6), "attack: its note.broken has the name of a column"),
        ("clean_label", torch.zeros(6), "attack: its note.clean_label has the name of a column"),
        ("four", torch.zeros(6, 1, 4, 4), "the attack's note 'four' has the shape (6, 1, 4, 4)"),
        ("half", torch.zeros(6, dtype=torch.bfloat16), "the attack's note 'half' is of torch.bfloat16"),
        ("list", [0.0] * 6, "the attack's note 'list' is a list, and not a tensor"),
        ("short", torch.zeros(5), "the attack's note 'short' has the shape (5,) for 6 images"),
        ("single", torch.zeros(()), "the attack's note 'single' has the shape ()"),
    ],
)
def test_a_note_that_no_column_can_hold_is_refused(name: str, note: Any, sentence: str) -> None:
    def own(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Crafted:
        return Crafted(x, {name: note})

    with pytest.raises((InputError, ValueError, TypeError), match="^" + re.escape(sentence)):
        attacked(attack=own)
