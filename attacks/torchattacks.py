"""Adapters of torchattacks (Kim 2020, arXiv:2010.01950): `torchattacks/NAME` for the attacks of the library.

Each takes the parameters of the library's own class but those that a suite sets in another way: the radius,
the norm, the targets, the number of classes, the seed. The faults that are repaired are in
`docs/libraries.md`, by id. Not adapted: `VANILA` (our `none`), `MultiAttack` (a suite's columns) and `LGV`,
which trains.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.common.library_adapter import (
    L0,
    L1,
    L2,
    LINF,
    Adapter,
    Call,
    LibraryAttack,
    cost,
    parameter,
    unreachable_with,
)
from bench import Images, InputError, Labels, Shape, Threat


def _tuned_cost(*, steps: int, N: int, **_: object) -> int:
    return steps * (N + 1)


TABLE: dict[str, LibraryAttack] = {
    "APGD": LibraryAttack("Auto-PGD (Croce and Hein 2020).", norms=LINF | L2, targeted=False),
    "APGDT": LibraryAttack(
        "Auto-PGD on the targeted DLR loss, class after class (Croce and Hein 2020).",
        norms=LINF | L2,
        cost=lambda **params: 9 * cost(**params),
        least_classes=4,
        targeted=False,
    ),
    "AutoAttack-10": LibraryAttack(
        "The library's AutoAttack: 10 steps where the official one has 100 (T5).",
        norms=LINF | L2,
        cost=lambda *, version: {"standard": 5200, "plus": 5600, "rand": 400}[version],
        least_classes=4,
        targeted=False,
    ),
    "BIM": LibraryAttack("Basic iterative method (Kurakin et al. 2017).", norms=LINF),
    "CW": LibraryAttack(
        "Carlini and Wagner (2017) with one constant for all and no search for it (T4).",
        norms=L2,
        kind="minimum-norm",
    ),
    "DIFGSM": LibraryAttack("Diverse inputs (Xie et al. 2019).", norms=LINF, square=True),
    "DeepFool": LibraryAttack(
        "DeepFool (Moosavi-Dezfooli et al. 2016), image by image.",
        norms=L2,
        kind="minimum-norm",
        targeted=False,
    ),
    "EADEN": LibraryAttack(
        "Elastic net, by its rule EN (Chen et al. 2018).", norms=L1 | L2, kind="minimum-norm"
    ),
    "EADL1": LibraryAttack("Elastic net, by its rule L1 (Chen et al. 2018).", norms=L1, kind="minimum-norm"),
    "EOTPGD": LibraryAttack("PGD on gradients averaged over several draws (Zimmermann 2019).", norms=LINF),
    "FAB": LibraryAttack("Fast adaptive boundary (Croce and Hein 2020).", norms=LINF | L2, targeted=False),
    "FFGSM": LibraryAttack(
        "Fast adversarial training's FGSM from a random start (Wong et al. 2020).", norms=LINF
    ),
    "FGSM": LibraryAttack("Fast gradient sign method (Goodfellow et al. 2015).", norms=LINF),
    "GN": LibraryAttack(
        "Gaussian noise, once.", norms=LINF | L2, access="decision", kind="minimum-norm", targeted=False
    ),
    "JSMA": LibraryAttack(
        "Jacobian saliency map, towards the next class (Papernot et al. 2016).", norms=L0, kind="minimum-norm"
    ),
    "Jitter": LibraryAttack("Scaled logits with noise (Schwinn et al. 2021).", norms=LINF),
    "MIFGSM": LibraryAttack("Momentum (Dong et al. 2018).", norms=LINF),
    "NIFGSM": LibraryAttack("Nesterov momentum (Lin et al. 2020).", norms=LINF),
    "OnePixel": LibraryAttack(
        "Differential evolution of a few pixels (Su et al. 2019).",
        norms=L0,
        kind="minimum-norm",
        access="score",
    ),
    "PGD": LibraryAttack("Projected gradient descent (Madry et al. 2018).", norms=LINF),
    "PGDL2": LibraryAttack("Projected gradient descent (Madry et al. 2018).", norms=L2),
    "PGDRS": LibraryAttack("PGD against randomised smoothing (Salman et al. 2019).", norms=LINF),
    "PGDRSL2": LibraryAttack("PGD against randomised smoothing (Salman et al. 2019).", norms=L2),
    "PIFGSM": LibraryAttack("Patch-wise FGSM (Gao et al. 2020).", norms=LINF, channels=3, targeted=False),
    "PIFGSMPP": LibraryAttack("Patch-wise FGSM++ (Gao et al. 2020).", norms=LINF, channels=3),
    "Pixle": LibraryAttack(
        "Rearranged pixels (Pomponi et al. 2022).", norms=L0, kind="minimum-norm", access="score", square=True
    ),
    "RFGSM": LibraryAttack("FGSM after a random step (Tramer et al. 2018).", norms=LINF),
    "SINIFGSM": LibraryAttack("Nesterov momentum over scaled copies (Lin et al. 2020).", norms=LINF),
    "SPSA": LibraryAttack(
        "SPSA with one direction for the whole batch (T8); ours is `spsa`.",
        norms=LINF,
        access="score",
        cost=lambda *, nb_iter, nb_sample, **_: 2 * nb_iter * nb_sample,
    ),
    "SparseFool": LibraryAttack(
        "SparseFool (Modas et al. 2019), image by image.", norms=L0, kind="minimum-norm", targeted=False
    ),
    "Square": LibraryAttack("Square attack (Andriushchenko et al. 2020).", norms=LINF | L2, access="score"),
    "TIFGSM": LibraryAttack(
        "Translation-invariant gradients (Dong et al. 2019).", norms=LINF, channels=3, square=True
    ),
    "TPGD": LibraryAttack("PGD on the divergence of TRADES (Zhang et al. 2019).", norms=LINF, targeted=False),
    "UPGD": LibraryAttack("PGD with a choice of losses and momentum.", norms=LINF),
    "VMIFGSM": LibraryAttack("Variance-tuned momentum (Wang and He 2021).", norms=LINF, cost=_tuned_cost),
    "VNIFGSM": LibraryAttack(
        "Variance-tuned Nesterov momentum (Wang and He 2021).", norms=LINF, cost=_tuned_cost
    ),
}

SET_ELSEWHERE = {"self", "model", "eps", "max_epsilon", "norm", "n_classes", "seed", "verbose"}
"""By the threat, the view and the shard."""

SOFTMAX = frozenset(TABLE) - {
    "APGDT",
    "AutoAttack-10",
    "CW",
    "DeepFool",
    "EADEN",
    "EADL1",
    "FAB",
    "GN",
    "JSMA",
    "Jitter",
    "SPSA",
    "SparseFool",
}
"""Those that look at float32 probabilities, by a cross-entropy most of them (T23)."""

REAL = {"c", "kappa", "lam", "scale"}
"""Numbers that happen to have a whole default."""

CHOICES: dict[tuple[str, str], Any] = {
    ("APGD", "loss"): Literal["ce", "dlr"],
    ("AutoAttack-10", "version"): Literal["standard", "plus", "rand"],
    ("PGDRS", "noise_type"): Literal["guassian", "uniform"],
    ("PGDRSL2", "noise_type"): Literal["guassian", "uniform"],
    ("Pixle", "pixel_mapping"): Literal[
        "random", "similarity", "similarity_random", "distance", "distance_random"
    ],
    ("Square", "loss"): Literal["ce", "margin"],
    ("TIFGSM", "kernel_name"): Literal["gaussian", "linear", "uniform"],
    ("UPGD", "loss"): Literal["ce", "dlr", "margin"],
}

NUDGE = 1e-3
"""How far CW starts inside the box: its variable is infinite at 0 and 1, where pixels never move (T3)."""

TARGET_AS_LABEL = {"PIFGSMPP", "SPSA"}
"""They forget to look the target up, and go for whatever label they are called with (T9)."""


def _class(name: str) -> Any:
    try:
        import torchattacks
    except ImportError as error:
        raise InputError(
            f"torchattacks is not installed ({error}); pip install 'crossfire-bench[libraries]' brings it"
        ) from None
    return getattr(torchattacks, name.removesuffix("-10"))


def _signature(name: str) -> Iterable[inspect.Parameter]:
    """Return the parameters of the library's class; it has no annotations, only defaults."""
    found = []
    for each in inspect.signature(_class(name).__init__).parameters.values():
        if each.name in SET_ELSEWHERE:
            continue
        kind: Any = float if each.name in REAL else type(each.default)
        if kind is tuple:
            kind = tuple[tuple(type(value) for value in each.default)]  # type: ignore[misc]
        default = float(each.default) if kind is float else each.default
        found.append(parameter(each.name, default, CHOICES.get((name, each.name), kind)))
    return found


