"""The operators of CNN-F (Huang et al. 2020, arXiv:2007.09200), forward and in feedback.

A layer keeps nothing between calls. What the feedback needs of a forward pass is its *state*; what the
next forward pass needs of the feedback is what the layer has *seen*. Both are handed around, so that
gradients flow through them and no answer depends on an earlier one.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    interpolate,
    linear,
    max_pool2d,
    max_unpool2d,
    relu,
)

from defenses.nets.common import channels_last, straight

EPSILON = 1e-8
"""What is added to the mean square before the root, in every normalisation."""


class Rule(NamedTuple):
    """How passes after the first are made."""

    eta: float = 0.1
    """Step of the online update: how far a pre-activation moves to the feedback."""
    temperature: float | None = None
    """None: exact gradients almost everywhere. Else the backward pass sees masks as sigmoids."""
    head: Literal["max", "tanh"] = "max"
    """With a temperature: what the backward pass sees of a normalisation that only leaves signs."""


class Gate(NamedTuple):
    """State of an AdaReLU: which units are open."""

    open: Tensor
    """0 or 1, in the dtype of the features."""
    soft: Tensor | None
    """The same as a sigmoid, for the backward pass of a smoothed rule."""


class Choice(NamedTuple):
    """State of an AdaPool: which position of each 2x2 cell was taken."""

    place: Tensor
    """int64: the position in the plane, as `max_pool2d` gives it."""
    weight: Tensor | None
    """0 where the feedback was 0 and nothing was taken, else 1; None: 1 everywhere."""
    soft: tuple[Tensor, Tensor, Tensor] | None
    """Of a smoothed rule: positions of maximum and minimum, and the soft weight of the maximum."""


class Gates(NamedTuple):
    """State of a residual block: its two units."""

    first: Gate
    second: Gate


State: TypeAlias = Gate | Gates | Choice | None
Seen: TypeAlias = Tensor | tuple[Tensor, Tensor] | None


class Layer(nn.Module):
    """An operator with a forward and a feedback form; calling it is the feed-forward network's form."""

    def advance(self, x: Tensor, seen: Seen, rule: Rule) -> tuple[Tensor, State]:
        """Return the output and the state; `seen` is None in the first pass.

        Args:
            x: features (N, C, H, W).
            seen: what the layer has seen of the last feedback; None in the first pass.
            rule: how passes after the first are made.
        """
        return self(x), None

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return the feedback at the input, and what the layer has seen, for `u` at the output.

        Args:
            u: the feedback at the output.
            state: of the forward pass before, as `advance` returned it.
            rule: how passes after the first are made.
        """
        return u, None


class Conv(Layer):
    """A convolution without bias; in feedback, the transposed one with the same weight.

    Sides must be even where the stride is 2.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel, odd.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (kernel * kernel * outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride)."""
        return conv2d(channels_last(x), self.weight, stride=self.stride, padding=self.weight.shape[-1] // 2)

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return (N, inputs, H, W)."""
        back = conv_transpose2d(
            channels_last(u),
            self.weight,
            stride=self.stride,
            padding=self.weight.shape[-1] // 2,
            output_padding=self.stride - 1,
        )
        return back, None


class Linear(Layer):
    """A linear map with bias; in feedback, the transposed one, without.

    Args:
        inputs: units of the input.
        outputs: units of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs)."""
        return linear(x, self.weight, self.bias)

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return (N, inputs)."""
        return u @ self.weight, None


class Norm(Layer):
    """`normalise`, then a bias for each channel; the feedback passes unchanged.

    Args:
        channels: channels of the input.
        epsilon: added to the mean square before the root, above 0.
    """

    def __init__(self, channels: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, (N, C, H, W)."""
        out: Tensor = _Normalise.apply(x, self.bias, self.epsilon)
        return out


