"""Published data sets as sources: scikit-learn's digits, and the sets that torchvision can download."""

import gzip
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.source import Examples, Pixels, Places, Source, SplitName, stratified
from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import source

DIGITS = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
"""sha256 of scikit-learn's digits.csv."""

TESTED = 360
"""Digits in the test split: a fifth."""

CHUNK = 1000
"""Images that are converted at once."""


@source("digits", version=1)
class Digits:
    """Digits of scikit-learn: 1,797 scans of 8x8 in 17 grays (Alpaydin and Kaynak 1998), embedded.

    The first 360 in the stratified order of all are the test split, the other 1,437 are for training.
    """

    def __init__(self, split: SplitName, places: Places) -> None:
        self.split = split
        self.shape = Shape(1, 8, 8, 10)
        self.count = TESTED if split == "test" else 1797 - TESTED
        self.content = {"sha256": DIGITS}

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        # Read where it lies: importing scikit-learn takes a second, and its loader reads the same file.
        spec = importlib.util.find_spec("sklearn")
        folders = (spec and spec.submodule_search_locations) or []
        for folder in folders:
            file = Path(folder, "datasets", "data", "digits.csv.gz")
            if file.is_file():
                text = gzip.decompress(file.read_bytes())
                if hashlib.sha256(text).hexdigest() != DIGITS:
                    raise InputError(f"{file}: is not the table of digits that scikit-learn ships")
                return np.loadtxt(text.decode().splitlines(), delimiter=",", dtype=np.uint8)
        raise InputError("digits come with scikit-learn, which is not installed: pip install scikit-learn")

    def prepare(self) -> None:
        """Do nothing: they are embedded."""

    def examples(self) -> Examples:
        """Return the split's examples."""
        labels = self._table[:, -1].astype(np.int64)
        order = stratified(Examples(np.arange(len(labels)), labels))
        index = np.sort(order[:TESTED] if self.split == "test" else order[TESTED:])
        return Examples(index, labels[index])

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images, whose values run from 0 to 16."""
        values = self._table[index, :-1].reshape(-1, 1, 8, 8)
        yield Pixels("digits.csv", values.astype(np.float32) / 16)


@source("mnist", version=1)
def mnist(split: SplitName, places: Places) -> Source:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 handwritten digits, 28x28, gray."""
    if split == "train":
        md5 = ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624")
    else:
        md5 = ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")
    return Idx("mnist", "MNIST", md5, split, places)


