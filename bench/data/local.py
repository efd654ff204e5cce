"""The user's own images as sources: Parquet files in Hugging Face's layout, and folders of files."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.types as arrow
from numpy.typing import NDArray
from pyarrow import parquet
from pyarrow.lib import ArrowException

from bench.data.source import Examples, Pixels, Places, SplitName, checksum, decode
from bench.errors import InputError, did_you_mean
from bench.protocols import Shape
from bench.registry import source

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Endings of the images that a folder is looked through for."""

UNREAD = frozenset(
    {".apng", ".avif", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".npy"}
    | {".pfm", ".psd", ".svg", ".tga"}
)
"""Endings of images that are not read: what has them is not passed over in silence."""

CLASSES = 1_000_000
"""Classes that a file may be said to have."""


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which people count: 2 before 10, and ``a2`` before ``a10``."""
    return sorted(names, key=lambda name: (_counted(name), name))


def _counted(name: str) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not each[0].isdigit(), int(each) if each[0].isdigit() else 0, each) for each in parts]


@source("parquet", version=1)
class Parquet:
    """Parquet files in the layout of Hugging Face: a column of encoded images, and one of labels.

    Args:
        split: The split that is read, ``train`` or ``test``.
        places: Where paths start.
        path: The folder; relative paths start at that of the task file, then at the data root.
        train: The pattern of the files of the split ``train`` in it: one, or the numbered parts of one set.
        test: The pattern of the files of the split ``test``.
        image: The column of encoded images; None: ``image`` or ``img``, or the only one of a fitting type.
        label: The column of labels, whole numbers from 0; None: ``label`` or ``labels``, or the only one of
            a fitting type.
        classes: How many classes there are; None: as many as the file has names of labels, or else one more
            than the largest label of both splits.
    """

    def __init__(  # noqa: PLR0913 - the parameters of a data source are its keywords
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
        if classes is not None and not 0 < classes <= CLASSES:
            raise InputError(f"classes: expected a number from 1 to {CLASSES:,}, found {classes}")

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
        _check_parts(files, f"{self.split}: {pattern!r}")
        return files

    def _matching(self, split: SplitName) -> list[Path]:
        try:
            found = [str(each) for each in self.folder.glob(self.patterns[split]) if each.is_file()]
            return list(map(Path, in_order(found)))
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
        named = [name for name in usual if name in self._schema.names]
        if given is not None:
            if given in able:
                return given
            found = f"{kind}: column {given!r} is not there or cannot hold it{did_you_mean(given, able)}"
        elif len(named) == 1 and named[0] not in able:
            # Another column that happens to fit is not what is called so.
            found = f"{named[0]} cannot hold it; say which column is {kind}:"
        elif len(named) == 1 or (not named and len(able) == 1):
            return (named or able)[0]
        else:
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
            names = json.loads(self._schema.metadata[b"huggingface"])["info"]["features"][self.label]["names"]
            if isinstance(names, list) and names:
                return len(names)
        files = {*self._matching("train"), *self._matching("test")}
        labels = {file: self._labels(file) for file in sorted(files)}
        examples = sum(map(len, labels.values()))
        for file, each in labels.items():
            if len(wrong := np.flatnonzero((each < 0) | (each >= examples))):
                row = wrong[0]
                raise InputError(
                    f"{file}, row {row}: label {each[row]} is no class: expected a number from 0, below that "
                    f"of examples ({examples}); classes: says how many there are"
                )
        return int(max(each.max(initial=-1) for each in labels.values())) + 1

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
        try:
            return np.asarray(column.cast("int64").to_numpy(), dtype=np.int64)
        except ArrowException as error:
            raise InputError(f"{file}: {self.label}: a label is no class: {error}") from None

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


_PART = re.compile(r"(?P<set>.*?)[-_.]?[0-9]+(?:-of-(?P<of>[0-9]+))?(?:-[0-9a-f]+)?")
"""How files are named that are parts of one: ``train-00000-of-00002``, with a digest behind it or not."""


def _check_parts(files: Sequence[Path], what: str) -> None:
    """Raise unless files are one, or the numbered parts of one set, none missing."""
    parts = [re.fullmatch(r"(.*?)[-_.]?([0-9]+)(?:-of-([0-9]+))?(-[0-9a-f]+)?", each.stem) for each in files]
    sets = {
        (part[1], part[3]) if part else (file.stem, None) for part, file in zip(parts, files, strict=True)
    }
    if len(sets) > 1:
        names = ", ".join(each.name for each in files[:4])
        raise InputError(
            f"{what} matches {len(files)} files that are no numbered parts of one set: {names}; narrow it"
        )
    ((_, whole),) = sets
    if whole is not None and int(whole) != len(files):
        raise InputError(
            f"{what}: {files[0].name} is one of {int(whole)} parts, found {len(files)}; get the others"
        )


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

    Folders in a class's folder belong to it, links are followed; other files, and hidden ones, are passed
    over.

    Args:
        split: The split that is read, ``train`` or ``test``.
        places: Where paths start.
        path: The folder that holds both; relative paths start at that of the task file, then at the data
            root.
        train: The folder of the split ``train`` in it.
        test: The folder of the split ``test`` in it.
        names: The folders of classes in the order of their numbers; None: numbered by their names, as
            numbers where all are whole numbers, else by their letters.
    """

    def __init__(
        self,
        split: SplitName,
        places: Places,
        *,
        path: str,
        train: str = "train",
        test: str = "test",
        names: tuple[str, ...] | None = None,
    ) -> None:
        if train == test:
            raise InputError(f"train: and test: are both {train!r}; give each split its own folder")
        self.folder = places.find(path)
        self.home = self.folder / (train if split == "train" else test)
        if not self.home.is_dir():
            there = [each.name for each in self.folder.iterdir() if each.is_dir()]
            raise InputError(f"{split}: no such folder: {self.home}{did_you_mean(self.home.name, there)}")
        self.homes = (self.folder / train, self.folder / test)
        one, other = (each.resolve() for each in self.homes)
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise InputError(f"{one} and {other}: train: and test: must lie beside each other")
        self.given = names

    @cached_property
    def _found(self) -> dict[Path, dict[str, list[Path]]]:
        """The images of each split by class."""
        return {home: _images_in(home) for home in self.homes}

    @cached_property
    def files(self) -> list[Path]:
        """The split's images, by their paths."""
        files = [file for images in self._found[self.home].values() for file in images]
        if not files:
            raise InputError(
                f"{self.home}: no image in a sub-folder; expected files such as cat/1.png "
                f"({', '.join(sorted(SUFFIXES))})"
            )
        return sorted(files, key=lambda file: file.relative_to(self.home).as_posix())

    @cached_property
    def names(self) -> list[str]:
        """The classes: those of both splits, so that a class has one number."""
        images = [classes for classes in self._found.values()]
        there = sorted({name for classes in images for name in classes})
        if self.given is not None:
            return _listed(self.given, there, self.folder)
        for name in there:
            if not any(classes.get(name) for classes in images):
                raise InputError(
                    f"{self.folder}: the folder {name} holds no image in either split, and would shift the "
                    "numbers of the classes after it; take it away, or list the classes: names: [...]"
                )
        return _numbered(there, self.folder)

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
            "files": hashlib.sha256(os.fsencode(names)).hexdigest(),
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


