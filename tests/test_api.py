"""The door for Python: an attack on a network in hand, and refusals by the sentences of the command line."""

import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bench
from bench import Images, InputError, Labels, Loaded, Randomness, Shape, Split, Threat, View, api
from bench.api import running
from bench.registry import ATTACKS, DEFENSES
from bench.runner.context import WorkerContext, load
from bench.runner.train import restored
from bench.testing import Halfspace
from suites import TASK, Ran, suite

PLANE = Halfspace(Shape(3, 5, 4, 2))
X, Y = PLANE.examples(12)
X = X.float()


def attacked(model: nn.Module = PLANE, **settings: Any) -> bench.Result:
    """Attack the half-space at 0.01 in linf by three steps, unless something else is said."""
    return bench.evaluate(
        model, settings.pop("x", X), settings.pop("y", Y), **({"radius": 0.01, "steps": 3} | settings)
    )


# --- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.999, 1.001])
def test_a_plane_is_crossed_where_the_radius_is_enough_and_nowhere_else(share: float) -> None:
    least = PLANE.least(X, "linf")
    radius = share * float(least.median())
    # To the corner: the first iterate that wins may lie on the plane to the last bit, where rounding answers.
    result = attacked(radius=radius, steps=20, drop=False)
    assert result.frame["broken"].tolist() == (least < radius).tolist()
    assert result.robust.value == pytest.approx(float((least >= radius).double().mean()))
    assert (result.clean.value, result.clean.n, result.robust.n) == (1, 12, 12)
    moved = (result.images.double() - X.double()).flatten(1).abs().amax(1)
    assert float(moved.max()) <= radius + 1e-7
    assert np.allclose(result.frame["distance"], moved)


def test_what_moves_as_little_as_it_can_is_read_at_the_radius() -> None:
    least = PLANE.least(X, "l2")
    radius = float(least.median())
    free = attacked(attack="deepfool", norm="l2", radius=None, steps=50)
    assert free.robust.value == 0
    assert math.isinf(free.radius)
    assert np.allclose(free.frame["distance"], least, rtol=0.05)
    read = attacked(attack="deepfool", norm="l2", radius=radius, steps=50)
    assert read.frame["broken"].tolist() == (free.frame["distance"] <= radius).tolist()
    assert torch.equal(read.images, free.images)


def test_rows_say_what_was_asked_and_what_it_cost() -> None:
    result = attacked(attack="pgd", restarts=1)
    rows = result.frame
    assert rows["index"].tolist() == list(range(12))
    assert rows["truth"].tolist() == rows["clean_label"].tolist() == Y.tolist()
    assert rows["label"].tolist() == PLANE(result.images).argmax(1).tolist()
    assert rows["backwards"].tolist() == [3.0] * 12
    assert not rows["invalid"].any()
    assert result.flags == ()
    assert str(result).startswith("pgd, linf 0.01: robust 100.0 % [")
    assert repr(result) == "Result(pgd, linf 0.01: images (12, 3, 5, 4), 0 of 12 broken, 0 invalid, 0 flags)"


def test_other_metrics_are_those_of_tables() -> None:
    result = attacked(radius=0.5, steps=20)
    found = result.score("success")
    assert found is not None
    assert found.value == 1
    assert result.score("detection") is not None
    with pytest.raises(InputError, match="unknown metric 'sucess'; did you mean 'success'"):
        result.score("sucess")
    with pytest.raises(InputError, match="metric: logit is of a class"):
        result.score("logit")


def test_settings_that_cannot_do_what_they_seem_to_are_flagged() -> None:
    said = "2 steps of 0.001 reach 0.002, less than the radius 0.01"
    assert attacked(steps=2, step_size=0.001).flags == (said,)


def test_what_the_outcomes_say_is_flagged_as_in_a_table() -> None:
    class Rounded(nn.Module):
        """Its gradient is zero everywhere."""

        def forward(self, x: Tensor) -> Tensor:
            return PLANE((4 * x).round() / 4)

    y = Rounded()(X).argmax(1)
    result = bench.evaluate(Rounded(), X, y, attack="pgd", radius=0.01, steps=3)
    assert result.robust.value > 0
    assert result.flags == ("the gradient vanished on 12 of 12 examples",)
    assert "flag: the gradient vanished on 12 of 12 examples" in str(result)


