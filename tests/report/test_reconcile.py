"""Printed numbers beside ours: compared where both answer one question, and said what differs where not."""

import copy
import csv
import json
import re
import subprocess
import sys
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from manifests import clean, condition, first, manifest, paper, rows
from scipy.stats import binomtest

from bench.errors import InputError
from bench.report import published, reconcile
from bench.report.render import reconciled
from bench.report.render.text import WIDTH
from bench.runner.worker import describe
from bench.suite import planner, resolve

PAPERS = published.papers()
REPOSITORY = Path(__file__).parents[2]
WRN = {"net": "wrn-40-2", "width": 1.0, "hidden": None}
LABELS = {"CNN": ("cnn", "last"), "CNN-F (last)": ("cnnf", "last"), "CNN-F (avg)": ("cnnf", "avg")}


def ours(n=100, seeds=(0,), radius=0.0315, data="cifar10", **tables):
    """Return a suite of the form of CNN-F's table 3 that agrees with it, and outcomes drawn at random."""
    given, outcomes = copy.deepcopy(paper(n=n, seeds=seeds))
    given["data"]["digits"]["name"] = data
    for each in (*given["conditions"], *given["skips"]):
        each["coordinates"]["radius"] = radius
    given["tables"]["T"]["rows"] = {
        name: {"defense": defense, "readout": readout} for name, (defense, readout) in LABELS.items()
    }
    given["tables"]["T"] |= tables
    feedback = {**WRN, "cycles": 2, "ind": 5, "clean_weight": 0.05}
    given["defenses"] = {
        "cnn": {"use": "cnn", "version": 1, "params": WRN},
        "cnnf": {"use": "cnnf", "version": 1, "params": feedback},
    }
    given["attacks"] = {
        name: {"use": name, "version": 1, "params": {}} for name in ("clean", "pgd", "spsa", "transfer")
    }
    return given, outcomes


def found(given, outcomes, asked=(), jobs=None):
    return reconcile.reconcile(given, "T", outcomes.get, (jobs or {}).get, asked)


def only(reconciliation):
    (one,) = reconciliation.found
    return one


def reasons(one):
    return {reason for line in one.lines for reason in line.reasons}


# --- what is compared --------------------------------------------------------------------------------


def test_a_printed_number_stands_beside_ours_with_difference_and_interval():
    given, outcomes = ours()
    one = only(found(given, outcomes, ["cnnf/3"]))
    # Every printed number but Min and those of the CNN's transfer, which the paper has not; Min is ours, too.
    assert len(one.lines) == sum(
        each is not None for row in PAPERS["cnnf/3"]["rows"].values() for each in row.values()
    )
    assert not reasons(one)
    for line in one.lines:
        printed = PAPERS["cnnf/3"]["rows"][line.paper_row][line.paper_column]
        assert (line.printed.value, line.printed.std) == (printed["mean"], printed["std"])
        assert line.paper_row == line.row[0]
        if line.column == "Min":
            continue
        defense, readout = LABELS[line.row[0]]
        attack, _, way = line.column.lower().replace("(", "").replace(")", "").partition(" ")
        way = "first" if defense == "cnn" and way == "e2e" else way
        frame = outcomes[f"{attack}-{way}-{defense}-{readout}-0"]
        held, n = int((frame["label"] == frame["truth"]).sum()), len(frame)
        assert line.difference == pytest.approx(100 * held / n - printed["mean"], abs=1e-9)
        ends = binomtest(held, n).proportion_ci(0.95, "wilson")
        assert line.within == (100 * ends.low <= printed["mean"] <= 100 * ends.high)
    assert {line.within for line in one.lines} == {True, False}


@pytest.mark.parametrize("held", [457, 458, 459, 460, 489, 518, 519, 520, 521, 522])
def test_the_ends_of_the_interval_are_those_of_wilson(held):
    # The paper prints 48.90, and the intervals of these shares of 1,000 end about there.
    given, outcomes = ours(n=1000)
    outcomes["pgd-first-cnnf-last-0"] = rows(first(1000, held))
    one = only(found(given, outcomes, ["cnnf/3"]))
    (line,) = (each for each in one.lines if each.row == ("CNN-F (last)",) and each.column == "PGD (first)")
    ends = binomtest(held, 1000).proportion_ci(0.95, "wilson")
    assert line.within == (100 * ends.low <= 48.90 <= 100 * ends.high)
    assert line.within or held not in range(460, 519)


