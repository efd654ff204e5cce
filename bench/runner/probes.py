"""Probes: the answers of a fitted network to a few fixed images, by which it is recognised.

Weights alone do not determine a network. Its answers also depend on code elsewhere, on files that the
constructor reads, on draws without a seed and on attributes that are no buffers. The receipt of a training
therefore keeps the answers, and whoever restores the network compares them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from bench.noise import Noise
from bench.protocols import Images, Shape
from bench.referee.freezing import seeded
from bench.registry import DefenseEntry

IMAGES = 4
"""Number of images, half of them noise and half of them smooth."""

KEPT = 16
"""Number of logits that are kept for each image."""

SAME = 1e-5
"""Tolerance on the same kind of machine, as a share of the range of the answers: rounding."""

ALIKE = 0.05
"""Tolerance on another kind of machine, for at least half of the images: a long search may end elsewhere."""

Answers = Mapping[str, list[list[float | None]]]
"""A row of numbers for each image, by read-out and view; None stands for a number that is not finite."""


def images(shape: Shape, device: torch.device | str) -> Images:
    """Return the images of the probes, equal for every network of this shape.

    Args:
        shape: The shape of an image.
        device: The device to put them on.

    Returns:
        Images (`IMAGES`, C, H, W).
    """
    noise = Noise("probes", torch.arange(IMAGES))
    fine = noise.uniform(tuple(shape[:3]))
    coarse = noise.uniform((shape.channels, 4, 4))
    smooth = interpolate(coarse, size=(shape.height, shape.width), mode="bilinear", align_corners=False)
    first = torch.arange(IMAGES)[:, None, None, None] < IMAGES // 2
    return torch.where(first, fine, smooth.clamp(0, 1)).to(device)


def answers(model: Any, entry: DefenseEntry, shape: Shape, device: torch.device | str) -> Answers:
    """Return the answers of a network to the images of the probes.

    Args:
        model: A fitted defense, on `device`.
        entry: Its entry in the registry, with its read-outs and views.
        shape: The shape that it was constructed for.
        device: The device that it is on.

    Returns:
        For each read-out the label, the refusal, the score and the logits; for each view in pixel space the
        logits.
    """
    x = images(shape, device)
    found: dict[str, list[list[float | None]]] = {}
    with torch.no_grad():
        for readout in entry.readouts:
            with seeded(0, x.device):
                decision = model.decide(x.clone(), readout)
            columns = [decision.label[:, None], decision.rejected[:, None], decision.score[:, None]]
            if decision.logits is not None:
                columns.append(decision.logits[:, :KEPT])
            found[f"read-out {readout}"] = _rows(torch.cat([each.double() for each in columns], 1))
        for view in entry.views.values():
            if view.space == "pixel":
                with seeded(0, x.device):
                    logits = getattr(model, view.method)().logits(x.clone())
                found[f"view {view.name}"] = _rows(logits.reshape(-1, *logits.shape[-2:])[0, :, :KEPT])
    return found


def _rows(values: Tensor) -> list[list[float | None]]:
    """Return rows of numbers for JSON, with 8 significant digits, as many as a float32 has."""
    return [
        [float(f"{each:.8g}") if np.isfinite(each) else None for each in row]
        for row in values.detach().double().cpu().tolist()
    ]


def difference(kept: Answers, now: Answers, *, alike: bool) -> str | None:
    """Compare the answers of a network with those that were kept.

    Args:
        kept: The answers in the receipt.
        now: The answers of the network as it is built now.
        alike: True on another kind of machine or with other versions, where larger differences are allowed.

    Returns:
        A sentence about the first read-out or view that differs; None where none does.
    """
    if kept.keys() != now.keys():
        return f"it has {', '.join(sorted(now))}; it had {', '.join(sorted(kept))}"
    for name, rows in kept.items():
        before, after = (np.array(each, dtype=np.float64) for each in (rows, now[name]))
        if before.shape != after.shape:
            return f"{name} answers with {after.shape[1]} numbers, and answered with {before.shape[1]}"
        room = (ALIKE if alike else SAME) * _sizes(before, name)
        equal = (np.abs(before - after) <= room) | (np.isnan(before) & np.isnan(after))
        moved = ~equal.all(1)
        if moved.sum() > (IMAGES // 2 if alike else 0):
            far = float(np.nan_to_num(np.abs(before - after)).max())
            return f"{name} answers otherwise to {int(moved.sum())} of {IMAGES} images, by up to {far:.3g}"
    return None


def _sizes(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Return the magnitude of each column, the scale of its tolerance; all logits share one."""
    sizes: NDArray[np.float64] = np.nan_to_num(np.abs(values)).max(0)
    # Labels and refusals have no tolerance; scores have a scale of their own.
    exact, own = (2, 3) if name.startswith("read-out") else (0, 0)
    sizes[:exact] = 0.0
    sizes[own:] = sizes[own:].max(initial=0.0)
    return sizes
