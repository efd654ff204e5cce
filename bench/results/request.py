"""What was last asked of a results folder, so that workers on any machine can help with it."""

import json
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import InputError
from bench.results import durable

FILE = "request.json"


class Request(BaseModel):
    """A run of a task file into a results folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: Path
    """The task file, absolute."""
    digest: str
    """The sha256 of the task file."""
    sources: dict[str, str]
    """Digests of the code of the plan, by module."""
    tables: list[str] | None = None
    """The tables that were asked for; None for all."""
    wanted: list[str] | None = None
    """Keys of the evaluations to make; None: those that the tables read."""
    data_root: Path | None = None
    """The folder of the data sets; None for the default of each machine."""
    worst: bool = False
    """Whether every task is planned in worst mode."""
    trust: bool = False
    """Whether results of code that has changed count."""
    id: str = Field(default_factory=lambda: uuid4().hex)
    """Names this request."""


def write(root: Path, request: Request) -> None:
    """Keep a request in place of the one before.

    Args:
        root: The results folder.
        request: What is asked for.
    """
    with durable.drafted(root / FILE) as draft:
        draft.write_text(request.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(root: Path) -> Request:
    """Return what was last asked of a results folder.

    Args:
        root: The results folder.

    Returns:
        The request.

    Raises:
        InputError: Nothing was asked of it, or by another version.
    """
    try:
        return Request.model_validate(json.loads((root / FILE).read_text(encoding="utf-8")))
    except OSError:
        raise InputError(
            f"{root}: no run was started in this folder; start one: bench run SUITE --results {root}"
        ) from None
    except ValueError:
        raise InputError(
            f"{root / FILE}: not a request of this version; start the run again: "
            f"bench run SUITE --results {root}"
        ) from None


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the modules that two plans share and whose code differs.

    Args:
        before: Digests by module.
        now: Digests by module.

    Returns:
        Names of modules, sorted.
    """
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