def test_a_move_that_is_not_allowed_is_void_and_counted() -> None:
    result = bench.evaluate(PLANE, X, Y, attack="toy/invalid", how="nan")
    assert result.frame["invalid"].tolist() == [True, False] * 6
    said = ("6 of 12 moves were invalid: the clean image was shown", "invalid moves: 6, not finite")
    assert result.flags == said
    assert str(result).splitlines()[1:] == [f"flag: {each}" for each in said]
    assert repr(result).endswith("0 of 12 broken, 6 invalid, 2 flags)")
    assert torch.equal(result.images, X)


def sign(
    view: View, x: Images, y: Labels, threat: Threat, noise: Randomness, *, times: float = 1.0
) -> Images:
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(view.logits(z), y, reduction="sum"), z)
    return threat.project(x, x + times * threat.radius * gradient.sign())


def test_a_function_that_nobody_registered_is_an_attack() -> None:
    radius = 1.001 * float(PLANE.least(X, "linf").max())
    assert bench.evaluate(PLANE, X, Y, attack=sign, radius=radius).robust.value == 0
    short = bench.evaluate(PLANE, X, Y, attack=sign, radius=radius, times=0.5)
    assert short.attack == "sign"
    assert short.robust.value == 1


def test_a_registered_function_is_the_registered_attack() -> None:
    pgd: Any = ATTACKS["pgd"].make
    one, other = attacked(attack=pgd), attacked(attack="pgd")
    assert torch.equal(one.images, other.images)
    assert one.frame.equals(other.frame)


def test_draws_depend_on_seed_and_index_and_on_nothing_else() -> None:
    # A step that is too short to leave the place where it began.
    drawn = {"start": "uniform", "steps": 1, "step_size": 0.0001}
    whole = attacked(**drawn)
    assert torch.equal(attacked(**drawn, batch=5).images, whole.images)
    rows = torch.tensor([7, 2, 9])
    part = attacked(x=X[rows], y=Y[rows], index=rows, **drawn)
    assert torch.equal(part.images, whole.images[rows])
    assert part.frame["index"].tolist() == [7, 2, 9]
    assert part.frame["broken"].tolist() == whole.frame["broken"].iloc[rows.tolist()].tolist()
    assert not torch.equal(attacked(**drawn, seed=1).images, whole.images)


def test_images_are_normalised_before_the_network_sees_them() -> None:
    class Back(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return PLANE(x * 0.5 + 0.25)

    result = bench.evaluate(Back(), X, Y, attack="none", mean=0.25, std=0.5)
    assert result.clean.value == 1
    assert np.allclose(np.stack(result.frame["logits"]), PLANE(X).detach(), atol=1e-5)


def test_a_network_and_the_process_are_left_as_they_were() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)
    )
    net.train()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones(2, 12)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad():
            first = attacked(net)
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [each.training for each in net] == [True, True, False, True, True]
    assert [each.requires_grad for each in net.parameters()] == [False, True, True, True, True, True]
    assert torch.equal(net[4].weight.grad, torch.ones(2, 12))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    # In evaluation mode there is no dropout, and batch normalisation has learned nothing from the images.
    assert torch.equal(attacked(net.eval()).images, first.images)


def test_what_does_not_fit_in_memory_is_computed_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logits: Tensor = PLANE(x)
            return logits

    small, whole = attacked(Small(), steps=5), attacked(steps=5)
    assert torch.equal(small.images, whole.images)
    assert small.frame["label"].equals(whole.frame["label"])


def test_a_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    attacked()
    assert capsys.readouterr() == ("", "")
    quiet = attacked(progress=True, batch=5)
    assert torch.equal(quiet.images, attacked().images)


# --- the same as a run -------------------------------------------------------------------------------

LINEAR = {"use": "toy/linear", "inference": {"threshold": 0.3}}


