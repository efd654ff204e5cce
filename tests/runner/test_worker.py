"""Training, crafting and asking, with small defenses and attacks that do everything there is to do."""

import importlib
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.data.spec import DataSpec, load
from bench.errors import InputError, OvertimeError
from bench.results.manifest import Outcomes
from bench.runner import limits
from bench.runner.context import WorkerContext, prepare
from bench.runner.limits import limited
from bench.runner.train import unchanged
from bench.suite.jobs import Craft, Evaluate, Train
from suites import TASK, Ran, suite

LINEAR = {"linear": {"use": "toy/linear"}}
CLEAN = {"clean": {"use": "none"}}
PGD = {"pgd": {"use": "pgd", "steps": 5}}


def test_clean_images_are_judged_unmoved(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, LINEAR, CLEAN, [{**TASK, "readouts": ["plain"]}]))
    rows = ran.outcomes(attack="clean")
    split = load(ran.plan.suite.data["digits"])
    assert list(rows["index"]) == split.index.tolist()
    assert list(rows["truth"]) == split.labels.tolist()
    assert (rows[["l0", "l2", "linf", "distance", "forwards", "backwards"]] == 0).all().all()
    assert not rows["invalid"].any()
    assert (rows["label"] == rows["truth"]).mean() > 0.5
    logits = torch.tensor(np.stack(rows["logits"]))
    assert logits.argmax(1).tolist() == rows["label"].tolist()


@pytest.mark.parametrize("how", ["nan", "box", "kind"])
def test_a_move_that_is_not_allowed_is_void_and_counts_as_the_clean_image(tmp_path: Path, how: str) -> None:
    attacks = {**CLEAN, "bad": {"use": "toy/invalid", "how": how}}
    ran = Ran(suite(tmp_path, LINEAR, attacks, [{**TASK, "readouts": ["plain"]}]))
    clean, bad = ran.outcomes(attack="clean"), ran.outcomes(attack="bad")
    # Every second image of each shard of 25, 25 and 10.
    assert bad["invalid"].sum() == 13 + 13 + 5
    assert (bad.loc[bad["invalid"], "distance"] == 0).all()
    assert bad["label"].tolist() == clean["label"].tolist()


def test_rounding_is_projected_back_and_not_void(tmp_path: Path) -> None:
    attacks = {"near": {"use": "toy/invalid", "how": "rounding"}}
    ran = Ran(suite(tmp_path, LINEAR, attacks, [{**TASK, "readouts": ["plain"]}]))
    rows = ran.outcomes(attack="near")
    assert not rows["invalid"].any()
    assert rows["linf"].max() <= 0.1 + 1e-7
    assert rows["linf"].max() > 0.0999


@pytest.mark.parametrize("how", ["shape", "kind"])
def test_images_of_another_form_are_void_counted_and_explained(tmp_path: Path, how: str) -> None:
    attacks = {**CLEAN, "bad": {"use": "toy/crash", "how": how}}
    ran = Ran(suite(tmp_path, LINEAR, attacks, [{**TASK, "readouts": ["plain"], "views": ["logits"]}]))
    assert not ran.failed
    bad = ran.outcomes(attack="bad")
    assert bad["invalid"].all()
    assert bad["label"].tolist() == ran.outcomes(attack="clean")["label"].tolist()
    receipts = [
        ran.store.receipt("craft", job.key)
        for job in ran.plan.graph()
        if isinstance(job, Craft) and job.attack_run.attack.name == "toy/crash"
    ]
    assert sum(receipt["invalid"] for receipt in receipts) == 60
    reasons = {reason for receipt in receipts for reason in receipt["invalid_because"]}
    beginning = {"shape": "shape (", "kind": "torch.float64"}[how]
    assert reasons
    assert all(reason.startswith(beginning) for reason in reasons)
    # Where the images are not kept, the evaluation tells it.
    (key,) = {each.job.key for each in ran.plan.conditions if each.coordinates["attack"] == "bad"}
    found = Outcomes(ran.store.root).found("evaluate", key)
    assert found is not None
    assert sum(count for count, _ in found["invalid"].values()) == 60
    assert {most for _, most in found["invalid"].values()} == {None}
    (quiet,) = {each.job.key for each in ran.plan.conditions if each.coordinates["attack"] == "clean"}
    assert "invalid" not in (Outcomes(ran.store.root).found("evaluate", quiet) or {})


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        ({"use": "toy/crash"}, "the attack is broken"),
        ({"use": "toy/crash", "how": "notes"}, r"notes \['invalid', 'label'\] have names"),
        ({"use": "toy/peek"}, "does not require grad"),
        ({"use": "toy/blind"}, "asked for logits"),
    ],
)
def test_a_job_that_raises_leaves_a_hole_and_the_run_goes_on(
    tmp_path: Path, attack: dict[str, Any], error: str
) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    ran = Ran(suite(tmp_path, LINEAR, {**CLEAN, "bad": attack, **PGD}, [task]))
    assert {type(each.job) for each in ran.failed} == {Craft}
    assert len(ran.outcomes(attack="clean")) == len(ran.outcomes(attack="pgd")) == 60
    for each in ran.failed:
        assert re.search(error, str(each.error))
        record = ran.store.failure_file(each.job.key).read_text()
        assert "Traceback" in record
    (bad,) = [cell for cell in ran.plan.conditions if cell.coordinates["attack"] == "bad"]
    assert ran.store.receipt("evaluate", bad.job.key) is None


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    path = suite(tmp_path, LINEAR, {**CLEAN, **PGD}, [{**TASK, "views": ["logits"]}])
    first = Ran(path)
    assert first.done
    assert not first.failed
    assert not Ran(path).done


