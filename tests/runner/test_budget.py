"""What fits into a budget: rows that were packed by hand, and what is said of the others."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest

from bench.errors import InputError
from bench.runner.budget import Chosen, Row, parse_duration, within


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("90min", 5400),
        ("90m", 5400),
        (" 1h 30min ", 5400),
        ("1H30M", 5400),
        ("1.5 h", 5400),
        ("45s", 45),
        ("1d 2h 3min 4s", 93784),
        ("0.5s", 0.5),
    ],
)
def test_a_time_is_read_as_it_is_written(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2x", "expected a time such as 2h, 90min or '1h 30min' (units: d, h, min, s), found '2x'"),
        ("h", "found 'h'"),
        ("-1h", "above 0"),
        ("0", "above 0"),
        ("0h", "above 0"),
        ("", "found nothing"),
        ("  ", "found nothing"),
        ("90", "90 of what? 90min?"),
        ("-90", "90 of what?"),
        ("30min 1h", "found '30min 1h'"),
        ("1h 2h", "found '1h 2h'"),
        ("1h, 2min", "found '1h, 2min'"),
        ("nan h", "found 'nan h'"),
        ("9" * 400 + "h", "above 0"),
    ],
)
def test_what_is_no_time_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        parse_duration(text)
    assert str(refused.value).startswith("--budget")


# --- packing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What stands for a job."""

    key: str
    seconds: float


class Known:
    """Estimates that are right."""

    learned = 0

    def seconds(self, job: Any, device: str | None = None) -> float:
        return float(job.seconds)


class World:
    """Networks with evaluations: of each a training, a craft and an evaluation for each attack."""

    def __init__(self) -> None:
        self.todo: dict[Any, tuple[Any, ...]] = {}
        self.rows: list[Row] = []

    def row(
        self, name: str, train: float, attacks: dict[str, float], *, seed: int = 0, table: str = "t"
    ) -> Row:
        trained = Work(f"train {name} {seed}", train)
        self.todo[trained] = ()
        cells: list[Any] = []
        for attack, seconds in attacks.items():
            craft = Work(f"{attack} on {name} {seed}", seconds)
            cell = Work(f"{name}/{attack}/{seed}", 0.0)
            self.todo[craft], self.todo[cell] = (trained,), (trained, craft)
            cells.append(cell)
        row = Row(table, name, seed, tuple(cells))
        self.rows.append(row)
        return row

    def within(self, budget: float, devices: int = 1, kills: dict[str, float] | None = None) -> Chosen:
        costs: Any = Known()
        return within(self.rows, self.todo, costs, ("cpu",) * devices, budget, kills)


def keys(*rows: Row) -> set[str]:
    return {each.key for row in rows for each in row.evaluations}


def test_all_of_it_fits_or_is_named() -> None:
    world = World()
    a, b = world.row("a", 10, {"x": 1, "y": 2}), world.row("b", 20, {"x": 1, "y": 2})
    assert world.within(36) == Chosen(frozenset(keys(a, b)), 36.0, ())
    less = world.within(35)
    # Of b one cell is left, since its training and one attack fit: 13 + 20 + 2 = 35.
    assert keys(a) < less.wanted
    assert (len(less.wanted), less.seconds) == (3, 34.0)
    assert less.left == ("table t: 1 of 2 rows fit; left: b, seed 0 (1 of their 2 cells fit all the same)",)


def test_the_most_cells_for_each_second_come_first_and_smaller_rows_fill_the_rest() -> None:
    world = World()
    dear = world.row("dear", 50, {"x": 10})
    cheap = world.row("cheap", 5, {"x": 5})
    small = world.row("small", 15, {"x": 5})
    # 10 + 20 fit into 40, and 60 do not.
    assert world.within(40).wanted == keys(cheap, small)
    # Ten seconds are left over, which a row of 60 does not use.
    assert world.within(89).seconds == 30.0
    assert world.within(90).wanted == keys(cheap, small, dear)


def test_whole_rows_come_before_second_seeds_however_cheap_these_are() -> None:
    world = World()
    first = world.row("net", 100, {"x": 10, "y": 10}, seed=3)
    second = world.row("net", 1, {"x": 1, "y": 1}, seed=4)
    other = world.row("other", 100, {"x": 10, "y": 10}, seed=7)
    assert world.within(240).wanted == keys(first, other)
    assert world.within(243).wanted == keys(first, other, second)
    # Where no row of the first seed fits, those of the second are better than nothing.
    assert world.within(5).wanted == keys(second)


