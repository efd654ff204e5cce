"""Whether a network is the one that was stored, and whether its answers are its own: not its company's."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import OtherNetworkError
from bench.protocols import Decision, Shape
from bench.registry import DEFENSES
from bench.runner import evaluate, probes
from bench.suite.jobs import Evaluate, Train
from suites import TASK, Ran, suite

CPU = torch.device("cpu")

HEAD = """
import os, random, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""

MASKED = """
class Masked(nn.Module):
    # What it draws is neither a parameter nor a buffer.
    def __init__(self):
        super().__init__()
        self.net = plain()
        self.mask = {draw}

    def forward(self, x):
        return self.net(x * self.mask)

def build():
    return Masked()
"""

SEEDED = {
    "numpy": "torch.from_numpy((np.random.rand(1, 1, 8, 8) < 0.7).astype('float32'))",
    "random": "torch.tensor([[float(random.random() < 0.7) for _ in range(8)] for _ in range(8)])",
    "torch": "(torch.rand(8, 8) < 0.7).float()",
}
UNSEEDED = {
    "default_rng": "torch.from_numpy((np.random.default_rng().random((8, 8)) < 0.7).astype('float32'))",
    "urandom": "torch.tensor([b / 255 for b in os.urandom(64)]).view(8, 8)",
    "SystemRandom": "torch.tensor([random.SystemRandom().random() for _ in range(64)]).view(8, 8)",
    "torch.Generator": "torch.rand(8, 8, generator=(g := torch.Generator(), g.seed())[0])",
}


def one(folder: Path, body: str, **more: Any) -> Path:
    """Write a suite of one network of the user's own."""
    (folder / "own.py").write_text(HEAD + textwrap.dedent(body))
    defenses = {"net": {"use": "module", "build": "own:build", **more}}
    attacks = {"clean": {"use": "none"}, "fgsm": {"use": "fgsm"}}
    columns = {"Clean": {"attack": "clean"}, "FGSM": {"attack": "fgsm"}}
    table = {"title": "Own", "rows": ["defense"], "columns": columns}
    return suite(folder, defenses, attacks, [TASK], tables={"t": table})


