"""Files that defenses read may be named by text or by a path, from Python code and from a task file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from bench import InputError, Shape, Split
from bench.registry import DEFENSES, bind, discover
from bench.runner.training import Trainer
from bench.suite import planner, resolve
from defenses.abs import Abs
from defenses.nets import weights
from defenses.nets.abs.autoencoders import Autoencoders
from defenses.nets.abs.released import decoder_state
from defenses.sdim import Sdim

discover()

SMALL = Shape(1, 8, 8, 10)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def _module(folder: Path) -> tuple[Shape, dict[str, Any], dict[str, Any]]:
    save_file(linear().state_dict(), folder / "a.safetensors")
    build = f"{__name__}:linear"
    return SMALL, {"build": build}, {"weights": folder / "a.safetensors"}


def _sdim(folder: Path) -> tuple[Shape, dict[str, Any], dict[str, Any]]:
    small: dict[str, Any] = {"width": 0.125, "features": 8, "epochs": 0}
    state = Sdim(Shape(1, 32, 32, 10), **small).state_dict()
    save_file({**state, "calibrated": torch.tensor(True)}, folder / "b.safetensors")
    small["thresholds"] = "weights"
    return Shape(1, 32, 32, 10), small, {"weights": folder / "b.safetensors"}


def _abs(folder: Path) -> tuple[Shape, dict[str, Any], dict[str, Any]]:
    files = []
    stack = Autoencoders(Shape(1, 28, 28, 1), "official", latent=8, width=1, encode=False).decoder
    for number in range(10):
        torch.manual_seed(number)
        named = {
            name.replace("convs.", "Decoder.conv_").replace("norms.", "Decoder.bn_"): torch.rand(value.shape)
            for name, value in stack.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        files.append(folder / f"{number}.safetensors")
        save_file(named, files[-1])
    return Shape(1, 28, 28, 10), {"grid": 20, "steps": 2}, {"decoders": files}


Given = Callable[[Path], tuple[Shape, dict[str, Any], dict[str, Any]]]

CASES: Mapping[tuple[str, str], Given] = {
    ("abs", "decoders"): _abs,
    ("module", "weights"): _module,
    ("sdim", "weights"): _sdim,
}
"""For each parameter that names files: the data's shape, what else is given, and the files."""

SPELLED: Mapping[str, Callable[[Path], Any]] = {"text": str, "path": Path}


def spelled(value: Any, how: str) -> Any:
    return [SPELLED[how](each) for each in value] if isinstance(value, list) else SPELLED[how](value)


def test_every_parameter_that_names_files_is_tried() -> None:
    named = {(name, each) for name in DEFENSES for each in DEFENSES[name].parameters("content")}
    assert {each for each in named if "/" not in each[0]} == set(CASES)


def fitted(model: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """Return the state of a defense once it was fitted on an image of each class."""
    x = torch.rand(shape.classes, *shape[:3], generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(shape.classes), torch.arange(shape.classes), "split")
    model.fit(split, Trainer(split, "key", torch.device("cpu")))
    return dict(model.state_dict())


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_files_may_be_text_or_paths_wherever_they_are_given(
    name: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, params, files = CASES[name, parameter](tmp_path)
    entry, states = DEFENSES[name], []
    for how in SPELLED:
        given = {parameter: spelled(files[parameter], how)}
        # The class itself, the class by its schema, and what a plan makes of them.
        states.append(fitted(entry.make(shape, **params, **given), shape))
        by_schema = bind(entry, {**params, **given})
        states.append(fitted(entry.make(shape, **by_schema), shape))
        assert entry.check_params is not None
        entry.check_params({**by_schema, **given}, shape)
        resolved = resolve.resolve(entry, {**params, **given}, tmp_path)
        states.append(fitted(entry.make(shape, **bind(entry, resolved.params)), shape))
    # A task file names them from where it lies, wherever the run begins.
    monkeypatch.chdir("/")
    names = [each.name for each in files[parameter]] if parameter == "decoders" else files[parameter].name
    data = {"name": "digits", "resize": shape.height}
    document = {
        "data": {"digits": data},
        "defenses": {"net": {"use": name, **params, parameter: names}},
        "attacks": {"clean": {"use": "none"}},
        "tasks": [{"data": "digits", "threat": {"norm": "linf", "radius": 0.1}, "limit": 4}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    suite = resolve.load(tmp_path / "suite.yaml")
    planner.make(suite)
    states.append(fitted(entry.make(shape, **bind(entry, suite.defenses["net"].params)), shape))
    for state in states:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][each]) for each, value in state.items())


def test_what_reads_files_takes_text_too(tmp_path: Path) -> None:
    _, _, files = _module(tmp_path)
    file = files["weights"]
    assert weights.check(str(file)) == weights.check(file) == "safetensors"
    assert weights.read(str(file)).keys() == weights.read(file).keys()
    network = linear()
    weights.fill(network, str(file))
    assert torch.equal(network.state_dict()["1.weight"], weights.read(file)["1.weight"])
    with pytest.raises(InputError, match=r"no such file: .*b\.safetensors; did you mean 'a\.safetensors'"):
        weights.read(str(tmp_path / "b.safetensors"))
    _, _, given = _abs(tmp_path)
    one = given["decoders"][0]
    assert decoder_state(str(one), 1).keys() == decoder_state(one, 1).keys()


def test_a_single_decoder_is_one_file_and_no_row_of_letters(tmp_path: Path) -> None:
    for one in ("abcdefghij", Path("abcdefghij")):
        with pytest.raises(InputError, match="a file for each of 10 classes, in their order, found 1"):
            Abs(Shape(1, 28, 28, 10), decoders=one)  # type: ignore[arg-type]
