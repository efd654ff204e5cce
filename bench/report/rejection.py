"""Rejection judged whole: what a read-out answers and refuses under each attack, and what its scores tell.

For each read-out three tables are made, which are cut and written like those of a task file: what is
answered, the worst case over attacks, and the score as a detector at every threshold.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.escaping import in_markdown, shown
from bench.quantities import format_value
from bench.report import tables
from bench.report.checks import Evidence, title
from bench.report.render import figure, joined, to_text
from bench.report.render.formats import Form
from bench.report.render.records import csv_lines, records
from bench.report.render.text import printed
from bench.report.tables import OutcomeReader, RenderedTable
from bench.results import ranking
from bench.results.conditions import CHOICE, Condition, conditions_of
from bench.results.metrics import METRICS, confidence, is_refused, is_wrong
from bench.results.outcomes import FrameOf, arrays
from bench.suite.layout import arrange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group

ANSWERS = {
    "Coverage": "coverage",
    "Accepted right": "accepted_right",
    "Accepted wrong": "accepted_wrong",
    "Refused": "rejection",
    "Robust, refusals right": "robust",
    "Robust, refusals wrong": "robust_accepted",
}
"""The columns of the first table: what the read-out does by its own thresholds."""

SCORES = {
    "AURC": "aurc",
    "E-AURC": "excess_aurc",
    "AUROC (wrong)": "auroc",
    "FPR95 (wrong)": "fpr95",
    "AUROC (advers.)": "adversarial_auroc",
    "FPR95 (advers.)": "adversarial_fpr95",
}
"""The columns of the third table: what the score tells, whatever the read-out refused."""

WORST = {heading: name for heading, name in {**ANSWERS, **SCORES}.items() if METRICS[name].worst is not None}
"""The columns of the second table: what attackers want more of, or less."""

_ROWS = ("attack", "view", "norm", "radius")
"""What a row of the first and of the third table is."""


@dataclass(frozen=True)
class Readout:
    """A read-out of a defense, with the conditions in which it is judged."""

    name: str
    """Data, defense and read-out, with what is set at inference time."""
    manifest: Mapping[str, Any]
    """A manifest of these conditions, with its tables by key."""
    refuses: bool
    """Whether it refused anything."""
    adaptive: tuple[str, ...]
    """The attacks through a view whose answer is that of the read-out, refusals included."""
    follows: bool
    """Whether no accepted answer has a lower score than a refused one."""


def readouts(
    manifest: Mapping[str, Any], outcomes: FrameOf, jobs: Collection[str] | None = None
) -> list[Readout]:
    """Return the read-outs to judge: of defenses that refuse something, or of the tables asked for.

    Args:
        manifest: The manifest of the suite.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
        jobs: The keys of the evaluations to look at; None for all.

    Returns:
        The read-outs in the order of the manifest: where `jobs` is None those of defenses that refuse
        something through any of them, else all.
    """
    groups: dict[str, list[Condition]] = defaultdict(list)
    for condition in conditions_of(manifest):
        groups[json.dumps(_defended(condition), sort_keys=True)].append(condition)
    looked = [
        _looked(_attacked(group, jobs), outcomes)
        for group in groups.values()
        if jobs is None or any(each.job in jobs for each in group)
    ]
    refusing = {_defense(each.conditions) for each in looked if each.refuses}
    return [
        _readout(manifest, each)
        for each in looked
        if jobs is not None or _defense(each.conditions) in refusing
    ]


def _defense(conditions: Sequence[Condition]) -> tuple[str, str]:
    first = conditions[0]
    return first.data, str(first.coordinates["defense"])


def _defended(condition: Condition) -> dict[str, Any]:
    """Return the coordinates that say who is asked about what."""
    left_out = ("norm", "radius", "seed", *CHOICE)
    return {name: value for name, value in condition.coordinates.items() if name not in left_out}


def _attacked(group: Sequence[Condition], jobs: Collection[str] | None) -> list[Condition]:
    """Return the attacks that are asked for, and of the unmoved images those of which there are most."""
    idle = [each for each in group if each.facts.idle]
    most = max(idle, key=lambda each: each.facts.n, default=None)
    # They have no threat: one of those that they were asked for with will do.
    kept = [each for each in idle if most is not None and _threat(each) == _threat(most)]
    return [*kept, *(each for each in group if not each.facts.idle and (jobs is None or each.job in jobs))]


def _threat(condition: Condition) -> tuple[str, float | None]:
    return condition.norm, condition.radius


@dataclass(frozen=True)
class _Looked:
    """The conditions of a read-out, and what their outcomes say of its refusals."""

    conditions: Sequence[Condition]
    refuses: bool
    follows: bool


def _looked(conditions: Sequence[Condition], outcomes: FrameOf) -> _Looked:
    """Return whether a read-out refused, and whether in each seed a threshold of the score does the same."""
    refuses = False
    highest: dict[int, float] = defaultdict(lambda: -np.inf)
    lowest: dict[int, float] = defaultdict(lambda: np.inf)
    for each in conditions:
        if (frame := outcomes(each.job)) is None:
            continue
        rows, seed = arrays(frame), each.seed
        scored, refused = ~np.isnan(rows["score"]), is_refused(rows)
        refuses |= bool(refused.any())
        highest[seed] = max(highest[seed], rows["score"][scored & refused].max(initial=-np.inf))
        lowest[seed] = min(lowest[seed], rows["score"][scored & ~refused].min(initial=np.inf))
    return _Looked(conditions, refuses, all(highest[seed] <= lowest[seed] for seed in lowest))


def _readout(manifest: Mapping[str, Any], looked: _Looked) -> Readout:
    conditions = looked.conditions
    asked = {name: value for name, value in _defended(conditions[0]).items() if value is not None}
    settings = [
        f"{name.removeprefix('inference.')} {format_value(value)}"
        for name, value in asked.items()
        if name.startswith("inference.")
    ]
    name = ", ".join([asked["data"], f"{asked['defense']} ({asked['readout']})", *settings])
    adaptive = [each for each in conditions if looked.refuses and _knows(each)]
    made = {"where": asked, "bold": None, "grades": False}
    shown_tables: dict[str, Any] = {
        f"{name}, answers": {
            **made,
            "title": "what is answered",
            "rows": list(_ROWS),
            "columns": {heading: {"metric": metric} for heading, metric in ANSWERS.items()},
            "metric": "accepted_right",
            "mean_over": ["seed", "target"],
        }
    }
    if worst := _worst_rows(conditions, adaptive):
        shown_tables[f"{name}, worst case"] = {
            **made,
            "title": "each example by the attack that is worst for the defender",
            "rows": worst,
            "columns": {heading: {"metric": metric} for heading, metric in WORST.items()},
            "metric": "accepted_wrong",
        }
    shown_tables[f"{name}, scores"] = {
        **made,
        "title": "what the score tells, at every threshold",
        "rows": list(_ROWS),
        "columns": {heading: {"metric": metric} for heading, metric in SCORES.items()},
        "metric": "aurc",
        "mean_over": ["seed", "target"],
    }
    # Of these conditions alone: no table looks through those of the whole suite.
    own = [
        {"coordinates": each.coordinates, "facts": asdict(each.facts), "job": each.job} for each in conditions
    ]
    return Readout(
        name=name,
        manifest={**manifest, "conditions": own, "skips": [], "tables": shown_tables},
        refuses=looked.refuses,
        adaptive=tuple(dict.fromkeys(map(title, adaptive))),
        follows=looked.follows,
    )


def _knows(condition: Condition) -> bool:
    """Return whether an attack looks through a view whose answer is that of a read-out that refuses."""
    facts = condition.facts
    return facts.exact and not facts.idle and facts.access != "none"


def _worst_rows(conditions: Sequence[Condition], adaptive: Sequence[Condition]) -> dict[str, Any]:
    """Return rows of all attacks with one radius, and of the adaptive ones among them."""
    found: dict[str, Any] = {}
    attacked = [each for each in conditions if not each.facts.idle and each.radius is not None]
    for norm, radius in dict.fromkeys(map(_threat, attacked)):
        there = [each for each in attacked if _threat(each) == (norm, radius)]
        for heading, some in (
            ("every attack", there),
            ("adaptive", [each for each in there if each in adaptive]),
        ):
            if some:
                count = len({(each.attack, each.view) for each in some})
                views = {"view": _named(each.view for each in some)} if heading == "adaptive" else {}
                found[f"{heading} ({count}), {norm} {format_value(radius)}"] = {
                    "attack": _named(each.attack for each in some),
                    **views,
                    "norm": norm,
                    "radius": radius,
                }
    return found


def _named(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def cut(found: Readout, outcomes: FrameOf) -> list[RenderedTable]:
    """Return the tables of a read-out with their numbers.

    Args:
        found: The read-out.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
    """
    return [tables.cut(found.manifest, key, outcomes, tables.unexamined) for key in found.manifest["tables"]]


# --- how it is written ---------------------------------------------------------------------------------


def legend(judged: Sequence[Readout]) -> list[str]:
    """Return the sentences below the tables: what their columns count, and what is to be said of read-outs.

    Args:
        judged: The read-outs.
    """
    columns = [f"{heading}: {METRICS[name].says}." for heading, name in {**ANSWERS, **SCORES}.items()]
    found = [each for each in columns if not each.startswith("Robust, refusals right")]
    place = [each.partition(":")[0] for each in found].index("Robust, refusals wrong")
    found.insert(
        place,
        "Robust, refusals right: right and accepted on the clean input; on the adversarial one right, or "
        "refused where it was moved.",
    )
    for each in judged:
        if not each.refuses:
            found.append(f"{each.name}: nothing was refused; the score alone is judged.")
        elif not each.adaptive:
            found.append(
                f"{each.name}: no attack here looks through a view that is exactly this read-out with its "
                "refusals, so that nobody tried to be accepted."
            )
        else:
            found.append(
                f"{each.name}: adaptive, through a view that is exactly this read-out with its refusals: "
                f"{', '.join(each.adaptive)}."
            )
        if not each.follows:
            found.append(
                f"{each.name}: an accepted answer has a lower score than a refused one, so that refusals are "
                "no threshold of the score; what the score tells is not what the read-out does."
            )
    return found


def written(judged: Sequence[Readout], outcomes: FrameOf, form: Form) -> str:
    """Write the tables of read-outs as one text.

    Args:
        judged: The read-outs, in the order in which they are written.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
        form: The format.

    Returns:
        The text, with a line end at its end. CSV is one list of cells; JSON has also what is known of each
        read-out, with its risk-coverage curves.
    """
    if form == "text":
        return printed(text(judged, outcomes))
    every = [table for each in judged for table in cut(each, outcomes)]
    if form == "csv":
        return csv_lines([record for table in every for record in records(table)])
    said = joined(every, form)
    if form == "json":
        told = {"readouts": [_document(each, outcomes) for each in judged], "tables": json.loads(said)}
        return json.dumps(told, indent=1, allow_nan=False) + "\n"
    if form == "markdown":
        said += "\n" + "\n".join(f"- {in_markdown(each)}" for each in legend(judged)) + "\n"
    return said


def _document(found: Readout, outcomes: FrameOf) -> dict[str, Any]:
    return {
        "readout": found.name,
        "refuses": found.refuses,
        "adaptive": list(found.adaptive),
        "follows_score": found.follows,
        "curves": [
            {
                "attack": each.name,
                "coverage": each.coverage.round(6).tolist(),
                "risk": each.risk.round(6).tolist(),
                "own": None if each.at is None else [round(value, 6) for value in each.at],
            }
            for each in curves(found, outcomes)
        ],
    }


def text(judged: Sequence[Readout], outcomes: FrameOf) -> "Group":
    """Return what rich prints on a terminal of 80 columns.

    Args:
        judged: The read-outs, in the order in which they are printed.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
    """
    from rich.console import Group
    from rich.text import Text

    every = [to_text(table) for each in judged for table in cut(each, outcomes)]
    return Group(*every, Text(), *(Text(shown(each), style="dim") for each in legend(judged)))


# --- the risk-coverage curve ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The risk-coverage curve of a read-out under an attack, the mean over seeds."""

    name: str
    """The attack, with its view and threat."""
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    """The selective risk at each coverage, in [0, 1]."""
    at: tuple[float, float] | None
    """Coverage and selective risk of the read-out's own refusals; None where it refuses all or nothing."""