def test_a_number_of_ours_that_is_not_there_is_said_and_not_compared():
    given, outcomes = ours()
    got = found(given, {}, ["cnnf/3"])
    assert not any(line.compared or line.within or line.difference for line in only(got).lines)
    assert "20 numbers of ours are not there." in reconciled.written([got], "text")
    # Without one of its attacks Min is a bound, which no number can lie within.
    del outcomes["pgd-first-cnn-last-0"]
    of = {
        (line.paper_row, line.paper_column): line for line in only(found(given, outcomes, ["cnnf/3"])).lines
    }
    assert not of["CNN", "pgd_first"].compared
    least = of["CNN", "min"]
    assert (least.cell.bound, least.within) == ("≤", None)
    assert least.difference == pytest.approx(100 * least.cell.estimate.value - 42.31)


def test_known_differences_come_from_the_register_where_they_move_a_number():
    given, outcomes = ours()
    one = only(found(given, outcomes, ["cnnf/3"]))
    known = {(line.paper_row, line.paper_column): set(line.known) for line in one.lines}
    assert "D-12" in known["CNN", "spsa_first"]
    assert "D-12" not in known["CNN", "pgd_first"]
    assert "D-11" in known["CNN-F (avg)", "pgd_e2e"]
    assert "D-11" not in known["CNN-F (last)", "pgd_e2e"]
    assert set(one.known) == set.union(*known.values())
    # What the task file says of an entry is not said twice.
    table = {
        "table": "cnnf/3",
        "columns": {"PGD (first)": "pgd_first"},
        "differences": ["SPSA is short (D-12)."],
    }
    given["tables"]["T"]["published"] = table
    one = only(found(given, outcomes))
    assert "D-12" not in one.known
    assert one.differences == ("SPSA is short (D-12).",)


def test_the_settings_cite_what_the_register_and_the_papers_have():
    settings = reconcile._settings()
    register = re.findall(r"^\| (D-\d\d) \|", (REPOSITORY / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert set(settings["register"]) <= set(register)
    cited = {each for table in settings["tables"].values() for each in table["known"]}
    assert cited == set(settings["register"])
    for key, table in settings["tables"].items():
        names, columns = reconcile._names_of(key)
        for where in (table, *table["known"].values()):
            assert set(where.get("rows", ())) <= set(names), key
            assert set(where.get("columns", ())) <= set(columns), key
    results = {key for key, each in PAPERS.items() if each["rows"] and each["metric"] != "width"}
    assert set(settings["tables"]) == results


# --- what is not compared ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": "svhn"}, "data: svhn here, cifar-10 in the paper"),
        ({"radius": 0.1}, "radius: 0.1 here, 8/255 in the paper"),
        ({"radius": None}, "radius: none here, 8/255 in the paper"),
    ],
)
def test_another_data_set_or_radius_is_not_compared(change, reason):
    one = only(found(*ours(**change), ["cnnf/3"]))
    attacked = [line for line in one.lines if line.paper_column != "clean" or "data" in change]
    assert all(line.reasons == (reason,) and line.difference is None for line in attacked)
    # Unmoved images have no radius.
    assert all(line.compared for line in one.lines if line not in attacked)


def test_a_radius_is_the_same_but_for_the_rounding_of_papers():
    assert not reasons(only(found(*ours(radius=8 / 255), ["cnnf/3"])))
    assert not reasons(only(found(*ours(radius=0.031), ["cnnf/3"])))
    assert reasons(only(found(*ours(radius=9 / 255), ["cnnf/3"])))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"net": "b2"}, "architecture: net b2 here, net wrn-40-2 in the paper"),
        ({"width": 0.5}, "architecture: width 0.5 here, width 1 in the paper"),
        ({"ind": 4}, "architecture: ind 4 here, ind 5 in the paper"),
    ],
)
def test_another_architecture_is_not_compared(changes, reason):
    given, outcomes = ours()
    given["defenses"]["cnnf"]["params"] |= changes
    one = only(found(given, outcomes, ["cnnf/3"]))
    assert {line.reasons for line in one.lines if "CNN-F" in line.paper_row} == {(reason,)}
    assert not any(line.reasons for line in one.lines if line.paper_row == "CNN")


