"""Crossfire: attacks crossed with defenses, and tables whose numbers can be trusted.

The names that attacks, defenses and plug-ins are written with. They load on first use, so that
commands that need no torch do not import it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.direct import Loaded, Result, evaluate
    from bench.errors import BenchError, InputError, TrainingError
    from bench.examples import Examples, Pixels, Places, Source
    from bench.losses import Loss, eot, objective, succeeded
    from bench.networks import Classifier, check_network, check_normalisation
    from bench.protocols import (
        Attack,
        Crafted,
        Decision,
        Defense,
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
    from bench.registry import CodePath, ContentPath, attack, defense, source, view, view_of
    from bench.sources import module_file

_HOME = {
    "direct": ("Loaded", "Result", "evaluate"),
    "errors": ("BenchError", "InputError", "TrainingError"),
    "examples": ("Examples", "Pixels", "Places", "Source"),
    "losses": ("Loss", "eot", "objective", "succeeded"),
    "networks": ("Classifier", "check_network", "check_normalisation"),
    "protocols": (
        "Attack",
        "Crafted",
        "Decision",
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
    "registry": ("CodePath", "ContentPath", "attack", "defense", "source", "view", "view_of"),
    "sources": ("module_file",),
}

__all__ = [
    "Attack",
    "BenchError",
    "Classifier",
    "CodePath",
    "ContentPath",
    "Crafted",
    "Decision",
    "Defense",
    "Examples",
    "Features",
    "Fitting",
    "Images",
    "InputError",
    "Inversion",
    "Labels",
    "Loaded",
    "Loss",
    "Norm",
    "Part",
    "Pixels",
    "Places",
    "Prototypes",
    "Randomness",
    "Result",
    "Shape",
    "Source",
    "Split",
    "Threat",
    "TrainingError",
    "Use",
    "View",
    "answered",
    "attack",
    "check_network",
    "check_normalisation",
    "defense",
    "eot",
    "evaluate",
    "lengths",
    "module_file",
    "objective",
    "source",
    "succeeded",
    "view",
    "view_of",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"bench.{module}"), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
