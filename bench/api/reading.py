"""What is asked of a task file and its results beside a run: conditions, images, and single ones again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.console import condition_name, count
from bench.errors import InputError, did_you_mean
from bench.quantities import format_value
from bench.report.behind import Asked, behind
from bench.results import leases
from bench.results.metrics import METRICS
from bench.suite.layout import arrange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.api.running import Project
    from bench.api.stored import Shown
    from bench.results.store import Store
    from bench.runner.outstanding import State
    from bench.suite.planner import Plan, PlannedCondition


# --- conditions --------------------------------------------------------------------------------------


def cells(project: Project, state: State) -> list[str]:
    """Return a line for each condition: its state, its examples, its name, and the key of its outcomes.

    Args:
        project: The project.
        state: What is done and what is to do.
    """
    lines = []
    for each in project.plan.conditions:
        done = "done" if each.job in state.done else "to do" if each.job in state.todo else "not asked"
        lines.append(f"{done:9}  {_name(each.coordinates)}, n {each.facts['n']}  {each.job.key}")
    for skip in project.plan.skips:
        lines.append(f"{'skipped':9}  {_name(skip.coordinates)}: {skip.reason}")
    return lines


def _name(coordinates: Mapping[str, Any]) -> str:
    more = [str(coordinates["data"]), str(coordinates["norm"])]
    if coordinates["target"] is not None:
        more.append(f"target {coordinates['target']}")
    more += [
        f"{name.partition('.')[2]} {format_value(value)}"
        for name, value in coordinates.items()
        if name.startswith("inference.")
    ]
    return f"{condition_name(coordinates)}, {', '.join(more)}"


def again(project: Project, names: list[str]) -> str:
    """Take away the stored results of some conditions, so that a run makes them again.

    Args:
        project: The project.
        names: ``DEFENSE/ATTACK``, by their labels in the task file: what the attack found and how it was
            judged; or ``DEFENSE``: also what was trained, and every attack on it.

    Returns:
        What was taken away, in a sentence.

    Raises:
        InputError: There is no such condition, or somebody is at work in the results folder.
    """
    store = project.store
    if alive := [each.shown for each in leases.workers(store.root) if not each.dead]:
        raise InputError(f"--again: {alive[0]} is at work in {store.shown}; wait for it, or stop it")
    gone: dict[tuple[str, str], None] = {}
    for name in names:
        found = list(_meant(project.plan, name))
        for condition in found:
            job = condition.job
            gone[job.kind, job.key] = None
            gone |= {(each.kind, each.key): None for each in job.crafts}
            if name in project.plan.suite.defenses:
                gone[job.victim.train.kind, job.victim.train.key] = None
    there = [(kind, key) for kind, key in gone if store.receipt(kind, key) is not None]
    for kind, key in there:
        store.discard(kind, key)
    _forget_failures(store, gone)
    return f"again: {count(len(there), 'stored result')} of {', '.join(names)} taken away"


def _forget_failures(store: Store, gone: Mapping[tuple[str, str], None]) -> None:
    """Take away what is known of earlier failures of what is tried again."""
    for _, key in gone:
        store.failure_file(key).unlink(missing_ok=True)


def _meant(plan: Plan, name: str) -> Iterator[PlannedCondition]:
    """Yield the conditions that ``DEFENSE/ATTACK`` or ``DEFENSE`` names."""
    pairs = {
        (str(each.coordinates["defense"]), str(each.coordinates["attack"])): None for each in plan.conditions
    }
    known = {f"{defense}/{attack}": None for defense, attack in pairs} | {
        defense: None for defense, _ in pairs
    }
    if name not in known:
        near = did_you_mean(name, known)
        raise InputError(f"--again {name}: expected DEFENSE/ATTACK or DEFENSE of a condition{near}")
    for each in plan.conditions:
        defense, attack = str(each.coordinates["defense"]), str(each.coordinates["attack"])
        if name in (defense, f"{defense}/{attack}"):
            yield each


def remarks(project: Project) -> list[str]:
    """Return what a task file says and cannot mean, in sentences: a limit beyond the data, no tables.

    Args:
        project: The project.
    """
    plan, manifest = project.plan, project.manifest
    found = []
    sizes = {each.coordinates["data"]: each.job.crafts[0].attack_run.data for each in plan.conditions}
    for position, task in enumerate(plan.suite.model.tasks):
        data = sizes.get(task.data)
        if data is None:
            continue
        where = plan.suite.at("tasks", position, "limit")
        if task.limit is not None and task.limit > data.count:
            found.append(
                f"{where}: {task.data} has {count(data.count, 'example')}, limit asks for {task.limit}"
            )
    found += _lone_means(plan)
    if not manifest["tables"]:
        found.append(
            f"{plan.suite.path.name}: no tables, so that no number is printed; such as: "
            "tables: {mine: {title: Mine, rows: [defense], columns: [attack]}}"
        )
    for key in manifest["tables"]:
        found += _lacks_clean(project, key)
    return found


def _lone_means(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each list of one number where images have several channels: two are missing."""
    channels = {
        str(each.coordinates["defense"]): each.job.victim.train.data.shape.channels
        for each in plan.conditions
    }
    for name, resolved in plan.suite.defenses.items():
        for parameter in ("mean", "std"):
            value = resolved.params.get(parameter)
            several = channels.get(name, 1)
            if isinstance(value, list | tuple) and len(value) == 1 < several:
                yield (
                    f"{plan.suite.at('defenses', name, parameter)}: one number for {several} channels, found "
                    f"{list(value)}; write {value[0]:g} if all of them have it"
                )


