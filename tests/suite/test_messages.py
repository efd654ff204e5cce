"""A hundred plausible mistakes in a task file: each message says where, what was found, and what to write."""

import inspect
import re
import sys
from pathlib import Path

import pydantic
import pytest

from bench.api import running
from bench.errors import InputError

GOOD = """\
data:
  digits: {name: digits, split: test, size: 60}
defenses:
  cnn: {use: cnn, training: standard, net: b2, width: 0.25, hidden: [16], epochs: 2, batch: 64}
  linear: {use: toy/linear, epochs: 1}
attacks:
  clean: {use: none}
  pgd: {use: pgd, steps: 5}
  cw: {use: cw-l2, steps: 5}
tasks:
  - data: digits
    threat: {norm: linf, radius: 8/255}
    defenses: [cnn]
    attacks: [clean, pgd]
    views: [first]
    seeds: [0]
tables:
  main:
    title: A table
    rows: [defense]
    columns: {Clean: {attack: clean}, PGD: {attack: pgd}}
    extra: [Min]
  curve:
    title: A curve
    where: {attack: pgd}
    rows: [defense]
    columns: [radius]
    figure: {x: radius}
"""

PGD, THREAT, SEEDS = "use: pgd, steps: 5", "{norm: linf, radius: 8/255}", "seeds: [0]"
ATTACKS = "attacks:\n  clean: {use: none}\n  pgd: {use: pgd, steps: 5}\n  cw: {use: cw-l2, steps: 5}"
CNN, SIZE = "batch: 64}", "size: 60}"
IN_THREAT = "threat: {norm: linf, radius: 8/255}"