def test_kills_and_not_cells_are_counted_where_they_are_known() -> None:
    world = World()
    weak, strong = world.row("weak", 10, {"x": 10}), world.row("strong", 10, {"x": 10})
    cells = [row.evaluations[0].key for row in (weak, strong)]
    assert world.within(20, kills={cells[0]: 5.0, cells[1]: 50.0}).wanted == keys(strong)
    assert world.within(20, kills={cells[0]: 50.0, cells[1]: 5.0}).wanted == keys(weak)


def test_cheap_killers_come_first_where_a_row_does_not_fit() -> None:
    world = World()
    world.row("net", 10, {"fast": 5, "slow": 100, "useless": 5})
    kills = {"net/fast/0": 40.0, "net/slow/0": 50.0, "net/useless/0": 0.0}
    assert world.within(15, kills=kills).wanted == {"net/fast/0"}
    assert world.within(20, kills=kills).wanted == {"net/fast/0", "net/useless/0"}


def test_a_training_that_rows_share_is_paid_once() -> None:
    world = World()
    row = world.row("net", 90, {"x": 5})
    again = Row("u", "net", 0, (*row.evaluations,))
    world.rows.append(again)
    assert world.within(95) == Chosen(frozenset(keys(row)), 95.0, ())


def test_what_is_done_is_kept_and_costs_nothing() -> None:
    world = World()
    row, open_ = world.row("done", 10, {"x": 5}), world.row("open", 10, {"x": 5})
    for job in [job for job in world.todo if "done" in job.key]:
        del world.todo[job]
    found = world.within(1)
    assert (set(found.wanted), found.seconds) == (keys(row), 0.0)
    assert world.within(15).wanted == keys(row, open_)


def test_what_is_made_with_a_row_is_paid_with_it() -> None:
    world = World()
    row = world.row("n", 5, {"x": 10, "y": 10})
    trial, look = Work("trial", 20), Work("look", 3)
    world.todo |= {trial: (), look: ()}
    given = {"n/x/0": (trial, look), "n/y/0": (look,)}
    world.rows = [dataclasses.replace(row, checks=given)]
    assert world.within(48).seconds == 48
    found = world.within(47)
    assert found.wanted == {"n/y/0"}, "what fits is the cell without the trial"
    assert found.seconds == 5 + 10 + 3


def test_devices_share_what_can_be_shared() -> None:
    world = World()
    world.row("net", 10, {name: 10 for name in "abcd"})
    assert world.within(20, devices=4).seconds == 20.0
    assert len(world.within(20, devices=2).wanted) == 2
    assert len(world.within(20, devices=1).wanted) == 1


def test_where_nothing_fits_the_cheapest_row_is_named_with_its_price() -> None:
    world = World()
    world.row("dear", 500, {"x": 100, "y": 20})
    world.row("cheap", 100, {"x": 200}, table="u")
    found = world.within(30)
    assert (found.wanted, found.seconds) == (frozenset(), 0.0)
    assert found.left == (
        "table t: 0 of 1 row fit; left: dear, seed 0",
        "table u: 0 of 1 row fit; left: cheap, seed 0",
        "no row fits into 30 s: the cheapest, cheap, seed 0 of table u, takes about 5 min 0 s",
    )


def test_what_no_table_reads_comes_last_and_many_rows_are_not_all_named() -> None:
    world = World()
    loose = world.row("loose", 1, {"x": 1}, table="")
    rows = [world.row(f"n{number}", 10, {"x": 10}) for number in range(6)]
    found = world.within(41)
    assert keys(loose) & found.wanted == set()
    assert len(found.wanted & keys(*rows)) == 2
    assert found.left[0].startswith("table t: 2 of 6 rows fit; left: n")
    assert "; and 1 more" in found.left[0]
    assert found.left[1] == "what no table reads: 0 of 1 row fit; left: loose, seed 0"


def test_nothing_to_do_is_nothing_left() -> None:
    assert World().within(10) == Chosen(frozenset(), 0.0, ())
