"""What several benchmarks attack."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from bench.noise import Noise
from bench.protocols import Images, Labels


def batch(net: nn.Module, n: int) -> tuple[Images, Labels]:
    """Return noise of 28x28, and what the network says of it."""
    x = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return x, net(x).argmax(1)


def draws(x: Images) -> Noise:
    """Return the draws of an attack on these images."""
    return Noise("speed", torch.arange(len(x)))


def keeping(
    found: dict[str, Images], makers: Mapping[str, Callable[[], Images]]
) -> dict[str, Callable[[], None]]:
    """Return contenders of a race that leave in `found` what they found last, to be compared afterwards."""

    def contender(name: str) -> Callable[[], None]:
        def run() -> None:
            found[name] = makers[name]()

        return run

    return {name: contender(name) for name in makers}
