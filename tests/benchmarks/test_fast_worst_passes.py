"""`fast-worst` and `autoattack` against the official AutoAttack: accuracy, passes, and which examples break.

The networks and images are those of `BENCH_DATA` (``nets/``, ``mnist/``): ``BENCH_N`` images (200) from
``BENCH_FIRST`` (0) on. Prints the rows of the table in docs/performance.md.
"""

import os
import sys
from typing import Any, NamedTuple

import pytest
import torch
from published_nets import published
from torch import Tensor, nn

from attacks.autoattack import autoattack
from attacks.fast_worst import fast_worst
from bench.noise import Noise
from bench.protocols import Images, Labels, Norm, Threat, View
from bench.referee.instruments import QueryCounter, instrument

NETS: list[tuple[str, Norm, float]] = [
    ("mnist-certified-0.1", "linf", 0.1),
    ("mnist-adv-a", "linf", 0.3),
    ("mnist-certified-0.1", "l2", 1.5),
    ("mnist-adv-a", "l2", 1.5),
]


class Verdict(NamedTuple):
    """What stands, and what it took by image."""

    stands: Tensor
    forwards: float
    backwards: float


class Counted(nn.Module):
    """A network that counts the images it is asked about, forward and backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, z: Images) -> Tensor:
        answer: Tensor = self.net(z)
        self.forwards += len(z)
        if answer.requires_grad:
            answer.register_hook(lambda _: self._back(len(z)))
        return answer

    def _back(self, n: int) -> None:
        self.backwards += n


def loaded(name: str) -> tuple[nn.Module, Images, Labels]:
    first, n = int(os.environ.get("BENCH_FIRST", "0")), int(os.environ.get("BENCH_N", "200"))
    return published(name, slice(first, first + n))


def official(net: nn.Module, x: Images, y: Labels, norm: Norm, radius: float) -> Verdict:
    library: Any = pytest.importorskip("pyautoattack")
    counted = Counted(net)
    attack = library.AutoAttack(
        counted, eps=radius, norm={"linf": "Linf", "l2": "L2"}[norm], seed=0, version="standard"
    )
    attack.verbose = False
    returned = attack.run_standard_evaluation(x, y, batch_size=len(x))
    z = returned[0] if isinstance(returned, tuple) else returned
    spent = counted.forwards / len(x), counted.backwards / len(x)
    return Verdict(net(z).argmax(1) == y, *spent)


def ours(attack: Any, net: nn.Module, x: Images, y: Labels, norm: Norm, radius: float) -> Verdict:
    counter = QueryCounter.of(len(x), torch.device("cpu"))
    view = instrument(View(net), counter, "gradient", target=None, exact=True)
    z = attack(view, x, y, Threat(norm, radius), Noise("k", torch.arange(len(x)))).images
    spent = float(counter.forwards.mean()), float(counter.backwards.mean())
    return Verdict(net(z).argmax(1) == y, *spent)


@pytest.mark.parametrize(("name", "norm", "radius"), NETS)
def test_the_verdict_is_near_at_a_fraction_of_the_passes(name: str, norm: Norm, radius: float) -> None:
    net, x, y = loaded(name)
    fast = ours(fast_worst, net, x, y, norm, radius)
    whole = ours(autoattack, net, x, y, norm, radius)
    reference = official(net, x, y, norm, radius)
    robust = [100 * float(each.stands.double().mean()) for each in (reference, whole, fast)]
    alike = [100 * float((fast.stands == each.stands).double().mean()) for each in (reference, whole)]
    passes = [f"{each.forwards:.0f}, {each.backwards:.0f}" for each in (reference, whole, fast)]
    columns = [*(f"{each:.1f}" for each in robust), *passes, *(f"{each:.1f}" for each in alike)]
    sys.stdout.write(f"\n| {name}, {norm} {radius}, n = {len(x)} | {' | '.join(columns)} |\n")
    assert robust[2] <= robust[0] + 0.5 + 1e-9
    assert fast.forwards <= reference.forwards / 10
    assert fast.backwards <= reference.backwards / 5