def test_what_depends_on_a_failure_does_not_run(tmp_path: Path) -> None:
    defenses = {**LINEAR, "broken": {"use": "toy/linear", "fail": True}}
    ran = Ran(suite(tmp_path, defenses, CLEAN, [{**TASK, "readouts": ["plain"]}]))
    assert [type(each.job) for each in ran.failed] == [Train]
    assert len(ran.outcomes(defense="linear")) == 60
    done = {each.job.key for each in ran.done}
    broken = [each for each in ran.plan.conditions if each.coordinates["defense"] == "broken"]
    assert broken
    assert not any(each.job.key in done for each in broken)


def test_a_loss_that_is_not_finite_stops_a_training_with_a_clear_error(tmp_path: Path) -> None:
    defenses = {"broken": {"use": "toy/linear", "explode": True}}
    ran = Ran(suite(tmp_path, defenses, CLEAN, [{**TASK, "readouts": ["plain"]}]))
    assert "the loss of epoch 1, step 1 is inf" in str(ran.failed[0].error)


def test_refusal_is_kept_beside_the_label(tmp_path: Path) -> None:
    defenses = {"linear": {"use": "toy/linear", "threshold": 0.95}}
    ran = Ran(suite(tmp_path, defenses, CLEAN, [TASK]))
    plain, reject = ran.outcomes(readout="plain"), ran.outcomes(readout="reject")
    assert not plain["rejected"].any()
    assert (reject["rejected"] == (reject["score"] < 0.95)).all()
    assert reject["rejected"].any()
    assert reject["label"].tolist() == plain["label"].tolist()


def test_a_file_among_several_that_changes_after_the_plan_stops_the_job(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"0.{number}")
    defenses = {"files": {"use": "toy/files", "means": [f"{number}.txt" for number in range(10)]}}
    path = suite(tmp_path, defenses, {"clean": {"use": "none"}}, [{**TASK, "defenses": ["files"]}])
    ran = Ran(path)
    assert not ran.failed
    logits = np.stack(ran.outcomes()["logits"].to_list())
    assert len(np.unique(logits[0])) == 10
    job = ran.plan.conditions[0].job.victim.train
    (tmp_path / "7.txt").write_text("0.75")
    with pytest.raises(InputError, match=r"7\.txt changed since the run was planned"):
        unchanged(job.defense, tmp_path)


def test_thresholds_and_the_size_of_the_defense_stand_beside_the_answers(tmp_path: Path) -> None:
    task = {**TASK, "defenses": ["bounded"]}
    ran = Ran(suite(tmp_path, {"bounded": {"use": "toy/bounded"}}, {"clean": {"use": "none"}}, [task]))
    plain, refusing = (ran.outcomes(readout=readout) for readout in ("plain", "reject"))
    assert not ran.failed
    assert plain["thresholds"].isna().all()
    thresholds = np.stack(refusing["thresholds"].to_list())
    assert thresholds.shape == (60, 10)
    assert (thresholds == thresholds[0]).all()
    # What is stored is enough to judge by: refused is what lies below its class's threshold.
    logits = np.stack(refusing["logits"].to_list())
    own = logits.max(1) < thresholds[0][logits.argmax(1)]
    assert (refusing["rejected"] == own).all()
    assert own.any()
    assert not own.all()
    assert (plain["parameters"] == 64 * 10 + 10).all()


