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

from attacks.common.library_adapter import Adapter, Needs, parameter, reach
from bench import Images, InputError, Labels, Norm, Threat

LINF: frozenset[Norm] = frozenset({"linf"})
L2: frozenset[Norm] = frozenset({"l2"})
L1: frozenset[Norm] = frozenset({"l1"})
L0: frozenset[Norm] = frozenset({"l0"})
ANY = LINF | L2 | L1 | L0

TABLE: dict[str, Needs] = {
    "BinarySearchContrastReductionAttack": Needs(
        "Less contrast, by bisection.", ANY, access="decision", budget="distance"
    ),
    "BoundaryAttack": Needs(
        "Boundary attack (Brendel et al. 2018).", L2, budget="distance", access="decision"
    ),
    "DDNAttack": Needs("Decoupled direction and norm (Rony et al. 2019).", L2, budget="distance"),
    "EADAttack": Needs("Elastic net (Chen et al. 2018).", L1, budget="distance"),
    "FGM": Needs("Fast gradient method.", L2, targeted=False),
    "FGSM": Needs("Fast gradient sign method (Goodfellow et al. 2015).", LINF, targeted=False),
    "GaussianBlurAttack": Needs("More and more blur.", ANY, access="decision", budget="distance"),
    "GenAttack": Needs("Genetic search (Alzantot et al. 2019).", LINF, access="score"),
    "HopSkipJumpAttack": Needs(
        "HopSkipJump (Chen et al. 2020).", LINF | L2, budget="distance", access="decision"
    ),
    "InversionAttack": Needs("The negative.", ANY, access="decision", budget="distance"),
    "L0BrendelBethgeAttack": Needs("Along the boundary (Brendel et al. 2019).", L0, budget="distance"),
    "L0FMNAttack": Needs("Fast minimum norm (Pintor et al. 2021).", L0, budget="distance"),
    "L1AdamBasicIterativeAttack": Needs("Basic iterative method, by Adam.", L1),
    "L1AdamPGD": Needs("Projected gradient descent, by Adam.", L1),
    "L1BasicIterativeAttack": Needs("Basic iterative method.", L1),
    "L1BrendelBethgeAttack": Needs("Along the boundary (Brendel et al. 2019).", L1, budget="distance"),
    "L1FMNAttack": Needs("Fast minimum norm (Pintor et al. 2021).", L1, budget="distance"),
    "L1FastGradientAttack": Needs("Fast gradient method.", L1, targeted=False),
    "L1MomentumIterativeFastGradientMethod": Needs("Momentum (Dong et al. 2018).", L1),
    "L1PGD": Needs("Projected gradient descent.", L1),
    "L2AdamBasicIterativeAttack": Needs("Basic iterative method, by Adam.", L2),
    "L2AdamPGD": Needs("Projected gradient descent, by Adam.", L2),
    "L2AdditiveGaussianNoiseAttack": Needs("Gaussian noise, once.", L2, access="decision", targeted=False),
    "L2AdditiveUniformNoiseAttack": Needs("Uniform noise, once.", L2, access="decision", targeted=False),
    "L2BasicIterativeAttack": Needs("Basic iterative method.", L2),
    "L2BrendelBethgeAttack": Needs("Along the boundary (Brendel et al. 2019).", L2, budget="distance"),
    "L2CarliniWagnerAttack": Needs(
        "Carlini and Wagner (2017); it stops by the loss of the batch (F10); ours is `cw-l2`.",
        L2,
        budget="distance",
    ),
    "L2ClippingAwareAdditiveGaussianNoiseAttack": Needs(
        "Gaussian noise in the box, once.", L2, access="decision", targeted=False
    ),
    "L2ClippingAwareAdditiveUniformNoiseAttack": Needs(
        "Uniform noise in the box, once.", L2, access="decision", targeted=False
    ),
    "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack": Needs(
        "Gaussian noise in the box, until it hits.", L2, access="decision"
    ),
    "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack": Needs(
        "Uniform noise in the box, until it hits.", L2, access="decision"
    ),
    "L2ContrastReductionAttack": Needs("Less contrast, once.", L2, access="decision", targeted=False),
    "L2DeepFoolAttack": Needs(
        "DeepFool (Moosavi-Dezfooli et al. 2016).", L2, budget="distance", targeted=False
    ),
    "L2FMNAttack": Needs("Fast minimum norm (Pintor et al. 2021).", L2, budget="distance"),
    "L2MomentumIterativeFastGradientMethod": Needs("Momentum (Dong et al. 2018).", L2),
    "L2PGD": Needs("Projected gradient descent.", L2),
    "L2RepeatedAdditiveGaussianNoiseAttack": Needs("Gaussian noise, until it hits.", L2, access="decision"),
    "L2RepeatedAdditiveUniformNoiseAttack": Needs("Uniform noise, until it hits.", L2, access="decision"),
    "LInfFMNAttack": Needs("Fast minimum norm (Pintor et al. 2021).", LINF, budget="distance"),
    "LinearSearchBlendedUniformNoiseAttack": Needs(
        "More and more of a random image.", ANY, access="decision", budget="distance"
    ),
    "LinearSearchContrastReductionAttack": Needs(
        "Less contrast, step by step.", ANY, access="decision", budget="distance"
    ),
    "LinfAdamBasicIterativeAttack": Needs("Basic iterative method, by Adam.", LINF),
    "LinfAdamPGD": Needs("Projected gradient descent, by Adam.", LINF),
    "LinfAdditiveUniformNoiseAttack": Needs("Uniform noise, once.", LINF, access="decision", targeted=False),
    "LinfBasicIterativeAttack": Needs("Basic iterative method (Kurakin et al. 2017).", LINF),
    "LinfDeepFoolAttack": Needs(
        "DeepFool (Moosavi-Dezfooli et al. 2016).", LINF, budget="distance", targeted=False
    ),
    "LinfPGD": Needs("Projected gradient descent (Madry et al. 2018).", LINF),
    "LinfRepeatedAdditiveUniformNoiseAttack": Needs("Uniform noise, until it hits.", LINF, access="decision"),
    "LinfinityBrendelBethgeAttack": Needs(
        "Along the boundary (Brendel et al. 2019).", LINF, budget="distance"
    ),
    "MIFGSM": Needs("Momentum (Dong et al. 2018).", LINF),
    "NewtonFoolAttack": Needs("NewtonFool (Jang et al. 2017).", L2, budget="distance", targeted=False),
    "PointwiseAttack": Needs(
        "Pixels put back one by one (Schott et al. 2019).", ANY, access="decision", budget="distance"
    ),
    "SaltAndPepperNoiseAttack": Needs(
        "Salt and pepper, ever less.", L2, budget="distance", access="decision"
    ),
    "SparseL1DescentAttack": Needs("Sparse l1 descent (Tramer and Boneh 2019).", L1),
    "VirtualAdversarialAttack": Needs("Virtual adversarial (Miyato et al. 2018).", L2, targeted=False),
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


def _call(
    name: str,
    threat: Threat,
    params: Mapping[str, Any],
    model: nn.Module,
    x: Images,
    y: Labels,
    target: Labels | None,
    seed: int,
) -> Tensor:
    foolbox = _library()
    cls = getattr(foolbox.attacks, name)
    taken = inspect.signature(cls.__init__).parameters
    offered = {"distance": getattr(foolbox.distances, threat.norm), "constraint": threat.norm}
    attack = cls(**{key: value for key, value in offered.items() if key in taken}, **params)
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
    # One radius, or none, and never a list of them (F8).
    radius = threat.radius if TABLE[name].budget == "radius" else None
    found: Tensor = attack(seen, x, criterion, epsilons=radius)[1]
    if name in BLACK:
        found = torch.where((found == 0).all((1, 2, 3), keepdim=True), x, found)
    return found


def _doubts(name: str, threat: Threat, params: Mapping[str, Any]) -> str | None:
    if params.get("abs_stepsize") is not None:
        return reach(threat, params, "steps", "abs_stepsize")
    if "rel_stepsize" in params:
        relative = {**params, "rel_stepsize": params["rel_stepsize"] * threat.radius}
        return reach(threat, relative, "steps", "rel_stepsize")
    return None


for _name, _needs in TABLE.items():
    Adapter(
        library="foolbox",
        module=__name__,
        name=_name,
        needs=_needs,
        signature=_signature,
        call=_call,
        doubts=_doubts,
        lift=False,
        softmax=SOFTMAX,
    ).register()
