"""The activations of ABS' autoencoders, ELU in a form that is fast on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu


class Elu(torch.autograd.Function):
    """ELU by way of the exponential: several times faster on a CPU than torch's, equal up to rounding.

    Its backward pass is differentiable too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return x where it is positive, exp(x) - 1 elsewhere.

        Args:
            x: any tensor.
        """
        # exp(x) - 1 >= x everywhere; held at 0 from above, the maximum is the right branch.
        out = x.exp().clamp_max_(1).sub_(1)
        torch.maximum(x, out, out=out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient times 1, or times exp(x) = out + 1 where x is negative."""
        (out,) = ctx.saved_tensors
        back: Tensor = torch.ops.aten.elu_backward(gradients[0], 1, 1, 1, True, out)
        return back


def activated(x: Tensor, name: str) -> Tensor:
    """Return `x` after the activation called ``elu``, ``relu``, or ``leaky`` (slope 0.2).

    Args:
        x: any tensor.
        name: the activation.
    """
    if name == "elu":
        out: Tensor = Elu.apply(x)
        return out
    return relu(x) if name == "relu" else leaky_relu(x, 0.2)