def bench(folder: Path, *more: str, path: Path | None = None) -> tuple[int, str, str]:
    """Run the suite in a process of its own; return the status, what was said, and the table's file."""
    ended = subprocess.run(
        [sys.executable, "-m", "bench.cli", "run", "suite.yaml", "--executor", "inline", *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    table = folder / "results" / "suite" / "tables" / "table-t.csv"
    return ended.returncode, ended.stdout + ended.stderr, table.read_text() if table.exists() else ""


@pytest.mark.parametrize("source", SEEDED)
def test_a_network_that_draws_when_it_is_built_is_one_network(tmp_path: Path, source: str) -> None:
    path = one(tmp_path, MASKED.format(draw=SEEDED[source]))
    first, second = (Ran(path, tmp_path / name) for name in "ab")
    assert not first.failed
    for attack in ("clean", "fgsm"):
        assert first.outcomes(attack=attack).equals(second.outcomes(attack=attack))


@pytest.mark.parametrize("source", UNSEEDED)
def test_a_network_that_no_seed_reaches_has_no_number(tmp_path: Path, source: str) -> None:
    ran = Ran(one(tmp_path, MASKED.format(draw=UNSEEDED[source])))
    (failed,) = ran.failed
    assert isinstance(failed.job, Train)
    assert isinstance(failed.error, OtherNetworkError)
    assert "built a second time" in str(failed.error)
    assert not [job for job in ran.done if isinstance(job.job, Evaluate)]


def test_a_network_that_differs_by_process_has_no_number(tmp_path: Path) -> None:
    # Alike whenever it is built in one process, so that only the next process can tell.
    body = MASKED.format(draw="torch.full((8, 8), 1.0 + (os.getpid() % 1000) / 1000)")
    one(tmp_path, body)
    assert bench(tmp_path)[0] == 0
    code, said, _ = bench(tmp_path)
    # Another network: made again, and said.
    assert code == 0
    assert "answers otherwise" in said
    assert "to do" in said


def test_what_was_learned_in_an_attribute_alone_has_no_number(tmp_path: Path) -> None:
    defenses = {"forgets": {"use": "toy/forgets"}}
    ran = Ran(suite(tmp_path, defenses, {"clean": {"use": "none"}}, [TASK]))
    (failed,) = ran.failed
    assert isinstance(failed.error, OtherNetworkError)
    assert "no parameter or buffer" in str(failed.error)


# --- something beside the suite changes between two runs ----------------------------------------------

CHECKPOINT = """
def build():
    net = plain()
    net.load_state_dict(torch.load(HERE / "mine.pt"))
    return net
"""
TABLE_OF_NUMBERS = """
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()
        self.scale = torch.load(HERE / "mine.pt")["0"]

    def forward(self, x):
        return self.net(x * self.scale)

def build():
    return Scaled()
"""
LAZY = """
class Lazy(nn.Module):
    # Reads what it needs when it is asked.
    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        return self.net(x) * torch.load(HERE / "mine.pt")["0"]

def build():
    return Lazy()
"""


def state(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "1.weight": torch.randn(10, 64, generator=draw),
        "1.bias": torch.randn(10, generator=draw),
    }


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (CHECKPOINT, state),
        (
            TABLE_OF_NUMBERS,
            lambda seed: {"0": torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))},
        ),
        (LAZY, lambda seed: {"0": torch.tensor(1.0 - 2.0 * seed)}),
    ],
    ids=["weights", "attribute", "when asked"],
)
def test_a_file_that_a_network_reads_itself_and_that_is_replaced_is_noticed(
    tmp_path: Path, body: str, content: Callable[[int], Any]
) -> None:
    one(tmp_path, body)
    torch.save(content(0), tmp_path / "mine.pt")
    code, _, before = bench(tmp_path)
    assert code == 0
    code, said, table = bench(tmp_path)
    assert code == 0
    assert "0 jobs to do" in said
    assert table == before
    torch.save(content(1), tmp_path / "mine.pt")
    code, said, after = bench(tmp_path)
    assert code == 0
    assert "again:" in said
    assert "answers otherwise" in said
    # As if there had been no other network before.
    assert bench(tmp_path, "--results", "fresh")[0] == 0
    assert after != before
    assert after == (tmp_path / "fresh" / "tables" / "table-t.csv").read_text()


def test_a_layer_that_is_edited_in_another_package_is_noticed(tmp_path: Path) -> None:
    lib = tmp_path / "elsewhere"
    lib.mkdir()
    layer = "import torch\nclass Layer(torch.nn.Module):\n    def forward(self, x):\n        return x {}\n"
    (lib / "layers_of_mine.py").write_text(layer.format("* 1.0"))
    folder = tmp_path / "suite"
    folder.mkdir()
    body = "from layers_of_mine import Layer\ndef build():\n    return nn.Sequential(Layer(), plain())\n"
    one(folder, body)
    code, _, before = bench(folder, path=lib)
    assert code == 0
    (lib / "layers_of_mine.py").write_text(layer.format(".flip(-1)"))
    code, said, after = bench(folder, path=lib)
    assert code == 0
    assert "answers otherwise" in said
    assert bench(folder, "--results", "fresh", path=lib)[0] == 0
    assert after == (folder / "fresh" / "tables" / "table-t.csv").read_text()
    assert after != before


def test_a_network_that_cannot_be_built_any_more_leaves_a_hole(tmp_path: Path) -> None:
    one(tmp_path, CHECKPOINT)
    torch.save(state(0), tmp_path / "mine.pt")
    assert bench(tmp_path)[0] == 0
    (tmp_path / "mine.pt").unlink()
    code, said, table = bench(tmp_path)
    assert code == 2, "a file that is gone is for its author to bring back"
    assert "cannot be built any more" in said
    assert "not run" in table


# --- probes ------------------------------------------------------------------------------------------


def answers(values: list[list[float]]) -> dict[str, list[list[float | None]]]:
    return {"view logits": [list(row) for row in values]}