def test_a_call_gives_the_numbers_of_a_suite(tmp_path: Path) -> None:
    """Of every example: images and outcomes, for draws by image, by shard, and of the network itself."""
    attacks = {
        "pgd": {"use": "pgd", "steps": 4, "start": "uniform", "loss": "margin"},
        "common": {"use": "toy/common"},
        "minimal": {"use": "toy/minimal"},
        "boundary": {"use": "toy/answers"},
    }
    tasks = [
        {**TASK, "attacks": ["pgd", "common", "boundary"], "seeds": [1]},
        {"data": "digits", "threat": {"norm": "l2"}, "attacks": ["minimal"], "seeds": [1]},
    ]
    ran = Ran(suite(tmp_path, {"linear": LINEAR, "noisy": {"use": "toy/noisy"}}, attacks, tasks))
    assert not ran.failed
    seen = 0
    for cell in ran.plan.conditions:
        victim, attack_run = cell.job.victim, cell.job.crafts[0].attack_run
        context = WorkerContext(ran.store.root, ran.plan.suite.folder, None, "cpu", {})
        split = load(attack_run.data, context)
        at = cell.coordinates
        result = bench.evaluate(
            Loaded(restored(victim, context), victim),
            Split(split.images, split.labels, split.index, split.digest),
            attack=attacks[at["attack"]],
            norm=at["norm"],
            radius=at["radius"],
            view=None if attack_run.view is None or at["view"].startswith("decision:") else at["view"],
            readout=at["readout"],
            seed=1,
            batch=25,
        )
        rows = ran.outcomes(**at)
        same = result.frame[[name for name in rows.columns if name != "parameters"]]
        assert same.astype(str).equals(rows[same.columns].astype(str)), at
        seen += 1
    assert seen >= 8


# --- task files and results folders ------------------------------------------------------------------

