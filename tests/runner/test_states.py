"""What a training keeps after each epoch: whatever has a state, whole or said, and to the bit."""

import copy
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

from bench.errors import DamagedError, InputError
from bench.protocols import Shape, Split
from bench.runner import states
from bench.runner.training import Trainer
from bench.testing import check_defense

CPU = torch.device("cpu")
SPLIT = Split(
    torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 3,
    torch.arange(12),
    "test",
)

Learner = Callable[[nn.Module], tuple[list[Any], Callable[[Tensor, Tensor], Tensor], Callable[[], None]]]
"""Gives what to keep beside a network, a step, and what ends an epoch."""


class Killed(BaseException):
    """Ends a training as a kill would."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))


def trainer(keep: Path | None, **more: Any) -> Trainer:
    return Trainer(SPLIT, more.pop("key", "key"), CPU, keep=keep, **more)


def train(
    learner: Learner,
    keep: Path | None,
    *,
    epochs: int = 4,
    until: int | None = None,
    phases: int = 1,
    **more: Any,
) -> tuple[dict[str, Tensor], Trainer]:
    """Train a network; `until` so many of its epochs are kept. Returns the weights, and the trainer."""
    net = network()
    fitting, count = trainer(keep, **more), 0
    for phase in range(phases):
        kept, step, ended = learner(net)
        for epoch in fitting.epochs(epochs, net, *kept):
            if count == until:
                raise Killed
            count += 1
            net.train()
            for x, y, _ in epoch.batches(5):
                epoch.report(step(x + 0.1 * torch.randn(()) + 0.1 * random.random() + phase, y))
            ended()
        if count == until:
            raise Killed
    return {name: value.clone() for name, value in net.state_dict().items()}, fitting


def stepping(optimiser: Any, net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            return loss

        loss: Tensor = optimiser.step(closure)
        return loss.detach()

    return step


def with_optimiser(make: Callable[[Any], Any]) -> Learner:
    def learner(net: nn.Module) -> Any:
        optimiser = make(net.parameters())
        return [optimiser], stepping(optimiser, net), lambda: None

    return learner


def with_schedule(make: Callable[[Any], Any]) -> Learner:
    def learner(net: nn.Module) -> Any:
        optimiser = SGD(net.parameters(), lr=0.3, momentum=0.9)
        schedule = make(optimiser)
        measured = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        return (
            [optimiser, schedule],
            stepping(optimiser, net),
            lambda: schedule.step(*([1.0] if measured else [])),
        )

    return learner


def averaging(net: nn.Module) -> Any:
    """Train with a mean of weights, which is what the network becomes."""
    optimiser, mean = Adam(net.parameters(), lr=0.05), AveragedModel(net, use_buffers=True)

    def ended() -> None:
        mean.update_parameters(net)
        with torch.no_grad():
            for own, other in zip(net.parameters(), mean.module.parameters(), strict=True):
                own.lerp_(other, 0.5)

    return [optimiser, mean], stepping(optimiser, net), ended


def scaling(net: nn.Module) -> Any:
    optimiser, scaler = SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", growth_interval=2)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        # The scale decides how much is learned, so that one that was forgotten shows.
        for group in optimiser.param_groups:
            group["lr"] = 0.1 / (1 + math.log2(scaler.get_scale()) % 7)
        scaler.step(optimiser)
        scaler.update()
        return loss.detach()

    return [optimiser, scaler], step, lambda: None


class Memory:
    """Whatever a person may keep: nested, of every kind of value."""

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {
            "best": math.inf,
            "worst": -math.inf,
            "none": None,
            3: [True, (1, "é\ud800")],
        }
        self.draws = np.random.RandomState(0)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held, "draws": self.draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]
        self.draws.set_state(state["draws"])


def remembering(net: nn.Module) -> Any:
    optimiser, memory = SGD(net.parameters(), lr=np.float64(0.1)), Memory()
    step = stepping(optimiser, net)

    def remembered(x: Tensor, y: Tensor) -> Tensor:
        loss = step(x * float(memory.draws.uniform(0.5, 1.5)), y)
        memory.held["best"] = min(memory.held["best"], np.float32(loss))
        memory.held.setdefault("rows", []).append({"loss": loss, "seen": Counter(y.tolist())})
        optimiser.param_groups[0]["lr"] = 0.1 * float(memory.held["best"])
        return loss

    return [optimiser, memory], remembered, lambda: None


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step_size": lambda each: lr_scheduler.StepLR(each, 2, 0.1),
    "milestones": lambda each: lr_scheduler.MultiStepLR(each, [1, 3], 0.1),
    "lambda": lambda each: lr_scheduler.LambdaLR(each, lambda epoch: 0.5**epoch),
    "multiplied": lambda each: lr_scheduler.MultiplicativeLR(each, lambda _: 0.7),
    "cosine": lambda each: lr_scheduler.CosineAnnealingLR(each, 4),
    "restarts": lambda each: lr_scheduler.CosineAnnealingWarmRestarts(each, 2),
    "one cycle": lambda each: lr_scheduler.OneCycleLR(each, 0.5, total_steps=6),
    "cyclic": lambda each: lr_scheduler.CyclicLR(each, 0.1, 0.5, step_size_up=2),
    "plateau": lambda each: lr_scheduler.ReduceLROnPlateau(each, patience=0),
    "polynomial": lambda each: lr_scheduler.PolynomialLR(each, 5),
    "constant": lambda each: lr_scheduler.ConstantLR(each, 0.3, 2),
    "sequential": lambda each: lr_scheduler.SequentialLR(
        each, [lr_scheduler.LinearLR(each, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(each, 0.5)], [2]
    ),
    "chained": lambda each: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(each, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(each, 0.5)]
    ),
    "swa": lambda each: SWALR(each, 0.05, anneal_epochs=3),
}
OPTIMISERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda each: SGD(each, lr=0.1, momentum=0.9, nesterov=True),
    "tensor rate": lambda each: Adam(each, lr=torch.tensor(0.05)),
    "amsgrad": lambda each: Adam(each, lr=0.05, amsgrad=True, foreach=False),
    "nadam": lambda each: torch.optim.NAdam(each, lr=0.05),
    "adamw": lambda each: torch.optim.AdamW(each, lr=0.05),
    "rmsprop": lambda each: torch.optim.RMSprop(each, lr=0.05, momentum=0.5, centered=True),
    "rprop": lambda each: torch.optim.Rprop(each, lr=0.05),
    "asgd": lambda each: torch.optim.ASGD(each, lr=0.05),
    "lbfgs": lambda each: torch.optim.LBFGS(each, lr=0.1, max_iter=3, history_size=4),
    "lbfgs, searching": lambda each: torch.optim.LBFGS(each, line_search_fn="strong_wolfe", max_iter=4),
    "lbfgs, tensor rate": lambda each: torch.optim.LBFGS(each, lr=torch.tensor(0.1), max_iter=3),
    "tensor betas": lambda each: Adam(each, torch.tensor(0.05), (torch.tensor(0.9), torch.tensor(0.99))),
    "tensor rate of one value": lambda each: SGD(each, lr=torch.tensor([0.1]), momentum=0.9),
    "no momentum": lambda each: SGD(each, lr=0.1),
    "fused": lambda each: Adam(each, lr=0.05, fused=True),
    "adafactor": lambda each: torch.optim.Adafactor(each),
    "adagrad": lambda each: torch.optim.Adagrad(each, lr=0.05),
    "adamax": lambda each: torch.optim.Adamax(each, lr=0.05),
    "adadelta": lambda each: torch.optim.Adadelta(each),
    "radam": lambda each: torch.optim.RAdam(each, lr=0.05),
}
SPARSE: dict[str, Callable[[Any], Any]] = {
    "sparse adam": lambda each: torch.optim.SparseAdam(each, lr=0.05),
    "sparse momentum": lambda each: SGD(each, lr=0.1, momentum=0.9),
}
LEARNERS: dict[str, Learner] = {
    **{name: with_optimiser(make) for name, make in OPTIMISERS.items()},
    **{name: with_schedule(make) for name, make in SCHEDULES.items()},
    "mean of weights": averaging,
    "scaler": scaling,
    "memory": remembering,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_training_that_is_broken_off_after_any_epoch_ends_to_the_bit_as_one_that_is_not(
    name: str, tmp_path: Path
) -> None:
    whole, _ = train(LEARNERS[name], None)
    for until in (1, 3):
        with pytest.raises(Killed):
            train(LEARNERS[name], tmp_path / str(until), until=until)
        resumed, fitting = train(LEARNERS[name], tmp_path / str(until))
        assert fitting.resumed == until
        assert fitting.notes == []
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", SPARSE)
def test_optimisers_of_sparse_gradients_go_on_to_the_bit(name: str, tmp_path: Path) -> None:
    def ended(keep: Path | None, until: int | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Embedding(8, 3, sparse=True)
        optimiser = SPARSE[name](net.parameters())
        fitting = trainer(keep)
        for epoch in fitting.epochs(4, net, optimiser):
            if epoch.number == until:
                break
            for x, y, _ in epoch.batches(5):
                optimiser.zero_grad()
                cross_entropy(net((8 * x[:, 0, 0, 0] + torch.rand(len(x))).long() % 8), y).backward()
                optimiser.step()
        return {key: value.clone() for key, value in net.state_dict().items()}

    whole = ended(None)
    for until in (1, 3):
        ended(tmp_path / str(until), until)
        resumed = ended(tmp_path / str(until))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs", "sparse"])
def test_a_defense_that_is_trained_by_any_optimiser_is_what_it_declares(optimiser: str) -> None:
    """`check_defense` breaks the training off after every epoch, and compares what becomes of it."""
    check_defense("toy/optimised", Shape(1, 3, 3, 3), optimiser=optimiser)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_on_a_gpu_tensors_lie_where_they_lay(capturable: bool, tmp_path: Path) -> None:
    def ended(keep: Path | None, until: int | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(9, 3).cuda()
        optimiser = Adam(net.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=capturable)
        for epoch in Trainer(SPLIT, "key", torch.device("cuda"), keep=keep).epochs(4, net, optimiser):
            if epoch.number == until:
                break
            for x, y, _ in epoch.batches(5):
                optimiser.zero_grad()
                cross_entropy(net(x.flatten(1) + torch.randn(1, device="cuda")), y).backward()
                optimiser.step()
        (count, *_) = (state["step"] for state in optimiser.state.values())
        assert count.is_cuda is capturable
        return [*net.parameters()]

    whole = ended(None)
    ended(tmp_path, until=2)
    assert all(map(torch.equal, whole, ended(tmp_path)))


@pytest.mark.parametrize("name", ["cosine", "one cycle", "mean of weights", "scaler", "memory", "lbfgs"])
def test_what_is_not_given_is_missed(name: str, tmp_path: Path) -> None:
    """The tests above can fail: without its state, each of these ends elsewhere."""

    def forgetful(net: nn.Module) -> Any:
        kept, step, ended = LEARNERS[name](net)
        return kept[:-1], step, ended

    whole, _ = train(forgetful, None)
    with pytest.raises(Killed):
        train(forgetful, tmp_path, until=2)
    resumed, _ = train(forgetful, tmp_path)
    assert not all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_every_generator_is_seeded_by_epoch_and_after_the_last(tmp_path: Path) -> None:
    def drawn(keep: Path | None, until: int | None = None) -> list[tuple[float, ...]]:
        found, net = [], nn.Linear(1, 1)
        random.seed()
        np.random.seed()
        torch.seed()
        for epoch in trainer(keep).epochs(3, net):
            if epoch.number == until:
                break
            found.append((random.random(), np.random.random(), torch.rand(()).item()))
        return [*found, (random.random(), np.random.random(), torch.rand(()).item())]

    one = drawn(None)
    assert one == drawn(None)
    assert len({each for draws in one for each in draws}) == 12
    drawn(tmp_path, until=2)
    assert drawn(tmp_path) == one[2:]
    assert drawn(tmp_path) == one[3:]


@pytest.mark.parametrize("thing", [5, None, "adam", object(), lambda: None])
def test_what_has_no_state_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match="expected things with a state_dict and a load_state_dict"):
        next(trainer(None).epochs(1, nn.Linear(1, 1), thing))  # type: ignore[arg-type]


class Holding:
    """Has a state of a given value."""

    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, object]:
        return {"deep": [{"er": self.value}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["deep"][0]["er"]


def holding_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: None, "builtins.function"),
        (object(), "builtins.object"),
        (Path("x"), r"pathlib\.\w+"),
        (torch.zeros(2, device="meta"), r"torch\.Tensor"),
        (np.array(["a"]), r"numpy\.ndarray"),
        (np.array([object()]), r"numpy\.ndarray"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_after_the_first_epoch(
    value: object, named: str, tmp_path: Path
) -> None:
    fitting = trainer(tmp_path)
    epochs = fitting.epochs(3, nn.Linear(1, 1), Holding(value))
    assert next(epochs).number == 0
    with pytest.raises(InputError, match=rf"Holding1\.state_dict\(\)\['deep'\]\[0\]\['er'\], a {named}"):
        next(epochs)
    assert not list(tmp_path.iterdir())


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    epochs = trainer(tmp_path).epochs(3, nn.Linear(1, 1), Holding(holding_itself()))
    next(epochs)
    with pytest.raises(InputError, match="holds itself"):
        next(epochs)


def alike(one: Any, other: Any) -> bool:
    """Return whether two states are equal in values and kinds."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Tensor) and one.is_sparse:
        halves = ((one._indices(), other._indices()), (one._values(), other._values()))
        same = one.shape == other.shape and one.is_coalesced() == other.is_coalesced()
        return same and all(alike(*each) for each in halves)
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and bool(((one == other) | one.isnan()).all())
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(repr(one) == repr(other))