def test_rounding_is_no_difference_and_everything_else_is() -> None:
    base = [[10.0, -3.0, 0.001]] * probes.IMAGES
    near = [[10.0 + 5e-5, -3.0, 0.001 - 9e-5]] * probes.IMAGES
    far = [*base[1:], [10.0, -3.0, 0.002]]
    assert probes.difference(answers(base), answers(base), alike=False) is None
    assert probes.difference(answers(base), answers(near), alike=False) is None
    said = probes.difference(answers(base), answers(far), alike=False)
    assert said is not None
    assert "1 of 4 images, by up to 0.001" in said
    # On another machine half of the images may end elsewhere, and no more than that.
    other = [[1.0, 2.0, 3.0]] * 2 + base[2:]
    assert probes.difference(answers(base), answers(other), alike=True) is None
    assert probes.difference(answers(base), answers([[1.0, 2.0, 3.0]] * 4), alike=True) is not None


def test_a_label_and_a_refusal_are_the_same_or_not() -> None:
    large = [[3.0, 0.0, 1e6, 1e6, -1e6]] * probes.IMAGES
    for column, value in ((0, 4.0), (1, 1.0)):
        other = [list(row) for row in large]
        other[2][column] = value
        kept, now = ({"read-out label": rows} for rows in (large, other))
        assert probes.difference(kept, now, alike=False) is not None


def test_what_was_not_finite_must_stay_so() -> None:
    lost: Any = {"view logits": [[None, 1.0]] * probes.IMAGES}
    assert probes.difference(lost, lost, alike=False) is None
    assert probes.difference(lost, answers([[0.0, 1.0]] * probes.IMAGES), alike=False) is not None


def test_probes_are_lawful_images_of_two_kinds() -> None:
    x = probes.images(Shape(3, 9, 7, 10), "cpu")
    assert x.shape == (probes.IMAGES, 3, 9, 7)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    rough = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    assert float(rough[:2].min()) > 2 * float(rough[2:].max())


def test_answers_of_every_read_out_and_pixel_view_are_in_the_receipt(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, {"linear": {"use": "toy/linear"}}, {"clean": {"use": "none"}}, [TASK]))
    (job,) = [job for job in ran.plan.graph() if isinstance(job, Train)]
    kept = ran.store.receipt("train", job.key)["answers"]  # type: ignore[index]
    entry = DEFENSES["toy/linear"]
    pixel = [f"view {each.name}" for each in entry.views.values() if each.space == "pixel"]
    assert sorted(kept) == sorted([*(f"read-out {name}" for name in entry.readouts), *pixel])
    assert json.loads(json.dumps(kept)) == kept


# --- company -----------------------------------------------------------------------------------------


