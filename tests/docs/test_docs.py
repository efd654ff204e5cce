"""What the documents say is so: commands, code, task files, flags, schema and published tables."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import typer.main
import yaml
from command import called_by

from bench import cli
from bench.api import running
from bench.results.store import Store

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "docs" / "findings.md"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def files(folder: Path) -> None:
    """Write the README's files: the blocks that begin with ``# file: NAME``."""
    for text in blocks("python") + blocks("yaml"):
        head, _, body = text.partition("\n")
        if head.startswith("# file: "):
            (folder / head.removeprefix("# file: ")).write_text(body)


def test_every_block_of_the_readme_is_run_or_checked() -> None:
    heads = [text.partition("\n")[0] for text in blocks("python") + blocks("yaml")]
    assert heads
    assert all(re.match(r"# (file|test): \w+\.(py|yaml)|# run: (first|own|mine)$", head) for head in heads)


def test_the_readmes_network_and_commands_work(tmp_path: Path) -> None:
    files(tmp_path)
    commands = [
        shlex.split(line.removeprefix("$ "))
        for text in blocks("console")
        for line in text.splitlines()
        if line.startswith("$ bench")
    ]
    assert len(commands) >= 7
    printed = ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in commands:
        extra = ["--executor", "inline"] if words[1] in ("run", "check") else []
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *words[1:], *extra],
            cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    assert "| SPSA" in printed
    assert "held: " in printed


@pytest.mark.parametrize("name", ["mylab.py", "mydefense.py"])
def test_the_readmes_attack_and_defense_pass_their_own_tests(tmp_path: Path, name: str) -> None:
    files(tmp_path)
    (body,) = [text for text in blocks("python") if text.startswith(f"# test: {name}\n")]
    code = f"import {name.removesuffix('.py')}\n{body}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_first_steps_in_python_work_one_after_the_other(tmp_path: Path) -> None:
    files(tmp_path)
    steps = [text for text in blocks("python") if text.startswith("# run: ")]
    # From nothing to a printed result in six lines, and the first attack in less than 15.
    assert "attacked and judged in six lines" in README
    assert len([line for line in steps[0].splitlines() if line and not line.startswith("#")]) == 6
    assert len([line for line in steps[1].splitlines() if line and not line.startswith("#")]) <= 15
    (tmp_path / "steps.py").write_text("\n".join(steps))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "steps.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.partition(",")[0] for line in done.stdout.splitlines()]
    # The network of the steps is not trained, which its flags say.
    assert [each for each in said if not each.startswith("flag: ")] == ["pgd", "climb", "pgd"]
    assert any("clean images are answered rightly" in each for each in said)


def test_the_readmes_attack_is_as_short_as_it_says() -> None:
    (text,) = [text for text in blocks("python") if "mylab/sign" in text and "# file" in text]
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 15


def commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with its words, those of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return str(text)


def test_the_readme_names_and_counts_what_is_registered() -> None:
    from bench.registry import ATTACKS, DEFENSES, SOURCES, discover

    discover()
    # What other tests register is theirs.
    attacks = [name for name in ATTACKS if not name.startswith(("toy/", "mylab/"))]
    own = [name for name in attacks if "/" not in name]
    (kinds,) = re.findall(r"^\| kind \| attacks \|\n(.*?)\n\n", section("Attacks"), re.MULTILINE | re.DOTALL)
    for name in own:
        assert f"`{name}`" in kinds, name
    by_library = {
        each: sum(name.startswith(f"{each}/") for name in attacks) for each in ("torchattacks", "foolbox")
    }
    for library, number in by_library.items():
        assert f"{number} `{library}/NAME`" in kinds
    box = section("What is in the box")
    theirs = sum(by_library.values())
    assert f"{len(own) - 1} of our own, {theirs} of two libraries ([above](#attacks)), and `none`" in box
    assert len(own) + theirs == len(attacks)
    for registry in (DEFENSES, SOURCES):
        for name in registry:
            assert f"`{name}`" in box or name.startswith(("toy/", "mylab/")), name


def test_what_a_shell_would_expand_is_quoted() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        assert not re.findall(r"pip install (?:-\w+ )*[^'\s`]+\[[^`\n]*", path.read_text()), path.name


def test_every_command_has_help_and_stands_in_the_readme() -> None:
    for name, command in commands(typer.main.get_command(cli.app)):
        assert command.help
        assert f"`bench {name} " in README
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), (name, parameter.name)


@pytest.mark.parametrize("dumb", [{}, {"NO_COLOR": "1", "TERM": "dumb"}], ids=["plain", "dumb"])
def test_the_list_of_commands_cuts_nothing_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dumb: dict[str, str]
) -> None:
    for name, value in {"COLUMNS": "80", **dumb}.items():
        monkeypatch.setenv(name, value)
    group = typer.main.get_command(cli.app)
    for words in ([], ["baseline"]):
        said = called_by(monkeypatch, capsys)(*words, "--help").out
        assert "..." not in said.partition("Commands:")[2]
        assert "\u2026" not in said
        # Each description is whole, and on the line of its command.
        named = [line.split()[0] for line in said.partition("Commands:\n")[2].splitlines()]
        assert named == list(group.commands["baseline"].commands if words else group.commands)
        assert max(map(len, said.splitlines())) <= 80