def _prepare(name: str, threat: Threat, params: Mapping[str, Any]) -> Call:
    """Return the library's attack, with its parameters."""
    cls = _class(name)
    taken = inspect.signature(cls.__init__).parameters

    def call(model: nn.Module, x: Images, y: Labels, target: Labels | None, seed: int) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1] if name in ("APGDT", "AutoAttack-10", "FAB", "JSMA") else 0
        offered: dict[str, Any] = {
            "eps": threat.radius,
            "max_epsilon": threat.radius,
            "norm": {"linf": "Linf", "l2": "L2"}.get(threat.norm),
            "n_classes": classes,
            "seed": seed,
        }
        attack = cls(model, **{key: value for key, value in offered.items() if key in taken}, **params)
        if name == "JSMA" and target is None:
            # The library's own choice, but for as many classes as there are (T6).
            target = (y + 1) % classes
        if target is not None:
            goal = target
            attack.set_mode_targeted_by_function(lambda *_: goal, quiet=True)
        if name == "CW":
            x = x.clamp(NUDGE, 1 - NUDGE)
        found: Tensor = attack(x, y if target is None or name not in TARGET_AS_LABEL else target)
        return found

    return call


def _flags(name: str, threat: Threat, params: Mapping[str, Any]) -> str | None:
    if name == "SPSA":
        return unreachable_with(threat, params, "nb_iter", "lr")
    return unreachable_with(threat, params, "steps", "alpha")


def _check_params(name: str, params: Mapping[str, Any]) -> None:
    if name in ("EADEN", "EADL1") and params["abort_early"] and params["max_iterations"] < 10:
        # It divides by a tenth of them, rounded down (T17).
        raise InputError(f"max_iterations must be 10 or more to abort early, not {params['max_iterations']}")


def _unfit(name: str, params: Mapping[str, Any], shape: Shape) -> str | None:
    least = {"APGD": 3, "UPGD": 4}.get(name, 0)
    if params.get("loss") == "dlr" and shape.classes < least:
        return f"its loss dlr needs {least} classes, there are {shape.classes}"
    return None


ADAPTER = Adapter(
    library="torchattacks",
    module=__name__,
    signature=_signature,
    prepare=_prepare,
    flags=_flags,
    check_params=_check_params,
    unfit=_unfit,
    lift=True,
    softmax=SOFTMAX,
)

for _name, _row in TABLE.items():
    ADAPTER.register(_name, _row)