def _lacks_clean(project: Project, key: str) -> Iterator[str]:
    """Yield a sentence where a table counts what needs the clean images, and no task asks about them."""
    layout = arrange(project.manifest, key)
    lacking = {
        slot.metric.name: None
        for slot in layout.slots
        for condition in slot.conditions
        if METRICS[slot.metric.name].clean == "needed" and not layout.unmoved(condition)
    }
    for name in lacking:
        yield (
            f"{project.plan.suite.document.line('tables', key)}: table {key!r}: {name} needs the clean "
            "images, and no task asks about them: add an attack such as clean: {use: none}"
        )


# --- images ------------------------------------------------------------------------------------------


def coordinates(root: Path, suite: Path, asked: Asked, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coordinates of the one condition behind a number of a table.

    Args:
        root: The results folder.
        suite: The task file, for messages.
        asked: Which number is meant.
        where: Further coordinates, such as the seed.

    Raises:
        InputError: Several conditions stand behind it, or none.
    """
    found = behind(root, suite, asked).conditions
    kept = [
        each
        for each in found
        if all(format_value(each.coordinates.get(name)) == str(value) for name, value in where.items())
    ]
    if len(kept) != 1:
        names = "; ".join(condition_name(each.coordinates) for each in found)
        raise InputError(
            f"{len(kept) or len(found)} conditions stand behind this number; "
            f"say which, such as --where seed=0: {names}"
        )
    return {name: value for name, value in kept[0].coordinates.items() if value is not None}


def keep_images(shown: Shown, out: Path, most: int) -> str:
    """Write what a defense was shown into a file.

    Args:
        shown: The images, and what the defense answered.
        out: The file: ``.npz`` for arrays of all examples, ``.png``, ``.svg`` or ``.pdf`` for a picture of
            some.
        most: How many examples the picture has: first those that were moved and broken.

    Returns:
        What was written, in a sentence.

    Raises:
        InputError: The file has another ending, or cannot be written.
    """
    match out.suffix.lower():
        case ".npz":
            arrays = {
                name: getattr(shown, name).numpy()
                for name in ("images", "clean", "truth", "label", "rejected", "index")
            }
            with out.open("wb") as file:
                np.savez_compressed(file, **arrays)
            return f"{count(len(shown.index), 'example')} in {out}: {', '.join(arrays)}"
        case ".png" | ".svg" | ".pdf":
            drawn = _draw(shown, out, most)
            said = f"{count(drawn, 'example')} of {len(shown.index)} in {out}"
            return f"{said}, from above: clean, shown, difference"
        case ending:
            raise InputError(
                f"--out {out}: expected .npz, .png, .svg or .pdf, found {ending or 'no ending'!r}"
            )


def _draw(shown: Shown, out: Path, most: int) -> int:
    from matplotlib import figure

    from bench.report.render.figure import save

    moved = (shown.images != shown.clean).flatten(1).any(1)
    found = (shown.label != shown.truth) & ~shown.rejected & moved
    order = np.argsort(~found.numpy(), kind="stable")[:most]

    def picture(values: Any) -> Any:
        array = values.permute(1, 2, 0).numpy()
        return array[..., 0] if array.shape[2] == 1 else array

    def made() -> figure.Figure:
        page = figure.Figure(figsize=(1.2 * len(order) + 0.4, 4.2), layout="constrained")
        axes = page.subplots(3, len(order), squeeze=False)
        for place, each in enumerate(order):
            clean, moved = shown.clean[each], shown.images[each]
            difference = moved - clean
            reach = float(difference.abs().max()) or 1.0
            answer = "refused" if shown.rejected[each] else str(int(shown.label[each]))
            titles = (
                f"{int(shown.index[each])}: is {int(shown.truth[each])}",
                f"answer {answer}",
                f"up to {format_value(round(255 * reach, 1))}/255" if difference.any() else "not moved",
            )
            rows = (clean, moved, 0.5 + difference / (2 * reach))
            for row, (values, said) in enumerate(zip(rows, titles, strict=True)):
                axes[row][place].imshow(picture(values), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes[row][place].set_title(said, fontsize="x-small")
                axes[row][place].set_axis_off()
        return page

    save(made, out, out.suffix.removeprefix(".").lower())
    return len(order)