def test_values_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "numbers": [0, -1, 2**200, True, 1.5, -0.0, math.nan, math.inf, 5e-324, None],
        1: {2: {("a", 3): "text\n\x00\ud800"}},
        "kinds": (OrderedDict(b=1, a=2), Counter("abca"), b"\x00\xff", [], (), {}, [[]], ({},)),
        "numpy": [np.float32(0.1), np.int64(-3), np.bool_(True), np.arange(6.0).reshape(2, 3), np.array(1j)],
        "tensors": [
            torch.tensor(math.nan),
            torch.zeros(0, 3),
            torch.arange(6).view(2, 3).T,
            torch.tensor([True]),
            torch.tensor([1 + 2j, math.inf * 1j], dtype=torch.complex128),
            torch.tensor(1j, dtype=torch.complex128).conj(),
            torch.tensor([[0.0, 2.0], [0.0, 0.0]]).to_sparse(),
            torch.sparse_coo_tensor(
                torch.tensor([[1, 1]]), torch.tensor([0.1, 0.2]), (3,), check_invariants=True
            ),
        ],
        "dotted.name": torch.ones(1),
        "dotted": {"name": torch.zeros(1, dtype=torch.bfloat16)},
        "looks like one": {"tensor": ["x", "cpu"]},
    }
    file = tmp_path / "a.safetensors"
    assert states.write(file, tmp_path / "b.safetensors", {"done": 1}, {"one": state, "two": [1]})
    told, found = states.read(file, CPU)
    assert told["done"] == 1
    assert alike(found, {"one": state, "two": [1]})
    with safe_open(file, "pt") as opened:
        assert "one.dotted.name" in opened.keys()  # noqa: SIM118 - no mapping


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    for _ in trainer(tmp_path).epochs(1, net):
        pass
    other = copy.deepcopy(net)
    nn.init.zeros_(other[0].weight)
    assert not list(trainer(tmp_path).epochs(1, other))
    assert other[1].weight is other[0].weight
    assert torch.equal(other[0].weight, net[0].weight)