ROWS: list[tuple[str, str, int, list[str]]] = [
    # what is replaced, by what, the line, and what the message must have
    # --- words of other tools, of attacks
    (PGD, "use: pgd, eps: 8/255", 8, ["attacks.pgd.eps", IN_THREAT]),
    (PGD, "use: pgd, epsilon: 0.03", 8, ["attacks.pgd.epsilon", IN_THREAT]),
    (PGD, "use: pgd, Eps: 0.03", 8, ["attacks.pgd.Eps", IN_THREAT]),
    (PGD, "use: pgd, radius: 8/255", 8, ["attacks.pgd.radius", IN_THREAT]),
    (PGD, "use: pgd, norm: l2", 8, ["attacks.pgd.norm", IN_THREAT]),
    (PGD, "use: pgd, alpha: 2/255", 8, ["alpha is called step_size here"]),
    (PGD, "use: pgd, eps_iter: 2/255", 8, ["eps_iter is called step_size here"]),
    (PGD, "use: pgd, stepsize: 2/255", 8, ["stepsize is called step_size here"]),
    (PGD, "use: pgd, step: 2/255", 8, ["step is called step_size now"]),
    (PGD, "use: pgd, iters: 40", 8, ["iters is called steps here"]),
    (PGD, "use: pgd, n_iter: 40", 8, ["n_iter is called steps here"]),
    (PGD, "use: pgd, iterations: 40", 8, ["iterations is called steps here"]),
    (PGD, "use: pgd, num_steps: 40", 8, ["num_steps is called steps here"]),
    (PGD, "use: pgd, n_restarts: 3", 8, ["n_restarts is called restarts here"]),
    (PGD, "use: pgd, random_start: true", 8, ["random_start is called start here"]),
    (PGD, "use: pgd, targeted: true", 8, ["attacks.pgd.targeted", "targets: next"]),
    (PGD, "use: pgd, target: 3", 8, ["attacks.pgd.target", "targets"]),
    (PGD, "use: pgd, loss_fn: ce", 8, ["loss_fn is called loss here"]),
    (PGD, "use: pgd, clip_min: 0", 8, ["images are in [0, 1]"]),
    (PGD, "use: pgd, batch_size: 64", 8, ["shard"]),
    (PGD, "use: pgd, device: cuda", 8, ["bench run --device cuda:0"]),
    (PGD, "use: pgd, seed: 3", 8, ["seeds: [0, 1, 2]"]),
    (PGD, "use: pgd, eot_iter: 20", 8, ["draws: 20"]),
    (PGD, "use: pgd, restart: 3", 8, ["attacks.pgd.restart", "did you mean 'restarts'"]),
    (PGD, "use: pgd, STEPS: 3", 8, ["attacks.pgd.STEPS", "did you mean 'steps'"]),
    # --- their values
    (PGD, "use: pgd, steps: 0", 8, ["attacks.pgd.steps", "of 1 or more, found 0"]),
    (PGD, "use: pgd, steps: 2.5", 8, ["expected a whole number, found 2.5"]),
    (PGD, "use: pgd, steps: many", 8, ["expected a whole number, found 'many'"]),
    (PGD, "use: pgd, steps: [5, 10]", 8, ["expected a whole number, found [5, 10]"]),
    (PGD, "use: pgd, steps: true", 8, ["expected a whole number, found true"]),
    (PGD, "use: pgd, steps: null", 8, ["expected a whole number, found null"]),
    (PGD, "use: pgd, step_size: -1", 8, ["expected a number above 0, found -1"]),
    (PGD, "use: pgd, step_size: 2 / 255 px", 8, ["a number or a fraction like 8/255"]),
    (PGD, "use: pgd, loss: CE", 8, ["expected ce, margin or dlr, found 'CE'", "did you mean 'ce'"]),
    (PGD, "use: pgd, loss: cross_entropy", 8, ["cross_entropy is called ce here"]),
    (PGD, "use: pgd, loss: cw", 8, ["cw is called margin here"]),
    (PGD, "use: pgd, drop: maybe", 8, ["expected true or false, found 'maybe'"]),
    (PGD, "use: pgd, targets: least", 8, ["expected none, others, next or random, found 'least'"]),
    (PGD, "use: pgd, targets: [0]", 8, ["attacks.pgd.targets[0]", "of 1 or more, found 0"]),
    (PGD, "use: pgd, time_limit: 10 min", 8, ["expected seconds, such as 600, found '10 min'"]),
    (PGD, "use: pgd, precision: fp16", 8, ["expected float32 or bf16-search, found 'fp16'"]),
    (PGD, "use: pgd, source: linear", 8, ["such as {defense: standard, view: logits}, found 'linear'"]),
    (PGD, "use: pgd, source: {defense: linear}", 8, ["attacks.pgd.source", "missing key 'view'"]),
    (PGD, "use: pgd, source: {defense: liner, view: logits}", 8, ["did you mean 'linear'"]),
    # --- names of attacks, defenses and data
    (PGD, "use: PGD", 8, ["unknown attack 'PGD'; did you mean 'pgd'"]),
    (PGD, "use: torchattacks/pgd", 8, ["did you mean 'torchattacks/PGD'"]),
    (PGD, "use: AutoAttack", 8, ["did you mean 'autoattack'"]),
    (PGD, "use: CW", 8, ["CW is called cw-l2 here"]),
    (PGD, "use: L2PGD", 8, ["did you mean 'foolbox/L2PGD'"]),
    (PGD, "use: bim", 8, ["bim is called pgd here"]),
    (PGD, "use: foolbox/PGD", 8, ["did you mean 'foolbox/L1PGD', 'foolbox/L2PGD' or 'foolbox/LinfPGD'?"]),
    (PGD, "use: torchattacks/deepfool", 8, ["did you mean 'torchattacks/DeepFool'?"]),
    (PGD, "use: autoattack/apgd-ce", 8, ["did you mean 'apgd' or 'autoattack'? Of a plug-in: no installed"]),
    (PGD, "use: acme/zzz", 8, ["unknown attack 'acme/zzz': no installed package has the entry point 'acme'"]),
    (PGD, "use: qqq", 8, ["unknown attack 'qqq'", "bench list attacks"]),
    ("clean: {use: none}", "clean: {use: clean}", 7, ["clean is called none here"]),
    ("clean: {use: none}", "clean: none", 7, ["attacks.clean", "such as {use: pgd, steps: 40}"]),
    ("clean: {use: none}", "clean: {}", 7, ["attacks.clean", "missing key 'use'"]),
    ("use: cnn,", "use: CNN,", 4, ["unknown defense 'CNN'; did you mean 'cnn'"]),
    ("use: cnn,", "use: pytorch,", 4, ["pytorch is called module here"]),
    ("name: digits,", "name: CIFAR-10,", 2, ["CIFAR-10 is called cifar10 here"]),
    ("name: digits,", "name: Digits,", 2, ["did you mean 'digits'"]),
    ("name: digits,", "name: ImageFolder,", 2, ["image-folder"]),
    ("name: digits,", "name: npz,", 2, ["npz is called arrays here"]),
    # --- data
    (SIZE, "size: 60, batch_size: 5}", 2, ["batch_size is called shard here"]),
    (SIZE, "n: 60}", 2, ["n is called size here"]),
    (SIZE, "size: 6000}", 2, ["digits test has 360 examples, size asks for 6000"]),
    (SIZE, "size: all}", 2, ["expected a whole number, found 'all'"]),
    (SIZE, "channels: 2}", 2, ["expected 1 or 3, found 2"]),
    (SIZE, "only: [3]}", 2, ["say with size"]),
    (SIZE, "image_size: 32}", 2, ["image_size is called resize here"]),
    (SIZE, "resize: [32, 32]}", 2, ["expected a whole number, found [32, 32]"]),
    ("split: test", "split: Test", 2, ["expected train or test, found 'Test'; did you mean 'test'"]),
    ("split: test", "split: val", 2, ["expected train or test, found 'val'"]),
    ("digits: {name: digits, split: test, size: 60}", "digits: digits", 2, ["such as {name: digits"]),
    (
        "name: digits,",
        "name: arrays, path: x.npz,",
        2,
        ["data.digits.path: unknown key; path is called test or train here"],
    ),
    # --- defenses
    (CNN, "batch_size: 64}", 4, ["batch_size is called batch here"]),
    (CNN, "learning_rate: 0.1}", 4, ["learning_rate is called lr here"]),
    (CNN, "width: wide}", 4, ["stands twice"]),
    ("hidden: [16]", "hidden: '16'", 4, ["expected a list such as [16], found '16'"]),
    ("net: b2", "net: resnet18", 4, ["expected b1, b2 or wrn-40-2, found 'resnet18'"]),
    ("training: standard", "training: adv", 4, ["expected adversarial or standard, found 'adv'"]),
    ("epochs: 1}", "epochs: 1, inference: {treshold: 1}}", 5, ["did you mean 'threshold'"]),
    ("epochs: 1}", "epochs: 1, inference: [1]}", 5, ["expected a mapping such as {eps_ap: [0.05, 0.1]}"]),
    ("use: toy/linear, epochs: 1", "use: module", 5, ["missing key 'build'"]),
    ("use: toy/linear, epochs: 1", "use: module, model: 'a:b'", 5, ["model is called build here"]),
    (
        "use: toy/linear, epochs: 1",
        "use: module, build: 'a:b', width: 16",
        5,
        ["linear.width: unknown key; arguments of build stand in arguments: {width: 16}"],
    ),
    # --- threats
    (THREAT, "linf 8/255", 12, ["such as {norm: linf, radius: 8/255}, found 'linf 8/255'"]),
    (THREAT, "{norm: linf, radius: 8}", 12, ["found 8", "did you mean 8/255"]),
    (THREAT, "{norm: linf, radius: [2/255, 16]}", 12, ["found 16", "did you mean 16/255"]),
    (THREAT, "{norm: linf, radius: 300}", 12, ["expected a", "found 300"]),
    (THREAT, "{norm: linf, radius: 0}", 12, ["expected a number above 0, found 0"]),
    (THREAT, "{norm: linf, radius: null}", 12, ["expected a number, found null"]),
    (THREAT, "{norm: linf, radius: []}", 12, ["expected at least 1 entry, found []"]),
    (THREAT, "{norm: linf, radius: -0.1}", 12, ["threat.radius: expected a number above 0, found -0.1"]),
    (THREAT, "{norm: linf, radius: [1/255, -0.1]}", 12, ["threat.radius[1]: expected a number above 0"]),
    (THREAT, "{norm: linf, eps: 8/255}", 12, ["eps is called radius here"]),
    (THREAT, "{radius: 8/255}", 12, ["missing key 'norm', such as norm: linf"]),
    (THREAT, "{norm: Linf, radius: 8/255}", 12, ["found 'Linf'; did you mean 'linf'"]),
    (THREAT, "{norm: inf, radius: 8/255}", 12, ["inf is called linf here"]),
    (THREAT, "{norm: .inf, radius: 8/255}", 12, ["is called linf here"]),
    (THREAT, "{norm: L2, radius: 8/255}", 12, ["found 'L2'; did you mean 'l2'"]),
    (THREAT, "{norm: 2, radius: 8/255}", 12, ["2 is called l2 here"]),
    (THREAT, "{norm: l7, radius: 8/255}", 12, ["expected linf, l2, l1 or l0, found 'l7'"]),
    # --- tasks
    (SEEDS, "seeds: 3", 16, ["a list of seeds, found 3; 3 seeds are [0, 1, 2], the seed 3 alone is [3]"]),
    (SEEDS, "seeds: 42", 16, ["the seed 42 alone is [42]"]),
    (SEEDS, "seeds: []", 16, ["expected at least 1 entry"]),
    (SEEDS, "seeds: [-1]", 16, ["tasks[0].seeds[0]", "of 0 or more, found -1"]),
    (SEEDS, "seed: 0", 16, ["seed is called seeds here"]),
    (SEEDS, "eps: 8/255", 16, ["tasks[0].eps", IN_THREAT]),
    (SEEDS, "limit: 0", 16, ["of 1 or more, found 0"]),
    (SEEDS, "n_examples: 100", 16, ["n_examples is called limit here"]),
    (SEEDS, "model: cnn", 16, ["model is called defenses here"]),
    ("attacks: [clean, pgd]", "attacks: pgd", 14, ["expected a list such as [pgd], found 'pgd'"]),
    ("attacks: [clean, pgd]", "attacks: [clean, PGD]", 14, ["did you mean 'pgd'"]),
    ("attacks: [clean, pgd]", "attacks: [cw]", 12, ["is made for l2, not 'linf'; take it out", "own in l2"]),
    ("views: [first]", "views: first", 15, ["expected a list such as [first], found 'first'"]),
    ("views: [first]", "views: [frist]", 15, ["no view 'frist' in cnn; did you mean 'first'"]),
    ("- data: digits", "- dataset: digits", 11, ["dataset is called data here"]),
    ("- data: digits", "- data: digit", 11, ["did you mean 'digits'"]),
    # --- the file
    (ATTACKS, "attacks: [none, pgd]", 6, ["attacks: expected a mapping such as {clean: {use: none}, "]),
    (ATTACKS, "attacks: {}\nextra: 3", 7, ["extra: unknown key"]),
    ("data:\n  digits", "dataset:\n  digits", 1, ["dataset is called data here"]),
    ("tables:", "device: gpu\ntables:", 17, ["bench run --device cuda:0"]),
    ("tables:", "results_dir: out\ntables:", 17, ["bench run --results DIR"]),
    ("tables:", "worst: perhaps\ntables:", 17, ["expected true or false, found 'perhaps'"]),
    ("tables:", "check: strict\ntables:", 17, ["such as {tolerance: 1.0, alpha: 0.01}, found 'strict'"]),
    ("tables:", "draws: 0\ntables:", 17, ["of 1 or more, found 0"]),
    # --- the language
    ("pgd]\n", "pgd\n", 15, ["not plain YAML: expected ',' or ']'", "; the [ of line 14 is still open"]),
    ("digits, split: test,", "digits split: test,", 2, ["not plain YAML: expected ',' or '}'"]),
    (
        "attacks: [clean, pgd]",
        "attacks: [clean, pgd] 3",
        14,
        ["not plain YAML: expected the next key or entry, found '3'"],
    ),
    ("title: A table", "title: A table\n   x: 3", 20, ["expected the next key or entry, found 'x'"]),
    # --- tables
    (
        THREAT,
        "{norm: linf, radius: [4/255, 0.1]}",
        18,
        ["(where: {radius: 4/255})", "(rows: [defense, radius])"],
    ),
    ("rows: [defense]", "rows: [model]", 18, ["unknown coordinate 'model'; model is called defense here"]),
    ("rows: [defense]", "rows: [network]", 18, ["network is called defense here"]),
    ("rows: [defense]", "rows: [dataset]", 18, ["dataset is called data here"]),
    ("rows: [defense]", "rows: [epsilon]", 18, ["epsilon is called radius here"]),
    ("rows: [defense]", "rows: [method]", 18, ["method is called attack here"]),
    ("rows: [defense]", "rows: [seeds]", 18, ["did you mean 'seed'?"]),
    ("figure: {x: radius}", "figure: true", 28, ["such as {x: radius}, found true"]),
    ("figure: {x: radius}", "figure: {x: eps}", 23, ["eps is called radius here"]),
    ("figure: {x: radius}", "figure: {x: radius, title: a}", 28, ["known: x, xlabel, ylabel"]),
    ("extra: [Min]", "extra: Min", 22, ["expected a list such as [Min], found 'Min'"]),
    ("extra: [Min]", "extra: [min]", 22, ["expected Min, Max or Worst, found 'min'; did you mean 'Min'"]),
    ("extra: [Min]", "metric: asr", 18, ["asr is called success here"]),
    ("extra: [Min]", "metric: Accuracy", 18, ["did you mean 'accuracy'"]),
    ("extra: [Min]", "metric: zzz", 18, ["unknown metric 'zzz'", "known: "]),
    ("extra: [Min]", "mean_over: [seeds]", 22, ["did you mean 'seed'"]),
    ("extra: [Min]", "bold: true", 22, ["expected weakest, found true"]),
    ("title: A table\n    rows", "rows", 18, ["missing key 'title', such as title: My network"]),
    (
        "    rows: [defense]\n    columns: {C",
        "    columns: {C",
        18,
        ["missing key 'rows', such as rows: [defense]"],
    ),
    ("PGD: {attack: pgd}}", "PGD: pgd}", 21, ["expected a selection such as {attack: pgd}, found 'pgd'"]),
    ("PGD: {attack: pgd}}", "PGD: {attack: PGD}}", 18, ["no condition has 'PGD'; did you mean 'pgd'"]),
    ("where: {attack: pgd}", "where: {eps: 8/255}", 23, ["eps is called radius here"]),
    ("where: {attack: pgd}", "filter: {attack: pgd}", 25, ["filter is called where here"]),
]