GRID = 200
"""The number of coverages at which the curves of seeds are averaged."""


def curves(found: Readout, outcomes: FrameOf) -> list[Curve]:
    """Return the risk-coverage curves of a read-out (Geifman and El-Yaniv 2017), an attack each.

    Args:
        found: The read-out.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.

    Returns:
        The curves of what was run, from the first coverage of the grid that every seed has.
    """
    key = f"{found.name}, scores"
    layout = arrange(found.manifest, key)
    reader, metric = OutcomeReader(layout, outcomes, tables.unexamined), METRICS["aurc"]
    made = []
    for row in layout.rows:
        seeds: dict[int, list[Evidence]] = defaultdict(list)
        slot = row.slots[0]
        for condition in slot.attacks or slot.conditions:
            look = reader.look(condition, metric)
            if isinstance(look, Evidence):
                seeds[condition.seed].append(look)
        if seeds:
            made.append(_curve(_curve_name(found, slot.conditions[0]), list(seeds.values())))
    return made


def _curve_name(found: Readout, condition: Condition) -> str:
    name = title(condition)
    if condition.facts.idle:
        return name
    threat = (
        condition.norm if condition.radius is None else f"{condition.norm} {format_value(condition.radius)}"
    )
    return f"{name}, {threat}" + (", adaptive" if name in found.adaptive else "")


