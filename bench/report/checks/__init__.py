"""Flags: reasons to doubt a number. Each has a code, a level, a sentence, and advice in `docs/flags.md`.

The checks read the outcomes behind the cells of a table, whatever metric the table prints, and judge each
example by `metrics.is_correct`.
"""

from bench.report.checks.answers import union_flags
from bench.report.checks.cells import cell_flags, invalid_moves, member_raised, trial_flags
from bench.report.checks.comparisons import compared, unequal
from bench.report.checks.defenses import defense_flags
from bench.report.checks.evidence import Evidence, coordinates, title
from bench.report.checks.flags import CODES, LEVELS, Flag, worst_level

__all__ = [
    "CODES",
    "LEVELS",
    "Evidence",
    "Flag",
    "cell_flags",
    "compared",
    "coordinates",
    "defense_flags",
    "invalid_moves",
    "member_raised",
    "title",
    "trial_flags",
    "unequal",
    "union_flags",
    "worst_level",
]