def test_a_served_threshold_needs_no_new_training(tmp_path: Path) -> None:
    defenses = {"linear": {"use": "toy/linear", "inference": {"threshold": [0.0, 0.95]}}}
    ran = Ran(suite(tmp_path, defenses, CLEAN, [{**TASK, "readouts": ["reject"]}]))
    assert sum(isinstance(each.job, Train) for each in ran.done) == 1
    assert not ran.outcomes(**{"inference.threshold": 0.0})["rejected"].any()
    assert ran.outcomes(**{"inference.threshold": 0.95})["rejected"].any()


def test_an_attacker_who_knows_of_the_refusal_is_accepted_where_it_wins(tmp_path: Path) -> None:
    """The refusal of `toy/trapped` catches every step that does not avoid it, whatever was drawn."""
    attacks = {"pgd": {"use": "pgd", "steps": 40, "loss": "margin", "start": "zero"}}
    task = {
        **TASK,
        "threat": {"norm": "linf", "radius": 0.4},
        "readouts": ["reject"],
        "views": ["reject", "logits"],
        "seeds": [0, 1, 2],
    }
    ran = Ran(suite(tmp_path, {"trapped": {"use": "toy/trapped"}}, attacks, [task]))
    assert not ran.failed
    for seed in task["seeds"]:
        aware, naive = (ran.outcomes(view=view, seed=seed) for view in ("reject", "logits"))
        for rows in (aware, naive):
            assert (rows["label"] != rows["truth"]).all()
        assert not aware["rejected"].any()
        assert naive["rejected"].all()


def test_parts_arrive_fitted_and_are_stored_with_what_contains_them(tmp_path: Path) -> None:
    defenses = {**LINEAR, "top": {"use": "toy/stacked", "base": "linear"}}
    ran = Ran(suite(tmp_path, defenses, CLEAN, [{**TASK, "readouts": ["plain"]}]))
    assert not ran.failed
    assert ran.outcomes(defense="top")["label"].tolist() == ran.outcomes(defense="linear")["label"].tolist()


