"""Crossfire: attacks crossed with defenses, and tables whose numbers can be trusted.

Three groups of names, which load on first use, so that what needs no torch does not import it:

- `evaluate`: attack a network in hand.
- `run`, `plan`, `table`, `outcomes`, `images`, `load`: task files and results folders, as the command line
  knows them.
- `attack`, `defense`, `view`, `source` and the types beside them: what attacks, defenses and plug-ins are
  written with.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.api import Finished, Outlook, images, load, outcomes, plan, run, table
    from bench.api.direct import Loaded, Result, evaluate
    from bench.api.stored import Shown
    from bench.data.source import Examples, Pixels, Places, Source
    from bench.errors import BenchError, InputError, TrainingError, beyond_the_code
    from bench.losses import Loss, eot, objective, succeeded
    from bench.networks import Classifier, check_network, check_normalisation
    from bench.protocols import (
        Attack,
        Crafted,
        Decision,
        Defense,
        Described,
        Explained,
        Features,
        Fitting,
        Images,
        Inversion,
        Labels,
        Norm,
        Part,
        Prototypes,
        Randomness,
        Shape,
        Split,
        Threat,
        Use,
        View,
        answered,
        lengths,
    )
    from bench.registry import (
        BoundAttack,
        CodePath,
        ContentPath,
        Count,
        Needs,
        NonNegative,
        NonNegativeCount,
        Positive,
        PositiveShare,
        Share,
        attack,
        bound,
        defense,
        labels_of,
        source,
        view,
        view_of,
    )
    from bench.remarks import remark
    from bench.results.fingerprint import module_file

_HOME = {
    "api": ("Finished", "Outlook", "images", "load", "outcomes", "plan", "run", "table"),
    "api.direct": ("Loaded", "Result", "evaluate"),
    "errors": ("BenchError", "InputError", "TrainingError", "beyond_the_code"),
    "data.source": ("Examples", "Pixels", "Places", "Source"),
    "losses": ("Loss", "eot", "objective", "succeeded"),
    "networks": ("Classifier", "check_network", "check_normalisation"),
    "protocols": (
        "Attack",
        "Crafted",
        "Decision",
        "Described",
        "Explained",
        "Defense",
        "Features",
        "Fitting",
        "Images",
        "Inversion",
        "Labels",
        "Norm",
        "Part",
        "Prototypes",
        "Randomness",
        "Shape",
        "Split",
        "Threat",
        "Use",
        "View",
        "answered",
        "lengths",
    ),
    "registry": (
        "BoundAttack",
        "CodePath",
        "ContentPath",
        "Count",
        "Needs",
        "NonNegative",
        "NonNegativeCount",
        "Positive",
        "PositiveShare",
        "Share",
        "attack",
        "bound",
        "defense",
        "labels_of",
        "source",
        "view",
        "view_of",
    ),
    "remarks": ("remark",),
    "results.fingerprint": ("module_file",),
    "api.stored": ("Shown",),
}

__all__ = [
    "Attack",
    "BenchError",
    "BoundAttack",
    "Classifier",
    "CodePath",
    "ContentPath",
    "Count",
    "Crafted",
    "Decision",
    "Defense",
    "Described",
    "Examples",
    "Explained",
    "Features",
    "Finished",
    "Fitting",
    "Images",
    "InputError",
    "Inversion",
    "Labels",
    "Loaded",
    "Loss",
    "Needs",
    "NonNegative",
    "NonNegativeCount",
    "Norm",
    "Outlook",
    "Part",
    "Pixels",
    "Places",
    "Positive",
    "PositiveShare",
    "Prototypes",
    "Randomness",
    "Result",
    "Shape",
    "Share",
    "Shown",
    "Source",
    "Split",
    "Threat",
    "TrainingError",
    "Use",
    "View",
    "answered",
    "attack",
    "beyond_the_code",
    "bound",
    "check_network",
    "check_normalisation",
    "defense",
    "eot",
    "evaluate",
    "images",
    "labels_of",
    "lengths",
    "load",
    "module_file",
    "objective",
    "outcomes",
    "plan",
    "remark",
    "run",
    "source",
    "succeeded",
    "table",
    "view",
    "view_of",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("crossfire-bench")
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"bench.{module}"), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