def test_another_kind_of_defense_is_said_before_its_parameters():
    given, outcomes = ours()
    given["defenses"]["cnnf"] = {"use": "module", "version": 1, "params": {"width": 3}}
    one = only(found(given, outcomes, ["cnnf/3"]))
    assert reasons(one) == {"defense: module here, cnnf in the paper"}


def test_norm_attack_metric_and_readout_are_compared():
    given, outcomes = ours()
    for each in given["conditions"]:
        each["coordinates"]["norm"] = "l2"
        if each["coordinates"]["attack"] == "spsa":
            each["facts"]["use"] = "square"
    given["tables"]["T"]["columns"]["Clean"]["metric"] = "rejection"
    given["tables"]["T"]["rows"]["CNN-F (last)"]["readout"] = "avg"
    one = only(found(given, outcomes, ["cnnf/3"]))
    of = {(line.paper_row, line.paper_column): set(line.reasons) for line in one.lines}
    assert of["CNN", "clean"] == {"metric: rejection here, accuracy in the paper"}
    assert of["CNN", "pgd_first"] == {"norm: l2 here, linf in the paper"}
    assert "attack: square here, spsa in the paper" in of["CNN", "spsa_first"]
    assert "read-out: avg here, last in the paper" in of["CNN-F (last)", "pgd_first"]


def test_fewer_training_images_and_parts_are_known_of_stored_results():
    conditions = [
        clean("still", data="digits", defense="api", readout="label", radius=8 / 255),
        condition("attacked", defense="api", readout="label", radius=8 / 255, view="bpda"),
    ]
    table = {"title": "x", "rows": {"API-Net": {"defense": "api"}}}
    table["columns"] = {"Clean": {"attack": "clean"}, "PGD-40": {"attack": "pgd"}}
    given = manifest(conditions, table, data={"digits": {"name": "cifar10"}})
    given["defenses"] = {"api": {"use": "apinet", "params": {"eps_ap": 14 / 255}}}
    given["attacks"] = {"pgd": {"use": "pgd", "params": {"steps": 40}}}
    outcomes = {each["job"]: rows(first(20, 12), moved=each["job"] != "still") for each in conditions}
    part = {"defense": {"use": "madry", "params": {"net": "resnet18", "width": 1.0}}}
    train = {
        "defense": given["defenses"]["api"],
        "data": {"name": "cifar10", "size": None},
        "parts": {"base": part},
    }
    jobs = {name: {"victim": {"train": train}} for name in outcomes}
    assert not reasons(only(found(given, outcomes, ["apinet/1"], jobs)))
    train["data"]["size"] = 10000
    part["defense"]["params"]["net"] = "smallcnn"
    given["attacks"]["pgd"]["params"]["steps"] = 20
    one = only(found(given, outcomes, ["apinet/1"], jobs))
    both = {
        "training data: 10000 images of cifar10 here, all of cifar-10 in the paper",
        "architecture: base.net smallcnn here, base.net resnet18 in the paper",
    }
    of = {line.paper_column: set(line.reasons) for line in one.lines}
    assert of == {"clean": both, "pgd40": {*both, "attack: 20 steps here, 40 steps in the paper"}}


