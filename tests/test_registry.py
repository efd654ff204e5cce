"""Plug-ins by entry point: their prefix, their failures, and names with two owners."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from bench import ContentPath, Count, NonNegative, NonNegativeCount, Positive, PositiveShare, Share, registry
from bench.errors import InputError
from bench.protocols import Shape
from bench.registry import (
    ATTACKS,
    DEFENSES,
    SOURCES,
    Registry,
    attack,
    bind,
    discover,
    fraction,
    marked,
    schema_of,
    view,
)
from bench.suite import listing, resolve, yaml_source

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
    assert bind(ATTACKS["pgd"], {"step_size": "2/255"})["step_size"] == 2 / 255
    assert bind(ATTACKS["pgd"], {"step_size": "1e-3"})["step_size"] == 1e-3
    assert fraction("inf") == float("inf")


def test_an_inner_attack_reaches_the_constructor_as_a_use() -> None:
    given = bind(DEFENSES["cnn"], {"inner": {"use": "pgd", "steps": 3}})
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


# Bounds in signatures ------------------------------------------------------------------------------


def bounded(
    *,
    steps: Count = 5,
    warmup: NonNegativeCount = 0,
    step_size: Positive = 0.1,
    decay: NonNegative = 0.0,
    part: Share = 0.5,
    keep: PositiveShare = 1.0,
    tries: PositiveInt | None = None,
    scale: PositiveFloat = 1.0,
    after: NonNegativeInt = 0,
    tail: NonNegativeFloat = 0.0,
    rates: tuple[Positive, ...] = (0.1,),
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,),
    width: Annotated[int, Field(ge=2, le=9)] | None = None,
    other: Positive | tuple[Positive, Positive] | None = None,
) -> None:
    """Take every bound that a signature can declare."""


def placed(folder: Path, text: str) -> yaml_source.Document:
    path = folder / "suite.yaml"
    path.write_text(text)
    return yaml_source.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 0", "steps: expected a number of 1 or more, found 0"),
        ("steps: true", "steps: expected a whole number, found true"),
        ("steps: 1.5", "steps: expected a whole number, found 1.5"),
        ("warmup: -1", "warmup: expected a number of 0 or more, found -1"),
        ("step_size: 0/255", "step_size: expected a number above 0, found 0.0"),
        ("step_size: .inf", "step_size: expected a finite number, found inf"),
        ("step_size: inf", "step_size: expected a finite number, found inf"),
        ("step_size: true", "step_size: expected a number, found true"),
        ("step_size: a/b", "step_size: expected a number or a fraction like 8/255, found 'a/b'"),
        ("decay: -1/255", "decay: expected a number of 0 or more, found -0.00392156862745098"),
        ("part: 256/255", "part: expected a number of 1 or less, found 1.003921568627451"),
        ("part: -0.5", "part: expected a number of 0 or more, found -0.5"),
        ("keep: 0", "keep: expected a number above 0, found 0"),
        ("keep: 2", "keep: expected a number of 1 or less, found 2"),
        ("tries: 0", "tries: expected a number above 0, found 0"),
        ("tries: true", "tries: expected a whole number, found true"),
        ("scale: 0", "scale: expected a number above 0, found 0"),
        ("after: -1", "after: expected a number of 0 or more, found -1"),
        ("tail: -1e-3", "tail: expected a number of 0 or more, found -0.001"),
        ("rates: [1/2, 0]", "rates[1]: expected a number above 0, found 0"),
        ("rates: [true]", "rates[0]: expected a number, found true"),
        ("sizes: [1, 0]", "sizes[1]: expected a number of 1 or more, found 0"),
        ("sizes: [true]", "sizes[0]: expected a whole number, found true"),
        ("width: 1", "width: expected a number of 2 or more, found 1"),
        ("width: 10", "width: expected a number of 9 or less, found 10"),
        ("other: 0", "other: expected a number above 0, found 0"),
        ("other: [1/255, 0]", "other[1]: expected a number above 0, found 0"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_bounds_is_refused_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    read = placed(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read.check(schema_of(bounded, "bounded"), read.data)
    assert str(caught.value) == f"suite.yaml:1: {said}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps: expected a number of 1 or more, found 0"),
        ({"rates": [0.5, "0"]}, "rates[1]: expected a number above 0, found 0.0"),
        ({"other": (1.0, 0.0)}, "other[1]: expected a number above 0, found 0.0"),
        ({"warmups": 3}, "warmups: unknown key; did you mean 'warmup'?"),
    ],
)
def test_the_same_is_said_of_values_that_stand_in_no_file(given: dict[str, Any], said: str) -> None:
    schema = schema_of(bounded, "bounded")
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(given)
    assert yaml_source.sentence(schema, caught.value) == said


def test_filling_in_says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^restart: unknown key; did you mean 'restarts'\?$"):
        resolve.resolve(ATTACKS["pgd"], {"restart": 3}, tmp_path)
    with pytest.raises(InputError, match=r"^missing key 'build': .*returns the network"):
        resolve.resolve(DEFENSES["module"], {}, tmp_path)


def test_fractions_reach_bounded_parameters_as_numbers() -> None:
    given = {
        "step_size": "8/255",
        "decay": "0",
        "part": "1/2",
        "scale": "1e-3",
        "rates": ["2/255"],
        "other": "1/3",
    }
    made = schema_of(bounded, "bounded").model_validate(given)
    found = made.model_dump()
    assert {name: found[name] for name in given} == {
        "step_size": 8 / 255, "decay": 0, "part": 0.5, "scale": 1e-3, "rates": (2 / 255,), "other": 1 / 3,
    }  # fmt: skip
    assert (
        schema_of(bounded, "bounded").model_validate({"tries": None, "width": 9}).model_dump()["width"] == 9
    )


def test_bounds_stand_in_the_json_schema() -> None:
    schema = schema_of(bounded, "bounded").model_json_schema()
    found = schema["properties"]
    assert found["steps"] == {"title": "Steps", "default": 5, "type": "integer", "minimum": 1}
    assert found["warmup"]["minimum"] == 0
    assert found["step_size"]["anyOf"] == [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]
    assert found["decay"]["anyOf"][0] == {"type": "number", "minimum": 0}
    assert found["part"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    assert found["keep"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert {"type": "integer", "exclusiveMinimum": 0} in found["tries"]["anyOf"]
    assert found["rates"]["items"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0}
    assert (found["sizes"]["items"], found["sizes"]["minItems"]) == ({"type": "integer", "minimum": 1}, 1)
    assert {"type": "integer", "minimum": 2, "maximum": 9} in found["width"]["anyOf"]


def test_bounds_are_listed_in_words() -> None:
    schema = schema_of(bounded, "bounded").model_json_schema()
    said = {name: listing._bounds(info) for name, info in schema["properties"].items()}
    assert said == {
        "steps": "1 or more",
        "warmup": "0 or more",
        "step_size": "above 0",
        "decay": "0 or more",
        "part": "0 to 1",
        "keep": "above 0 to 1",
        "tries": "above 0",
        "scale": "above 0",
        "after": "0 or more",
        "tail": "0 or more",
        "rates": None,
        "sizes": None,
        "width": "2 to 9",
        "other": "above 0",
    }


def test_marks_are_found_inside_bounded_tuples() -> None:
    def files(*, paths: Annotated[tuple[ContentPath, ...], Field(min_length=1)] | None = None) -> None: ...

    info = schema_of(files, "files").model_fields["paths"]
    assert marked(info.annotation, list(info.metadata), "content")
    assert not marked(info.annotation, list(info.metadata), "code")


# Our own packages, and others of their names ---------------------------------------------------------------

RUINED = "raise SystemExit('this is not Crossfire')\n"


def ruins(folder: Path) -> None:
    """Put packages in a folder that would come before ours on the import path."""
    for package in ("attacks", "defenses"):
        (folder / package / "nets").mkdir(parents=True)
        for name in ("__init__.py", "pgd.py", "cnn.py", "nets/__init__.py"):
            (folder / package / name).write_text(RUINED)


def python(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "BENCH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_folders_of_the_user_s_do_not_replace_ours(tmp_path: Path) -> None:
    ruins(tmp_path)
    listed = python(tmp_path, "-m", "bench.cli", "list", "attacks", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {"pgd", "autoattack"} <= {entry["name"] for entry in json.loads(listed.stdout)}
    (tmp_path / "suite.yaml").write_text(
        "data: {digits: {name: digits, split: test, size: 20}}\n"
        "defenses: {cnn: {use: cnn, training: standard, epochs: 1, width: 0.25}}\n"
        "attacks: {it: {use: fgsm}}\n"
        "tasks: [{data: digits, fit: digits, threat: {norm: linf, radius: 0.1}}]\n"
        "tables: {t: {title: T, rows: [defense], columns: [attack]}}\n"
    )
    # In a process of its own for each slot, too; a report looks at the code again without importing it.
    for words in (("run", "suite.yaml", "--results", "r"), ("report", "suite.yaml", "--results", "r")):
        done = python(tmp_path, "-m", "bench.cli", *words)
        assert done.returncode == 0, done.stderr
        assert "differ" not in done.stderr


def test_nor_do_they_from_a_script_beside_them(tmp_path: Path) -> None:
    ruins(tmp_path)
    (tmp_path / "script.py").write_text(
        "from bench.registry import ATTACKS, discover\ndiscover()\nprint(ATTACKS['pgd'].place)\n"
    )
    done = python(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.partition(":")[0]).parent.parent == Path(registry.__file__).parent.parent


@pytest.mark.parametrize("kind", ["file", "package", "namespace"])
def test_one_that_was_imported_first_is_named_in_one_sentence(kind: str, tmp_path: Path) -> None:
    place = tmp_path / ("attacks.py" if kind == "file" else "attacks")
    if kind == "file":
        place.write_text("")
    else:
        place.mkdir()
        (place / ("__init__.py" if kind == "package" else "mine.py")).write_text("")
    (tmp_path / "script.py").write_text(
        "import attacks\nfrom bench.errors import InputError\nfrom bench.registry import discover\n"
        "try:\n    discover()\nexcept InputError as error:\n    print(error)\n"
    )
    done = python(tmp_path, "script.py")
    assert done.stdout == (
        f"{place} was imported as 'attacks', the name of Crossfire's own; call it something else\n"
    ), done.stderr


def test_an_attack_may_be_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "kit" / "deep").mkdir(parents=True)
    (tmp_path / "kit" / "__init__.py").write_text("")
    (tmp_path / "kit" / "deep" / "__init__.py").write_text("from kit.deep.search import nothing\n")
    (tmp_path / "kit" / "deep" / "search.py").write_text(ATTACK.format(name="mine/deep"))
    (tmp_path / "kit" / "flat.py").write_text(ATTACK.format(name="mine/flat"))
    code = (
        "import kit; from bench.registry import ATTACKS, import_all; import_all(kit); "
        "print(*ATTACKS, ATTACKS['mine/deep'].module)"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout.split() == ["mine/deep", "mine/flat", "kit.deep.search"], done.stderr
