"""Adapters of foolbox (Rauber et al. 2020, doi:10.21105/joss.02607): `foolbox/NAME` for its attacks.

Each takes the parameters of the library's own class but those that a suite sets in another way: the
radius, the distance, the targets. Where the library has a short name for a class (`LinfPGD`), it is used.
The faults that are repaired are in `docs/libraries.md`, by id. Not adapted: `DatasetAttack` (needs other
images than the shard's), `BinarizationRefinementAttack` (refines what another attack found) and
`SpatialAttack` (moves images by no norm).
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, get_type_hints

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
    parameter,
    unreachable_with,
)
from bench import Images, InputError, Labels, Threat

ANY = LINF | L2 | L1 | L0


def _fmn_cost(*, steps: int, binary_search_steps: int, **_: object) -> int:
    return 1 + steps + binary_search_steps


TABLE: dict[str, LibraryAttack] = {
    "BinarySearchContrastReductionAttack": LibraryAttack(
        "Less contrast, by bisection.", norms=ANY, access="decision", kind="minimum-norm"
    ),
    "BoundaryAttack": LibraryAttack(
        "Boundary attack (Brendel et al. 2018).", norms=L2, kind="minimum-norm", access="decision"
    ),
    "DDNAttack": LibraryAttack(
        "Decoupled direction and norm (Rony et al. 2019).", norms=L2, kind="minimum-norm"
    ),
    "EADAttack": LibraryAttack("Elastic net (Chen et al. 2018).", norms=L1, kind="minimum-norm"),
    "FGM": LibraryAttack("Fast gradient method.", norms=L2, targeted=False),
    "FGSM": LibraryAttack("Fast gradient sign method (Goodfellow et al. 2015).", norms=LINF, targeted=False),
    "GaussianBlurAttack": LibraryAttack(
        "More and more blur.", norms=ANY, access="decision", kind="minimum-norm"
    ),
    "GenAttack": LibraryAttack("Genetic search (Alzantot et al. 2019).", norms=LINF, access="score"),
    "HopSkipJumpAttack": LibraryAttack(
        "HopSkipJump (Chen et al. 2020).",
        norms=LINF | L2,
        kind="minimum-norm",
        access="decision",
        cost=lambda *, steps, max_gradient_eval_steps, **_: 100 + steps * (max_gradient_eval_steps + 100),
    ),
    "InversionAttack": LibraryAttack("The negative.", norms=ANY, access="decision", kind="minimum-norm"),
    "L0BrendelBethgeAttack": LibraryAttack(
        "Along the boundary (Brendel et al. 2019).", norms=L0, kind="minimum-norm"
    ),
    "L0FMNAttack": LibraryAttack(
        "Fast minimum norm (Pintor et al. 2021).", norms=L0, kind="minimum-norm", cost=_fmn_cost
    ),
    "L1AdamBasicIterativeAttack": LibraryAttack("Basic iterative method, by Adam.", norms=L1),
    "L1AdamPGD": LibraryAttack("Projected gradient descent, by Adam.", norms=L1),
    "L1BasicIterativeAttack": LibraryAttack("Basic iterative method.", norms=L1),
    "L1BrendelBethgeAttack": LibraryAttack(
        "Along the boundary (Brendel et al. 2019).", norms=L1, kind="minimum-norm"
    ),
    "L1FMNAttack": LibraryAttack(
        "Fast minimum norm (Pintor et al. 2021).", norms=L1, kind="minimum-norm", cost=_fmn_cost
    ),
    "L1FastGradientAttack": LibraryAttack("Fast gradient method.", norms=L1, targeted=False),
    "L1MomentumIterativeFastGradientMethod": LibraryAttack("Momentum (Dong et al. 2018).", norms=L1),
    "L1PGD": LibraryAttack("Projected gradient descent.", norms=L1),
    "L2AdamBasicIterativeAttack": LibraryAttack("Basic iterative method, by Adam.", norms=L2),
    "L2AdamPGD": LibraryAttack("Projected gradient descent, by Adam.", norms=L2),
    "L2AdditiveGaussianNoiseAttack": LibraryAttack(
        "Gaussian noise, once.", norms=L2, access="decision", targeted=False
    ),
    "L2AdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise, once.", norms=L2, access="decision", targeted=False
    ),
    "L2BasicIterativeAttack": LibraryAttack("Basic iterative method.", norms=L2),
    "L2BrendelBethgeAttack": LibraryAttack(
        "Along the boundary (Brendel et al. 2019).", norms=L2, kind="minimum-norm"
    ),
    "L2CarliniWagnerAttack": LibraryAttack(
        "Carlini and Wagner (2017); it stops by the loss of the batch (F10); ours is `cw-l2`.",
        norms=L2,
        kind="minimum-norm",
    ),
    "L2ClippingAwareAdditiveGaussianNoiseAttack": LibraryAttack(
        "Gaussian noise in the box, once.", norms=L2, access="decision", targeted=False
    ),
    "L2ClippingAwareAdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise in the box, once.", norms=L2, access="decision", targeted=False
    ),
    "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack": LibraryAttack(
        "Gaussian noise in the box, until it hits.", norms=L2, access="decision"
    ),
    "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise in the box, until it hits.", norms=L2, access="decision"
    ),
    "L2ContrastReductionAttack": LibraryAttack(
        "Less contrast, once.", norms=L2, access="decision", targeted=False
    ),
    "L2DeepFoolAttack": LibraryAttack(
        "DeepFool (Moosavi-Dezfooli et al. 2016).", norms=L2, kind="minimum-norm", targeted=False
    ),
    "L2FMNAttack": LibraryAttack(
        "Fast minimum norm (Pintor et al. 2021).", norms=L2, kind="minimum-norm", cost=_fmn_cost
    ),
    "L2MomentumIterativeFastGradientMethod": LibraryAttack("Momentum (Dong et al. 2018).", norms=L2),
    "L2PGD": LibraryAttack("Projected gradient descent.", norms=L2),
    "L2RepeatedAdditiveGaussianNoiseAttack": LibraryAttack(
        "Gaussian noise, until it hits.", norms=L2, access="decision"
    ),
    "L2RepeatedAdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise, until it hits.", norms=L2, access="decision"
    ),
    "LInfFMNAttack": LibraryAttack(
        "Fast minimum norm (Pintor et al. 2021).", norms=LINF, kind="minimum-norm", cost=_fmn_cost
    ),
    "LinearSearchBlendedUniformNoiseAttack": LibraryAttack(
        "More and more of a random image.",
        norms=ANY,
        access="decision",
        kind="minimum-norm",
        cost=lambda *, directions, steps: 1 + directions + steps,
    ),
    "LinearSearchContrastReductionAttack": LibraryAttack(
        "Less contrast, step by step.", norms=ANY, access="decision", kind="minimum-norm"
    ),
    "LinfAdamBasicIterativeAttack": LibraryAttack("Basic iterative method, by Adam.", norms=LINF),
    "LinfAdamPGD": LibraryAttack("Projected gradient descent, by Adam.", norms=LINF),
    "LinfAdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise, once.", norms=LINF, access="decision", targeted=False
    ),
    "LinfBasicIterativeAttack": LibraryAttack("Basic iterative method (Kurakin et al. 2017).", norms=LINF),
    "LinfDeepFoolAttack": LibraryAttack(
        "DeepFool (Moosavi-Dezfooli et al. 2016).", norms=LINF, kind="minimum-norm", targeted=False
    ),
    "LinfPGD": LibraryAttack("Projected gradient descent (Madry et al. 2018).", norms=LINF),
    "LinfRepeatedAdditiveUniformNoiseAttack": LibraryAttack(
        "Uniform noise, until it hits.", norms=LINF, access="decision"
    ),
    "LinfinityBrendelBethgeAttack": LibraryAttack(
        "Along the boundary (Brendel et al. 2019).", norms=LINF, kind="minimum-norm"
    ),
    "MIFGSM": LibraryAttack("Momentum (Dong et al. 2018).", norms=LINF),
    "NewtonFoolAttack": LibraryAttack(
        "NewtonFool (Jang et al. 2017).", norms=L2, kind="minimum-norm", targeted=False
    ),
    "PointwiseAttack": LibraryAttack(
        "Pixels put back one by one (Schott et al. 2019).", norms=ANY, access="decision", kind="minimum-norm"
    ),
    "SaltAndPepperNoiseAttack": LibraryAttack(
        "Salt and pepper, ever less.", norms=L2, kind="minimum-norm", access="decision"
    ),
    "SparseL1DescentAttack": LibraryAttack("Sparse l1 descent (Tramer and Boneh 2019).", norms=L1),
    "VirtualAdversarialAttack": LibraryAttack(
        "Virtual adversarial (Miyato et al. 2018).", norms=L2, targeted=False
    ),
}

SET_ELSEWHERE = {"self", "distance", "constraint", "init_attack", "tensorboard", "channel_axis"}
"""By the threat, or not for a suite: other attacks, log folders, the order of a tensor's axes."""

