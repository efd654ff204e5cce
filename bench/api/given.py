"""What a call from Python is given: images, labels and numbers of any kind, checked and made plain."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bench.errors import InputError
from bench.protocols import Split
from bench.quantities import fraction

MODEL = "model"
"""What a call names the defense that it is given."""

EXAMPLES = "examples"
"""What a call names the images that it is given."""

TENSORS = "tensors"
"""The digest of images that no data set names: draws depend on an image's index, and not on its content."""


def split_of(x: object, y: object, index: object) -> Split:
    """Return examples, checked, on the CPU.

    Args:
        x: Images (N, C, H, W) of floating point in [0, 1], or a `Split`.
        y: Labels, whole numbers (N,); None where `x` is a `Split`.
        index: The index of each example, whole numbers (N,); None: its position, or that of the `Split`.

    Returns:
        The examples: images float32, labels and indices int64.

    Raises:
        InputError: Something is of another kind, length or range.
    """
    if isinstance(x, Split):
        for name, given in (("y", y), ("index", index)):
            if given is not None:
                raise InputError(f"{name}: a Split has its own")
        return replace(
            _checked(x.images, x.labels, x.index, ("x.images", "x.labels", "x.index")), digest=x.digest
        )
    return _checked(x, y, index, ("x", "y", "index"))


def _checked(x: object, y: object, index: object, names: tuple[str, str, str]) -> Split:
    """Return examples, checked; `names` are what messages call them."""
    image, label, number = names
    if not isinstance(x, Tensor):
        raise InputError(f"{image}: expected a tensor of images (N, C, H, W), found {kind_of(x)}")
    if x.dim() != 4 or not len(x):
        raise InputError(f"{image}: expected images (N, C, H, W), at least one, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{image}: expected images of floating point in [0, 1], found {x.dtype}")
    if x.is_meta:
        raise InputError(f"{image}: a tensor on the device 'meta' has no values")
    images = _own(x).to(torch.float32)
    inside = (images >= 0) & (images <= 1)
    if not inside.all():
        first = (~inside).nonzero()[0].tolist()
        raise InputError(
            f"{image}: image {first[0]}: expected values in [0, 1], found {images[tuple(first)].item():g}"
        )
    labels = _whole(label, y, len(images))
    numbers = torch.arange(len(images)) if index is None else _whole(number, index, len(images))
    if len(numbers.unique()) < len(numbers):
        raise InputError(f"{number}: an example stands twice")
    return Split(images, labels, numbers, TENSORS)


def _own(values: Tensor) -> Tensor:
    """Return a tensor on the CPU that autograd accepts: one of inference mode is copied."""
    plain = values.detach().cpu()
    return plain.clone() if plain.is_inference() else plain


def _whole(name: str, values: object, n: int) -> Tensor:
    """Return whole numbers (n,) as int64, on the CPU."""
    if not isinstance(values, Tensor):
        raise InputError(f"{name}: expected a tensor of whole numbers ({n},), found {kind_of(values)}")
    wrong = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    if wrong or values.shape != (n,):
        raise InputError(f"{name}: expected whole numbers ({n},), found {values.dtype} {tuple(values.shape)}")
    return _own(values).long()


def check_labels(split: Split, classes: int) -> None:
    """Check that every label is of a class.

    Args:
        split: The examples.
        classes: The number of classes, K.

    Raises:
        InputError: A label is not in [0, K).
    """
    wrong = ((split.labels < 0) | (split.labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise InputError(f"y: image {first}: expected a label below {classes}, found {split.labels[first]}")


def number_or_list(name: str, given: object) -> float | list[float]:
    """Return a mean or a standard deviation in the form that `bench.networks.Classifier` takes.

    Args:
        name: The argument, for messages.
        given: A number, a fraction such as ``"8/255"``, or one of them for each channel: a list, a tuple, an
            array or a tensor of any shape.

    Returns:
        The number, or the numbers.

    Raises:
        InputError: It is of another kind.
    """
    if isinstance(given, Tensor | np.ndarray | np.generic):
        given = given.tolist() if given.ndim == 0 else given.reshape(-1).tolist()
    if isinstance(given, list | tuple):
        return [_number(name, each) for each in given]
    return _number(name, given)


def _number(name: str, given: object) -> float:
    try:
        found = fraction(given.item() if isinstance(given, np.generic | Tensor) else given)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {error}") from None
    if isinstance(found, int | float):
        return found
    raise InputError(f"{name}: expected a number, or one for each channel, found {kind_of(given)}")


def no_normalisation(mean: object, std: object) -> None:
    """Refuse a normalisation where the defense has its own.

    Args:
        mean: The mean, as `number_or_list` returned it.
        std: The standard deviation, in the same form.

    Raises:
        InputError: They are not those that change nothing.
    """
    if (mean, std) != (0.0, 1.0):
        raise InputError("mean: a registered defense normalises for itself")


def kind_of(value: object) -> str:
    """Return what a value is, for messages.

    Args:
        value: Any value.

    Returns:
        ``None``, or ``a value of type int``.
    """
    return "None" if value is None else f"a value of type {type(value).__name__}"
