"""A feed-forward network that can also run backwards: CNN-F's inference (Huang et al. 2020, algorithm 1)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.nets.cnnf.operators import Layer, Rule, Seen, State


class Tap(NamedTuple):
    """Two places that show the same features: positions in the list of layers.

    The features are what enters layer `forward`; their reconstruction is what layer `feedback` gives
    back at its input.
    """

    forward: int
    feedback: int


class Up(NamedTuple):
    """A pass from the features at `start` to the logits."""

    logits: Tensor
    """(N, K)."""
    states: list[State]
    """What the feedback needs, by layer."""
    features: list[Tensor]
    """What passed at the taps."""


class Down(NamedTuple):
    """A feedback from logits to the features at `start`."""

    features: Tensor
    """g(k): neither normalised nor masked."""
    seen: list[Seen]
    """What the next pass needs, by layer."""
    reconstructions: list[Tensor]
    """What passed at the taps."""


class Cycle(NamedTuple):
    """What a pass shows."""

    logits: Tensor
    """v_t, (N, K)."""
    taps: list[Tensor]
    """Of the first pass the features, h_0 and then those at the taps; of a later pass t what its
    feedback g_t gave in their place."""


class Network(nn.Module):
    """Layers, of which those from `start` on take part in the feedback. Images are in [0, 1].

    Args:
        layers: from the pixels to the logits.
        start: the first layer that takes part in the feedback.
        taps: where features are compared with their reconstructions.
    """

    def __init__(self, layers: Sequence[Layer], start: int = 0, taps: Sequence[Tap] = ()) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.start = start
        self.taps = tuple(taps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits v_0 of the first pass, (N, K); nothing is kept for a feedback.

        Args:
            x: images (N, C, H, W) in [0, 1].
        """
        logits: Tensor = self.layers(scaled(x))
        return logits

    def cycles(self, x: Tensor, count: int, rule: Rule) -> Iterator[Cycle]:
        """Yield the first pass and then `count` more, each after a feedback from the logits before.

        Args:
            x: images (N, C, H, W) in [0, 1].
            count: feedbacks after the first pass, 0 or more.
            rule: how passes after the first are made.
        """
        h = self.enter(x)
        up = self.ascend(h, None, rule)
        yield Cycle(up.logits, [h, *up.features])
        for _ in range(count):
            down = self.descend(up.logits, up.states, rule)
            h = torch.lerp(h, down.features, rule.eta)
            up = self.ascend(h, down.seen, rule)
            yield Cycle(up.logits, [down.features, *down.reconstructions])

    def enter(self, x: Tensor) -> Tensor:
        """Return the features h_0 at `start`, which the first pass alone computes.

        Args:
            x: images (N, C, H, W) in [0, 1].
        """
        h = scaled(x)
        for layer in self.layers[: self.start]:
            h = layer(h)
        return h

    def ascend(self, h: Tensor, seen: list[Seen] | None, rule: Rule) -> Up:
        """Run the layers from `start` on; `seen` is None in the first pass.

        Args:
            h: features at `start`.
            seen: what each layer has seen of the last feedback; None in the first pass.
            rule: how passes after the first are made.
        """
        states: list[State] = [None] * len(self.layers)
        passed: dict[int, Tensor] = {}
        for place in range(self.start, len(self.layers)):
            if any(tap.forward == place for tap in self.taps):
                passed[place] = h
            h, states[place] = self._layer(place).advance(h, None if seen is None else seen[place], rule)
        return Up(h, states, [passed[tap.forward] for tap in self.taps])

    def descend(self, logits: Tensor, states: list[State], rule: Rule) -> Down:
        """Run the feedback of the layers down to `start`, with the masks of the pass before.

        Args:
            logits: logits (N, K).
            states: what each layer's forward pass left.
            rule: how passes after the first are made.
        """
        u = logits
        seen: list[Seen] = [None] * len(self.layers)
        passed: dict[int, Tensor] = {}
        for place in reversed(range(self.start, len(self.layers))):
            u, seen[place] = self._layer(place).feedback(u, states[place], rule)
            if any(tap.feedback == place for tap in self.taps):
                passed[place] = u
        return Down(u, seen, [passed[tap.feedback] for tap in self.taps])

    def _layer(self, place: int) -> Layer:
        layer = self.layers[place]
        assert isinstance(layer, Layer)
        return layer


def scaled(x: Tensor) -> Tensor:
    """Return images of [0, 1] in [-1, 1].

    Args:
        x: images (N, C, H, W) in [0, 1].
    """
    return x * 2 - 1