class FeedbackNorm(Layer):
    """`normalise` in feedback; the forward pass goes through unchanged.

    Args:
        epsilon: added to the mean square before the root, above 0.
        constant: whether it lies below an average pooling, where every channel is constant and all that is
            left of it is its sign; a smoothed rule replaces that in the backward pass.
    """

    def __init__(self, epsilon: float = EPSILON, *, constant: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return the same shape, (N, C, H, W)."""
        back = normalise(u, self.epsilon)
        if rule.temperature is None or not self.constant:
            return back, None
        if rule.head == "tanh":
            return straight(back, torch.tanh(u / rule.temperature)), None
        peak = u.abs().amax((1, 2, 3), keepdim=True)
        return straight(back, u / peak.clamp_min(torch.finfo(u.dtype).tiny)), None


class AdaReLU(Layer):
    """A unit that lets through what agrees in sign with its feedback; at first, a ReLU.

    The output has the sign of the pre-activation, as in the released code: with the printed form,
    which turns negative values over, the identity of the paper's lemma A.1 does not hold (D-05). The
    mask is 1 where f g > 0 (D-06), so that a unit whose feedback is exactly 0 is closed (D-07). The
    online update is made here and nowhere else (D-46).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the ReLU of `x`."""
        return relu(x)

    def advance(self, x: Tensor, seen: Seen, rule: Rule) -> tuple[Tensor, State]:
        """Move to the feedback by `eta`, then open the gate where both agree in sign."""
        if seen is None:
            out = relu(x)
            soft = None if rule.temperature is None else torch.sigmoid(x / rule.temperature)
            return out, Gate(out.detach().sign(), soft)
        assert isinstance(seen, Tensor)
        x = torch.lerp(x, seen, rule.eta)
        agreement = x.detach() * seen.detach() if rule.temperature is None else x * seen
        soft = None if rule.temperature is None else torch.sigmoid(agreement / rule.temperature)
        # sign and ReLU of floats: on a CPU several times as fast as a comparison.
        gate = Gate(agreement.detach().sign().relu_(), soft)
        return gated(x, gate), gate

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return `u` where the gate is open; `u` itself is what was seen."""
        assert isinstance(state, Gate)
        return gated(u, state), u


class AdaPool(Layer):
    """Pooling of 2x2 cells: the maximum where the feedback is positive, the minimum where negative.

    Where it is exactly 0 nothing is taken (D-07). One position of each cell is taken (D-47); the
    feedback goes back to it, with the signs that chose it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum of each cell, (N, C, H / 2, W / 2)."""
        return max_pool2d(x, 2)

    def advance(self, x: Tensor, seen: Seen, rule: Rule) -> tuple[Tensor, State]:
        """Return the chosen value of each cell, and the choice."""
        if seen is None:
            out, place = max_pool2d(x, 2, return_indices=True)
            return out, Choice(place, None, None)
        assert isinstance(seen, Tensor)
        sign = seen.detach().sign()
        # The minimum is the maximum of the negated cell, so that one pooling finds both.
        peak, place = max_pool2d(x * interpolate(sign, scale_factor=2), 2, return_indices=True)
        out, weight = peak * sign, sign.abs()
        if rule.temperature is None:
            return out, Choice(place, weight, None)
        (high, top), (low, bottom) = (max_pool2d(each, 2, return_indices=True) for each in (x, -x))
        # Of two values f the chance of exp(f g / temperature), as the gate's sigmoid is of f and 0.
        chance = torch.sigmoid(seen * (high + low) / rule.temperature)
        out = straight(out, chance * high - (1 - chance) * low)
        return out, Choice(place, weight, (top, bottom, chance))

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return `u` at the positions taken, zero elsewhere; `u` itself is what was seen."""
        assert isinstance(state, Choice)
        back = unpool(u if state.weight is None else u * state.weight, state.place)
        if state.soft is not None:
            top, bottom, chance = state.soft
            soft = unpool(u * chance, top) + unpool(u * (1 - chance), bottom)
            back = straight(back, soft)
        return back, u


class AveragePool(Layer):
    """The mean of each plane; in feedback, its copy at every position (not divided by their number).

    Args:
        height: of a plane.
        width: of a plane.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True)

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return (N, C, H, W)."""
        return channels_last(u.expand(-1, -1, *self.size)), None


class Flatten(Layer):
    """Planes to one vector, and back.

    Args:
        channels: number of planes.
        height: of a plane.
        width: of a plane.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.size = channels, height, width

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C * H * W)."""
        return aligned(x).flatten(1)

    def feedback(self, u: Tensor, state: State, rule: Rule) -> tuple[Tensor, Seen]:
        """Return (N, C, H, W)."""
        return channels_last(u.reshape(-1, *self.size)), None


def normalise(u: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return each plane of (N, C, H, W) over its root mean square; no mean is taken off (D-01).

    Args:
        u: planes (N, C, H, W).
        epsilon: added to the mean square before the root, above 0.
    """
    out: Tensor = _Normalise.apply(u, None, epsilon)
    return out


class _Normalise(torch.autograd.Function):
    """Planes over their root mean square, plus a bias (C) or None.

    Written out because autograd takes twice the passes over memory, one in a layout that CPUs are slow in.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        scale = _scale(u, epsilon)
        ctx.save_for_backward(u, scale)
        ctx.epsilon = epsilon
        return u * scale if bias is None else torch.addcmul(bias.view(-1, 1, 1), u, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        u, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # To be differentiated again: the scale, too, depends on u.
            scale = _scale(u, ctx.epsilon)
        along = (u * gradient).mean((2, 3), keepdim=True).mul_(scale.square())
        inward = torch.addcmul(gradient, u, along, value=-1).mul_(scale)
        return inward, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None, None


def _scale(u: Tensor, epsilon: float) -> Tensor:
    return u.square().mean((2, 3), keepdim=True).add_(epsilon).rsqrt_()


def gated(x: Tensor, gate: Gate) -> Tensor:
    """Return `x` where the gate is open, 0 elsewhere.

    Args:
        x: features.
        gate: which of them pass.
    """
    out = x * gate.open
    return out if gate.soft is None else straight(out, x * gate.soft)


def unpool(u: Tensor, place: Tensor) -> Tensor:
    """Return planes of twice the size with `u` at the positions `place`, zero elsewhere.

    Args:
        u: planes (N, C, H, W).
        place: int64 positions in planes of twice the size, as `max_pool2d` gives them.
    """
    return max_unpool2d(aligned(u), place, [2, 2])


def aligned(x: Tensor) -> Tensor:
    """Return `x`, whose gradient will come in that layout too, wherever it comes from.

    Args:
        x: features (N, C, H, W).
    """
    out: Tensor = _Aligned.apply(x)
    return out


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return channels_last(gradients[0])
