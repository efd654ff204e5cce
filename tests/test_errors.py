"""The ends of messages about names that are unknown."""

import pytest

from bench.errors import did_you_mean


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
        ("other", ["steps"], " (known: steps)"),
        ("other", [], " (there are none)"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest_right_thing(
    name: str, known: list[str], said: str
) -> None:
    assert did_you_mean(name, known) == said