def test_training_a_part_further_leaves_the_defense_it_came_from_alone(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    alone = Ran(suite(tmp_path, LINEAR, CLEAN, [task]), tmp_path / "alone")
    defenses = {"top": {"use": "toy/stacked", "base": "linear", "forget": True}, **LINEAR}
    ran = Ran(suite(tmp_path, defenses, {**CLEAN, **PGD}, [task]))
    assert not ran.failed
    one, other = alone.outcomes(), ran.outcomes(defense="linear", attack="clean")
    assert one["label"].tolist() == other["label"].tolist()
    assert ran.outcomes(defense="top", attack="clean")["label"].nunique() == 1


def test_a_parameterised_view_is_looked_through_as_asked(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits", {"use": "scaled", "temperature": 50.0}]}
    ran = Ran(suite(tmp_path, LINEAR, PGD, [task]))
    views = {cell.coordinates["view"] for cell in ran.plan.conditions}
    assert views == {"logits", "scaled(temperature=50.0)"}
    assert len(ran.outcomes(view="scaled(temperature=50.0)")) == 60


def test_an_inversion_is_searched_by_the_attacks_that_ask_for_it(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["code"]}
    ran = Ran(suite(tmp_path, LINEAR, {**CLEAN, "code": {"use": "toy/code"}}, [task]))
    rows, clean = ran.outcomes(attack="code"), ran.outcomes(attack="clean")
    assert (rows["label"] == rows["truth"]).sum() < (clean["label"] == clean["truth"]).sum()
    # One pass of invert, classify, energy and decode for each image.
    assert (rows["forwards"] == 4).all()
    assert (rows["backwards"] == 2).all()


def test_a_decision_attack_sees_the_readouts_answers_and_refusals(tmp_path: Path) -> None:
    task = {**TASK, "threat": {"norm": "linf", "radius": 0.4}}
    ran = Ran(suite(tmp_path, LINEAR, {"answers": {"use": "toy/answers"}}, [task]))
    assert {cell.coordinates["view"] for cell in ran.plan.conditions} == {"decision:plain", "decision:reject"}
    rows = ran.outcomes(readout="reject")
    moved = rows["distance"] > 0
    assert moved.any()
    # It keeps a point only where the read-out accepted it and was wrong.
    assert (rows.loc[moved, "label"] != rows.loc[moved, "truth"]).all()
    assert not rows.loc[moved, "rejected"].any()


def test_a_task_may_name_the_read_out_whose_answers_a_decision_attack_sees(tmp_path: Path) -> None:
    """Crafted on the answers that are never refused, and shown to the read-out that refuses."""
    attacks = {"answers": {"use": "toy/answers"}, "fgsm": {"use": "fgsm"}}
    task = {**TASK, "readouts": ["reject"], "threat": {"norm": "linf", "radius": 0.4}}
    task["views"] = ["logits", "decision:plain", "decision:{readout}"]
    ran = Ran(suite(tmp_path, LINEAR, attacks, [task]))
    seen = {(cell.coordinates["attack"], cell.coordinates["view"]) for cell in ran.plan.conditions}
    assert seen == {
        ("answers", "decision:plain"),
        ("answers", "decision:reject"),
        ("fgsm", "logits"),
    }
    unaware, aware = (ran.outcomes(attack="answers", view=f"decision:{name}") for name in ("plain", "reject"))
    assert unaware["rejected"].sum() > aware["rejected"].sum()
    with pytest.raises(InputError, match="unknown read-out 'plan'; did you mean 'plain'"):
        Ran(suite(tmp_path, LINEAR, attacks, [{**task, "views": ["decision:plan"]}]))
    with pytest.raises(InputError, match="answers have no parameters and are asked once"):
        Ran(suite(tmp_path, LINEAR, attacks, [{**task, "views": [{"use": "decision:plain", "draws": 2}]}]))


def test_a_target_is_an_offset_from_the_truth_and_stands_in_the_rows(tmp_path: Path) -> None:
    attacks = {"towards": {"use": "toy/towards", "targets": "others"}}
    ran = Ran(suite(tmp_path, LINEAR, attacks, [{**TASK, "readouts": ["plain"], "views": ["logits"]}]))
    for offset in (1, 9):
        rows = ran.outcomes(target=offset)
        assert ((rows["truth"] + offset) % 10 == rows["target"]).all()


def test_a_random_target_is_never_the_truth(tmp_path: Path) -> None:
    attacks = {"towards": {"use": "toy/towards", "targets": "random"}}
    ran = Ran(suite(tmp_path, LINEAR, attacks, [{**TASK, "readouts": ["plain"], "views": ["logits"]}]))
    rows = ran.outcomes(target="random")
    offsets = (rows["target"] - rows["truth"]) % 10
    assert (offsets != 0).all()
    assert offsets.nunique() > 5


def test_an_attack_without_a_radius_is_read_at_every_radius(tmp_path: Path) -> None:
    task = {
        **TASK,
        "threat": {"norm": "l2", "radius": [0.5, 1.0]},
        "readouts": ["plain"],
        "views": ["logits"],
    }
    ran = Ran(suite(tmp_path, LINEAR, {"minimal": {"use": "toy/minimal"}}, [task]))
    rows = ran.outcomes(radius=0.5)
    assert rows["distance"].max() > 0.5
    assert (rows.loc[~rows["failed"], "label"] != rows.loc[~rows["failed"], "truth"]).all()


def test_answers_that_differ_between_two_asks_are_seen(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, {"coin": {"use": "toy/random"}, **LINEAR}, CLEAN, [TASK]))
    coin = ran.outcomes(defense="coin")["differs"]
    # Every shard is asked again: 25, 25 and 10 images.
    for shard in (coin.iloc[:25], coin.iloc[25:50], coin.iloc[50:]):
        assert shard.astype(bool).mean() > 0.4
    assert not ran.outcomes(defense="linear", readout="plain")["differs"].astype(bool).any()


def test_an_answer_that_is_no_number_is_nobodys_label(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, {"coin": {"use": "toy/random", "nan": True}}, CLEAN, [TASK]))
    assert (ran.outcomes(defense="coin")["label"] == -1).all()


def test_draws_keyed_by_image_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    path = suite(tmp_path, LINEAR, PGD, [task])
    whole = Ran(path).outcomes()
    path.write_text(path.read_text().replace("shard: 25", "shard: 7"))
    cut = Ran(path, tmp_path / "cut").outcomes()
    assert cut["label"].tolist() == whole["label"].tolist()
    assert np.abs(cut["l2"] - whole["l2"]).max() < 1e-5