LEAKS = re.compile(
    r"valid dictionary|instance of|[Ii]nput should|valid list|pydantic|dict\b|NoneType|Traceback|Error\b"
)
CUES = (
    "expected",
    "did you mean",
    "is called",
    "such as",
    "known",
    "stand",
    "say",
    "bench ",
    "write",
    "are in",
)


def classes() -> set[str]:
    """Return the names of all classes of the harness and of pydantic."""
    found = set(dir(pydantic))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "bench" and module is not None:
            found |= {each for each, value in vars(module).items() if inspect.isclass(value)}
    # Words that people know.
    return {each for each in found if each[0].isupper()} - {"Any", "Literal", "Text"}


@pytest.mark.parametrize(("old", "new", "line", "words"), ROWS, ids=[new[:40] for _, new, _, _ in ROWS])
def test_a_mistake_is_answered_by_where_what_and_what_to_write(
    tmp_path: Path, old: str, new: str, line: int, words: list[str]
) -> None:
    assert old in GOOD
    path = tmp_path / "suite.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        running.planned(path, tmp_path / "results", None)
    message = str(caught.value)
    assert message.startswith(f"suite.yaml:{line}: "), message
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert not LEAKS.search(message), message
    said = re.findall(r"\b\w+\b", message)
    assert not (classes() & set(said)) - set(re.findall(r"\w+", new)), message
    assert len(message) < 400, message
    assert any(each in message for each in (*CUES, *words)), message


def test_there_are_a_hundred_and_each_is_another() -> None:
    assert len({(old, new) for old, new, _, _ in ROWS}) == len(ROWS) >= 100


def test_the_file_that_is_spoilt_is_good(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(GOOD)
    assert running.planned(path, tmp_path / "results", None).plan.conditions


def test_of_many_task_files_that_are_not_meant_only_the_number_is_said(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number:040}.yaml").touch()
    with pytest.raises(InputError) as caught:
        running.planned(tmp_path / "suite.yaml", tmp_path / "results", None)
    assert str(caught.value).endswith(f"no such file; 11 task files lie in {tmp_path}")
