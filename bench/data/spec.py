"""Data sets as tensors: what a suite asks for, what is known unloaded, and the checked images.

The root folder is the one given, else the environment's BENCH_DATA, else the user's cache folder.
Examples come in the order of `examples.stratified`, so that every prefix is stratified and nested, unless
the published order is asked for.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, create_model, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from bench.data import (
    arrays,  # noqa: F401 - importing them registers our own sources
    local,  # noqa: F401 - importing them registers our own sources
    published,  # noqa: F401 - importing them registers our own sources
)
from bench.data.source import ORDER, Examples, Pixels, Places, Source, SplitName, cache_folder, stratified
from bench.errors import InputError
from bench.protocols import Images, Shape, Split
from bench.registry import SOURCES, WHOLE, Count, NonNegativeCount, discover

RESIZE = "bilinear, anti-aliased"

LUMA = (0.299, 0.587, 0.114)
"""Rec. ITU-R BT.601, as in Pillow's conversion to gray."""


class DataSpec(BaseModel):
    """Which examples: a source's split, how many, and in what form.

    Validating a mapping gives the source's own model (`model_of`), whose further fields are the
    source's parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """The source: `bench list data` has all of them."""
    split: SplitName = "test"
    """`train` or `test`."""
    size: Annotated[Count, WHOLE] | None = None
    """The number of examples: a prefix of the order; all, unless said."""
    only: Annotated[tuple[Annotated[NonNegativeCount, WHOLE], ...], Field(min_length=1)] | None = None
    """Of these classes only; labels keep their numbers. Needs `size`: no source declares how many it has."""
    order: Literal["stratified", "published"] = "stratified"
    """Of `examples.stratified`, or that of the files, which papers mean by their first 1,000 images."""
    shard: Annotated[Count, WHOLE] = 500
    """Examples to a job."""
    resize: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    """The side of the square that images are resized to: bilinear, anti-aliased."""
    shorter: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    """Pixels of the shorter side that images are resized to in their own form, as torchvision's Resize; needs
    `crop` where images have several forms."""
    crop: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    """The side of the square that is cut from the middle, after any resizing, as torchvision's CenterCrop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How `shorter` resizes, anti-aliased: 8-bit images stay 8-bit ones, as Pillow's do."""
    channels: Literal[1, 3] | None = None
    """Convert to gray (Rec. 601 luma) or to three equal channels; as published, unless said."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_source(cls, value: Any, handler: ModelWrapValidatorHandler["DataSpec"]) -> "DataSpec":
        if cls is DataSpec and isinstance(value, Mapping) and "name" in value:
            return model_of(str(value["name"])).model_validate(value)
        return handler(value)

    @model_validator(mode="after")
    def _sized(self) -> "DataSpec":
        if self.only is not None and self.size is None:
            raise ValueError("only: say with size how many examples of these classes")
        if self.shorter is not None and self.resize is not None:
            raise ValueError("resize: makes a square, shorter: keeps the form; say one of them")
        if self.interpolation != "bilinear" and self.shorter is None:
            raise ValueError("interpolation: is that of shorter:, which is not said")
        return self

    def __reduce__(self) -> tuple[Callable[..., "DataSpec"], tuple[Any, ...]]:
        return _revived, (self.model_dump(by_alias=True),)

    @property
    def params(self) -> dict[str, Any]:
        """The source's own parameters."""
        fields = SOURCES[self.name].schema.model_fields
        return {info.alias or name: getattr(self, name) for name, info in fields.items()}


def _revived(fields: dict[str, Any]) -> DataSpec:
    discover()
    return DataSpec.model_validate(fields)


@cache
def model_of(name: str) -> type[DataSpec]:
    """Return the model of a source's data sets.

    Args:
        name: the registered source.

    Returns:
        `DataSpec` with the source's parameters as further fields.

    Raises:
        InputError: there is no such source, or it has a parameter that every source has.
    """
    schema = SOURCES[name].schema
    if common := sorted(DataSpec.model_fields.keys() & schema.model_fields.keys()):
        raise InputError(f"{SOURCES[name].place}: {common[0]!r} is a parameter of every data source")
    fields: dict[str, Any] = {key: (info.annotation, info) for key, info in schema.model_fields.items()}
    fields["name"] = (Literal[name], ...)
    return create_model(f"DataSpec[{name}]", __base__=DataSpec, **fields)


