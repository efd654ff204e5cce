"""Data sets: what is known unloaded, the order, the images, and what is said where they cannot be used."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from bench.data import local, source
from bench.data import spec as datasets
from bench.data.source import Examples, Pixels, Places, checksum, decode, stratified
from bench.data.spec import DataSpec
from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import SOURCES, SourceEntry


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "cache")
    monkeypatch.setenv("BENCH_OFFLINE", "1")
    monkeypatch.delenv("BENCH_DATA", raising=False)


def spec(name: str, **fields: Any) -> DataSpec:
    return DataSpec.model_validate({"name": name, **fields})


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def gray(value: int, side: int = 4) -> np.ndarray:
    return np.full((side, side), value, dtype=np.uint8)


def write_parquet(file: Path, images: list[bytes | None], labels: list[Any], **names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = pa.array([{"bytes": each, "path": None} for each in images])
    columns = {names.get("image", "image"): rows, names.get("label", "label"): pa.array(labels)}
    pq.write_table(pa.table(columns), file, row_group_size=3)


def write_folder(home: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        file = home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


class Toy:
    """A source whose images are given."""

    def __init__(self, images: np.ndarray, labels: list[int], count: int | None = None) -> None:
        self.shape = Shape(*images.shape[1:], 3)
        self.count = len(images) if count is None else count
        self.content = {"sha256": hashlib.sha256(images.tobytes()).hexdigest()}
        self.values = images
        self.labels = np.array(labels, dtype=np.int64)

    def prepare(self) -> None: ...

    def examples(self) -> Examples:
        return Examples(np.arange(len(self.labels)) + 100, self.labels)

    def images(self, index: np.ndarray) -> Any:
        for number in index:
            yield Pixels(f"toy-{number}", self.values[number - 100][None])


def register(monkeypatch: pytest.MonkeyPatch, name: str, toy: Toy) -> None:
    def make(split: str, places: Places) -> Toy:
        return toy

    monkeypatch.setitem(SOURCES._entries, name, SourceEntry(name=name, make=make, version=1))


# The order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50] * 10, [5, 50, 500], [1, 1, 97], [0, 7, 0, 30], [1], [200]])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prefix_is_stratified(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    order = stratified(Examples(np.arange(len(labels)), labels))
    assert sorted(order) == list(range(len(labels)))
    present = [label for label, size in enumerate(sizes) if size]
    m = np.arange(1, len(labels) + 1)
    for label in present:
        held = np.cumsum(labels[order] == label)
        share = sizes[label] / len(labels)
        assert (np.abs(held - m * share) <= (1 + len(present) * share) / 2 + 1e-9).all()


def test_order_is_a_random_one_of_each_class() -> None:
    labels = np.zeros(10_000, dtype=np.int64)
    order = stratified(Examples(np.arange(10_000), labels))
    # The mean of 1,000 draws without return: within 5 standard deviations of the middle.
    assert abs(order[:1000].mean() - 4999.5) < 5 * 10_000 / np.sqrt(12 * 1000)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_order_is_that_of_the_written_rule() -> None:
    def splitmix(state: int) -> int:
        word = state & (1 << 64) - 1
        word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
        word = ((word ^ word >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
        return word ^ word >> 31

    seed = int.from_bytes(hashlib.sha256(b"order\x1f1").digest()[:8], "little")
    labels = [0, 1, 1, 0, 2, 1, 0, 1, 2, 1]
    index = [3, 4, 5, 9, 11, 20, 21, 22, 40, 41]
    word = [splitmix(splitmix(each + 1) ^ seed) for each in index]
    signed = [each - (1 << 64) if each >> 63 else each for each in word]
    key = []
    for position, label in enumerate(labels):
        rivals = [signed[other] for other, its in enumerate(labels) if its == label]
        key.append(((sorted(rivals).index(signed[position]) + 0.5) / len(rivals), signed[position]))
    expected = sorted(range(10), key=lambda position: key[position])
    assert stratified(Examples(np.array(index), np.array(labels))).tolist() == expected


def test_prefixes_are_nested_and_keep_their_images() -> None:
    whole = datasets.load(spec("digits"))
    for size in (1, 50, 200):
        part = datasets.load(spec("digits", size=size))
        assert len(part) == size
        assert torch.equal(part.index, whole.index[:size])
        assert torch.equal(part.labels, whole.labels[:size])
        assert torch.equal(part.images, whole.images[:size])
    assert datasets.load(spec("digits", size=100)).labels.bincount().tolist() == [10] * 10


def test_published_order_is_that_of_the_files() -> None:
    whole = datasets.load(spec("digits"))
    found = datasets.load(spec("digits", size=100, order="published"))
    assert found.index.tolist() == sorted(whole.index.tolist())[:100]
    at = {index: place for place, index in enumerate(whole.index.tolist())}
    places = [at[index] for index in found.index.tolist()]
    assert torch.equal(found.images, whole.images[places])
    assert torch.equal(found.labels, whole.labels[places])


def test_only_some_classes_are_kept_with_their_numbers() -> None:
    whole = datasets.load(spec("digits"))
    for order in ("stratified", "published"):
        found = datasets.load(spec("digits", only=[7, 3], size=40, order=order))
        assert set(found.labels.tolist()) == {3, 7}
        assert datasets.shape(spec("digits", only=[3], size=1)).classes == 10
    # Stratified: a prefix of a class is a prefix of it in the whole set.
    threes = datasets.load(spec("digits", only=[3], size=10))
    assert torch.equal(threes.index, whole.index[whole.labels == 3][:10])
    assert torch.equal(threes.images, whole.images[whole.labels == 3][:10])


def test_the_first_image_of_a_class_is_the_first_in_the_file() -> None:
    whole = datasets.load(spec("digits"))
    for label in range(10):
        (index,) = datasets.load(spec("digits", only=[label], size=1, order="published")).index.tolist()
        assert index == whole.index[whole.labels == label].min()
    # In the stratified order the first of a class is another one.
    first = [datasets.load(spec("digits", only=[label], size=1)).index.item() for label in range(10)]
    assert first != [whole.index[whole.labels == label].min().item() for label in range(10)]


def test_a_class_without_a_size_or_without_examples_is_refused() -> None:
    with pytest.raises(ValidationError, match="say with size how many"):
        spec("digits", only=[0])
    with pytest.raises(InputError, match="digits: only: there are 10 classes, from 0, and no 10"):
        datasets.count(spec("digits", only=[10], size=1))
    with pytest.raises(InputError, match="digits test has 36 examples of class 0, size asks for 37"):
        datasets.load(spec("digits", only=[0], size=37))


def test_only_as_many_images_are_decoded_as_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    files = {
        f"{split}/{label}/{number:03}.png": png(generator.integers(0, 256, (4, 4), dtype=np.uint8))
        for split in ("train", "test")
        for label in "ab"
        for number in range(40)
    }
    write_folder(tmp_path / "set", files)
    read: list[str] = []

    def counted(file: Any, name: str) -> Any:
        read.append(name)
        return decode(file, name)

    monkeypatch.setattr(local, "decode", counted)
    asked = spec("image-folder", path=str(tmp_path / "set"))
    few = datasets.load(asked, most=10)
    # And the first image of the folder, for its form.
    assert (len(few), len({*read})) == (10, 10 + (1 if few.index.min() > 0 else 0))
    more = datasets.load(asked, most=11)
    assert len(more) == 20, "twice as many as before, so that shards do not decode all before them again"
    assert len(datasets.load(asked, most=5)) == 20
    whole = datasets.load(asked)
    assert len(whole) == 80
    for part in (few, more):
        n = len(part)
        assert torch.equal(part.images, whole.images[:n])
        assert torch.equal(part.labels, whole.labels[:n])
        assert torch.equal(part.index, whole.index[:n])
        assert part.digest == whole.digest


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (50, 50), (33, 100)])
def test_shorter_and_crop_are_the_published_preprocessing(
    tmp_path: Path, height: int, width: int, interpolation: str
) -> None:
    """As torchvision's Resize and CenterCrop do it on Pillow's images, up to one level of 255."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    generator = np.random.default_rng(height)
    coarse = generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height)))
    files = {f"{split}/{label}/1.png": png(pixels) for split in ("train", "test") for label in "ab"}
    write_folder(tmp_path / "set", files)
    asked = spec("image-folder", path=str(tmp_path / "set"), shorter=32, crop=28, interpolation=interpolation)
    published = Compose([Resize(32, InterpolationMode(interpolation)), CenterCrop(28)])
    expected = torch.tensor(np.asarray(published(Image.fromarray(pixels)))).permute(2, 0, 1) / 255
    found = datasets.load(asked)
    assert found.images.shape[1:] == datasets.shape(asked)[:3] == (3, 28, 28)
    assert (found.images[0] - expected).abs().max() <= 1 / 255 + 1e-6
    assert ((found.images * 255) - (found.images * 255).round()).abs().max() < 1e-3
    # What does not cut keeps its name.
    plain = spec("image-folder", path=str(tmp_path / "set"))
    assert (
        len({datasets.digest(each) for each in (plain, asked, spec(**{**asked.model_dump(), "crop": 27}))})
        == 3
    )