def _numbered(names: Sequence[str], folder: Path) -> list[str]:
    """Return names of classes in the order of their numbers; raise where that is not plain."""
    if all(re.fullmatch("[0-9]+", name) for name in names):
        if len({int(name) for name in names}) < len(names):
            raise InputError(f"{folder}: two folders are one number: {', '.join(names)}; keep one of them")
        return sorted(names, key=int)
    if list(names) != in_order(names):
        raise InputError(
            f"{folder}: nobody knows whether {_first_swapped(names)}: list the classes in the order of their "
            f"numbers: names: [{', '.join(in_order(names)[:3])}, ...]"
        )
    return list(names)


def _first_swapped(names: Sequence[str]) -> str:
    """Return the first two names whose order by letters is not that by counting."""
    counted = in_order(names)
    one = next(name for name, other in zip(names, counted, strict=True) if name != other)
    later = [name for name in names if names.index(name) > names.index(one)]
    other = next(name for name in later if counted.index(name) < counted.index(one))
    return f"{one} or {other} comes first"


def _listed(given: Sequence[str], there: Sequence[str], folder: Path) -> list[str]:
    """Return the classes that a suite lists: all that are there, and each once."""
    if len(set(given)) < len(given):
        raise InputError(f"names: {next(name for name in given if given.count(name) > 1)!r} stands twice")
    for name in there:
        if name not in given:
            raise InputError(f"names: {folder} has a folder {name!r}, which is not listed")
    if not set(given) & set(there):
        raise InputError(f"names: {folder} has no folder of these names")
    return list(given)


def _images_in(home: Path) -> dict[str, list[Path]]:
    """Return the images of each class, wherever in its folder they lie."""
    if not home.is_dir():
        return {}
    classes = {}
    for entry in sorted(home.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            classes[entry.name] = list(_images_below(entry))
        elif _is_image(entry):
            raise InputError(f"{entry}: an image beside the folders of classes; nobody knows its class")
    return classes


def _images_below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and below, links followed, each folder once."""
    seen = {os.path.realpath(folder)}

    def first(place: str) -> bool:
        real = os.path.realpath(place)
        new = real not in seen
        seen.add(real)
        return new

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be looked through: {error.strerror}")

    for place, below, files in os.walk(folder, followlinks=True, onerror=unreadable):
        named = sorted(name for name in below if not name.startswith("."))
        below[:] = [name for name in named if first(os.path.join(place, name))]
        for file in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            if _is_image(file):
                yield file


def _is_image(file: Path) -> bool:
    """Return whether a file is an image; raise where it is one that would be passed over."""
    if file.suffix.lower() in UNREAD:
        raise InputError(f"{file}: images of this kind are not read; expected {', '.join(sorted(SUFFIXES))}")
    if file.suffix.lower() not in SUFFIXES:
        return False
    if not file.is_file():
        raise InputError(f"{file}: expected an image, found a link to nothing, or no file")
    return True


def _class_of(file: Path, home: Path) -> str:
    return file.relative_to(home).parts[0]