def training(spec: DataSpec) -> DataSpec:
    """Return the whole training split of the same data set, in the same form.

    Args:
        spec: which examples are attacked.
    """
    whole = {"split": "train", "size": None, "only": None, "order": "stratified"}
    return spec.model_copy(update=whole)


def data_root(given: Path | None = None) -> Path:
    """Return the folder that data sets lie in.

    Args:
        given: the folder that was asked for; None: BENCH_DATA's, or the user's cache.

    Returns:
        An absolute path.
    """
    if given is None:
        named = os.environ.get("BENCH_DATA")
        given = Path(named) if named else cache_folder() / "data"
    return given.expanduser().absolute()


def shape(spec: DataSpec, root: Path | None = None, folder: Path | None = None) -> Shape:
    """Return the form of an image and the number of classes, loading nothing.

    Args:
        spec: which examples.
        root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        folder: the suite's folder, where relative paths start; None: there are none.

    Returns:
        Channels, height and width as `spec` resizes and converts, and the source's classes.

    Raises:
        InputError: the source does not know such examples.
    """
    return _shape(spec, _source(spec, root, folder))


def count(spec: DataSpec, root: Path | None = None, folder: Path | None = None) -> int:
    """Return the number of examples, loading nothing.

    Args:
        spec: which examples.
        root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        folder: the suite's folder, where relative paths start; None: there are none.

    Returns:
        What `spec` asks for, or all that the split has.

    Raises:
        InputError: more examples, or other classes, are asked for than there are.
    """
    return _count(spec, _source(spec, root, folder))


def digest(spec: DataSpec, root: Path | None = None, folder: Path | None = None) -> str:
    """Return a sha256 of what decides the examples: name, split, form, size, order and content.

    The content is known by its declared checksums, or else by those of the files.

    Args:
        spec: which examples.
        root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        folder: the suite's folder, where relative paths start; None: there are none.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: the source does not know such examples, or its files cannot be read.
    """
    return _digest_of(spec, _source(spec, root, folder))


