"""Stored adversarial images: what attacks left of a baseline's first examples, to be shown to other weights.

An image is stored where the attack moved it, as it was shown (float32, to the last bit); of the others the
index alone.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.errors import InputError


@dataclass(frozen=True)
class Replay:
    """The images of one attack run, of the first examples of its data set's order."""

    index: NDArray[np.int64]
    """The places of the examples in their data set, (N,)."""
    moved: NDArray[np.bool_]
    """Whether an image is stored, (N,); the others are shown as they are."""
    images: NDArray[np.float32]
    """The stored images, (M, C, H, W) in [0, 1], in the order of the examples."""

    @property
    def digest(self) -> str:
        """The SHA-256 of all of it."""
        found = hashlib.sha256(repr((self.index.shape, self.images.shape)).encode())
        for each in (self.index, self.moved, self.images):
            found.update(np.ascontiguousarray(each).tobytes())
        return found.hexdigest()

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return self.index.nbytes + self.moved.nbytes + self.images.nbytes

    def first(self, n: int) -> "Replay":
        """Return the first examples alone.

        Args:
            n: How many, 0 or more.
        """
        moved = self.moved[:n]
        return Replay(self.index[:n], moved, self.images[: int(moved.sum())])


def spelled(runs: Mapping[str, Replay]) -> bytes:
    """Return the content of a file of several runs.

    Args:
        runs: The images by the key of their run.

    Returns:
        A safetensors file.
    """
    from safetensors.numpy import save

    return save(
        {
            f"{key}.{name}": np.ascontiguousarray(getattr(each, name))
            for key, each in runs.items()
            for name in ("index", "moved", "images")
        }
    )


def load(path: Path, run: str, digest: str) -> Replay:
    """Read the images of one run.

    Args:
        path: The file.
        run: The key of the run.
        digest: What its `Replay.digest` must be.

    Returns:
        The images.

    Raises:
        InputError: The file is not there, has no such run, or was changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            index, moved, images = (file.get_tensor(f"{run}.{name}") for name in ("index", "moved", "images"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; take the baseline's images from git") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: has no images of run {run} ({error})") from None
    found = Replay(index, moved, images)
    if found.digest != digest:
        raise InputError(f"{path}: the images of run {run} are not those that the baseline names")
    return found