@source("fashion-mnist", version=1)
def fashion_mnist(split: SplitName, places: Places) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 articles of clothing, 28x28, gray."""
    if split == "train":
        md5 = ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9")
    else:
        md5 = ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965")
    return Idx("fashion-mnist", "FashionMNIST", md5, split, places)


@source("cifar10", version=1)
def cifar10(split: SplitName, places: Places) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs in ten classes, 32x32, colour."""

    def read(base: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(str(base), train=split == "train")
        return data.data.transpose(0, 3, 1, 2), np.array(data.targets, dtype=np.int64)

    def download(base: Path) -> None:
        from torchvision.datasets import CIFAR10

        CIFAR10(str(base), download=True)

    return Torchvision(
        name="cifar10",
        files=("cifar-10-batches-py/batches.meta", "cifar-10-batches-py/test_batch"),
        content={"md5": "c58f30108f718f92721af3b95e74349a"},
        count=50_000 if split == "train" else 10_000,
        read=read,
        download=download,
        places=places,
        shape=Shape(3, 32, 32, 10),
    )


@source("svhn", version=1)
def svhn(split: SplitName, places: Places) -> Source:
    """SVHN (Netzer et al. 2011): 73,257 + 26,032 house numbers, cropped to 32x32, colour."""

    def read(base: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from torchvision.datasets import SVHN

        data = SVHN(str(base), split=split)
        return data.data, data.labels

    def download(base: Path) -> None:
        from torchvision.datasets import SVHN

        SVHN(str(base), split=split, download=True)

    train = split == "train"
    return Torchvision(
        name="svhn",
        files=(f"{split}_32x32.mat",),
        content={"md5": "e26dedcc434d2e4c54c9b2d4a06d8373" if train else "eb5a983be6a315427106f1b164d9cef3"},
        count=73_257 if train else 26_032,
        read=read,
        download=download,
        places=places,
        shape=Shape(3, 32, 32, 10),
    )


class Idx:
    """One of the sets in MNIST's file format, as torchvision lays them out (or still compressed)."""

    def __init__(
        self, name: str, folder: str, md5: tuple[str, str], split: SplitName, places: Places
    ) -> None:
        stem = "train" if split == "train" else "t10k"
        self.name = name
        self.folder = folder
        self.md5 = md5
        self.places = places
        self.files = tuple(f"{folder}/raw/{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
        self.shape = Shape(1, 28, 28, 10)
        self.count = 60_000 if split == "train" else 10_000
        self.content = {"md5": list(md5)}

    def prepare(self) -> None:
        """Download what is not there."""
        _located(self.name, self.files, self.places, self._download)

    def _download(self, base: Path) -> None:
        from torchvision import datasets

        getattr(datasets, self.folder)(str(base), download=True)

    def _read(self, which: int) -> NDArray[np.uint8]:
        path = _located(self.name, self.files, self.places, self._download) / self.files[which]
        try:
            content = path.read_bytes() if path.is_file() else gzip.decompress(_gz(path).read_bytes())
        except (OSError, EOFError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != self.md5[which]:
            raise InputError(
                f"{path}: is not the published file: expected the md5 {self.md5[which]}, found {found}; "
                "delete it, and it is downloaded again"
            )
        # The checksum vouches for the header: 4 bytes of type, then 4 for each dimension.
        return np.frombuffer(content, np.uint8, offset=8 if which else 16)

    def examples(self) -> Examples:
        """Return all examples in the order of the file."""
        labels = self._read(1).astype(np.int64)
        return Examples(np.arange(len(labels)), labels)

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images in chunks."""
        values = self._read(0).reshape(-1, 1, 28, 28)
        for start in range(0, len(index), CHUNK):
            yield Pixels(self.files[0], values[index[start : start + CHUNK]])


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """A set that torchvision reads, and whose checksums it verifies."""

    name: str
    files: tuple[str, ...]
    content: Mapping[str, Any]
    count: int
    read: Callable[[Path], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    download: Callable[[Path], None]
    places: Places
    shape: Shape

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        base = _located(self.name, self.files, self.places, self.download)
        try:
            return self.read(base)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(
                f"{self.name} in {base}: is damaged ({error}); delete it to download it again"
            ) from None

    def prepare(self) -> None:
        """Download what is not there."""
        _located(self.name, self.files, self.places, self.download)

    def examples(self) -> Examples:
        """Return all examples in the published order."""
        labels = self._arrays[1]
        return Examples(np.arange(len(labels)), labels)

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images in chunks."""
        for start in range(0, len(index), CHUNK):
            yield Pixels(self.name, self._arrays[0][index[start : start + CHUNK]])


def _gz(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _located(name: str, files: tuple[str, ...], places: Places, download: Callable[[Path], None]) -> Path:
    """Return the folder that has all the files, or one of their .gz; download them if there is none."""
    home = places.root / name
    for base in (home, places.root):
        if all((base / file).is_file() or _gz(base / file).is_file() for file in files):
            return base
    looked = f"looked for {files[0]} in {home} and in {places.root}"
    if os.environ.get("BENCH_OFFLINE"):
        trouble = "BENCH_OFFLINE forbids to download it"
    else:
        try:
            _downloaded(home, download)
        except (OSError, RuntimeError, EOFError, HTTPException) as error:
            reason = str(error).strip() or type(error).__name__
            trouble = f"it could not be downloaded: {reason.splitlines()[-1]}"
        else:
            return home
    raise InputError(
        f"{name} is not there: {looked}; {trouble}. Copy {', '.join(files)} there from a machine that has "
        "them, or name the folder that has them by --data-root or BENCH_DATA"
    )


def _downloaded(home: Path, download: Callable[[Path], None]) -> None:
    """Download into a scratch folder, then move each file to its place, so that none is ever half there."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=home) as scratch:
        download(Path(scratch))
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file():
                target = home / file.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