# --- damage --------------------------------------------------------------------------------------------

LEARNER = with_schedule(SCHEDULES["cosine"])


def halfway(folder: Path, until: int = 3) -> tuple[Path, Path]:
    """Break a training of four epochs off; return the files of its last epoch and of the one before."""
    with pytest.raises(Killed):
        train(LEARNER, folder, until=until)
    newest, before = folder / "epoch.safetensors", folder / "epoch.before.safetensors"
    assert sorted(folder.iterdir()) == sorted([newest, before])
    return newest, before


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a harm that writes a lawful file with other metadata, its digest left as it was."""
    import json

    def harm(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        plain = json.loads(metadata["plain"])
        content = {"plain": plain, "tensors": tensors, "metadata": metadata}
        change(content)
        save_file(content["tensors"], path, {**metadata, "plain": json.dumps(content["plain"])})

    return harm


def renamed(content: dict[str, Any]) -> None:
    tensors = content["tensors"]
    tensors["model.1.weighu"] = tensors.pop("model.1.weight")


def zeroed(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "foreign").write_text("mine")


def to_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


HARMS: dict[str, Callable[[Path], object]] = {
    "zeros": zeroed,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\x00"),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\x05"),
    "no number": lambda path: path.write_bytes(b"\xff" * 64),
    "text": lambda path: path.write_text("not ours"),
    "folder": to_folder,
    "broken link": to_broken_link,
    "renamed tensor": rewritten(renamed),
    "fewer states": rewritten(lambda each: each["plain"].update(states={})),
    "no states": rewritten(lambda each: each["plain"].pop("states")),
    "count": rewritten(lambda each: each["plain"].update(done=2)),
    "no count": rewritten(lambda each: each["plain"].pop("done")),
    "wrong types": rewritten(lambda each: each["plain"].update(done="3", code=[], states=7)),
    "a number": rewritten(lambda each: each.update(plain=3)),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_epoch_is_said_and_the_one_before_gone_on_from(harm: str, tmp_path: Path) -> None:
    whole, _ = train(LEARNER, None)
    newest, before = halfway(tmp_path)
    HARMS[harm](newest)
    said: list[Any] = []
    weights, fitting = train(LEARNER, tmp_path, progress=said.append)
    assert fitting.resumed == 2
    (note,) = fitting.notes
    assert note.startswith("epoch.safetensors ")
    assert note.endswith(": the training goes on from epoch 2")
    assert {"note": note} in said
    assert all(torch.equal(whole[key], weights[key]) for key in whole)
    # And of both, it starts anew.
    for path in (newest, before):
        HARMS[harm](path)
    weights, fitting = train(LEARNER, tmp_path)
    assert fitting.resumed == 0
    assert fitting.notes[0].endswith(": the training starts anew")
    assert all(torch.equal(whole[key], weights[key]) for key in whole)


def test_every_byte_of_an_epoch_is_covered(tmp_path: Path) -> None:
    newest, _ = halfway(tmp_path)
    whole = newest.read_bytes()
    states.read(newest, CPU)
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        newest.write_bytes(altered)
        with pytest.raises(DamagedError):
            states.read(newest, CPU)


def test_the_epoch_before_alone_is_gone_on_from(tmp_path: Path) -> None:
    whole, _ = train(LEARNER, None)
    newest, _ = halfway(tmp_path)
    newest.unlink()
    weights, fitting = train(LEARNER, tmp_path)
    assert fitting.resumed == 2
    assert all(torch.equal(whole[key], weights[key]) for key in whole)


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_lies_where_epochs_are_kept_is_taken_away(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.write_text("mine") if what == "file" else folder.symlink_to("nowhere")
    whole, _ = train(LEARNER, None)
    weights, _ = train(LEARNER, folder)
    assert all(torch.equal(whole[key], weights[key]) for key in whole)
    assert len(list(folder.iterdir())) == 2


def test_epochs_of_other_trainings_are_not_gone_on_from(tmp_path: Path) -> None:
    halfway(tmp_path)
    for more, reason in (
        ({"key": "other"}, "is of another training"),
        ({"code": {"module": "changed"}}, "is of code that changed since"),
    ):
        folder = tmp_path / reason
        halfway(folder)
        _, fitting = train(LEARNER, folder, **more)
        assert fitting.resumed == 0
        assert reason in fitting.notes[0]
    _, fitting = train(with_optimiser(OPTIMISERS["sgd"]), tmp_path)
    assert "is of other parts" in fitting.notes[0]


def test_a_state_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    """Of a network of another form, the first layers would be loaded before the last one complains."""
    halfway(tmp_path)

    def wider(net: nn.Module) -> Any:
        assert isinstance(net, nn.Sequential)
        torch.manual_seed(1)
        net[4] = nn.Linear(6, 4)
        return LEARNER(net)

    whole, _ = train(wider, None)
    weights, fitting = train(wider, tmp_path)
    assert fitting.resumed == 0
    assert "does not fit (Error(s) in loading state_dict" in fitting.notes[0]
    assert all(torch.equal(whole[key], weights[key]) for key in whole)


def test_a_phase_that_is_damaged_takes_the_later_ones_with_it(tmp_path: Path) -> None:
    whole, _ = train(LEARNER, None, phases=2)
    with pytest.raises(Killed):
        train(LEARNER, tmp_path, phases=2, until=6)
    assert {each.name for each in tmp_path.iterdir()} == {
        "epoch.safetensors",
        "epoch.before.safetensors",
        "epoch1.safetensors",
        "epoch1.before.safetensors",
    }
    zeroed(tmp_path / "epoch.safetensors")
    weights, fitting = train(LEARNER, tmp_path, phases=2)
    # Three of the first phase; none of the second, which began with another epoch.
    assert fitting.resumed == 3
    assert all(torch.equal(whole[key], weights[key]) for key in whole)


def test_an_epoch_that_cannot_be_read_back_is_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = states.durable.settle

    def rotten(draft: Path, place: Path) -> None:
        settle(draft, place)
        if place.name == "epoch.safetensors" and len(list(tmp_path.iterdir())) > 1:
            zeroed(place)

    monkeypatch.setattr(states.durable, "settle", rotten)
    with pytest.raises(Killed):
        train(LEARNER, tmp_path, until=2)
    assert [each.name for each in tmp_path.iterdir()] == ["epoch.before.safetensors"]
    monkeypatch.undo()
    _, fitting = train(LEARNER, tmp_path)
    assert fitting.resumed == 1


def test_a_folder_that_another_run_swept_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "kept"

    def epochs() -> Iterator[int]:
        for epoch in trainer(folder).epochs(3, nn.Linear(1, 1)):
            yield epoch.number
            states.durable.remove(folder)

    assert list(epochs()) == [0, 1, 2]


def test_a_full_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    newest, before = halfway(tmp_path)

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(states.durable, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        train(LEARNER, tmp_path)
    monkeypatch.undo()
    # What was there is there, and nothing half written.
    assert {each.name for each in tmp_path.iterdir()} <= {newest.name, before.name}
    _, fitting = train(LEARNER, tmp_path)
    assert fitting.resumed == 3