def test_crops_make_images_of_several_forms_alike(tmp_path: Path) -> None:
    sizes = {"a": (8, 12), "b": (14, 9)}
    files = {
        f"{split}/{name}/1.png": png(np.full(size, 9, np.uint8))
        for split in ("train", "test")
        for name, size in sizes.items()
    }
    write_folder(tmp_path / "set", files)
    given = {"name": "image-folder", "path": str(tmp_path / "set")}
    with pytest.raises(InputError, match="resize: makes them alike"):
        datasets.load(DataSpec.model_validate(given))
    with pytest.raises(InputError, match="crop: makes them alike"):
        datasets.load(DataSpec.model_validate({**given, "shorter": 8}))
    assert datasets.load(DataSpec.model_validate({**given, "shorter": 8, "crop": 8})).images.shape[2:] == (
        8,
        8,
    )
    with pytest.raises(InputError, match="crop: expected at most the shorter side"):
        datasets.load(DataSpec.model_validate({**given, "crop": 10}))
    for wrong in ({"shorter": 8, "resize": 8}, {"interpolation": "bicubic"}):
        with pytest.raises(ValidationError):
            DataSpec.model_validate({**given, **wrong})


# Arrays ------------------------------------------------------------------------------------------


def test_arrays_of_every_layout_are_the_same_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    first = generator.integers(0, 256, (12, 3, 5, 6), dtype=np.uint8)
    labels = np.arange(12) % 4
    last = first.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "first.npz", images=first, labels=labels)
    np.savez(tmp_path / "last.npz", x=last, y=labels.astype(np.uint8))
    np.save(tmp_path / "x.npy", (first / 255).astype(np.float32))
    np.save(tmp_path / "y.npy", labels)
    np.savez(tmp_path / "odd.npz", pictures=last, classes=labels)
    given = (
        {"test": "first.npz"},
        {"test": "last.npz"},
        {"test": "x.npy", "test_labels": "y.npy"},
        {"test": "odd.npz", "images": "pictures", "labels": "classes"},
    )
    for each in given:
        asked = spec("arrays", **each)
        found = datasets.load(asked, folder=tmp_path)
        assert datasets.shape(asked, folder=tmp_path) == Shape(3, 5, 6, 4)
        assert torch.allclose(found.images, torch.from_numpy(first[found.index.numpy()] / 255).float())
        assert torch.equal(found.labels, torch.from_numpy(labels[found.index.numpy()]))
    np.savez(tmp_path / "gray.npz", images=first[:, 0], labels=labels)
    assert datasets.shape(spec("arrays", test="gray.npz"), folder=tmp_path) == Shape(1, 5, 6, 4)


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        (
            {"images": np.zeros((2, 3, 3, 3), np.uint8), "labels": [0, 1]},
            {},
            "layout: first, or layout: last",
        ),
        ({"images": np.zeros((2, 4, 4), np.int64), "labels": [0, 1]}, {}, "expected uint8, uint16 or floats"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": [0, 1]}, {}, "expected the shape"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0.0, 1]}, {}, "expected whole numbers"),
        ({"pics": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1]}, {}, "say which array is images:"),
        ({"pics": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1]}, {"images": "pic"}, "did you mean 'pics'"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1, 1]}, {}, "expected 2 examples, found 3"),
        ({"images": np.full((2, 4, 4), 2.0), "labels": [0, 1]}, {}, "expected values in [0, 1], found 2"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": []}, {}, "holds no example"),
    ],
)
def test_arrays_that_cannot_be_are_said(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, str], said: str
) -> None:
    labels = np.asarray(arrays["labels"], None if arrays["labels"] else np.int64)
    np.savez(tmp_path / "test.npz", **{**arrays, "labels": labels})
    with pytest.raises(InputError, match=re.escape(said)):
        datasets.load(spec("arrays", test="test.npz", **options), folder=tmp_path)


def test_no_pickled_array_is_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", images=np.array([{}], dtype=object), labels=[0])
    with pytest.raises(InputError, match="cannot be read"):
        datasets.load(spec("arrays", test="test.npz"), folder=tmp_path)
    with pytest.raises(InputError, match=r"no such file: looked for .*none\.npz"):
        datasets.load(spec("arrays", test="none.npz"), folder=tmp_path)
    np.savez(tmp_path / "good.npz", images=np.zeros((2, 4, 4), np.uint8), labels=[0, 1])
    with pytest.raises(InputError, match="train: no file is named"):
        datasets.load(spec("arrays", test="good.npz", split="train"), folder=tmp_path)


# Digits ------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    published = load_digits()
    for split in ("train", "test"):
        part = datasets.load(spec("digits", split=split))
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == part.index.dtype == torch.int64
        assert part.labels.tolist() == published.target[part.index].tolist()
        assert (part.images[:, 0].numpy() * 16 == published.images[part.index]).all()