class Company(nn.Module):
    """Answers by the batch, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.way = way

    def decide(self, x: Tensor, readout: str) -> Decision:
        logits = self.net(x)
        match self.way:
            case "statistics":
                logits = (logits - logits.mean(0)) / (logits.std(0, unbiased=False) + 1e-5)
            case "place":
                draw = torch.Generator().manual_seed(0)
                logits = self.net(x + 0.25 * torch.randn(x.shape, generator=draw))
            case "neighbour":
                logits = logits + 0.2 * logits.roll(1, 0)
            case "size":
                logits = logits + len(x) * x.flatten(1)[:, :10] / 50
            case "even":
                if len(x) % 2:
                    raise ValueError("expected an even batch")
            case "gradients":
                logits = logits.roll(1, 1) if torch.is_grad_enabled() else logits
            case "label":
                decision = Decision.of(logits)
                return decision._replace(
                    label=(decision.label + torch.arange(len(x)) % 2) % 10,
                    logits=None,
                    score=torch.ones(len(x)),
                )
        return Decision.of(logits)


def asked(model: Any, n: int, images: Tensor | None = None) -> list[bool | None]:
    """Return which answers differ at the second ask of a shard of n digits."""
    x = digits(n) if images is None else images
    first = evaluate.ask(model, x, "label", CPU)

    class Key:
        key, readout = "0", "label"

        class victim:
            class train:
                foreign = frozenset({"mine"})

    key: Any = Key
    with torch.no_grad():
        return evaluate._asked_again(model, x, first, key, key, CPU)


def digits(n: int) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("way", ["statistics", "place", "neighbour", "size", "even", "label", "gradients"])
@pytest.mark.parametrize("n", [2, 10, 40, 300])
def test_answers_that_depend_on_company_are_noticed(way: str, n: int) -> None:
    differs = [each for each in asked(Company(way), n) if each is not None]
    assert len(differs) == min(n, evaluate.ASKED_TWICE)
    assert any(differs)


@pytest.mark.parametrize("n", [1, 2, 3, 40, 300])
def test_answers_that_depend_on_the_image_alone_do_not_differ(n: int) -> None:
    differs = [each for each in asked(Company("none"), n) if each is not None]
    assert differs == [False] * min(n, evaluate.ASKED_TWICE)


def test_a_network_that_takes_no_gradients_answers_the_same() -> None:
    class Numpy(Company):
        def decide(self, x: Tensor, readout: str) -> Decision:
            # Raises where autograd looks on.
            return super().decide(torch.from_numpy(x.numpy()), readout)

    assert not any(asked(Numpy("none"), 40))


def test_an_image_alone_in_its_shard_is_asked_in_company_too() -> None:
    assert asked(Company("size"), 1) == [True]


def test_ties_that_rounding_decides_are_no_difference() -> None:
    class Tied(Company):
        """Two classes lead by the last bit, one or the other by the size of the batch."""

        def decide(self, x: Tensor, readout: str) -> Decision:
            logits = self.net(x)
            top = logits.amax(1)
            logits[:, 0] = top + 1
            logits[:, 1] = (top + 1) * (1 + (1e-7 if len(x) > 15 else -1e-7))
            return Decision.of(logits)

    assert not any(asked(Tied("none"), 40))


# --- memory and kinds of numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["cuda", "cpu", "python", "cudnn"],
)
@pytest.mark.parametrize("room", [1, 7, 32])
def test_what_does_not_fit_is_judged_in_smaller_chunks(error: Exception, room: int) -> None:
    class Small(Company):
        def decide(self, x: Tensor, readout: str) -> Decision:
            if len(x) > room:
                raise error
            return super().decide(x, readout)

    x = digits(50)
    with torch.no_grad():
        small, whole = (evaluate.ask(net, x, "label", CPU) for net in (Small("none"), Company("none")))
    assert torch.equal(small["label"], whole["label"])
    assert torch.allclose(small["logits"], whole["logits"], atol=1e-6)


def test_where_not_even_one_image_fits_the_job_fails() -> None:
    class None_(Company):
        def decide(self, x: Tensor, readout: str) -> Decision:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate.ask(None_("none"), digits(5), "label", CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_answers_of_other_kinds_are_cast_once(dtype: torch.dtype) -> None:
    class Cast(Company):
        def decide(self, x: Tensor, readout: str) -> Decision:
            whole = super().decide(x, readout)
            assert whole.logits is not None
            return Decision(
                whole.label.int(), whole.rejected.byte(), whole.score.to(dtype), whole.logits.to(dtype)
            )

    with torch.no_grad():
        found = evaluate.ask(Cast("none"), digits(5), "label", CPU)
    kinds = {name: values.dtype for name, values in found.items()}
    assert kinds == {
        "label": torch.int64,
        "rejected": torch.bool,
        "score": torch.float32,
        "logits": torch.float32,
        "tied": torch.bool,
    }
    assert not any(each for each in asked(Cast("none"), 40))


def test_minus_infinity_is_a_class_that_cannot_be_and_nan_is_no_answer() -> None:
    class Odd(Company):
        def decide(self, x: Tensor, readout: str) -> Decision:
            logits = self.net(x)
            logits[:, 9] = -torch.inf
            logits[1, 0] = torch.nan
            logits[2, 0] = torch.inf
            logits[3] = -torch.inf
            return Decision.of(logits)._replace(score=torch.ones(len(x)))

    with torch.no_grad():
        found = evaluate.ask(Odd("none"), digits(6), "label", CPU)
    assert [each < 0 for each in found["label"].tolist()] == [False, True, True, True, False, False]