def test_a_row_is_that_of_the_paper_whose_setting_is_most_like_ours():
    conditions = [clean(name, defense=name, readout="label", n=20) for name in ("Standard", "Madry")]
    table = {
        "title": "x",
        "rows": ["defense"],
        "columns": {"Clean": {"attack": "clean"}, "FGSM": {"attack": "pgd"}},
    }
    conditions += [condition("f", defense="Madry", readout="label", radius=0.3)]
    given = manifest(conditions, table, data={"digits": {"name": "mnist"}})
    net = {"net": "smallcnn", "width": 1.0}
    given["defenses"] = {name: {"use": name.lower(), "params": net} for name in ("Standard", "Madry")}
    outcomes = {each["job"]: rows(first(20, 15), moved=False) for each in conditions}
    one = only(found(given, outcomes, ["apinet/3"]))
    assert {line.paper_row for line in one.lines} == {"Standard (SmallCNN)", "Madry (SmallCNN)"}
    given["defenses"]["Standard"]["params"] = {"net": "lenet", "width": 1.0}
    one = only(found(given, outcomes, ["apinet/3"]))
    assert {line.paper_row for line in one.lines} == {"Standard (LeNet)", "Madry (SmallCNN)"}


# --- which table -------------------------------------------------------------------------------------


def test_without_a_name_those_tables_are_meant_that_look_like_ours():
    names = [each.paper for each in found(*ours()).found]
    assert names == ["cnnf/2", "cnnf/3"]
    given, outcomes = ours()
    given["tables"]["T"]["published"] = {"table": "cnnf/3"}
    assert [each.paper for each in found(given, outcomes).found] == ["cnnf/3"]


def test_where_nothing_was_published_one_sentence_says_so():
    given, outcomes = ours()
    given["tables"]["T"]["rows"] = {"Mine": {"defense": "cnnf", "readout": "avg"}}
    got = found(given, outcomes)
    assert got.found == ()
    text = reconciled.written([got], "text")
    assert " ".join(text.split()).endswith(
        "No published table has rows and columns of these names, so that nothing is compared."
    )
    (one,) = found(given, outcomes, ["cnnf/3"]).found
    assert one.said == "cnnf/3 has no number whose row and column have the names of ours"
    (one,) = found(given, outcomes, ["cnnf/fig5"]).found
    assert one.said == "cnnf/fig5 has curves, and no printed number"
    (one,) = found(given, outcomes, ["sdim/8"]).found
    assert one.said == "sdim/8 is no table of results"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cnnf/33", "cnnf/3"), ("cnff", "cnnf"), ("apinett", "apinet"), ("sdim/10", "sdim/1")],
)
def test_an_unknown_paper_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(
        InputError, match=re.escape(f"--paper {name}: no such paper or table; did you mean '{nearest}'?")
    ):
        reconcile.asked_papers(name)


def test_a_paper_is_all_of_its_tables():
    assert reconcile.asked_papers("cnnf") == [key for key in PAPERS if key.startswith("cnnf/")]
    assert reconcile.asked_papers("sdim/5") == ["sdim/5"]


# --- how it is written -------------------------------------------------------------------------------


@pytest.fixture
def mixed():
    """Return a comparison of which some numbers are compared, some differ, and one is not there."""
    given, outcomes = ours(seeds=(0, 1))
    given["defenses"]["cnnf"]["params"]["width"] = 0.5
    for seed in (0, 1):
        del outcomes[f"spsa-first-cnn-last-{seed}"]
    return found(given, outcomes, ["cnnf/3"])


def test_text_fits_into_80_columns(mixed):
    lines = reconciled.written([mixed], "text").splitlines()
    assert max(map(len, lines)) <= WIDTH
    shown = " ".join(" ".join(lines).split())
    assert "Of 20 numbers that both tables have, 14 are not compared, since they differ in" in shown
    assert "- architecture: width 0.5 here, width 1 in the paper (CNN-F (last); CNN-F (avg))" in shown
    assert "2 numbers of ours are not there." in shown


def test_csv_and_json_hold_every_number_of_both(mixed):
    lines = list(csv.DictReader(StringIO(reconciled.written([mixed], "csv"))))
    (document,) = json.loads(reconciled.written([mixed], "json"))
    (one,) = document["published"]
    assert len(lines) == len(one["numbers"]) == 20
    for line, number in zip(lines, one["numbers"], strict=True):
        assert line["published"] == str(number["published"])
        assert (line["compared"] == "True") == number["compared"]
        assert bool(line["reasons"]) == ("CNN-F" in line["paper_row"])
        if number["compared"]:
            assert number["difference"] == pytest.approx(number["value"] - number["published"], abs=1e-6)
            lies = None if number["bound"] else number["low"] <= number["published"] <= number["high"]
            assert number["within"] == lies
    assert sum(number["compared"] for number in one["numbers"]) == 4
    assert np.isclose(
        sum(number["published"] for number in one["numbers"]),
        sum(each["mean"] for row in PAPERS["cnnf/3"]["rows"].values() for each in row.values() if each),
    )


