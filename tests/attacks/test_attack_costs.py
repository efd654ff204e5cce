"""What attacks declare to cost is what they ask for, at most."""

import math
from typing import Any

import pytest
import torch

import bench.doctor.ground
from bench.doctor.ground import Ground
from bench.protocols import Shape
from bench.referee.instruments import QueryCounter
from bench.registry import ATTACKS, bind
from bench.testing import Halfspace

OWN = [
    (entry.name, norm)
    for entry in map(ATTACKS.__getitem__, ATTACKS)
    if entry.module.startswith("attacks.") and entry.library is None and entry.starts != "stored"
    for norm in sorted(entry.norms)
]

SHORT: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 6, "restarts": 2},
    "apgd-t": {"steps": 6, "restarts": 2},
    "boundary": {"steps": 60, "directions": 2, "starts": 5},
    "bpda-cw": {"steps": 12, "searches": 3},
    "cw-l2": {"steps": 12, "searches": 3},
    "cw-linf": {"steps": 6, "restarts": 3},
    "deepfool": {"steps": 5},
    "fab": {"steps": 6, "restarts": 2},
    "fab-t": {"steps": 6, "restarts": 2},
    "feature-matching": {"steps": 6},
    "latent-backtracking": {"steps": 5, "searches": 2, "backtracks": 3, "draws": 2},
    "latent-descent": {"steps": 6, "classes": "all"},
    "localsearch": {"rounds": 6},
    "logit-matching": {"steps": 6, "start": "uniform"},
    "nes": {"steps": 6, "searches": 2, "samples": 10},
    "on-manifold": {"starts": 1, "start_steps": 5, "steps": 6, "searches": 2, "jitter": 0.1},
    "pgd": {"steps": 6, "restarts": 10},
    "spsa": {"steps": 4, "samples": 9},
    "spsa-released": {"steps": 4, "samples": 9},
    "square": {"queries": 40},
    "threshold-cw": {"steps": 12, "searches": 3},
}
"""Shorter than by default, for a test."""


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("name", "norm"),
    [each for each in OWN if each[0] not in ("autoattack", "fast-worst", "none", "sequence")],
)
def test_no_attack_asks_for_more_than_it_declares(
    name: str, norm: Any, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters: list[QueryCounter] = []

    class Kept(QueryCounter):
        @classmethod
        def of(cls, n: int, device: torch.device) -> QueryCounter:  # type: ignore[override]
            meters.append(QueryCounter.of(n, device))
            return meters[-1]

    monkeypatch.setattr(bench.doctor.ground, "QueryCounter", Kept)
    entry = ATTACKS[name]
    params = bind(entry, SHORT.get(name, {}))
    plane = Halfspace(Shape(3, 5, 4, max(2, entry.least_classes)))
    trial = Ground(entry, params, norm, plane, *plane.examples(8))
    radius = 0.5 * float(trial.least.min()) if entry.kind == "fixed-budget" else math.inf
    trial.run(radius, exact=exact)
    (counter,) = meters
    spent, declared = float(counter.forwards.max()), entry.passes(params)
    if entry.cost is None:
        # A product of counts: starts, ends and a second search for what failed are not told.
        assert spent <= 2 * declared + 4
    else:
        assert spent <= declared
    if entry.kind == "fixed-budget":
        # Nothing succeeds: the attack goes on to its end, and the declaration is not far off.
        assert declared <= 1.5 * spent or name in ("feature-matching", "logit-matching", "apgd-t")


def test_what_portfolios_cost_is_the_sum_of_their_members() -> None:
    cost = ATTACKS["autoattack"].cost
    assert cost is not None
    apgd = 101 + 1
    targets, boundaries = 1 + 9 * 101, 1 + 9 * (2 * 100 + 4)
    assert cost(version="standard") == 1 + apgd + targets + boundaries + 5001 + 4
    assert cost(version="rand") == 1 + 20 * 2 * (apgd + 1)


@pytest.mark.parametrize(
    ("name", "params", "passes"),
    [
        ("square", {"queries": 7}, 8),
        ("localsearch", {"rounds": 3}, 1 + 3 * 129),
        ("latent-backtracking", {"backtracks": 0, "steps": 4, "searches": 1, "draws": 1}, 3 + 5 * 4),
        ("torchattacks/Square", {"n_queries": 20, "n_restarts": 3}, 61),
        ("torchattacks/SPSA", {"nb_iter": 2, "nb_sample": 8}, 32),
        ("torchattacks/VMIFGSM", {"steps": 4, "N": 3}, 16),
        ("torchattacks/Pixle", {"restarts": 4, "max_iterations": 5}, 21),
        ("torchattacks/FFGSM", {}, 2),
        ("foolbox/EADAttack", {"binary_search_steps": 3, "steps": 10}, 31),
        ("foolbox/LinearSearchBlendedUniformNoiseAttack", {"directions": 5, "steps": 6}, 12),
        ("pgd", {"steps": 7, "restarts": 3}, 21),
        ("fgsm", {}, 1),
    ],
)
def test_counts_of_any_name_are_told(name: str, params: dict[str, Any], passes: int) -> None:
    entry = ATTACKS[name]
    assert entry.passes(bind(entry, params)) == passes


def test_every_attack_of_the_registry_tells_a_whole_number() -> None:
    for entry in map(ATTACKS.__getitem__, ATTACKS):
        if entry.name.startswith("toy/"):
            continue  # Registered by the tests.
        if "BrendelBethge" in entry.name or entry.name.endswith("VirtualAdversarialAttack"):
            continue  # Of numba, which may be missing; has no default for its steps.
        params = {"of": [{"use": "pgd"}]} if entry.name == "sequence" else {}
        passes = entry.passes(bind(entry, params))
        assert isinstance(passes, int)
        assert passes >= 1