def _digest_of(spec: DataSpec, source: Source) -> str:
    identity = {
        "name": spec.name,
        "version": SOURCES[spec.name].version,
        "split": spec.split,
        "published": source.count,
        "size": _count(spec, source),
        "shape": list(_shape(spec, source)),
        "resize": None if spec.resize is None else [spec.resize, RESIZE],
        "channels": spec.channels,
        "order": ORDER if spec.order == "stratified" else spec.order,
        "content": source.content,
        # Left out where it is not set, so that data sets keep the names that they had.
        **({} if spec.only is None else {"only": sorted(set(spec.only))}),
        **({} if spec.shorter is None else {"shorter": [spec.shorter, spec.interpolation]}),
        **({} if spec.crop is None else {"crop": spec.crop}),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def prepare(spec: DataSpec, root: Path | None = None, folder: Path | None = None) -> None:
    """See that the files are there, downloading where that is allowed, or say how to get them.

    Nothing is downloaded where the environment's BENCH_OFFLINE is set.

    Args:
        spec: which examples.
        root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        folder: the suite's folder, where relative paths start; None: there are none.

    Raises:
        InputError: files are missing and may not or cannot be downloaded.
    """
    _source(spec, root, folder).prepare()


def load(
    spec: DataSpec, root: Path | None = None, folder: Path | None = None, most: int | None = None
) -> Split:
    """Return the checked images, labels and published indices; they are kept for the process.

    Args:
        spec: which examples.
        root: the folder of data sets; None: BENCH_DATA's, or the user's cache.
        folder: the suite's folder, where relative paths start; None: there are none.
        most: how many of the first examples are needed, so that no others are decoded; None: all.

    Returns:
        Images (float32, NCHW, in [0, 1]), labels and indices (int64), and the digest.

    Raises:
        InputError: files are missing or altered, an image cannot be read, is out of [0, 1] or of another
            form, or a label is out of range.
    """
    asked = (spec, data_root(root), folder, digest(spec, root, folder))
    whole = _count(spec, _source(spec, root, folder))
    needed = whole if most is None else min(most, whole)
    known = _KEPT.pop(asked, None)
    if known is None or len(known) < needed:
        # Twice as many as before: shards come one by one, and each would decode all before it again.
        known = _load(*asked, needed if known is None else min(max(needed, 2 * len(known)), whole))
    _KEPT[asked] = known
    while len(_KEPT) > KEPT:
        del _KEPT[next(iter(_KEPT))]
    return known


KEPT = 4
"""Data sets that are kept for the process."""

_KEPT: dict[tuple[DataSpec, Path, Path | None, str], Split] = {}


def _load(spec: DataSpec, root: Path, folder: Path | None, digest: str, most: int) -> Split:
    source = _source(spec, root, folder)
    source.prepare()
    form = _shape(spec, source)
    where = f"{spec.name} {spec.split}"
    examples = source.examples()
    index, labels = examples.index, examples.labels
    if len(labels) != source.count:
        raise InputError(f"{where}: expected {source.count} examples, found {len(labels)}")
    wrong = np.flatnonzero((labels < 0) | (labels >= form.classes))
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"{where}: image {index[first]}: expected a label below {form.classes}, found {labels[first]}"
        )
    chosen = _chosen(examples, spec, _count(spec, source), where)[:most]
    try:
        images = torch.empty(len(chosen), *form[:3])
    except RuntimeError:
        size = 4 * len(chosen) * math.prod(form[:3]) / 2**30
        raise InputError(
            f"{where}: {len(chosen)} images of {_text(form[:3])} are {size:,.0f} GiB, more than there is; "
            "resize: or size: makes it less"
        ) from None
    # Images are read in the published order, and each written where the order wants it.
    places = np.argsort(index[chosen])
    ascending = index[chosen][places]
    done = 0
    for pixels in source.images(ascending):
        stop = done + len(pixels.values)
        images[torch.from_numpy(places[done:stop])] = _formed(pixels, ascending[done:stop], spec, form, where)
        done = stop
    assert done == len(chosen), "a source yields the images it is asked for"
    # Read meanwhile were files that somebody may have written to.
    if _digest_of(spec, _source(spec, root, folder)) != digest:
        raise InputError(f"{where}: the files changed while they were read; start again")
    return Split(
        images=images,
        labels=torch.from_numpy(labels[chosen]),
        index=torch.from_numpy(index[chosen]),
        digest=digest,
    )


def _chosen(examples: Examples, spec: DataSpec, count: int, where: str) -> NDArray[np.int64]:
    """Return the positions of the first `count` examples of the asked classes, in the asked order."""
    kept = np.arange(len(examples.labels))
    if spec.only is not None:
        kept = np.flatnonzero(np.isin(examples.labels, spec.only))
        if len(kept) < count:
            named = ", ".join(map(str, spec.only))
            raise InputError(f"{where} has {len(kept)} examples of class {named}, size asks for {count}")
    if spec.order == "stratified":
        # A rank within a class does not depend on the other classes.
        kept = kept[stratified(Examples(examples.index[kept], examples.labels[kept]))]
    return kept[:count]


def _source(spec: DataSpec, root: Path | None, folder: Path | None) -> Source:
    made: Source = SOURCES[spec.name].make(spec.split, Places(data_root(root), folder), **spec.params)
    return made


def _shape(spec: DataSpec, source: Source) -> Shape:
    form = source.shape
    height, width = spec.resize or form.height, spec.resize or form.width
    if spec.shorter is not None:
        height, width = _shortened(height, width, spec.shorter)
    if spec.crop is not None:
        if spec.crop > min(height, width):
            found = f"the shorter side ({min(height, width)}), found {spec.crop}"
            raise InputError(f"{spec.name}: crop: expected at most {found}")
        height = width = spec.crop
    return Shape(spec.channels or form.channels, height, width, form.classes)


