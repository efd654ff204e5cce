"""Limits of what a task file may say, beside those that parameters declare."""

from typing import Any

import pytest
from pydantic import ValidationError

from bench.suite.schema import Origin, Threats
from bench.suite.yaml_source import sentence


@pytest.mark.parametrize("seed", [-1, True, 0.5])
def test_a_source_has_seeds_of_the_same_kind_as_a_task(seed: Any) -> None:
    with pytest.raises(ValidationError):
        Origin.model_validate({"defense": "a", "view": "logits", "seed": seed})
    assert Origin.model_validate({"defense": "a", "view": "logits", "seed": 0}).seed == 0


def test_nothing_is_called_as_a_task_file_writes_it() -> None:
    with pytest.raises(ValidationError) as refused:
        Threats.model_validate({"norm": None})
    assert sentence(Threats, refused.value).endswith("found null")
