"""Plug-ins by entry point: their prefix, their failures, and names with two owners."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import ATTACKS, DEFENSES, SOURCES, Registry, arguments, attack, discover, fraction, view

ATTACK = '''
from bench import attack

@attack("{name}", norms={{"linf"}}, version=1, access="none")
def nothing(view, x, y, threat, noise, *, times: int = 1):
    """Do nothing, several times."""
    return x
'''


def install(site: Path, distribution: str, point: str, module: str, code: str) -> None:
    """Put a distribution with an entry point where Python finds it."""
    (site / f"{module}.py").write_text(code)
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bench.plugins]\n{point} = {module}\n")


def bench(site: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bench.cli", *words],
        cwd=site, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip


def suite(site: Path, use: str) -> None:
    (site / "suite.yaml").write_text(
        "data: {digits: {name: digits, split: test}}\n"
        "defenses: {cnn: {use: cnn, training: standard}}\n"
        f"attacks: {{it: {{use: {use}}}}}\n"
        "tasks: [{data: digits, threat: {norm: linf, radius: 0.1}}]\n"
    )


def test_a_plug_in_adds_its_attacks_under_its_prefix(tmp_path: Path) -> None:
    install(tmp_path, "mylab-bench", "mylab", "mylab_attacks", ATTACK.format(name="mylab/nothing"))
    found = json.loads(bench(tmp_path, "list", "attacks", "--json").stdout)
    assert {"mylab/nothing", "pgd"} <= {entry["name"] for entry in found}
    suite(tmp_path, "mylab/nothing")
    assert bench(tmp_path, "plan", "suite.yaml").returncode == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", ["mylab", "did not load", "ZeroDivisionError"]),
        (ATTACK.format(name="pgd"), ["did not load", "named 'mylab/...', not 'pgd'", "mylab_attacks.py:4"]),
    ],
)
def test_a_plug_in_that_fails_stops_only_who_asks_for_it(tmp_path: Path, code: str, words: list[str]) -> None:
    install(tmp_path, "mylab-bench", "mylab", "mylab_attacks", code)
    suite(tmp_path, "pgd")
    assert bench(tmp_path, "plan", "suite.yaml").returncode == 0
    suite(tmp_path, "mylab/nothing")
    refused = bench(tmp_path, "plan", "suite.yaml")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    for word in words:
        assert word in refused.stderr


def test_two_plug_ins_with_one_name_are_both_named(tmp_path: Path) -> None:
    for distribution, module in (("one-bench", "one"), ("two-bench", "two")):
        install(tmp_path, distribution, "mylab", module, ATTACK.format(name="mylab/nothing"))
    suite(tmp_path, "mylab/nothing")
    refused = bench(tmp_path, "plan", "suite.yaml")
    assert refused.returncode == 2
    for word in ("two owners", "one.py:4", "two.py:4"):
        assert word in refused.stderr
    suite(tmp_path, "pgd")
    assert bench(tmp_path, "plan", "suite.yaml").returncode == 0


def test_a_closed_registry_takes_no_more() -> None:
    assert isinstance(ATTACKS, Registry)
    with pytest.raises(InputError, match="closed"):
        ATTACKS.add(ATTACKS["pgd"])


@pytest.mark.parametrize("word", ["targets", "use", "time_limit"])
def test_a_parameter_may_not_have_the_name_of_a_suites_own_key(word: str) -> None:
    space: dict[str, object] = {}
    exec(f"def function(view, x, y, threat, noise, *, {word}: int = 1): ...", space)
    with pytest.raises(InputError, match=f"{word}: a suite says something else"):
        attack("mine/own", norms={"linf"}, version=1)(space["function"])


@pytest.mark.parametrize("word", ["draws", "use"])
def test_nor_may_a_parameter_of_a_view(word: str) -> None:
    space: dict[str, object] = {}
    exec(f"def method(self, *, {word}: int = 1): ...", space)
    with pytest.raises(InputError, match=f"view 'mine': {word}: a suite says something else"):
        view("mine")(space["method"])


def test_fractions_are_numbers_wherever_a_float_is_asked_for() -> None:
    assert arguments(ATTACKS["pgd"], {"step": "2/255"})["step"] == 2 / 255
    assert arguments(ATTACKS["pgd"], {"step": "1e-3"})["step"] == 1e-3
    assert fraction("inf") == float("inf")


def test_an_inner_attack_reaches_the_constructor_as_a_use() -> None:
    given = arguments(DEFENSES["cnn"], {"inner": {"use": "pgd", "steps": 3}})
    assert given["inner"].use == "pgd"
    assert given["inner"].params == {"steps": 3}
    assert DEFENSES["cnn"].make(Shape(1, 8, 8, 10), **{**given, "width": 0.25}) is not None


def test_no_summary_ends_in_the_middle_of_a_sentence() -> None:
    discover()
    entries = [registry[name] for registry in (ATTACKS, DEFENSES, SOURCES) for name in registry]
    ends = {
        each.summary[-1:] for each in entries if each.module.startswith(("attacks.", "defenses.", "bench."))
    }
    assert ends <= {".", "`"}
