"""The ends of messages about names that are unknown, and whose fault an error is."""

import errno

import pytest
import torch

from bench.errors import (
    InputError,
    OvertimeError,
    TrainingError,
    beyond_the_code,
    did_you_mean,
    out_of_memory,
)
from bench.vocabulary import ELSEWHERE, WORDS


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("step", ["step_size", "steps"], "; step is called step_size now"),
        ("serve.inner_step", [], "; serve.inner_step is called inference.inner_step now"),
        ("served", ["seed", "attack"], "; served is called inference now"),
        ("doubts", ["flags", "readout"], "; doubts is called flags now"),
        ("doubts", ["readout"], "; doubts is called flags now, which is unknown here (known: readout)"),
        ("void", ["invalid"], "; void is called invalid now"),
        ("budget", ["kind"], "; budget is called kind now"),
        ("step", [], "; step is called step_size now, which is unknown here (there are none)"),
        ("stps", ["steps"], "; did you mean 'steps'?"),
        ("STEPS", ["steps"], "; did you mean 'steps'?"),
        ("lib/pgd", ["lib/GN", "lib/PGD"], "; did you mean 'lib/PGD'?"),
        ("l2pgd", ["pgd", "lib/L2PGD"], "; did you mean 'lib/L2PGD'?"),
        ("alpha", ["step_size", "steps"], "; alpha is called step_size here"),
        ("alpha", ["steps"], " (known: steps)"),
        ("2", ["linf", "l2"], "; 2 is called l2 here"),
        ("gpu", ["cpu", "cuda:0"], "; gpu is called cuda:0 here"),
        ("seeds", ["seed", "target"], "; did you mean 'seed'?"),
        ("other", ["steps"], " (known: steps)"),
        ("other", [], " (there are none)"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest_right_thing(
    name: str, known: list[str], said: str
) -> None:
    assert did_you_mean(name, known) == said


FULL = [
    MemoryError(),
    torch.OutOfMemoryError("no room"),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_memory_that_is_full_is_known_by_its_kind_or_its_words(error: Exception) -> None:
    assert out_of_memory(error)
    assert beyond_the_code(error) is error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        InputError("not there"),
        OvertimeError("too long"),
        TrainingError("not finite"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
    ids=repr,
)
def test_what_code_did_not_do_is_found_under_what_it_raised(error: BaseException) -> None:
    assert beyond_the_code(error) is error
    with pytest.raises(ValueError, match="b") as raised:
        _raise_over(error)
    assert beyond_the_code(raised.value) is error


def _raise_over(error: BaseException) -> None:
    """Raise something else where an error is handled, as libraries do."""
    try:
        raise error
    except type(error):
        try:
            raise KeyError("a")
        except KeyError as between:
            raise ValueError("b") from between


def test_what_code_did_itself_is_its_own() -> None:
    first, second = ValueError("a"), PermissionError("an attack declared access='score' asked for gradients")
    assert beyond_the_code(first) is None
    assert beyond_the_code(second) is None
    assert not out_of_memory(SystemExit(1))
    # Errors may go in circles.
    first.__context__, second.__cause__ = second, first
    assert beyond_the_code(first) is None


def test_a_word_that_belongs_elsewhere_is_sent_there_and_only_where_that_helps() -> None:
    said = did_you_mean("eps", ["steps", "step_size"])
    assert said == "; the radius stands in the threat of the task, threat: {norm: linf, radius: 8/255}"
    assert did_you_mean("eps", ["steps"], elsewhere=False) == "; did you mean 'steps'?"
    assert did_you_mean("eps", ["radius", "norm"]) == "; eps is called radius here"


def test_many_names_are_not_listed_in_a_message() -> None:
    many = [f"name-{number}" for number in range(200)]
    said = did_you_mean("qqq", many, listed="bench list attacks")
    assert said == " (200 are known, which bench list attacks lists)"
    assert len(did_you_mean("mane9", many)) < 100


def test_no_word_of_other_tools_is_said_to_be_two_things_in_one_place() -> None:
    """A word may mean several things, of which each place has one; no word is what it is called."""
    assert not [word for word, ours in WORDS.items() if word in ours]
    assert all(word == word.casefold() for word in (*WORDS, *ELSEWHERE))