def _curve(name: str, seeds: Sequence[Sequence[Evidence]]) -> Curve:
    grid = np.arange(1, GRID + 1) / GRID
    risks, points = [], []
    for seed in seeds:
        rows = [each.validated for each in seed]
        sure, wrong = (np.concatenate([ask(each) for each in rows]) for ask in (confidence, is_wrong))
        refused = np.concatenate([is_refused(each) for each in rows])
        own = ranking.risk_coverage(sure, wrong.astype(np.float64))
        risks.append(np.interp(grid, own.coverage, own.risk, left=np.nan))
        if 0 < refused.mean() < 1:
            points.append((1 - refused.mean(), wrong[~refused].mean()))
    risk = np.mean(risks, axis=0)
    at = tuple(np.mean(points, axis=0).tolist()) if len(points) == len(seeds) else None
    return Curve(name, grid[~np.isnan(risk)], risk[~np.isnan(risk)], at)


def draw(judged: Sequence[Readout], outcomes: FrameOf, path: Path, form: str) -> None:
    """Write the risk-coverage curves of read-outs into a file, a panel for each read-out.

    Args:
        judged: The read-outs, at least one.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.
        path: The file.
        form: Its format: svg or png. The same numbers give the same file.

    Raises:
        InputError: The file cannot be written.
    """
    figure.save(partial(drawn, judged, outcomes), path, form)


