"""The user's own images as sources: Parquet files in Hugging Face's layout, and folders of files."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.types as arrow
from numpy.typing import NDArray
from pyarrow import parquet
from pyarrow.lib import ArrowException

from bench.errors import InputError, did_you_mean
from bench.examples import Examples, Pixels, Places, SplitName, checksum, decode
from bench.protocols import Shape
from bench.registry import source

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@source("parquet", version=1)
class Parquet:
    """Parquet files in the layout of Hugging Face: a column of encoded images, and one of labels.

    `path` is a folder; `train` and `test` are the patterns of a split's files in it. `image` and
    `label` name columns: unless said, those named ``image`` or ``img`` and ``label`` or ``labels``, or
    the only ones of a fitting type. The number of classes is that of the label's names, where the file
    has them, or else follows from the largest label of both splits.
    """

    def __init__(
        self,
        split: SplitName,
        places: Places,
        *,
        path: str,
        train: str = "**/train*.parquet",
        test: str = "**/test*.parquet",
        image: str | None = None,
        label: str | None = None,
        classes: int | None = None,
    ) -> None:
        self.split = split
        self.folder = places.find(path)
        self.patterns: dict[SplitName, str] = {"train": train, "test": test}
        self.given = {"image": image, "label": label}
        self.classes = classes

    @cached_property
    def files(self) -> list[Path]:
        """The split's files, by name."""
        files = self._matching(self.split)
        pattern = self.patterns[self.split]
        if not files:
            there = [str(each.relative_to(self.folder)) for each in sorted(self.folder.rglob("*.parquet"))]
            raise InputError(
                f"{self.folder}: no file matches {self.split}: {pattern!r}"
                + (f"; there are {', '.join(there[:5])}" if there else "; there is no Parquet file")
            )
        if len(folders := sorted({str(each.parent) for each in files})) > 1:
            raise InputError(
                f"{self.folder}: {pattern!r} matches files in {' and '.join(folders[:3])}; "
                "narrow path: to one of them"
            )
        if both := set(self._matching("train")) & set(self._matching("test")):
            raise InputError(f"{min(both)}: matches train: and test:; give each split its own files")
        return files

    def _matching(self, split: SplitName) -> list[Path]:
        try:
            return sorted(each for each in self.folder.glob(self.patterns[split]) if each.is_file())
        except (ValueError, NotImplementedError) as error:
            raise InputError(
                f"{split}: {self.patterns[split]!r} is no pattern below a folder: {error}"
            ) from None

    @cached_property
    def _schema(self) -> Any:
        return _opened(self.files[0]).schema_arrow

    @cached_property
    def image(self) -> str:
        """The column of images."""

        def fits(kind: Any) -> bool:
            if arrow.is_struct(kind):
                return bool(kind.get_field_index("bytes") >= 0)
            return bool(arrow.is_binary(kind) or arrow.is_large_binary(kind))

        return self._column(
            "image", ("image", "img"), [each.name for each in self._schema if fits(each.type)]
        )

    @cached_property
    def label(self) -> str:
        """The column of labels."""
        able = [each.name for each in self._schema if arrow.is_integer(each.type)]
        return self._column("label", ("label", "labels"), able)

    def _column(self, kind: str, usual: Sequence[str], able: Sequence[str]) -> str:
        given = self.given[kind]
        if given is not None:
            if given in able:
                return given
            found = f"{kind}: column {given!r} is not there or cannot hold it{did_you_mean(given, able)}"
        else:
            if names := [name for name in usual if name in able] or (able if len(able) == 1 else []):
                return names[0]
            found = f"say which column is {kind}:"
        columns = ", ".join(f"{each.name} ({each.type})" for each in self._schema)
        raise InputError(f"{self.files[0]}: {found}; its columns are {columns}")

    @cached_property
    def shape(self) -> Shape:
        """The form of the first image, and the number of classes."""
        first = next(self.images(np.zeros(1, dtype=np.int64)), None)
        if first is None:
            raise InputError(f"{self.files[0]}: holds no example")
        channels, height, width = first.values.shape[1:]
        return Shape(channels, height, width, self._classes())

    def _classes(self) -> int:
        if self.classes is not None:
            return self.classes
        with suppress(ValueError, KeyError, TypeError):
            described = json.loads(self._schema.metadata[b"huggingface"])
            return len(described["info"]["features"][self.label]["names"])
        files = {*self._matching("train"), *self._matching("test")}
        return int(max(self._labels(file).max(initial=-1) for file in files)) + 1

    @cached_property
    def count(self) -> int:
        """The number of rows."""
        return sum(_opened(file).metadata.num_rows for file in self.files)

    @property
    def content(self) -> Mapping[str, Any]:
        """The files' checksum, and the columns that are read."""
        return {"sha256": checksum(self.files), "image": self.image, "label": self.label}

    def prepare(self) -> None:
        """Do nothing: `shape` and `content` cannot be told without the files."""

    def examples(self) -> Examples:
        """Return all rows."""
        labels = np.concatenate([self._labels(file) for file in self.files])
        return Examples(np.arange(len(labels)), labels)

    def _labels(self, file: Path) -> NDArray[np.int64]:
        column = _read(file, self.label)
        if column.null_count:
            raise InputError(f"{file}: {self.label} is empty in {column.null_count} rows")
        return np.asarray(column.to_numpy(), dtype=np.int64)

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images one by one, reading only the row groups that hold some of them."""
        start = 0
        for file in self.files:
            opened = _opened(file)
            for group in range(opened.metadata.num_row_groups):
                stop = start + opened.metadata.row_group(group).num_rows
                wanted = index[np.searchsorted(index, start) : np.searchsorted(index, stop)]
                if len(wanted):
                    column = _read(file, self.image, group)
                    for row in wanted:
                        yield self._image(column[int(row) - start].as_py(), f"{file.name}, row {row}")
                start = stop

    def _image(self, cell: Any, name: str) -> Pixels:
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        if encoded is None:
            raise InputError(f"{name}: {self.image} holds no bytes")
        return Pixels(name, decode(encoded, name)[None])


def _opened(file: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from None


def _read(file: Path, column: str, group: int | None = None) -> Any:
    """Return one column of a file, or of one of its row groups."""
    opened = _opened(file)
    groups = range(opened.metadata.num_row_groups) if group is None else [group]
    try:
        table = opened.read_row_groups(list(groups), columns=[column])
        return table[column]
    except (ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file}: column {column!r} cannot be read: {error}") from None


@source("image-folder", version=1)
class ImageFolder:
    """A folder of images for each split, in it one for each class: ``train/cat/1.png``.

    `path` holds the folders that `train` and `test` name. Classes are numbered by the names of the
    folders in either split; other files, and hidden ones, are passed over.
    """

    def __init__(
        self, split: SplitName, places: Places, *, path: str, train: str = "train", test: str = "test"
    ) -> None:
        if train == test:
            raise InputError(f"train: and test: are both {train!r}; give each split its own folder")
        self.folder = places.find(path)
        self.home = self.folder / (train if split == "train" else test)
        if not self.home.is_dir():
            there = [each.name for each in self.folder.iterdir() if each.is_dir()]
            raise InputError(f"{split}: no such folder: {self.home}{did_you_mean(self.home.name, there)}")
        self.homes = (self.folder / train, self.folder / test)

    @cached_property
    def _found(self) -> dict[Path, list[Path]]:
        return {home: _images_in(home) for home in self.homes}

    @cached_property
    def files(self) -> list[Path]:
        """The split's images, by their paths."""
        files = self._found[self.home]
        if not files:
            raise InputError(
                f"{self.home}: no image in a sub-folder; expected files such as cat/1.png "
                f"({', '.join(sorted(SUFFIXES))})"
            )
        return files

    @cached_property
    def names(self) -> list[str]:
        """The classes: those of both splits, so that a class has one number."""
        return sorted({_class_of(file, home) for home, files in self._found.items() for file in files})

    @cached_property
    def shape(self) -> Shape:
        """The form of the first image, and the number of classes."""
        channels, height, width = decode(self.files[0], str(self.files[0])).shape
        return Shape(channels, height, width, len(self.names))

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.files)

    @property
    def content(self) -> Mapping[str, Any]:
        """Checksums of the files, of their names and of the classes."""
        names = "\n".join(file.relative_to(self.home).as_posix() for file in self.files)
        return {
            "sha256": checksum(self.files),
            "files": hashlib.sha256(names.encode()).hexdigest(),
            "classes": self.names,
        }

    def prepare(self) -> None:
        """Do nothing: `shape` and `content` cannot be told without the files."""

    def examples(self) -> Examples:
        """Return all images, in the order of their paths."""
        number = {name: position for position, name in enumerate(self.names)}
        labels = np.array([number[_class_of(file, self.home)] for file in self.files], dtype=np.int64)
        return Examples(np.arange(len(labels)), labels)

    def images(self, index: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the images one by one."""
        for position in index:
            file = self.files[position]
            yield Pixels(file.relative_to(self.folder).as_posix(), decode(file, str(file))[None])


def _images_in(home: Path) -> list[Path]:
    """Return the images below a folder's sub-folders, by their paths, wherever the folder lies."""
    found = [
        file
        for file in home.glob("*/**/*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(home).parts)
    ]
    return sorted(found, key=lambda file: file.relative_to(home).as_posix())


def _class_of(file: Path, home: Path) -> str:
    return file.relative_to(home).parts[0]
