"""Fitted defenses, asked once more about stored images: rounded to 8 bits, as files of images hold them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.api import stored
from bench.api.direct import Loaded, settings
from bench.console import condition_name
from bench.errors import InputError, persons
from bench.referee.answers import ask
from bench.referee.freezing import frozen
from bench.registry import discover
from bench.report.behind import Behind
from bench.report.rounding import Answers, left_of
from bench.results.conditions import Condition
from bench.results.manifest import read
from bench.results.outcomes import arrays, select
from bench.results.standing import broke
from bench.results.store import Store

LEVELS = 255
"""The greatest value of a channel in 8 bits."""

KEPT = 8
"""Networks that are kept at a time: conditions of one row ask for the same few."""


class Asker:
    """Asks the defenses of a results folder about the images that they were shown, rounded to 8 bits.

    Args:
        root: The results folder.
        suite: The task file; None: it is looked for beside the results.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.
    """

    def __init__(self, root: Path, suite: Path | None, data_root: Path | None) -> None:
        discover()
        self._root, self._suite, self._data_root = root, suite, data_root
        self._manifest = read(root, Path(f"{root.resolve().name}.yaml"))
        self._models: dict[str, Loaded] = {}

    def ask(self, condition: Condition) -> Answers:
        """Return what a defense answers to the rounded images of a condition.

        Args:
            condition: The condition; of several attacks that were run as one, the images of all of them.

        Returns:
            The answers, in ascending order of the examples.

        Raises:
            InputError: Images or weights are not kept there, or are of other code; or the defense draws, so
                that another answer says nothing about rounding.
        """
        if condition.facts.random:
            raise InputError("it draws when it is asked, so that another answer says nothing about rounding")
        whole = replace(condition, facts=replace(condition.facts, member=None))
        shown = stored.of_condition(self._root, self._manifest, whole, self._data_root, self._suite)
        network = self._loaded(condition).network
        levels = (shown.images * LEVELS).round() / LEVELS
        cpu = torch.device("cpu")
        with settings(cpu), frozen(network, seed=0), torch.no_grad():
            answers = ask(network, levels, str(condition.coordinates["readout"]), cpu)
        order = np.argsort(shown.index.numpy(), kind="stable")
        return {name: answers[name].numpy()[order] for name in ("label", "rejected")}

    def __call__(self, condition: Condition) -> Answers | str:
        """Return what a defense answers to the rounded images of a condition, or why it cannot be asked.

        Args:
            condition: The condition.
        """
        try:
            return self.ask(condition)
        except Exception as error:  # noqa: BLE001 - code of a user may raise anything, and other cells are asked
            said = persons(error)
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}" if said is None else said

    def _loaded(self, condition: Condition) -> Loaded:
        """Return the fitted defense of a condition."""
        at = condition.coordinates
        inference: dict[str, Any] = {
            name.partition(".")[2]: value for name, value in at.items() if name.startswith("inference.")
        }
        wish = stored.Wish(str(at["defense"]), condition.seed, condition.data, inference or None, "cpu")
        name = repr(wish)
        if name not in self._models:
            if len(self._models) >= KEPT:
                del self._models[next(iter(self._models))]
            self._models[name] = stored.loaded(self._root, wish, self._suite, self._data_root)
        return self._models[name]


class Rounded(NamedTuple):
    """What is left of an attack where its images are rounded to 8 bits, as a file of an image holds them."""

    name: str
    """The condition, in words."""
    n: int
    """How many examples there are."""
    right: int
    """How many are right on the rounded images; moved ones that are refused count as right."""
    found: int
    """How many examples the attack moved and broke."""
    kept: int
    """How many of these the rounded image breaks, too."""

    def __str__(self) -> str:
        """Return it in a sentence."""
        share = f"{100 * self.right / self.n:.1f} % right" if self.n else "no example"
        return (
            f"{self.name}: rounded to 8 bits, {self.kept} of {self.found} that were moved and broken "
            f"stay so; {share} of {self.n}"
        )


def rounded(found: Behind, suite: Path | None, data_root: Path | None) -> Iterator[Rounded]:
    """Ask the defenses behind a number about its images, rounded to 8 bits.

    Args:
        found: The number.
        suite: The task file; None: it is looked for beside the results.
        data_root: The folder of the data sets; None: ``BENCH_DATA``, else the user's cache.

    Yields:
        What is left, for each condition.

    Raises:
        InputError: Images or weights are not kept there, or are of other code.
    """
    asker, store = Asker(found.root, suite, data_root), Store(found.root)
    for condition in found.conditions:
        answers = asker.ask(condition)
        rows: Mapping[str, Any] = arrays(store.outcomes(condition.job))
        if (member := condition.facts.member) is not None:
            mask = broke(arrays(store.outcomes(condition.job), ("found_by",)), member)
            rows, answers = select(rows, mask), select(answers, mask)
        left = left_of(rows, {**rows, **answers})
        yield Rounded(condition_name(condition.coordinates), len(rows["index"]), *left)
