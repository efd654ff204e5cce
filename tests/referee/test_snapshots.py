"""What an attack replaces in a network is found, put back, and told from what a network does itself."""

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import InputError
from bench.referee.freezing import frozen
from suites import TASK, Ran, suite

X = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


def hidden(net: nn.Sequential) -> None:
    net[3].__dict__["weight"] = torch.zeros(2, 4)


def removed(net: nn.Sequential) -> None:
    last: Any = net[3]
    weight = last.weight.detach() * 0
    del last.weight
    last.weight = weight


def backwards(net: nn.Sequential) -> None:
    net._modules = OrderedDict(reversed(net._modules.items()))


def replaced(net: nn.Sequential) -> None:
    net[3] = nn.Linear(4, 2)
    raise ValueError("broken")


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (lambda net: setattr(net[3], "weight", nn.Parameter(torch.zeros(2, 4))), "3.weight"),
    (lambda net: setattr(net[3], "bias", None), "3.bias"),
    (lambda net: setattr(net[2], "running_mean", torch.ones(4)), "2.running_mean"),
    (lambda net: net.__setitem__(3, nn.Linear(4, 2)), "3"),
    (lambda net: net.__setitem__(1, nn.Identity()), "1"),
    (lambda net: net.__delitem__(1), "1, 2"),
    (lambda net: net.append(nn.Softmax(1)), "4"),
    (lambda net: net.register_forward_hook(lambda *_: torch.zeros(4, 2)), "hooks of the network"),
    (lambda net: net[1].register_forward_pre_hook(lambda _, x: x[0] * 0), "hooks of 1"),
    (lambda net: setattr(net, "forward", lambda x: net[0](x)[:, :2]), "forward"),
    (lambda net: setattr(net[1], "forward", MethodType(lambda _, x: -x, net[1])), "1.forward"),
    (lambda net: setattr(net[1], "__class__", nn.Tanh), "the class of 1"),
    (hidden, "3.weight"),
    (removed, "3.weight"),
    (lambda net: setattr(net[3].weight, "data", torch.zeros(2, 4, dtype=torch.float64)), "3.weight"),
    (lambda net: setattr(net[3].weight, "data", torch.zeros(1, 4)), "3.weight"),
]


@pytest.mark.parametrize(
    ("change", "what"), CHANGES, ids=[f"{i} {what}" for i, (_, what) in enumerate(CHANGES)]
)
def test_what_an_attack_replaces_is_found_and_put_back(change: Callable[[Any], object], what: str) -> None:
    net = network()
    before, parameters, told = net(X).detach(), list(net.parameters()), repr(net)
    looks = frozen(net, seed=1, ask=lambda: net(X))
    with pytest.raises(RuntimeError, match=r"^the attack changed .*\(" + what), looks:
        change(net)
    assert torch.equal(net(X), before)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert repr(net) == told
    with frozen(net, seed=1, ask=lambda: net(X)):
        net(X)


def test_what_an_attack_replaces_is_put_back_after_a_crash_too() -> None:
    net = network()
    before = net(X).detach()
    looks = frozen(net, seed=1, ask=lambda: net(X))
    with pytest.raises(ValueError, match="broken"), looks:
        replaced(net)
    assert torch.equal(net(X), before)


class Restless(nn.Module):
    """Replaces a module and a buffer, and hooks itself on, whenever it is asked, and answers the same."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        self.register_buffer("grid", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.pool = nn.AvgPool1d(x.shape[-1])
        self.grid = torch.arange(len(x))
        self.register_buffer(f"kept{len(x)}", self.grid)
        self.register_forward_hook(lambda *_: None)
        pooled: Tensor = self.pool(x)
        return pooled


def test_a_network_may_replace_what_is_its_own() -> None:
    net = Restless().eval()
    with frozen(net, seed=1, ask=lambda: net(X)):
        net(X)
    with frozen(net, seed=1):
        net(X)


def test_a_network_that_cannot_be_asked_is_left_as_it_was_and_does_not_answer_for_the_change() -> None:
    def ask() -> None:
        raise KeyError

    net = network().train()
    with pytest.raises(RuntimeError, match="the attack changed"), frozen(net, seed=1, ask=ask):
        net[3] = nn.Linear(4, 2)
    assert net.training
    assert net[3].weight.requires_grad


def test_a_network_without_weights_yet_is_refused() -> None:
    net = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(InputError, match=r"not made yet \(0\.weight, 0\.bias\)"), frozen(net, seed=1):
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_networks_are_frozen_too() -> None:
    net = torch.jit.trace(network(), X)
    before = net(X)
    with frozen(net, seed=1, ask=lambda: net(X)):
        assert torch.equal(net(X), before)


def test_an_attack_that_replaces_a_weight_spoils_no_other_condition(tmp_path: Path) -> None:
    defenses = {"net": {"use": "standard", "epochs": 1}}
    attacks = {"a": {"use": "toy/crash", "how": "replace"}, "pgd": {"use": "pgd", "steps": 1}}
    clean = {"clean": {"use": "none"}}
    both = {}
    for name, extra in (("alone", {}), ("beside", {"a": attacks["a"]})):
        folder = tmp_path / name
        folder.mkdir()
        chosen = deepcopy({**extra, **clean, "pgd": attacks["pgd"]})
        ran = Ran(suite(folder, defenses, chosen, [TASK]))
        assert {"the attack changed" in str(each.error) for each in ran.failed} <= {True}
        assert len(ran.failed) == (3 if extra else 0)
        both[name] = [ran.outcomes(attack=each)["label"].tolist() for each in ("clean", "pgd")]
    assert both["beside"] == both["alone"]
