"""What is cited and registered stands in docs/methods.md."""

import re
from pathlib import Path

import pytest

from bench.registry import ATTACKS, DEFENSES, Entry, discover

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
CITED = re.compile(r"(?<![A-Za-z])D-\d\d")  # not the end of PGD-40


def own(entry: Entry) -> bool:
    return entry.module.partition(".")[0] in ("attacks", "defenses")


def section(heading: str) -> str:
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {heading!r}"
    return found[1]


def register() -> list[str]:
    return re.findall(r"^\| (D-\d\d) \|", section("Discrepancies"), re.MULTILINE)


def test_every_discrepancy_that_is_cited_stands_in_the_register() -> None:
    places = [ROOT / "tasks.yaml", ROOT / "docs" / "methods.md"]
    for folder in ("bench", "attacks", "defenses", "suites"):
        places += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]
    known = set(register())
    missing = {
        f"{place.relative_to(ROOT)}: {name}"
        for place in places
        for name in CITED.findall(place.read_text(encoding="utf-8"))
        if name not in known
    }
    assert not missing
    # The pattern finds something at all.
    assert "D-05" in CITED.findall((ROOT / "defenses/nets/cnnf/operators.py").read_text(encoding="utf-8"))


def test_the_register_is_in_order_and_has_every_column() -> None:
    names = register()
    assert names == sorted(set(names))
    rows = [line for line in section("Discrepancies").splitlines() if line.startswith("| D-")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 6, row
        # A paper that is silent leaves its cell empty; what is done here is always said.
        assert all(cells[place] for place in (0, 1, 4, 5)), row


@pytest.mark.parametrize(("heading", "registry"), [("Attacks", ATTACKS), ("Defenses", DEFENSES)])
def test_everything_registered_has_its_section(heading: str, registry: object) -> None:
    discover()
    assert registry is ATTACKS or registry is DEFENSES
    names = {entry.name for entry in map(registry.__getitem__, registry) if own(entry) and not entry.library}
    described = set(re.findall(r"^### `([\w-]+)`$", section(heading), re.MULTILINE))
    assert described == names


def test_every_attack_of_a_library_is_named_with_the_libraries() -> None:
    discover()
    text = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    for entry in map(ATTACKS.__getitem__, ATTACKS):
        if own(entry) and entry.library:
            assert f"`{entry.name.partition('/')[2]}`" in text, entry.name


def test_every_view_has_its_row() -> None:
    discover()
    views = {name for entry in map(DEFENSES.__getitem__, DEFENSES) if own(entry) for name in entry.views}
    rows = set(re.findall(r"^\| `([\w-]+)` \|", section("Views"), re.MULTILINE))
    assert rows == views


def test_every_metric_has_its_row() -> None:
    from bench.results.metrics import METRICS

    first_cells = "".join(re.findall(r"^\|([^|]*)\|", section("Metrics"), re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", first_cells))
    assert named == set(METRICS)