def test_draws_keyed_by_shard_are_shared_by_a_shard_and_differ_between_shards(tmp_path: Path) -> None:
    ran = Ran(suite(tmp_path, LINEAR, {"common": {"use": "toy/common"}}, [{**TASK, "readouts": ["plain"]}]))
    split = load(ran.plan.suite.data["digits"])
    signs = []
    for craft in sorted(
        (job for job in ran.plan.graph() if isinstance(job, Craft)), key=lambda job: job.start
    ):
        made = load_file(ran.store.artefact("craft", craft.key))
        x = split.images[craft.start : craft.stop].clone()
        z = x.clone()
        z[made["moved"]] = made["images"]
        # Where neither bound of the box cuts, the move is the pattern itself.
        free = (x > 0.1) & (x < 0.9)
        step = torch.where(free, (z - x).sign(), torch.nan)
        pattern = step.nanmean(0)
        assert (pattern.abs()[free.any(0)] == 1).all()
        signs.append(pattern)
    both = ~signs[0].isnan() & ~signs[1].isnan()
    assert (signs[0][both] != signs[1][both]).any()


def test_training_goes_on_from_its_last_epoch_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.runner import training

    path = suite(
        tmp_path, {"linear": {"use": "toy/linear", "epochs": 5}}, CLEAN, [{**TASK, "readouts": ["plain"]}]
    )
    whole = Ran(path, tmp_path / "whole")
    save = training.Trainer._save

    def dies(self: Any, done: int, *rest: Any) -> None:
        save(self, done, *rest)
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        Ran(path, tmp_path / "killed")
    monkeypatch.undo()
    again = Ran(path, tmp_path / "killed")
    assert [facts["done"] for facts in again.said] == [4, 5]
    (job,) = [job for job in whole.plan.graph() if isinstance(job, Train)]
    assert again.store.receipt("train", job.key)["resumed_from_epoch"] == 3
    one = load_file(whole.store.artefact("train", job.key))
    other = load_file(again.store.artefact("train", job.key))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not again.store.partial(job.key).exists()