def drawn(judged: Sequence[Readout], outcomes: FrameOf) -> "Figure":
    """Draw the risk-coverage curves of read-outs; the read-out's own refusals are a larger mark.

    Args:
        judged: The read-outs, at least one.
        outcomes: Gives the outcomes of an evaluation by its key, or None where there are none.

    Returns:
        The figure, which no window shows.
    """
    from matplotlib.figure import Figure

    wide = min(len(judged), 2)
    high = -(-len(judged) // wide)
    page = Figure(figsize=(7.6 * wide, 3.6 * high), layout="constrained")
    panels = page.subplots(high, wide, squeeze=False).flatten()
    for axes, each in zip(panels, judged, strict=False):
        _panel(axes, each.name, curves(each, outcomes))
    for axes in panels[len(judged) :]:
        axes.set_axis_off()
    return page


def _panel(axes: "Axes", name: str, found: Sequence[Curve]) -> None:
    lines = []
    for curve, style in zip(found, figure.styles(), strict=False):
        line, mark = {**style, "marker": None}, style["marker"]
        lines += axes.plot(100 * curve.coverage, 100 * curve.risk, linewidth=1.4, **line)
        if curve.at is not None:
            axes.plot(100 * curve.at[0], 100 * curve.at[1], color=style["color"], marker=mark, markersize=7)
    axes.set_title("\n".join(wrap(shown(name), 60)), fontsize="medium", parse_math=False)
    axes.set_xlabel("coverage (%)")
    axes.set_ylabel("selective risk (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.25, linewidth=0.5)
    legend = axes.legend(
        lines,
        ["curve"] * len(lines),
        fontsize="x-small",
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    for curve, label in zip(found, legend.get_texts(), strict=False):
        label.set(text=shown(curve.name), parse_math=False)
