"""Settings that hold for the whole process, and those of them that decide the precision of products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Setting:
    """A setting that holds for the whole process."""

    name: str
    """The name of the setting in messages."""
    read: Callable[[], Any]
    """Returns the present value."""
    write: Callable[[Any], object]
    """Sets a value that `read` returned."""
    lenient: Literal["never", "building", "always"] = "never"
    """When the code of a job may change the setting. The change is then restored and noted, and the job
    continues. ``building``: while a network is constructed, since nothing is computed yet. Any other change
    fails the job.
    """


def flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Return how an attribute is read and how it is written, as a `Setting` needs them.

    Args:
        owner: What has the attribute.
        name: Its name.
    """
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


PRODUCTS = tuple(
    Setting(f"torch.backends.{path}fp32_precision", *flag(owner, "fp32_precision"), lenient="building")
    for path, owner in (
        ("", torch.backends),
        *(
            (f"{library}.{operation}.", getattr(getattr(torch.backends, library), operation, None))
            for library in ("cuda", "cudnn", "mkldnn")
            for operation in ("matmul", "conv", "rnn")
        ),
    )
    if hasattr(owner, "fp32_precision")
)
"""What products of float32 numbers are computed in, as torch 2.9 and later say it; none with an older torch.

The general one comes first, since the others follow it while they are ``none``.
"""
