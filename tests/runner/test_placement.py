"""Which job a slot takes, on a virtual clock: the code that is tested is the code that places real jobs."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError
from itertools import pairwise

import pytest

from bench.runner import placement
from bench.runner.placement import SWITCH, Placement, Step, ordered, paths, simulate
from bench.runner.precedence import Turn

UNEQUAL = tuple(f"speed {speed}" for speed in range(1, 9))
"""Eight devices, the last eight times as fast as the first."""


def speed(device: str | None) -> float:
    return 1.0 if device is None else float(device.removeprefix("speed "))


@dataclass(frozen=True)
class Work:
    """What stands for a job."""

    key: str
    seconds: float
    """On a device of speed 1."""
    network: str = ""


Graph = dict[Work, tuple[Work, ...]]


class Believed:
    """Estimates: the truth, times a factor for each job."""

    def __init__(self, factors: Mapping[Work, float] | None = None) -> None:
        self.factors = factors or {}
        self.learned = 0

    def seconds(self, job: Work, device: str | None = None) -> float:
        return truth(job, device) * self.factors.get(job, 1.0)


def truth(job: Work, device: str | None) -> float:
    return job.seconds / speed(device)


def crossing(rng: random.Random, jobs: int, draw: Callable[[], float]) -> Graph:
    """Return networks, some from others, the shards of attacks on each, and evaluations, as in a plan."""
    graph: Graph = {}

    def made(kind: str, seconds: float, *needs: Work) -> Work:
        job = Work(f"{kind} {len(graph)}", seconds)
        graph[job] = needs
        return job

    while len(graph) < jobs:
        train = made("train", 5 * draw())
        if rng.random() < 0.3:
            train = made("train", 5 * draw(), train)
        for _ in range(rng.randint(1, 12)):
            crafts = [made("craft", draw(), train) for _ in range(rng.randint(1, 10))]
            for _ in range(rng.randint(1, 2)):
                made("evaluate", 0.02 * draw(), train, *crafts)
    return graph


TAILS: dict[str, Callable[[random.Random], float]] = {
    "pareto": lambda rng: rng.paretovariate(1.5),
    "heavier pareto": lambda rng: rng.paretovariate(1.1),
    "lognormal": lambda rng: rng.lognormvariate(0, 1.5),
}


def bound(graph: Graph, devices: Iterable[str]) -> float:
    """Return what no schedule goes below: critical path on the fastest device, work over all speeds."""
    speeds = [speed(each) for each in devices]
    critical = max(paths(ordered(graph), lambda job: job.seconds).values())
    return max(critical / max(speeds), sum(job.seconds for job in graph) / sum(speeds))


def checked(graph: Graph, steps: list[Step[Work]]) -> float:
    """Return when the last job ended, having checked that this could have happened at all."""
    assert len(steps) == len(graph)
    at = {step.job: step for step in steps}
    assert at.keys() == graph.keys()
    for job, needs in graph.items():
        assert all(at[need].ended <= at[job].begun for need in needs)
    for slot in {step.slot for step in steps}:
        own = sorted((step for step in steps if step.slot == slot), key=lambda step: step.begun)
        assert all(first.ended <= second.begun for first, second in pairwise(own))
    return max(step.ended for step in steps)


def turn(job: Work) -> Turn:
    kinds = {"train": Turn.TRAINING, "evaluate": Turn.VERDICT, "clean": Turn.CLEAN}
    return kinds.get(job.key.partition(" ")[0], Turn.REST)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("numbers_first", [False, True], ids=["longest path", "numbers first"])
def test_unequal_devices_end_within_a_twentieth_of_what_is_possible(
    seed: int, tail: str, numbers_first: bool
) -> None:
    rng = random.Random(seed)
    graph = crossing(rng, 5000, lambda: TAILS[tail](rng))
    known = {"turn": turn} if numbers_first else {}
    steps = list(simulate(graph, Believed(), UNEQUAL, truth, **known))
    for step in steps:
        assert step.ended - step.begun == pytest.approx(truth(step.job, UNEQUAL[step.slot]), abs=1e-6)
    assert checked(graph, steps) <= 1.05 * bound(graph, UNEQUAL)


@pytest.mark.parametrize("seed", range(3))
def test_a_critical_path_that_is_as_long_as_the_work_is_followed_on_the_fastest_device(seed: int) -> None:
    rng = random.Random(seed)
    graph = crossing(rng, 5000, lambda: rng.paretovariate(1.5))
    total = sum(job.seconds for job in graph)
    # As long on the fastest of the eight as everything on all of them.
    chain = total * 8 / 28 / 20
    last: tuple[Work, ...] = ()
    for number in range(20):
        job = Work(f"link {number}", chain)
        graph[job], last = last, (job,)
    assert checked(graph, list(simulate(graph, Believed(), UNEQUAL, truth))) <= 1.05 * bound(graph, UNEQUAL)


@pytest.mark.parametrize(("giants", "share"), [(8, 0.3), (12, 0.25), (16, 0.5)])
def test_long_jobs_share_the_fast_devices(giants: int, share: float) -> None:
    """Trainings of a third of the whole run on the fastest device, more than twice of it on the slowest.

    Where each device that is free takes the longest job, the last one ends 1.2 to 1.57 times later.
    """
    rng = random.Random(0)
    graph = crossing(rng, 5000, lambda: rng.lognormvariate(0, 1.5))
    total = sum(job.seconds for job in graph)
    for number in range(giants):
        graph[Work(f"giant {number}", total / 36 * 8 * share)] = ()
    assert checked(graph, list(simulate(graph, Believed(), UNEQUAL, truth))) <= 1.05 * bound(graph, UNEQUAL)


@pytest.mark.parametrize("seed", range(5))
def test_wrong_estimates_cost_time_and_never_a_job(seed: int) -> None:
    rng = random.Random(seed)
    graph = crossing(rng, 300, lambda: rng.paretovariate(1.1))
    wild = {job: rng.choice([0.0, 1e-3, 1.0, 1e3]) for job in graph}
    end = checked(graph, list(simulate(graph, Believed(wild), UNEQUAL, truth)))
    # No slot is idle while a job is ready that it would have done in the time for which it waits.
    assert end <= sum(truth(job, UNEQUAL[0]) for job in graph)


def test_a_slow_slot_leaves_a_long_job_to_a_fast_one_that_is_busy() -> None:
    fast, slow = "speed 8", "speed 1"
    graph: Graph = {Work("first", 80.0): (), Work("second", 72.0): (), Work("short", 4.0): ()}
    steps = {step.job.key: step for step in simulate(graph, Believed(), (slow, fast), truth)}
    assert (steps["first"].slot, steps["second"].slot, steps["short"].slot) == (1, 1, 0)
    assert (steps["second"].begun, steps["second"].ended, steps["short"].ended) == (10.0, 19.0, 4.0)


def test_a_slot_that_does_not_end_is_waited_for_only_so_long() -> None:
    """The fast slot is thought to be free after 10 s and never is: the slow one begins all the same."""
    now = 0.0
    first, second = Work("first", 80.0), Work("second", 72.0)
    placed: Placement[Work] = Placement(
        {first: (), second: ()}, Believed(), ("speed 1", "speed 8"), clock=lambda: now
    )
    placed.push(first)
    placed.push(second)
    assert placed.pop() == (first, 1)
    asked = 0
    while (found := placed.pop()) is None:
        wait = placed.wait()
        assert wait is not None
        assert wait > 0
        now += wait
        asked += 1
    assert found == (second, 0)
    # It was worth waiting while the fast slot had worked less than 72 - 9 s; it was asked at 10, 20, 40, 80.
    assert now == 80.0
    assert asked == 4
    assert placed.pop() is None
    assert placed.wait() is None


def test_the_longest_path_counts_and_not_the_longest_job() -> None:
    long = Work("long", 5.0)
    train, craft = Work("train", 2.0), Work("craft", 9.0)
    steps = list(simulate({long: (), train: (), craft: (train,)}, Believed(), ("speed 1",), truth))
    assert [step.job for step in steps] == [train, craft, long]


def test_priorities_follow_what_was_learned() -> None:
    costs = Believed()
    jobs = [Work(name, 100.0 * (number + 1)) for number, name in enumerate("abc")]
    placed: Placement[Work] = Placement(dict.fromkeys(jobs, ()), costs, ("speed 1",), clock=lambda: 0.0)
    for job in jobs:
        placed.push(job)
    assert placed.pop() == (jobs[2], 0)
    costs.factors, costs.learned = {jobs[0]: 50.0}, 1
    placed.free(0)
    assert placed.pop() == (jobs[0], 0)


def test_a_job_that_failed_can_be_tried_again_and_is_taken_once() -> None:
    job = Work("a", 1.0)
    placed: Placement[Work] = Placement({job: ()}, Believed(), ("speed 1", "speed 1"), clock=lambda: 0.0)
    for _ in range(3):
        placed.push(job)
        assert placed.pop() == (job, 0)
        assert placed.pop() is None
        placed.free(0)
    assert placed.pop() is None


# --- first numbers first -----------------------------------------------------------------------------


def suite_of(training: float, networks: int = 6) -> Graph:
    """Return what a suite of clean, PGD in 4 shards and AutoAttack in 12 is, on several networks."""
    graph: Graph = {}
    for name in range(networks):
        train = Work(f"train {name}", training * (1 + name / networks), f"{name}")
        graph[train] = ()
        graph[Work(f"clean {name}", 0.5, f"{name}")] = (train,)
        graph[Work(f"trial {name}", 3.0)] = ()
        for attack, shards, seconds in (("pgd", 4, 5.0), ("autoattack", 12, 60.0)):
            crafts = [Work(f"{attack} {name}/{shard}", seconds, f"{name}") for shard in range(shards)]
            graph |= dict.fromkeys(crafts, (train,))
            graph[Work(f"evaluate {attack} {name}", 0.5, f"{name}")] = (train, *crafts)
    return graph


def ends(steps: Iterable[Step[Work]], begins: str) -> list[float]:
    return [step.ended for step in steps if step.job.key.startswith(begins)]


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("training", [0.2, 30.0, 600.0])
def test_numbers_come_early_and_the_run_ends_no_later(slots: int, training: float) -> None:
    graph, devices = suite_of(training), ("speed 1",) * slots
    before = checked(graph, list(simulate(graph, Believed(), devices, truth)))
    steps = list(simulate(graph, Believed(), devices, truth, turn=turn))
    assert checked(graph, steps) <= 1.03 * before
    trained = {step.job.network: step.ended for step in steps if step.job.key.startswith("train ")}
    clean = {step.job.network: step.ended for step in steps if step.job.key.startswith("clean")}
    # A slot may be at a shard of an attack, or at another training, when a training ends.
    longest = max(job.seconds for job in graph if not job.key.startswith("train "))
    assert all(clean[name] - trained[name] <= longest + 3.0 for name in clean)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_clean_numbers_of_all_come_before_any_attack_s_and_cheap_attacks_before_dear_ones(slots: int) -> None:
    graph, devices = suite_of(0.2), ("speed 1",) * slots
    steps = list(simulate(graph, Believed(), devices, truth, turn=turn))
    attacks = min(*ends(steps, "pgd"), *ends(steps, "autoattack"))
    assert max(ends(steps, "clean")) < attacks
    assert max(ends(steps, "evaluate pgd")) < min(ends(steps, "evaluate autoattack"))
    # What leads to no number comes after the first ones, and within the run.
    assert max(ends(steps, "clean")) < min(ends(steps, "trial"))
    assert max(ends(steps, "trial")) < max(ends(steps, "evaluate"))


def test_a_clean_number_waits_for_no_attack_where_trainings_are_long() -> None:
    """One slot: each training is followed by its clean number at once, and attacks come after the last."""
    steps = list(simulate(suite_of(600.0), Believed(), ("speed 1",), truth, turn=turn))
    order = [step.job.key.partition(" ")[0] for step in steps]
    assert order[:12] == ["train", "clean"] * 6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [2, 5])
def test_equal_slots_end_as_early_as_by_the_longest_path(seed: int, slots: int) -> None:
    rng = random.Random(seed)
    graph = crossing(rng, 800, lambda: rng.paretovariate(1.5))
    devices = ("speed 1",) * slots
    before = checked(graph, list(simulate(graph, Believed(), devices, truth)))
    steps = list(simulate(graph, Believed(), devices, truth, turn=turn))
    assert checked(graph, steps) <= 1.03 * before
    half = [
        sorted(ends(each, "evaluate"))[:40] for each in (steps, simulate(graph, Believed(), devices, truth))
    ]
    assert sum(half[0]) < sum(half[1])


# --- warm slots --------------------------------------------------------------------------------------


def placed_on(
    graph: Iterable[Work],
    slots: int,
    warm: Callable[[int, Work], bool] = lambda slot, job: True,
    push: bool = True,
) -> Placement[Work]:
    found: Placement[Work] = Placement(
        dict.fromkeys(graph, ()),
        Believed(),
        ("speed 1",) * slots,
        warm=warm,
        network=lambda job: job.network or None,
        process=lambda job: job.network,
        clock=lambda: 0.0,
    )
    for job in graph if push else ():
        found.push(job)
    return found


def test_among_equals_a_process_that_is_there_comes_first_and_a_long_path_before_both() -> None:
    a, b, c = Work("a", 500.0, "x"), Work("b", 5.0, "y"), Work("c", 4.0, "y")

    def warm(slot: int, job: Work) -> bool:
        return slot == 1 and job.network == "y"

    long_first = placed_on([a, b, c], 2, warm)
    assert [long_first.pop(), long_first.pop(), long_first.pop()] == [(a, 0), (b, 1), None]
    near = Work("a", 5.0 + SWITCH, "x")
    about_equal = placed_on([near, b, c], 2, warm)
    assert about_equal.pop() == (b, 1)
    about_equal.free(1)
    assert about_equal.pop() == (near, 0)
    assert about_equal.pop() == (c, 1)


def test_a_slot_prefers_the_network_that_it_had_last() -> None:
    jobs = [Work(f"{number}{name}", 5.0, name) for number in range(4) for name in "nm"]
    placed = placed_on(jobs, 2, push=False)
    took: dict[int, str] = {0: "", 1: ""}

    def begin() -> int:
        found = placed.pop()
        assert found is not None
        took[found[1]] += found[0].network
        return found[1]

    for job in jobs[:2]:
        placed.push(job)
        begin()
    for job in jobs[2:]:
        placed.push(job)
    for _ in range(3):
        for slot in (0, 1):
            placed.free(slot)
            assert begin() == slot
    assert took == {0: "nnnn", 1: "mmmm"}


def test_a_slot_takes_another_network_s_job_where_it_has_none_of_its_own() -> None:
    jobs = [Work(f"{number}{name}", 5.0, name) for number, name in enumerate("nnm")]
    placed = placed_on(jobs, 1)
    took = ""
    while (found := placed.pop()) is not None:
        took += found[0].network
        placed.free(0)
    assert took == "nnm"


def test_shards_of_one_condition_go_to_every_slot_and_wait_for_none() -> None:
    """One slot has the network; the other three take its shards all the same, two each."""
    train = Work("train", 10.0, "n")
    shards = [Work(f"shard {number}", 10.0, "n") for number in range(8)]
    graph: Graph = {train: (), **dict.fromkeys(shards, (train,))}
    steps = list(simulate(graph, Believed(), ("speed 1",) * 4, truth))
    assert checked(graph, steps) == 30.0


# --- size --------------------------------------------------------------------------------------------


def test_a_chain_of_a_hundred_thousand_needs_no_deep_stack() -> None:
    chain = {number: (number - 1,) for number in range(100_000, 0, -1)}
    found = paths(ordered(chain), float)
    assert (found[100_000], found[2], found[1]) == (100_000.0, sum(range(2, 100_001)), sum(range(100_001)))


def test_the_longest_way_is_that_of_all_ways() -> None:
    """Against all ways of small graphs, one after the other."""
    for seed in range(20):
        rng = random.Random(seed)
        names = list(range(9))
        took = [rng.random() for _ in names]
        graph = {job: tuple(need for need in range(job) if rng.random() < 0.4) for job in names}
        rng.shuffle(names)
        found = paths(ordered({job: graph[job] for job in names}), took.__getitem__)

        def longest(job: int, graph: dict[int, tuple[int, ...]] = graph, took: list[float] = took) -> float:
            after = [longest(each) for each, needs in graph.items() if job in needs]
            return took[job] + max(after, default=0.0)

        assert found == pytest.approx({job: longest(job) for job in names})


def test_a_circle_is_refused() -> None:
    with pytest.raises(CycleError):
        ordered({1: (2,), 2: (1,)})


def test_what_is_asked_of_the_costs_grows_no_faster_than_n_log_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job is measured, so that priorities are computed again and again."""

    class Counting(Believed):
        asked = 0

        def seconds(self, job: Work, device: str | None = None) -> float:
            self.asked += 1
            return super().seconds(job, device)

    def asked(size: int) -> float:
        rng = random.Random(1)
        graph = crossing(rng, size, lambda: rng.lognormvariate(0, 1))
        costs = Counting()
        for _ in simulate(graph, costs, ("speed 1", "speed 1"), truth):
            costs.learned += 1
        return costs.asked / len(graph)

    small, large = asked(500), asked(4000)
    assert small > 5
    # Eight times as many jobs, and log2(8) / log2(1.5) = 5.1 more times that each is looked at.
    assert large <= small + 2 * 5.2
    monkeypatch.setattr(placement, "AGAIN", 1.0)
    assert asked(500) > 10 * small
