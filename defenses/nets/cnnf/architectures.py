"""The networks of CNN-F by name, and what fits them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from bench import InputError, Shape
from defenses.nets.cnnf.convolutional import b1, b2
from defenses.nets.cnnf.feedback import Network
from defenses.nets.cnnf.wide_resnet import BLOCKS, wrn_40_2

Net: TypeAlias = Literal["b1", "b2", "wrn-40-2"]


class _Form(NamedTuple):
    cell: int
    """What the sides of an image must be divisible by."""
    deepest: int
    """The largest `ind`."""
    hidden: tuple[int, ...] | None
    """Units of the hidden fully connected layers; None: there are none."""


_FORMS: dict[Net, _Form] = {
    "b1": _Form(cell=2, deepest=1, hidden=(128,)),
    "b2": _Form(cell=4, deepest=2, hidden=(1000, 128)),
    "wrn-40-2": _Form(cell=4, deepest=BLOCKS, hidden=None),
}


def check_params(params: Mapping[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the network that parameters ask for does not fit the data or itself.

    Args:
        params: those of `cnn` or `cnnf`, defaults filled in.
        shape: channels, height, width and classes of the data.
    """
    names = ("ind", "hidden", "first_kernel")
    check_net(params["net"], shape, **{name: params[name] for name in names if name in params})


def check_net(
    net: Net,
    shape: Shape,
    *,
    ind: int = 0,
    hidden: Sequence[int] | None = None,
    first_kernel: int = 3,
) -> None:
    """Raise `InputError` where a network cannot be built so; the arguments are those of `build`."""
    form = _FORMS[net]
    if shape.height % form.cell or shape.width % form.cell or min(shape.height, shape.width) < form.cell:
        raise InputError(
            f"net {net}: sides of images must be divisible by {form.cell}, found {shape.height}x{shape.width}"
        )
    if not 0 <= ind <= form.deepest:
        raise InputError(f"net {net}: ind must be between 0 (pixels) and {form.deepest}, found {ind}")
    if hidden is not None and form.hidden is None:
        raise InputError(f"net {net}: it has no hidden fully connected layers, found hidden: {list(hidden)}")
    if first_kernel != 3 and net != "b2":
        raise InputError(f"net {net}: only net b2 has a choice of first_kernel, found {first_kernel}")


def build(
    net: Net,
    shape: Shape,
    *,
    ind: int = 0,
    width: float = 1.0,
    hidden: Sequence[int] | None = None,
    first_kernel: int = 3,
) -> Network:
    """Build a network by name, untrained.

    Args:
        net: the architecture.
        shape: channels, height, width and classes of the data.
        ind: where the feedback ends: 0 is the pixels, else the block whose output it reaches.
        width: factor of the number of channels, above 0.
        hidden: units of the hidden fully connected layers, each 1 or more; None takes the paper's.
        first_kernel: kernel side of the first convolution of ``b2``, 1 or 3.

    Returns:
        A network of images (N, C, H, W) in [0, 1] to logits (N, K).

    Raises:
        InputError: the images' sides, `ind`, `hidden` or `first_kernel` do not go with the architecture.
    """
    check_net(net, shape, ind=ind, hidden=hidden, first_kernel=first_kernel)
    if net == "wrn-40-2":
        return wrn_40_2(shape, ind=ind, width=width)
    units = hidden if hidden is not None else _FORMS[net].hidden or ()
    if net == "b1":
        return b1(shape, ind=ind, width=width, hidden=units)
    return b2(shape, ind=ind, width=width, hidden=units, first_kernel=first_kernel)
