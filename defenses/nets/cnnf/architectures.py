"""The networks of CNN-F by name, and what fits them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

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


def check(
    net: Net,
    shape: Shape,
    *,
    ind: int = 0,
    width: float = 1.0,
    hidden: Sequence[int] | None = None,
    first_kernel: int = 3,
) -> None:
    """Raise `InputError` where a network cannot be built so."""
    form = _FORMS[net]
    if shape.height % form.cell or shape.width % form.cell or min(shape.height, shape.width) < form.cell:
        raise InputError(
            f"net {net}: sides of images must be divisible by {form.cell}, found {shape.height}x{shape.width}"
        )
    if not 0 <= ind <= form.deepest:
        raise InputError(f"net {net}: ind must be between 0 (pixels) and {form.deepest}, found {ind}")
    if not width > 0:
        raise InputError(f"net {net}: width must be positive, found {width}")
    if hidden is not None and form.hidden is None:
        raise InputError(f"net {net}: it has no hidden fully connected layers, found hidden: {list(hidden)}")
    if any(units < 1 for units in hidden or ()):
        raise InputError(f"net {net}: hidden layers must have units, found {list(hidden or ())}")
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
    """Build a network by name, untrained; `hidden` None: as in the paper."""
    check(net, shape, ind=ind, width=width, hidden=hidden, first_kernel=first_kernel)
    if net == "wrn-40-2":
        return wrn_40_2(shape, ind=ind, width=width)
    units = hidden if hidden is not None else _FORMS[net].hidden or ()
    if net == "b1":
        return b1(shape, ind=ind, width=width, hidden=units)
    return b2(shape, ind=ind, width=width, hidden=units, first_kernel=first_kernel)
