"""`bench doctor --fix`: adds to a suite, in its results folder, what rows need for a better grade."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import yaml

from bench.console import count
from bench.errors import InputError
from bench.report import tables
from bench.report.remedies import ATTACKS, DRAWS, NEEDED, NORMS, SETTLED
from bench.results.manifest import ADDED, Outcomes
from bench.results.store import Store
from bench.suite.layout import arrange, columns_read
from bench.suite.schema import Addition, Task, Threats, ViewUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bench.api.running import Project
    from bench.registry import DefenseEntry
    from bench.report.grades import Kind
    from bench.results.conditions import Condition

HEAD = """\
# What `bench doctor --fix` added to {file}: every run of it does this, too.
# Delete this file to go back, or move what you want to keep into {file}.
"""


def add(project: Project) -> list[str]:
    """Write what the rows of a suite need for a better grade, beside what was added before.

    Args:
        project: The project, with the results of its run.

    Returns:
        A sentence for each row about what is added, or why nothing can be.

    Raises:
        InputError: Nothing was run yet, or no row is graded.
    """
    manifest, keys = project.manifest, list(project.manifest["tables"])
    outcomes = Outcomes(project.store.root, columns_read(manifest, keys))
    found, said = _Found(project), {}
    for key in keys:
        layout, printed = arrange(manifest, key), tables.cut(manifest, key, outcomes, outcomes.found)
        for row, made in zip(layout.rows, printed.rows, strict=True):
            if made.grade is not None:
                conditions = [each for slot in row.slots for each in slot.attacks]
                flags = (*made.flags, *(flag for cell in made.cells for flag in cell.flags))
                settled = any(flag.code in SETTLED and flag.level != "note" for flag in flags)
                kinds = [each.kind for each in made.grade.missing if each.kind != "flags" or settled]
                more = found.settle(conditions, kinds)
                said[f"table {key}, {', '.join(row.label)}: {made.grade.letter}"] = more
    if not said:
        raise InputError(
            f"{project.plan.suite.path}: no table has a row with a grade; bench run makes numbers first"
        )
    found.write()
    return [f"{name}; {what}" for name, what in said.items()]


class _Found:
    """What is added."""

    def __init__(self, project: Project) -> None:
        self._suite, self._path = project.plan.suite, project.store.root / ADDED
        before = self._suite.added
        self._tasks = {_spelled(_told(task)): _told(task) for task in before.tasks}
        self._examined = dict.fromkeys(before.doctor)
        self._attacks = {name: dict(use) for name, use in _plain(before).get("attacks", {}).items()}

    def settle(self, conditions: Iterable[Condition], missing: Iterable[Kind]) -> str:
        """Add what settles what a row is missing; return it in words."""
        kinds, found = list(missing), []
        wanted = list(dict.fromkeys(name for kind in kinds for name in NEEDED.get(kind, ())))
        asked = {(each.data, each.norm, each.radius): each for each in conditions}
        for (_, norm, radius), each in asked.items():
            if wanted and norm in NORMS and radius is not None:
                found += self._attack(each, wanted)
        defenses = {str(each.coordinates["defense"]) for each in asked.values()}
        untried = "trial" in kinds and self._suite.model.doctor == "none"
        if "examination" in kinds or untried:
            self._examined |= dict.fromkeys(sorted(defenses))
            found += ["a whole examination"] + ["trials of its attacks"] * untried
        if found:
            return f"added: {', '.join(dict.fromkeys(found))}"
        return "nothing that can be added settles what is missing" if kinds else "nothing is missing"

    def _attack(self, condition: Condition, wanted: Iterable[str]) -> list[str]:
        """Add attacks at the threat of a condition; return their names."""
        at, model = condition.coordinates, self._suite.model
        view = _exact_view(self._suite.defenses[at["defense"]].entry, str(at["readout"]))
        if view is None:
            return []
        tasks = (
            each
            for each in model.tasks
            if each.data == at["data"]
            and each.threat.norm == at["norm"]
            and at["radius"] in each.threat.radius
            and at["defense"] in (each.defenses or self._suite.defenses)
        )
        # As many examples as any attack of the row is asked about.
        task = max(tasks, key=lambda each: math.inf if each.limit is None else each.limit, default=None)
        if task is None:
            return []
        random = condition.facts.random
        names = [name for name in wanted if name not in self._suite.attacks or name in self._attacks]
        made = task.model_copy(
            update={
                "threat": Threats(norm=task.threat.norm, radius=[float(at["radius"])]),
                "defenses": [str(at["defense"])],
                "attacks": names,
                "readouts": [str(at["readout"])],
                "views": [ViewUse(use=view, draws=DRAWS if random else 1)],
                "worst": False,
            }
        )
        if names:
            self._tasks[_spelled(_told(made))] = _told(made)
            self._attacks |= {name: ATTACKS[name] for name in names}
        return names

    def write(self) -> None:
        """Write the file."""
        told = {"attacks": self._attacks, "tasks": list(self._tasks.values()), "doctor": list(self._examined)}
        Addition.model_validate(told)
        head = HEAD.format(file=self._suite.path.name)
        Store.write_text(self._path, head + yaml.safe_dump(told, sort_keys=False))


def _plain(added: Addition) -> dict[str, Any]:
    return added.model_dump(mode="json", exclude_defaults=True)


def _told(task: Task) -> dict[str, Any]:
    """Return a task as the file has it."""
    return task.model_dump(mode="json", exclude_none=True)


def _spelled(task: Mapping[str, Any]) -> str:
    return json.dumps(task, sort_keys=True)


def _exact_view(entry: DefenseEntry, readout: str) -> str | None:
    """Return the first view of images with gradients that reads a read-out; None where there is none."""
    every = (each for each in entry.views.values() if each.space == "pixel" and each.gradient)
    return next((each.name for each in every if readout in each.exact_for), None)


def summary(project: Project) -> str:
    """Return in a sentence what was added to a suite.

    Args:
        project: The project, planned after something was added.
    """
    added = project.plan.suite.added
    conditions = sum(bool(each.facts.get("added")) for each in project.plan.conditions)
    return (
        f"{project.store.shown / ADDED}: {count(conditions, 'condition')} of "
        f"{count(len(added.attacks), 'attack')}, {count(len(added.doctor), 'examination')}"
    )
