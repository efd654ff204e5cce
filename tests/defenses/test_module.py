"""The user's own network as a defense: built, filled and normalised, and every way that can go wrong."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import InputError
from bench.protocols import Shape, Split
from bench.registry import DEFENSES, bind
from bench.testing import check_defense

SHAPE = Shape(3, 4, 4, 5)

MODELS = '''
"""Networks of a user's."""

import torch
from torch import nn
from .layers import Scale


class Small(nn.Module):
    def __init__(self, width, classes, bias):
        super().__init__()
        self.scale = Scale()
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, width, bias=bias), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(self.norm(self.scale(x))))


def build(width: int = 6, classes: int = 5, bias: bool = True):
    return Small(width, classes, bias)


def pair():
    class Pair(Small):
        def forward(self, x):
            return super().forward(x), x

    return Pair(6, 5, True)


def spoken():
    class Spoken(Small):
        def get_extra_state(self):
            return "words"

    return Spoken(6, 5, True)


def number():
    return 3


network = build()
constant = 4
'''

LAYERS = """
from torch import nn


class Scale(nn.Module):
    def forward(self, x):
        return 2 * x
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "suite" / "mylab"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "models.py").write_text(MODELS)
    (folder / "layers.py").write_text(LAYERS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "suite")])
    yield folder
    for name in [each for each in sys.modules if each.partition(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.fixture
def network(package: Path) -> nn.Module:
    """Another draw of the network, as if it were trained."""
    torch.manual_seed(1)
    trained = make().network
    trained.norm.running_mean.uniform_()
    return trained


def make(shape: Shape = SHAPE, **params: Any) -> Any:
    """Build the defense as the harness does, from parameters as a suite writes them."""
    entry = DEFENSES["module"]
    return entry.make(shape, **bind(entry, {"build": "mylab.models:build", **params}))


def fit(model: Any, device: str = "cpu", note: Callable[[str], None] = lambda _: None) -> Any:
    images = torch.rand(6, *model.shape[:3])
    split = Split(images, torch.zeros(6, dtype=torch.int64), torch.arange(6), "digest")
    model.fit(split, SimpleNamespace(device=torch.device(device), note=note))
    return model


def plan(shape: Shape = SHAPE, **params: Any) -> None:
    """Check as the plan does: every parameter filled in."""
    entry = DEFENSES["module"]
    assert entry.check_params is not None
    entry.check_params(bind(entry, {"build": "mylab.models:build", **params}), shape)


def trouble(call: Callable[..., Any], *args: Any, **params: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **params)
    return str(caught.value)


def same(model: Any, network: nn.Module) -> bool:
    return all(
        torch.equal(each, network.state_dict()[name]) for name, each in model.network.state_dict().items()
    )


# What it answers ---------------------------------------------------------------------------------


def test_answers_are_the_network_s_on_normalised_images(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    mean, std = [0.1, 0.2, 0.3], ["1/2", 0.25, 0.125]
    params = {"weights": str(tmp_path / "model.safetensors"), "mean": mean, "std": std}
    plan(**params)
    model = fit(make(**params)).eval()
    x = torch.rand(7, 3, 4, 4)
    shown = torch.stack([(x[:, c] - mean[c]) / (0.5, 0.25, 0.125)[c] for c in range(3)], dim=1)
    expected = network.eval()(shown)
    assert torch.allclose(model.logits().logits(x), expected, atol=1e-6)
    decision = model.decide(x, "label")
    assert torch.equal(decision.label, expected.argmax(1))
    assert not decision.rejected.any()


def test_one_number_normalises_every_channel(package: Path) -> None:
    model = make(mean=0.25, std=0.5).eval()
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(model(x), model.network((x - 0.25) / 0.5), atol=1e-6)


def test_it_keeps_what_a_defense_promises(package: Path) -> None:
    check_defense("module", SHAPE, build="mylab.models:build", mean=0.5, std=[0.5, 0.5, 0.25])


def test_its_state_is_the_network_s_alone(network: nn.Module) -> None:
    assert set(make().state_dict()) == {f"network.{name}" for name in network.state_dict()}


def test_arguments_reach_the_function(package: Path) -> None:
    assert make(arguments={"width": 9, "bias": False}).network.body[1].weight.shape == (9, 48)


def test_views_have_the_names_that_tables_use() -> None:
    entry = DEFENSES["module"]
    assert list(entry.views) == ["logits"]
    assert entry.readouts == ("label",)
    for name in ("logits", "first", "e2e_last", "e2e_label", "bpda"):
        found = entry.view(name)
        assert found is not None
        assert found.exact_for == {"label"}


def test_weights_and_code_enter_the_key_by_content() -> None:
    assert DEFENSES["module"].parameters("content") == ["weights"]
    assert DEFENSES["module"].parameters("code") == ["build"]


def test_without_weights_it_is_as_built(package: Path) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# Weights that fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_plain_tensors_are_read(
    key: str | None, legacy: bool, network: nn.Module, tmp_path: Path
) -> None:
    state = dict(network.state_dict())
    content = {key: state, "epoch": 3, "best": 0.5} if key else state
    file = tmp_path / "model.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    plan(weights=str(file))
    assert same(fit(make(weights=str(file))), network)


def test_prefix_is_taken_off(network: nn.Module, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    save_file({**state, "ema": torch.zeros(1)}, tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    assert same(fit(make(weights=file, prefix="module.")), network)
    said = trouble(fit, make(weights=file, prefix="net."))
    assert said.startswith(f"prefix: no name in {file} begins with 'net.'; there are ")
    assert said.endswith(" and 6 more")
    save_file(state, file)
    assert trouble(fit, make(weights=file)).endswith("; with prefix: 'module.' it fits")


def test_safetensors_whose_length_looks_like_a_pickle(package: Path, tmp_path: Path) -> None:
    from defenses.nets import weights

    file = tmp_path / "model.safetensors"
    for length in range(1, 120):
        save_file({"x" * length: torch.zeros(1)}, file)
        if file.read_bytes()[0] == 0x80:
            break
    assert file.read_bytes()[0] == 0x80
    assert weights.check(file) == "safetensors"


# Weights that do not -------------------------------------------------------------------------------


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["pickle", "archive", "legacy"])
def test_pickles_are_refused_before_anything_runs(how: str, package: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "model.pt"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"weight": Evil(mark)}))
    else:
        torch.save({"weight": Evil(mark)}, file, _use_new_zipfile_serialization=how == "archive")
    said = trouble(plan, weights=str(file))
    assert said.startswith(f"weights: {file} is a pickle")
    assert "which may run any code when it is read" in said
    assert "safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')" in said
    assert trouble(fit, make(weights=str(file))) == said
    assert not mark.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert mark.exists()


def test_whole_networks_are_refused_as_pickles(network: nn.Module, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    said = trouble(plan, weights=str(tmp_path / "model.pt"))
    assert "is a pickle of more than tensors (torch.nn.modules.linear.Linear)" in said


def test_files_that_are_no_weights_are_refused(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert trouble(plan, weights=str(file)) == f"weights: no such file: {file}"
    save_file(network.state_dict(), file)
    assert trouble(plan, weights=str(tmp_path / "model.safetensor")).endswith(
        "did you mean 'model.safetensors'?"
    )
    whole = file.read_bytes()
    for content, said in (
        (whole[:-4], f"is damaged: expected {len(whole)} bytes, found {len(whole) - 4}"),
        (whole + b"more", f"is damaged: expected {len(whole)} bytes, found {len(whole) + 4}"),
        (whole[:100], "is damaged: the header of safetensors is cut or altered"),
        (b"<!DOCTYPE html>", "is neither safetensors nor a checkpoint of torch.save; it begins with b'<!DOC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"", "is neither safetensors nor a checkpoint"),
    ):
        file.write_bytes(content)
        assert said in trouble(plan, weights=str(file))
    torch.save(network.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-200])
    assert "is no whole checkpoint of torch.save: " in trouble(plan, weights=str(file))
    assert "cannot be read: Is a directory" in trouble(plan, weights=str(tmp_path))


def test_checkpoints_without_a_state_dict_are_refused(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"epoch": 3, "loss": 0.5}, file)
    assert trouble(fit, make(weights=str(file))) == (
        f"weights: {file}: expected a state dict, or one under a key such as state_dict or "
        "model_state_dict or model, found the keys epoch, loss"
    )
    torch.save([torch.zeros(1)], file)
    assert trouble(fit, make(weights=str(file))).endswith("found a list")


def test_names_and_shapes_that_do_not_fit_are_named(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    state = dict(network.state_dict())
    save_file(state, file)
    assert trouble(fit, make(weights=str(file), arguments={"width": 7})) == (
        f"weights: {file}: body.1.weight has the shape (6, 48), in the network it has (7, 48)"
    )
    state["tail.weight"] = state.pop("head.weight")
    save_file(state, file)
    assert trouble(fit, make(weights=str(file))) == (
        f"weights: {file} does not fit the network: missing head.weight; unexpected tail.weight"
    )
    save_file({"a.weight": torch.zeros(1)}, file)
    said = trouble(fit, make(weights=str(file)))
    assert "missing norm.weight, norm.bias, norm.running_mean, norm.running_var and 4 more" in said


# Which weights -------------------------------------------------------------------------------------


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that fit as well, and are others."""
    return {name: value + 1 for name, value in state.items()}


TWO = {
    "model_state_dict, ema_model_state_dict": lambda a, b: {"model_state_dict": a, "ema_model_state_dict": b},
    "state_dict, state_dict_ema": lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 3},
    "model, ema.shadow": lambda a, b: {"model": a, "ema": {"decay": 0.9, "shadow": b}},
    "params, params_ema": lambda a, b: {"params": a, "params_ema": {f"module.{k}": v for k, v in b.items()}},
    "one at the top, ema": lambda a, b: {**a, "ema": b, "epoch": 3},
}


@pytest.mark.parametrize("named", TWO)
def test_of_two_state_dicts_none_is_chosen_in_silence(named: str, network: nn.Module, tmp_path: Path) -> None:
    state, file = dict(network.state_dict()), tmp_path / "two.pt"
    torch.save(TWO[named](other(state), state), file)
    last = named.split(", ")[1]
    said = trouble(fit, make(weights=str(file)))
    assert f"{file} holds several state dicts: {named}; say which: key: " in said
    prefix = "module." if last == "params_ema" else ""
    assert same(fit(make(weights=str(file), key=last, prefix=prefix)), network)
    said = trouble(fit, make(weights=str(file), key=last[:-1]))
    assert said == f"key: {file} holds no state dict under {last[:-1]!r}; did you mean {last!r}?"
    # The same twice is no choice, and neither is what cannot fit.
    torch.save(TWO[named](state, state), file)
    if not prefix:
        assert same(fit(make(weights=str(file))), network)
    torch.save(TWO[named](state, {"head.weight": torch.zeros(2)}), file)
    assert same(fit(make(weights=str(file))), network)


def test_the_only_state_dict_is_found_under_any_key(network: nn.Module, tmp_path: Path) -> None:
    file, state = tmp_path / "model.pt", dict(network.state_dict())
    optimiser = torch.optim.Adam(network.parameters())
    sum(each.sum() for each in network.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for content in (
        {"net": state, "acc": torch.tensor(0.9), "epoch": 3, "optimizer": optimiser.state_dict()},
        {"runs": {"best": {"weights": state}}, "scaler": {"scale": torch.ones(1)}},
    ):
        torch.save(content, file)
        assert same(fit(make(weights=str(file))), network)
    assert trouble(plan, key="net") == "key: 'net' is for weights:, and there are none"
    save_file(state, file)
    assert trouble(fit, make(weights=str(file), key="net")).endswith("there is one state dict, at the top")


def test_of_two_prefixes_both_are_named(network: nn.Module, tmp_path: Path) -> None:
    state, file = network.state_dict(), tmp_path / "model.safetensors"
    both = {f"module.{name}": value for name, value in state.items()}
    save_file({**both, **{f"ema.{name}": value for name, value in other(dict(state)).items()}}, file)
    said = trouble(fit, make(weights=str(file)))
    assert said.endswith("; with prefix: 'ema.' or 'module.' it fits")
    assert same(fit(make(weights=str(file), prefix="module.")), network)


FOREIGN = ["int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FOREIGN)
def test_weights_of_another_kind_of_number_are_refused(
    dtype: str, network: nn.Module, tmp_path: Path
) -> None:
    file, state = tmp_path / "model.pt", dict(network.state_dict())
    state["head.weight"] = state["head.weight"].to(getattr(torch, dtype))
    torch.save(state, file)
    assert trouble(fit, make(weights=str(file))) == (
        f"weights: {file}: head.weight is {dtype}, expected float32 (or float16 or bfloat16 or float32 or "
        "float64)"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_converted_and_said(dtype: str, network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    # The count of batches becomes a float with all the others.
    state = {name: value.to(getattr(torch, dtype)) for name, value in network.state_dict().items()}
    torch.save(state, file)
    notes: list[str] = []
    model = fit(make(weights=str(file)), note=notes.append)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    assert notes[0].startswith(f"weights: model.pt: converted from {dtype} to float32: norm.weight, ")
    assert notes[1:] == [f"weights: model.pt: converted from {dtype} to int64: norm.num_batches_tracked"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_numbers_that_a_conversion_would_change_are_refused(network: nn.Module, tmp_path: Path) -> None:
    file, state = tmp_path / "model.pt", dict(network.state_dict())
    for name, value, said in (
        ("norm.num_batches_tracked", torch.tensor(2.5), "is float32, expected int64, which cannot hold its"),
        ("norm.num_batches_tracked", torch.tensor(3, dtype=torch.int32), ""),
        ("norm.bias", torch.full((3,), 1e300, dtype=torch.float64), "norm.bias is not finite as float32"),
        ("norm.bias", torch.tensor([0.0, torch.nan, 0.0]), "norm.bias is not finite"),
        ("norm.bias", torch.ones(3).to_sparse(), "norm.bias is float32 and sparse"),
    ):
        torch.save({**state, name: value}, file)
        if said:
            assert said in trouble(fit, make(weights=str(file)))
        else:
            assert fit(make(weights=str(file))).network.norm.num_batches_tracked == 3


# Networks that do not fit the data -----------------------------------------------------------------


def test_outputs_that_do_not_fit_the_data_are_refused(package: Path) -> None:
    build = "mylab.models:build"
    assert trouble(fit, make(Shape(3, 4, 4, 10))) == (
        f"{build}: the data has 10 classes: expected logits of shape (2, 10) "
        "for 2 images of shape (3, 4, 4), found (2, 5)"
    )
    assert trouble(fit, make(Shape(1, 4, 4, 5))).startswith(
        f"{build}: the network does not take images of shape (1, 4, 4): "
    )
    assert "found a tuple; wrap it in a module that returns the tensor" in trouble(
        fit, make(build="mylab.models:pair")
    )
    assert "state _extra_state is a str; only tensors can be stored" in trouble(
        fit, make(build="mylab.models:spoken")
    )


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mean": [0.5, 0.5]}, "mean: expected a number, or one for each of 3 channels, found [0.5, 0.5]"),
        (
            {"std": [1, 1, 1, 1]},
            "std: expected a number, or one for each of 3 channels, found [1.0, 1.0, 1.0, 1.0]",
        ),
        ({"mean": 123.7}, "mean: expected values in [0, 1], the units of the images, found 123.7"),
        ({"mean": "nan"}, None),
        ({"std": [0.5, 0, 0.5]}, "std: expected values above 0, found 0"),
        ({"std": -1}, "std: expected values above 0, found -1"),
        ({"prefix": "module."}, "prefix: 'module.' is for weights:, and there are none"),
    ],
)
def test_settings_that_cannot_be_are_refused(params: dict[str, Any], said: str | None, package: Path) -> None:
    if said is None:
        with pytest.raises(ValueError, match="expected a number"):
            plan(**params)
    else:
        assert trouble(plan, **params) == said


# Code that is not there ------------------------------------------------------------------------------


def test_planning_runs_none_of_the_user_s_code(package: Path) -> None:
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    plan()
    assert trouble(plan, build="mylab.models:biuld") == (
        f"build: {package / 'models.py'} defines no 'biuld'; did you mean 'build'?"
    )
    assert "mylab" not in sys.modules


@pytest.mark.parametrize(
    "line",
    [
        "from .layers import *",
        "def __getattr__(name): ...",
        "from .layers import Scale as missing",
        "if True:\n    missing = 1",
        "try:\n    import missing\nexcept ImportError:\n    def missing(): ...",
        "with open(__file__) as missing: pass",
        "missing, other = 1, 2",
        "class missing: ...",
    ],
)
def test_names_are_found_however_they_are_bound(line: str, package: Path) -> None:
    (package / "models.py").write_text(line)
    plan(build="mylab.models:missing")


def test_names_inside_functions_are_not_those_of_the_module(package: Path) -> None:
    (package / "models.py").write_text("def outer():\n    def missing(): ...\n    other = 1\n")
    for name in ("missing", "other"):
        assert f"defines no {name!r}" in trouble(plan, build=f"mylab.models:{name}")


def test_packages_without_an_init_file_are_looked_through(package: Path) -> None:
    (package / "__init__.py").unlink()
    (package / "deeper").mkdir()
    (package / "deeper" / "nets.py").write_text("def make(): ...")
    plan(build="mylab.deeper.nets:make")
    assert "defines no 'mak'; did you mean 'make'?" in trouble(plan, build="mylab.deeper.nets:mak")


def test_syntax_errors_are_named_with_their_line(package: Path) -> None:
    (package / "models.py").write_text("x = 1\ndef build(:\n")
    assert trouble(plan) == f"build: {package / 'models.py'}:2: invalid syntax"


def test_what_is_not_found_is_said(package: Path) -> None:
    assert trouble(make, build="mylab.model:build") == (
        "build: there is no module 'mylab.model' beside the suite or installed; did you mean 'models'?"
    )
    assert trouble(make, build="mylba.models:build") == (
        "build: there is no module 'mylba' beside the suite or installed; did you mean 'mylab'?"
    )
    assert trouble(make, build="mylab.models:biuld") == (
        f"build: {package / 'models.py'} defines no 'biuld'; did you mean 'build'?"
    )


def test_what_builds_no_network_is_refused(package: Path) -> None:
    assert trouble(make, build="mylab.models:number") == (
        "build: expected mylab.models:number to return an nn.Module, found a int"
    )
    assert trouble(make, build="mylab.models:constant") == (
        "build: expected a function that returns a network, found mylab.models:constant, a int"
    )
    assert trouble(make, build="mylab.models:network").endswith("found mylab.models:network, a Small")
    assert trouble(make, arguments={"widht": 3}) == (
        "build: mylab.models:build does not take these arguments: got an unexpected keyword argument 'widht'"
    )


def test_errors_of_the_user_s_own_code_stay_theirs(package: Path) -> None:
    (package / "models.py").write_text("import a_library_that_is_not_there\ndef build(): ...")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        make()


def test_a_class_may_build(package: Path) -> None:
    model = make(build="mylab.models:Small", arguments={"width": 4, "classes": 5, "bias": True})
    assert isinstance(fit(model)(torch.rand(2, 3, 4, 4)), Tensor)


@pytest.mark.parametrize(
    ("content", "under"),
    [
        (
            lambda raw, ema: {"model": raw, "ema": {"decay": 0.9, "shadow_params": list(ema.values())}},
            "model",
        ),
        (
            lambda raw, ema: {
                "state_dict": raw,
                "ema": {"shadow": {name.replace(".", "_"): each for name, each in ema.items()}},
            },
            "state_dict",
        ),
        (lambda raw, ema: {"net": raw, "a": {"b": {"c": {"d": {"e": {"f": {"g": ema}}}}}}}, "net"),
    ],
    ids=["a list", "names without dots", "deep"],
)
def test_an_average_of_the_weights_under_other_names_is_no_silent_choice(
    tmp_path: Path, content: Any, under: str
) -> None:
    from torch import nn

    from defenses.nets import weights as files

    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    raw = {name: each.clone() for name, each in network.state_dict().items()}
    ema = {name: each * 2 for name, each in raw.items()}
    file = tmp_path / "two.pt"
    torch.save(content(raw, ema), file)
    with pytest.raises(InputError, match=under):
        files.fill(network, file)
    files.fill(network, file, key=under)
    assert torch.equal(network[0].weight, raw["0.weight"])
    # What an optimiser keeps has the same shapes, and is no network.
    moments = {"exp_avg": list(raw.values()), "momentum_buffer": list(raw.values())}
    torch.save({under: raw, "optimizer": {"state": moments}}, file)
    files.fill(network, file)
