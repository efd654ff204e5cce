"""The user's own arrays as a source: `.npy` and `.npz` files of images and labels."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.data.source import Examples, Pixels, Places, SplitName, checksum
from bench.errors import InputError, did_you_mean
from bench.protocols import Shape
from bench.registry import source
from bench.results.fingerprint import located

CHUNK = 256
"""Images that are read at once."""

IMAGES = ("images", "x", "data", "image", "x_test", "x_train", "arr_0")
LABELS = ("labels", "y", "targets", "label", "target", "y_test", "y_train", "arr_1")
"""Names in a `.npz` that are looked for, in this order, where none is said."""


@source("arrays", version=1)
class Arrays:
    """Arrays of NumPy: one `.npz` with images and labels for each split, or an `.npy` of each.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) of uint8, uint16, or floats in [0, 1]; labels are whole
    numbers from 0, (N,). No pickled object is read.

    Args:
        split: The split that is read, ``train`` or ``test``.
        places: Where paths start.
        test: The file of the split ``test``; relative paths start at the folder of the task file, then at the
            data root.
        train: The file of the split ``train``; None: there is none, and nothing can be trained on it.
        test_labels: The labels of ``test``, where they are a file of their own, as beside an ``.npy``.
        train_labels: The labels of ``train``, where they are a file of their own.
        images: The name of the images in an ``.npz``; None: ``images``, ``x``, ``data`` and the like.
        labels: The name of the labels in an ``.npz``; None: ``labels``, ``y``, ``targets`` and the like.
        layout: Where colours stand: ``last`` (N, H, W, C), ``first`` (N, C, H, W); None: where an axis of 1,
            3 or 4 says it.
        classes: How many classes there are; None: one more than the largest label of both splits.
    """

    def __init__(  # noqa: PLR0913 - the parameters of a data source are its keywords
        self,
        split: SplitName,
        places: Places,
        *,
        test: str,
        train: str | None = None,
        test_labels: str | None = None,
        train_labels: str | None = None,
        images: str | None = None,
        labels: str | None = None,
        layout: Literal["first", "last"] | None = None,
        classes: int | None = None,
    ) -> None:
        self.split, self.places, self.layout, self.classes = split, places, layout, classes
        self.names = {"images": images, "labels": labels}
        self.given = {"test": (test, test_labels), "train": (train, train_labels)}
        if self.given[split][0] is None:
            raise InputError(f"{split}: no file is named; {split}: images.npz names one")

    def _file(self, path: str) -> Path:
        bases = [base for base in (self.places.folder, self.places.root) if base is not None]
        looked = list(dict.fromkeys(located(path, base) for base in bases))
        for each in looked:
            if each.is_file():
                return each
        raise InputError(
            f"no such file: looked for {' and '.join(map(str, looked))}; relative paths start at the suite's "
            "folder, then at the data root (--data-root or BENCH_DATA)"
        )

    def _array(self, split: SplitName, kind: Literal["images", "labels"]) -> NDArray[Any]:
        file, labels = self.given[split]
        assert file is not None
        path = self._file(labels if kind == "labels" and labels is not None else file)
        try:
            opened = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read as arrays of NumPy: {error}") from None
        if isinstance(opened, np.ndarray):
            if kind == "labels" and labels is None:
                raise InputError(f"{path}: holds one array; {split}_labels: names the file of the labels")
            return opened
        with opened:
            name = self._name(kind, opened.files, path)
            try:
                array: NDArray[Any] = opened[name]
            except ValueError as error:
                raise InputError(f"{path}: {name}: cannot be read: {error}") from None
        return array

    def _name(self, kind: Literal["images", "labels"], there: list[str], path: Path) -> str:
        """Return the name of an array in a file of several."""
        given = self.names[kind]
        if given is not None and given not in there:
            raise InputError(f"{path}: {kind}: no array {given!r}{did_you_mean(given, there)}")
        usual = IMAGES if kind == "images" else LABELS
        found = given or next((each for each in usual if each in there), None)
        if found is None:
            raise InputError(f"{path}: say which array is {kind}:; there are {', '.join(there) or 'none'}")
        return found

    @cached_property
    def _images(self) -> NDArray[Any]:
        """The images, (N, C, H, W), in the type that they have."""
        values = self._array(self.split, "images")
        where = f"{self.given[self.split][0]}: images"
        fits = values.dtype in (np.uint8, np.uint16) or values.dtype.kind == "f"
        if not fits:
            raise InputError(f"{where}: expected uint8, uint16 or floats in [0, 1], found {values.dtype}")
        if values.ndim == 3:
            return values[:, None]
        if values.ndim != 4:
            expected = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
            raise InputError(f"{where}: expected the shape {expected}, found {values.shape}")
        able = {"first": values.shape[1] in (1, 3), "last": values.shape[3] in (1, 3)}
        layouts = [self.layout] if self.layout else [each for each, fit in able.items() if fit]
        if len(layouts) != 1 or not able[layouts[0]]:
            raise InputError(
                f"{where}: nobody knows where the 1 or 3 colours stand in the shape {values.shape}: "
                "layout: first, or layout: last"
            )
        return values if layouts == ["first"] else values.transpose(0, 3, 1, 2)

    def _labels(self, split: SplitName) -> NDArray[np.int64]:
        values = self._array(split, "labels")
        if values.ndim != 1 or values.dtype.kind not in "iu":
            found = f"{values.dtype} of shape {values.shape}"
            raise InputError(f"{self.given[split][0]}: labels: expected whole numbers (N,), found {found}")
        return values.astype(np.int64)

    @cached_property
    def shape(self) -> Shape:
        """The form of the images, and the number of classes."""
        if not len(self._images):
            raise InputError(f"{self.given[self.split][0]}: holds no example")
        if self.classes is not None:
            classes = self.classes
        else:
            there = [each for each, files in self.given.items() if files[0] is not None]
            classes = 1 + max(int(self._labels(each).max(initial=-1)) for each in there)  # type: ignore[arg-type]
        channels, height, width = self._images.shape[1:]
        return Shape(channels, height, width, classes)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self._images)

    @property
    def content(self) -> Mapping[str, Any]:
        """The files' checksum, and what is read of them."""
        files = [self._file(each) for each in self.given[self.split] if each is not None]
        return {"sha256": checksum(files), "names": self.names, "layout": self.layout}

    def prepare(self) -> None:
        """Do nothing: `shape` and `content` cannot be told without the files."""

    def examples(self) -> Examples:
        """Return all examples, in the order of the file."""
        labels = self._labels(self.split)
        return Examples(np.arange(len(labels)), labels)

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images in chunks."""
        for start in range(0, len(index), CHUNK):
            chunk = index[start : start + CHUNK]
            yield Pixels(str(self.given[self.split][0]), np.ascontiguousarray(self._images[chunk]))
