"""What networks of several papers share: scaled widths, a fast layout, straight-through gradients."""

from typing import Any

import torch
from torch import Tensor


def scaled_width(channels: int, width: float) -> int:
    """Return a number of channels times `width`, at least 1.

    Args:
        channels: the paper's number.
        width: factor, above 0.
    """
    return max(1, round(channels * width))


def channels_last(x: Tensor) -> Tensor:
    """Return `x` laid out channel by channel within a pixel: on a CPU, what convolution is fast at.

    Args:
        x: a tensor (N, C, H, W).
    """
    return x if x.is_cuda else x.to(memory_format=torch.channels_last)


def straight(hard: Tensor, soft: Tensor) -> Tensor:
    """Return `hard`, with the gradient of `soft` (BPDA, Athalye et al. 2018, arXiv:1802.00420).

    Args:
        hard: the value; no gradient flows into it.
        soft: of the same shape; the gradient flows into it.
    """
    out: Tensor = _Straight.apply(hard.detach(), soft)
    return out


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