def _shortened(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return the size of an image whose shorter side is resized, as torchvision rounds it."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _count(spec: DataSpec, source: Source) -> int:
    classes = source.shape.classes
    if spec.only is not None and max(spec.only) >= classes:
        raise InputError(f"{spec.name}: only: there are {classes} classes, from 0, and no {max(spec.only)}")
    if spec.size is not None and spec.size > source.count:
        raise InputError(f"{spec.name} {spec.split} has {source.count} examples, size asks for {spec.size}")
    return spec.size or source.count


def _formed(pixels: Pixels, index: NDArray[np.int64], spec: DataSpec, form: Shape, where: str) -> Images:
    """Return pixels as float32 in [0, 1] of the asked form, checked."""
    if spec.shorter is not None or spec.crop is not None:
        pixels = _cut(pixels, spec, f"{where}: image {index[0]} ({pixels.name})")
    images = _unit(pixels, index, where)
    if spec.channels is not None:
        images = _converted(images, spec.channels)
    if spec.resize is not None and images.shape[2:] != form[1:3]:
        size = (spec.resize, spec.resize)
        # Weights that sum to one up to rounding may pass the bounds by as much.
        images = interpolate(images, size, mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)
    if images.shape[1:] != form[:3]:
        found, expected = _text(tuple(images.shape[1:])), _text(form[:3])
        option = "channels" if images.shape[1] != form.channels else "crop" if spec.shorter else "resize"
        raise InputError(
            f"{where}: image {index[0]} ({pixels.name}): expected {expected} as in the first image, "
            f"found {found}; {option}: makes them alike"
        )
    return images


def _cut(pixels: Pixels, spec: DataSpec, where: str) -> Pixels:
    """Return pixels whose shorter side is resized, and whose middle is cut out, in their own type."""
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    if pixels.values.dtype == np.uint16:
        # torchvision resizes no 16-bit images.
        pixels = Pixels(pixels.name, (pixels.values / 65535).astype(np.float32))
    images = torch.tensor(pixels.values)
    if spec.shorter is not None:
        height, width = images.shape[2:]
        size = list(_shortened(height, width, spec.shorter))
        images = resize(images, size, InterpolationMode(spec.interpolation), antialias=True)
        # Bicubic weights may be negative.
        images = images.clamp(0, 1) if images.is_floating_point() else images
    if spec.crop is not None and spec.crop > min(images.shape[2:]):
        raise InputError(
            f"{where}: crop: expected at most {min(images.shape[2:])}, the shorter side, found {spec.crop}; "
            "shorter: resizes before"
        )
    images = images if spec.crop is None else center_crop(images, [spec.crop, spec.crop])
    return Pixels(pixels.name, images.numpy())


def _unit(pixels: Pixels, index: NDArray[np.int64], where: str) -> Tensor:
    values = pixels.values
    if values.dtype == np.uint8:
        return torch.tensor(values).to(torch.float32).div_(255)
    if values.dtype == np.uint16:
        return torch.from_numpy((values / 65535).astype(np.float32))
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        first = np.argwhere(~inside)[0]
        raise InputError(
            f"{where}: image {index[first[0]]} ({pixels.name}): expected values in [0, 1], "
            f"found {values[tuple(first)]:g}"
        )
    return torch.tensor(values, dtype=torch.float32)


def _converted(images: Tensor, channels: int) -> Tensor:
    match images.shape[1], channels:
        case 3, 1:
            return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA))[:, None].clamp_(0, 1)
        case 1, 3:
            return images.repeat(1, 3, 1, 1)
        case _:
            return images


def _text(form: tuple[int, ...]) -> str:
    channels, height, width = form
    return f"{channels} channel{'s' * (channels != 1)} of {height}x{width}"