def test_markdown_has_a_row_for_each_compared_number(mixed):
    text = reconciled.written([mixed], "markdown")
    table = [line for line in text.splitlines() if line.startswith("| CNN")]
    assert len(table) == 6
    assert all(line.count(" | ") == 6 for line in table)
    assert "  - architecture: width 0.5 here" in text


def test_names_of_strangers_are_escaped():
    given, outcomes = ours()
    given["tables"]["T"]["title"] = "a | b"
    given["data"]["digits"]["name"] = "\x1b[31m"
    got = found(given, outcomes, ["cnnf/3"])
    assert "\x1b" not in reconciled.written([got], "text")
    assert "\x1b" not in reconciled.written([got], "markdown")
    assert "### Table T: a \\| b" in reconciled.written([got], "markdown")


# --- the command -------------------------------------------------------------------------------------


def call(*words):
    """Run the command line on the committed results."""
    command = [sys.executable, "-m", "bench.cli", "report", "suites/mnist.yaml", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--paper", "cnnf/33"], "--paper cnnf/33: no such paper or table; did you mean 'cnnf/3'?"),
        (["--published", "--table", "33"], "--table 33: mnist has no such table; did you mean '3'?"),
        (
            ["--published", "--format", "latex"],
            "published numbers are written as text, markdown, csv or json",
        ),
    ],
)
def test_the_command_refuses_what_is_not_there_with_the_nearest_name(words, said):
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_command_says_of_the_committed_results_what_keeps_them_from_being_compared():
    done = call("--published", "--table", "apinet", "--table", "breakdgm", "--paper", "apinet/3")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "training data: 10000 images of mnist here, all of mnist in the paper" in shown
    assert "radius: 0.1 here, 76.5/255 in the paper (FGSM)" in shown
    assert "architecture: width 0.5 here, width 1 in the paper (Standard; Madry; Trades)" in shown
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    assert "difference" not in done.stdout


# --- suites that were written from the papers, and such that were not -------------------------------------


@cache
def planned(path):
    """Return the manifest of a suite, and its evaluations as a worker would describe them."""
    plan = planner.make(resolve.load(REPOSITORY / path))
    jobs = {each.job.key: describe(each.job) for each in plan.conditions}
    return json.loads(json.dumps(plan.manifest())), jobs


@pytest.mark.parametrize("name", ["cnnf", "sdim", "apinet"])
def test_what_the_papers_suites_ask_is_what_the_papers_printed(name):
    given, jobs = planned(f"suites/{name}.yaml")
    own = {"Glow (10th Per.)", "ME-Net", "ME-Net (LeNet)"}
    seen = set()
    for key, table in given["tables"].items():
        if table["published"] is None:
            continue
        one = only(reconcile.reconcile(given, key, {}.get, jobs.get))
        assert reasons(one) == set(), one.paper
        seen.add(one.paper)
        # Every number of the paper but those of defenses that nobody has here.
        rows_ = PAPERS[one.paper]["rows"].items()
        printed = {
            (row, column)
            for row, numbers in rows_
            for column, number in numbers.items()
            if number is not None and row not in own and column != "me_net"
        }
        assert {(line.paper_row, line.paper_column) for line in one.lines} == printed, one.paper
    assert seen == {key for key in reconcile._settings()["tables"] if key.startswith(f"{name}/")}


@pytest.mark.parametrize("path", ["tasks.yaml", "suites/mnist.yaml"])
def test_smaller_suites_are_compared_with_no_paper(path):
    given, jobs = planned(path)
    every = list(PAPERS)
    for key in given["tables"]:
        got = reconcile.reconcile(given, key, {}.get, jobs.get, every)
        assert [each.paper for each in got.found] == every
        assert all(line.reasons for each in got.found for line in each.lines)