def test_a_shard_that_does_not_fit_is_computed_in_chunks_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toys

    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    path = suite(tmp_path, LINEAR, PGD, [task])
    whole = Ran(path, tmp_path / "whole").outcomes()
    plain = toys.Linear.logits

    def small(self: Any, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 12 and torch.is_grad_enabled() and x.requires_grad:
            raise torch.OutOfMemoryError("no room")
        return plain(self, x)

    monkeypatch.setattr(toys.Linear, "logits", small)
    ran = Ran(path, tmp_path / "small")
    assert not ran.failed
    assert {done.receipt["chunk"] for done in ran.done if isinstance(done.job, Craft)} == {12, None}
    assert ran.outcomes()["label"].tolist() == whole["label"].tolist()
    assert np.abs(ran.outcomes()["l2"] - whole["l2"]).max() < 1e-5


def test_queries_are_counted_by_example(tmp_path: Path) -> None:
    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    attacks = {"pgd": {"use": "pgd", "steps": 6, "drop": False, "keep": "last"}}
    rows = Ran(suite(tmp_path, LINEAR, attacks, [task])).outcomes()
    assert set(rows["backwards"]) == {6}
    assert set(rows["forwards"]) <= {6, 7}


@pytest.mark.parametrize(("phase", "done"), [(0, 2), (1, 1), (1, 3)])
def test_a_training_of_two_phases_goes_on_in_the_phase_it_was_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: int, done: int
) -> None:
    from bench.runner import training

    defenses = {"linear": {"use": "toy/linear", "epochs": 3, "phases": 2}}
    path = suite(tmp_path, defenses, CLEAN, [{**TASK, "readouts": ["plain"]}])
    whole = Ran(path, tmp_path / "whole")
    assert [facts["done"] for facts in whole.said] == [1, 2, 3, 1, 2, 3]
    save = training.Trainer._save

    def dies(self: Any, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        if (self._phase, number) == (phase, done):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        Ran(path, tmp_path / "killed")
    monkeypatch.undo()
    again = Ran(path, tmp_path / "killed")
    assert len(again.said) == 6 - 3 * phase - done
    (job,) = [job for job in whole.plan.graph() if isinstance(job, Train)]
    one = load_file(whole.store.artefact("train", job.key))
    other = load_file(again.store.artefact("train", job.key))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_does_not_go_on_from_an_epoch_of_other_code(tmp_path: Path) -> None:
    from bench.runner.training import Trainer

    split = load(DataSpec.model_validate({"name": "digits", "size": 20}))
    net = torch.nn.Linear(2, 2)

    def epochs(code: dict[str, str]) -> int:
        trainer = Trainer(split, "key", torch.device("cpu"), keep=tmp_path, code=code)
        return len(list(trainer.epochs(2, net)))

    assert epochs({"a": "1"}) == 2
    assert epochs({"a": "1"}) == 0
    assert epochs({"a": "2"}) == 2


def test_every_epoch_of_every_training_has_draws_and_an_order_of_its_own() -> None:
    from bench.runner.training import Trainer

    split = load(DataSpec.model_validate({"name": "digits", "size": 20}))

    def drawn(key: str) -> list[tuple[float, ...]]:
        found = []
        for epoch in Trainer(split, key, torch.device("cpu")).epochs(3, torch.nn.Linear(2, 2)):
            ((_, labels, noise),) = epoch.batches(20)
            found.append(
                (torch.rand(()).item(), *noise.uniform(()).sort().values.tolist()[:2], *labels.tolist())
            )
        return found

    one, other = drawn("a"), drawn("b")
    assert one == drawn("a")
    every = one + other
    # The global generator, the noise of the images, and the order that they come in.
    for part in (slice(0, 1), slice(1, 3), slice(3, None)):
        assert len({draws[part] for draws in every}) == len(every)


def test_numbers_of_two_networks_never_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import toys

    task = {**TASK, "readouts": ["plain"], "views": ["logits"]}
    first = Ran(suite(tmp_path, LINEAR, CLEAN, [task]))
    # Only evaluations came along, as in a clone; training again gives another network, as on a GPU.
    for kind in ("train", "craft"):
        shutil.rmtree(first.store.root / kind)
    fit = toys.Linear.fit

    def other(self: Any, *given: Any) -> None:
        fit(self, *given)
        with torch.no_grad():
            self.linear.bias[0] += 100

    monkeypatch.setattr(toys.Linear, "fit", other)
    path = suite(tmp_path, LINEAR, {**CLEAN, **PGD}, [task])
    second = Ran(path)
    assert {
        cell.coordinates["attack"] for cell in second.plan.conditions if cell.job in second.state.done
    } == {"clean"}
    third = Ran(path)
    assert {type(each.job) for each in third.done} == {Craft, Evaluate}
    assert (third.outcomes(attack="clean")["label"] == 0).mean() > 0.9
    assert not Ran(path).done


def test_a_process_computes_repeatably_and_in_full_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"deterministic": True, "benchmark": False, "allow_tf32": False}
    for name, value in wanted.items():
        monkeypatch.setattr(torch.backends.cudnn, name, not value)
    prepare(WorkerContext(store=tmp_path, folder=tmp_path, data_root=None, device="cpu", sources={}))
    assert {name: getattr(torch.backends.cudnn, name) for name in wanted} == wanted


def _swallowed() -> None:
    with suppress(Exception):
        time.sleep(5)


def _renamed() -> None:
    try:
        time.sleep(5)
    except OvertimeError as error:
        raise ValueError("something broke") from error


@pytest.mark.parametrize("block", [_swallowed, _renamed, lambda: time.sleep(5)])
def test_what_took_too_long_never_looks_done_and_no_alarm_stays_on(block: Callable[[], None]) -> None:
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(OvertimeError, match=r"longer than its limit of 0\.1 s"), limited(0.1):
        block()
    assert time.monotonic() - began < 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize("of", ["installed", "own"])
def test_a_limit_waits_for_the_import_of_an_installed_module_to_leave_none_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """Half of `sympy`, which torch imports when it trains, would fail all later jobs of the process."""
    (tmp_path / "slowly.py").write_text(
        "import time\nend = time.monotonic() + 1\n"
        "while time.monotonic() < end:\n    time.sleep(0.01)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(limits, "installed", lambda module: of == "installed")
    monkeypatch.delitem(sys.modules, "slowly", raising=False)

    def work() -> None:
        importlib.import_module("slowly")
        time.sleep(60)

    with pytest.raises(OvertimeError), limited(0.2):
        work()
    found = sys.modules.pop("slowly", None)
    assert getattr(found, "whole", False) == (of == "installed")


def test_an_error_within_the_limit_is_its_own() -> None:
    with pytest.raises(ValueError, match="own"), limited(5):
        raise ValueError("own")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
