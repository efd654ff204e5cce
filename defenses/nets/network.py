"""A feed-forward network that can also run backwards: CNN-F's inference (Huang et al. 2020, algorithm 1)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.nets.layers import Layer, Rule, Seen, State


class Tap(NamedTuple):
    """Two places that show the same features: positions in the list of layers.

    The features are what enters layer `forward`; their reconstruction is what layer `feedback` gives
    back at its input.
    """

    forward: int
    feedback: int


class Cycle(NamedTuple):
    """What a pass shows."""

    logits: Tensor
    """v_t, (N, K)."""
    taps: tuple[Tensor, ...]
    """Features f_0 of the first pass, h_0 before those at the taps; of a later pass t their
    reconstructions g_t, in the same order."""


class Network(nn.Module):
    """Layers, of which those from `start` on take part in the feedback. Images are in [0, 1]."""

    def __init__(self, layers: Sequence[Layer], start: int = 0, taps: Sequence[Tap] = ()) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.start = start
        self.taps = tuple(taps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits v_0 of the first pass, (N, K); nothing is kept for a feedback."""
        logits: Tensor = self.layers(scaled(x))
        return logits

    def cycles(self, x: Tensor, count: int, rule: Rule) -> Iterator[Cycle]:
        """Yield the first pass and then `count` more, each after a feedback from the logits before."""
        h = scaled(x)
        for layer in self.layers[: self.start]:
            h = layer(h)
        logits, states, features = self._ascend(h, [None] * len(self.layers), rule)
        yield Cycle(logits, (h, *features))
        for _ in range(count):
            g, seen, reconstructions = self._descend(logits, states, rule)
            h = torch.lerp(h, g, rule.eta)
            logits, states, _ = self._ascend(h, seen, rule)
            yield Cycle(logits, (g, *reconstructions))

    def _ascend(self, h: Tensor, seen: list[Seen], rule: Rule) -> tuple[Tensor, list[State], list[Tensor]]:
        states: list[State] = [None] * len(self.layers)
        entered: dict[int, Tensor] = {}
        for place in range(self.start, len(self.layers)):
            if any(tap.forward == place for tap in self.taps):
                entered[place] = h
            h, states[place] = self._layer(place).advance(h, seen[place], rule)
        return h, states, [entered[tap.forward] for tap in self.taps]

    def _descend(
        self, logits: Tensor, states: list[State], rule: Rule
    ) -> tuple[Tensor, list[Seen], list[Tensor]]:
        u = logits
        seen: list[Seen] = [None] * len(self.layers)
        given: dict[int, Tensor] = {}
        for place in reversed(range(self.start, len(self.layers))):
            u, seen[place] = self._layer(place).feedback(u, states[place], rule)
            if any(tap.feedback == place for tap in self.taps):
                given[place] = u
        return u, seen, [given[tap.feedback] for tap in self.taps]

    def _layer(self, place: int) -> Layer:
        layer = self.layers[place]
        assert isinstance(layer, Layer)
        return layer


def scaled(x: Tensor) -> Tensor:
    """Return images of [0, 1] in [-1, 1]."""
    return x * 2 - 1