def test_split_of_digits_is_the_one_written_down() -> None:
    train, test = (datasets.load(spec("digits", split=split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    both = torch.cat([train.index, test.index])
    assert sorted(both.tolist()) == list(range(1797))
    whole = torch.cat([train.labels, test.labels]).bincount()
    assert (test.labels.bincount() - whole * 360 / 1797).abs().max() <= 1
    assert test.index[:5].tolist() == [1690, 1640, 939, 975, 377]
    listed = ",".join(str(each) for each in sorted(test.index.tolist()))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "55ac9aff25671c59"


def test_digits_need_no_scikit_learn_to_be_imported() -> None:
    import subprocess

    code = (
        "import sys; from bench.data import spec; s = spec.DataSpec.model_validate({'name': 'digits'});"
        "spec.load(s); print('sklearn' in sys.modules, 'torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="digits come with scikit-learn, which is not installed"):
        SOURCES["digits"].make("test", Places(Path())).examples()


# What is known unloaded ---------------------------------------------------------------------------


def test_digest_is_frozen() -> None:
    assert (
        datasets.digest(spec("digits", resize=16))
        == "c5e449fa963ce3ff4ca2dc6fa1cfe403a383d930366502dffa26a749f7e8f81a"
    )


def test_digest_tells_what_decides_the_examples() -> None:
    base = spec("digits")
    others = [
        spec("digits", split="train"),
        spec("digits", size=100),
        spec("digits", resize=16),
        spec("digits", channels=3),
        spec("mnist"),
        spec("fashion-mnist"),
    ]
    assert len({datasets.digest(each) for each in [base, *others]}) == 7
    parts = [
        spec("digits", size=5, **more)
        for more in ({}, {"only": [3]}, {"only": [3, 7]}, {"order": "published"})
    ]
    assert len({datasets.digest(each) for each in parts}) == 4
    assert datasets.digest(spec("digits", size=5, only=[7, 3])) == datasets.digest(parts[2])
    assert (
        datasets.digest(base)
        == datasets.digest(spec("digits", shard=7))
        == datasets.digest(spec("digits", size=360))
    )


@pytest.mark.parametrize(
    ("name", "split", "count", "shape"),
    [
        ("mnist", "train", 60_000, (1, 28, 28, 10)),
        ("mnist", "test", 10_000, (1, 28, 28, 10)),
        ("fashion-mnist", "test", 10_000, (1, 28, 28, 10)),
        ("cifar10", "train", 50_000, (3, 32, 32, 10)),
        ("svhn", "train", 73_257, (3, 32, 32, 10)),
        ("svhn", "test", 26_032, (3, 32, 32, 10)),
    ],
)
def test_published_sets_are_planned_where_they_are_not(
    name: str, split: str, count: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    asked = spec(name, split=split)
    assert datasets.count(asked, tmp_path) == count
    assert datasets.shape(asked, tmp_path) == shape
    assert len(datasets.digest(asked, tmp_path)) == 64
    assert datasets.count(spec(name, split=split, size=1000), tmp_path) == 1000
    assert datasets.shape(spec(name, split=split, resize=14, channels=1), tmp_path) == (1, 14, 14, 10)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "svhn"])
def test_absent_data_is_said_with_where_and_how(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        datasets.prepare(spec(name), tmp_path / "root")
    text = str(caught.value)
    assert f"{name} is not there: looked for " in text
    assert f"in {tmp_path / 'root' / name} and in {tmp_path / 'root'}" in text
    assert "BENCH_OFFLINE forbids to download it" in text
    assert "--data-root or BENCH_DATA" in text
    with pytest.raises(InputError, match="is not there"):
        datasets.load(spec(name), tmp_path / "root")


def test_root_is_given_or_in_the_environment_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert datasets.data_root() == tmp_path / "cache" / "data"
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "named"))
    assert datasets.data_root() == tmp_path / "named"
    assert datasets.data_root(tmp_path / "given") == tmp_path / "given"


def test_training_is_the_whole_training_split_in_the_same_form() -> None:
    asked = spec("digits", size=100, resize=16, shard=50)
    assert datasets.training(asked) == spec("digits", split="train", resize=16, shard=50)
    one = spec("digits", only=[0], size=1, order="published", resize=16, shard=50)
    assert datasets.training(one) == datasets.training(asked)
    assert datasets.shape(datasets.training(asked)) == datasets.shape(asked)


def test_more_than_there_are() -> None:
    with pytest.raises(InputError, match="digits test has 360 examples, size asks for 361"):
        datasets.count(spec("digits", size=361))


# The specification -------------------------------------------------------------------------------


def test_specification_knows_the_source_s_parameters() -> None:
    asked = spec("parquet", path="here", label="fine")
    assert asked.params["path"] == "here"
    assert asked.params["label"] == "fine"
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert hash(asked) == hash(spec("parquet", path="here", label="fine"))
    assert json.loads(asked.model_dump_json())["train"] == "**/train*.parquet"


@pytest.mark.parametrize(
    ("fields", "place", "kind"),
    [
        ({"name": "mnist", "pth": "x"}, "pth", "extra_forbidden"),
        ({"name": "mnist", "path": "x"}, "path", "extra_forbidden"),
        ({"name": "parquet"}, "path", "missing"),
        ({"name": "digits", "split": "val"}, "split", "literal_error"),
        ({"name": "digits", "size": 0}, "size", "greater_than_equal"),
        ({"name": "digits", "size": True}, "size", "value_error"),
        ({"name": "digits", "channels": 2}, "channels", "literal_error"),
        ({"name": "digits", "resize": -1}, "resize", "greater_than_equal"),
        ({"split": "test"}, "name", "missing"),
    ],
)
def test_wrong_specifications_are_refused_at_their_place(
    fields: dict[str, Any], place: str, kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSpec.model_validate(fields)
    (problem,) = caught.value.errors()
    assert (problem["loc"], problem["type"]) == ((place,), kind)


def test_unknown_source_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown data source 'mnits'; did you mean 'mnist'\?"):
        spec("mnits")


def test_source_must_not_take_a_common_field(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(split: str, places: Places, *, size: int = 3) -> None: ...

    monkeypatch.setitem(SOURCES._entries, "greedy", SourceEntry(name="greedy", make=greedy, version=1))
    with pytest.raises(InputError, match="'size' is a parameter of every data source"):
        spec("greedy")


# Resizing and channels ----------------------------------------------------------------------------


def test_doubling_is_bilinear() -> None:
    small = datasets.load(spec("digits", size=50))
    large = datasets.load(spec("digits", size=50, resize=16))
    assert large.images.shape == (50, 1, 16, 16)
    assert large.images.min() >= 0
    assert large.images.max() <= 1
    # Pixel centres lie at quarters: each output is 3/4 of the nearer and 1/4 of the farther input.
    weights = np.zeros((16, 8))
    for row in range(16):
        near, far = row // 2, row // 2 + (1 if row % 2 else -1)
        weights[row, near] += 0.75
        weights[row, min(max(far, 0), 7)] += 0.25
    expected = weights @ small.images[:, 0].double().numpy() @ weights.T
    assert np.abs(large.images[:, 0].numpy() - expected).max() < 1e-6


def test_shrinking_is_anti_aliased(monkeypatch: pytest.MonkeyPatch) -> None:
    board = (np.indices((32, 32)).sum(0) % 2).astype(np.float32)[None, None]
    register(monkeypatch, "board", Toy(board, [0]))
    inner = datasets.load(spec("board", resize=8)).images[0, 0, 1:-1, 1:-1]
    assert (inner - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("side", [3, 7, 13, 31])
def test_resizing_keeps_the_range(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (20, 1, 13, 13)).astype(np.float32)
    register(monkeypatch, "blots", Toy(pixels, [0] * 20))
    images = datasets.load(spec("blots", resize=side)).images
    assert images.shape[2:] == (side, side)
    assert images.min() >= 0
    assert images.max() <= 1


def test_channels_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)
    register(monkeypatch, "colour", Toy(pixels, [0] * 5))
    found = datasets.load(spec("colour", channels=1))
    luma = np.tensordot([0.299, 0.587, 0.114], pixels[found.index - 100], axes=([0], [1]))
    assert np.abs(found.images[:, 0].numpy() - luma).max() < 1e-6
    three = datasets.load(spec("digits", size=3, channels=3)).images
    assert torch.equal(three, datasets.load(spec("digits", size=3)).images.expand(-1, 3, -1, -1))


# Checks of what a source yields -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "nan"), (1.5, "1.5"), (-0.25, "-0.25"), (np.inf, "inf")]
)
def test_values_out_of_range_are_refused(value: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 1, 2, 2), dtype=np.float32)
    pixels[2, 0, 1, 1] = value
    register(monkeypatch, "toy", Toy(pixels, [0, 1, 2, 0]))
    expected = rf"toy test: image 102 \(toy-102\): expected values in \[0, 1\], found {said}$"
    with pytest.raises(InputError, match=expected):
        datasets.load(spec("toy"))


@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_refused(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "toy", Toy(np.zeros((3, 1, 2, 2), dtype=np.float32), [0, label, 1]))
    with pytest.raises(InputError, match=f"toy test: image 101: expected a label below 3, found {label}$"):
        datasets.load(spec("toy"))


def test_wrong_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "toy", Toy(np.zeros((3, 1, 2, 2), dtype=np.float32), [0, 1, 2], count=4))
    with pytest.raises(InputError, match="toy test: expected 4 examples, found 3"):
        datasets.load(spec("toy"))


def test_loading_is_kept_until_the_content_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.load(spec("digits", size=10)) is datasets.load(spec("digits", size=10))
    register(monkeypatch, "toy", Toy(np.zeros((1, 1, 2, 2), dtype=np.float32), [0]))
    before = datasets.load(spec("toy"))
    register(monkeypatch, "toy", Toy(np.ones((1, 1, 2, 2), dtype=np.float32), [0]))
    after = datasets.load(spec("toy"))
    assert (before.images.max(), after.images.max()) == (0, 1)
    assert before.digest != after.digest == datasets.digest(spec("toy"))


# MNIST -------------------------------------------------------------------------------------------


def test_mnist_is_mnist(data_root: Path) -> None:
    test = datasets.load(spec("mnist"), data_root)
    assert sorted(test.index.tolist()) == list(range(10_000))
    assert test.labels[test.index.argsort()][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    train = datasets.load(spec("mnist", split="train"), data_root)
    assert train.labels[train.index.argsort()][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert train.images.double().mean() == pytest.approx(0.1307, abs=5e-5)
    assert train.images.double().std() == pytest.approx(0.3081, abs=5e-5)
    # The first training image is the well-known five: its first row with ink has these values.
    first = train.images[train.index == 0][0, 0]
    assert (first[5, 12:24] * 255).round().int().tolist() == [
        3,
        18,
        18,
        18,
        126,
        136,
        175,
        26,
        166,
        255,
        247,
        127,
    ]


def test_the_first_zero_of_mnist_is_its_fourth_test_image(data_root: Path) -> None:
    # The published test labels begin 7, 2, 1, 0.
    first = datasets.load(spec("mnist", only=[0], size=1, order="published"), data_root)
    assert (first.index.tolist(), first.labels.tolist()) == ([3], [0])
    four = datasets.load(spec("mnist", size=4, order="published"), data_root)
    assert four.labels.tolist() == [7, 2, 1, 0]
    assert torch.equal(first.images[0], four.images[3])


def test_mnist_prefix_of_another_size_is_the_same(data_root: Path) -> None:
    whole = datasets.load(spec("mnist"), data_root)
    part = datasets.load(spec("mnist", size=200), data_root)
    assert torch.equal(part.index, whole.index[:200])
    assert torch.equal(part.images, whole.images[:200])


def test_mnist_is_read_compressed_and_from_torchvision_s_own_root(data_root: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        content = (data_root / "mnist" / "MNIST" / "raw" / name).read_bytes()
        (raw / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    found = datasets.load(spec("mnist", size=50), tmp_path)
    assert torch.equal(found.images, datasets.load(spec("mnist", size=50), data_root).images)


def test_altered_mnist_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    write_folder(raw, {"t10k-images-idx3-ubyte": b"x", "t10k-labels-idx1-ubyte": b"<!DOCTYPE html>"})
    datasets.prepare(spec("mnist"), tmp_path)
    with pytest.raises(
        InputError, match="t10k-labels-idx1-ubyte: is not the published file: expected the md5 27ae"
    ):
        datasets.load(spec("mnist"), tmp_path)


def test_download_is_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as torchvisions

    def fetch(root: str, *, download: bool) -> None:
        assert download
        names = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
        write_folder(Path(root) / "MNIST" / "raw", dict.fromkeys(names, b"fetched"))

    monkeypatch.delenv("BENCH_OFFLINE")
    monkeypatch.setattr(torchvisions, "MNIST", fetch)
    datasets.prepare(spec("mnist"), tmp_path)
    home = tmp_path / "mnist"
    assert [each.name for each in home.iterdir()] == ["MNIST"]
    assert (home / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes() == b"fetched"


def test_failed_download_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as torchvisions

    def fetch(root: str, *, download: bool) -> None:
        (Path(root) / "half").write_bytes(b"")
        raise RuntimeError("Error downloading:\nno route to host")

    monkeypatch.delenv("BENCH_OFFLINE")
    monkeypatch.setattr(torchvisions, "FashionMNIST", fetch)
    with pytest.raises(InputError, match=r"it could not be downloaded: no route to host\. Copy Fashion"):
        datasets.prepare(spec("fashion-mnist"), tmp_path)
    assert list((tmp_path / "fashion-mnist").iterdir()) == []


# CIFAR-10 and SVHN, in the layouts that torchvision reads ------------------------------------------


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import cifar

    pixels = np.zeros((10_000, 3, 32, 32), dtype=np.uint8)
    pixels[7, 1, 2, 3] = 51
    labels = [number % 10 for number in range(10_000)]
    home = tmp_path / "cifar10" / "cifar-10-batches-py"
    batch = pickle.dumps({"data": pixels.reshape(10_000, -1), "labels": labels})
    write_folder(
        home, {"test_batch": batch, "batches.meta": pickle.dumps({"label_names": list("abcdefghij")})}
    )
    with pytest.raises(InputError, match=r"cifar10 in .*: is damaged"):
        datasets.load(spec("cifar10"), tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    found = datasets.load(spec("cifar10"), tmp_path)
    position = int((found.index == 7).nonzero())
    assert found.labels[position] == 7
    assert found.images[position].nonzero().tolist() == [[1, 2, 3]]
    assert found.images[position, 1, 2, 3] == torch.tensor(51) / 255


def test_svhn_is_read_as_torchvision_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as torchvisions

    class Fake:
        def __init__(self, root: str, split: str) -> None:
            assert (Path(root), split) == (tmp_path, "test")
            self.data = np.zeros((26_032, 3, 32, 32), dtype=np.uint8)
            self.labels = np.arange(26_032) % 10

    monkeypatch.setattr(torchvisions, "SVHN", Fake)
    write_folder(tmp_path, {"test_32x32.mat": b""})
    found = datasets.load(spec("svhn", size=20), tmp_path)
    assert found.images.shape == (20, 3, 32, 32)
    assert torch.equal(found.labels, found.index % 10)


# Parquet -----------------------------------------------------------------------------------------


def test_real_parquet_files(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(data_root))
    asked = spec("parquet", path="cifar10-jpeg", size=100)
    assert datasets.shape(asked) == (3, 32, 32, 10)
    assert datasets.count(spec("parquet", path="cifar10-jpeg")) == 10_000
    found = datasets.load(asked)
    assert found.labels.bincount().tolist() == [10] * 10
    table = pq.read_table(data_root / "cifar10-jpeg" / "test-00000-of-00001.parquet")
    for position in (0, 17, 99):
        row = int(found.index[position])
        assert table["label"][row].as_py() == found.labels[position]
        pixels = np.asarray(Image.open(io.BytesIO(table["img"][row].as_py()["bytes"])))
        assert ((found.images[position].permute(1, 2, 0) * 255).round().numpy() == pixels).all()
    sprite = datasets.load(spec("parquet", path="fashion-sprite"))
    assert sprite.images.shape == (900, 1, 28, 28)
    assert sprite.labels.bincount().tolist() == [90] * 10


def test_missing_split_of_a_real_set(data_root: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches train: .*; there are test-00000-of-00001.parquet"):
        datasets.count(spec("parquet", path="fashion-sprite", split="train"), data_root)


def make_parquet(home: Path, count: int = 8) -> None:
    images = [png(gray(10 * number)) for number in range(count)]
    write_parquet(home / "test-0.parquet", images, [number % 2 for number in range(count)])
    write_parquet(home / "train-0.parquet", images, [number % 4 for number in range(count)])


def test_parquet_rows_keep_their_index(tmp_path: Path) -> None:
    make_parquet(tmp_path / "set")
    write_parquet(tmp_path / "set" / "test-1.parquet", [png(gray(200)), png(gray(210))], [0, 1])
    found = datasets.load(spec("parquet", path=str(tmp_path / "set")))
    values = {
        int(index): round(float(image[0, 0, 0]) * 255)
        for index, image in zip(found.index, found.images, strict=True)
    }
    assert values == {**{number: 10 * number for number in range(8)}, 8: 200, 9: 210}
    # The training split has labels up to 3, so that there are four classes in both.
    assert datasets.shape(spec("parquet", path=str(tmp_path / "set"))).classes == 4


def test_relative_paths_start_at_the_suite_then_at_the_root(tmp_path: Path) -> None:
    make_parquet(tmp_path / "root" / "set", 4)
    asked = spec("parquet", path="set")
    assert datasets.count(asked, tmp_path / "root", tmp_path / "suite") == 4
    make_parquet(tmp_path / "suite" / "set", 6)
    assert datasets.count(asked, tmp_path / "root", tmp_path / "suite") == 6
    with pytest.raises(InputError) as caught:
        datasets.count(spec("parquet", path="other"), tmp_path / "root", tmp_path / "suite")
    assert f"looked for {tmp_path / 'suite' / 'other'} and {tmp_path / 'root' / 'other'}" in str(caught.value)


def test_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    make_parquet(tmp_path / "one")
    make_parquet(tmp_path / "two")
    one, two = (datasets.digest(spec("parquet", path=name), tmp_path) for name in ("one", "two"))
    assert one == two
    write_parquet(tmp_path / "two" / "test-0.parquet", [png(gray(3))] * 8, [0, 1] * 4)
    assert datasets.digest(spec("parquet", path="two"), tmp_path) != one


def alike(file: Path, content: bytes) -> None:
    """Write a file, and set the time of its change to what it always is."""
    file.write_bytes(content)
    os.utime(file, ns=(10**18, 10**18))


def sha(content: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()


def test_checksum_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, notes = tmp_path / "file", tmp_path / "cache" / "checksums"
    alike(file, b"one")
    assert checksum([file]) == sha(b"one")
    # A file of this moment may still be written to, whatever time it bears: nothing is remembered.
    assert not notes.exists()
    monkeypatch.setattr(source, "SETTLED", -1)
    assert checksum([file]) == sha(b"one")
    (note,) = notes.iterdir()
    assert note.read_text() == sha(b"one")
    note.write_text("0" * 64)
    assert checksum([file]) == "0" * 64
    note.write_text("cut sh")
    assert checksum([file]) == sha(b"one")


@pytest.mark.parametrize("how", ["written over", "moved in", "copied with its times", "swapped", "linked"])
def test_other_content_of_equal_size_and_time_is_noticed(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SETTLED", -1)
    file, other, third = (tmp_path / name for name in ("file", "other", "third"))
    for each, content in ((file, b"one"), (other, b"two"), (third, b"six")):
        alike(each, content)
    if how == "linked":
        file.unlink()
        file.symlink_to(third)
    before = checksum([file]), checksum([other])
    match how:
        case "written over":
            alike(file, b"two")
        case "moved in":
            other.rename(file)
        case "copied with its times":
            shutil.copy2(other, file)
        case "swapped":
            file.rename(third)
            other.rename(file)
            third.rename(other)
        case "linked":
            file.unlink()
            file.symlink_to(other)
    assert file.stat().st_mtime_ns == 10**18
    assert file.stat().st_size == 3
    assert checksum([file]) == sha(b"two") != before[0]
    assert other.exists() is False or checksum([other]) == sha(other.read_bytes())


def test_replaced_images_make_another_data_set(tmp_path: Path) -> None:
    asked, file = spec("image-folder", path=str(tmp_path)), tmp_path / "test" / "a" / "1.bmp"
    write_folder(tmp_path, {"test/a/1.bmp": png(gray(1), format="BMP")})
    alike(file, png(gray(1), format="BMP"))
    size, before, first = file.stat().st_size, datasets.digest(asked), datasets.load(asked)
    alike(file, png(gray(200), format="BMP"))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (size, 10**18)
    assert datasets.digest(asked) != before
    assert not torch.equal(datasets.load(asked).images, first.images)


def test_files_that_change_while_they_are_read_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"test/a/1.png": png(gray(1)), "test/a/2.png": png(gray(2))})

    def meddling(file: Any, name: str) -> np.ndarray:
        asked.append(name)
        if len(asked) == 3:
            # Twice the first image was looked at for its form.
            alike(tmp_path / "test/a/2.png", png(gray(3)))
        return decode(file, name)

    asked: list[str] = []
    monkeypatch.setattr(local, "decode", meddling)
    with pytest.raises(InputError, match="the files changed while they were read; start again"):
        datasets.load(spec("image-folder", path=str(tmp_path)))


def test_checksum_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_bytes(b"a file where a folder should be")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "blocked")
    file = tmp_path / "file"
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    assert checksum([file]) == hashlib.sha256(hashlib.sha256(b"one").digest()).hexdigest()


def test_classes_come_from_the_names_that_the_file_describes(tmp_path: Path) -> None:
    table = pa.table({"img": pa.array([png(gray(1))]), "label": pa.array([0])})
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "test.parquet")
    assert datasets.shape(spec("parquet", path=str(tmp_path))) == (1, 4, 4, 3)
    assert datasets.shape(spec("parquet", path=str(tmp_path), classes=5)).classes == 5
    table = table.replace_schema_metadata({"huggingface": "{not JSON"})
    pq.write_table(table, tmp_path / "data" / "test.parquet")
    assert datasets.shape(spec("parquet", path=str(tmp_path))).classes == 1


def parquet_trouble(tmp_path: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        datasets.load(spec("parquet", path=str(tmp_path), **fields))
    return str(caught.value)


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    assert parquet_trouble(tmp_path).endswith(
        "no file matches test: '**/test*.parquet'; there is no Parquet file"
    )
    file = tmp_path / "test.parquet"
    file.write_bytes(b"PAR1 but not really")
    assert f"{file}: cannot be read as Parquet: " in parquet_trouble(tmp_path)
    assert "expected a folder, found a file" in parquet_trouble(file)
    write_parquet(file, [png(gray(1))] * 2, [0, 1])
    assert parquet_trouble(tmp_path, image="imge").startswith(
        f"{file}: image: column 'imge' is not there or cannot hold it; did you mean 'image'?; "
        "its columns are image ("
    )
    assert "label: column 'image' is not there or cannot hold it" in parquet_trouble(tmp_path, label="image")
    assert "matches train: and test:" in parquet_trouble(tmp_path, train="*.parquet")
    assert "is no pattern below a folder" in parquet_trouble(tmp_path, test="/etc/*.parquet")
    write_parquet(file, [png(gray(1)), b"not an image"], [0, 1])
    assert parquet_trouble(tmp_path) == "test.parquet, row 1: not an image that Pillow knows"
    write_parquet(file, [png(gray(1)), None], [0, 1])
    assert parquet_trouble(tmp_path) == "test.parquet, row 1: image holds no bytes"
    write_parquet(file, [png(gray(1))] * 2, [0, None])
    assert parquet_trouble(tmp_path) == f"{file}: label is empty in 1 rows"
    write_parquet(file, [png(gray(1))] * 2, [0, -1])
    assert parquet_trouble(tmp_path).startswith(
        f"{file}, row 1: label -1 is no class: expected a number from 0"
    )
    assert "image 1: expected a label below 3, found -1" in parquet_trouble(tmp_path, classes=3)
    file.unlink()
    for folder in ("plain", "other"):
        write_parquet(tmp_path / folder / "test.parquet", [png(gray(1))], [0])
    assert "narrow path: to one of them" in parquet_trouble(tmp_path)


@pytest.mark.parametrize("label", [2**40, 2**62, 100, -(2**40), -1])
def test_a_label_that_is_no_class_is_refused_with_its_row(label: int, tmp_path: Path) -> None:
    file = tmp_path / "test.parquet"
    write_parquet(file, [png(gray(1))] * 4, [0, 1, label, 1])
    assert parquet_trouble(tmp_path) == (
        f"{file}, row 2: label {label} is no class: expected a number from 0, below that of examples (4); "
        "classes: says how many there are"
    )
    said = f"expected a label below 3, found {label}"
    assert said in parquet_trouble(tmp_path, classes=3)
    if label == 100:
        assert datasets.shape(spec("parquet", path=str(tmp_path), classes=101)).classes == 101
    for classes in (0, -1, 2**40):
        assert "classes: expected a number from 1 to 1,000,000" in parquet_trouble(tmp_path, classes=classes)


def test_labels_beyond_64_bits_do_not_wrap(tmp_path: Path) -> None:
    images = pa.array([png(gray(1))] * 2)
    labels = pa.array([0, 2**64 - 1], type=pa.uint64())
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "test.parquet")
    assert f"{tmp_path / 'test.parquet'}: label: a label is no class: " in parquet_trouble(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": b"", "label": 0, "labels": 1}, "say which column is label:"),
        ({"image": b"", "img": b"", "label": 0}, "say which column is image:"),
        ({"image": b"", "label": "cat", "id": 0}, "label cannot hold it; say which column is label:"),
        ({"image": b"", "label": 0.0, "id": 0}, "label cannot hold it; say which column is label:"),
        ({"image": b"", "label": True, "id": 0}, "label cannot hold it; say which column is label:"),
        ({"image": "path", "thumbnail": b"", "label": 0}, "image cannot hold it; say which column is image:"),
        ({"a": b"", "b": b"", "label": 0}, "say which column is image:"),
        ({"image": b"", "coarse": 0, "fine": 1}, "say which column is label:"),
    ],
)
def test_of_two_columns_none_is_chosen_in_silence(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {name: [png(gray(1)) if each == b"" else each] for name, each in columns.items()}
    pq.write_table(pa.table(given), tmp_path / "test.parquet")
    assert f"test.parquet: {said}; its columns are " in parquet_trouble(tmp_path)


def test_several_files_are_parts_of_one_set_or_refused(tmp_path: Path) -> None:
    for case, (names, said) in enumerate(
        [
            (["test.parquet", "test_old.parquet"], "2 files that are no numbered parts of one set"),
            (["test-a.parquet", "test-b.parquet"], "2 files that are no numbered parts of one set"),
            (["test-00000-of-00002.parquet", "test-0.parquet"], "no numbered parts of one set"),
            (["test-00000-of-00003.parquet", "test-00002-of-00003.parquet"], "one of 3 parts, found 2"),
            (["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"], ""),
            (["test-00000-of-00002-0a1b.parquet", "test-00001-of-00002-77ff.parquet"], ""),
            ([f"test_{number}.parquet" for number in range(11)], ""),
        ]
    ):
        home = tmp_path / str(case)
        for number, name in enumerate(names):
            write_parquet(home / name, [png(gray(number))], [0])
        if said:
            assert said in parquet_trouble(home)
        else:
            loaded = datasets.load(spec("parquet", path=str(home), order="published"))
            assert (loaded.images[:, 0, 0, 0] * 255).round().tolist() == list(range(len(names)))


def test_empty_parquet_is_refused(tmp_path: Path) -> None:
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    pq.write_table(schema.empty_table(), tmp_path / "test.parquet")
    assert parquet_trouble(tmp_path).endswith("test.parquet: holds no example")


def test_mixed_forms_are_refused_unless_made_alike(tmp_path: Path) -> None:
    file = tmp_path / "test.parquet"
    write_parquet(file, [png(gray(1)), png(gray(2, side=6))], [0, 1])
    assert parquet_trouble(tmp_path) == (
        "parquet test: image 1 (test.parquet, row 1): expected 1 channel of 4x4 as in the first image, "
        "found 1 channel of 6x6; resize: makes them alike"
    )
    images = datasets.load(spec("parquet", path=str(tmp_path), resize=4)).images
    assert sorted(images[:, 0, 0, 0].mul(255).round().tolist()) == [1, 2]
    write_parquet(file, [png(gray(1)), png(np.zeros((4, 4, 3), dtype=np.uint8))], [0, 1])
    assert "found 3 channels of 4x4; channels: makes them alike" in parquet_trouble(tmp_path)
    assert datasets.load(spec("parquet", path=str(tmp_path), channels=3)).images.shape == (2, 3, 4, 4)


# Folders of images ---------------------------------------------------------------------------------


def make_folder(home: Path) -> None:
    files = {
        "train/cat/1.png": png(gray(10)),
        "train/dog/1.png": png(gray(20)),
        "train/owl/deep/1.PNG": png(gray(30)),
        "test/cat/b.png": png(gray(40)),
        "test/cat/a.jpg": png(gray(50), format="JPEG", quality=100),
        "test/owl/1.png": png(gray(60)),
        "test/owl/notes.txt": b"no image",
        "test/.hidden/1.png": b"no class",
        "test/owl/.hidden.png": b"no image",
    }
    write_folder(home, files)


def test_folder_of_images(tmp_path: Path) -> None:
    make_folder(tmp_path / "set")
    asked = spec("image-folder", path="set")
    assert datasets.shape(asked, tmp_path) == (1, 4, 4, 3)
    assert datasets.count(asked, tmp_path) == 3
    test = datasets.load(asked, tmp_path)
    rows = sorted(
        zip(test.index.tolist(), test.labels.tolist(), test.images[:, 0, 0, 0].tolist(), strict=True)
    )
    assert [(index, label, round(value * 255)) for index, label, value in rows] == [
        (0, 0, 50),
        (1, 0, 40),
        (2, 2, 60),
    ]
    train = datasets.load(datasets.training(asked), tmp_path)
    assert sorted(train.labels.tolist()) == [0, 1, 2]


def test_digest_of_a_folder_follows_names_and_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_folder(tmp_path / name)
    asked = [spec("image-folder", path=name) for name in ("one", "two")]
    assert datasets.digest(asked[0], tmp_path) == datasets.digest(asked[1], tmp_path)
    (tmp_path / "two" / "test" / "cat").rename(tmp_path / "two" / "test" / "dog")
    renamed = datasets.digest(asked[1], tmp_path)
    assert renamed != datasets.digest(asked[0], tmp_path)
    (tmp_path / "two" / "test" / "dog" / "b.png").write_bytes(png(gray(41)))
    assert datasets.digest(asked[1], tmp_path) != renamed


def folder_trouble(tmp_path: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        datasets.load(spec("image-folder", path=str(tmp_path), **fields))
    return str(caught.value)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"tests/readme.txt": b""})
    assert folder_trouble(tmp_path) == f"test: no such folder: {tmp_path / 'test'}; did you mean 'tests'?"
    assert f"{tmp_path / 'tests'}: no image in a sub-folder" in folder_trouble(tmp_path, test="tests")
    assert "train: and test: are both 'all'" in folder_trouble(tmp_path, train="all", test="all")


def classes(tmp_path: Path, names: list[str], listed: list[str] | None = None) -> list[int]:
    """Return the labels of folders of these names, in the order in which they are given."""
    for number, name in enumerate(names):
        write_folder(tmp_path, {f"test/{name}/1.png": png(gray(number))})
    loaded = datasets.load(spec("image-folder", path=str(tmp_path), names=listed))
    values = (loaded.images[:, 0, 0, 0] * 255).round().int().tolist()
    return [label for _, label in sorted(zip(values, loaded.labels.tolist(), strict=True))]


@pytest.mark.parametrize("form", ["{}", "{:02}", "{:03}", "1{:03}"])
def test_folders_that_are_numbers_are_counted(form: str, tmp_path: Path) -> None:
    assert classes(tmp_path, [form.format(number) for number in range(12)]) == list(range(12))


def test_folders_with_letters_are_ordered_by_them_where_that_is_plain(tmp_path: Path) -> None:
    assert classes(tmp_path, ["owl", "cat", "Dog", "class_2", "n01440764"]) == [4, 1, 0, 2, 3]


@pytest.mark.parametrize("names", [["class_2", "class_10"], ["2", "10", "other"], ["a2b", "a10b", "a1b"]])
def test_folders_whose_order_is_not_plain_are_to_be_listed(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        classes(tmp_path, names)
    assert "nobody knows whether" in str(caught.value)
    assert "list the classes in the order of their numbers: names: [" in str(caught.value)
    assert classes(tmp_path, names, listed=[*names, "nothing"]) == list(range(len(names)))
    asked = spec("image-folder", path=str(tmp_path), names=[*names, "nothing"])
    assert datasets.shape(asked).classes == len(names) + 1
    other = spec("image-folder", path=str(tmp_path), names=[*names[::-1], "nothing"])
    assert datasets.digest(other) != datasets.digest(asked)
    assert "which is not listed" in folder_trouble(tmp_path, names=names[1:])
    assert "stands twice" in folder_trouble(tmp_path, names=[*names, names[0]])


def test_folders_that_are_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two folders are one number: 01, 1, 2"):
        classes(tmp_path, ["1", "01", "2"])


def test_an_empty_class_does_not_shift_the_others_in_silence(tmp_path: Path) -> None:
    write_folder(tmp_path, {"test/cat/1.png": png(gray(1)), "test/dog/1.png": png(gray(2))})
    (tmp_path / "test" / "bird").mkdir()
    said = (
        "the folder bird holds no image in either split, and would shift the numbers of the classes after it"
    )
    assert said in folder_trouble(tmp_path)
    write_folder(tmp_path, {"test/bird/readme.txt": b"", "test/bird/.1.png": png(gray(1))})
    assert said in folder_trouble(tmp_path)
    assert datasets.shape(spec("image-folder", path=str(tmp_path), names=["bird", "cat", "dog"])).classes == 3
    write_folder(tmp_path, {"train/bird/1.png": png(gray(1))})
    assert sorted(datasets.load(spec("image-folder", path=str(tmp_path))).labels.tolist()) == [1, 2]


def test_what_would_be_passed_over_in_silence_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path, {"test/cat/1.PNG": png(gray(1)), "test/cat/.2.png": b"", "test/notes.txt": b""})
    (tmp_path / "test" / ".cache").mkdir()
    assert datasets.count(spec("image-folder", path=str(tmp_path))) == 1
    for name, said in (
        ("test/loose.png", "an image beside the folders of classes; nobody knows its class"),
        ("test/cat/2.avif", "images of this kind are not read; expected .bmp, "),
        ("test/cat/deep/3.HEIC", "images of this kind are not read; expected .bmp, "),
    ):
        write_folder(tmp_path, {name: b""})
        assert folder_trouble(tmp_path) == f"{tmp_path / name}: {said}" or said in folder_trouble(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "test" / "cat" / "4.png").symlink_to(tmp_path / "nowhere")
    assert "4.png: expected an image, found a link to nothing, or no file" in folder_trouble(tmp_path)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"away/1.png": png(gray(1)), "away/deep/2.png": png(gray(2))})
    write_folder(tmp_path, {"set/test/dog/3.png": png(gray(3))})
    (tmp_path / "set/test/cat").symlink_to(tmp_path / "away")
    (tmp_path / "set/test/dog/more").symlink_to(tmp_path / "away")
    # Round in a circle, and a second way to the same place.
    (tmp_path / "away/deep/round").symlink_to(tmp_path / "away")
    (tmp_path / "away/twice").symlink_to(tmp_path / "away" / "deep")
    asked = spec("image-folder", path=str(tmp_path / "set"), order="published")
    loaded = datasets.load(asked)
    values = (loaded.images[:, 0, 0, 0] * 255).round().int().tolist()
    assert list(zip(values, loaded.labels.tolist(), strict=True)) == [(1, 0), (2, 0), (3, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize(("train", "test"), [(".", "test"), ("test", "./test"), ("test/cat", "test")])
def test_splits_do_not_lie_in_each_other(train: str, test: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"test/cat/1.png": png(gray(1))})
    assert "train: and test: must lie beside each other" in folder_trouble(tmp_path, train=train, test=test)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems name files in Unicode alone")
def test_names_that_are_no_unicode_are_names(tmp_path: Path) -> None:
    home = os.fsencode(tmp_path / "test") + b"/x\xe9y"
    os.makedirs(home)
    with open(home + b"/\xff.png", "wb") as file:
        file.write(png(gray(1)))
    asked = spec("image-folder", path=str(tmp_path))
    assert len(datasets.digest(asked)) == 64
    assert datasets.load(asked).labels.tolist() == [0]


# Decoding ------------------------------------------------------------------------------------------


def test_pixels_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (4, 4)).astype(np.uint16)
    assert (decode(png(deep), "x") == deep).all()
    assert decode(png(deep), "x").dtype == np.uint16
    colour = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    assert (decode(png(colour), "x") == colour.transpose(2, 0, 1)).all()
    assert decode(png(gray(9)), "x").tolist() == gray(9)[None].tolist()
    opaque = np.dstack([colour, np.full((4, 5), 255, dtype=np.uint8)])
    assert (decode(png(opaque), "x") == colour.transpose(2, 0, 1)).all()
    file = io.BytesIO()
    Image.fromarray(colour).quantize(20).save(file, "PNG")
    assert (decode(file.getvalue(), "x") == colour.transpose(2, 0, 1)).all()
    bits = rng.integers(0, 2, (4, 4)).astype(bool)
    assert (decode(png(bits), "x") == 255 * bits).all()


def test_orientation_is_applied() -> None:
    tall = np.zeros((8, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(png(tall, exif=exif), "x").shape == (1, 4, 8)


def test_sixteen_bits_are_read_in_full(tmp_path: Path) -> None:
    deep = np.array([[0, 1], [32768, 65535]], dtype=np.uint16)
    write_folder(tmp_path, {"test/a/1.png": png(deep), "train/b/1.png": png(deep)})
    images = datasets.load(spec("image-folder", path=str(tmp_path))).images
    assert images.flatten().tolist() == [np.float32(value / 65535) for value in (0, 1, 32768, 65535)]


def test_float_images_are_taken_as_they_are(tmp_path: Path) -> None:
    values = np.array([[0, 0.1], [0.75, 1]], dtype=np.float32)
    write_folder(tmp_path, {"test/a/1.tif": png(values, format="TIFF")})
    assert (
        datasets.load(spec("image-folder", path=str(tmp_path))).images.flatten().tolist()
        == values.flatten().tolist()
    )
    for wrong, said in ((1.25, "1.25"), (np.nan, "nan")):
        values[1, 1] = wrong
        write_folder(tmp_path, {"test/a/1.tif": png(values, format="TIFF")})
        assert folder_trouble(tmp_path) == (
            f"image-folder test: image 0 (test/a/1.tif): expected values in [0, 1], found {said}"
        )


def header(width: int, height: int) -> bytes:
    """Return a PNG that says how large it is, and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    described = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", described)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "size", [(11_000, 11_000), (5793, 5793), (1 << 26, 1), (40_000, 40_000), (65_535, 65_535)]
)
def test_images_that_are_too_large_are_refused_by_their_header(
    size: tuple[int, int], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    write_folder(tmp_path / "set", {"test/a/1.png": header(*size)})
    write_parquet(tmp_path / "test.parquet", [header(*size)], [0])
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for said in (folder_trouble(tmp_path / "set"), parquet_trouble(tmp_path)):
        assert "the image is too large: " in said
        assert "at most 33,554,432 pixels" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 200_000
    assert not recwarn.list
    assert "the image cannot be read" in trouble_of(header(5792, 5792))


def trouble_of(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        decode(content, "a.png")
    return str(caught.value)


def test_colour_spaces_become_rgb_and_pages_are_refused() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(colour)
    for mode, form in (("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF")):
        file = io.BytesIO()
        image.convert(mode).save(file, form)
        expected = np.asarray(image.convert(mode).convert("RGB")).transpose(2, 0, 1)
        assert (decode(file.getvalue(), "x") == expected).all()
    for form in ("TIFF", "GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        image.save(file, form, save_all=True, append_images=[Image.fromarray(255 - colour)])
        assert trouble_of(file.getvalue()) == "a.png: holds several images; expected one"


@settings(max_examples=150, deadline=5000)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]), st.data())
def test_any_damaged_image_is_read_or_refused(form: str, draw: st.DataObject) -> None:
    content = bytearray(png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), format=form))
    for place in draw.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = draw.draw(st.integers(0, 255))
    try:
        found = decode(bytes(content[: draw.draw(st.integers(0, len(content)))]), "a.png")
    except InputError as error:
        found = str(error)
    assert isinstance(found, np.ndarray) or found.startswith("a.png: ")


def test_images_that_cannot_be_used_are_refused_by_name() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = png(noise, format="JPEG")
    animated = io.BytesIO()
    frames = [Image.fromarray(gray(value)) for value in (0, 200)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    wide = np.full((2, 2), 70_000, dtype=np.int32)
    broken = bytearray(png(noise))
    broken[100:200] = bytes(100)
    for content, said in (
        (whole[: len(whole) // 2], "a.png: the image cannot be read: "),
        (bytes(broken), "a.png: the image cannot be read: "),
        (b"", "a.png: not an image that Pillow knows"),
        (b"<html>", "a.png: not an image that Pillow knows"),
        (animated.getvalue(), "a.png: holds several images; expected one"),
        (png(clear), "a.png: has transparent pixels"),
        (png(wide, format="TIFF"), "a.png: pixels of Pillow's mode 'I' have no agreed range"),
    ):
        with pytest.raises(InputError) as caught:
            decode(content, "a.png")
        assert str(caught.value).startswith(said)