DRAWN = {"use": "pgd", "steps": 3, "start": "uniform"}
TABLE = {
    "title": "Robust accuracy",
    "rows": ["defense"],
    "columns": {"Clean": {"attack": "clean"}, "PGD": {"attack": "pgd"}},
    "extra": ["Worst"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a suite that was run: two trainings of a linear network, attacked."""
    folder = tmp_path_factory.mktemp("home")
    task = {**TASK, "seeds": [0, 1], "views": ["logits"], "readouts": ["plain"]}
    radii = {**task, "threat": {"norm": "linf", "radius": ["8/255", 0.1]}, "attacks": ["pgd"]}
    curve = {
        "title": "By radius",
        "rows": ["defense"],
        "columns": ["radius"],
        "where": {"attack": "pgd"},
        "figure": {"x": "radius"},
    }
    tables = {"3": {**TABLE, "where": {"radius": 0.1}}, "curve": curve}
    attacks = {"clean": {"use": "none"}, "pgd": DRAWN}
    suite(folder, {"linear": {"use": "toy/linear"}}, attacks, [task, radii], tables=tables)
    finished = bench.run(folder / "suite.yaml", results=folder / "results", executor="inline")
    assert (finished.failed, finished.holes, finished.notes) == ((), 0, ())
    assert finished.jobs > 8
    return folder


def test_a_run_gives_its_tables_and_is_done_once(home: Path) -> None:
    again = bench.run(home / "suite.yaml", results=home / "results", executor="inline", table=3)
    assert again.jobs == 0
    assert list(again.tables) == ["3"]
    table = again.tables["3"]
    assert list(table.columns) == ["Clean", "PGD", "Worst"]
    assert table.loc["linear", "Clean"] > table.loc["linear", "PGD"] >= 0
    assert (home / "results" / "tables" / "table-3.md").is_file()


def test_what_this_process_alone_has_registered_does_not_reach_others(home: Path) -> None:
    place = r"defense 'toy/linear' is registered in this process alone \(.*toys.*\)"
    with pytest.raises(InputError, match=place + r'.* executor="inline"'):
        bench.run(home / "suite.yaml", results=home / "other")
    assert not (home / "other").exists()


def test_a_table_is_a_data_frame_that_can_be_printed_and_drawn(home: Path) -> None:
    table = bench.table(home / "results", "3")
    rows = bench.outcomes(home / "results")
    chosen = rows[(rows["attack"] == "pgd") & (rows["radius"] == 0.1)]
    assert table.loc["linear", "PGD"] == pytest.approx(100 * chosen["correct"].mean())
    assert table.to_markdown() == (home / "results" / "tables" / "table-3.md").read_text()
    assert type(table[["PGD"]]).__name__ == "DataFrame"
    assert table.details().set_index("column")["n"].tolist() == [60, 60, 60]
    bars = [bar.get_height() for bar in table.figure().axes[0].patches]
    assert bars == pytest.approx(table.loc["linear"].tolist())
    curve = bench.table(home / "results", "curve").figure().axes[0].get_lines()[0]
    # From the clean images on.
    assert np.asarray(curve.get_xdata()) == pytest.approx([0, 8 / 255, 0.1])


def test_a_table_travels_to_other_processes(home: Path) -> None:
    table = bench.table(home / "results", "3")
    other = pickle.loads(pickle.dumps(table))
    assert other.equals(table)
    assert other.to_markdown() == table.to_markdown()
    assert other.details().equals(table.details())


def test_what_is_no_path_or_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    some: Any = 3
    with pytest.raises(InputError, match=r"^suite: expected a path, found 3$"):
        bench.run(some)
    with pytest.raises(InputError, match=r"^results: expected a path, found 3$"):
        bench.table(some, "3")
    missing = tmp_path / "nothere.yaml"
    said = f"{missing}: no such file, and no other task file in {tmp_path}"
    with pytest.raises(InputError, match="^" + re.escape(said) + "$"):
        bench.plan(missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: expected a results folder, found a file$"):
        bench.outcomes(tmp_path / "file")


def test_a_plan_says_what_is_done_and_what_is_not(home: Path, tmp_path: Path) -> None:
    done = api.plan(home / "suite.yaml", results=home / "results")
    assert set(done.conditions["state"]) == {"done"}
    assert set(done.jobs["state"]) == {"done"}
    empty = api.plan(home / "suite.yaml", results=tmp_path / "none", table="3")
    assert set(empty.jobs["kind"]) == {"train", "craft", "evaluate"}
    assert "to do" in set(empty.conditions["state"])
    assert empty.flags == ()


def test_images_are_those_that_the_defense_was_shown(home: Path) -> None:
    root = home / "results"
    found = bench.images(root, attack="pgd", seed=1, radius="8/255")
    rows = bench.outcomes(root)
    rows = rows[(rows["attack"] == "pgd") & (rows["seed"] == 1) & (rows["radius"] < 0.1)]
    assert found.index.tolist() == rows["index"].tolist()
    assert found.label.tolist() == rows["label"].tolist()
    assert not found.rejected.any()
    moves = (found.images.double() - found.clean.double()).flatten(1).abs().amax(1)
    assert moves.tolist() == pytest.approx(rows["linf"].tolist())
    model = bench.load(root, "linear", seed=1)
    assert model.decide(found.images).label.tolist() == found.label.tolist()
    right, moved = (int(each) for each in ((found.label == found.truth).sum(), (rows["linf"] > 0).sum()))
    n = len(rows)
    assert repr(found) == (
        f"Shown(images ({n}, 1, 8, 8), {moved} of {n} moved, {right} labelled as they are, 0 refused)"
    )
    right = model(found.clean).argmax(1) == found.truth
    assert float(right.double().mean()) > 0.5


def test_a_loaded_defense_has_its_views_and_gives_the_numbers_of_the_run(home: Path) -> None:
    model = bench.load(home / "results", "linear", seed=1)
    assert isinstance(model, Loaded)
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())
    assert model.readouts == ("plain", "reject")
    assert set(model.views) == {"logits", "scaled", "reject", "code"}
    found = bench.images(home / "results", attack="pgd", seed=1, radius=0.1)
    halved = model.view("scaled", temperature=2.0).logits(found.clean)
    assert torch.allclose(2 * halved, model(found.clean))
    with pytest.raises(InputError, match="has no view 'scalde'; did you mean 'scaled'"):
        model.view("scalde")
    with pytest.raises(InputError, match=r"view\.temprature: unknown key; did you mean 'temperature'"):
        model.view("scaled", temprature=2)
    with pytest.raises(InputError, match="unknown read-out 'plane'; did you mean 'plain'"):
        model.decide(found.clean, "plane")
    result = bench.evaluate(
        model, found.clean, found.truth, attack="none", readout="plain", index=found.index
    )
    rows = bench.outcomes(home / "results")
    clean = rows[(rows["attack"] == "clean") & (rows["seed"] == 1)].drop_duplicates("index")
    assert result.frame["label"].tolist() == clean["label"].tolist()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"defense": "lineal"}, "defense: unknown defense 'lineal'; did you mean 'linear'?"),
        ({"seed": 7}, "seed: linear is fitted with 0, 1, not 7"),
        ({"data": "digit"}, "data: unknown data 'digit'; did you mean 'digits'?"),
        (
            {"inference": {"treshold": 1}},
            "inference.treshold: toy/linear has no such parameter to set at inference time; did you mean",
        ),
    ],
)
def test_a_defense_that_is_not_there_is_refused(home: Path, settings: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        bench.load(home / "results", **({"defense": "linear"} | settings))


def test_a_defense_of_an_unknown_task_file_or_without_weights_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "results", tmp_path / "far" / "results")
    with pytest.raises(
        InputError, match=r"was made from suite.yaml, which lies neither beside the results nor"
    ):
        bench.load(tmp_path / "far" / "results", "linear")
    model = bench.load(tmp_path / "far" / "results", "linear", suite=home / "suite.yaml")
    assert isinstance(model, Loaded)
    shutil.rmtree(tmp_path / "far" / "results" / "train")
    with pytest.raises(InputError, match="linear, seed 0: it is not fitted there; bench run"):
        bench.load(tmp_path / "far" / "results", "linear", suite=home / "suite.yaml")
    shutil.rmtree(tmp_path / "far" / "results" / "craft")
    with pytest.raises(InputError, match="crafted images are not kept there"):
        bench.images(tmp_path / "far" / "results", attack="pgd", seed=0, radius=0.1)


def test_a_task_file_that_has_changed_since_is_said_to_have_and_can_be_taken_as_it_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "results", tmp_path / "results")
    changed = tmp_path / "suite.yaml"
    changed.write_text((home / "suite.yaml").read_text() + "\n# One line more, which changes no key.\n")
    with pytest.raises(InputError) as refused:
        bench.load(tmp_path / "results", "linear")
    assert f"suite: {changed} has changed since {tmp_path / 'results'} was made from it" in str(refused.value)
    (word,) = re.findall(r"suite='([^']+)'", str(refused.value))
    assert isinstance(bench.load(tmp_path / "results", "linear", suite=word), Loaded)
    # The one that it was made from is found, though the one that has changed lies nearer.
    (tmp_path / "work" / "suites").mkdir(parents=True)
    shutil.copy(home / "suite.yaml", tmp_path / "work" / "suites")
    monkeypatch.chdir(tmp_path / "work")
    assert isinstance(bench.load(tmp_path / "results", "linear"), Loaded)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"attak": "pgd"}, "attak: unknown coordinate; did you mean 'attack'?"),
        ({"attack": "pgdd"}, "attack: no condition has 'pgdd'; did you mean 'pgd'?"),
        ({"attack": "pgd", "seed": 0}, "2 conditions are meant; say which (radius: 0.1, 8/255)"),
        ({"attack": "clean", "radius": "8/255"}, "no condition has all of"),
    ],
)
def test_images_of_no_condition_or_of_several_are_refused(home: Path, where: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        bench.images(home / "results", **where)


def test_a_script_without_a_guard_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    table = {**TABLE, "columns": {"Clean": {"attack": "clean"}}, "extra": []}
    defenses = {"mine": {"use": "module", "build": "net:build"}}
    suite(tmp_path, defenses, {"clean": {"use": "none"}}, [TASK], tables={"1": table})
    (tmp_path / "script.py").write_text(
        "import bench\nprint('once')\n"
        "done = bench.run('suite.yaml', device='cpu', slots=2)\n"
        "print(done.holes, done.tables['1'].shape, __name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["once", "0 (1, 1) __main__"], done.stderr


# --- wrong input, through both doors -----------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # What Python is told, and what a task file says instead of the good.
    ({"attack": "pdg"}, {"attack": {"use": "pdg"}}),
    ({"stepz": 3}, {"attack": {"stepz": 3}}),
    ({"steps": "many"}, {"attack": {"steps": "many"}}),
    ({"steps": True}, {"attack": {"steps": True}}),
    ({"steps": 0}, {"attack": {"steps": 0}}),
    ({"step_size": "1/0"}, {"attack": {"step_size": "1/0"}}),
    ({"loss": "margn"}, {"attack": {"loss": "margn"}}),
    ({"time_limit": -1}, {"attack": {"time_limit": -1}}),
    ({"targets": 12}, {"attack": {"targets": [12]}}),
    ({"targets": "nxt"}, {"attack": {"targets": "nxt"}}),
    ({"norm": "l3"}, {"threat": {"norm": "l3"}}),
    ({"norm": "l1"}, {"threat": {"norm": "l1"}}),
    ({"radius": "8/0"}, {"threat": {"radius": "8/0"}}),
    ({"radius": 0}, {"threat": {"radius": 0}}),
    ({"radius": "eight"}, {"threat": {"radius": "eight"}}),
    ({"view": "lgits"}, {"task": {"views": ["lgits"]}}),
    ({"view": {"use": "scaled", "temprature": 2}}, {"task": {"views": [{"use": "scaled", "temprature": 2}]}}),
    ({"view": {"use": "logits", "draws": 0}}, {"task": {"views": [{"use": "logits", "draws": 0}]}}),
    ({"readout": "plane"}, {"task": {"readouts": ["plane"]}}),
    ({"seed": -1}, {"task": {"seeds": [-1]}}),
    ({"seed": 0.5}, {"task": {"seeds": [0.5]}}),
    ({"batch": 0}, {"data": {"shard": 0}}),
    ({"radius": None}, {"threat": {"radius": None}}),
    ({"view": "code"}, {"task": {"views": ["code"]}}),
    ({"attack": "toy/colour"}, {"attack": {"use": "toy/colour"}}),
    ({"attack": "toy/common", "targets": "next"}, {"attack": {"use": "toy/common", "targets": "next"}}),
]


@pytest.mark.parametrize(("told", "written"), WRONG, ids=lambda value: str(value)[:40])
def test_both_doors_refuse_wrong_input_with_the_same_sentence(
    tmp_path: Path, told: dict[str, Any], written: dict[str, Any]
) -> None:
    attack = {"use": "pgd"} | written.get("attack", {})
    threat = {"norm": "linf", "radius": 0.1} | written.get("threat", {})
    threat = {name: value for name, value in threat.items() if value is not None}
    task = {"data": "digits", "threat": threat, "attacks": ["it"], "views": ["logits"], "readouts": ["plain"]}
    path = suite(tmp_path, {"model": {"use": "toy/linear"}}, {"it": attack}, [task | written.get("task", {})])
    document = yaml.safe_load(path.read_text())
    document["data"]["digits"] |= written.get("data", {})
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    try:
        crossed = running.planned(path, tmp_path / "results", None).plan
        assert not crossed.conditions
        there = crossed.skips[0].reason
    except InputError as error:
        there = re.sub(r"^suite\.yaml:\d+: [^ ]+: ", "", str(error))
    model = DEFENSES["toy/linear"].make(Shape(1, 8, 8, 10))
    given = {"radius": 0.1, "view": "logits", "readout": "plain"} | told
    with pytest.raises(InputError) as refused:
        bench.evaluate(model, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), **given)
    here = re.sub(r"^[^ ]+: ", "", str(refused.value))
    # A task file calls an attack as it likes, a call by its name.
    assert here.replace(f"{attack['use']} ({attack['use']})", f"it ({attack['use']})") == there


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (nn.Flatten(0), "found (128,)"),
        (
            nn.Linear(5, 2),
            "the network does not take images of shape (1, 8, 8): ",
        ),
        ("ints", "expected logits of floating point, found torch.int64"),
        ("complex", "expected logits of floating point, found torch.complex64"),
        (
            "tuple",
            "expected the network to return logits, found a tuple; wrap it in a module",
        ),
    ],
    ids=["shape", "raises", "ints", "complex", "tuple"],
)
def test_both_doors_refuse_a_network_that_answers_no_logits(
    tmp_path: Path, network: Any, sentence: str
) -> None:
    kinds = {"ints": "x.long()", "complex": "x.cfloat()", "tuple": "(x, x)"}
    if isinstance(network, str):
        network = eval(  # The same text that is written into the file of the other door.
            f"type('Net', (nn.Module,), {{'forward': lambda self, x: {kinds[network]}}})()",
            {"nn": nn},
        )
    with pytest.raises(InputError, match=re.escape(sentence)):
        bench.evaluate(network, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=re.escape(sentence).replace(r"found\ \(128,\)", "found")):
        bench.check_network(network, torch.zeros(2, 1, 8, 8), "mine:build", classes=10)


THREE = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"x": X.numpy()}, "x: expected a tensor of images (N, C, H, W), found a value of type ndarray"),
        ({"x": (X * 255).byte()}, "x: expected images of floating point in [0, 1], found torch.uint8"),
        ({"x": X * 3}, "x: image 0: expected values in [0, 1], found "),
        ({"x": X * float("nan")}, "x: image 0: expected values in [0, 1], found nan"),
        ({"x": X[0]}, "x: expected images (N, C, H, W), at least one, found shape (3, 5, 4)"),
        ({"x": X[:0]}, "x: expected images (N, C, H, W), at least one, found shape (0, 3, 5, 4)"),
        ({"y": None}, "y: expected a tensor of whole numbers (12,), found None"),
        ({"y": Y.float()}, "y: expected whole numbers (12,), found torch.float32 (12,)"),
        ({"y": Y[:5]}, "y: expected whole numbers (12,), found torch.int64 (5,)"),
        ({"y": nn.functional.one_hot(Y)}, "y: expected whole numbers (12,), found torch.int64 (12, 2)"),
        ({"y": Y + 1}, "y: image 1: expected a label below 2, found 2"),
        ({"y": Y - 1}, "y: image 0: expected a label below 2, found -1"),
        ({"index": torch.zeros(12, dtype=torch.int64)}, "index: an example stands twice"),
        ({"x": Split(X, Y, Y, ""), "y": Y}, "y: a Split has its own"),
        ({"model": lambda x: x}, "model: expected an nn.Module, found a value of type function"),
        ({"attack": 3}, "attack: expected a name, a mapping or a function, found a value of type int"),
        ({"attack": {"steps": 3}}, "attack: expected a mapping such as {'use': 'pgd'}, found {'steps': 3}"),
        ({"attack": lambda x: x}, "attack: expected a function of (view, x, y, threat, noise) with keyword-"),
        ({"attack": {"use": "pgd", "source": {"defense": "a", "view": "b"}}}, "source: is for task files"),
        ({"mean": (0.5, 0.5)}, "mean: expected a number, or one for each of 3 channels, found [0.5, 0.5]"),
        ({"mean": 127.5}, "mean: expected values in [0, 1], the units of the images, found 127.5"),
        ({"std": 0}, "std: expected values above 0, found 0"),
        (
            {"targets": "others", "model": THREE},
            "targets: expected one",
        ),
        ({"attack": "toy/code"}, "attack: toy/code can look through no view of this defense"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else ", ".join(value),
)
def test_what_only_python_can_give_is_refused_with_a_sentence(given: dict[str, Any], sentence: str) -> None:
    everything = {"model": PLANE, "x": X, "y": Y} | given
    with pytest.raises(InputError, match="^" + re.escape(sentence)):
        bench.evaluate(everything.pop("model"), everything.pop("x"), everything.pop("y"), **everything)


def test_a_choice_between_views_or_readouts_is_the_callers() -> None:
    model = DEFENSES["toy/linear"].make(Shape(1, 8, 8, 10))
    x, y = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"^readout: there are several, say which: plain, reject$"):
        bench.evaluate(model, x, y)
    with pytest.raises(InputError, match=r"^view: there are several, say which: logits, reject, scaled$"):
        bench.evaluate(model, x, y, readout="plain")
    with pytest.raises(InputError, match=r"^mean: a registered defense normalises for itself$"):
        bench.evaluate(model, x, y, readout="plain", view="logits", mean=0.5)


# --- the package itself ------------------------------------------------------------------------------


def test_every_name_of_the_package_is_there_and_documented() -> None:
    for name in (*bench.__all__, "__version__"):
        found = getattr(bench, name)
        if callable(found) and getattr(found, "__module__", "").startswith("bench"):
            assert found.__doc__, name
    assert set(bench.__all__) <= set(dir(bench))
    with pytest.raises(AttributeError, match="evalute"):
        bench.evalute  # noqa: B018 - that it is not there is what is tested


def test_tables_and_outcomes_need_no_torch(home: Path) -> None:
    code = (
        "import sys, bench\n"
        "assert not {'torch', 'pandas', 'pydantic', 'numpy'} & set(sys.modules)\n"
        f"bench.table({str(home / 'results')!r}, '3').to_markdown()\n"
        f"bench.outcomes({str(home / 'results')!r})\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_functions_stay_functions_whatever_modules_are_imported() -> None:
    names = ("images", "load", "outcomes", "run", "table", "evaluate")
    code = (
        "import importlib, pkgutil, sys, types, bench\n"
        "for each in pkgutil.walk_packages(bench.__path__, 'bench.'):\n"
        "    importlib.import_module(each.name)\n"
        f"assert all(isinstance(getattr(bench, name), types.FunctionType) for name in {names})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("code", "limit"), [("import bench", 0.1), ("import bench.cli", 0.5)])
def test_the_package_and_the_command_line_start_at_once(code: str, limit: float) -> None:
    """In processor time of the import itself, which the load of a machine does not change."""
    timed = f"import time; begun = time.process_time(); {code}; print(time.process_time() - begun)"
    took = [
        float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < limit
