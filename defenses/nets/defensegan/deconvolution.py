"""A transposed convolution that draws: from many channels to the few of an image, at twice the size."""

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle

from defenses.nets.common import channels_last


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution (N, inputs, H, W) -> (N, channels, 2H, 2W) of stride 2, kernel 4 or 5.

    Padding is 1 for a kernel of 4, and 2, with an output padding of 1, for one of 5. Each of the four
    parities of an output pixel sees a 3x3 neighbourhood: that makes it one ordinary convolution to four
    times the channels. On a CPU this is several times faster than the transposed one, which is slow
    where outputs are few; the numbers are the same up to rounding.

    Args:
        inputs: channels of the input.
        channels: channels of the output.
        kernel: side of the kernel, 4 or 5.
    """

    def __init__(self, inputs: int, channels: int, kernel: int) -> None:
        assert kernel in (4, 5)
        super().__init__(inputs, channels, kernel, stride=2, padding=kernel - 3, output_padding=kernel - 4)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return twice the size."""
        assert self.bias is not None
        kernel = channels_last(parities(self.weight))
        return pixel_shuffle(conv2d(channels_last(x), kernel, self.bias.repeat_interleave(4), padding=1), 2)


def parities(weight: Tensor) -> Tensor:
    """Return the kernel (4 channels, inputs, 3, 3) of `Deconvolution`, made of its own of side 4 or 5.

    An input pixel h reaches the output o = 2h + k - p. For o = 2i + a the tap is k = a + p + 2 (i - h), with
    i - h in -1, 0, 1; with the kernel padded to 6, so that p is 2, there is one for each of the three.

    Args:
        weight: the transposed convolution's own, (inputs, channels, 4 or 5, 4 or 5).
    """
    inputs, channels, size, _ = weight.shape
    before = 5 - size
    whole = pad(weight, (before, 1, before, 1))
    taps = whole.view(inputs, channels, 3, 2, 3, 2).flip(2, 4)
    return taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * channels, inputs, 3, 3)