def test_help_says_what_is_to_be_written_and_no_types_of_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = called_by(monkeypatch, capsys)
    for name, command in commands(typer.main.get_command(cli.app)):
        said = bench(*name.split(), "--help").out
        assert not re.search(r"<(list|int|str|float|path|text)|\{|\[\[", said), name
        for each in command.params:
            # Of what has choices, these are what is to be written.
            if not getattr(each, "is_flag", False) and each.name not in ("executor", "form"):
                assert each.metavar, (name, each.name)
                assert each.metavar in said, (name, each.name)
        usage = said.partition("\n")[0]
        for each in command.params:
            if each.param_type_name == "argument":
                assert usage.count(each.metavar if each.required else f"[{each.metavar}]") == 1


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def pages(nav: list[Any]) -> Iterator[str]:
    """Yield the pages of the navigation of mkdocs.yml, those that are made when it is built included."""
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(page, str):
                yield page
            else:
                yield from pages(page)


def test_links_between_documents_lead_somewhere() -> None:
    made = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
            target = Path(os.path.normpath(path.parent / link))
            page = os.path.relpath(target, ROOT / "docs")
            assert target.exists() or any(fnmatch(page, each) for each in made), f"{path.name}: {link}"


def test_a_section_that_a_page_takes_from_the_readme_is_there() -> None:
    """The line is a link in the repository, and the section itself on the site (`docs/site/hook.py`)."""
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    taken = [
        found
        for path in ROOT.glob("docs/*.md")
        for found in re.findall(r"^\[README: ([^\]]+)\]\(([^)]*)\)$", path.read_text(), re.MULTILINE)
    ]
    assert len(taken) == 5
    for heading, link in taken:
        assert heading in headings
        assert link == f"../README.md#{heading.lower().replace(' ', '-')}"


def test_the_citation_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