SOFTMAX = frozenset(
    name
    for name in TABLE
    if name in ("DDNAttack", "FGM", "FGSM", "MIFGSM", "NewtonFoolAttack", "SparseL1DescentAttack")
    or name.endswith(
        ("PGD", "BasicIterativeAttack", "FastGradientAttack", "FastGradientMethod", "DeepFoolAttack")
    )
    or name == "VirtualAdversarialAttack"
)
"""Those that look at float32 probabilities, by a cross-entropy most of them (F15); DeepFool if told to."""

BLACK = {"EADAttack", "L2CarliniWagnerAttack"}
"""They return a black image where they found nothing; it may happen to be wrong, far away (F6)."""


@cache
def _library() -> Any:
    """Return the library; of GitPython, which it imports for its model zoo, we need nothing (F1)."""
    before = os.environ.get("GIT_PYTHON_REFRESH")
    os.environ["GIT_PYTHON_REFRESH"] = "quiet"
    try:
        import foolbox
    except ImportError as error:
        # GitPython's message goes on for a page.
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"foolbox cannot be imported ({said}); pip install 'crossfire-bench[libraries]' brings it, and "
            "it needs the git executable (apt install git, or the like)"
        ) from None
    finally:
        if before is None:
            del os.environ["GIT_PYTHON_REFRESH"]
        else:
            os.environ["GIT_PYTHON_REFRESH"] = before
    return foolbox


