"""What a data source is made of: where files lie, their checksum, the order of examples, decoding.

The sources themselves are in `imagesets.py` and `imagefiles.py`; how a suite asks for them, in `data.py`.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from bench.errors import InputError
from bench.noise import mix, seed_of
from bench.protocols import Shape
from bench.results.fingerprint import located

if TYPE_CHECKING:
    from PIL.Image import Image

SplitName: TypeAlias = Literal["train", "test"]

LARGEST = 1 << 25
"""Pixels that an image may have: 5792 x 5792."""

SETTLED = 2_000_000_000
"""Nanoseconds after which a change would have another time: file systems count in steps of up to 2 s."""

ORDER = 1
"""Version of the rule `stratified`; it enters the digest of every data set."""


@dataclass(frozen=True)
class Examples:
    """The index of each example in the published data set, ascending, and its label: int64 (N,)."""

    index: NDArray[np.int64]
    labels: NDArray[np.int64]


class Pixels(NamedTuple):
    """Consecutive images (n, C, H, W): uint8 or uint16 in their full range, floats in [0, 1]."""

    name: str
    """Of the file or the row, for messages."""
    values: NDArray[Any]


class Source(Protocol):
    """One split of a data set: `shape`, `count` and `content` are known without loading its images."""

    @property
    def shape(self) -> Shape:
        """The form of an image as published, and the number of classes."""
        ...

    @property
    def count(self) -> int:
        """How many examples there are."""
        ...

    @property
    def content(self) -> Mapping[str, Any]:
        """What tells the content: checksums, and whatever else decides it; plain JSON."""
        ...

    def prepare(self) -> None:
        """See that the files are there, downloading where that is allowed, or raise `InputError`."""
        ...

    def examples(self) -> Examples:
        """Return which examples there are."""
        ...

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images of the examples with these published indices, which ascend."""
        ...


@dataclass(frozen=True)
class Places:
    """Where files may lie: the data root, and the folder of the suite."""

    root: Path
    folder: Path | None = None

    def find(self, path: str) -> Path:
        """Return a folder that a suite names, relative to the suite's folder or else to the root."""
        bases = [base for base in (self.folder, self.root) if base is not None]
        # What is absolute is one place, whatever it is relative to.
        candidates = list(dict.fromkeys(located(path, base) for base in bases))
        for candidate in candidates:
            if os.path.isdir(candidate):
                return candidate
        for candidate in candidates:
            if os.path.isfile(candidate):
                raise InputError(f"expected a folder, found a file: {candidate}")
        looked = " and ".join(str(each) for each in candidates)
        raise InputError(
            f"no such folder: looked for {looked}; relative paths start at the suite's folder, "
            "then at the data root (--data-root or BENCH_DATA)"
        )


def stratified(examples: Examples) -> NDArray[np.int64]:
    """Return the positions (N,) of the examples in an order whose every prefix is stratified.

    Each example draws a 64-bit word: SplitMix64 of its published index, under a seed that is the same
    for all data sets. Its rank r is its place among the words of its class, which has n examples; the
    order is by (r + 1/2) / n, equal ones by their words. So prefixes are nested, and of m of N examples
    in C classes, m n / N are of each class, off by at most (1 + C n / N) / 2: by one if all are equal.
    """
    index, labels = examples.index, examples.labels
    seed = torch.tensor(seed_of("order", ORDER))
    word = mix(mix(torch.from_numpy(index) + 1) ^ seed).numpy()
    by_class = np.lexsort((word, labels))
    count = np.bincount(labels)
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    # Equal fractions are equal floats (division rounds correctly), so ties are the same everywhere.
    return np.lexsort((word, (rank + 0.5) / count[labels]))


def cache_folder() -> Path:
    """Return the folder for what can be computed or downloaded again."""
    from platformdirs import user_cache_path

    return user_cache_path("crossfire-bench")


def checksum(files: Sequence[Path]) -> str:
    """Return the sha256 of the files' contents, in their order.

    It is remembered in the user's cache folder under the files' paths and what the file system tells of them:
    sizes, numbers, and times of change, of which one can be set to any value and the other cannot.
    """
    listing = hashlib.sha256()
    newest = 0
    # A link's own name is enough: what it leads to has a number.
    homes = {folder: os.fsencode(folder.resolve()) for folder in {file.parent for file in files}}
    for file in files:
        stat = file.stat()
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
        listing.update(homes[file.parent] + b"\0" + os.fsencode(file.name) + f"\0{state}\0".encode())
    note = cache_folder() / "checksums" / listing.hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        known = note.read_text("ascii")
        if len(known) == 64:
            return known
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    # A file that is still being written may change again without a new time of change.
    if time.time_ns() - newest > SETTLED:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            scratch = note.with_name(f"{note.name}.{os.getpid()}")
            scratch.write_text(total.hexdigest(), "ascii")
            scratch.replace(note)
    return total.hexdigest()


def decode(file: Path | bytes, name: str) -> NDArray[Any]:
    """Return an encoded image as (C, H, W): uint8, uint16 or float32, gray with one channel.

    Palettes and other colour spaces become RGB, an opaque alpha channel is dropped, and the
    orientation of EXIF is applied. Pillow reads 16-bit gray in full, 16-bit colour as 8-bit.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # What is too large is said here, before anything is decoded, and not by a warning.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
        with opened as image:
            if image.width * image.height > LARGEST:
                size = f"{image.width} x {image.height}"
                raise InputError(f"{name}: the image is too large: at most {LARGEST:,} pixels, found {size}")
            # An MPO is a camera's JPEG with previews behind it.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise InputError(f"{name}: holds several images; expected one")
            image.load()
            return _pixels(ImageOps.exif_transpose(image) if image.getexif() else image, name)
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that Pillow knows") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: the image is too large: expected at most {LARGEST:,} pixels") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything on what is no image
        raise InputError(f"{name}: the image cannot be read: {error}") from None


def _pixels(image: "Image", name: str) -> NDArray[Any]:
    if image.has_transparency_data:
        gray = image.mode in ("L", "LA", "La", "1")
        image = image.convert("LA" if gray else "RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise InputError(f"{name}: has transparent pixels, whose colour nobody knows; flatten it first")
        image = image.convert("L" if gray else "RGB")
    match image.mode:
        case "L" | "RGB" | "F":
            values = np.asarray(image)
        case "1":
            values = np.asarray(image.convert("L"))
        case "P" | "CMYK" | "YCbCr" | "LAB" | "HSV":
            values = np.asarray(image.convert("RGB"))
        case "I;16" | "I;16L" | "I;16B" | "I;16N":
            values = np.asarray(image).astype(np.uint16)
        case mode:
            raise InputError(f"{name}: pixels of Pillow's mode {mode!r} have no agreed range")
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