SUITES = [ROOT / "tasks.yaml", *sorted(ROOT.glob("suites/*.yaml"))]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The schema as the command writes it."""
    out = tmp_path_factory.mktemp("schema") / "suite.schema.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "schema", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads(out.read_text())
    return written


def test_the_schema_is_one_and_knows_what_is_registered(schema: dict[str, Any]) -> None:

    from bench.registry import ATTACKS, DEFENSES, SOURCES

    jsonschema.Draft202012Validator.check_schema(schema)
    for kind, known in (("AttackUse", ATTACKS), ("DefenseUse", DEFENSES), ("DataSpec", SOURCES)):
        titles = {each["title"] for each in schema["$defs"][kind]["oneOf"]} - {"planned"}
        assert titles == {name for name in known if not name.startswith(("toy/", "mylab/"))}
    # Bounds are said in JSON Schema's words: a word of pydantic's own would be ignored by every editor.
    text = json.dumps(schema)
    assert not re.findall(r'"(?:gt|ge|lt|le)": ', text)
    (pgd,) = [each for each in schema["$defs"]["AttackUse"]["oneOf"] if each["title"] == "pgd"]
    assert pgd["properties"]["use"] == {"const": "pgd"}
    radius = schema["$defs"]["Threats"]["properties"]["radius"]["anyOf"][0]
    assert radius == {"exclusiveMinimum": 0, "type": "number"}


def test_task_files_name_the_schema_that_make_writes() -> None:
    (out,) = re.findall(r"bench schema --out (\S+)", (ROOT / "Makefile").read_text())
    for path in SUITES:
        (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)\n", path.read_text())
        assert (path.parent / named).resolve() == ROOT / out
    assert out in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_the_suites_are_plans_without_their_data(path: Path, tmp_path: Path, schema: dict[str, Any]) -> None:
    import yaml

    project = running.planned(path, tmp_path, tmp_path / "no data here")
    assert project.plan.conditions
    document = yaml.safe_load(path.read_text())
    document["tables"] = {str(key): table for key, table in document["tables"].items()}
    jsonschema.validate(document, schema)
    assert not [each for each in project.manifest["conditions"] if each["facts"]["n"] < 1]


def test_committed_tables_are_current() -> None:
    """Cut the committed outcomes again: the committed tables must say the same."""
    from bench.report import render, tables
    from bench.results.manifest import Outcomes, read

    root = ROOT / "results" / "mnist"
    manifest = read(root, ROOT / "suites" / "mnist.yaml")
    for key in manifest["tables"]:
        outcomes = Outcomes(root)
        rendered = tables.cut(manifest, key, outcomes, outcomes.found)
        name = root / "tables" / f"table-{key.replace('/', '-')}"
        assert name.with_suffix(".csv").read_text() == render.to_csv(rendered)
        assert name.with_suffix(".md").read_text() == render.to_markdown(rendered)
        assert not [cell for row in rendered.rows for cell in row.cells if cell.hole == "not run"]


def test_what_is_said_of_mnist_is_what_its_results_say() -> None:
    """Sentences with numbers in the README and docs/findings.md are written anew from committed results."""
    root = ROOT / "results" / "mnist"
    rows = pd.concat(map(pd.read_csv, sorted((root / "tables").glob("*.csv"))))
    value = rows.set_index(["table", "row", "column"])["value"].to_dict()
    said = {path.name: " ".join(path.read_text().split()) for path in (ROOT / "README.md", FINDINGS)}

    gan, bpda = (value["breakdgm", "Defense-GAN", each] for each in ("Backtracking", "BPDA"))
    kept, descent = (value["breakdgm", "ABS", each] for each in ("Backtracking", "Latent descent"))
    assert f"median l2 distance of {gan:.1f}, identity BPDA {bpda:.1f} (n = 20)" in said["README.md"]
    assert f"on ABS {kept:.1f}, latent descent {descent:.1f}." in said["README.md"]
    assert f"| Defense-GAN | MNIST, 20 | {gan:.2f} (T' = 20) | {bpda:.2f} | - |" in said["findings.md"]
    assert f"| ABS | MNIST, 20 | {kept:.2f} (T' = 1) | - | {descent:.2f} |" in said["findings.md"]
    ratio, nearer, of = _nearer("defensegan", "backtracking", "bpda-cw")
    assert f"{nearer} of {of} images against BPDA (median ratio {ratio:.2f}" in said["findings.md"]
    ratio, nearer, of = _nearer("abs", "backtracking-1", "latent-descent")
    assert (
        f"{nearer} of the {of} that ABS has right against latent descent ({ratio:.2f}" in said["findings.md"]
    )

    plain, scaled = (value["sdim", "SDIM", each] for each in ("PGD", "PGD (ll/64)"))
    assert f"log-likelihoods leaves {plain:.1f} % of MNIST" in said["README.md"]
    assert f"over 64 it leaves {scaled:.0f} %" in said["README.md"]
    flags = rows.query("table == 'sdim' and row == 'SDIM' and column == 'PGD'")["flags"].item()
    assert re.sub(r".*vanished on (\d+ of \d+) .*", r"vanished on \1 images", flags) in said["README.md"]

    def refused(column: str) -> tuple[float, ...]:
        return tuple(value["sdim-adaptive", f"SDIM ({nth} Per.)", column] for nth in ("1st", "2nd"))

    for name, column in {
        "DeepFool": "DeepFool",
        "CW-L2, kappa 0": "CW-L2 (kappa 0)",
        "CW-L2, kappa 500 nats": "CW-L2 (kappa 500)",
        "threshold-aware CW": "Threshold CW",
    }.items():
        first, second = refused(column)
        assert f"| {name} | {first:.0f}, {second:.0f} % |" in said["findings.md"]
    first, second = refused("PGD (refusal)")
    assert f"is refused in {first:.0f} and {second:.0f} % of its successes" in said["findings.md"]
    first, second = refused("Feature matching")
    assert f"feature matching in {first:.0f} and {second:.0f} %" in said["findings.md"]

    names = ("Standard", "Madry", "Trades")
    auto, pgd = ([value["apinet", row, each] for row in names] for each in ("Auto Attack", "PGD (base)"))
    left = "leaves {:.0f} % (standard training), {:.0f} % (Madry) and {:.0f} % (TRADES)".format(*auto)
    assert left in said["findings.md"]
    assert "leaves {:.1f}, {:.1f} and {:.1f} % of 250".format(*pgd) in said["findings.md"]


def _nearer(defense: str, one: str, other: str) -> tuple[float, int, int]:
    """Return the median ratio of two attacks' distances on MNIST, on how many images the first is the nearer,
    and of how many that are right unmoved.
    """
    root = ROOT / "results" / "mnist"
    conditions = json.loads((root / "manifest.json").read_text())["conditions"]
    wanted = {"defense": defense, "norm": "l2", "radius": None}
    distances = []
    for attack in (one, other):
        (job,) = {
            each["job"]
            for each in conditions
            if {**wanted, "attack": attack}.items() <= each["coordinates"].items()
        }
        stored = Store(root).outcomes(job)
        columns = ("index", "label", "truth", "invalid", "l2")
        rows = pd.DataFrame({name: np.asarray(stored[name]) for name in columns}).set_index("index")
        broken = (rows["label"] != rows["truth"]) & ~rows["invalid"]
        # What is not broken is broken at no distance.
        distances.append(rows["l2"].where(broken, np.inf))
    first, second = distances[0].align(distances[1], join="outer")
    right = (first > 0) | (second > 0)
    return float((first / second)[right].median()), int((first < second).sum()), int(right.sum())