def _signature(name: str) -> Iterable[inspect.Parameter]:
    """Return the parameters of the library's class."""
    cls = getattr(_library().attacks, name)
    if "BrendelBethge" in name and find_spec("numba") is None:
        raise InputError(f"foolbox's {name} needs numba, which is not installed: pip install numba")
    hints = get_type_hints(cls.__init__)
    found = []
    for each in inspect.signature(cls.__init__).parameters.values():
        if each.name in SET_ELSEWHERE or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        default = float(each.default) if hints[each.name] is float else each.default
        found.append(parameter(each.name, default, hints[each.name]))
    return found


def _prepare(name: str, threat: Threat, params: Mapping[str, Any]) -> Call:
    """Return the library's attack, with its parameters."""
    foolbox = _library()
    cls = getattr(foolbox.attacks, name)
    taken = inspect.signature(cls.__init__).parameters
    offered = {"distance": getattr(foolbox.distances, threat.norm), "constraint": threat.norm}
    attack = cls(**{key: value for key, value in offered.items() if key in taken}, **params)
    # One radius, or none, and never a list of them (F8).
    radius = threat.radius if TABLE[name].kind == "fixed-budget" else None

    def call(model: nn.Module, x: Images, y: Labels, target: Labels | None, seed: int) -> Tensor:
        # Without a device it moves the model to the first GPU (F3).
        seen = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        if name == "GenAttack" and target is None:
            # It knows targets only: the class that comes next.
            with torch.no_grad():
                target = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
        criterion = (
            foolbox.criteria.Misclassification(y)
            if target is None
            else foolbox.criteria.TargetedMisclassification(target)
        )
        found: Tensor = attack(seen, x, criterion, epsilons=radius)[1]
        if name in BLACK:
            found = torch.where((found == 0).all((1, 2, 3), keepdim=True), x, found)
        return found

    return call


def _flags(name: str, threat: Threat, params: Mapping[str, Any]) -> str | None:
    if params.get("abs_stepsize") is not None:
        return unreachable_with(threat, params, "steps", "abs_stepsize")
    if "rel_stepsize" in params:
        relative = {**params, "rel_stepsize": params["rel_stepsize"] * threat.radius}
        return unreachable_with(threat, relative, "steps", "rel_stepsize")
    return None


ADAPTER = Adapter(
    library="foolbox",
    module=__name__,
    signature=_signature,
    prepare=_prepare,
    flags=_flags,
    lift=False,
    softmax=SOFTMAX,
)

for _name, _row in TABLE.items():
    ADAPTER.register(_name, _row)
